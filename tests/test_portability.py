"""The same sources elsewhere: on processors with narrower vectors, with any number of threads, beside other libraries."""

import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from alphabar.kernels import TABLE

ROOT = Path(__file__).resolve().parents[1]
X86 = platform.machine() in ("x86_64", "AMD64")

# -------------------------------------------------------------------------------------------------------- other processors

AVX2 = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx,+avx2,+fma,+bmi,+bmi2,+popcnt,+f16c"}
MACHINES = {"avx2": AVX2, "sse2": {"NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": "+sse2"}}
SLACK = {"avx2": 1.0, "sse2": 1.5}  # of the budget: without fused multiply-add every product is rounded, too
COMPACT = (
    "normals",
    "conv2d",
    "conv2d_backward_input",
    "conv2d_backward_weight",
    "attention",
    "attention_backward",
    "group_norm_silu",
    "group_norm_silu_backward",
)
CHECK = """
import hashlib, json, sys
from pathlib import Path
import numpy as np
from alphabar import kernels
from alphabar.kernels import TABLE, accuracy
from alphabar.kernels.cpu import tiles, vector

wrong = []
for case in json.loads(Path("tests/data/noise_hashes.json").read_text())["cases"]:
    words = {k: case[k] for k in ("step", "stream", "first_sample")}
    z = kernels.normals(np.empty(case["shape"], np.float32), case["seed"], **words)
    if hashlib.sha256(z.tobytes()).hexdigest() != case["sha256"]:
        wrong.append(f"normals {case}")
for name in sys.argv[1:]:
    for case in TABLE[name].tests:
        for e in accuracy.errors(TABLE[name], case, lambda name, args, kwargs: getattr(kernels, name)(*args, **kwargs)):
            if e.ours > SLACK * e.limit:
                wrong.append(f"{name} {case}: {e}")
print(json.dumps({"lanes": vector.LANES, "rows": vector.ROWS, "wrong": wrong}))
"""


def started(code: str, *words: str, **environment: str) -> subprocess.Popen:
    ours = ("NUMBA_CPU", "NUMBA_NUM", "NUMBA_THREADING", "GOMP_", "ALPHABAR_")  # some of them set by this very process
    env = {k: v for k, v in os.environ.items() if not k.startswith(ours)} | environment
    command = [sys.executable, "-c", code, *words]
    return subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def answer(process: subprocess.Popen) -> Any:
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1])


@pytest.fixture(scope="module")
def machines() -> dict[str, Any]:
    """What each of MACHINES finds; they compile side by side."""
    running = {
        name: started(f"SLACK = {SLACK[name]}\n{CHECK}", *COMPACT, **environment) for name, environment in MACHINES.items()
    }
    return {name: answer(process) for name, process in running.items()}


@pytest.mark.skipif(not X86, reason="not an x86-64 machine")
@pytest.mark.parametrize(("name", "lanes", "rows"), [("avx2", 8, 6), ("sse2", 4, 6)])
def test_processors_with_narrower_vectors(machines: dict[str, Any], name: str, lanes: int, rows: int) -> None:
    assert machines[name] == {"lanes": lanes, "rows": rows, "wrong": []}


EMIT = """
import json, platform, re, sys, types
architecture, triple, cpu = sys.argv[1:]
platform.machine = lambda: architecture
from llvmlite import binding, ir
from alphabar.kernels.cpu import tiles, vector
from numba.core import config
binding.initialize_all_targets()
binding.initialize_all_asmprinters()
machine = binding.Target.from_triple(triple).create_target_machine(cpu=cpu, features=config.CPU_FEATURES or "", opt=3)
found = {}
for name, count in (("_row_tile", 11), ("_column_tile", 8)):
    module = ir.Module()
    module.triple = triple
    f = ir.Function(module, ir.FunctionType(ir.VoidType(), [ir.IntType(64)] * count), name)
    builder = ir.IRBuilder(f.append_basic_block())
    _, emit = getattr(tiles, name)._defn(None, *[None] * count)
    emit(types.SimpleNamespace(get_dummy_value=lambda: None), builder, None, f.args)
    builder.ret_void()
    parsed = binding.parse_assembly(str(module))
    passes = binding.create_pass_builder(machine, binding.create_pipeline_tuning_options(speed_level=3))
    passes.getModulePassManager().run(parsed, passes)
    blocks = re.split(r"\\n(?=\\.L\\w+:)", machine.emit_assembly(parsed))
    found[name] = max(blocks, key=lambda b: len(re.findall(r"\\b(?:vfmadd\\w+|fmla|v?mulps)\\b", b)))
print(json.dumps({"rows": vector.ROWS, "narrow": vector.NARROW, "lanes": vector.LANES, "loops": found}))
"""
ARM = ("aarch64", "aarch64-unknown-linux-gnu", "cortex-a76")
INTEL = ("x86_64", "x86_64-unknown-linux-gnu")
TILES = {
    "avx512": (
        (*INTEL, "skylake-avx512"),
        {"NUMBA_CPU_NAME": "skylake-avx512", "NUMBA_CPU_FEATURES": "+avx512f,+avx,+fma"},
        16,
        12,
        8,
    ),
    "avx2": ((*INTEL, "haswell"), AVX2, 8, 6, 4),
    "sse2": ((*INTEL, "x86-64"), MACHINES["sse2"], 4, 6, 4),
    "arm": (ARM, {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}, 4, 12, 8),
}


@pytest.mark.parametrize("name", TILES)
def test_the_sums_of_a_tile_stay_in_registers(name: str) -> None:
    """Compiled for each processor, and read: one multiply-add for each sum, and no vector goes to the stack in the inner loop."""
    words, environment, lanes, rows, narrow = TILES[name]
    if not X86 and name != "arm":
        pytest.skip("Numba itself cannot be told to be an x86-64 machine here")
    found = answer(started(EMIT, *words, **environment))
    assert (found["lanes"], found["rows"], found["narrow"]) == (lanes, rows, narrow)
    for loop, height in (("_row_tile", rows), ("_column_tile", narrow)):
        code = found["loops"][loop]
        assert len(re.findall(r"\b(?:vfmadd\w+|fmla|v?mulps)\b", code)) == 2 * height
        stack = re.findall(r"^.*(?:%rsp|\[sp).*$", code, re.MULTILINE)
        assert not [line for line in stack if re.search(r"[xyz]mm|\bq\d", line)], "\n".join(stack)


# ----------------------------------------------------------------------------------------------------------------- threads

COUNTS = (1, 2, 3, 8, 64)
BITS = """
import hashlib, json, sys, types
import alphabar.kernels.cpu
import numba
import numpy as np
from alphabar import kernels
from alphabar.kernels import TABLE, accuracy
from tests.test_kernels import LARGER

def share_all(function):  # small work too goes to all workers
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or ()):
        if name == "limit":
            cell.cell_contents = 0

for module in [m for n, m in sys.modules.items() if n.startswith("alphabar.kernels.cpu.")]:
    for value in vars(module).values():
        if isinstance(value, types.FunctionType):
            share_all(value)

def digest(name, case):
    args, kwargs = accuracy.arguments(TABLE[name], case)
    with np.errstate(all="ignore"):
        made = accuracy.outputs(name, getattr(kernels, name)(*args, **kwargs), args, kwargs)
    return hashlib.sha256(b"".join(np.ascontiguousarray(a).tobytes() for a in made)).hexdigest()

counts, different = [int(w) for w in sys.argv[1:]], []
for name in TABLE:
    for case in (*TABLE[name].tests, LARGER[name]):
        found = {}
        for count in counts:
            numba.set_num_threads(count)
            found[count] = digest(name, case)
        if len(set(found.values())) > 1:
            different.append(f"{name} {case}: {found}")
print(json.dumps({"most": numba.config.NUMBA_NUM_THREADS, "layer": numba.threading_layer(), "different": different}))
"""


def test_bits_are_the_same_with_1_to_64_threads() -> None:
    """Every kernel of the registry, small cases too, shared among workers that are really there."""
    found = answer(started(BITS, *map(str, COUNTS), ALPHABAR_THREADS=str(max(COUNTS))))
    assert found["most"] == max(COUNTS) and found["different"] == []
    assert found["layer"] in ("omp", "tbb")  # the third, workqueue, has but one user at a time


STATE = """
import json, os, sys, warnings
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    {before}
    from alphabar.kernels import cpu
import numba, numpy, threadpoolctl
from alphabar import kernels
kernels.sum_squares(numpy.ones(1 << 20, numpy.float32))
blas = [p["num_threads"] for p in threadpoolctl.threadpool_info() if p["user_api"] == "blas"]
mine = [str(w.message) for w in said if "ALPHABAR" in str(w.message)]
variables = {{k: os.environ.get(k) for k in ("GOMP_SPINCOUNT", "NUMBA_NUM_THREADS")}}
print(json.dumps([numba.get_num_threads(), numba.config.THREADING_LAYER_PRIORITY, blas, mine, variables]))
"""


def state(before: str = "pass", **environment: str) -> Any:
    return answer(started(STATE.format(before=before), **environment))


def test_the_policy_comes_before_numba() -> None:
    threads, layers, blas, _, variables = state(ALPHABAR_THREADS="3")
    assert threads == 3 and variables["NUMBA_NUM_THREADS"] == "3" and layers[0] == "omp"
    assert blas and set(blas) == {1}  # NumPy's, and SciPy's that Numba loads
    assert variables["GOMP_SPINCOUNT"] == "3000" or "OMP_WAIT_POLICY" in os.environ
    usual = state()
    assert 1 <= usual[0] <= (os.cpu_count() or 1) and usual[3] == []


def test_more_threads_than_there_can_be_is_a_warning() -> None:
    threads, _, _, said, _ = state(ALPHABAR_THREADS="1000")
    assert threads == 1000 and len(said) == 1 and "so they take turns" in said[0]
    threads, _, _, said, _ = state("import os; os.environ['NUMBA_NUM_THREADS'] = '2'; import numba", ALPHABAR_THREADS="3")
    assert threads == 2 and said == ["ALPHABAR_THREADS=3: Numba was loaded with 2"]


def test_a_policy_of_the_user_is_left_alone() -> None:
    assert state(OMP_WAIT_POLICY="active")[4]["GOMP_SPINCOUNT"] is None
    assert state(GOMP_SPINCOUNT="7")[4]["GOMP_SPINCOUNT"] == "7"


@pytest.mark.parametrize(
    "first", ["import torch", "from alphabar import kernels; kernels.sum_squares(numpy.ones(9, numpy.float32)); import torch"]
)
def test_beside_pytorch_each_keeps_its_threads(first: str) -> None:
    pytest.importorskip("torch")
    code = f"""
import json, numpy
{first}
from alphabar import kernels
import numba, threadpoolctl
kernels.sum_squares(numpy.ones(1 << 20, numpy.float32))
torch.mm(torch.ones(300, 300), torch.ones(300, 300))
print(json.dumps([numba.get_num_threads(), torch.get_num_threads()]))
"""
    alone = answer(started("import json, torch; print(json.dumps(torch.get_num_threads()))"))
    assert answer(started(code)) == [
        answer(started("import json, alphabar.kernels.cpu as c; print(json.dumps(c.threads.available()))")),
        alone,
    ]


def test_every_kernel_is_among_the_compared() -> None:
    assert set(COMPACT) <= set(TABLE)
