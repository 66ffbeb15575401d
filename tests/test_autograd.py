"""The tape: order, sharing of gradients, release of memory, errors."""

import weakref

import numpy as np
import pytest

from alphabar import kernels
from alphabar.nets import Tensor, no_grad
from alphabar.nets import functions as f
from alphabar.nets.autograd import record
from alphabar.nets.gradcheck import directional_derivatives, gradcheck

rng = np.random.default_rng(0)


def leaf(*shape: int) -> Tensor:
    return Tensor(rng.standard_normal(shape), needs_grad=True)


def times(x: Tensor, k: float) -> Tensor:
    return record(k * x.data, (x,), lambda dy: x.receive(k * dy))


def test_a_value_used_by_paths_of_different_length_gets_all_its_gradient() -> None:
    x = leaf(3, 2)
    a = times(x, 2.0)
    long = times(times(times(a, 3.0), 5.0), 7.0)
    y = f.add(f.add(a, long), a)
    y.backward(np.ones((3, 2)))
    np.testing.assert_array_equal(x.grad, np.full((3, 2), 2.0 * (1 + 105 + 1)))


def test_a_gradient_shared_by_two_inputs_is_not_written_to() -> None:
    x = leaf(4)
    dout = rng.standard_normal(4)
    kept = dout.copy()
    a, b = times(x, 1.0), times(x, 10.0)
    s = f.add(a, b)  # a, b and s share dout
    y = f.add(f.add(s, a), b)  # and a, b receive more
    y.backward(dout)
    np.testing.assert_array_equal(dout, kept)
    np.testing.assert_allclose(x.grad, 22 * kept, rtol=1e-15)


def test_partial_gradients_add_up_before_and_after_whole_ones() -> None:
    x = leaf(2, 4)
    x.receive(np.ones((2, 4)))
    x.receive(np.full((2, 2), 3.0), at=1)
    np.testing.assert_array_equal(x.grad, [[1, 4, 4, 1]] * 2)
    z = leaf(2, 4)
    z.receive(np.full((2, 2), 3.0), at=1)
    z.receive(np.ones((2, 4)))
    np.testing.assert_array_equal(z.grad, [[1, 4, 4, 1]] * 2)


def test_leaves_add_up_over_passes() -> None:
    x = leaf(5)
    for _ in range(3):
        times(x, 2.0).backward(np.ones(5))
    np.testing.assert_array_equal(x.grad, np.full(5, 6.0))


def test_an_input_without_needs_grad_gets_none_and_nothing_is_recorded_for_it() -> None:
    x, c = leaf(3), Tensor(np.ones(3))
    y = f.add(times(c, 2.0), x)
    y.backward(np.ones(3))
    assert c.grad is None
    with pytest.raises(RuntimeError, match="nothing was recorded"):
        times(c, 2.0).backward(np.ones(3))


def test_no_grad_keeps_nothing() -> None:
    x = leaf(3)
    with no_grad():
        y = times(x, 2.0)
        held = weakref.ref(y.data)
        z = times(y, 2.0)
    del y
    assert held() is None
    with pytest.raises(RuntimeError, match="nothing was recorded"):
        z.backward(np.ones(3))
    times(x, 2.0).backward(np.ones(3))  # recording is on again


def test_no_grad_ends_with_an_exception() -> None:
    with pytest.raises(KeyError), no_grad():
        raise KeyError
    times(leaf(3), 2.0).backward(np.ones(3))


def test_a_pass_releases_intermediates_as_it_goes() -> None:
    x = leaf(3)
    alive: list[bool] = []
    saved = np.ones(3)
    held = weakref.ref(saved)

    def first_pull(dy: np.ndarray) -> None:
        alive.append(held() is not None)
        x.receive(dy)

    first = record(x.data.copy(), (x,), first_pull)
    second = record(first.data * saved, (first,), lambda dy, saved=saved: first.receive(dy * saved))
    del saved
    assert held() is not None
    second.backward(np.ones(3))
    assert alive == [False]


def test_a_second_pass_through_the_same_tensors_is_refused() -> None:
    x = leaf(3)
    trunk = times(x, 2.0)
    one, two = times(trunk, 1.0), times(trunk, 1.0)
    one.backward(np.ones(3))
    with pytest.raises(RuntimeError, match="already gone"):
        one.backward(np.ones(3))
    with pytest.raises(RuntimeError, match="already gone"):
        two.backward(np.ones(3))


@pytest.mark.parametrize("dout", [np.ones(4), np.ones(3, np.float32)])
def test_dout_must_fit(dout: np.ndarray) -> None:
    with pytest.raises(ValueError, match="dout is"):
        times(leaf(3), 2.0).backward(dout)


def test_a_pool_gives_the_same_gradients_again_without_new_memory() -> None:
    a, b = rng.standard_normal((2, 3, 4, 4, 8))
    pool = kernels.Pool()
    seen = []
    for _ in range(3):
        with pool:
            x, z = Tensor(a, needs_grad=True), Tensor(b, needs_grad=True)
            y = f.concat(f.add(x, z), f.add(z, x))
            y.backward(y.data)
            seen.append((x.grad.copy(), pool.nbytes))
            del x, y, z
    np.testing.assert_allclose(seen[0][0], 2 * (a + b))
    for grad, size in seen[1:]:
        np.testing.assert_array_equal(grad, seen[0][0])
        assert size == seen[0][1] > 0


def test_gradcheck_accepts_a_right_gradient_and_refuses_a_wrong_one() -> None:
    def cube(x: Tensor, factor: float = 3.0) -> Tensor:
        return record(x.data**3, (x,), lambda dy: x.receive(factor * dy * x.data**2))

    a = rng.standard_normal((4, 3))
    gradcheck(cube, a)
    with pytest.raises(AssertionError):
        gradcheck(lambda x: cube(x, 3.001), a)
    numeric, analytic = directional_derivatives(cube, [a])
    assert abs(numeric - analytic) < 1e-11 * abs(analytic)


def test_gradcheck_wants_float64() -> None:
    with pytest.raises(TypeError, match="float64"):
        gradcheck(lambda x: times(x, 2.0), np.ones(3, np.float32))
