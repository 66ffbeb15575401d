"""Register tiles of the convolutions' matrix products, written out for the host's vectors.

A row tile reads its right operand in place or packed; the dot tile keeps the lanes on the summed channels, for few outputs.
"""

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from .jit import jit
from .vector import _I64, _MANY, _ZERO, COLS, LANES, LINE, NARROW, ROWS, Emit

SHORT = 4 if _MANY else 2  # rows of the tile for what is left over
DOTS = 6 if _MANY else 3  # rows of the dot tile,
FEW = 4  # and its columns

_QUAD = ir.VectorType(ir.FloatType(), FEW)


def _rows_of(count: int, asking: bool) -> Any:
    """A tile of ``count`` rows of COLS sums; one that is ``asking`` has the cache bring what comes next."""

    @intrinsic
    def tile(
        typingctx: Any,
        rows: Any,
        stride: Any,
        taps: Any,
        depth: Any,
        panel: Any,
        step: Any,
        first: Any,
        out: Any,
        offset: Any,
        ahead: Any,
        pace: Any,
    ) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            rows, stride, taps, depth, panel, step, first, out, offset, ahead, pace = args
            e = Emit(builder)
            start = e.pair(first)
            for m in range(count):
                row = builder.add(e.load(e.plus(out, 8 * m), _I64), offset)
                for at in range(0, 4 * COLS, LINE):
                    e.ask(e.plus(row, at), write=True)

            def tap(t: Any, carry: list) -> list:
                table = builder.add(rows, builder.mul(t, stride))
                left = [e.load(e.plus(table, 8 * m), _I64) for m in range(count)]

                def body(k: Any, inner: list) -> list:
                    at = builder.mul(k, _I64(4))
                    panel, ahead, *sums = inner
                    if asking:
                        e.ask(ahead)
                        ahead = builder.add(ahead, pace)
                    return [builder.add(panel, step), ahead, *e.products([builder.add(a, at) for a in left], panel, sums)]

                return e.loop(depth, carry, body)

            sums = e.loop(taps, [panel, ahead, *(start * count)], tap)[2:]
            for m in range(count):
                row = builder.add(e.load(e.plus(out, 8 * m), _I64), offset)
                e.store(sums[2 * m], row)
                e.store(sums[2 * m + 1], e.plus(row, 4 * LANES))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 11), codegen

    return tile


_row_tile, _asking_tile, _short_tile = _rows_of(ROWS, False), _rows_of(ROWS, True), _rows_of(SHORT, False)


def _part(builder: Any, x: Any, y: Any, lanes: list[int]) -> Any:
    return builder.shuffle_vector(x, y, ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), lanes))


def _sums_of_four(builder: Any, four: list) -> Any:
    """The sums over the lanes of four vectors, as one vector of four."""
    lanes = LANES
    while lanes > FEW:
        half = lanes // 2
        four = [
            builder.fadd(_part(builder, v, v, list(range(half))), _part(builder, v, v, list(range(half, lanes)))) for v in four
        ]
        lanes = half
    a, b, c, d = four
    ab = builder.fadd(_part(builder, a, b, [0, 4, 1, 5]), _part(builder, a, b, [2, 6, 3, 7]))
    cd = builder.fadd(_part(builder, c, d, [0, 4, 1, 5]), _part(builder, c, d, [2, 6, 3, 7]))
    return builder.fadd(_part(builder, ab, cd, [0, 1, 4, 5]), _part(builder, ab, cd, [2, 3, 6, 7]))


@intrinsic
def _dot_tile(typingctx: Any, rows: Any, stride: Any, taps: Any, depth: Any, right: Any, out: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        rows, stride, taps, depth, right, out = args
        e = Emit(builder)
        width = builder.mul(depth, _I64(4))
        vectors = builder.udiv(depth, _I64(LANES))

        def tap(t: Any, carry: list) -> list:
            table = builder.add(rows, builder.mul(t, stride))
            left = [e.load(e.plus(table, 8 * m), _I64) for m in range(DOTS)]
            base = builder.add(right, builder.mul(builder.mul(t, _I64(FEW)), width))
            turned = [builder.add(base, builder.mul(width, _I64(n))) for n in range(FEW)]

            def body(k: Any, sums: list) -> list:
                at = builder.mul(k, _I64(4 * LANES))
                x = [e.load(builder.add(a, at)) for a in left]
                made = list(sums)
                for n in range(FEW):
                    y = e.load(builder.add(turned[n], at))
                    for m in range(DOTS):
                        made[m * FEW + n] = e.fma(x[m], y, sums[m * FEW + n])
                return made

            return e.loop(vectors, carry, body)

        sums = e.loop(taps, [_ZERO] * (DOTS * FEW), tap)
        for m in range(DOTS):
            to = builder.inttoptr(e.plus(out, 4 * FEW * m), _QUAD.as_pointer())
            builder.store(_sums_of_four(builder, sums[m * FEW : (m + 1) * FEW]), to).align = 4
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6), codegen


@intrinsic
def _pack_tile(typingctx: Any, rows: Any, offset: Any, count: Any, panel: Any, sums: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        rows, offset, count, panel, sums = args
        e = Emit(builder)

        def body(k: Any, carry: list) -> list:
            pair = e.pair(builder.add(e.load(builder.add(rows, builder.mul(k, _I64(8))), _I64), offset))
            to = builder.add(panel, builder.mul(k, _I64(4 * COLS)))
            e.store(pair[0], to)
            e.store(pair[1], e.plus(to, 4 * LANES))
            return [builder.fadd(s, v) for s, v in zip(carry, pair, strict=True)]

        for i, v in enumerate(e.loop(count, [_ZERO, _ZERO], body)):
            at = e.plus(sums, 4 * LANES * i)
            e.store(builder.fadd(e.load(at), v), at)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), codegen


def _columns_of(asking: bool) -> Any:
    """A tile of NARROW rows of COLS sums; one that is ``asking`` has the cache bring what comes next."""

    @intrinsic
    def tile(typingctx: Any, rows: Any, offset: Any, depth: Any, panel: Any, sums: Any, step: Any, ahead: Any, pace: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            rows, offset, depth, panel, sums, step, ahead, pace = args
            e = Emit(builder)

            def body(k: Any, carry: list) -> list:
                left = builder.add(e.load(builder.add(rows, builder.mul(k, _I64(8))), _I64), offset)
                if asking:
                    e.ask(builder.add(ahead, builder.mul(k, pace)))
                made = e.products([e.plus(left, 4 * m) for m in range(NARROW)], carry[0], carry[1:])
                return [e.plus(carry[0], 4 * COLS), *made]

            made = e.loop(depth, [panel, *([_ZERO] * (2 * NARROW))], body)[1:]
            for m in range(NARROW):
                row = builder.add(sums, builder.mul(step, _I64(m)))
                for v in (0, 1):
                    at = e.plus(row, 4 * LANES * v)
                    e.store(builder.fadd(e.load(at), made[2 * m + v]), at)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 8), codegen

    return tile


_column_tile, _asking_column_tile = _columns_of(False), _columns_of(True)


@intrinsic
def _line_tile(
    typingctx: Any,
    left: Any,
    pace: Any,
    line: Any,
    lines: Any,
    depth: Any,
    panel: Any,
    step: Any,
    first: Any,
    out: Any,
    apart: Any,
) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        left, pace, line, lines, depth, panel, step, first, out, apart = args
        e = Emit(builder)
        ahead = [builder.mul(pace, _I64(m)) for m in range(NARROW)]
        to = [builder.add(out, builder.mul(apart, _I64(m))) for m in range(NARROW)]
        for row in to:
            for at in range(0, 4 * COLS, LINE):
                e.ask(e.plus(row, at), write=True)

        def tap(t: Any, carry: list) -> list:
            from_line = builder.add(left, builder.mul(t, line))

            def body(k: Any, inner: list) -> list:
                at = builder.add(from_line, builder.mul(k, _I64(4)))
                return [builder.add(inner[0], step), *e.products([builder.add(at, a) for a in ahead], inner[0], inner[1:])]

            return e.loop(depth, carry, body)

        sums = e.loop(lines, [panel, *(e.pair(first) * NARROW)], tap)[1:]
        for m, row in enumerate(to):
            e.store(sums[2 * m], row)
            e.store(sums[2 * m + 1], e.plus(row, 4 * LANES))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 10), codegen


@intrinsic
def _turn_tile(typingctx: Any, source: Any, step: Any, panel: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source, step, panel = args
        e = Emit(builder)
        block = [e.load(builder.add(source, builder.mul(step, _I64(i)))) for i in range(LANES)]
        for i, v in enumerate(e.turned(block)):
            at = e.plus(panel, 4 * COLS * i)
            e.store(builder.fadd(e.load(at), v), at)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), codegen


@intrinsic
def _turned_sums(typingctx: Any, x: Any, count: Any, rows: Any, step: Any, sums: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x, count, rows, step, sums = args
        e = Emit(builder)

        def body(k: Any, carry: list) -> list:
            at = builder.mul(k, _I64(4 * LANES))
            source, factors, made = builder.add(rows, at), builder.add(x, at), list(carry)
            for v in (0, 1):
                square = [e.load(builder.add(source, builder.mul(step, _I64(LANES * v + i)))) for i in range(LANES)]
                for i, column in enumerate(e.turned(square)):
                    made[v] = e.fma(e.broadcast(e.plus(factors, 4 * i)), column, made[v])
            return made

        made = e.loop(count, e.pair(sums), body)
        e.store(made[0], sums)
        e.store(made[1], e.plus(sums, 4 * LANES))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), codegen


@intrinsic
def _copy_rows(typingctx: Any, rows: Any, count: Any, vectors: Any, to: Any, step: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        rows, count, vectors, to, step = args
        e = Emit(builder)

        def row(i: Any, carry: list) -> list:
            source = e.load(builder.add(rows, builder.mul(i, _I64(8))), _I64)

            def body(k: Any, inner: list) -> list:
                at = builder.mul(k, _I64(4 * LANES))
                e.store(e.load(builder.add(source, at)), builder.add(carry[0], at))
                return inner

            e.loop(vectors, [], body)
            return [builder.add(carry[0], step)]

        e.loop(count, [to], row)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), codegen


@jit
def row_tile(rows, stride, taps, depth, panel, step, first, out, offset):
    """out[m][offset:] = first + Σ_t Σ_k rows[t][m][k]·panel[t·depth + k] for ROWS rows of COLS sums.

    ``rows`` is a table of row addresses, ``stride`` bytes from tap to tap; row i of ``panel`` lies i·``step`` bytes after the
    first; ``first`` holds COLS floats; ``out`` is a table of ROWS addresses. ``taps`` and ``depth`` are at least 1.
    """
    _row_tile(rows, stride, taps, depth, panel, step, first, out, offset, panel, 0)


@jit
def asking_tile(rows, stride, taps, depth, panel, step, first, out, offset, ahead, pace):
    """:func:`row_tile` that asks for the memory from ``ahead`` on, ``pace`` bytes for each row of the panel."""
    _asking_tile(rows, stride, taps, depth, panel, step, first, out, offset, ahead, pace)


@jit
def short_tile(rows, stride, taps, depth, panel, step, first, out, offset):
    """:func:`row_tile` of SHORT rows: the same sums in the same order."""
    _short_tile(rows, stride, taps, depth, panel, step, first, out, offset, panel, 0)


@jit
def dot_tile(rows, stride, taps, depth, right, out):
    """out[m, n] = Σ_t Σ_k rows[t][m][k]·right[t, n, k] for DOTS rows, FEW columns; ``depth`` is a multiple of LANES."""
    _dot_tile(rows, stride, taps, depth, right, out)


@jit
def pack_tile(rows, offset, count, panel, sums):
    """panel[k] = rows[k][offset:] and sums += Σ_k panel[k], of ``count`` rows of COLS; ``rows`` is a table of addresses."""
    _pack_tile(rows, offset, count, panel, sums)


@jit
def column_tile(rows, offset, depth, panel, sums, step):
    """sums[m] += Σ_k rows[k][offset:][m]·panel[k] for NARROW rows of COLS sums, ``step`` bytes apart; ``rows`` is a table."""
    _column_tile(rows, offset, depth, panel, sums, step, panel, 0)


@jit
def asking_column_tile(rows, offset, depth, panel, sums, step, ahead, pace):
    """:func:`column_tile` that asks for the memory from ``ahead`` on, ``pace`` bytes for each row of the panel."""
    _asking_column_tile(rows, offset, depth, panel, sums, step, ahead, pace)


@jit
def line_tile(left, pace, line, lines, depth, panel, step, first, out, apart):
    """out[m] = first + Σ_t Σ_k left[t][m][k]·panel[t·depth + k] for NARROW rows of COLS sums, ``apart`` bytes from row to row.

    Row m begins m·``pace`` bytes after ``left``, run t of it t·``line`` bytes later; those of ``panel`` lie ``step`` bytes apart.
    """
    _line_tile(left, pace, line, lines, depth, panel, step, first, out, apart)


@jit
def turn_tile(source, step, panel):
    """panel[k, j] += source[j][k] for LANES rows of the source, ``step`` bytes apart, and LANES rows of a panel of COLS."""
    _turn_tile(source, step, panel)


@jit
def turned_sums(x, count, rows, step, sums):
    """sums[m] += Σ_k x[k]·rows[m][k], one k after the other, for COLS rows ``step`` bytes apart and ``count`` runs of LANES k."""
    _turned_sums(x, count, rows, step, sums)


@jit
def copy_rows(rows, count, width, to, step):
    """Copy ``count`` rows of ``width`` floats, rounded up to whole vectors; ``rows`` is a table of addresses."""
    _copy_rows(rows, count, (width + LANES - 1) // LANES, to, step)
