"""What `gpu.py` measures, one optimizer after the other, in a process that may be ended any time.

Each line on standard output is a JSON object: what is about to begin, a figure, or a failure.
"""

import dataclasses
import functools
import gc
import json
import time
import traceback

import gpu_cycles
import gpu_model as model
import jax
import jax.numpy as jnp
import optax
import timing

import optax_kron as ok

_LEAST = 15  # seconds that are left for every other optimizer, compilation and all
_FEW = 4  # windows that taps are made of where those of a batch do not fit


def send(**message):
    """One line for the process that started this one."""
    print(json.dumps(message), flush=True)


class Bench:
    """The model, its gradient programs, and how optimizers are timed on them.

    Args:
        shapes: of the model.
        deadline: when all has to end, in seconds of `time.monotonic`.
        limit: seconds for one optimizer.
        seconds: how long steps of one kind are timed, whole cycles apart.
    """

    def __init__(self, shapes, *, deadline, limit, seconds):
        self.shapes, self.deadline, self.limit, self.seconds = shapes, deadline, limit, seconds
        self.params = model.init(shapes, 0)
        self.gradients = [jax.tree.map(lambda x: x / 20, model.init(shapes, i)) for i in (1, 2)]
        self.tokens = [jnp.asarray(model.draw_tokens(shapes, i)) for i in (3, 4)]
        self.begin(0)

    def begin(self, rows_left):
        """Begin an optimizer; so many are left after it."""
        self.until = min(self.deadline, time.monotonic() + self.limit)
        self.spare = _LEAST * rows_left

    def check(self):
        """Raise if the time is over."""
        if time.monotonic() > self.until:
            raise TimeoutError(f"over {self.limit:g} s, or the time for all is over")

    @functools.cached_property
    def plain_gradient(self):
        """The compiled gradient of the loss; attention by cuDNN where there is one."""
        params = jax.device_put(self.params)
        for attention in ("cudnn", "xla") if jax.default_backend() == "gpu" else ("xla",):
            self.attention, self.loss_fn = attention, model.make_loss(self.shapes, attention)
            function = jax.value_and_grad(self.loss_fn)
            try:
                program, figures = timing.compile_timed(function, params, self.tokens[0])
                figures["median_s"] = gpu_cycles.median_seconds(program, params, self.tokens[0])
            except Exception as error:  # any: what cuDNN lacks is told in many ways
                send(note=f"attention by {attention}: {_told(error)}")
                continue
            send(gradient="plain", attention=attention, **figures)
            return lambda params, tokens: (*program(params, tokens), {})
        raise RuntimeError("the gradient of the model does not compile, or does not run")

    @functools.cached_property
    def layers(self):
        """Those of the loss of stacked parameters, with the attention of the plain gradient."""
        assert self.plain_gradient
        abstract = jax.eval_shape(lambda: (model.stacked(self.params, jnp.stack), self.tokens[0]))
        return ok.find_layers(self.loss_fn, *abstract)

    def gradient_with_taps(self, taps, windows, params):
        """The compiled gradient with taps, and what it gives for each of the two batches."""
        moments = taps == "moments"
        with_taps = ok.value_and_grad_with_taps(self.loss_fn, self.layers, reduce=moments)

        def gradient(params, tokens):
            loss, grads, taps = with_taps(params, tokens, key=jax.random.key(0))
            return loss, grads, {"taps": taps}

        batches = [tokens[:windows] for tokens in self.tokens]
        program, figures = timing.compile_timed(gradient, params, batches[0])
        seen = jax.block_until_ready([program(params, tokens)[1:] for tokens in batches])
        figures["median_s"] = gpu_cycles.median_seconds(program, params, batches[0])
        told = f"taps, {taps} of {len(batches[0])} windows"
        send(gradient=told, attention=self.attention, **figures)
        return program, seen

    def inputs(self, row, params):
        """The gradient's program, `None` without training, and gradients with extra arguments."""
        if not row.taps:
            return "plain", [(jax.device_put(x), {}) for x in self.gradients]
        if row.trains:
            try:
                return self.gradient_with_taps(row.taps, None, params)
            except Exception as error:  # too little memory, above all
                send(note=f"{row.name}: no training, as its gradient failed: {_told(error)}")
        return None, self.gradient_with_taps(row.taps, _FEW, params)[1]

    def measure(self, row, *, train, dtypes):
        """Send all figures of one optimizer."""
        stack = model.stacked if row.taps else lambda tree: tree
        fresh = functools.partial(jax.device_put, stack(self.params))
        tx = row.make(fresh(), self.layers if row.taps else None)
        gradient, seen = self.inputs(row, fresh())

        def step(params, state, grads, extras):
            updates, state = tx.update(grads, state, params, **extras)
            return optax.apply_updates(params, updates), state

        seconds, state = timing.clock(jax.jit(tx.init), fresh())
        size = timing.tree_bytes(state)
        for i, dtype in enumerate(dtypes):
            if i and self.deadline - time.monotonic() < self.spare:
                send(note=f"{row.name}: no {dtype}, to leave time for the other optimizers")
                break
            given = [(_cast(grads, dtype), extras) for grads, extras in seen]
            program, figures = timing.compile_timed(step, fresh(), state, *given[0], donate=(0, 1))
            # Known also of an optimizer whose steps outlast its limit.
            told = "state in {:.1f} s, step traced in {trace_s:.1f}, compiled by {compile_s:.1f}"
            send(stage=f"{row.name}, {dtype}: {told.format(seconds, **figures)}")
            # State goes on from one kind of step to the next: to find the first bases takes as
            # long as many steps.
            state, timed = self._time(row, functools.partial(_update, program, given), state, fresh)
            send(update=dtype, state_bytes=size, **figures, **timed)
            if train and gradient and not i:
                state = self._train(row, gradient, program, state, fresh)

    def _train(self, row, gradient, program, state, fresh):
        """Send the figures of whole training steps: the gradient's program, then the update's."""
        gradient, losses = self.plain_gradient if gradient == "plain" else gradient, []

        def step(i, carry):
            loss, grads, extras = gradient(carry[0], self.tokens[i % 2])
            losses.append(loss)
            return program(*carry, grads, extras)

        state, timed = self._time(row, step, state, fresh)
        send(train="float32", losses=[float(losses[0]), float(losses[-1])], **timed)
        return state

    def _time(self, row, step, state, fresh):
        (_, state), timed = gpu_cycles.time_cycles(
            step, (fresh(), state), cycle=row.cycle, seconds=self.seconds, check=self.check
        )
        return state, timed


def _update(program, given, i, carry):
    return program(*carry, *given[i % 2])


def _cast(tree, dtype):
    return jax.tree.map(lambda x: x.astype(dtype), tree)


def _told(error):
    return f"{type(error).__name__}: {str(error).strip()[:300]}"


def run(rows, shapes, *, minutes, limit, seconds, train, dtypes):
    """Measure rows; what fails is told, and the next one begins."""
    device = jax.devices()[0]
    send(
        device=device.device_kind,
        platform=device.platform,
        jax=jax.__version__,
        shapes=dataclasses.asdict(shapes),
    )
    deadline = time.monotonic() + 60 * minutes
    bench = Bench(shapes, deadline=deadline, limit=limit, seconds=seconds)
    if train and not all(row.taps for row in rows):
        # Before the first optimizer, whose limit it would be counted for.
        _tried(lambda: bench.plain_gradient)
    for i, row in enumerate(rows):
        send(begin=row.name)
        bench.begin(len(rows) - i - 1)
        _tried(functools.partial(bench.measure, row, train=train, dtypes=dtypes))
        gc.collect()  # what a failed one has left on the device
        send(end=row.name)


def _tried(function):
    try:
        function()
    except Exception as error:  # any: the other rows are to be measured all the same
        send(failed=_told(error), traceback=traceback.format_exc()[-3000:])
