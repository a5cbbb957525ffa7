"""Cost of one `update` on model T: AdamW against `kron_psgd`, per geometry.

For each optimizer: seconds to trace and compile, median milliseconds of a step, bytes of state,
floating-point operations of a step and the share of the machine's own float32 matmul rate that this
makes. `kron_psgd` runs twice: with its factors updated every step, and at 3 % of the steps, where
the median is the time of a step between updates and the mean is that of a whole number of cycles.
Every row is a fresh process that measures the matmul rate itself.

Operations are counted from shapes: the matrix products of the textbook formulas, two operations per
multiply-add, a triangular solve as half a product, everything elementwise left out. A share of 100
% would be a program that does nothing but these products, at the speed of one large product.
"""

import argparse
import json
import sys
from math import prod
from pathlib import Path

import jax
import measure
import models
from rich.console import Console
from rich.progress import track
from rich.table import Table

GEOMETRIES = ("EQ", "QEP", "QEQ", "Q0.5EQ1.5", "QUAD", "PRO4P", "QUAD4P")

# Operations to update one dense factor of size d of a tensor with n elements: (per d n, per d^3).
# EQ: Q G (1.25), solve (1), two Gram products (4); triu(D) Q (2).
# The others: P G (4), one Gram product (2); then QEP: Q C Q^H (4), Q Q^H (2), D Q (2);
# QEQ: Q D (2); Q0.5EQ1.5: D Q (2), R Q and R^2 Q (4); QUAD: D Q and p D (4).
# Of P itself: P G (2), one Gram product (2); then PRO4P: D P (2), ten rotations at most (60);
# QUAD4P: D P and p D (4).
UPDATE_COST = {"EQ": (6.25, 2), "QEP": (6, 8), "QEQ": (6, 2), "Q0.5EQ1.5": (6, 6), "QUAD": (6, 4)}
UPDATE_COST |= {"PRO4P": (4, 62), "QUAD4P": (4, 4)}
# Per d n, to apply P to the gradient: Q G and Q^H (Q G) where Q has just moved, else the cached P;
# in EQ always the former, by panels that skip most of the zeros of Q.
APPLICATION_COST = {True: 4, False: 2}
UPPER_APPLICATION_COST = 2.5


def kron_flop(shapes, geometry, updated):
    """Operations of one step of `kron_psgd` on a tree of shapes; matrices have dense factors."""
    total = 0
    for shape in jax.tree.leaves(shapes, is_leaf=lambda x: isinstance(x, tuple)):
        application = UPPER_APPLICATION_COST if geometry == "EQ" else APPLICATION_COST[updated]
        if geometry.endswith("4P"):
            application = APPLICATION_COST[False]
        for d in shape if len(shape) > 1 else ():
            per_dn, per_cube = UPDATE_COST[geometry] if updated else (0, 0)
            total += (per_dn + application) * d * prod(shape) + per_cube * d**3
    return total


def measurements(geometries):
    """Rows to measure: (label, operations or None, options of measure.py)."""
    shapes = models.model_t_shapes()
    rows = [("optax.adamw", None, ("--library", "adamw", "--steps", 30))]
    for geometry in geometries:
        kron = ("--library", "optax_kron", "--geometry", geometry)
        every = (*kron, "--probability", 1.0, "--steps", 20)
        seldom = (*kron, "--probability", 0.03, "--steps", 100)
        flop_every = kron_flop(shapes, geometry, updated=True)
        rows.append((f"kron_psgd {geometry}, every step", flop_every, every))
        flop_between = kron_flop(shapes, geometry, updated=False)
        rows.append((f"kron_psgd {geometry}, at 3 %", flop_between, seldom))
    return rows


def measure_row(label, flop, options):
    """One measurement with the figures derived from it."""
    figures = measure.launch(sys.executable, "--task", "step", *options)
    share = flop and flop / figures["median_s"] / figures["matmul_flop_s"]
    return {"label": label, "flop": flop, "matmul_share": share, **figures}


def table_of(rows):
    """The figures as a table."""
    table = Table(title="One update of model T (3.4 M parameters, float32)")
    table.add_column("optimizer")
    columns = ("compile s", "median ms", "mean ms", "worst ms", "state MiB", "GFLOP", "of matmul")
    for column in (*columns, "matmul GFLOP/s"):
        table.add_column(column, justify="right")
    for row in rows:
        milliseconds = [f"{1e3 * row[key]:.1f}" for key in ("median_s", "mean_s", "worst_s")]
        work = (f"{row['flop'] / 1e9:.1f}", f"{row['matmul_share']:.0%}") if row["flop"] else "--"
        table.add_row(
            row["label"] + ("" if row["finite"] else " (NOT FINITE)"),
            f"{row['compile_s']:.2f}",
            *milliseconds,
            f"{row['state_bytes'] / 2**20:.1f}",
            *work,
            f"{row['matmul_flop_s'] / 1e9:.0f}",
        )
    return table


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--geometry", choices=(*GEOMETRIES, "all"), default="EQ")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    args = parser.parse_args()
    todo = measurements(GEOMETRIES if args.geometry == "all" else (args.geometry,))
    console = Console(width=None if sys.stdout.isatty() else 130)
    progress_console = Console(stderr=True)
    rows = [measure_row(*row) for row in track(todo, "measuring", console=progress_console)]
    console.print(table_of(rows))
    console.print("at 3 %: median = a step between factor updates, mean = over whole cycles")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
