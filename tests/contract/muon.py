"""Muon with decoupled weight decay, of `ok.orthogonalize`, as the contract takes optimizers."""

import optax_kron as ok
from optax_kron.transforms import validation


def muon(
    learning_rate=None,
    *,
    polynomial="muon",
    iterations=None,
    scale="spectral",
    momentum=None,
    nesterov=False,
    fallback=None,
    weight_decay=0.0,
    mask=None,
    blocking=ok.Blocking(),
    dtype=None,
    momentum_dtype=None,
):
    arguments = dict(locals())
    return validation.complete("muon", ok.orthogonalize, arguments)
