"""How `influence_retraining.py` trains to an optimum, with all images and without some of them."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.progress import track

import optax_kron as ok
from examples import influence

AT_ONCE = 16  # nets that are trained anew side by side


@dataclass(frozen=True, eq=False)
class Problem:
    """What is trained on: images, labels, their weights (all 1), layers and the weight decay."""

    images: jax.Array
    labels: jax.Array
    weights: jax.Array
    layers: ok.Layers
    decay: float

    def objective(self, params, weights):
        """What is minimised, with a weight for every image: 1, or 0 to leave it out."""
        loss = influence.loss_fn(params, weights, self.images, self.labels)
        return loss + self.decay / 2 * optax.tree.norm(params, squared=True)

    def curvature(self, params) -> ok.operators.Operator:
        """Returns EKFAC's approximation of the curvature of the mean loss."""
        with_taps = ok.value_and_grad_with_taps(influence.loss_fn, self.layers, fisher="exact")
        _, _, taps = with_taps(params, self.weights, self.images, self.labels)
        return ok.operators.ekfac(taps, self.layers)


def train(problem: Problem, params, steps: int, key):
    """Trains with K-FAC, and as many steps on to the optimum."""
    schedule = optax.cosine_decay_schedule(0.1, steps)
    kfac = ok.kfac(schedule, layers=problem.layers, damping=1e-2)
    optimizer = optax.chain(optax.add_decayed_weights(problem.decay), kfac)
    with_taps = ok.value_and_grad_with_taps(influence.loss_fn, problem.layers)

    @jax.jit
    def step(params, state, key):
        arrays = problem.weights, problem.images, problem.labels
        _, grads, taps = with_taps(params, *arrays, key=key)
        updates, state = optimizer.update(grads, state, params, taps=taps)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for i in range(steps):
        params, state = step(params, state, jax.random.fold_in(key, i))
    half = jax.jit(problem.curvature)(params).inverse_sqrt(problem.decay)
    return jax.jit(partial(settle, problem, steps=steps))(params, problem.weights, half)


def settle(problem: Problem, params, weights, half: ok.operators.Operator, steps: int):
    """Goes from somewhere near to the optimum for given weights of the images.

    L-BFGS works on z, with the parameters `params + half @ z` and `half` the inverse root of the
    damped curvature: seen from z, the objective curves about alike in all directions.
    """
    optimizer = optax.lbfgs()

    def at(z):
        return jax.tree.map(jnp.add, params, half @ z)

    def objective(z):
        return problem.objective(at(z), weights)

    def step(carry, _):
        z, state = carry
        value, grad = optax.value_and_grad_from_state(objective)(z, state=state)
        updates, state = optimizer.update(
            grad, state, z, value=value, grad=grad, value_fn=objective
        )
        return (optax.apply_updates(z, updates), state), None

    z = optax.tree.zeros_like(params)
    (z, _), _ = jax.lax.scan(step, (z, optimizer.init(z)), length=steps)
    return at(z)


def retrain(problem: Problem, params, half, groups, test, steps: int):
    """Trains once without each of the groups, [groups, images].

    Returns:
      The test losses [groups, tests] of the nets, and the norms [groups] of the last gradients.
    """

    @jax.jit
    @jax.vmap
    def without(group):
        weights = 1.0 - group
        settled = settle(problem, params, weights, half, steps)
        slope = optax.tree.norm(jax.grad(problem.objective)(settled, weights))
        return influence.losses_of(settled, *test), slope

    found = []
    for start in track(range(0, len(groups), AT_ONCE), "training without some"):
        some = groups[start : start + AT_ONCE].astype(np.float32)
        padded = np.pad(some, ((0, AT_ONCE - len(some)), (0, 0)))  # so that it compiles but once
        found.append([np.asarray(x)[: len(some)] for x in without(padded)])
    return (np.concatenate(parts) for parts in zip(*found, strict=True))
