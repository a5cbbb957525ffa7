"""The optimizers that `gpu.py` measures, in the order in which it does."""

import dataclasses
from collections.abc import Callable, Iterable

import jax
import optax

import optax_kron as ok

RATE = 1e-4


@dataclasses.dataclass(frozen=True)
class Row:
    """An optimizer.

    Attributes:
        name: of the row.
        make: the optimizer, from the parameters and, of `taps`, the layers of the loss.
        cycle: steps from one refresh to the next.
        taps: whether updates need what layers saw: "moments" or "examples".
        trains: whether a whole training step is timed too.
        note: what is not the library's default, or what the figures mean.
    """

    name: str
    make: Callable[..., optax.GradientTransformation]
    cycle: int = 1
    taps: str | None = None
    trains: bool = True
    note: str = "defaults"


def _muon(params, layers):
    """Muon for the kernels; AdamW for embeddings and vectors, as its authors use it."""
    del layers
    numbers = jax.tree_util.tree_map_with_path(
        lambda path, _: (
            optax.contrib.MuonDimensionNumbers()
            if jax.tree_util.keystr(path).endswith("['kernel']")
            else None
        ),
        params,
    )
    return optax.contrib.muon(RATE, muon_weight_dimension_numbers=numbers)


def _simple(factory: Callable[..., optax.GradientTransformation], **settings):
    return lambda params, layers: factory(RATE, **settings)


def _of_layers(factory: Callable[..., optax.GradientTransformation]):
    def make(params, layers: Iterable[ok.Layer]):
        return factory(RATE, layers=layers, decay=_SETTLED)

    return make


# Factors are young, and refreshed at every step, for 1/(1 - decay) steps: so that these are few.
# What a step costs does not depend on the decay.
_SETTLED = 0.5
_OF_LAYERS = "decay=0.5, for soon settled factors"
# Those whose refreshes may take long come last.
ROWS = (
    Row("adamw", _simple(optax.adamw)),
    Row("muon", _muon, note="optax.contrib.muon; AdamW for embeddings and vectors"),
    # 34 steps at 3 % hold one update of the factors.
    Row(
        "kron_psgd-3%",
        _simple(ok.kron_psgd, update_probability=0.03),
        cycle=34,
        note="update_probability=0.03, which the default schedule comes to",
    ),
    Row(
        "kron_psgd",
        _simple(ok.kron_psgd),
        note="defaults, with which factors move at each of the first 500 steps",
    ),
    Row("soap", _simple(ok.soap), cycle=10),
    Row("soap-every", _simple(ok.soap, refresh_every=1), note="refresh_every=1"),
    Row("kl_soap", _simple(ok.soap, variant="kl_soap"), cycle=10, note='variant="kl_soap"'),
    Row(
        "kl_shampoo", _simple(ok.soap, variant="kl_shampoo"), cycle=10, note='variant="kl_shampoo"'
    ),
    Row(
        "kfac",
        _of_layers(ok.kfac),
        cycle=5,
        taps="moments",
        note=f"taps with reduce=True; {_OF_LAYERS}",
    ),
    Row("shampoo", _simple(ok.shampoo), cycle=10),
    Row(
        "shampoo-stagger",
        _simple(ok.shampoo, stagger=True),
        cycle=10,
        note="stagger=True: each step refreshes a tenth of the blocks",
    ),
    Row(
        "ekfac",
        _of_layers(ok.ekfac),
        cycle=5,
        taps="examples",
        trains=False,
        note=f"update alone, with the taps of 4 windows; {_OF_LAYERS}",
    ),
    Row(
        "shampoo-eigh",
        _simple(ok.shampoo, root_method="eigh"),
        cycle=10,
        note='root_method="eigh": roots by eigendecompositions',
    ),
)
LEFT_OUT = "branch_kfac is left out: its curvature is that of a small state, which GPT-2 has not."
