"""The house: arrows go down only, floors are light to import, no framework inside the product, everything is in the wheel."""

import ast
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ALLOWED = {
    "kernels": {"kernels"},
    "core": {"core", "kernels"},
    "nets": {"nets", "kernels"},
    "tools": {"tools", "core", "nets", "kernels"},
}
FRAMEWORKS = {"torch", "jax", "tensorflow", "diffusers", "keras", "mxnet"}
HEAVY = {"numba", "cupy", "matplotlib", "PIL", "h5py", "safetensors"}  # loaded by the call that needs them, or in a backend file


def modules(floor: str) -> list[Path]:
    return sorted((ROOT / floor).rglob("*.py"))


def imported(source: str, folders: tuple[str, ...]) -> set[str]:
    """Absolute names of what a source imports; a relative import is resolved from the folders that hold the file."""
    package = ["alphabar", *folders]
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            names |= {f"{stem}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("floor", ALLOWED)
def test_imports_run_down_only(floor: str) -> None:
    wrong = []
    for path in modules(floor):
        for name in imported(path.read_text(encoding="utf-8"), path.relative_to(ROOT).parts[:-1]):
            parts = name.split(".")
            if parts[0] == "alphabar" and len(parts) > 1 and parts[1] not in ALLOWED[floor] | {"__version__"}:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
            if parts[0] in FRAMEWORKS:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_an_arrow_up_or_sideways_is_seen() -> None:
    source = "from ..nets import unet\nfrom ..tools.train import main\nimport alphabar.nets\nfrom . import forward"
    assert imported(source, ("core",)) == {
        "alphabar.nets.unet",
        "alphabar.tools.train.main",
        "alphabar.nets",
        "alphabar.core.forward",
    }


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/").stdout.strip()


@pytest.mark.parametrize("module", ["alphabar", "alphabar.core", "alphabar.kernels", "alphabar.nets", "alphabar.tools"])
def test_import_is_light(module: str) -> None:
    loaded = run(f"import sys, {module}; print(*sys.modules)").split()
    assert not (HEAVY | FRAMEWORKS) & set(loaded)


def test_import_of_core_takes_well_under_half_a_second() -> None:
    code = "import time, numpy; t = time.perf_counter(); import alphabar.core.samplers; print(time.perf_counter() - t)"
    assert min(float(run(code)) for _ in range(3)) < 0.25


COLLECT = """
import sys, pytest
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in MISSING:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
sys.exit(pytest.main(["--co", "-qq", "tests"]))
"""


def test_the_tests_are_collected_where_only_the_product_is_installed() -> None:
    code = COLLECT.replace("MISSING", str(sorted(FRAMEWORKS | {"cupy", "sklearn"})))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-2000:]


def test_version_is_one() -> None:
    import alphabar

    out = subprocess.run(
        [sys.executable, "-m", "alphabar.tools.cli", "--version"], capture_output=True, text=True, check=True, cwd="/"
    )
    assert alphabar.__version__ in out.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[set[str], set[str]]:
    """Names in a wheel and in an sdist made from a copy of the checkout."""
    pytest.importorskip("build", reason="the build front end is not installed")
    source = tmp_path_factory.mktemp("source") / "alphabar"
    shutil.copytree(
        ROOT, source, ignore=shutil.ignore_patterns(".git", ".links", "runs", "*.egg-info", "build", "dist", ".*cache", "results")
    )
    out = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source], check=True, capture_output=True, cwd="/"
    )
    wheel = set(zipfile.ZipFile(next(out.glob("*.whl"))).namelist())
    with tarfile.open(next(out.glob("*.tar.gz"))) as tar:
        sdist = {name.partition("/")[2] for name in tar.getnames()}
    return wheel, sdist


def test_wheel_and_sdist_hold_sources_and_data(built: tuple[set[str], set[str]]) -> None:
    wheel, sdist = built
    wanted = {
        str(p.relative_to(ROOT))
        for floor in ALLOWED
        for p in (ROOT / floor).rglob("*")
        if p.is_file() and p.suffix in {".py", ".cu", ".cuh", ".h5", ".md", ".txt"} and "__pycache__" not in p.parts
    } | {"py.typed", "__init__.py"}
    assert {f"alphabar/{name}" for name in wanted} <= wheel
    assert wanted | {"LICENSE", "README.md", "setup.py", "pyproject.toml"} <= sdist
    assert not {name for name in wheel if name.startswith(("tests/", "bench/", "alphabar/tests", "alphabar/bench"))}
