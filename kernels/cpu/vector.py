"""What plain Numba does not offer: bit casts, an exponential that vectorises, and LLVM code written out in vectors.

The host's vector width gives the sizes of the register tiles: ROWS x COLS or NARROW x COLS sums are kept in registers.
"""

import platform
from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba.core import config, types
from numba.extending import intrinsic

from .jit import jit

F = np.float32


def _features() -> dict[str, bool]:
    """What the machine can do that code is made for: the host, or the one that Numba's own settings name."""
    named, features = (getattr(config, k) for k in ("CPU_NAME", "CPU_FEATURES"))  # set when Numba reads its environment
    if features is not None:
        return {f[1:]: True for f in features.split(",") if f.startswith("+")}
    if named is not None:
        return {}
    try:
        return dict(binding.get_host_cpu_features())
    except RuntimeError:
        return {}


_HAS = _features()
_WIDE = bool(_HAS.get("avx512f"))
LANES = 16 if _WIDE else 8 if _HAS.get("avx") else 4
_MANY = _WIDE or platform.machine() in ("aarch64", "arm64")  # 32 vector registers, not 16
ROWS = 12 if _MANY else 6  # rows of the tile whose left operand is read by row
NARROW = 8 if _MANY else 4  # rows of the tile whose left operand is read by column
COLS = 2 * LANES
LINE = 64  # bytes that a cache holds together
FAR = 5 << 19  # bytes of operands and results for each worker; what is more lies beyond the caches of one core

_FLOAT, _I32, _I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_VEC = ir.VectorType(_FLOAT, LANES)
_LANES = ir.VectorType(_I32, LANES)
_ZERO = ir.Constant(_VEC, [0.0] * LANES)


def _constant(value: float) -> Any:
    return ir.Constant(_VEC, [float(F(value))] * LANES)


@intrinsic
def bits_of(typingctx: Any, x: Any) -> Any:
    """The 32 bits of a float32 as int32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], _I32)

    return types.int32(types.float32), codegen


@intrinsic
def float_of(typingctx: Any, x: Any) -> Any:
    """The float32 that has the 32 bits of an int32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], _FLOAT)

    return types.float32(types.int32), codegen


@jit(inline="always")
def exp(x):
    """e^x in float32, about 1e-7 relative; the argument is held in [-87, 88] (Cephes' polynomial)."""
    x = F(-87.0) if x < F(-87.0) else x
    x = F(88.0) if x > F(88.0) else x
    n = F(np.floor(x * F(1.44269504088896341) + F(0.5)))
    r = (x - n * F(0.693359375)) - n * F(-2.12194440e-4)
    p = F(1.9875691500e-4)
    p = p * r + F(1.3981999507e-3)
    p = p * r + F(8.3334519073e-3)
    p = p * r + F(4.1665795894e-2)
    p = p * r + F(1.6666665459e-1)
    p = p * r + F(5.0000001201e-1)
    return (p * (r * r) + r + F(1)) * float_of(np.int32(np.int32(n) + np.int32(127)) << np.int32(23))


@jit(inline="always")
def sigmoid(v):
    """1/(1 + e^−v) in float32."""
    return F(1) / (F(1) + exp(-v))


class Emit:
    """Loads, stores and multiply-adds of one vector, over a builder; addresses are int64."""

    def __init__(self, builder: Any) -> None:
        self.b = builder
        name = f"llvm.fmuladd.v{LANES}f32"
        known = builder.module.globals
        self._fma = known[name] if name in known else ir.Function(builder.module, ir.FunctionType(_VEC, [_VEC] * 3), name)

    def fma(self, x: Any, y: Any, z: Any) -> Any:
        return self.b.call(self._fma, [x, y, z])

    def add(self, x: Any, y: Any) -> Any:
        return self.b.fadd(x, y)

    def sub(self, x: Any, y: Any) -> Any:
        return self.b.fsub(x, y)

    def times(self, factor: float, x: Any) -> Any:
        return self.b.fmul(_constant(factor), x)

    def madd(self, factor: float, x: Any, y: Any) -> Any:
        """factor·x + y"""
        return self.fma(_constant(factor), x, y)

    def load(self, address: Any, kind: Any = _VEC) -> Any:
        value = self.b.load(self.b.inttoptr(address, kind.as_pointer()))
        value.align = 8 if kind is _I64 else 4
        return value

    def store(self, value: Any, address: Any) -> None:
        self.b.store(value, self.b.inttoptr(address, _VEC.as_pointer())).align = 4

    def ask(self, address: Any, write: bool = False) -> None:
        """Ask for the cache line at an address, to read or to write it; there need not be memory."""
        pointer = ir.IntType(8).as_pointer()
        name, known = "llvm.prefetch.p0", self.b.module.globals
        kind = ir.FunctionType(ir.VoidType(), [pointer, _I32, _I32, _I32])
        f = known[name] if name in known else ir.Function(self.b.module, kind, name)
        self.b.call(f, [self.b.inttoptr(address, pointer), _I32(int(write)), _I32(3), _I32(1)])

    def broadcast(self, address: Any) -> Any:
        undefined = ir.Constant(_VEC, ir.Undefined)
        one = self.b.insert_element(undefined, self.load(address, _FLOAT), _I32(0))
        return self.b.shuffle_vector(one, undefined, ir.Constant(_LANES, [0] * LANES))

    def plus(self, address: Any, offset: int) -> Any:
        return self.b.add(address, _I64(offset))

    def pair(self, address: Any) -> list:
        return [self.load(address), self.load(self.plus(address, 4 * LANES))]

    def loop(self, count: Any, carry: list, body: Any) -> list:
        """``for i in range(count): carry = body(i, carry)``, for count >= 1; returns the last carry."""
        before, inside = self.b.block, self.b.function.append_basic_block("loop")
        self.b.branch(inside)
        self.b.position_at_end(inside)
        i = self.b.phi(_I64)
        i.add_incoming(_I64(0), before)
        phis = [self.b.phi(c.type) for c in carry]
        for phi, c in zip(phis, carry, strict=True):
            phi.add_incoming(c, before)
        result = body(i, phis)
        after = self.b.add(i, _I64(1))
        last = self.b.block
        i.add_incoming(after, last)
        for phi, c in zip(phis, result, strict=True):
            phi.add_incoming(c, last)
        done = self.b.function.append_basic_block("done")
        self.b.cbranch(self.b.icmp_unsigned("<", after, count), inside, done)
        self.b.position_at_end(done)
        return result

    def products(self, left: list, right: Any, sums: list) -> list:
        """``sums[2m + v] += left[m] * right[v]``: one step of a tile; ``left`` holds addresses of single floats."""
        pair = self.pair(right)
        return [self.fma(x, pair[v], sums[2 * m + v]) for m, a in enumerate(left) for x in (self.broadcast(a),) for v in (0, 1)]

    def turned(self, rows: list) -> list:
        """The transpose of a square of LANES vectors."""
        rows, side = list(rows), 1
        while side < LANES:  # exchange the squares of this side that lie across the diagonal from each other
            low = [LANES + j - side if j & side else j for j in range(LANES)]
            high = [LANES + j if j & side else j + side for j in range(LANES)]
            for i in range(LANES):
                if not i & side:
                    a, b = rows[i], rows[i + side]
                    rows[i], rows[i + side] = (self.b.shuffle_vector(a, b, ir.Constant(_LANES, m)) for m in (low, high))
            side *= 2
        return rows


@intrinsic
def turn(typingctx: Any, at: Any, step: Any, to: Any, to_step: Any) -> Any:
    """The transpose of a square of LANES vectors, from rows ``step`` bytes apart to rows ``to_step`` bytes apart."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        at, step, to, to_step = args
        e = Emit(builder)
        rows = [e.load(builder.add(at, builder.mul(step, _I64(i)))) for i in range(LANES)]
        for i, row in enumerate(e.turned(rows)):
            e.store(row, builder.add(to, builder.mul(to_step, _I64(i))))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen
