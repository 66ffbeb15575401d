"""Start-up: compiled code on disk, compiling ahead, `alphabar warmup`, and what is said meanwhile."""

import io
import itertools
import os
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite
import numba
import numpy as np
import pytest

from alphabar import kernels
from alphabar.kernels import TABLE, compile, compiling, warm
from alphabar.kernels.cpu import kept
from alphabar.tools import command, warmup
from alphabar.tools import compiling as shown
from alphabar.tools.progress import Progress

ROOT = Path(kernels.__file__).parent


# ---------------------------------------------------------------------------------------------------------- code kept on disk


def successor(x: Any) -> Any:
    return x + 1


def adder(n: Any) -> Callable[[Any], Any]:
    def add(x: Any) -> Any:
        return x + n

    return add


def compiled(f: Callable[..., Any], *folders: Path) -> Any:
    dispatcher = numba.njit(f)
    dispatcher._cache = kept.Kept(f, folders)
    return dispatcher


def hits(dispatcher: Any) -> int:
    return sum(dispatcher.stats.cache_hits.values())


def test_code_is_found_again_for_each_signature(tmp_path: Path) -> None:
    first = compiled(successor, tmp_path)
    assert (first(1), first(1.5)) == (2, 2.5) and len(list(tmp_path.iterdir())) == 2 and not hits(first)
    again = compiled(successor, tmp_path)
    assert (again(1), again(1.5)) == (2, 2.5) and hits(again) == 2 and not again.stats.cache_misses
    again.recompile()
    assert again(1) == 2 and len(list(tmp_path.iterdir())) == 2  # compiled and kept anew
    again.disable_compile()
    assert again.stats.cache_path == str(tmp_path)


def test_code_is_read_from_a_second_folder(tmp_path: Path) -> None:
    here, there = tmp_path / "a", tmp_path / "b"
    compiled(successor, there)(1)
    dispatcher = compiled(successor, here, there)
    assert dispatcher(1) == 2 and hits(dispatcher) == 1 and not here.exists()


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b[:500] + bytes([b[500] ^ 1]) + b[501:]])
def test_a_damaged_file_is_compiled_anew(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    compiled(successor, tmp_path)(1)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    again = compiled(successor, tmp_path)
    assert again(1) == 2 and not hits(again)
    assert list(tmp_path.iterdir()) == [path] and path.stat().st_size == len(whole)


def test_functions_of_a_factory_are_told_apart(tmp_path: Path) -> None:
    inner = numba.njit(adder(7))
    kinds = [adder(1), adder(2), adder((1, 2)[0] + 2), adder(np.float32(4)), adder(numba.int64(3)), adder(True)]

    def through(x: Any) -> Any:
        return inner(x)

    for f in (*kinds, through):
        assert compiled(f, tmp_path)(10) == f(10)
    files = len(list(tmp_path.iterdir()))
    assert files == len({10 + 1, 10 + 2, 10 + 3, 14.0, "3", True}) + 1
    for f in (*kinds, through):
        again = compiled(f, tmp_path)
        assert again(10) == f(10) and hits(again) == 1


def test_what_has_no_name_elsewhere_is_not_kept(tmp_path: Path) -> None:
    array = np.ones(3)

    def total(x: Any) -> Any:
        return array.sum() + x

    dispatcher = kept.keep(numba.njit(total))
    assert isinstance(dispatcher._cache, numba.core.caching.NullCache) and dispatcher(1) == 4


def test_a_full_disk_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    dispatcher = compiled(successor, tmp_path / "file" / "inside")
    with pytest.warns(UserWarning, match="compiled kernels are not kept in"):
        assert dispatcher(1) == 2


def test_the_folder_is_named_by_the_content_of_the_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "_HERE", tmp_path / "cpu")
    (tmp_path / "cpu").mkdir()
    (tmp_path / "reference").mkdir()
    source = tmp_path / "cpu" / "f.py"
    names = []
    for text in ("a = 1", "a = 2", "a = 1"):
        source.write_text(text)
        names.append(kept.version.__wrapped__())
    assert names[0] == names[2] != names[1]
    os.utime(source, (1, 1))  # times say nothing
    (tmp_path / "checks.py").write_text("not compiled from")
    assert kept.version.__wrapped__() == names[0]
    (tmp_path / "reference" / "g.py").write_text("RUN = 4")
    assert kept.version.__wrapped__() != names[0]
    monkeypatch.setattr(llvmlite, "__version__", "another")
    assert kept.version.__wrapped__() not in names


def test_where_code_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "_HERE", tmp_path / "cpu")
    monkeypatch.setattr(kept.config, "CACHE_DIR", str(tmp_path / "given"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    (tmp_path / "cpu").mkdir()
    beside = tmp_path / "cpu" / "__pycache__" / kept.version()
    assert kept.folders.__wrapped__() == (tmp_path / "given" / kept.version(),)
    monkeypatch.setattr(kept.config, "CACHE_DIR", "")
    assert kept.folders.__wrapped__() == (beside,)
    (tmp_path / "cpu" / "__pycache__").rmdir()
    (tmp_path / "cpu" / "__pycache__").write_text("no folder: as where nothing can be written")
    assert kept.folders.__wrapped__() == (tmp_path / "user" / kept.version(), beside)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cpu" / "__pycache__" / "x"))
    assert kept.folders.__wrapped__() == ()


def test_old_folders_are_swept(tmp_path: Path) -> None:
    for i in range(12):
        folder = tmp_path / f"alphabar-{i}"
        folder.mkdir()
        os.utime(folder, (i, i))
    (tmp_path / "other").mkdir()
    compiled(successor, tmp_path / "alphabar-new")(1)
    left = {p.name for p in tmp_path.iterdir()}
    assert left == {"other", "alphabar-new", *(f"alphabar-{i}" for i in range(12 - kept._VERSIONS + 1, 12))}


def test_symbols_of_two_processes_are_never_equal() -> None:
    code = "import alphabar.kernels.cpu; from numba.core.bytecode import FunctionIdentity as F; print(next(F._unique_ids))"
    numbers = [int(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout) for _ in range(2)]
    assert abs(numbers[0] - numbers[1]) > 10_000


# ------------------------------------------------------------------------------------------------------------ compiling ahead

FEW = ("sum_squares", "silu_backward")
RUN = """
import sys
from alphabar.kernels import compiling, warm
few = {few}
warm.NAMES = few
warm.pending.__defaults__ = (few,)
class Names:
    def begin(self, name): names.append(name)
    def end(self, name): pass
names = []
"""


def fresh(code: str, cache: Path, **environment: str) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("NUMBA_", "ALPHABAR_"))}
    env |= {"NUMBA_CACHE_DIR": str(cache), **environment}
    return subprocess.run([sys.executable, "-c", RUN.format(few=FEW) + code], env=env, capture_output=True, text=True, check=True)


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A folder that `alphabar warmup` has filled with two kernels, and what it said."""
    cache = tmp_path_factory.mktemp("cache")
    done = fresh("from alphabar.tools import warmup\nassert warmup.main(['--device', 'cpu', '--processes', '2']) == 0", cache)
    return cache, done.stdout, done.stderr


def test_warmup_says_what_it_does(ready: tuple[Path, str, str]) -> None:
    cache, out, err = ready
    assert out.startswith("2 of 2 kernels compiled in ") and str(cache / kept.version()) in out
    assert "compiling 2 kernels for this machine, once, in 2 processes" in err
    again = fresh("from alphabar.tools import warmup\nassert warmup.main(['--device', 'cpu']) == 0", cache)
    assert again.stdout.startswith("2 kernels are ready: ") and not again.stderr


def test_what_was_compiled_ahead_is_not_compiled_again(ready: tuple[Path, str, str]) -> None:
    code = "with compiling.told(Names()):\n    for name in few: warm.run(name)\nprint(names, warm.pending())"
    assert fresh(code, ready[0]).stdout == "[] []\n"
    other = fresh(code, ready[0], NUMBA_CPU_NAME="x86-64", NUMBA_CPU_FEATURES="").stdout  # another processor's is never taken
    assert "optim.sum_squares" in other and other.endswith(" ['sum_squares', 'silu_backward']\n")


def test_a_stop_ends_the_other_processes(tmp_path: Path) -> None:
    code = """
import subprocess
began, plain = [], warm._worker
warm._worker = lambda: began.append(plain()) or began[-1]
for name in warm.compiled(few, 2):
    break
del name
print([w.poll() is not None for w in began])
"""
    assert fresh(code, tmp_path).stdout == "[True, True]\n"


def test_processes_that_fail_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm.sys, "executable", "/bin/false")
    assert list(warm.compiled(("sum_squares", "silu"), 2)) == []


def test_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    marked: list[str] = []
    monkeypatch.setattr(kept, "mark", marked.append)
    assert list(warm.compiled(FEW, 1)) == list(FEW) == marked
    monkeypatch.setattr(kept, "marked", lambda name: name == FEW[0])
    assert warm.pending(FEW) == [FEW[1]]


def test_only_what_is_pending_is_compiled_ahead(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(warm, "keeps", lambda: True)
    monkeypatch.setattr(warm, "processes", lambda: 4)
    monkeypatch.setattr(warm, "pending", lambda names: [n for n in names if "conv2d" in n])
    monkeypatch.setattr(warm, "compiled", lambda names, workers: asked.append((names, workers)) or iter(names))
    shown.ahead(shown.needed("unet", "ddpm", training=True))
    three = ["conv2d", "conv2d_backward_input", "conv2d_backward_weight"]
    assert asked == [(three, 4)]
    assert capsys.readouterr().err == "compiling 3 kernels for this machine, once, in 3 processes …\n"
    shown.ahead(three, quiet=True)
    assert not capsys.readouterr().err


def test_the_definitions_need_no_compiling(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(warm, "pending", lambda names: pytest.fail("asked what is compiled"))
    with kernels.use("reference"):
        shown.ahead(["silu"])
    assert not capsys.readouterr().err


COVERED = """
import gc, sys
from numba.core.dispatcher import Dispatcher
from alphabar.kernels import warm
from alphabar.tools import compiling, train

def code():
    mine = [d for d in gc.get_objects() if isinstance(d, Dispatcher) and d.py_func.__module__.startswith("alphabar.")]
    return {(d.py_func.__module__, d.py_func.__name__, s) for d in mine for s in d.overloads}

network, method, *words = sys.argv[1:]
for name in compiling.needed(network, method, True):
    warm.run(name)
before = code()
assert train.main([*words, "--set", f"method={method}", "--steps", "1", "--device", "cpu", "--quiet"]) == 0
print(*sorted({".".join(map(str, c)) for c in code() - before}), sep="\\n")
"""
SMALL = {
    "digits": ("model.channels=16,32", "model.blocks=1", "train.batch=4", "sample.columns=2", "sample.steps=2"),
    "kjv": ("model.width=48", "model.layers=1", "model.heads=2", "train.batch=4", "data.length=24", "sample.columns=1"),
}


KINDS = (
    ("unet", "ddpm", "digits"),
    ("unet", "d3pm", "digits"),
    ("transformer", "d3pm", "kjv"),
    ("word-diffusion", "diffusion-lm", "kjv"),
)


@pytest.mark.parametrize(("network", "method", "data"), KINDS)
def test_all_that_a_training_needs_is_compiled_ahead(network: str, method: str, data: str, tmp_path: Path) -> None:
    words = [network, method, "--data", data, "--out", str(tmp_path), *(w for s in SMALL[data] for w in ("--set", s))]
    done = subprocess.run([sys.executable, "-c", COVERED, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


# ------------------------------------------------------------------------------------------------------------- what is said


class Recorded:
    def __init__(self) -> None:
        self.calls: list[str] = []

    def begin(self, name: str) -> None:
        self.calls.append(f"+{name}")

    def end(self, name: str) -> None:
        self.calls.append(f"-{name}")


def test_others_functions_without_a_module_are_compiled_as_ever() -> None:
    space: dict[str, Any] = {}
    exec("def increment(x): return x + 1", space)
    assert space["increment"].__module__ is None
    assert numba.njit(space["increment"])(1) == 2


def test_listeners_are_told_also_of_failures() -> None:
    first, second = Recorded(), Recorded()
    with compiling.told(first):
        with compiling.told(second), pytest.raises(ValueError), compiling.compiling("a"):
            raise ValueError
        compiling.begin("b")
    compiling.end("b")
    assert first.calls == ["+a", "-a", "+b"] and second.calls == ["+a", "-a"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_one_line_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(shown, "AFTER", 0.05)
    with compiling.told(shown.Told("train")):
        with compiling.compiling("conv.gather"):
            pass
        time.sleep(0.1)
        assert not capsys.readouterr().err  # it took no time
        for _ in range(3):
            with compiling.compiling("conv.gather"), compiling.compiling("conv.panel"):
                time.sleep(0.1)
    assert capsys.readouterr().err == f"alphabar train: {shown.WHAT} …\n"


def test_the_names_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", screen := Terminal())
    monkeypatch.setattr(shown, "AFTER", 0.0)
    with compiling.told(shown.Told("train")):
        for name in ("conv.gather", "norm.forward"):
            with compiling.compiling(name):
                time.sleep(0.05)
    names = [f"\r\x1b[K{shown.WHAT}: {name} …\r\x1b[K" for name in ("conv.gather", "norm.forward")]
    assert screen.getvalue() == "".join(names)


def test_quiet_programs_say_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(shown, "AFTER", 0.0)

    @command.program("work")
    def main(argv: Any = None) -> int:
        with compiling.compiling("conv.gather"):
            time.sleep(0.05)
        return 0

    assert main(["--quiet"]) == 0 and not capsys.readouterr().err
    assert main([]) == 0 and capsys.readouterr().err == f"alphabar work: {shown.WHAT} …\n"


# ---------------------------------------------------------------------------------------------------------------- on a GPU


def test_warmup_of_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    made, count = [], itertools.count()

    def module(code: str, options: tuple[str, ...]) -> Any:
        return types.SimpleNamespace(compile=lambda: made.append(code), get_function=lambda name: next(count))

    device = types.SimpleNamespace(runtime=types.SimpleNamespace(getDevice=lambda: 0))
    cupy = types.SimpleNamespace(cuda=device, RawModule=module)
    monkeypatch.setattr(compile, "require_gpu", lambda index=0: cupy)
    monkeypatch.setattr(warmup, "device", lambda text: (cupy, "cuda:0"))
    assert warmup.main(["--device", "cuda"]) == 0
    files = [path for path in compile.FOLDER.glob("*.cu")]
    assert len(made) == len(set(made)) == len(files)
    assert f"{len(files)} files of kernels ready" in capsys.readouterr().out
    heard = Recorded()
    with compiling.told(heard):
        cuda = compile.Cuda()
        assert (cuda.kernel("conv", "f"), cuda.kernel("conv", "f"), cuda.kernel("conv", "g")) == (0, 0, 1)
    assert heard.calls == ["+conv.cu", "-conv.cu"] * 2


def test_nowhere_to_keep_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(kept, "folders", lambda: ())
    assert kept.marked("silu") and not warm.keeps()
    assert warmup.main(["--device", "cpu"]) == 1
    assert "name one by NUMBA_CACHE_DIR" in capsys.readouterr().err


def test_every_kernel_has_cases_to_compile_by() -> None:
    assert all(kernel.tests for kernel in TABLE.values())
    assert set(shown.needed("unet", "ddpm", True)) | set(shown.needed("transformer", "d3pm", True)) == set(warm.NAMES)
    assert not any("backward" in name for name in shown.needed("unet", "ddpm", False))


def test_progress_of_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown.show([], 2, False) == []
    with Progress("work", 0):
        pass
    assert not capsys.readouterr().err
