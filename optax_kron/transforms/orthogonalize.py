"""Updates with orthonormal rows or columns, as Muon takes them, of matrices in blocks."""

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Bool, Float

from optax_kron.blocking import Blocking, BlockPlan, Signature
from optax_kron.kernels import contract, flow, linalg, orthogonal
from optax_kron.transforms import preconditioner as base
from optax_kron.transforms import program, validation
from optax_kron.transforms.blockwise import Blockwise, blockwise
from optax_kron.transforms.frame import Frame, transformation
from optax_kron.transforms.layout import After, Before
from optax_kron.transforms.mesh import Share
from optax_kron.transforms.stacks import all_finite
from optax_kron.types import PyTree

SCALES = ("spectral", "consistent_rms")
# The root mean square of Adam's updates, about, in the training of language models.
_ADAM_RMS = 0.2

# A worked example: kernels [256, 1024] and [1024, 256], and one of a convolution [3, 3, 64, 128].
#
#   blocks    [2, 1024, 256] of the first two, [1, 128, 64, 3, 3]
#   matrices  [2, 1024, 256], and [1, 128, 576]: the longest axis by all others
#   "spectral": 2 = √(1024 / 256) for the first, with 1024 outputs, and 1 for the others


class OrthogonalStack(NamedTuple):
    """What is kept of N blocks: nothing."""

    initialized: Bool[Array, " N"]


@program.settings
@dataclasses.dataclass(frozen=True)
class Orthogonalizer:
    """How blocks become orthogonal; the settings of `orthogonalize`."""

    polynomial: str
    iterations: int
    scale: str | None
    dtype: DTypeLike | None
    precision: jax.lax.PrecisionLike

    def __call__(self, plan: BlockPlan, share: Share, blocks: base.Blocks) -> base.Blocks:
        """Blocks of a device [N, ...] by label, each near the orthonormal factor of its own.

        Args:
          plan: How blocks belong to parameters; those without a matrix stay as they are.
          share: Which of them are on this device.
          blocks: Those, zero in the padding, which stays so.
        """
        return {
            label: self._of_stack(plan, share, label, x) if is_matrix(plan.stacks[label]) else x
            for label, x in blocks.items()
        }

    def _of_stack(self, plan, share, label, blocks):
        rows = orthogonal.coefficients(self.polynomial, self.iterations)
        # [N, d_1, ..., d_k] → [N, diagonal..., dense...], the first of these the longest.
        dense = _dense_axes(plan.stacks[label])
        order = [axis for axis in range(1, blocks.ndim) if axis - 1 not in dense]
        order = [0, *order, *(axis + 1 for axis in dense)]
        turned = blocks.transpose(order)
        rest = math.prod(turned.shape[len(order) - len(dense) + 1 :])
        matrices = turned.reshape(-1, blocks.shape[dense[0] + 1], rest)

        def make(matrix):
            return orthogonal.orthogonalize(
                matrix, rows, dtype=self.dtype, precision=self.precision
            )

        made = linalg.map_blocks(make, matrices).reshape(turned.shape)
        made = made.transpose(np.argsort(order))
        if self.scale is None:
            return made
        scales = share.own(_scales(plan, label, self.scale))
        return contract.scaled_blocks(made, jnp.asarray(scales, contract.real_dtype(made.dtype)))


def is_matrix(signature: Signature) -> bool:
    """Whether blocks have more than one axis with a dense factor."""
    return len(_dense_axes(signature)) > 1


def _dense_axes(signature: Signature) -> list[int]:
    return [axis for axis, diagonal in enumerate(signature.diagonal) if not diagonal]


def _scales(plan: BlockPlan, label: str, rule: str) -> Float[np.ndarray, " N"]:
    """What an update with singular values of one is to be multiplied with."""
    dense, scales = _dense_axes(plan.stacks[label]), [np.ones(0)]
    for _, leaf in plan.members(label):
        sizes = leaf.sizes()[:, dense].astype(float)
        longest, rest = sizes[:, 0], np.prod(sizes[:, 1:], axis=1)
        # Of a kernel the last axis counts outputs.
        is_last = leaf.order[dense[0]] == max(leaf.order[axis] for axis in dense)
        outputs, inputs = (longest, rest) if is_last else (rest, longest)
        if rule == "spectral":
            scales.append(np.sqrt(np.maximum(outputs / inputs, 1)))
        else:
            scales.append(_ADAM_RMS * np.sqrt(np.maximum(outputs, inputs)))
    filled = np.concatenate(scales)
    return np.pad(filled, (0, plan.count(label) - len(filled)))


@program.settings
@dataclasses.dataclass(frozen=True)
class Orthogonalize(base.Preconditioner):
    """Nothing is kept, and every direction is made orthogonal."""

    make: Orthogonalizer

    keeps_squares: ClassVar[bool] = False

    def init(self, count: int, signature: Signature, dtype: jnp.dtype) -> OrthogonalStack:
        """See `Preconditioner`."""
        del signature, dtype
        return OrthogonalStack(jnp.zeros(count, bool))

    def advance(
        self,
        plan: BlockPlan,
        state: base.KronState,
        stacks: base.Stacks,
        seen: Mapping[str, base.Seen],
        extra: PyTree,
        step: base.Step,
    ) -> base.Advanced:
        """See `Preconditioner`."""
        del extra
        updates = self.make(plan, step.share, {label: x.direction for label, x in seen.items()})
        return base.unchanged(state, stacks, updates, step)


@program.settings
@dataclasses.dataclass(frozen=True)
class Matrices(Blockwise):
    """Blocks that are matrices; all other parameters stay as they are, or have a fallback."""

    nesterov: bool = False
    fallback: optax.GradientTransformation | None = None

    @property
    def has_fallback(self) -> bool:
        """See `Layout`."""
        return self.fallback is not None

    def plan(self, owner: str, tree: PyTree, multiple: int) -> BlockPlan:
        """See `Layout`."""
        plan = super().plan(owner, tree, multiple)
        return plan.only([label for label, x in plan.stacks.items() if is_matrix(x)])

    def init_fallback(self, plan: BlockPlan, params: PyTree) -> PyTree:
        """See `Layout`."""
        return None if self.fallback is None else self.fallback.init(_others(plan, params))

    def fall_back(
        self,
        plan: BlockPlan,
        updates: PyTree,
        rest: Mapping[str, Array],
        state: base.KronState,
        params: PyTree | None,
        extra_args: Mapping[str, PyTree],
    ) -> tuple[Mapping[str, Array], PyTree]:
        """See `Layout`; NaN where the new state is not finite, which is then not accepted."""
        assert self.fallback is not None
        made, new = optax.with_extra_args_support(self.fallback).update(
            _others(plan, updates),
            state.fallback,
            None if params is None else _others(plan, params),
            **extra_args,
        )
        holds = all_finite(new)
        made = jax.tree.map(lambda x: jnp.where(holds, x, jnp.nan), made)
        leaves = plan.treedef.flatten_up_to(made)
        return {leaf.path: leaves[i] for i, leaf in _without_matrix(plan)}, new

    def is_finite(self, updates: PyTree) -> Bool[Array, ""]:
        """See `Layout`: of parameters without a matrix, as those of matrices show it themselves."""
        return all_finite(_others(self.plan("", updates, 1), updates))

    def before(
        self,
        plan: BlockPlan,
        frame: Frame,
        given: base.Blocks,
        state: base.KronState,
        finite: Bool[Array, ""],
    ) -> Before:
        """See `Layout`; with `nesterov`, `βm + (1 − β)g` as the direction, at any scale."""
        before = super().before(plan, frame, given, state, finite)
        direction, decay = before.direction, self.momentum
        if self.nesterov and decay is not None:
            direction = {
                label: decay * before.momentum[label].astype(g.dtype) + (1 - decay) * g
                for label, g in before.gradients.blocks.items()
            }
        return before._replace(direction=direction, finite=before.finite & finite)

    def bound(
        self, plan: BlockPlan, frame: Frame, before: Before, updates: base.Blocks
    ) -> base.Blocks:
        """See `Layout`: of what is finite nothing is made that is not."""
        del plan, frame
        return {label: jnp.where(before.finite, x, 0) for label, x in updates.items()}

    def after(
        self,
        plan: BlockPlan,
        frame: Frame,
        updates: PyTree,
        state: base.KronState,
        extra: PyTree,
        before: Before,
        advanced: base.Advanced,
        rest: Mapping[str, Array],
        others: Mapping[str, Array],
    ) -> After:
        """See `Layout`: no step is accepted of which the fallback makes what is not finite."""
        accepted = before.finite & all_finite(others)
        if others:
            stacks = {k: jnp.where(accepted, x, 0) for k, x in advanced.updates.items()}
            advanced = advanced._replace(updates=stacks)
        arguments = updates, state, extra, before, advanced, rest, others
        after = super().after(plan, frame, *arguments)
        leaves = plan.treedef.flatten_up_to(after.updates)
        taken = {i: others.get(leaf.path, leaves[i]) for i, leaf in _without_matrix(plan)}
        # As a branch it is quicker to compile than a choice for every leaf.
        for i, x in flow.cond_or_zeros(accepted, lambda taken: taken, taken).items():
            leaves[i] = x
        return after._replace(updates=plan.treedef.unflatten(leaves), accepted=accepted)


def _without_matrix(plan):
    """The leaves that are in no stack of a plan, with their position in the tree."""
    leaves = [(i, leaf) for i, leaf in enumerate(plan.leaves) if leaf is not None]
    return [(i, leaf) for i, leaf in leaves if leaf.signature.label not in plan.stacks]


def _others(plan, tree):
    """The tree of those leaves, and masked nodes for all others."""
    leaves = plan.treedef.flatten_up_to(tree)
    kept = {i for i, _ in _without_matrix(plan)}
    return plan.treedef.unflatten(
        [x if i in kept else optax.MaskedNode() for i, x in enumerate(leaves)]
    )


def orthogonalizer(
    owner: str,
    polynomial: str,
    iterations: int | None,
    scale: str | None,
    dtype: DTypeLike | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> Orthogonalizer:
    """The settings of `orthogonalize`, checked."""
    validation.check_choice(owner, "polynomial", polynomial, orthogonal.POLYNOMIALS)
    number = 5 if iterations is None else validation.whole_number(iterations)
    if number is None or number < 1:
        raise ValueError(f"{owner}: iterations must be an integer ≥ 1 or None; got {iterations!r}.")
    validation.check_choice(owner, "scale", scale, SCALES, optional=True)
    validation.check_dtype(owner, "dtype", dtype)
    return Orthogonalizer(polynomial, number, scale, dtype, precision)


def orthogonalize(
    *,
    polynomial: str = "muon",
    iterations: int | None = None,
    scale: str | None = "spectral",
    momentum: ArrayLike | None = None,
    nesterov: bool = False,
    fallback: optax.GradientTransformation | None = None,
    blocking: Blocking = Blocking(),
    dtype: DTypeLike | None = None,
    momentum_dtype: DTypeLike | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> optax.GradientTransformationExtraArgs:
    """Bring updates of matrices near the orthonormal factor `U Vᴴ` of their `U Σ Vᴴ`.

    All directions of a matrix get steps of about one size: that is Muon, after an average of
    gradients. What a matrix is, blocks decide: one with two axes that may have a dense factor is
    one, and one with more is the matrix of its longest axis by all others. Along axes with a
    diagonal factor there is a matrix for every index. All other parameters, such as vectors and
    what is longer than `max_size`, pass as they are.

    Args:
      polynomial: what is done to singular values at each iteration, after the Frobenius norm was
        brought to one. "muon": with five, those from 0.01 of the norm on come to lie within 0.68
        and 1.14. "polar_express": the best polynomial for what the last ones left of [1e-3, 1];
        with five they come to 1 ± 0.15 from 1e-3 on, with eight to one. "newton_schulz" and
        "newton_schulz_cubic": Taylor's, of degree five and three. They never pass one, and small
        singular values take many iterations: 8, or 16, from 0.01 on.
      iterations: how many; `None`: five.
      scale: what a matrix with singular values of one is multiplied with. "spectral":
        `√max(1, outputs / inputs)`, as Muon does; of a kernel the last axis has the outputs.
        "consistent_rms": `0.2·√max(outputs, inputs)`, whose root mean square is about that of
        Adam's update, so that both take the same learning rate and weight decay. `None`: nothing.
      momentum: decay of a moving average of the gradients of matrices, which is made orthogonal in
        their place, in [0, 1). `None`: the gradient itself, as after `optax.trace`.
      nesterov: whether the gradient is added to the average once more, as in `optax.trace`.
      fallback: the transformation of parameters without a matrix, such as
        `optax.scale_by_adam()`. `None`: they pass as they are.
      blocking: how parameters become blocks, and which axes are those of matrices. Heads are cut
        apart by `block_size` or `stacked_axes`, the axes of convolutions merged by `merge_below`;
        `max_size` leaves out a vocabulary, and a leaf with all axes but the last in `stacked_axes`
        has no matrix at all.
      dtype: real dtype of the matrix products, such as `jnp.bfloat16`. `None`: float32, or float64
        for that. Complex matrices have at least complex64.
      momentum_dtype: dtype of the stored average. `None`: that of the parameters.
      precision: of the matrix products.

    Returns:
      A transformation. Its updates have the structure, shapes and dtypes of the gradients, and do
      not depend on their scale, where they have a matrix. A gradient that is not finite, anywhere,
      gives a zero update and leaves the state as it was, but for the count of skipped steps. That
      of zeros gives zeros.

    Raises:
      ValueError: for a setting out of range, at construction, unless it is traced; for a parameter
        that is neither floating-point nor complex, in `init`; in `update`, if gradients do not
        match the state.

    Cost, for a matrix m×n, n ≤ m: an iteration is 4·m·n² + 2·n³ operations; on a CPU, in float32 or
    wider and where m ≥ 1.5·n, all of them are 4·m·n² and 8·n³ for each. State: mn numbers with
    `momentum`, else one for each block.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_kron as ok
      >>> tx = optax.chain(
      ...     optax.trace(0.95, nesterov=True),
      ...     ok.orthogonalize(),
      ...     optax.scale_by_learning_rate(0.02),
      ... )
      >>> params = {"kernel": jnp.array([[3.0, 1.0], [1.0, 2.0], [0.0, 1.0]]), "bias": jnp.ones(2)}
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> exact = ok.orthogonalize(polynomial="polar_express", iterations=8)
      >>> Q, _ = exact.update(params, exact.init(params), params)
      >>> bool(jnp.allclose(Q["kernel"].T @ Q["kernel"], jnp.eye(2), atol=1e-5))
      True

    Sources: Jordan et al. (2024), https://kellerjordan.github.io/posts/muon; Liu et al. (2025),
    arXiv:2502.16982, for the scales; Amsel et al. (2025), arXiv:2505.16932, for "polar_express".
    """
    owner = "orthogonalize"
    make = orthogonalizer(owner, polynomial, iterations, scale, dtype, precision)
    validation.check_fallback(owner, fallback)
    validation.check_switch(owner, "nesterov", nesterov)
    plain = blockwise(owner, blocking, momentum, momentum_dtype)
    layout = Matrices(
        blocking, momentum, plain.momentum_dtype, nesterov=nesterov, fallback=fallback
    )
    return transformation(owner, Orthogonalize(make), layout, None, None)
