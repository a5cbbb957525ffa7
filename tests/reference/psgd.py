"""PSGD-Kron as its formulas read, in NumPy float64 and complex128.

Written to be compared with, not to be fast: every formula is spelled out with einsum, kron and
solve. A tensor has axes d_1 ... d_N; factor i is [d_i, d_i], or [d_i] where it is diagonal, and
acts along axis i.

Sources: Li, arXiv:1512.04202, arXiv:2402.04553, arXiv:2402.11858.
"""

import numpy as np

# Of Q, and of P itself.
GEOMETRIES = ("EQ", "QEP", "QEQ", "Q0.5EQ1.5", "QUAD", "PRO4P", "QUAD4P")
OF_P = ("PRO4P", "QUAD4P")


def wide(array):
    """The array in float64 or complex128."""
    array = np.asarray(array)
    return array.astype(np.complex128 if np.iscomplexobj(array) else np.float64)


def dense(factor):
    """The factor as a matrix."""
    factor = wide(factor)
    return np.diag(factor) if factor.ndim == 1 else factor


def kron(factors):
    """The matrix that acts on a row-major vec(X) as the factors act on X."""
    matrix = np.ones((1, 1))
    for factor in factors:
        matrix = np.kron(matrix, dense(factor))
    return matrix


def along(matrix, axis, X):
    """`matrix` applied along one axis of X."""
    return np.moveaxis(np.einsum("ij,j...->i...", matrix, np.moveaxis(wide(X), axis, 0)), 0, axis)


def apply(factors, X):
    """Q·X."""
    for axis, factor in enumerate(factors):
        X = along(dense(factor), axis, X)
    return wide(X)


def apply_adjoint(factors, X):
    """Qᴴ·X."""
    for axis, factor in enumerate(factors):
        X = along(dense(factor).conj().T, axis, X)
    return wide(X)


def precondition(factors, X, geometry="QEQ"):
    """P·X with P = QᴴQ on every axis, or with factors of P."""
    result = apply(factors, X)
    return result if geometry in OF_P else apply_adjoint(factors, result)


def gram(X, axis, diagonal=False):
    """C_i(X) = unfold_i(X) unfold_i(X)ᴴ, or its diagonal."""
    unfolded = np.moveaxis(wide(X), axis, 0)
    unfolded = unfolded.reshape(unfolded.shape[0], int(np.prod(unfolded.shape[1:])))
    C = np.einsum("ik,jk->ij", unfolded, unfolded.conj())
    return np.diag(C).real if diagonal else C


def noised(G, V, damping, eps):
    """G̃ = G + (damping + eps·|G|)∘V."""
    return wide(G) + (damping + eps * np.abs(wide(G))) * wide(V)


def terms(geometry, factors, G, V, newton):
    """(T1, T2) of every factor; G is the noised gradient or Hessian-vector product, V the probe."""
    G, V = wide(G), wide(V)
    B = V
    if geometry == "EQ":
        for axis, factor in enumerate(factors):
            QH = dense(factor).conj().T
            B = along(np.linalg.solve(QH, np.eye(len(QH))), axis, B)
    pairs = []
    for axis, factor in enumerate(factors):
        Q = dense(factor)
        d = len(Q)
        if geometry == "EQ":
            T1, T2 = gram(apply(factors, G), axis), gram(B, axis)
        else:
            T1 = gram(precondition(factors, G, geometry), axis)
            T2 = gram(V, axis) if newton else (G.size / d) * np.eye(d)
        if np.ndim(factor) == 1:
            T1, T2 = np.diag(np.diag(T1)), np.diag(np.diag(T2))
        if geometry == "QEP":
            T1, T2 = Q @ T1 @ Q.conj().T, Q @ T2 @ Q.conj().T
        pairs.append((T1, T2))
    return [
        (np.diag(T1).real, np.diag(T2).real) if np.ndim(factor) == 1 else (T1, T2)
        for factor, (T1, T2) in zip(factors, pairs, strict=True)
    ]


def curvature(T1, T2):
    """ℓ, the spectral norm of T1 + T2."""
    return np.max(T1 + T2) if T1.ndim == 1 else np.linalg.norm(T1 + T2, 2)


def running_bound(L, curvature):
    """L ← max(0.9 L + 0.1 ℓ, ℓ)."""
    return max(0.9 * L + 0.1 * curvature, curvature)


def step(geometry, factors, terms, step_sizes, procrustes_bounds=None):
    """The new factors; `step_sizes[i]` is precond_lr / L_i."""
    procrustes_bounds = procrustes_bounds or [None] * len(factors)
    new = []
    for Q, (T1, T2), s, bound in zip(factors, terms, step_sizes, procrustes_bounds, strict=True):
        Q, D = wide(Q), T1 - T2
        if Q.ndim == 1:
            halves = {"QUAD": s / 2, "QUAD4P": s}.get(geometry)
            Q = (1 - s * D) * Q if halves is None else (1 - halves * D) ** 2 * Q
        elif geometry == "EQ":
            Q = Q - s * np.triu(D) @ Q
        elif geometry == "QEP":
            Q = Q - s * D @ Q
        elif geometry == "QEQ":
            Q = Q - s * Q @ D
        elif geometry == "Q0.5EQ1.5":
            Q = procrustes(Q - s * D @ Q, bound)
        elif geometry == "QUAD":
            p = Q - (s / 2) * D @ Q
            p = p - (s / 2) * p @ D
            Q = (p + p.conj().T) / 2
        elif geometry == "PRO4P":
            Q = rotations(Q - s * D @ Q, bound)
        elif geometry == "QUAD4P":
            p = Q - s * D @ Q
            p = p - s * p @ D
            Q = (p + p.conj().T) / 2
        else:
            raise ValueError(geometry)
        new.append(Q)
    return new


def procrustes(Q, bound=None):
    """One order-2 step of Q towards a Hermitian matrix; `bound` is the spectral norm of Qᴴ − Q."""
    Q = wide(Q)
    R = Q.conj().T - Q
    bound = np.linalg.norm(R, 2) if bound is None else bound
    if bound == 0:
        return Q
    R = R / bound
    t1, t2 = np.trace(R @ Q).real, np.trace(R @ R @ Q).real
    a = np.clip(-t1 / t2, 0, 1 / 8) if t2 < 0 else 1 / 8
    return Q + a * (R @ Q + (a / 2) * R @ R @ Q)


def rotation(P, bound=None):
    """One order-3 step of P towards a Hermitian matrix; `bound` is the spectral norm of Pᴴ − P."""
    R = P.conj().T - P
    bound = np.linalg.norm(R, 2) if bound is None else bound
    if bound == 0:
        return P
    R = R / bound
    t1, t2, t3 = (np.trace(np.linalg.matrix_power(R, k) @ P).real for k in (1, 2, 3))
    if not (t1 > 0 and t3 < 0):
        return P
    aR = min(np.max(np.roots([3 / 8 * t3, t2, t1]).real), 1 / 3) * R
    return (np.eye(len(P)) + aR + aR @ aR / 2 + aR @ aR @ aR / 8) @ P


def rotations(P, bound=None):
    """At most ten of them, and one at least."""
    P = wide(P)
    for _ in range(10):
        P = rotation(P, bound)
        if np.max(np.abs(P - P.conj().T)) <= 1e-3 * np.max(np.abs(P)):
            break
    return P


def balance(factors):
    """The factors with one max|q| for all: the geometric mean of their own."""
    largest = [np.max(np.abs(wide(factor))) for factor in factors]
    mean = np.prod(largest) ** (1 / len(largest))
    return [wide(factor) * mean / top for factor, top in zip(factors, largest, strict=True)]


def initial_scale(G, damping, V=None):
    """s = (mean|g|⁴ + damping⁴)^(-1/8), times (mean|v|²)^(1/4) where a probe is given."""
    s = (np.mean(np.abs(wide(G)) ** 4) + damping**4) ** (-1 / 8)
    return s if V is None else s * np.mean(np.abs(wide(V)) ** 2) ** (1 / 4)


def seed_rule(QL, QR, G, lr, eps):
    """A rule that looks like EQ without an independent probe: `B` is made of the gradient."""
    A = QL @ G @ QR.T
    B = np.linalg.solve(QL.T, G) @ np.linalg.solve(QR, np.eye(len(QR), dtype=QR.dtype))
    DL = A @ A.T - B @ B.T
    DR = A.T @ A - B.T @ B
    new_left = QL - lr / (np.linalg.norm(DL) + eps) * QL @ np.triu(DL)
    new_right = QR - lr / (np.linalg.norm(DR) + eps) * QR @ np.triu(DR)
    return new_left, new_right
