"""What attention does with whole vectors: tiles of products that end in an exponential or a slope, and transposes cut to size.

A tile keeps NARROW x COLS sums in vector registers. Its lanes are COLS queries (or keys), so that the softmax runs down the rows
of a matrix of keys by queries, without a step across lanes. All arguments are addresses, bytes or counts.
"""

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from .vector import COLS, LANES, NARROW, Emit, F

_I1, _I32, _I64, _FLOAT = ir.IntType(1), ir.IntType(32), ir.IntType(64), ir.FloatType()
_VEC, _INTS, _MASK = (ir.VectorType(t, LANES) for t in (_FLOAT, _I32, _I1))
_LN2, _LOG2E = 0.6931471805599453, 1.4426950408889634
_ROUND = 1.5 * 2.0**23 + 127  # added to x, its last bits are those of round(x) + 127, the exponent of 2^round(x)
_POWER = (0.0013264727, 0.009671513, 0.055507336, 0.24022242, 0.693147, 1.0)  # of 2^f on [-1/2, 1/2], 9e-8 relative
_LOG = (0.32059890, 0.41219858, 0.57707802, 0.96179670, 2.88539008)  # 2·atanh(s)/(s·log 2) in s²
_ROOT = 0x3F3504F3  # the bits of √½: a logarithm is taken of a mantissa between it and √2


def _all(value: float) -> Any:
    return ir.Constant(_VEC, [float(F(value))] * LANES)


def _ints(value: int) -> Any:
    return ir.Constant(_INTS, [value] * LANES)


class _Emit(Emit):
    def larger(self, a: Any, b: Any) -> Any:
        """The larger of two; ``b`` where one is not a number."""
        return self.b.select(self.b.fcmp_ordered(">", a, b), a, b)

    def exp(self, x: Any, bounded: bool) -> Any:
        """e^x for x below 88, and where it is ``bounded``, above -87 too; a NaN stays one."""
        x = self.times(_LOG2E, x)
        if not bounded:
            x = self.larger(_all(-126.0), x)
        shifted = self.add(x, _all(_ROUND))
        f = self.sub(x, self.sub(shifted, _all(_ROUND)))
        return self.b.fmul(self.horner(_POWER, f), self.b.bitcast(self.b.shl(self.b.bitcast(shifted, _INTS), _ints(23)), _VEC))

    def log2(self, x: Any) -> Any:
        """log2 of x > 0 that is not subnormal; a NaN stays one."""
        bits = self.b.sub(self.b.bitcast(x, _INTS), _ints(_ROOT))
        exponent = self.b.sitofp(self.b.ashr(bits, _ints(23)), _VEC)
        m = self.b.bitcast(self.b.add(self.b.and_(bits, _ints(0x7FFFFF)), _ints(_ROOT)), _VEC)
        s = self.b.fdiv(self.sub(m, _all(1.0)), self.add(m, _all(1.0)))
        return self.add(self.fma(s, self.horner(_LOG, self.b.fmul(s, s)), exponent), self.sub(x, x))

    def horner(self, coefficients: tuple, x: Any) -> Any:
        p = _all(coefficients[0])
        for c in coefficients[1:]:
            p = self.fma(p, x, _all(c))
        return p

    def size(self, x: Any) -> Any:
        return self.b.bitcast(self.b.and_(self.b.bitcast(x, _INTS), _ints(0x7FFFFFFF)), _VEC)

    def tree(self, f: Any, values: list) -> Any:
        while len(values) > 1:
            values = [f(a, b) for a, b in zip(values[::2], values[1::2], strict=True)]
        return values[0]

    def row_products(self, rows: Any, step: Any, depth: Any, panel: Any) -> list:
        """Σ_k rows[m][k]·panel[k] for NARROW rows ``step`` bytes apart, as 2·NARROW vectors."""
        left = [rows]
        for _ in range(NARROW - 1):
            left.append(self.b.add(left[-1], step))

        def body(k: Any, carry: list) -> list:
            at = self.b.mul(k, _I64(4))
            sums = self.products([self.b.add(a, at) for a in left], carry[0], carry[1:])
            return [self.plus(carry[0], 4 * COLS), *sums]

        return self.loop(depth, [panel, *[_all(0.0)] * (2 * NARROW)], body)[1:]

    def store_rows(self, values: list, to: Any) -> None:
        for i, value in enumerate(values):
            self.store(value, self.plus(to, 4 * LANES * i))

    def first(self, count: Any) -> Any:
        """The mask of the first ``count`` lanes."""
        undefined = ir.Constant(_INTS, ir.Undefined)
        one = self.b.insert_element(undefined, self.b.trunc(count, _I32), _I32(0))
        every = self.b.shuffle_vector(one, undefined, _ints(0))
        return self.b.icmp_signed("<", ir.Constant(_INTS, list(range(LANES))), every)

    def _known(self, name: str, result: Any, args: list) -> Any:
        known = self.b.module.globals
        return known[name] if name in known else ir.Function(self.b.module, ir.FunctionType(result, args), name)

    def load_where(self, mask: Any, address: Any) -> Any:
        """The floats under the mask, and zeros; others are not read."""
        at = self.b.inttoptr(address, _VEC.as_pointer())
        f = self._known(f"llvm.masked.load.v{LANES}f32.p0", _VEC, [at.type, _I32, _MASK, _VEC])
        return self.b.call(f, [at, _I32(4), mask, _all(0.0)])

    def store_where(self, mask: Any, value: Any, address: Any) -> None:
        at = self.b.inttoptr(address, _VEC.as_pointer())
        f = self._known(f"llvm.masked.store.v{LANES}f32.p0", ir.VoidType(), [_VEC, at.type, _I32, _MASK])
        self.b.call(f, [value, at, _I32(4), mask])

    def row(self, at: Any, step: Any, i: int, count: Any) -> Any:
        """The address of row ``i``, or of the last one of ``count``."""
        last = self.b.sub(count, _I64(1))
        return self.b.add(at, self.b.mul(step, self.b.select(self.b.icmp_signed("<", last, _I64(i)), last, _I64(i))))


def _score_tile(bounded: bool) -> Any:
    @intrinsic
    def tile(typingctx: Any, rows: Any, step: Any, depth: Any, panel: Any, shift: Any, to: Any, tops: Any, sums: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            rows, step, depth, panel, shift, to, tops, sums = args
            e = _Emit(builder)
            scores = e.row_products(rows, step, depth, panel)
            if not bounded:
                shifts = e.pair(shift)
                for v, old in enumerate(e.pair(tops)):
                    top = e.tree(e.larger, [e.larger(s, old) for s in scores[v::2]])
                    e.store(top, e.plus(tops, 4 * LANES * v))
                scores = [e.sub(s, shifts[i % 2]) for i, s in enumerate(scores)]
            made = [e.exp(s, bounded) for s in scores]
            e.store_rows(made, to)
            for v, old in enumerate(e.pair(sums)):
                e.store(e.add(old, e.tree(e.add, made[v::2])), e.plus(sums, 4 * LANES * v))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 8), codegen

    return tile


def _weight_tile(bounded: bool) -> Any:
    @intrinsic
    def tile(typingctx: Any, rows: Any, step: Any, depth: Any, panel: Any, shift: Any, to: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            rows, step, depth, panel, shift, to = args
            e = _Emit(builder)
            scores = e.row_products(rows, step, depth, panel)
            shifts = e.pair(shift)
            e.store_rows([e.exp(e.sub(s, shifts[i % 2]), bounded) for i, s in enumerate(scores)], to)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 6), codegen

    return tile


# With s[m] = Σ_k rows[m][k]·panel[k]: to = e^(s − shift); tops = max(tops, s) and sums += the column sums of ``to``.
# Where s is bounded, its shift is 0 and nobody asks for its largest.
score_tile, bounded_score_tile = _score_tile(False), _score_tile(True)
# to = e^(s − shift); bounded: s − shift is above -87
weight_tile, bounded_weight_tile = _weight_tile(False), _weight_tile(True)


@intrinsic
def slope_tile(typingctx: Any, rows: Any, step: Any, depth: Any, panel: Any, mean: Any, weights: Any, to: Any) -> Any:
    """to = weights·(s − mean) with s[m] = Σ_k rows[m][k]·panel[k]."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        rows, step, depth, panel, mean, weights, to = args
        e = _Emit(builder)
        slopes = e.row_products(rows, step, depth, panel)
        means = e.pair(mean)
        by = [e.load(e.plus(weights, 4 * LANES * i)) for i in range(2 * NARROW)]
        e.store_rows([builder.fmul(by[i], e.sub(s, means[i % 2])) for i, s in enumerate(slopes)], to)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 7), codegen


@intrinsic
def sum_tile(typingctx: Any, rows: Any, step: Any, count: Any, panel: Any, sums: Any) -> Any:
    """sums[m] += Σ_k rows[k][m]·panel[k] for NARROW columns of ``count`` rows ``step`` bytes apart."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        rows, step, count, panel, sums = args
        e = _Emit(builder)

        def body(_: Any, carry: list) -> list:
            made = e.products([e.plus(carry[0], 4 * m) for m in range(NARROW)], carry[1], carry[2:])
            return [builder.add(carry[0], step), e.plus(carry[1], 4 * COLS), *made]

        made = e.loop(count, [rows, panel, *[_all(0.0)] * (2 * NARROW)], body)[2:]
        old = [e.load(e.plus(sums, 4 * LANES * i)) for i in range(2 * NARROW)]
        e.store_rows([e.add(a, b) for a, b in zip(old, made, strict=True)], sums)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), codegen


@intrinsic
def turn_part(typingctx: Any, at: Any, step: Any, rows: Any, cols: Any, factors: Any, to: Any, to_step: Any, width: Any) -> Any:
    """The transpose of rows x cols floats (LANES at most of each), column j times factors[j], in rows of ``width`` floats.

    What lies behind the ``rows`` is the last row again.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        at, step, rows, cols, factors, to, to_step, width = args
        e = _Emit(builder)
        mask, wide = e.first(cols), e.first(width)
        by = e.load_where(mask, factors)
        source = [builder.fmul(by, e.load_where(mask, e.row(at, step, i, rows))) for i in range(LANES)]
        for i, row in reversed(list(enumerate(e.turned(source)))):  # the row that is meant comes last to its place
            e.store_where(wide, row, e.row(to, to_step, i, cols))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 8), codegen


@intrinsic
def copy_rows(typingctx: Any, at: Any, step: Any, count: Any, cols: Any, to: Any, to_step: Any, width: Any) -> Any:
    """Copy ``cols`` floats of each of ``count`` rows to ``width`` floats, zeros behind; LANES at most of either."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        at, step, count, cols, to, to_step, width = args
        e = _Emit(builder)
        mask, wide = e.first(cols), e.first(width)

        def body(_: Any, carry: list) -> list:
            e.store_where(wide, e.load_where(mask, carry[0]), carry[1])
            return [builder.add(carry[0], step), builder.add(carry[1], to_step)]

        e.loop(count, [at, to], body)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 7), codegen


@intrinsic
def row_dots(typingctx: Any, a: Any, b: Any, step: Any, rows: Any, depth: Any, to: Any) -> Any:
    """to[i] = Σ_k a[i][k]·b[i][k] for LANES rows of ``depth`` floats; behind the ``rows``, the last one again."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        a, b, step, rows, depth, to = args
        e = _Emit(builder)
        places = [[e.row(x, step, i, rows) for i in range(LANES)] for x in (a, b)]

        def body(k: Any, carry: list) -> list:
            at = builder.mul(k, _I64(LANES))
            mask, by = e.first(builder.sub(depth, at)), builder.mul(at, _I64(4))
            left, right = ([e.load_where(mask, builder.add(p, by)) for p in x] for x in places)
            return [e.fma(x, y, z) for x, y, z in zip(left, right, carry, strict=True)]

        count = builder.udiv(builder.add(depth, _I64(LANES - 1)), _I64(LANES))
        e.store(e.tree(e.add, e.turned(e.loop(count, [_all(0.0)] * LANES, body))), to)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6), codegen


@intrinsic
def largest_sizes(typingctx: Any, rows: Any, step: Any, count: Any, cols: Any, to: Any) -> Any:
    """to[j] = max_i |rows[i][j]| for LANES columns at most."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        rows, step, count, cols, to = args
        e = _Emit(builder)
        mask = e.first(cols)

        def body(_: Any, carry: list) -> list:
            return [builder.add(carry[0], step), e.larger(e.size(e.load_where(mask, carry[0])), carry[1])]

        e.store_where(mask, e.loop(count, [rows, _all(0.0)], body)[1], to)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), codegen


@intrinsic
def within(typingctx: Any, sizes: Any, depth: Any, panel: Any, limit: Any) -> Any:
    """Whether Σ_k sizes[k]·|panel[k]| is at most ``limit`` in each of COLS lanes."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        sizes, depth, panel, limit = args
        e = _Emit(builder)

        def body(_: Any, carry: list) -> list:
            by = e.broadcast(carry[0])
            made = [e.fma(by, e.size(x), s) for x, s in zip(e.pair(carry[1]), carry[2:], strict=True)]
            return [e.plus(carry[0], 4), e.plus(carry[1], 4 * COLS), *made]

        made = e.loop(depth, [sizes, panel, _all(0.0), _all(0.0)], body)[2:]
        undefined = ir.Constant(_VEC, ir.Undefined)
        every = builder.shuffle_vector(builder.insert_element(undefined, limit, _I32(0)), undefined, _ints(0))
        beyond = builder.or_(*(builder.fcmp_unordered(">", s, every) for s in made))
        bits = ir.IntType(LANES)
        return builder.icmp_unsigned("==", builder.bitcast(beyond, bits), bits(0))

    return types.boolean(*[types.int64] * 3, types.float32), codegen


@intrinsic
def finish(typingctx: Any, shift: Any, total: Any, lse: Any, count: Any) -> Any:
    """The first ``count`` of lse = shift + log(total), and total = 1/total; COLS of each."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        shift, total, lse, count = args
        e = _Emit(builder)
        for v, (by, sums) in enumerate(zip(e.pair(shift), e.pair(total), strict=True)):
            made = e.add(by, e.times(_LN2, e.log2(sums)))
            e.store_where(e.first(builder.sub(count, _I64(LANES * v))), made, e.plus(lse, 4 * LANES * v))
            e.store(builder.fdiv(_all(1.0), sums), e.plus(total, 4 * LANES * v))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen
