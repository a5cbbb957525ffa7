"""K-FAC: natural gradient whose curvature is one Kronecker product for each layer."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Bool, Float

from optax_kron.kernels import contract, packed
from optax_kron.kernels import kfac as kernels
from optax_kron.layers.layer import Layer
from optax_kron.transforms import program, validation
from optax_kron.transforms.factors import FACTOR_SETTINGS, KfacStack, LayerFactors, check_factors
from optax_kron.transforms.frame import STORAGE_SETTINGS, transformation
from optax_kron.transforms.layerwise import LAYER_SETTINGS, layerwise
from optax_kron.transforms.preconditioner import Seen, Stacks, Step, separated
from optax_kron.transforms.stacks import Change, guarded, map_blocks
from optax_kron.transforms.turned import BASES, follow_factors
from optax_kron.types import PyTree


class Inverses(NamedTuple):
    """Inverses of damped factors, of the shapes of these (`KfacStack`), factor_dtype."""

    input: Array  # (A + ...)⁻¹, packed if A is
    output: Array  # (G + ...)⁻¹, packed if G is


class Eigenbases(NamedTuple):
    """Eigendecompositions of factors, factor_dtype; the damping comes in when they are applied."""

    input_basis: Float[Array, "N d_in d_in"] | None  # columns; None if A is diagonal
    input_values: Float[Array, "N d_in"]
    output_basis: Float[Array, "N d_out d_out"] | None  # columns; None if G is diagonal
    output_values: Float[Array, "N d_out"]


@program.settings
@dataclasses.dataclass(frozen=True)
class Kfac(LayerFactors):
    """How factors are inverted and applied; the settings of `scale_by_kfac`."""

    basis: str  # how eigenbases follow factors, with damping_rule="exact"

    def init_inverse(self, layer: Layer, count: int, dtype: jnp.dtype) -> Inverses | Eigenbases:
        """See `LayerFactors`."""
        if self.damping_rule == "exact":
            return identity_bases(layer, count, dtype)
        diagonal = layer.has_diagonal_input, layer.has_diagonal_output
        identities = (
            contract.identities(count, layer.d_in, dtype, diagonal=diagonal[0]),
            contract.identities(count, layer.d_out, dtype, diagonal=diagonal[1]),
        )
        return Inverses(*map(packed.keep_factors, identities))

    def refresh_all(
        self, stacks: Stacks, step: Step
    ) -> tuple[Stacks, Mapping[str, Bool[Array, " N"]]]:
        """See `Preconditioner`: factors of similar sizes, of all stacks, share a program."""
        del step
        if self.damping_rule == "exact" and self.basis == "power":
            changes = self._followed(stacks)
        elif self.damping_rule == "exact":
            changes = {label: self._eigenbases(stack) for label, stack in stacks.items()}
        else:
            changes = self._inverses(stacks)
        done = {label: guarded(stacks[label], change) for label, change in changes.items()}
        return separated(done)

    def _followed(self, stacks):
        """Eigenbases that have followed the factors of all stacks, by matrix products."""
        changes = {}
        for label, (bases, values, usable) in follow_factors(
            stacks, precision=self.precision
        ).items():
            new = Eigenbases(bases[0], values[0], bases[1], values[1])
            changes[label] = Change({"inverse": new}, stacks[label].initialized, usable)
        return changes

    def _eigenbases(self, stack):
        """The eigendecompositions of the factors of a stack."""

        def decompose(A, G):
            pairs = (kernels.eigenbasis(contract.widen(packed.whole(x))) for x in (A, G))
            (input_basis, input_values), (output_basis, output_values) = pairs
            return Eigenbases(input_basis, input_values, output_basis, output_values)

        new = map_blocks(stack[:2])(decompose, *stack[:2])
        return Change({"inverse": new}, stack.initialized)

    def _inverses(self, stacks):
        """The inverses of the damped factors of all stacks."""
        inputs, outputs = (
            [contract.widen(packed.whole_factors(s[i])) for s in stacks.values()] for i in (0, 1)
        )
        inverses, finite = kernels.inverses([*inputs, *outputs], self._amounts(inputs, outputs))
        changes = {}
        for i, (label, stack) in enumerate(stacks.items()):
            j = len(stacks) + i
            new = Inverses(*map(packed.keep_factors, (inverses[i], inverses[j])))
            narrower = stack.inverse.input.dtype != inverses[i].dtype  # what is finite may overflow
            sound = None if narrower else finite[i] & finite[j]
            changes[label] = Change({"inverse": new}, stack.initialized, sound)
        return changes

    def _amounts(self, inputs, outputs):
        """What is added to the diagonals of all factors, [N] for each stack."""
        means = [kernels.mean_eigenvalues(side) for side in (inputs, outputs)]
        if self.damping_rule == "pi":
            amounts = kernels.pi_damping(means[0], means[1], self.damping)
        else:
            amounts = [kernels.trace_damping(mean, self.damping) for mean in means]
        ends = np.cumsum([len(m) for m in inputs])[:-1]
        return [part for amount in amounts for part in jnp.split(amount, ends)]

    def precondition(
        self, stack: KfacStack, seen: Seen, step: Step
    ) -> Float[Array, "N d_in d_out"]:
        """See `Preconditioner`: the inverse curvature applied to blocks."""
        del step

        def apply(inverse, x):
            inverse = jax.tree.map(contract.widen, inverse)
            if isinstance(inverse, Eigenbases):
                values = inverse.input_values[:, None] * inverse.output_values[None]
                bases = inverse.input_basis, inverse.output_basis
                return kernels.apply_eigen(
                    *bases, values, x, self.damping, precision=self.precision
                )
            A, G = packed.whole(inverse.input), packed.whole(inverse.output)
            return kernels.apply_inverses(A, G, x, precision=self.precision)

        return map_blocks(stack[:2])(apply, stack.inverse, seen.direction)


def identity_bases(layer: Layer, count: int, dtype: jnp.dtype) -> Eigenbases:
    """The eigendecompositions of factors that are the identity, of so many blocks."""

    def basis(size, diagonal):
        return None if diagonal else contract.identities(count, size, dtype)

    return Eigenbases(
        input_basis=basis(layer.d_in, layer.has_diagonal_input),
        input_values=jnp.ones((count, layer.d_in), dtype),
        output_basis=basis(layer.d_out, layer.has_diagonal_output),
        output_values=jnp.ones((count, layer.d_out), dtype),
    )


def scale_by_kfac(
    *,
    layers: Iterable[Layer],
    decay: ArrayLike = 0.95,
    bias_correction: bool | None = None,
    damping: optax.ScalarOrSchedule = 1e-3,
    damping_rule: str = "pi",
    basis: str = "power",
    approx: str = "expand",
    momentum: ArrayLike | None = 0.9,
    factor_every: ArrayLike = 1,
    refresh_every: ArrayLike = 5,
    stagger: bool = False,
    norm_constraint: optax.ScalarOrSchedule | str | None = "auto",
    outlier_clip: ArrayLike | None = 10.0,
    learning_rate: optax.ScalarOrSchedule | None = None,
    fallback: optax.GradientTransformation | None = None,
    block_size: int | None = None,
    factor_dtype: DTypeLike | None = None,
    momentum_dtype: DTypeLike | None = None,
    rounding: str = "nearest",
    seed: int | Array = 0,
    precision: jax.lax.PrecisionLike = None,
) -> optax.GradientTransformationExtraArgs:
    """Scale gradients by K-FAC: no weight decay, no learning rate, no sign flip.

    Each layer has an input factor `A` [d_in, d_in], the second moment of its inputs, and an output
    factor `G` [d_out, d_out], that of the gradients with respect to its outputs, both averaged over
    steps. The update of its parameters, as a matrix X [d_in, d_out] with the bias as the last row,
    is `A⁻¹ X G⁻¹`, damped; then comes momentum. Parameters that belong to no layer go through
    `fallback`.

    Args:
      layers: the layers of the loss, as `ok.find_layers` returns, or `ok.Layer`s made by hand.
        Without a single one there is a warning, in `init`.
        Parts of a parameter may belong to different layers. Parameters that a wrapper such as
        `optax.masked` hides are left out of their layers.
      decay: of the moving average of the factors, in [0, 1]; traced, it is clamped to that.
      bias_correction: whether the average is that of all taps so far with weights `decay^age`, so
        that the first taps, of a network that soon is another, count for no more than later ones.
        Otherwise factors start as what the first taps give, and later are
        `decay·old + (1 − decay)·new`. `None`: corrected, but with damping_rule="trace".
      damping: λ ≥ 0, or a schedule of it.
      damping_rule: "pi": `A + π√λ I` and `G + √λ/π I`, `π² = (tr A / d_in) / (tr G / d_out)`;
        "trace": `M + max(λ·tr(M)/d, 1e-12)·I` for each factor M; "exact": `(A ⊗ G + λI)⁻¹`, with
        eigenvectors and eigenvalues of A and G.
      basis: where these come from, with damping_rule="exact". "power": bases start at the identity,
        and at every refresh follow the factors by three steps of power iteration, of matrix
        products alone; eigenvalues are the diagonals of the factors in them. So the inverse is
        exact where the factors have settled. "eigh": eigendecompositions, by LAPACK on a CPU.
      approx: how the positions at which a weight is used count: "expand", each for itself, or
        "reduce", inputs averaged and gradients summed first. A bias alone is always reduced; the
        diagonal input factor of an embedding is always that of "expand".
      momentum: μ of the velocity `v ← μ·v + u`, in [0, 1); the update is v. So a steady direction
        becomes 1/(1 − μ) times as long, and the learning rate should be as much smaller. `None` or
        0: none.
      factor_every: the factors take in taps at the first of every so many accepted steps.
      refresh_every: the inverses are made anew after so many accepted steps. And, while the factors
        are young and change fast, whenever they have: at the first 1/(1 − decay) of their updates.
      stagger: deal the blocks out to the steps between two refreshes, once the factors have
        settled, so that each step refreshes some blocks. `refresh_every` must then be a number.
      norm_constraint: c > 0, or a schedule of it. Before the momentum, updates are scaled by
        `min(1, √(c / (lr²·⟨g, P⁻¹g⟩)))`, which keeps the change of the model's outputs in bounds;
        P is the damped curvature, and the identity on parameters in no layer, but for those with a
        `fallback`, which are neither counted nor scaled. "auto": `c = 0.09·lr²·Σw`, so that the
        learning rate tells throughout, and need not be known here; w are the weights of the
        examples in the loss, whose sum is one for a mean. `None`: no constraint.
      outlier_clip: a block whose gradient, or what is averaged into one of its factors, is more
        than so many times as long as it usually is, is scaled down to that; ≥ 1. Of second moments
        the length is the root of the trace. The usual one is a running mean. `None`: no bound.
      learning_rate: what the updates will be multiplied with further down the chain, a number or
        a schedule. For a norm constraint that is a number or a schedule, which needs it; nothing is
        scaled by it here.
      fallback: the transformation of parameters that belong to no layer, complete with a momentum
        of its own if it is to have one: `optax.scale_by_adam()`, for example. It sees these
        parameters alone. `None`: their gradients, with the same momentum.
      block_size: longest run of an axis with a diagonal factor, such as the rows of an embedding,
        that is one block. A longer one is cut into equal blocks, each with its part of that factor
        and a copy of the other; on a mesh they are on different devices. Damping and outlier clip
        are those of each block. `None`: the axis is whole.
      factor_dtype: real dtype of the stored factors and inverses. `None`: as precise as the
        parameters, but at least float32, as is the arithmetic.
      momentum_dtype: dtype of the stored momentum. `None`: that of the parameters.
      rounding: of averages stored in 16 bits: to the "nearest" number, or "stochastic", up or down
        at random, so that small changes add up.
      seed: an integer or a PRNG key, for stochastic rounding.
      precision: of the matrix products, as in `jax.lax.dot_general`.

    Returns:
      A transformation. Its `update(grads, state, params=None, *, taps)` returns updates with the
      structure, shapes and dtypes of the gradients. `taps` maps the name of each layer to what it
      saw, as `ok.value_and_grad_with_taps` returns, or `ok.Taps` by hand. Gradients that are not
      finite, or taps that are not at a step that reads them, give a zero update and leave the state
      as it was, but for the count of skipped steps; so does an update that overflows, except that
      factors which have moved stay. A block whose factors or inverse would not be finite keeps the
      last good ones; before there are any, its update is the gradient. Steps whose gradients have
      another scale than the taps, as of a scaled loss, are counted as `mismatched_steps`: see
      `ok.Taps.unscale`.

    Raises:
      ValueError: for a setting out of range, at construction; in `init` and `update`, for layers
        that do not match the parameters, or that share one; in `update`, for taps that are missing
        or do not fit the layers.

    Cost, for a layer with d_in inputs (the bias's one included), d_out outputs, N examples at S
    positions and V columns. State: d_in² + d_in + d_out² + d_out + d_in·d_out numbers, as factors
    and inverses are packed from d = 256 on, 2·d² of shorter ones and of those of "exact" 1.5·d²; of
    a diagonal factor, as embeddings have and axes longer than the layer's `max_size`, 2·d.
    A step: 2·d_in·d_out·(d_in + d_out) operations, twice that with "exact". Taking in taps:
    2·N·S·(d_in² + V·d_out²). A refresh: 2·(d_in³ + d_out³), up to twice that for sizes ≤ 256, with
    "exact" three times 8·d³ to 4·d³ for each factor, and 2·d³; or about 9·d³, by LAPACK on a CPU.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax_kron as ok
      >>> inputs, targets = jnp.ones((5, 3)), jnp.zeros((5, 2))
      >>> params = {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}
      >>> tx = ok.scale_by_kfac(layers=[ok.Layer("dense", kernel="kernel", bias="bias")])
      >>> state = tx.init(params)
      >>> residuals = inputs @ params["kernel"] + params["bias"] - targets
      >>> grads = {"kernel": inputs.T @ residuals / 5, "bias": residuals.mean(0)}
      >>> seen = jnp.append(inputs, jnp.ones((5, 1)), axis=1)  # the bias's ones are the last column
      >>> taps = ok.Taps({"dense": ok.Tap(seen, residuals)})
      >>> updates, state = tx.update(grads, state, params, taps=taps)

    Sources: Martens and Grosse (2015), arXiv:1503.05671; Grosse and Martens (2016),
    arXiv:1602.01407; Eschenhagen et al. (2023), arXiv:2311.00636.
    """
    return named_kfac("kfac", locals())


def named_kfac(owner: str, settings: Mapping[str, Any]) -> optax.GradientTransformationExtraArgs:
    """`scale_by_kfac` of all its arguments, with the name of an optimizer for messages.

    With `is_frozen` beside them what is kept stays as it is.
    """
    of = {"is_frozen": False, **settings}
    validation.check_choice(owner, "damping_rule", of["damping_rule"], kernels.DAMPING_RULES)
    validation.check_switch(owner, "bias_correction", of["bias_correction"], optional=True)
    if of["bias_correction"] is None:
        of["bias_correction"] = of["damping_rule"] != "trace"
    validation.check_choice(owner, "basis", of["basis"], BASES)
    own = ("bias_correction", "damping_rule", "basis", "outlier_clip", "precision", "is_frozen")
    factors = check_factors(owner, **{name: of[name] for name in FACTOR_SETTINGS})
    method = Kfac(**factors, **{name: of[name] for name in own})
    layout = layerwise(owner, **{name: of[name] for name in LAYER_SETTINGS})
    return transformation(owner, method, layout, **{name: of[name] for name in STORAGE_SETTINGS})


def kfac(
    learning_rate: optax.ScalarOrSchedule | None = None,
    *,
    layers: Iterable[Layer],
    decay: ArrayLike = 0.95,
    bias_correction: bool | None = None,
    damping: optax.ScalarOrSchedule = 1e-3,
    damping_rule: str = "pi",
    basis: str = "power",
    approx: str = "expand",
    momentum: ArrayLike | None = 0.9,
    factor_every: ArrayLike = 1,
    refresh_every: ArrayLike = 5,
    stagger: bool = False,
    norm_constraint: optax.ScalarOrSchedule | str | None = "auto",
    outlier_clip: ArrayLike | None = 10.0,
    weight_decay: ArrayLike | None = 0.0,
    mask: PyTree | Callable[[PyTree], PyTree] | None = None,
    fallback: optax.GradientTransformation | None = None,
    block_size: int | None = None,
    factor_dtype: DTypeLike | None = None,
    momentum_dtype: DTypeLike | None = None,
    rounding: str = "nearest",
    seed: int | Array = 0,
    precision: jax.lax.PrecisionLike = None,
) -> optax.GradientTransformationExtraArgs:
    """K-FAC: natural gradient descent with a Kronecker-factored curvature of each layer.

    With a learning rate this is a complete optimizer; without, the bare preconditioner, to chain:
    `optax.chain(ok.kfac(layers=layers), optax.scale_by_learning_rate(1e-3))` equals
    `ok.kfac(1e-3, layers=layers)`. Every update needs `taps`. All arguments that are not listed
    here are those of `scale_by_kfac`, as are cost and errors.

    Args:
      learning_rate: A number or a schedule; `None` leaves the updates unscaled and unflipped. It
        comes after the fallback.
      weight_decay: Decoupled weight decay, times the learning rate; needs `params` in `update`.
      mask: Which parameters decay, as in `optax.add_decayed_weights`.

    Returns:
      A gradient transformation.

    Raises:
      ValueError: for a negative learning rate or weight decay, or a mask that is a single bool.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_kron as ok
      >>> inputs, kernel = jax.random.normal(jax.random.key(0), (2, 6, 4))
      >>> targets = inputs @ kernel[:4]
      >>> params = jnp.zeros((4, 4))
      >>> layers = [ok.Layer("linear", kernel="")]
      >>> tx = ok.kfac(0.5, layers=layers, momentum=None, norm_constraint=None)
      >>> state = tx.init(params)
      >>> @jax.jit
      ... def step(params, state):
      ...     residuals = inputs @ params - targets
      ...     # The curvature of half the squared error is the identity: one column for each output.
      ...     columns = jnp.broadcast_to(jnp.eye(4)[:, None, None, None], (4, 1, 6, 1, 4))
      ...     taps = ok.Taps({"linear": ok.Tap(inputs, columns)})
      ...     updates, state = tx.update(inputs.T @ residuals / 6, state, params, taps=taps)
      ...     return optax.apply_updates(params, updates), state
      >>> for _ in range(30):
      ...     params, state = step(params, state)
      >>> bool(jnp.max(jnp.abs(inputs @ params - targets)) < 0.01)
      True

    Sources: Martens and Grosse (2015), arXiv:1503.05671; Grosse and Martens (2016),
    arXiv:1602.01407; Eschenhagen et al. (2023), arXiv:2311.00636.
    """
    arguments = dict(locals())
    return validation.complete("kfac", scale_by_kfac, arguments)
