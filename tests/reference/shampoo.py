"""Shampoo and SOAP as their formulas read, in NumPy float64 and complex128, by dense matrices.

Sources: Gupta et al., arXiv:1802.09568; Vyas et al., arXiv:2409.11321 (Algorithm 3); Lin et al.,
arXiv:2509.03378.
"""

import numpy as np

from tests.reference import psgd


def power(S, exponent, epsilon=0.0):
    """`(S + ε λ_max I)^exponent` of a Hermitian matrix, or of a diagonal one given as a vector."""
    if np.ndim(S) == 1:
        return (S + epsilon * S.max()) ** exponent
    values, basis = np.linalg.eigh(S)
    return (basis * (values + epsilon * values.max()) ** exponent) @ basis.conj().T


class Shampoo:
    """One block; `decay=None`: sums."""

    def __init__(
        self, shape, diagonal, *, decay=0.9, corrected=True, order=None, epsilon=0.0, every=1
    ):
        self.diagonal, self.decay, self.corrected = diagonal, decay, corrected
        self.order = order or 2 * max(sum(d > 1 for d in shape), 1)
        self.epsilon, self.every, self.steps = epsilon, every, 0
        self.statistics = [0.0] * len(shape)
        self.roots = None

    def step(self, G):
        self.steps += 1
        for i, diag in enumerate(self.diagonal):
            C = psgd.gram(G, i, diagonal=diag)
            S = self.statistics[i]
            new = S + C if self.decay is None else self.decay * S + (1 - self.decay) * C
            self.statistics[i] = new
        correct = self.decay is not None and self.corrected
        weight = 1 - self.decay**self.steps if correct else 1.0
        due = self.roots is None or self.steps % self.every == 0
        new = [power(S / weight, -1 / self.order, self.epsilon) for S in self.statistics]
        if max(G.shape) > 1:
            new = [np.ones(1) if d == 1 else root for root, d in zip(new, G.shape, strict=True)]
        # Those of diagonals are never old.
        self.roots = [
            root if due or diag else self.roots[i]
            for i, (root, diag) in enumerate(zip(new, self.diagonal, strict=True))
        ]
        return psgd.apply(self.roots, G)


class Soap:
    """One block with dense factors on all axes, for every variant.

    It begins with eigenvectors of the first statistics, or with one power iteration of the identity
    by the first moments.
    """

    def __init__(
        self,
        shape,
        *,
        variant="soap",
        betas=(0.9, 0.8),
        factor_decay=0.7,
        every=1,
        begins="eigenvectors",
    ):
        self.shape, self.variant, self.every, self.begins = shape, variant, every, begins
        (self.beta1, self.beta2), self.factor_decay = betas, factor_decay
        self.M, self.V, self.steps = 0.0, 0.0, 0
        self.statistics = self.bases = None

    def moments(self, G):
        """What the statistic of every axis takes in."""
        if self.variant == "soap":
            return [psgd.gram(G, i) for i in range(G.ndim)]
        inverse_roots = [
            (Q / np.sqrt(np.diag(Q.conj().T @ S @ Q).real)) @ Q.conj().T
            for Q, S in zip(self.bases, self.statistics, strict=True)
        ]
        found = []
        for i in range(G.ndim):
            whitened = G
            for j, root in enumerate(inverse_roots):
                whitened = whitened if i == j else psgd.along(root, j, whitened)
            found.append(psgd.gram(whitened, i) * G.shape[i] / G.size)
        return found

    def gather(self, G):
        b = self.factor_decay
        new = self.moments(G)
        self.statistics = [b * S + (1 - b) * C for S, C in zip(self.statistics, new, strict=True)]

    def step(self, G):
        self.steps += 1
        if self.statistics is None:
            scale = np.mean(np.abs(G) ** 2) ** (1 / G.ndim) if self.variant != "soap" else 0.0
            self.bases = [np.eye(d) for d in self.shape]
            self.statistics = [scale * np.eye(d) for d in self.shape]
            moments = self.moments(G)
            self.gather(G)
            if self.begins == "eigenvectors":
                self.bases = [np.linalg.eigh(S)[1][:, ::-1] for S in self.statistics]
            else:
                orders = [np.argsort(-np.diag(C).real, kind="stable") for C in moments]
                self.bases = [
                    np.linalg.qr(C[:, order])[0] for C, order in zip(moments, orders, strict=True)
                ]
        else:
            self.gather(G)
        self.M = self.beta1 * self.M + (1 - self.beta1) * G
        M = self.M / (1 - self.beta1**self.steps)
        if self.variant == "kl_shampoo":
            values = [
                np.diag(Q.conj().T @ S @ Q).real
                for Q, S in zip(self.bases, self.statistics, strict=True)
            ]
            update = psgd.apply_adjoint(self.bases, M)
            for axis, v in enumerate(values):
                update = psgd.along(np.diag(v**-0.5), axis, update)
        else:
            rotated = psgd.apply_adjoint(self.bases, G)
            self.V = self.beta2 * self.V + (1 - self.beta2) * np.abs(rotated) ** 2
            second = self.V / (1 - self.beta2**self.steps)
            update = psgd.apply_adjoint(self.bases, M) / (np.sqrt(second) + 1e-8)
            update /= np.maximum(np.abs(update) / self.largest_update(), 1)
        update = psgd.apply(self.bases, update)
        if self.steps > 1 and self.steps % self.every == 0:
            self.refresh()
        return update

    def largest_update(self):
        """That of Adam with any gradients in bases that stay."""
        ages = np.arange(self.steps)
        w, v = self.beta1**ages, self.beta2**ages
        return np.sqrt(np.max((w / np.sum(w)) / (v / np.sum(v))))

    def refresh(self):
        for axis, (Q, S) in enumerate(zip(self.bases, self.statistics, strict=True)):
            order = np.argsort(-np.diag(Q.conj().T @ S @ Q).real, kind="stable")
            self.bases[axis] = np.linalg.qr(S @ Q[:, order])[0]
            if self.variant != "kl_shampoo":
                self.V = np.take(self.V, order, axis=axis)
