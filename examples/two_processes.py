"""Two processes train on one mesh, and save what any number of devices can go on from.

Every host of a cluster runs the same program, and sees the devices of all as one mesh. Here hosts
are processes with --process, of four virtual CPU devices each, that go on from the latest
checkpoint in their folder. Without it, two are started, then one of eight, to compare the losses.

python examples/two_processes.py --help
"""

import json
import sys
import tempfile
from pathlib import Path

import jax
import optax
from common import add_batch_size, make_parser
from data import batch_order, load_data
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp
from processes import add_host, compare, launch_hosts

import optax_kron as ok


def make(name, seed, images, labels):
    """Returns parameters, the optimizer, and a function that makes one step."""
    kwargs = {"rngs": nnx.Rngs(seed), "param_dtype": float}
    first, last = nnx.Linear(64, 32, **kwargs), nnx.Linear(32, 10, **kwargs)
    graphdef, params = nnx.split(nnx.Sequential(first, nnx.tanh, last))
    params = nnx.as_pure(params)

    def loss_fn(params, images, labels):
        logits = nnx.merge(graphdef, params)(images.reshape(len(images), 64))
        return ok.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    layers = ok.find_layers(loss_fn, params, images, labels)
    value_and_grad = ok.value_and_grad_with_taps(loss_fn, layers, fisher="exact")
    # Last bits of float64 would decide what the first gradient leaves open in SOAP's bases.
    tx = ok.soap(3e-2, factor_dtype="float32") if name == "soap" else ok.kfac(1e-1, layers=layers)

    @jax.jit
    def step(params, state, images, labels):
        loss, grads, taps = value_and_grad(params, images, labels)
        updates, state = tx.update(grads, state, params, taps=taps)  # which SOAP does not use
        return optax.apply_updates(params, updates), state, loss

    return params, tx, step


def restore(checkpoints, params, tx, mesh):
    """Returns the latest step, parameters and state on a mesh, whatever mesh they come from."""
    shardings = ok.sharding.state_shardings(tx, params, mesh)
    places = jax.tree.map(lambda x: x.sharding, params), shardings
    shapes = jax.eval_shape(lambda: (params, tx.init(params)))
    like = jax.tree.map(lambda x, at: x.update(sharding=at), shapes, places)
    # Stacks of blocks are filled up to a multiple of the devices: with zeros that are added to what
    # was saved, or left out of it.
    context = ocp.Context()
    context.array.loading.enable_padding_and_truncation = True
    with context:
        return checkpoints.latest.step, *checkpoints.load(abstract_state=like)


def train(name, mesh, arguments):
    """Yields number, loss, parameters and state of every step since the latest checkpoint."""
    data, rows = load_data(), NamedSharding(mesh, PartitionSpec("data"))
    size, steps, seed = arguments.batch_size, arguments.steps, arguments.seed
    order = batch_order(len(data.train_labels), size, steps, seed)

    def place(batch):
        """Returns images and labels on all devices, to which each host brings its share."""
        mine = batch.reshape(jax.process_count(), -1)[jax.process_index()]
        both = data.train_images[mine], data.train_labels[mine]
        return [jax.make_array_from_process_local_data(rows, x) for x in both]

    params, tx, step = make(name, seed, *place(order[0]))
    state, done = jax.jit(tx.init)(params), 0
    with ocp.training.Checkpointer((arguments.folder / name).absolute()) as checkpoints:
        if checkpoints.latest:
            done, params, state = restore(checkpoints, params, tx, mesh)
        for i, batch in enumerate(order[done:], start=done + 1):
            params, state, loss = step(params, state, *place(batch))
            yield i, float(loss), params, state
            if i % arguments.save_every == 0:
                checkpoints.save(i, (params, state))


def run_host(arguments):
    """Trains as one of the hosts; the first of them writes down the losses."""
    jax.config.update("jax_enable_x64", True)  # first steps would amplify 32-bit rounding
    if arguments.processes > 1:
        jax.distributed.initialize(arguments.address, arguments.processes, arguments.process)
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    with jax.set_mesh(mesh):
        curves = {k: [seen[:2] for seen in train(k, mesh, arguments)] for k in ("soap", "kfac")}
    if jax.process_index() == 0:
        (arguments.folder / "curves.json").write_text(json.dumps(curves))


def main() -> None:
    """Trains in two processes and in one, compares the losses and draws them."""
    parser = make_parser(__doc__, steps=60, out="two_processes.png")
    add_batch_size(parser)
    add_host(parser)
    arguments = parser.parse_args()
    if arguments.process is not None:
        return run_host(arguments)
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for hosts in (2, 1):
            own = f"{folder}/{hosts}"
            launch_hosts([*sys.argv, "--folder", own], hosts, devices=8 // hosts)
            runs.append(json.loads(Path(own, "curves.json").read_text()))
    compare(arguments.out, "Digits: two processes (lines) and one (circles)", *runs)


if __name__ == "__main__":
    main()
