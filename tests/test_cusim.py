"""The host runner itself: bank conflicts, inline PTX, coverage, mutants, its command line."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest

from alphabar.kernels.compile import FOLDER, source
from tests import cusim
from tests.cusim import __main__ as command
from tests.cusim import coverage, mutants, mutation, probes, traffic

pytestmark = pytest.mark.skipif(not cusim.available(), reason="g++ is not installed")
HERE = Path(cusim.__file__).parent
PIECES = HERE / "pieces.cu"
MODES = pytest.mark.parametrize("mode", ["fast", "check"])


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    cusim.prepare([PIECES], ("fast", "check"))


def module(mode: str) -> cusim.Module:
    return cusim.module(PIECES, mode)


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def bfloat(x: np.ndarray) -> np.ndarray:
    """The bits of bfloat16, rounded to even."""
    u = x.view(np.uint32)
    return ((u + 0x7FFF + (u >> 16 & 1)) >> 16).astype(np.uint16)


def of_bfloat(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


# ------------------------------------------------------------------------------------------------------------------ inline PTX


@MODES
def test_a_product_of_bfloats(mode: str) -> None:
    a, b, d = bfloat(normal(16, 16)), bfloat(normal(16, 8)), np.empty((16, 8), np.float32)
    module(mode).launch("product_bf16", (1,), (32,), (a, b, d))
    want = 1 + of_bfloat(a).astype(np.float64) @ of_bfloat(b).astype(np.float64)
    assert np.array_equal(d, want.astype(np.float32))


@MODES
def test_a_product_of_tf32(mode: str) -> None:
    a, b, d = normal(16, 8), normal(8, 8), np.empty((16, 8), np.float32)
    module(mode).launch("product_tf32", (1,), (32,), (a, b, d))

    def rounded(x: np.ndarray) -> np.ndarray:
        return ((x.view(np.uint32) + 0x1000) & 0xFFFFE000).view(np.float32).astype(np.float64)

    assert np.array_equal(d, (rounded(a) @ rounded(b)).astype(np.float32))


@MODES
@pytest.mark.parametrize(("name", "count"), [("matrix_1", 1), ("matrix_2", 2), ("matrix_4", 4), ("matrix_4_turned", 4)])
def test_matrices_are_loaded_into_the_lanes_of_a_product(name: str, count: int, mode: str) -> None:
    x, to = np.arange(256, dtype=np.uint16), np.zeros((count, 32), np.uint32)
    module(mode).launch(name, (1,), (32,), (x, to, np.int32(8)), shared=512)
    tiles = x.reshape(4, 8, 8)[:count]
    want = tiles.transpose(0, 2, 1) if "turned" in name else tiles
    assert np.array_equal(to.view(np.uint16).reshape(count, 8, 8), want)


@pytest.mark.parametrize(("pitch", "conflict"), [(8, 1), (16, 2), (64, 8), (72, 1)])
def test_a_padded_pitch_frees_matrix_loads_of_bank_conflicts(pitch: int, conflict: int) -> None:
    x, to = np.arange(256, dtype=np.uint16), np.zeros((4, 32), np.uint32)
    module("check").launch("matrix_4", (1,), (32,), (x, to, np.int32(pitch)), shared=64 * pitch, count=True)
    (row,) = [r for r in module("check").traffic() if r.memory == "shared" and r.bytes == 16]
    assert row.conflict == conflict and row.line.startswith("pieces.cu:")


def copied(mode: str, waits: bool, meets: bool) -> bool:
    x, y = normal(200), np.zeros(200, np.float32)
    module(mode).launch("copied", (2,), (32,), (x, y, np.int32(200), np.int32(waits), np.int32(meets)))
    return np.array_equal(y, np.concatenate([x[:128][::-1], x[128:][::-1]]))


@MODES
def test_copies_that_are_waited_for(mode: str) -> None:
    assert copied(mode, True, True)


def test_copies_that_are_not_waited_for_have_not_landed() -> None:
    assert not copied("fast", False, True) and not copied("fast", True, False)
    with pytest.raises(cusim.Fault, match=r"read of shared memory before cp\.async\.wait_group, shared s at pieces\.cu"):
        copied("check", False, True)
    with pytest.raises(cusim.Fault, match="race: read after write, shared s"):
        copied("check", True, False)


@MODES
def test_conversions(mode: str) -> None:
    x = np.r_[normal(60), np.float32([0, -0.0, 65504, 1e-8])].astype(np.float32)
    half, bfloats, back = np.zeros(32, np.uint32), np.zeros(32, np.uint32), np.zeros(32, np.float32)
    module(mode).launch("converted", (1,), (32,), (x, half, bfloats, back, np.int32(64)))
    assert np.array_equal(half.view(np.float16), x.astype(np.float16))
    assert np.array_equal(bfloats.view(np.uint16), bfloat(x))
    assert np.array_equal(back, x[::2].astype(np.float16))


@MODES
@pytest.mark.parametrize("width", [32, 8])
def test_shuffles_and_votes(width: int, mode: str) -> None:
    x, y = np.arange(32, dtype=np.int32), np.zeros((32, 8), np.int32)
    module(mode).launch("shuffled", (1,), (32,), (x, y, np.int32(width)))
    first = x // width * width
    down, up = np.where(x % width + 2 < width, x + 2, x), np.where(x % width >= 2, x - 2, x)
    for column, want in enumerate((first + 5, x ^ 3, down, up, np.full(32, 2), np.full(32, 11), np.full(32, 16), 31 - x)):
        assert np.array_equal(y[:, column], want), column


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('asm("bfind.u32 %0, %1;" : "=r"(y[0]) : "r"(1));', "does not know: bfind"),
        ('asm("ex2.approx.f32 %0, %3;" : "=r"(y[0]) : "r"(1));', "names an operand"),
        ('asm volatile("cp.async.cg.shared.global [%0], [%1], 8;" :: "r"(0), "l"(y));', "cp.async of 8 bytes"),
    ],
)
def test_instructions_that_cannot_be_run_are_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "odd.cu"
    path.write_text(f'extern "C" __global__ void odd(unsigned* y) {{ {text} }}\n')
    with pytest.raises(cusim.Fault, match=message):
        cusim.Module(path).launch("odd", (1,), (1,), (np.zeros(4, np.uint32),))


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
def test_the_pieces_are_taken_by_nvidias_compiler_as_they_are(architecture: str) -> None:
    from tests import cuda_audit

    try:
        compiler = cuda_audit.Nvrtc()
    except FileNotFoundError as e:
        pytest.skip(str(e))
    cubin, _ = compiler.compile(source(PIECES), PIECES.name, architecture)
    assert cubin[:4] == b"\x7fELF"


# ---------------------------------------------------------------------------------------------------------------------- traffic


@pytest.mark.parametrize(
    ("stride", "bytes_", "passes", "phases"),
    [
        *((stride, 4, passes, 1) for stride, passes in ((0, 1), (1, 1), (2, 2), (4, 4), (16, 16), (32, 32), (33, 1))),
        *((stride, 8, passes, 2) for stride, passes in ((2, 2), (4, 4), (32, 32), (34, 2))),
        *((stride, 16, passes, 4) for stride, passes in ((4, 4), (8, 8), (32, 32), (36, 4))),
    ],
)
def test_bank_conflicts_of_strides(stride: int, bytes_: int, passes: int, phases: int) -> None:
    args = (np.zeros(32, np.float32), np.int32(stride), np.int32(bytes_))
    module("check").launch("banks", (1,), (32,), args, shared=4 * (32 * max(1, stride) + 4), count=True)
    (row,) = [r for r in module("check").traffic() if r.memory == "shared" and r.kind == "load"]
    assert (row.bytes, row.requests, row.passes, row.phases) == (bytes_, 1, passes, phases)


def test_structs_may_be_pointed_to(tmp_path: Path) -> None:
    path = tmp_path / "vectors.cu"
    path.write_text('extern "C" __global__ void twice(float4* x, bool on) { if (on) x[threadIdx.x].w *= 2.0f; }\n')
    built, x = cusim.Module(path), np.ones((2, 4), np.float32)
    built.launch("twice", (1,), (2,), (x, np.bool_(True)))
    assert np.array_equal(x, [[1, 1, 1, 2]] * 2)
    with pytest.raises(TypeError, match="16-byte structs"):
        built.launch("twice", (1,), (1,), (np.ones(3, np.float32), np.bool_(True)))


# --------------------------------------------------------------------------------------------------------------------- coverage


def test_every_line_of_device_code_runs() -> None:
    with probes.unwritten_is_nan():
        found = coverage.measure(probes.registry())
    assert {p.name for p in FOLDER.glob("*.cu*")} == found.keys()
    assert not {name: lines.missed for name, lines in found.items() if lines.missed}


WEAK = """
__device__ float half_of(float v) {
  return v / 2.0f;
}
extern "C" __global__ void halve(const float* x, float* y, int n, int twice) {
  __shared__ float s[64];
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  s[threadIdx.x] = i < n ? x[i] : 0.0f;
  __syncthreads();
  float v = s[threadIdx.x];
  if (twice)
    v = half_of(v);
  if (i < n) y[i] = half_of(v);
}
"""
WEAK_PROBE = """
import numpy as np

def one_block(device):
    x, y = np.ones(64, np.float32), np.zeros(64, np.float32)
    device.launch("weak", "halve", (1,), (64,), (x, y, np.int32(64), np.int32(0)))
    assert (y == x / 2).all()

def helper(a, b):
    pass
"""


@pytest.fixture
def weak(tmp_path: Path) -> probes.Project:
    (tmp_path / "weak.cu").write_text(WEAK)
    (tmp_path / "weak.py").write_text(WEAK_PROBE)
    return probes.script(tmp_path / "weak.py")


def test_a_line_that_did_not_run_is_shown(weak: probes.Project) -> None:
    found = coverage.measure(weak)
    assert found["weak.cu"].missed == [12]
    assert re.search(r"weak\.cu +\d+ +\d+\.\d% .* 12$", coverage.table(found))


# ---------------------------------------------------------------------------------------------------------------------- mutants


def test_mutants_of_a_text() -> None:
    text = (FOLDER.parent / "none.cu", WEAK)[1]
    found = {(m.line, m.kind, m.before, m.after) for m in mutants.find("weak.cu", text)}
    assert found == {
        (3, "operator", "/", "*"),
        (3, "constant", "2.0f", "(2 * 2.0f)"),
        (6, "constant", "64", "63"),
        (7, "operator", "*", "/"),
        (7, "operator", "+", "-"),
        (8, "statement", "s[threadIdx.x] = i < n ? x[i] : 0.0f;", "(nothing)"),
        (8, "comparison", "<", "<="),
        (8, "constant", "0.0f", "1.0f"),
        (9, "barrier", "__syncthreads();", "(nothing)"),
        (11, "condition", "twice", "its opposite"),
        (12, "statement", "v = half_of(v);", "(nothing)"),
        (13, "statement", "y[i] = half_of(v);", "(nothing)"),
        (13, "comparison", "<", "<="),
    }


def test_declarations_templates_and_macros_are_read_as_what_they_are() -> None:
    text = """
#define KERNEL(NAME, N) \\
  extern "C" __global__ void __launch_bounds__(256) NAME(float* x, int n) { \\
    run<N>(x, n + 1); \\
  }
template <int N> __device__ void run(float (&to)[4], const float* from) {
  float sums[4][8] = {}, *last = from + N;
#pragma unroll 4
  for (int i = 0; i < 4; ++i)
    if (sums && from || last) to[i] = sums[i][N];
  load<4>(to, from);
}
KERNEL(one, 1)
"""
    found = [(m.line, m.kind, m.before, m.after) for m in mutants.find("a.cu", text)]
    assert found == [
        (4, "statement", "run<N>(x, n + 1);", "(nothing)"),
        (4, "operator", "+", "-"),
        (4, "constant", "1", "2"),
        (7, "operator", "+", "-"),
        (9, "constant", "0", "1"),
        (9, "comparison", "<", "<="),
        (9, "constant", "4", "5"),
        (10, "condition", "sums", "true"),
        (10, "condition", "sums && from", "false"),
        (10, "condition", "from", "true"),
        (10, "condition", "last", "false"),
        (10, "statement", "to[i] = sums[i][N];", "(nothing)"),
        (10, "index", "[i][N]", "[N][i]"),
        (11, "statement", "load<4>(to, from);", "(nothing)"),
    ]


def test_mutants_that_a_weak_test_leaves(weak: probes.Project) -> None:
    run = mutation.Run(weak)
    verdicts = {(m.line, m.before): v for m, v in mutation.judge(run, fresh=True).items()}
    by = {place: v.by for place, v in verdicts.items()}
    assert by[12, "v = half_of(v);"] == by[8, "0.0f"] == "unreached" and by[7, "*"] == by[9, "__syncthreads();"] == ""
    assert by[11, "twice"] == by[3, "/"] == by[13, "y[i] = half_of(v);"] == "forward" and by[6, "64"] == "check"
    assert verdicts[7, "*"].same_bits
    left = {(m.line, m.before) for m, _ in mutation.survivors({m: verdicts[m.line, m.before] for m in run.mutants}, {})}
    assert left == {(12, "v = half_of(v);"), (7, "*"), (8, "0.0f"), (8, "<"), (9, "__syncthreads();"), (13, "<")}


def test_a_mutant_that_never_ends_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mutation, "LEAST_TIME", 1.0)
    (tmp_path / "loop.cu").write_text('extern "C" __global__ void loop(int* x) {\n  while (x[0] != 0) {\n    x[0] = 0;\n  }\n}\n')
    (tmp_path / "loop.py").write_text(
        "import numpy as np\n\ndef probe(device):\n"
        "    x = np.ones(1, np.int32)\n    device.launch('loop', 'loop', (1,), (1,), (x,))\n    assert x == 0\n"
    )
    run = mutation.Run(probes.script(tmp_path / "loop.py"))
    found = {
        m.before: v.by for m, v in mutation.judge(run, [m for m in run.mutants if m.kind == "statement"], fresh=True).items()
    }
    assert found == {"x[0] = 0;": "time"}


def test_explanations_are_of_mutants_that_there_are() -> None:
    keys = {m.key for p in FOLDER.glob("*.cu*") for m in mutants.find(p.name, p.read_text())}
    reasons = mutation.explained()
    assert not reasons.keys() - keys
    assert all(len(reason) > 20 for reason in reasons.values())


def test_a_sample_of_the_projects_mutants_is_noticed_or_explained() -> None:
    with probes.unwritten_is_nan():
        whole = probes.registry()
        few = tuple(p for p in whole.probes if any(word in p.name for word in ("softmax", "cross_entropy", "rows", "label")))
        run = mutation.Run(probes.Project(whole.folder, few), ["softmax.cu"])
        verdicts = mutation.judge(run, mutation.sample(run.mutants, 24), fresh=True)
    assert len(verdicts) == 24 and sum(v.killed for v in verdicts.values()) > 12
    assert not mutation.survivors(verdicts, mutation.explained())


# ------------------------------------------------------------------------------------------------------------- the command line


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the README's example."""
    folder = tmp_path_factory.mktemp("example")
    blocks = dict(re.findall(r"^```(cuda|python)\n(.*?)^```", (HERE / "README.md").read_text(), re.MULTILINE | re.DOTALL))
    (folder / "transpose.cu").write_text(blocks["cuda"])
    (folder / "transpose.py").write_text(blocks["python"])
    return folder / "transpose.py"


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["run"], 0, "random: 1 of 1 are right"),
        (["check"], 0, "forward: 1 of 1 are right"),
        (["traffic"], 0, r"transpose\.cu:6 +shared load +4 +128 +32\.00"),
        (["traffic", "--bad"], 0, r"^line [^\n]*\ntranspose\.cu:6 +shared load +4 +128 +32\.00\n$"),
        (["coverage"], 0, r"transpose\.cu +6 +100\.0%"),
        (["mutate"], 0, r"\| transpose\.cu \| 19 \| 19 \|"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_commands_on_the_example_of_the_page(
    words: list[str], code: int, text: str, example: Path, capsys: pytest.CaptureFixture
) -> None:
    assert command.main([words[0], str(example), *words[1:]]) == code
    assert re.search(text, capsys.readouterr().out)


def test_commands_say_what_is_wrong(example: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    broken = tmp_path / "transpose.py"
    broken.write_text(example.read_text())
    (tmp_path / "transpose.cu").write_text(example.with_suffix(".cu").read_text().replace("  __syncthreads();\n", ""))
    assert command.main(["check", str(broken), "--order", "forward"]) == 1
    assert "race: read after write, shared tile at transpose.cu:5" in capsys.readouterr().out
    assert command.main(["run", str(broken)]) == 1
    assert command.main(["run", str(tmp_path / "none.py")]) == 2
    (tmp_path / "empty.py").write_text("")
    assert command.main(["run", str(tmp_path / "empty.py")]) == 2
    assert "no function with one parameter named device" in capsys.readouterr().err


def test_wasted_accesses_of_one_kernel_add_up(example: Path) -> None:
    rows = traffic.measure(probes.script(example))
    assert traffic.added([*rows, *rows])[0].requests == 2 * rows[0].requests
    assert [r.line for r in rows] == ["transpose.cu:4"] * 2 + ["transpose.cu:6"] * 2
    assert sys.modules["tests.cusim"].Traffic is type(rows[0])
