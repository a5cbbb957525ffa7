"""What operators act on: pytrees of real arrays, checked against the expected structure."""

import dataclasses
from collections.abc import Hashable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Inexact

from optax_kron.layers.paths import abstract, is_inexact
from optax_kron.types import PyTree


@dataclasses.dataclass(frozen=True)
class Structure:
    """Shapes and dtypes of a pytree, hashable: a static field of operators."""

    treedef: Hashable  # a PyTreeDef, of which JAX has no public type
    leaves: tuple[jax.ShapeDtypeStruct, ...]

    @classmethod
    def of(cls, tree: PyTree) -> "Structure":
        """That of a pytree of arrays, or of abstract ones; without leaves that are not inexact."""
        leaves, treedef = jax.tree.flatten(abstract(tree))
        return cls(treedef, tuple(leaves))

    def check(self, vector: PyTree) -> PyTree:
        """The vector, if it has this structure; its leaves as floating-point arrays."""
        if not self.is_that_of(vector):
            raise ValueError(
                f"the operator acts on {self.treedef} of shapes {[x.shape for x in self.leaves]}; "
                f"{described(vector)}."
            )
        pairs = zip(jax.tree.leaves(vector), self.leaves, strict=True)
        return jax.tree.unflatten(self.treedef, [as_real(x, like.dtype) for x, like in pairs])

    def is_that_of(self, tree: PyTree) -> bool:
        """Whether a pytree of arrays, or of abstract ones, has this structure and these shapes."""
        leaves, treedef = jax.tree.flatten(tree)
        shapes = [x.shape for x in self.leaves]
        return treedef == self.treedef and [jnp.shape(x) for x in leaves] == shapes

    @property
    def tree(self) -> PyTree:
        """The pytree of abstract arrays."""
        return jax.tree.unflatten(self.treedef, self.leaves)


def check_array(vector: PyTree, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """The array, if it has the shape that an operator acts on."""
    if not jax.tree_util.all_leaves([vector]) or jnp.shape(vector) != shape:
        raise ValueError(f"the operator acts on arrays of shape {shape}; {described(vector)}.")
    return as_real(vector)


def described(vector: PyTree) -> str:
    """What came in place of the vector that was expected, for messages."""
    leaves, treedef = jax.tree.flatten(vector)
    if jax.tree_util.all_leaves([vector]):
        kind = "one" if hasattr(vector, "shape") else f"a {type(vector).__name__}"
        return f"got {kind} of shape {jnp.shape(vector)}"
    return f"got {treedef} of shapes {[jnp.shape(x) for x in leaves]}"


def as_real(x: ArrayLike, like: DTypeLike = jnp.float32) -> Inexact[Array, "..."]:
    """A floating-point array; real, unless an operator acts on complex numbers.

    Args:
      x: An entry of a vector; integers become floating-point.
      like: Dtype that the operator acts on.
    """
    array = jnp.asarray(x)
    if jnp.iscomplexobj(array) and not jnp.issubdtype(like, jnp.complexfloating):
        raise ValueError(
            f"the operator acts on real numbers; got complex ones, of shape {array.shape}. Apply "
            "it to the real and the imaginary part by themselves."
        )
    return array if is_inexact(array) else array.astype(jnp.result_type(array, jnp.float32))


def scaled(scale: Float[Array, ""], x: Inexact[Array, "*n"]) -> Inexact[Array, "*n"]:
    """A number times an array, in the dtype of the array."""
    return (scale * x).astype(x.dtype)
