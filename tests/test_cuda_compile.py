"""What NVIDIA's compiler makes of the kernels, without a GPU; and what the GPU backend says where there is none."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from alphabar.kernels import compile as loader
from alphabar.kernels import gpu
from alphabar.kernels.compile import FOLDER, source
from tests import cuda_audit, cuda_launches, cuda_limits, cuda_sass, cuda_table

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


@pytest.fixture(scope="module")
def launched() -> tuple[dict[str, dict[cuda_launches.Shape, int]], set[str]]:
    """What the launch code asks for in the registry's cases."""
    return cuda_launches.launches()


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


def test_enough_warps_are_resident(usage: dict, launched: tuple) -> None:
    short = {
        (name, architecture): found
        for (name, architecture), u in usage.items()
        if name in launched[0]
        and (found := cuda_table.warps(u, architecture, launched[0][name])[0]) < BUDGETS[name].get("warps", 1)
    }
    assert not short


def test_the_table_is_that_of_the_sources(usage: dict, launched: tuple) -> None:
    assert cuda_table.TABLE.read_text() == cuda_table.markdown(usage, *launched), f"renew it: {cuda_table.COMMAND}"


def test_data_moves_16_bytes_at_a_time(usage: dict) -> None:
    for (name, architecture), u in usage.items():
        wide = BUDGETS[name].get("wide", {"loads": 0, "stores": 0})
        assert u.loads.get(128, 0) >= wide["loads"], (name, architecture)
        assert u.stores.get(128, 0) >= wide["stores"], (name, architecture)
    for name in ("normals_wide", "q_sample_made_wide", "q_sample_given_wide", "step_made_wide", "adamw_wide"):
        assert BUDGETS[name]["wide"]["stores"] >= 4
        assert BUDGETS[name]["wide"]["loads"] >= 4 or name == "normals_wide"


def test_only_the_optimiser_and_the_times_compute_in_double_precision(usage: dict) -> None:
    assert {name for (name, _), u in usage.items() if u.doubles} == {
        *("adamw_wide", "adamw_any", "squares_wide", "squares_any", "sum_parts", "count", "time_features"),
        *("draw_levels", "verdict"),
    }


def test_what_is_kept_of_an_audit_is_what_was_read(usage: dict) -> None:
    for u in usage.values():
        assert cuda_audit.Usage.of(json.loads(json.dumps(asdict(u)))) == u


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


# ------------------------------------------------------------------------------------------------------- loops and residence


LOOP = """
.text.kernel:
        /*0000*/                   S2R R2, SR_TID.X ;
        /*0010*/                   LDG.E R3, desc[UR6][R4.64] ;
.L_x_1:
        /*0020*/                   LDG.E.128 R4, desc[UR6][R4.64] ;
        /*0030*/               @P0 BRA `(.L_x_2) ;
        /*0040*/                   LDG.E.64.CONSTANT R8, desc[UR6][R4.64] ;
        /*0050*/                   MUFU.EX2 R8, R8 ;
        /*0060*/                   FFMA.FTZ R8, R8, R9, R9 ;
        /*0070*/                   BRA `(.L_x_3) ;
.L_x_2:
        /*0080*/                   FADD R8, R8, R9 ;
.L_x_3:
        /*0090*/              @!P1 STG.E.U8 desc[UR6][R4.64], R8 ;
        /*00a0*/              @!P2 BRA `(.L_x_1) ;
.L_x_4:
        /*00b0*/                   FADD R8, R8, R9 ;
        /*00c0*/               @P3 BRA `(.L_x_4) ;
        /*00d0*/                   EXIT ;
.L_x_5:
        /*00e0*/                   BRA `(.L_x_5);
        /*00f0*/                   NOP ;
"""


def test_the_way_with_all_accesses_through_the_main_loop() -> None:
    assert cuda_sass.main_pass(LOOP) == cuda_sass.Pass(8, 16 + 8 + 4, 1, loop=True, within=False)
    without = LOOP.replace("@!P2 BRA `(.L_x_1)", "IADD3 R1, R1, R1, RZ")
    assert cuda_sass.main_pass(without) == cuda_sass.Pass(13, 4 + 16 + 8 + 4, 1, loop=False, within=True)


def test_a_branch_with_a_predicate_among_its_operands_may_be_passed() -> None:
    for branch in ("BRA.DIV UR4, `(.L_x_5)", "BRA P6, `(.L_x_5)", "BRA.U UP0, `(.L_x_5)"):
        found = cuda_sass.main_pass(LOOP.replace("MUFU.EX2 R8, R8", branch))
        assert found == cuda_sass.Pass(8, 28, 0, loop=True, within=False)


def test_a_loop_in_a_loop_is_told() -> None:
    inner = LOOP.replace("BRA `(.L_x_3)", "@P4 BRA `(.L_x_1)").replace("@P3 BRA `(.L_x_4)", "@P3 BRA `(.L_x_1)")
    found = cuda_sass.main_pass(inner)
    assert found.loop and found.moved == 28
    assert cuda_limits.bound("sm_90", cuda_sass.Pass(5, 4, 0, True, within=True)) == ("inner loops", None)


@pytest.mark.parametrize(
    ("architecture", "threads", "registers", "shared", "wanted"),
    [
        ("sm_80", 256, 32, 0, (64, "threads")),
        ("sm_80", 256, 33, 0, (48, "registers")),  # 40 registers: 12 warps in each part
        ("sm_90", 256, 64, 0, (32, "registers")),
        ("sm_90", 1024, 40, 0, (32, "registers")),
        ("sm_90", 32, 16, 0, (32, "blocks")),
        ("sm_80", 128, 32, 48 << 10, (12, "shared memory")),  # 3 blocks of 49 KiB in 164
        ("sm_90", 128, 32, 48 << 10, (16, "shared memory")),
        ("sm_100", 256, 255, 0, (8, "registers")),
        ("sm_90", 64, 32, 227 << 10, (2, "shared memory")),
        ("sm_80", 64, 32, 164 << 10, (0, "shared memory")),
    ],
)
def test_resident_warps(architecture: str, threads: int, registers: int, shared: int, wanted: tuple[int, str]) -> None:
    assert cuda_limits.resident_warps(architecture, threads, registers, shared) == wanted


def test_what_a_loop_waits_for() -> None:
    copy = cuda_sass.Pass(8, 32, 0, True, False)
    assert [cuda_limits.bound(a, copy)[0] for a in cuda_audit.ARCHITECTURES] == ["memory"] * 3
    word, ratio = cuda_limits.bound("sm_90", cuda_sass.Pass(400, 32, 0, True, False))
    assert word == "issue" and ratio == pytest.approx(100 / (1024 / cuda_limits.LIMITS["sm_90"].bytes_per_cycle))
    assert cuda_limits.bound("sm_90", cuda_sass.Pass(400, 32, 60, True, False))[0] == "special functions"


def test_the_launches_are_those_of_the_registry(launched: tuple) -> None:
    shapes, small = launched
    assert shapes["step_made_wide"].keys() == {(256, 0)} and "step_made_wide" not in small and "step_made_any" in small
    assert all(0 < threads <= 1024 and 0 <= shared <= 227 << 10 for own in shapes.values() for threads, shared in own)


def test_budgets_are_made_from_the_audit() -> None:
    used = {
        ("k", a): cuda_audit.Usage(33 + i, 0, 100, 0, loads={128: 2 + i, 32: 1}) for i, a in enumerate(cuda_audit.ARCHITECTURES)
    }
    line = {"registers": 40, "shared": 100, "wide": {"loads": 2, "stores": 0}}
    assert cuda_table.budgets(used, {}) == {"k": line}
    assert cuda_table.budgets(used, {"k": {(256, 0): 9}}) == {"k": line | {"warps": 48}}
    assert json.loads(cuda_table.text_of({"k": line})) == {"k": line}


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
