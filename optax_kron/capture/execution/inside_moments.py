"""Second moments of inputs and output-gradients, formed inside the traced function.

Neither is kept: a step of a scan adds its moments to those of the steps before, and a checkpoint
recomputes what it did not save. The moment of inputs is one more output of the function. That of
output-gradients is known only in the backward pass: it is read as the cotangent of a dummy operand,
of a function whose derivative is declared to be that.
"""

# For an output h [8, 5, 4] of a layer, B = 1,
#
#     forward    watch(h, dummy [1, 4, 4]) = h
#     backward   cotangent g [8, 5, 4]  ->  g for h, and sum of g gᵀ [1, 4, 4] for the dummy
#
# so that a scan of 100 steps adds up 100 matrices [4, 4], and keeps none of the g.

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Shaped

from optax_kron.capture.analysis.canonical import Canonical
from optax_kron.capture.analysis.uses import Use
from optax_kron.capture.program.graph import Node
from optax_kron.capture.rules.batch_axes import Separate
from optax_kron.kernels import contract, explicit, flow, kfac
from optax_kron.layers.layer import Layer
from optax_kron.layers.moments import with_bias


def can_be_inside(layer: Layer, use: Use, batching: Separate) -> bool:
    """Whether the moments of a use can be formed where it is.

    Not those of a bias alone, whose gradients are summed over all positions before they are
    squared; nor where the steps of a scan count the examples, or some of them are of other
    parameters; nor of parameters that are scaled by values. All are small, or formed afterwards.
    """
    alike = not isinstance(batching.axis, Node) and not (use.step_cuts or use.view.scales)
    return layer.kernel is not None and alike


class InsideMoments:
    """The second moments of one use, as seen from inside all scans around it.

    Args:
      layer: The layer that the use belongs to.
      use: A use of its kernel.
      batching: Where the use's output holds the examples.
      weights: The weights of the examples in the loss, or of their positions inside the scans.
      bias: The input of the layer's bias at this use, zero if it is not added to it.
    """

    def __init__(
        self,
        layer: Layer,
        use: Use,
        batching: Separate,
        weights: Float[Array, " N"] | Float[Array, "N S"],
        bias: float,
    ):
        self.layer, self.use, self.bias = layer, use, bias
        self.weights = weights
        self.form = Canonical(use, batching, inside=True)
        self.stacked = frozenset(scan for scan, _ in use.view.steps)

    def dummy(self) -> Float[Array, "..."]:
        """Zeros [*steps of scans over blocks, blocks inside, d_out, d_out, or 1 if diagonal]."""
        steps = [scan.loop.length for scan in self.use.scans if scan in self.stacked]
        value, d_out = self.use.output, self.layer.d_out
        output = jax.ShapeDtypeStruct(value.shape, value.dtype)
        shape = jax.eval_shape(self.form.output_grads, output)
        width = 1 if self.layer.has_diagonal_output else d_out
        zeros = jnp.zeros((*steps, shape.shape[0], d_out, width), contract.wide_dtype(shape.dtype))
        return flow.varying_like(zeros, value.aval)

    def of_inputs(self, record: Shaped[Array, "..."]) -> Float[Array, "blocks d_in width"]:
        """`Σ_n w_n Σ_s a aᵀ`, or its diagonal, of width one."""
        return explicit.untyped(self._of_inputs, record, self.weights)

    def _of_inputs(self, record, weights):
        # Undo the kernel's mean.
        total = kfac.total_weight(weights, self.form.positions)[:, None, None]
        x = self.form.inputs(record, record.dtype)
        if self.layer.is_embedding:
            frequencies = kfac.index_frequencies(x, self.layer.d_in, weights, dtype=weights.dtype)
            return frequencies[..., None] * total
        x = contract.widen(x)
        if self.layer.bias is not None:
            x = with_bias(x, self.bias)
        if self.layer.has_diagonal_input:
            return kfac.input_moment(x, weights, diagonal=True)[..., None] * total
        return kfac.input_moment(x, weights) * total

    def watch(
        self, value: Shaped[Array, "..."], dummy: Float[Array, "..."]
    ) -> Shaped[Array, "..."]:
        """The value; its cotangent's second moment `Σ_n Σ_s g gᵀ` becomes that of the dummy."""

        @jax.custom_vjp
        def watched(value, dummy):
            return value

        def forward(value, dummy):
            return value, None

        def backward(_, cotangent):
            return cotangent, explicit.untyped(self._of_output_grads, cotangent).astype(dummy.dtype)

        watched.defvjp(forward, backward)
        return watched(value, dummy)

    def _of_output_grads(self, cotangent):
        """`Σ_n Σ_s g gᵀ`, or its diagonal, of width one."""
        g = self.form.output_grads(cotangent)
        if self.layer.has_diagonal_output:
            return kfac.output_moment(g[None], diagonal=True)[..., None] * g.shape[1]
        return kfac.output_moment(g[None]) * g.shape[1]
