"""The transforms of Winograd's F(4×4, 3×3), written out for one vector of channels: tiles into the 36 products' space and back.

    y = Aᵀ[(G w Gᵀ) ⊙ (Bᵀ d B)]A         d 6×6 of the source, w 3×3, y 4×4
    dw = Gᵀ[(Bᵀ d B) ⊙ (A dy Aᵀ)]G       Σ over all tiles

Source: Lavin & Gray 2016, section 4.2 and its appendix.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from .vector import Emit

TILE, SPACE = 4, 6  # sides of a tile of results and of its products
POINTS = SPACE * SPACE
_I64 = ir.IntType(64)
Line = list[Any]
Transform = Callable[[Emit, Line], Line]


def _source(e: Emit, d: Line) -> Line:
    """Bᵀd: six of the source to six products."""
    a, b = e.madd(-4, d[2], d[4]), e.madd(-4, d[1], d[3])
    c, f = e.sub(d[4], d[2]), e.sub(d[3], d[1])
    first, last = e.madd(4, d[0], e.madd(-5, d[2], d[4])), e.madd(4, d[1], e.madd(-5, d[3], d[5]))
    return [first, e.add(a, b), e.sub(a, b), e.madd(2, f, c), e.madd(-2, f, c), last]


def _result(e: Emit, m: Line) -> Line:
    """Aᵀm: six products to four results."""
    s, d, p, q = e.add(m[1], m[2]), e.sub(m[1], m[2]), e.add(m[3], m[4]), e.sub(m[3], m[4])
    return [e.add(m[0], e.add(s, p)), e.madd(2, q, d), e.madd(4, p, s), e.add(m[5], e.madd(8, q, d))]


def _mark(e: Emit, y: Line) -> Line:
    """A dy: the transpose of :func:`_result`."""
    t, u = e.add(y[0], y[2]), e.add(y[1], y[3])
    t2, u2 = e.madd(4, y[2], y[0]), e.times(2, e.madd(4, y[3], y[1]))
    return [y[0], e.add(t, u), e.sub(t, u), e.add(t2, u2), e.sub(t2, u2), y[3]]


def _taps(e: Emit, w: Line) -> Line:
    """G w: three taps to six factors."""
    a, b = e.times(-1 / 6, e.add(w[0], w[2])), e.times(1 / 6, e.madd(0.25, w[0], w[2]))
    inner = [e.madd(c, w[1], v) for c, v in ((-1 / 6, a), (1 / 6, a), (1 / 12, b), (-1 / 12, b))]
    return [e.times(0.25, w[0]), *inner, w[2]]


def _gradient(e: Emit, u: Line) -> Line:
    """Gᵀu: the transpose of :func:`_taps`."""
    s, d, p, q = e.add(u[1], u[2]), e.sub(u[2], u[1]), e.add(u[3], u[4]), e.sub(u[3], u[4])
    third = e.times(-1 / 6, s)
    return [
        e.madd(0.25, u[0], e.madd(1 / 24, p, third)),
        e.madd(1 / 12, q, e.times(1 / 6, d)),
        e.add(u[5], e.madd(1 / 6, p, third)),
    ]


def _square(e: Emit, transform: Transform, rows: list[Line]) -> list[Line]:
    """T·D·Tᵀ of a square of vectors."""
    columns = [transform(e, [row[c] for row in rows]) for c in range(len(rows))]
    return [transform(e, [column[i] for column in columns]) for i in range(len(columns[0]))]


def _read(transform: Transform, side: int) -> Any:
    """An intrinsic (image, row, col, height, width, row_bytes, col_bytes, nothing, to, step): a square to POINTS vectors.

    The square of ``side`` places begins at (row, col) of an image of height × width places; places outside are read at
    ``nothing``, where zeros are. Vector i goes to ``to`` + i·``step``.
    """

    @intrinsic
    def f(
        typingctx: Any, image: Any, row: Any, col: Any, height: Any, width: Any, row_bytes: Any, col_bytes: Any, nothing: Any,
        to: Any, step: Any,
    ) -> Any:  # fmt: skip
        def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
            image, row, col, height, width, row_bytes, col_bytes, nothing, to, step = args
            e = Emit(b)
            rows, cols = ([b.add(at, _I64(i)) for i in range(side)] for at in (row, col))
            high = [b.icmp_unsigned("<", r, height) for r in rows]  # a negative number is a large unsigned one
            wide = [b.icmp_unsigned("<", c, width) for c in cols]
            starts = [b.add(image, b.mul(r, row_bytes)) for r in rows]
            ahead = [b.mul(c, col_bytes) for c in cols]

            def at(i: int, j: int) -> Any:
                return e.load(b.select(b.and_(high[i], wide[j]), b.add(starts[i], ahead[j]), nothing))

            made = _square(e, transform, [[at(i, j) for j in range(side)] for i in range(side)])
            for i, v in enumerate(v for line in made for v in line):
                e.store(v, b.add(to, b.mul(step, _I64(i))))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 10), codegen

    return f


def _write(transform: Transform, added: bool) -> Any:
    """An intrinsic (products, step, image, row, col, height, width, row_bytes, col_bytes, nowhere, first[, other, nothing]).

    A tile of results from POINTS vectors, plus the vector at ``first`` and, if ``added``, plus the same tile of the image
    ``other``; places outside of the image are written to ``nowhere`` and read at ``nothing``.
    """

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        products, step, image, row, col, height, width, row_bytes, col_bytes, nowhere, first, *more = args
        e = Emit(b)
        vectors = [e.load(b.add(products, b.mul(step, _I64(i)))) for i in range(POINTS)]
        made = _square(e, transform, [vectors[SPACE * i : SPACE * (i + 1)] for i in range(SPACE)])
        plus = e.load(first)
        for i, line in enumerate(made):
            r = b.add(row, _I64(i))
            high, start = b.icmp_unsigned("<", r, height), b.mul(r, row_bytes)
            for j, v in enumerate(line):
                c = b.add(col, _I64(j))
                inside, at = b.and_(high, b.icmp_unsigned("<", c, width)), b.add(start, b.mul(c, col_bytes))
                v = e.add(v, plus)
                if added:
                    other, nothing = more
                    v = e.add(v, e.load(b.select(inside, b.add(other, at), nothing)))
                e.store(v, b.select(inside, b.add(image, at), nowhere))
        return context.get_dummy_value()

    if added:

        @intrinsic
        def with_other(
            typingctx: Any, products: Any, step: Any, image: Any, row: Any, col: Any, height: Any, width: Any, row_bytes: Any,
            col_bytes: Any, nowhere: Any, first: Any, other: Any, nothing: Any,
        ) -> Any:  # fmt: skip
            return types.void(*[types.int64] * 13), codegen

        return with_other

    @intrinsic
    def alone(
        typingctx: Any, products: Any, step: Any, image: Any, row: Any, col: Any, height: Any, width: Any, row_bytes: Any,
        col_bytes: Any, nowhere: Any, first: Any,
    ) -> Any:  # fmt: skip
        return types.void(*[types.int64] * 11), codegen

    return alone


def _whole(transform: Transform, side: int, flipped: bool = False) -> Any:
    """An intrinsic (at, step, to, to_step): a ``side``-square of vectors ``step`` bytes apart to its transform."""

    @intrinsic
    def f(typingctx: Any, at: Any, step: Any, to: Any, to_step: Any) -> Any:
        def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
            at, step, to, to_step = args
            e = Emit(b)
            vectors = [e.load(b.add(at, b.mul(step, _I64(i)))) for i in range(side * side)]
            vectors = vectors[::-1] if flipped else vectors
            made = _square(e, transform, [vectors[side * i : side * (i + 1)] for i in range(side)])
            for i, v in enumerate(v for line in made for v in line):
                e.store(v, b.add(to, b.mul(to_step, _I64(i))))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 4), codegen

    return f


read_source = _read(_source, SPACE)
read_mark = _read(_mark, TILE)
write_result = _write(_result, False)
add_result = _write(_result, True)
transform_taps = _whole(_taps, 3)
transform_flipped = _whole(_taps, 3, flipped=True)
transform_gradient = _whole(_gradient, SPACE)
