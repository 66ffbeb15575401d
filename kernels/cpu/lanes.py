"""A vector of LANES float32 as a value of compiled code: loads, stores and arithmetic that need no vectoriser.

What a compiler must prove before it widens a loop (that no array overlaps another, that no index wraps) is said here outright,
and sums stay in registers from row to row. Each operation is rounded once, as in the scalar code; ``fastmath`` of the function
around it holds for vectors too. Places are given as the address of a float32 array (``x.ctypes.data``) and an index into it:
arrays themselves would be counted as references wherever a loop branches. Nothing is checked.
"""

import operator
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.datamodel import models, register_default
from numba.core.imputils import lower_builtin
from numba.core.typing import signature
from numba.core.typing.templates import ConcreteTemplate, infer_global
from numba.extending import intrinsic

from .jit import jit
from .vector import LANES, LINE, Emit, F

_I32, _FLOAT = ir.IntType(32), ir.FloatType()
_VEC, _INT_VEC, _MASK = (ir.VectorType(kind, LANES) for kind in (_FLOAT, _I32, ir.IntType(1)))
_BYTES = 4 * LANES


class Lanes(types.Type):
    """The type of such a vector."""

    def __init__(self) -> None:
        super().__init__(name=f"float32x{LANES}")


lanes = Lanes()


@register_default(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _VEC)


def _spread(builder: Any, x: Any, kind: Any = _VEC) -> Any:
    """All lanes x."""
    undefined = ir.Constant(kind, ir.Undefined)
    zeros = ir.Constant(ir.VectorType(_I32, LANES), [0] * LANES)
    return builder.shuffle_vector(builder.insert_element(undefined, x, _I32(0)), undefined, zeros)


def _operator(function: Any, emit: str) -> None:
    """``function`` of vectors, or of a vector and a float32."""
    kinds = ((lanes, lanes), (lanes, types.float32), (types.float32, lanes))

    class Template(ConcreteTemplate):
        cases = tuple(signature(lanes, *kind) for kind in kinds)

    infer_global(function)(Template)
    for kind in kinds:

        @lower_builtin(function, *kind)
        def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            a, b = (x if t is lanes else _spread(builder, x) for t, x in zip(sig.args, args, strict=True))
            return getattr(builder, emit)(a, b)


for _function, _emit in ((operator.add, "fadd"), (operator.sub, "fsub"), (operator.mul, "fmul"), (operator.truediv, "fdiv")):
    _operator(_function, _emit)


def _place(builder: Any, address: Any, index: Any, kind: Any = _VEC) -> Any:
    return builder.inttoptr(builder.add(address, builder.mul(index, ir.Constant(index.type, 4))), kind.as_pointer())


def _first(builder: Any, count: Any) -> Any:
    """The mask of the first ``count`` lanes."""
    limit = builder.trunc(count, _I32)
    return builder.icmp_signed("<", ir.Constant(_INT_VEC, list(range(LANES))), _spread(builder, limit, _INT_VEC))


def _masked(builder: Any, name: str, result: Any, kinds: list, args: list) -> Any:
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(result, kinds), f"llvm.masked.{name}.v{LANES}f32.p0"
    )
    return builder.call(function, args)


@intrinsic
def spread(typingctx: Any, x: Any) -> Any:
    """A vector of LANES times x."""
    return lanes(types.float32), lambda context, builder, sig, args: _spread(builder, args[0])


@intrinsic
def load(typingctx: Any, x: Any, j: Any) -> Any:
    """x[j : j + LANES]."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.load(_place(builder, *args), align=4)

    return lanes(types.intp, types.intp), codegen


@intrinsic
def load_first(typingctx: Any, x: Any, j: Any, count: Any) -> Any:
    """x[j : j + count], and zeros in the lanes after that; ``count`` may be larger than LANES."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kinds = [_VEC.as_pointer(), _I32, _MASK, _VEC]
        zeros = ir.Constant(_VEC, [0.0] * LANES)
        return _masked(builder, "load", _VEC, kinds, [_place(builder, *args[:2]), _I32(4), _first(builder, args[2]), zeros])

    return lanes(types.intp, types.intp, types.intp), codegen


@intrinsic
def load_over(typingctx: Any, x: Any, j: Any, count: Any, v: Any) -> Any:
    """As :func:`load_first`, with the lanes of v after the first ``count``."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kinds = [_VEC.as_pointer(), _I32, _MASK, _VEC]
        return _masked(builder, "load", _VEC, kinds, [_place(builder, *args[:2]), _I32(4), _first(builder, args[2]), args[3]])

    return lanes(types.intp, types.intp, types.intp, lanes), codegen


@intrinsic
def store(typingctx: Any, x: Any, j: Any, v: Any) -> Any:
    """x[j : j + LANES] = v."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        builder.store(args[2], _place(builder, *args[:2]), align=4)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, lanes), codegen


@intrinsic
def store_first(typingctx: Any, x: Any, j: Any, v: Any, count: Any) -> Any:
    """x[j : j + count] = v; ``count`` may be larger than LANES."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kinds = [_VEC, _VEC.as_pointer(), _I32, _MASK]
        at = _place(builder, *args[:2])
        _masked(builder, "store", ir.VoidType(), kinds, [args[2], at, _I32(4), _first(builder, args[3])])
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, lanes, types.intp), codegen


@intrinsic
def store_past(typingctx: Any, x: Any, j: Any, v: Any) -> Any:
    """x[j : j + LANES] = v past the caches: the line is not read first. x[j] must lie at a multiple of 4·LANES bytes."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        made = builder.store(args[2], _place(builder, *args[:2]), align=_BYTES)
        made.set_metadata("nontemporal", builder.module.add_metadata([_I32(1)]))
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, lanes), codegen


@intrinsic
def drain(typingctx: Any) -> Any:
    """What was written with :func:`store_past` is seen by the other threads from here on."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def held(typingctx: Any, v: Any, low: Any, high: Any) -> Any:
    """v between low and high; NaN stays."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        v, low, high = args
        v = builder.select(builder.fcmp_ordered("<", v, low), low, v)
        return builder.select(builder.fcmp_ordered(">", v, high), high, v)

    return lanes(lanes, lanes, lanes), codegen


@intrinsic
def select_below(typingctx: Any, a: Any, b: Any, v: Any, w: Any) -> Any:
    """The lanes of v where a < b, of w elsewhere; where a or b is NaN, those of w."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        a, b, v, w = args
        return builder.select(builder.fcmp_ordered("<", a, b), v, w)

    return lanes(lanes, lanes, lanes, lanes), codegen


@intrinsic
def with_lane(typingctx: Any, v: Any, lane: Any, w: Any) -> Any:
    """v with the one lane of w; v itself where there is no such lane."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        v, lane, w = args
        places = ir.Constant(_INT_VEC, list(range(LANES)))
        return builder.select(builder.icmp_signed("==", places, _spread(builder, builder.trunc(lane, _I32), _INT_VEC)), w, v)

    return lanes(lanes, types.intp, lanes), codegen


def _double(builder: Any, v: Any) -> Any:
    return builder.fpext(v, ir.VectorType(ir.DoubleType(), LANES))


def _halved(builder: Any, v: Any, combine: Any) -> Any:
    """One number from all lanes: lane i with lane i + half, then by halves of that."""
    count = LANES
    while count > 1:
        count //= 2
        low, high = (ir.Constant(ir.VectorType(_I32, count), list(range(at, at + count))) for at in (0, count))
        undefined = ir.Constant(v.type, ir.Undefined)
        v = combine(builder.shuffle_vector(v, undefined, low), builder.shuffle_vector(v, undefined, high))
    return builder.extract_element(v, _I32(0))


@intrinsic
def total(typingctx: Any, v: Any) -> Any:
    """The sum of all lanes, in float64, in a fixed order."""
    return types.float64(lanes), lambda context, builder, sig, args: _halved(builder, _double(builder, args[0]), builder.fadd)


@intrinsic
def total_of_both(typingctx: Any, v: Any, w: Any) -> Any:
    """The sum of all lanes of v and w, in float64, in a fixed order."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _halved(builder, builder.fadd(*(_double(builder, a) for a in args)), builder.fadd)

    return types.float64(lanes, lanes), codegen


@intrinsic
def largest(typingctx: Any, v: Any) -> Any:
    """The largest of all lanes; a NaN may be passed over."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _halved(builder, args[0], lambda a, b: builder.select(builder.fcmp_ordered("<", a, b), b, a))

    return types.float32(lanes), codegen


@intrinsic
def prefetch(typingctx: Any, x: Any, j: Any) -> Any:
    """Begin to bring x[j] into the first-level cache."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        Emit(builder).ask(builder.add(args[0], builder.mul(args[1], ir.Constant(args[1].type, 4))))
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), codegen


@jit
def call_ahead(x, start, end):
    """Begin to bring x[start:end], a line after the other."""
    for j in range(start, end, LINE // 4):
        prefetch(x, j)


@jit
def misplaced(x, j):
    """How many places after x[j] is the next one where :func:`store_past` may write."""
    return -(x // 4 + j) % LANES


@intrinsic
def fma(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
    """a·b + c, rounded once where the machine can, else twice; a and b may be float32 numbers."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        values = [x if t is lanes else _spread(builder, x) for t, x in zip(sig.args, args, strict=True)]
        kind = ir.FunctionType(_VEC, [_VEC] * 3)
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.fmuladd.v{LANES}f32"), values)

    return lanes(a, b, c), codegen


@intrinsic
def _scaled(typingctx: Any, p: Any, t: Any) -> Any:
    """p·2^n for t = 1.5·2²³ + n, whose low bits hold n: n is added to the exponent of p."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        p, t = (builder.bitcast(x, _INT_VEC) for x in args)
        return builder.bitcast(builder.add(p, builder.shl(t, ir.Constant(_INT_VEC, [23] * LANES))), _VEC)

    return lanes(lanes, lanes), codegen


@intrinsic
def _power(typingctx: Any, t: Any) -> Any:
    """2^n of t = 1.5·2²³ + n, whose low bits hold n."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        bias, place = (ir.Constant(_INT_VEC, [k] * LANES) for k in (127, 23))
        return builder.bitcast(builder.shl(builder.add(builder.bitcast(args[0], _INT_VEC), bias), place), _VEC)

    return lanes(lanes), codegen


@jit(forceinline=True)
def exp(x):
    """e^x, about 1e-7 relative; the argument is held in [-87, 88] (Cephes' polynomial)."""
    x = held(x, spread(F(-87)), spread(F(88)))
    t = fma(x, F(1.44269504088896341), spread(F(12582912)))
    n = t - F(12582912)
    r = fma(n, F(2.12194440e-4), fma(n, F(-0.693359375), x))
    p = fma(r, F(1.9875691500e-4), spread(F(1.3981999507e-3)))
    p = fma(p, r, spread(F(8.3334519073e-3)))
    p = fma(p, r, spread(F(4.1665795894e-2)))
    p = fma(p, r, spread(F(1.6666665459e-1)))
    p = fma(p, r, spread(F(5.0000001201e-1)))
    return (fma(p, r * r, r) + F(1)) * _power(t)


@jit(forceinline=True)
def exp_or_0(x):
    """As :func:`exp`, but 0 below -87, where e^x is next to the smallest float32."""
    return select_below(x, spread(F(-87)), spread(F(0)), exp(x))


@jit(forceinline=True)
def sigmoid(v):
    """1/(1 + e^−v), about 1e-7 of 1; v is held in [-87, 87].

    e^−v = 2^(n + r) with n = round(−v·log₂e), and 2^r by the polynomial that is nearest on [-½, ½], 2e-9 relative.
    """
    v = held(v, spread(F(-87)), spread(F(87)))
    t = fma(v, F(-1.44269504088896341), spread(F(12582912)))
    r = fma(v, F(-1.44269504088896341), F(12582912) - t)
    p = fma(r, F(1.5352138e-4), spread(F(1.33988426e-3)))
    p = fma(p, r, spread(F(9.61844183e-3)))
    p = fma(p, r, spread(F(5.55033258e-2)))
    p = fma(p, r, spread(F(0.240226479)))
    p = fma(p, r, spread(F(0.693147203)))
    p = fma(p, r, spread(F(1)))
    return spread(F(1)) / (_scaled(p, t) + F(1))
