"""K-FAC in float64 NumPy, written from the formulas and from nothing else.

One dense layer: activations `a` [B, d_in], output-gradients `g` [B, d_out], a weight gradient
[d_out, d_in]. And the general case: inputs [N, S, d_in], gradients [V, N, S, d_out].
"""

import numpy as np


class Layer:
    """K-FAC of one dense layer: factors as moving averages, damping by their traces."""

    def __init__(self, d_in, d_out, *, ema=0.95, damping=1e-3, eps=1e-12):
        self.sizes = d_in, d_out
        self.ema, self.damping, self.eps = min(max(ema, 0.0), 1.0), damping, eps
        self.A = self.G = None
        self.updates = 0

    def update(self, a, g):
        a, g = np.asarray(a, np.float64), np.asarray(g, np.float64)
        assert a.shape[1:] + g.shape[1:] == self.sizes
        assert len(a) == len(g) > 0
        A, G = a.T @ a / len(a), g.T @ g / len(g)
        if self.A is not None:
            A = self.ema * self.A + (1 - self.ema) * A
            G = self.ema * self.G + (1 - self.ema) * G
        self.A, self.G = A, G
        self.updates += 1

    def damped(self, M):
        return M + max(self.damping * np.trace(M) / len(M), self.eps) * np.eye(len(M))

    def natural_gradient(self, W):
        """G⁻¹ W A⁻¹ for W [d_out, d_in]."""
        return np.linalg.inv(self.damped(self.G)) @ W @ np.linalg.inv(self.damped(self.A))


def factors(a, g, weights=None, approx="expand"):
    """A [d_in, d_in] and G [d_out, d_out] of a [N, S, d_in] and g [V, N, S, d_out], by loops."""
    a, g = np.asarray(a, np.float64), np.asarray(g, np.float64)
    if approx == "reduce":
        a, g = a.mean(1, keepdims=True), g.sum(2, keepdims=True)
    N, S, d_in = a.shape
    w = np.ones(N) if weights is None else np.asarray(weights, np.float64)
    A, G = np.zeros((d_in, d_in)), np.zeros((g.shape[-1],) * 2)
    for n in range(N):
        for s in range(S):
            A += w[n] * np.outer(a[n, s], a[n, s]) / (S * w.sum())
            for v in range(len(g)):
                G += np.outer(g[v, n, s], g[v, n, s]) / N
    return A, G if len(g) else np.eye(len(G))


def solve(A, G, X, damping, rule, eps=1e-12):
    """The damped inverse of A ⊗ G applied to X [d_in, d_out], by the dense Kronecker product."""
    A, G, X = (np.asarray(x, np.float64) for x in (A, G, X))
    ones = np.eye(len(A)), np.eye(len(G))
    if rule == "exact":
        matrix = np.kron(A, G) + damping * np.eye(X.size)
    elif rule == "pi":
        traces = np.trace(A) / len(A), np.trace(G) / len(G)
        pi = np.sqrt(traces[0] / traces[1]) if min(traces) > 0 else 1.0
        matrix = np.kron(A + pi * np.sqrt(damping) * ones[0], G + np.sqrt(damping) / pi * ones[1])
    else:
        parts = [M + max(damping * np.trace(M) / len(M), eps) * np.eye(len(M)) for M in (A, G)]
        matrix = np.kron(*parts)
    return np.linalg.solve(matrix, X.reshape(-1)).reshape(X.shape)
