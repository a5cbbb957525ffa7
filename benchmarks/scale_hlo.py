"""What a compiled program of one device does, read from its text: collectives and operations.

Loops are counted: what is in the body of a loop of 8 steps counts 8 times, at any depth. XLA's own
counts take a body once. A loop whose number of steps the compiler does not know is one that runs
when something is due, as a refresh of factors; its contents count once, and are told apart. So is
the dearer branch of a conditional, and the cheaper one is what happens usually.
"""

import math
import re
from typing import NamedTuple

COLLECTIVES = ("all-gather", "all-to-all", "all-reduce", "reduce-scatter", "collective-permute")
BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16}
BYTES |= {f"{kind}{bits}": bits // 8 for kind in "su" for bits in (8, 16, 32, 64)}

_HEAD = re.compile(r"^(ENTRY )?%?([\w.-]+) .*\{$")
_LINE = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
# Operations of LAPACK's routines on a square matrix, in units of d³; an eigendecomposition with
# vectors takes about nine.
_LAPACK = {"geqrf": 4 / 3, "orgqr": 4 / 3, "ungqr": 4 / 3, "syevd": 9, "heevd": 9}
_NO_MATRICES = ("TopK", "xla.", "Sharding", "SPMD")


class Operation(NamedTuple):
    """One instruction, as often as it runs."""

    kind: str  # a collective, "dot", or a routine of LAPACK
    amount: float  # bytes that come from other devices, or floating-point operations
    dtype: str
    times: int = 1
    when: str = "always"  # or "usually", instead of what is "due"
    loop: str | None = None  # in which loop or branch the latter is

    @property
    def total(self):
        """In all runs."""
        return self.times * self.amount


class Line(NamedTuple):
    """An instruction."""

    kind: str  # the type of the result
    name: str
    rest: str  # operands and attributes


def computations(text):
    """The instructions of every computation, by name, and the name of the first to run."""
    found, entry, current = {}, None, {}
    for line in text.splitlines():
        if head := _HEAD.match(line):
            current = found[head[2]] = {}
            entry = head[2] if head[1] else entry
        elif match := _LINE.match(line):
            current[match[1]] = Line(match[2], match[3], match[4])
    return found, entry


def operations(text):
    """All that counts in a program, each instruction with the times it runs."""
    found, entry = computations(text)

    def walk(name, times, when, loop):
        done = []
        for own, line in found[name].items():
            measured = _measured(line, found[name])
            if measured is not None:
                done.append(measured._replace(times=times, when=when, loop=loop))
            called = re.sub(r"condition=%?[\w.-]+", "", line.rest)
            called = [x for x in re.findall(r"%([\w.-]+)", called) if x in found]
            trips = re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', line.rest)
            inside = ("due", own) if when == "always" else (when, loop)
            if line.name == "while" and trips:
                done += walk(called[0], times * int(trips[1]), when, loop)
            elif line.name == "while":
                # Within a loop of unknown length another one counts once for each step of it.
                done += walk(called[0], times, *inside)
            elif line.name == "conditional":
                branches = (walk(x, times, *inside) for x in called)
                cheap, *_, dear = sorted(branches, key=_flop)
                done += dear
                done += [x._replace(when="usually") for x in cheap if when == "always"]
            else:
                for other in called:
                    done += walk(other, times, when, loop)
        return done

    return walk(entry, 1, "always", None)


def _flop(done):
    return sum(x.total for x in done if x.kind not in COLLECTIVES)


def _measured(line, others):
    """The instruction, run once, if it is one that counts."""
    kind = line.name.removesuffix("-start")
    if kind in COLLECTIVES:
        return Operation(kind, _bytes_from_others(kind, line), _ARRAY.search(line.kind)[1])
    if kind == "dot":
        dtype, result = _arrays(line.kind)[0]
        left = re.match(r"(?:(\w+\[[\d,]*\])\S* )?%([\w.-]+)", line.rest)
        shape = _arrays(left[1] or others[left[2]].kind)[0][1]
        summed = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", line.rest)[1]
        lengths = [shape[int(axis)] for axis in summed.split(",") if axis]
        return Operation(kind, 2 * math.prod(result) * math.prod(lengths), dtype)
    if kind == "convolution":
        raise ValueError("the program has a convolution, which is not counted")
    if kind == "custom-call":
        target = re.search(r'custom_call_target="([^"]*)"', line.rest)[1]
        for routine, factor in _LAPACK.items():
            if routine in target:
                dtype, shape = max(_arrays(line.kind), key=lambda x: math.prod(x[1]))
                *batch, rows, _ = shape
                return Operation(routine, factor * math.prod(batch) * rows**3, dtype)
        if not target.startswith(_NO_MATRICES):
            raise ValueError(f"the program calls {target}, which is not counted")
    return None


def _arrays(kind):
    """Dtype and shape of each array of a type."""
    return [
        (dtype, tuple(int(x) for x in shape.split(",") if x))
        for dtype, shape in _ARRAY.findall(kind)
        if dtype in BYTES
    ]


def _bytes_from_others(kind, line):
    """What one device gets from others, or sends to them where it sends more."""
    size = sum(BYTES[dtype] * math.prod(shape) for dtype, shape in _arrays(line.kind))
    if kind == "collective-permute":
        return size
    group = _group(line.rest)
    away = (group - 1) / group
    # A ring of devices reduces and then gathers; of what is reduced and scattered the result is
    # one part of many.
    return size * away * {"all-reduce": 2, "reduce-scatter": group}.get(kind, 1)


def _group(rest):
    """How many devices take part in each group of a collective."""
    groups = re.search(r"replica_groups=(\{\{[\d,]*|\[\d+,\d+\]|mesh\[.*?\}(?=,|$| ))", rest)[1]
    if groups.startswith("{{"):
        return groups.count(",") + 1
    if groups.startswith("["):
        return int(groups.strip("[]").split(",")[1])
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", groups.split("]")[0]))
    return math.prod(int(sizes[name]) for name in re.findall(r"'(\w+)'", groups.split("{")[-1]))
