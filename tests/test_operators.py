"""Linear measurements: transposes, pseudo-inverses and singular values against the dense matrices that they stand for."""

import numpy as np
import pytest

from alphabar.core import operators

SHAPE = (6, 4, 3)
RNG = np.random.default_rng(0)
KINDS = {
    "mask": operators.Mask(RNG.integers(0, 2, (6, 4, 1)), SHAPE),
    "box": operators.box(SHAPE, 2),
    "blur": operators.blur(SHAPE, 0.7),
    "wide blur": operators.blur(SHAPE, 5.0),
    "grey": operators.grey(SHAPE),
    "luma": operators.grey(SHAPE, (0.3, 0.59, 0.11)),
    "wide matrix": operators.matrix(RNG.standard_normal((3, 5))),
    "tall matrix": operators.matrix(RNG.standard_normal((7, 4))),
    "low rank": operators.matrix(RNG.standard_normal((4, 2)) @ RNG.standard_normal((2, 5))),
    "all axes": operators.Product((3, 4), [RNG.standard_normal((2, 3)), RNG.standard_normal((5, 4))]),
}


@pytest.fixture(params=KINDS, name="op")
def operator(request: pytest.FixtureRequest) -> operators.Operator:
    return KINDS[request.param]


def dense(op: operators.Operator) -> np.ndarray:
    n = int(np.prod(op.shape))
    return op(np.eye(n).reshape(n, *op.shape)).reshape(n, -1).T


def test_transpose_inverse_and_spectrum(op: operators.Operator) -> None:
    A, n = dense(op), int(np.prod(op.shape))
    x, y = RNG.standard_normal((5, *op.shape)), RNG.standard_normal((5, *op.shape_out))
    assert op(x).shape == y.shape and op.adjoint(y).shape == op.pinv(y).shape == x.shape
    np.testing.assert_allclose((op(x) * y).sum(), (x * op.adjoint(y)).sum(), rtol=1e-12)
    np.testing.assert_allclose(op(x).reshape(5, -1), x.reshape(5, -1) @ A.T, atol=1e-12)
    np.testing.assert_allclose(op(op.pinv(op(x))), op(x), atol=1e-5)  # the cutoff is 1e-6
    np.testing.assert_allclose(op.pinv(op(op.pinv(y))), op.pinv(y), atol=1e-9 * abs(op.pinv(y)).max())
    np.testing.assert_allclose(op.pinv(y).reshape(5, -1), y.reshape(5, -1) @ np.linalg.pinv(A, rcond=1e-6).T, atol=1e-7)
    v = op.to_spectrum(x)
    np.testing.assert_allclose(op.from_spectrum(v), x, atol=1e-12)
    np.testing.assert_allclose((v**2).sum(), (x**2).sum())
    np.testing.assert_allclose(op.observed(y), op.to_spectrum(op.pinv(y)), atol=1e-9 * abs(op.pinv(y)).max())
    want = np.zeros(n)
    singular = np.linalg.svd(A, compute_uv=False)
    want[: min(n, len(singular))] = singular[:n]
    np.testing.assert_allclose(np.sort(op.singular.ravel()), np.sort(np.where(want > 1e-6 * want.max(), want, 0)), atol=1e-9)
    np.testing.assert_allclose((op(x) ** 2).sum(), ((op.singular * v) ** 2).sum(), rtol=1e-9)  # ‖Ax‖ = ‖ΣVᵀx‖


def test_what_the_usual_measurements_are() -> None:
    x = RNG.standard_normal((2, *SHAPE))
    np.testing.assert_allclose(KINDS["box"](x), x.reshape(2, 3, 2, 2, 2, 3).mean(axis=(2, 4)))
    np.testing.assert_allclose(KINDS["box"].pinv(KINDS["box"](x)), KINDS["box"](x).repeat(2, 1).repeat(2, 2))
    np.testing.assert_allclose(KINDS["grey"](x), x.mean(axis=3, keepdims=True))
    np.testing.assert_allclose(KINDS["blur"](np.ones((1, *SHAPE))), 1)
    wide = operators.blur((61, 61, 1), 2.0)
    point = np.zeros((1, 61, 61, 1))
    point[0, 30, 30] = 1
    spread = wide(point)[0, :, :, 0].sum(axis=1)
    assert abs(spread.sum() - 1) < 1e-12 and abs((spread * (np.arange(61) - 30.0) ** 2).sum() - 4) < 0.02
    np.testing.assert_allclose(dense(KINDS["blur"]), dense(KINDS["blur"]).T, atol=1e-15)  # mirrored at the borders


def test_blur_agrees_with_scipy() -> None:
    ndimage = pytest.importorskip("scipy.ndimage")
    x = RNG.standard_normal((1, 9, 12, 1))
    want = ndimage.gaussian_filter(x[0, :, :, 0], 1.3, mode="reflect", radius=int(np.ceil(4 * 1.3)))
    np.testing.assert_allclose(operators.blur((9, 12, 1), 1.3)(x)[0, :, :, 0], want, atol=1e-12)


def test_no_sample_depends_on_its_batch(op: operators.Operator) -> None:
    x = RNG.standard_normal((7, *op.shape)).astype(np.float32)
    y = op(x)
    assert y.dtype == np.float32
    for f, a in ((op, x), (op.to_spectrum, x), (op.from_spectrum, x), (op.adjoint, y), (op.pinv, y), (op.observed, y)):
        whole = f(a)
        assert np.array_equal(whole, np.concatenate([f(a[i : i + 1]) for i in range(7)])) and f(a[:0]).shape[0] == 0


def test_arrays_of_other_libraries(op: operators.Operator) -> None:
    torch = pytest.importorskip("torch")
    x = RNG.standard_normal((2, *op.shape))
    y = op(torch.from_numpy(x))
    assert isinstance(y, torch.Tensor) and np.array_equal(y.numpy(), op(x))
    assert isinstance(op.pinv(y), torch.Tensor)


def test_what_is_hidden_is_not_read() -> None:
    op = operators.Mask([1, 0], (2,))
    assert np.array_equal(op(np.array([[3.0, np.nan]])), [[3, 0]]) and np.array_equal(
        op.pinv(np.array([[3.0, np.nan]])), [[3, 0]]
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: operators.box((6, 5, 1), 2), "factor must divide both sides, 6 and 5, not 2"),
        (lambda: operators.box((6, 6), 2), r"shape must be \(H, W, C\), not \(6, 6\)"),
        (lambda: operators.box((6, 6, 1), 0), "factor must be a whole number of at least 1"),
        (lambda: operators.blur((6, 6, 1), 0), "sigma must be positive and finite, not 0"),
        (lambda: operators.grey((6, 6, 3), (0, 0, 0)), "weights must be 3 finite numbers"),
        (lambda: operators.matrix(np.zeros(3)), r"values must be a matrix \(m, n\)"),
        (lambda: operators.Product((3, 4), [None]), "matrices must be 2"),
        (lambda: operators.Product((3,), [np.zeros((2, 4))]), r"matrix 0 must be finite and of shape \(m, 3\)"),
        (lambda: operators.Product((3,), [np.eye(3)], cutoff=1), "cutoff must be in"),
        (lambda: operators.Mask([0.5, 1], (2,)), "keep must hold booleans"),
        (lambda: operators.Mask(np.ones((2, 2)), (3,)), "keep must broadcast to"),
        (lambda: operators.grey((2, 2, 3))(np.zeros((1, 2, 2, 1))), r"x must have shape \(B, 2, 2, 3\)"),
        (lambda: operators.grey((2, 2, 3)).adjoint(np.zeros((1, 2, 2, 3))), r"y must have shape \(B, 2, 2, 1\)"),
    ],
)
def test_wrong_arguments(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_wrong_types() -> None:
    for x in (np.zeros((1, 2), np.int64), [[0.0, 0.0]]):
        with pytest.raises(TypeError, match="x must be a float array"):
            operators.Mask([1, 0], (2,))(x)
