"""The doors: arrays of other libraries come in and go out as their own kind; heavy libraries are loaded only when needed."""

import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from alphabar import kernels
from alphabar.kernels import arrays
from alphabar.kernels.reference import ROW


@pytest.fixture
def torch() -> Any:
    return pytest.importorskip("torch")


def rows(**columns: float) -> np.ndarray:
    table = np.zeros((2, len(ROW)))
    for name, value in columns.items():
        table[:, ROW.index(name)] = value
    return table


X = np.linspace(-1, 1, 2 * 6 * 5 * 3, dtype=np.float32).reshape(2, 6, 5, 3)
LEVELS = np.linspace(1, 0.1, 11)
T = np.array([3, 10])


def test_numpy_in_numpy_out() -> None:
    for result in (
        kernels.step(X, X, rows(a=0.5, e=0.25), 1),
        *kernels.q_sample(X, T, LEVELS, LEVELS),
        kernels.normals(np.empty_like(X), 3),
        kernels.sum_squares(X),
    ):
        assert type(result) is np.ndarray


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_torch_in_torch_out(torch: Any, dtype: str) -> None:
    x = torch.from_numpy(X.astype(dtype))
    table = rows(a=0.5, e=0.25, c=1)
    result = kernels.step(x, 2 * x, table, 1, noise=True, seed=4)
    assert isinstance(result, torch.Tensor) and result.dtype == x.dtype
    assert np.array_equal(result.numpy(), kernels.step(x.numpy(), 2 * x.numpy(), table, 1, noise=True, seed=4))
    x_t, eps = kernels.q_sample(x, torch.from_numpy(T), torch.from_numpy(LEVELS), torch.from_numpy(LEVELS), seed=4)
    assert isinstance(x_t, torch.Tensor) and isinstance(eps, torch.Tensor)
    assert np.array_equal(x_t.numpy(), kernels.q_sample(x.numpy(), T, LEVELS, LEVELS, seed=4)[0])


def test_tables_may_stay_in_numpy_beside_tensors(torch: Any) -> None:
    x_t, _ = kernels.q_sample(torch.from_numpy(X), T, LEVELS, LEVELS, seed=4)
    assert np.array_equal(x_t.numpy(), kernels.q_sample(X, T, LEVELS, LEVELS, seed=4)[0])


def test_torch_tensors_are_written_in_place(torch: Any) -> None:
    out = torch.empty(3, 7, 5)
    assert kernels.normals(out, 5) is out
    assert np.array_equal(out.numpy(), kernels.normals(np.empty((3, 7, 5), np.float32), 5))
    x, store = torch.from_numpy(X.copy()), torch.empty(X.shape)
    table = rows(a=0.5, e=0.25, u=3)
    wanted = kernels.step(X, X, table, 0)
    assert kernels.step(x, torch.from_numpy(X), table, 0, out=x, store=store) is x
    assert np.array_equal(x.numpy(), wanted) and np.array_equal(store.numpy(), 3 * X)
    into, noise = torch.empty(X.shape), torch.empty(X.shape)
    x_t, eps = kernels.q_sample(torch.from_numpy(X), torch.from_numpy(T), LEVELS, LEVELS, out=into, eps_out=noise)
    assert x_t is into and eps is noise and bool((into != 0).all())


def test_tensors_in_a_history_and_channels_last_views(torch: Any) -> None:
    nchw = torch.from_numpy(X).permute(0, 3, 1, 2)
    past = (nchw + 1, nchw + 2)
    result = kernels.step(nchw, nchw, rows(a=1, h1=0.5, h2=0.25), 0, history=past)
    assert result.shape == nchw.shape and np.allclose(result.numpy(), (nchw + 0.5 * past[0] + 0.25 * past[1]).numpy(), atol=1e-6)


def test_several_results_and_missing_ones(torch: Any) -> None:
    x, one = torch.from_numpy(X), torch.ones(3)
    results = kernels.group_norm_silu_backward(x, x, one, one, 1, torch.zeros(2, 1), torch.ones(2, 1))
    assert all(isinstance(r, torch.Tensor) for r in results[:3]) and results[3:] == (None, None)


def test_gradients_are_refused(torch: Any) -> None:
    x = torch.zeros(2, 3, requires_grad=True)
    with pytest.raises(TypeError, match=r"requires a gradient cannot be exchanged: pass x\.detach\(\)"):
        kernels.step(x, x, rows(), 0)
    with pytest.raises(TypeError, match="requires a gradient"):
        kernels.step(X, torch.zeros(X.shape, requires_grad=True), rows(), 0)


def test_wrong_kinds_are_named(torch: Any) -> None:
    with pytest.raises(TypeError, match="x must be an array, not list"):
        kernels.step([1.0], [1.0], rows(), 0)
    with pytest.raises(TypeError, match="x must be of a float dtype, not int64"):
        kernels.sum_squares(torch.arange(3))


def test_what_numpy_cannot_hold_is_named(torch: Any) -> None:
    x = torch.zeros(2, 3, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match=r"an array of torch\.bfloat16 cannot be exchanged"):
        kernels.step(x, x, rows(), 0)


def test_questions_about_kinds(torch: Any) -> None:
    x = torch.zeros(3)
    assert arrays.is_foreign(x) and not arrays.is_native(x) and arrays.is_native(X) and not arrays.is_foreign(X)
    assert not arrays.is_foreign(np.float32(1)) and not arrays.is_foreign([1]) and not arrays.is_cupy(X)
    assert arrays.array_module(X) is np
    assert np.shares_memory(arrays.native(x), x.numpy()) and arrays.native(X) is X and arrays.native(None) is None
    assert arrays.restore(X, X) is X and arrays.restore(None, x) is None
    assert type(arrays.to_numpy(x)) is np.ndarray and type(arrays.to_numpy([1, 2])) is np.ndarray


class Capsule:
    """An array of a library that speaks nothing but DLPack, in a module that has ``from_dlpack``."""

    def __init__(self, a: np.ndarray) -> None:
        self.a = a

    def __dlpack__(self, **options: Any) -> Any:
        return self.a.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.a.__dlpack_device__()


def from_dlpack(a: Any) -> Capsule:
    return Capsule(np.from_dlpack(a))


def test_any_library_with_dlpack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, Capsule.__module__.partition(".")[0], sys.modules[__name__])
    result = kernels.step(Capsule(X), Capsule(X), rows(a=2), 0)
    assert isinstance(result, Capsule) and np.array_equal(result.a, 2 * X)


def test_imports_are_light() -> None:
    code = "import sys, alphabar.core, alphabar.kernels, alphabar.nets\n"
    code += "print(*(m for m in ('numba', 'cupy', 'torch', 'h5py', 'matplotlib', 'PIL', 'safetensors') if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_the_definitions_need_no_numba() -> None:
    code = "import sys, numpy as np; from alphabar import kernels\n"
    code += "kernels.sum_squares(np.ones(3))\nwith kernels.use('reference'): kernels.sum_squares(np.ones(3, np.float32))\n"
    code += "print('numba' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
