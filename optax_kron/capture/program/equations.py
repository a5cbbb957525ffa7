"""The one place that reads JAX's equations: what an equation is, what it holds, and how to run it.

Primitives and their parameters change from one release of JAX to the next: a scan counts its
constants and carries in `num_consts` and `num_carry` up to 0.10 and in the trees `ft_in` and
`ft_out` since 0.11, and with the upgrade flags of 0.12 a checkpoint keeps its program inside of its
primitive. So each question about an equation has one function here, and the rest of the room asks
no other way.

An equation is interpreted (inlined, looped, branched) only if it is recognised: its primitive is
JAX's own, it has the parameters that are known and no others, and its program fits its operands.
Every other equation that holds a program is opaque, and bound whole, as it came: a loop that was
taken for a call would run once, and give the loss of another function.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.core
import jax.extend as jex
import jax.extend.core.primitives as primitives
from jax import Array
from jax.typing import ArrayLike

from optax_kron.declarations import Declared, declared_axes
from optax_kron.distributions import MARK_PREFIX

_PACKAGE = str(pathlib.Path(__file__).parents[2])

Equation: TypeAlias = jex.core.JaxprEqn
Literal: TypeAlias = jex.core.Literal
# With the arrays that it closes over: `ClosedJaxpr`, or since JAX 0.11 `Jaxpr`, the only class.
Program: TypeAlias = Any
Atom: TypeAlias = "jex.core.Var | Literal"
# Settings of primitives, of types that are JAX's own affair.
Params: TypeAlias = Mapping[str, Any]

# Since JAX 0.11 it is the only class of programs, and its other name goes.
_CLOSED: Any = getattr(jex.core, "ClosedJaxpr", jex.core.Jaxpr)
# Primitives by name, of those that JAX shows to the public.
_SHOWN = {
    value.name: value
    for key, value in vars(primitives).items()
    if key.endswith("_p") and hasattr(value, "name")
}
_COMMON_SCAN = {"jaxpr", "length", "reverse", "unroll"}
_SCAN = (  # up to JAX 0.9, 0.10, and since 0.11
    _COMMON_SCAN | {"num_consts", "num_carry", "linear", "_split_transpose"},
    _COMMON_SCAN | {"num_consts", "num_carry"},
    _COMMON_SCAN | {"ft_in", "ft_out"},
)
_WHILE = {"cond_jaxpr", "cond_nconsts", "body_jaxpr", "body_nconsts"}
_COND = {"branches", "branches_platforms"}
_REMAT = {"jaxpr", "policy", "prevent_cse", "differentiated"}
# Equations that run their program once on their operands, but have a rule of their own for
# derivatives or batches, which inlining would drop; by the parameter that holds the program.
_WITH_RULES = {
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vmap_call": "call",
    "linear_call": "callee",
}
# Equations that say where their operands live, in which layout, or with which type on a mesh: their
# outputs are the operands.
_PLACINGS = frozenset(
    """
    device_put layout_constraint optimization_barrier pbroadcast preduced pvary reduced_vary_cast
    reduced_vary_cast_p relayout reshard sharding_constraint stage vary_unreduced_cast
    vary_unreduced_cast_p with_memory_space_constraint
    """.split()  # noqa: SIM905  (a list would take a line for each)
)
_CALLS = ("jit", "pjit", "closed_call", "core_call")
# The name of a call that the user has declared to keep examples apart.
DECLARED = "per_example"


class Loop(NamedTuple):
    """What a scan does.

    Its operands, and the inputs of its program, are constants, then carries, then what is scanned
    over; its outputs are carries, then what is stacked.
    """

    constants: int
    carries: int
    length: int
    reverse: bool
    unroll: int


class _Recognised(NamedTuple):
    """The kind of an equation, and the closed programs that are known to be its."""

    kind: str
    bodies: tuple[Program, ...] = ()


def recognise(eqn: Equation) -> tuple[str, tuple[Program, ...]]:
    """What an equation is, and the closed programs that it holds.

    Returns:
      The kind, and programs with the inputs and outputs that it implies:

      - "call": the program on the operands, once;
      - "scan", "while" (the test, then the body), "cond" (a program for each branch; the first
        operand is the index), "remat" (a checkpoint);
      - "mark": a loss of `ok.losses`;
      - "opaque": any other equation that holds a program, and calls that the user has declared.
        With programs if it is known to run one of them, once, on its last operands;
      - "plain": it holds none.
    """
    for look in (_as_scan, _as_while, _as_cond, _as_remat, _with_rules, _as_call):
        recognised = look(eqn)
        if recognised is not None:
            return recognised
    is_name = _upgraded(eqn, "CheckpointName") is not None
    return _Recognised("opaque" if holds_program(eqn) and not is_name else "plain")


def name(eqn: Equation) -> str:
    """Of the primitive; one of another library that bears the name of JAX's gets another."""
    given = eqn.primitive.name
    if declared(eqn) is not None:
        return DECLARED
    if given == _HOLDER and "_prim" in eqn.params:
        held = type(eqn.params["_prim"]).__name__
        return held if _upgraded(eqn) is None else _UPGRADED[held]
    return given if _SHOWN.get(given, eqn.primitive) is eqn.primitive else f"{given} (not of JAX)"


def settings(eqn: Equation) -> Params:
    """The parameters of an equation without a program, as its primitive names them."""
    return eqn.params


def same_primitive(first: Equation, second: Equation) -> bool:
    """Whether two equations are of one primitive."""
    return first.primitive is second.primitive


def images(eqn: Equation) -> list[int] | None:
    """Which operand each output is, unchanged; `None` for equations that compute something."""
    primitive = name(eqn)
    if primitive == "tie":
        return [1]
    same = primitive in _PLACINGS and len(eqn.invars) == len(eqn.outvars)
    return list(range(len(eqn.outvars))) if same else None


def loop(eqn: Equation) -> Loop:
    """What a scan does."""
    params = eqn.params
    if "ft_in" in params:
        constants, carries, _ = (len(list(part)) for part in params["ft_in"].unpack())
    else:
        constants, carries = params["num_consts"], params["num_carry"]
    return Loop(constants, carries, params["length"], params["reverse"], params["unroll"])


def while_constants(eqn: Equation) -> tuple[int, int]:
    """How many of the operands of a while loop its test and its body close over."""
    return eqn.params["cond_nconsts"], eqn.params["body_nconsts"]


def solved_map(eqn: Equation) -> Program:
    """The closed program of the linear map that a `custom_linear_solve` inverts."""
    return closed(eqn.params["jaxprs"].matvec)


def local_program(eqn: Equation) -> tuple[Program, Sequence, Sequence]:
    """What each device runs in a `shard_map`, and how its inputs and its outputs are cut."""
    params = eqn.params
    return closed(params["jaxpr"]), params["in_specs"], params["out_specs"]


def checkpointing(eqn: Equation) -> Params:
    """The arguments of `jax.checkpoint` that make a checkpoint again."""
    held = _upgraded(eqn)
    params = eqn.params if held is None else vars(held)
    return {"policy": params["policy"], "prevent_cse": params["prevent_cse"]}


def loss_name(eqn: Equation) -> str:
    """The name of a mark, which says its distribution."""
    return eqn.params["name"]


def declared(eqn: Equation) -> Declared | None:
    """What the user has declared of a function, if an equation is a call of one."""
    if not _is(eqn, "jit", "pjit"):
        return None
    shapes = ([_shape(x) or () for x in side] for side in (eqn.invars, eqn.outvars))
    return declared_axes(str(eqn.params.get("name", "")), *shapes)


def holds_program(eqn: Equation) -> bool:
    """Whether some parameter is a program, or something that may run one."""
    if eqn.primitive.name == _HOLDER:
        return True
    return any(_may_run(x) for x in eqn.params.values())


def is_reference(aval: jax.core.AbstractValue) -> bool:
    """Whether a value is a place that equations write to and read from, and no array."""
    return hasattr(aval, "inner_aval")


def bind(eqn: Equation, jaxpr: jex.core.Jaxpr, *arguments: Array) -> list[Array]:
    """Evaluate one equation of a program, whatever it is, on arrays for its variables.

    The operands of an elementwise equation may have been broadcast before.
    """
    variables = [x for x in eqn.invars if not isinstance(x, Literal)]
    shapes = [jax.numpy.shape(x) for x in arguments]
    if shapes != [_shape(x) for x in variables] and not eqn.primitive.multiple_results:
        # A program is typed by its variables, which know no other shape.
        filled = iter(arguments)
        operands = [x.val if isinstance(x, Literal) else next(filled) for x in eqn.invars]
        return bind_with(eqn, operands, eqn.params)
    given = dict(zip(variables, arguments, strict=True))
    alone = jaxpr.replace(constvars=[], invars=list(given), outvars=eqn.outvars, eqns=[eqn])
    return jax.core.eval_jaxpr(alone, (), *given.values())


def bind_with(eqn: Equation, operands: Sequence[ArrayLike], settings: Params) -> list[Array]:
    """What an equation without a program computes of all operands, with other settings."""
    result = eqn.primitive.bind(*operands, **settings)
    return list(result) if eqn.primitive.multiple_results else [result]


def place(*calls: Equation) -> str:
    """Where the user's code made an equation: "file.py:12 (function)", or empty.

    Args:
      *calls: The equation, and the calls that it was inlined from, from the inside; a program that
        is traced once for all its calls need not know where it was called.
    """
    for eqn in calls:
        summary = jex.source_info_util.summarize(eqn.source_info)
        if summary and not summary.startswith(_PACKAGE):
            return summary
        # A marked loss was made here: the user's line is the one that called it.
        frames = getattr(eqn.source_info.traceback, "frames", ())
        ours = [frame.file_name.startswith(_PACKAGE) for frame in frames]
        for i in range(1, len(ours)):
            if ours[i - 1] and not ours[i]:
                frame = frames[i]
                return f"{frame.file_name}:{frame.line_num} ({frame.function_name})"
    return ""


# -------------------------------------------------------------------------------------- recognition


def _is(eqn: Equation, *names: str) -> bool:
    """Whether an equation's primitive is JAX's own of one of these names."""
    given = eqn.primitive.name
    return given in names and _SHOWN.get(given, eqn.primitive) is eqn.primitive


def _as_scan(eqn: Equation) -> _Recognised | None:
    if not _is(eqn, "scan") or set(eqn.params) not in _SCAN:
        return None
    body, (constants, carries, length, _, _) = closed(eqn.params["jaxpr"]), loop(eqn)
    inner = [_shape(x) for x in body.jaxpr.invars], [_shape(x) for x in body.jaxpr.outvars]
    outer = [_shape(x) for x in eqn.invars], [_shape(x) for x in eqn.outvars]
    if [len(x) for x in inner] != [len(x) for x in outer]:
        return None
    scanned = constants + carries  # the number of the first
    slices = [(length, *(shape or ())) for shape in inner[0][scanned:]]
    stacks = [(length, *(shape or ())) for shape in inner[1][carries:]]
    if outer[0] != [*inner[0][:scanned], *slices] or outer[1] != [*inner[1][:carries], *stacks]:
        return None
    return _Recognised("scan", (body,))


def _as_while(eqn: Equation) -> _Recognised | None:
    if not _is(eqn, "while") or set(eqn.params) != _WHILE:
        return None
    return _Recognised(
        "while", (closed(eqn.params["cond_jaxpr"]), closed(eqn.params["body_jaxpr"]))
    )


def _as_cond(eqn: Equation) -> _Recognised | None:
    if not _is(eqn, "cond") or "branches" not in eqn.params or not set(eqn.params) <= _COND:
        return None
    bodies = tuple(map(closed, eqn.params["branches"]))
    if not all(_fits(eqn.invars[1:], eqn.outvars, body) for body in bodies):
        return None
    # A branch for each kind of device is not ours to choose.
    return _Recognised("cond" if eqn.params.get("branches_platforms") is None else "opaque", bodies)


def _as_remat(eqn: Equation) -> _Recognised | None:
    held = _upgraded(eqn, "RematTraced")
    if held is not None:
        body = closed(held.jaxpr)
    elif _is(eqn, "checkpoint", "remat", "remat2") and set(eqn.params) == _REMAT:
        body = closed(eqn.params["jaxpr"])
    else:
        return None
    return _Recognised("remat", (body,)) if _fits(eqn.invars, eqn.outvars, body) else None


def _with_rules(eqn: Equation) -> _Recognised | None:
    held = _upgraded(eqn, "CustomJVPTraced", "CustomVJPTraced")
    if held is not None:
        body = closed(held.traced.jaxpr)
    elif _is(eqn, *_WITH_RULES) and _WITH_RULES[eqn.primitive.name] in eqn.params:
        body = closed(eqn.params[_WITH_RULES[eqn.primitive.name]])
    else:
        return None
    if not _fits(eqn.invars, eqn.outvars, body):
        return _Recognised("opaque")
    # The derivative of a mark is known: what it holds is the mark alone.
    inside = body.jaxpr.eqns
    is_mark = len(inside) == 1 and _is_mark(inside[0])
    return _Recognised("call" if is_mark else "opaque", (body,))


def _as_call(eqn: Equation) -> _Recognised | None:
    if not _is(eqn, *_CALLS):
        return None
    held = [x for x in eqn.params.values() if is_program(x)]
    if len(held) != 1 or not _fits(eqn.invars, eqn.outvars, closed(held[0])):
        return None
    if declared(eqn) is not None:
        return _Recognised("opaque", (closed(held[0]),))
    return _Recognised("mark" if _is_mark(eqn) else "call", (closed(held[0]),))


def _is_mark(eqn: Equation) -> bool:
    return _is(eqn, "jit", "pjit") and str(eqn.params.get("name", "")).startswith(MARK_PREFIX)


_HOLDER = "call_hi_primitive"
# Classes of primitives that stand for others under upgrade flags of JAX 0.12, and keep programs and
# settings themselves; and the names of those others.
_UPGRADED = {
    "RematTraced": "remat2",
    "CustomJVPTraced": "custom_jvp_call",
    "CustomVJPTraced": "custom_vjp_call",
    "CheckpointName": "name",
}


def _upgraded(eqn: Equation, *names: str) -> Any:
    """The primitive that holds its program itself, if it is JAX's own of one of these classes.

    Its class is not public: what it has is known by name alone, so that it is `Any`.
    """
    held = eqn.params.get("_prim") if eqn.primitive.name == _HOLDER else None
    known = type(held).__name__ in (names or _UPGRADED)
    return held if known and type(held).__module__.partition(".")[0] == "jax" else None


def is_program(x: object) -> bool:
    """Whether a parameter of an equation is a program."""
    return isinstance(x, jex.core.Jaxpr | _CLOSED)


def _may_run(x: object) -> bool:
    if isinstance(x, tuple | list):
        return any(map(_may_run, x))
    return is_program(x)


def closed(jaxpr: Any) -> Program:
    """A program with the arrays that it closes over."""
    return jaxpr if isinstance(jaxpr, _CLOSED) else _CLOSED(jaxpr, ())


def _shape(x: Atom) -> tuple[int, ...] | None:
    return getattr(x.aval, "shape", None)


def _fits(inputs: Sequence[Atom], outputs: Sequence[Atom], body: Program) -> bool:
    """Whether a program takes and gives values of the shapes of some operands and outputs."""
    outer = [_shape(x) for x in inputs], [_shape(x) for x in outputs]
    inner = [_shape(x) for x in body.jaxpr.invars], [_shape(x) for x in body.jaxpr.outvars]
    return outer == inner
