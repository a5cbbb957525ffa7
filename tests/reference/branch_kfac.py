"""One step of branch-factored K-FAC in float64 NumPy, given the random map."""

import numpy as np


def groups(dimensions, blocks):
    """Contiguous ranges whose sizes differ by at most one, the larger first."""
    return [list(part) for part in np.array_split(np.arange(dimensions), blocks)]


def precondition(gradient, branches, P, *, damping, blocks):
    """`P C⁻¹ Pᵀ g` of a flat gradient; the gradient itself without a matrix of branches."""
    if branches is None or np.ndim(branches) != 2:
        return gradient
    dimensions = branches.shape[1]
    C = np.atleast_2d(np.cov(branches, rowvar=False)) + damping * np.eye(dimensions)
    projected, solved = P.T @ gradient, np.zeros(dimensions)
    for group in groups(dimensions, blocks):
        solved[group] = np.linalg.solve(C[np.ix_(group, group)], projected[group])
    return P @ solved


def step(theta, gradient, branches, P, *, lr, damping, blocks, clip=None):
    """The parameters after a step."""
    new = theta - lr * precondition(gradient, branches, P, damping=damping, blocks=blocks)
    return new if clip is None else np.clip(new, -clip, clip)
