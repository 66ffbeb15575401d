"""What NVIDIA's compiler makes of the kernels, without a GPU; and what the GPU backend says where there is none."""

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from alphabar.kernels import compile as loader
from alphabar.kernels import gpu
from alphabar.kernels.compile import FOLDER, source
from tests import cuda_audit

FILES = sorted(FOLDER.glob("*.cu"))
FAULTS = Path(__file__).parent / "cusim" / "faults.cu"
BUDGETS = json.loads((Path(__file__).parent / "data" / "cuda_budgets.json").read_text())


@pytest.fixture(scope="module")
def nvrtc() -> cuda_audit.Nvrtc:
    try:
        return cuda_audit.Nvrtc()
    except FileNotFoundError as e:
        pytest.skip(str(e))


@pytest.fixture(scope="module")
def usage(nvrtc: cuda_audit.Nvrtc) -> dict[tuple[str, str], cuda_audit.Usage]:
    """(kernel, architecture) -> usage, of all files."""
    try:
        return cuda_audit.audit_all(FILES, cuda_audit.ARCHITECTURES, nvrtc)
    except FileNotFoundError as e:
        pytest.skip(str(e))


def test_every_kernel_has_a_budget(usage: dict) -> None:
    assert {name for name, _ in usage} == set(BUDGETS)


def test_no_kernel_spills_or_uses_local_memory(usage: dict) -> None:
    assert not {key: u for key, u in usage.items() if not u.clean}


def test_registers_and_shared_memory_are_within_the_budgets(usage: dict) -> None:
    over = {
        (name, architecture): (u.registers, u.shared)
        for (name, architecture), u in usage.items()
        if u.registers > BUDGETS[name]["registers"] or u.shared > BUDGETS[name]["shared"]
    }
    assert not over


def test_data_moves_16_bytes_at_a_time(usage: dict) -> None:
    for (name, architecture), u in usage.items():
        wide = BUDGETS[name].get("wide", {"loads": 0, "stores": 0})
        assert u.loads.get(128, 0) >= wide["loads"], (name, architecture)
        assert u.stores.get(128, 0) >= wide["stores"], (name, architecture)
    for name in ("normals_wide", "q_sample_made_wide", "q_sample_given_wide", "step_made_wide", "adamw_wide"):
        assert BUDGETS[name]["wide"]["stores"] >= 4
        assert BUDGETS[name]["wide"]["loads"] >= 4 or name == "normals_wide"


def test_only_the_optimiser_computes_in_double_precision(usage: dict) -> None:
    assert {name for (name, _), u in usage.items() if u.doubles} == {
        *("adamw_wide", "adamw_any", "squares_wide", "squares_any", "sum_parts")
    }


def test_the_audit_sees_spills(nvrtc: cuda_audit.Nvrtc) -> None:
    try:
        found = cuda_audit.audit(FAULTS, "sm_90", nvrtc)
    except FileNotFoundError as e:
        pytest.skip(str(e))
    assert not found["spills"].clean and found["spills"].local > 0
    assert found["strided"].clean


def test_a_mistake_is_shown_with_its_file_and_line(nvrtc: cuda_audit.Nvrtc, tmp_path: Path) -> None:
    (tmp_path / "part.cuh").write_text("// one\nint two = ;\n")
    (tmp_path / "whole.cu").write_text('// first\n#include "part.cuh"\nint four = ;\n')
    with pytest.raises(RuntimeError) as e:
        nvrtc.compile(source(tmp_path / "whole.cu"), "whole.cu", "sm_90")
    assert "part.cuh(2): error" in str(e.value) and "whole.cu(3): error" in str(e.value)


# ------------------------------------------------------------------------------------------------------------ CuPy without a GPU


def python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", check=False)


def test_the_backend_loads_without_cupy() -> None:
    code = "import sys; sys.modules['cupy'] = None; import alphabar.kernels.gpu as g; g.require_gpu()"
    assert python(code).stderr.splitlines()[-1].startswith("RuntimeError: the GPU needs CuPy: pip install cupy-cuda")


@pytest.fixture
def cupy() -> ModuleType:
    return pytest.importorskip("cupy", reason="CuPy is not installed")


def test_cupy_takes_every_source(cupy: ModuleType) -> None:
    for path in FILES:
        cupy.RawModule(code=source(path), options=("--std=c++17",))  # compiled when a kernel is first asked for


def test_a_missing_gpu_is_named(cupy: ModuleType) -> None:
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError:
        count = 0
    with pytest.raises(RuntimeError, match=r"no usable GPU|there is no GPU") as e:
        gpu.require_gpu(count)
    assert "\n" not in str(e.value)


class Library:
    """As much of CuPy as the launching needs; keeps what it was asked."""

    def __init__(self) -> None:
        self.compiled: list[tuple[str, tuple]] = []
        self.calls: list[tuple] = []
        runtime = SimpleNamespace(getDevice=lambda: 0, getDeviceCount=lambda: 1)
        self.cuda = SimpleNamespace(runtime=runtime)

    def RawModule(self, code: str, options: tuple) -> Any:
        self.compiled.append((code, options))

        class Kernel:
            max_dynamic_shared_size_bytes = 49152

            def __init__(self, name: str) -> None:
                self.name = name

            def __call__(kernel, *args: Any, **kwargs: Any) -> None:
                self.calls.append((kernel.name, kernel.max_dynamic_shared_size_bytes, args, kwargs))

        return SimpleNamespace(get_function=Kernel)


def test_launching_through_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library()
    monkeypatch.setattr(loader, "require_gpu", lambda: library)
    device = loader.Cuda()
    assert not library.compiled  # lazily
    for shared in (1000, 100_000, 60_000):
        device.launch("attention", "attention_forward_32", (3,), (256,), (None, np.float32(1)), shared)
    assert [code.startswith("// Softmax attention") and '#include "' not in code for code, _ in library.compiled] == [True]
    assert [limit for _, limit, *_ in library.calls] == [49152, 100_000, 100_000]
    name, _, (grid, block, args), options = library.calls[1]
    assert (name, grid, block, options) == ("attention_forward_32", (3,), (256,), {"shared_mem": 100_000})
    assert args == (0, 1) and type(args[0]) is np.uintp and type(args[1]) is np.float32  # a null pointer is eight bytes
