"""The transforms of Winograd's F(4×4, 3×3), written out for one vector of channels: tiles into the products' space and back.

    y = Aᵀ[(G w Gᵀ) ⊙ (Bᵀ d B)]A         d 6×6 of the source, w 3×3, y 4×4
    dw = Gᵀ[(Bᵀ d B) ⊙ (A dy Aᵀ)]G       Σ over all tiles

The rows of Bᵀ, G and A belong to the points 0, 1, −1, 2, −2, ∞ at which polynomials are multiplied. An image that is doubled by
nearest neighbour first has the factor 1 + z along each axis, so the products at −1 vanish, and those of its gradient are not
asked for: 25 of 36 are left. Source: Lavin & Gray 2016, section 4.2 and its appendix.
"""

from collections.abc import Callable
from math import isqrt
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from .vector import LINE, Emit

TILE = 4  # side of a tile of results
POINTS, FEWER = 36, 25  # products of a tile; where the image is doubled first
_ABSENT = 2  # the point that is left out there
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


def _doubled(e: Emit, d: Line) -> Line:
    """Bᵀ(d0, d1, d1, d2, d2, d3): four of an image to the five products of the doubled one."""
    a = e.sub(d[2], d[1])
    first, last = e.madd(4, d[0], e.madd(-5, d[1], d[2])), e.madd(4, d[1], e.madd(-5, d[2], d[3]))
    return [first, e.times(2, e.madd(-4, d[1], d[2])), e.times(3, a), e.sub(d[1], d[2]), last]


def _few_results(e: Emit, m: Line) -> Line:
    """Aᵀm of the products of a doubled image."""
    one, p, q = m[1], e.add(m[2], m[3]), e.sub(m[2], m[3])
    return [e.add(m[0], e.add(one, p)), e.madd(2, q, one), e.madd(4, p, one), e.add(m[4], e.madd(8, q, one))]


def _halved(e: Emit, m: Line) -> Line:
    """Aᵀm with neighbours added up: five products of the gradient of a doubled image to two places of the image itself."""
    one = e.times(2, m[1])
    return [e.add(e.madd(3, m[2], e.sub(one, m[3])), m[0]), e.madd(12, m[2], e.madd(-4, m[3], e.add(one, m[4])))]


def _fewer(transform: Transform) -> Transform:
    """``transform`` without the point that is left out."""

    def f(e: Emit, line: Line) -> Line:
        return [v for i, v in enumerate(transform(e, line)) if i != _ABSENT]

    return f


def _few_gradients(e: Emit, u: Line) -> Line:
    """Gᵀu where the product that is left out is 0."""
    p, q = e.add(u[2], u[3]), e.sub(u[2], u[3])
    third = e.times(-1 / 6, u[1])
    return [
        e.madd(0.25, u[0], e.madd(1 / 24, p, third)),
        e.madd(1 / 12, q, third),
        e.add(u[4], e.madd(1 / 6, p, third)),
    ]


def _square(e: Emit, transform: Transform, vectors: Line) -> Line:
    """T·D·Tᵀ of a square of vectors, row after row."""
    side = isqrt(len(vectors))
    columns = [transform(e, vectors[c::side]) for c in range(side)]
    return [v for i in range(len(columns[0])) for v in transform(e, [column[i] for column in columns])]


def _read(transform: Transform, side: int) -> Any:
    """An intrinsic (image, row, col, height, width, row_bytes, col_bytes, nothing, to, step): a square to its transform.

    The square of ``side`` places begins at (row, col) of an image of height × width places; places outside are read at
    ``nothing``, where zeros are. Vector i goes to ``to`` + i·``step``. The cache is asked for the next vectors of the places.
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

            for i, v in enumerate(_square(e, transform, [at(i, j) for i in range(side) for j in range(side)])):
                e.store(v, b.add(to, b.mul(step, _I64(i))))
            for i in range(side):
                for j in range(side):
                    e.ask(b.add(starts[i], e.plus(ahead[j], LINE)))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 10), codegen

    return f


def _write(transform: Transform, points: int, added: bool = False) -> Any:
    """An intrinsic (products, step, image, row, col, height, width, row_bytes, col_bytes, nowhere, first[, other, nothing]).

    A tile of results from ``points`` vectors, plus the vector at ``first`` and, if ``added``, plus the same tile of the image
    ``other``; places outside of the image are written to ``nowhere`` and read at ``nothing``.
    """

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        products, step, image, row, col, height, width, row_bytes, col_bytes, nowhere, first, *more = args
        e = Emit(b)
        made = _square(e, transform, [e.load(b.add(products, b.mul(step, _I64(i)))) for i in range(points)])
        plus, side = e.load(first), isqrt(len(made))
        rows, cols = ([b.add(at, _I64(i)) for i in range(side)] for at in (row, col))
        high, wide = ([b.icmp_unsigned("<", i, size) for i in line] for line, size in ((rows, height), (cols, width)))
        starts, ahead = [b.mul(r, row_bytes) for r in rows], [b.mul(c, col_bytes) for c in cols]
        for i, v in enumerate(made):
            r, c = divmod(i, side)
            inside, at = b.and_(high[r], wide[c]), b.add(starts[r], ahead[c])
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


def _whole(transform: Transform, count: int, flipped: bool = False) -> Any:
    """An intrinsic (at, step, to, to_step): a square of ``count`` vectors ``step`` bytes apart to its transform."""

    @intrinsic
    def f(typingctx: Any, at: Any, step: Any, to: Any, to_step: Any) -> Any:
        def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
            at, step, to, to_step = args
            e = Emit(b)
            vectors = [e.load(b.add(at, b.mul(step, _I64(i)))) for i in range(count)]
            for i, v in enumerate(_square(e, transform, vectors[::-1] if flipped else vectors)):
                e.store(v, b.add(to, b.mul(to_step, _I64(i))))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 4), codegen

    return f


read_source, read_source_fewer, read_doubled = _read(_source, 6), _read(_fewer(_source), 6), _read(_doubled, 4)
read_mark, read_mark_fewer = _read(_mark, TILE), _read(_fewer(_mark), TILE)
write_result, add_result = _write(_result, POINTS), _write(_result, POINTS, added=True)
write_result_fewer, write_halved = _write(_few_results, FEWER), _write(_halved, FEWER)
transform_taps, transform_taps_fewer = _whole(_taps, 9), _whole(_fewer(_taps), 9)
transform_flipped, transform_flipped_fewer = _whole(_taps, 9, flipped=True), _whole(_fewer(_taps), 9, flipped=True)
transform_gradient, transform_gradient_fewer = _whole(_gradient, POINTS), _whole(_few_gradients, FEWER)
