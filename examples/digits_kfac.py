"""AdamW and K-FAC side by side: the convolutional net of digits.py, with layers found in its loss.

K-FAC needs to see what each layer saw. Nothing in the model says so: `find_layers` reads the loss
function, and `value_and_grad_with_taps` returns the gradient together with the taps. Rules of the
comparison are those of digits.py.

    python examples/digits_kfac.py --help
"""

import argparse

from common import Contestant, Task, add_batch_size, add_comparison, compare, draw, make_parser
from digits import ADAMW, make_task
from rich.console import Console

import optax_kron as ok

DAMPING = 1e-3


def kfac(task: Task, console: Console) -> Contestant:
    """Returns K-FAC for the layers of the task's loss, which are printed."""
    layers = ok.find_layers(task.loss_fn, task.init(), *task.batch(0))
    console.print(str(layers), highlight=False, soft_wrap=True)

    def make(schedule):
        return ok.kfac(schedule, layers=layers, damping=DAMPING)

    return Contestant("kfac", make, (1e-2, 3e-2, 1e-1), "#2e8b57", layers)


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = make_parser(__doc__, steps=200, seed_of="weights, batches and sampled labels")
    add_comparison(parser, ("adamw", "kfac"), out="digits_kfac.png")
    add_batch_size(parser)
    return parser.parse_args()


def main() -> None:
    """Trains, prints the table and writes the picture."""
    arguments = parse_arguments()
    console = Console()
    task = make_task(arguments)
    contestants = {"adamw": lambda: ADAMW, "kfac": lambda: kfac(task, console)}
    runs = compare(task, contestants, arguments.optimizer, console)
    draw(runs, arguments.out)
    console.print(f"Curves: {arguments.out}")


if __name__ == "__main__":
    main()
