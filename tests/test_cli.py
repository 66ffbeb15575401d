"""`alphabar`: one name for all commands."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import alphabar
from alphabar import kernels
from alphabar.nets import checkpoint
from alphabar.tools import cli, info, train


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"alphabar {alphabar.__version__}\n"


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in cli.COMMANDS)
    assert cli.main([]) == 2


@pytest.mark.parametrize("command", ["train", "train-classifier", "sample", "make-dataset", "info"])
def test_help_of_a_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, "--help"]) == 0
    assert f"usage: alphabar {command}" in capsys.readouterr().out


@pytest.mark.parametrize(("word", "hint"), [("trian", "'train'"), ("makedataset", "'make-dataset'"), ("zzz", "the commands are")])
def test_an_unknown_command(word: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([word]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and hint in err


def test_the_installed_command() -> None:
    program = Path(sys.executable).parent / "alphabar"
    if not program.exists():
        pytest.skip("alphabar is not installed beside this Python")
    out = subprocess.run([program, "sample", "nothing"], capture_output=True, text=True)
    assert out.returncode == 2 and out.stderr == "alphabar sample: error: nothing: No such file or directory\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("words", ["equations", "equations S0-E28", "check ddim --steps 5"])
def test_an_output_that_cannot_be_written(words: str) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "alphabar.tools.cli", *words.split()]
        out = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert out.returncode == 1 and out.stderr.count("\n") == 1, out.stderr
    assert "the output could not be written (No space left on device)" in out.stderr


@pytest.mark.parametrize("name", ["ALPHABAR_THREADS", "ALPHABAR_KERNELS", "ALPHABAR_PRECISION"])
def test_a_bad_variable_of_the_environment(name: str, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "alphabar.tools.cli", "train", "--dry-run", "--device", "cpu", "--quiet"]
    out = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env={"PATH": "", name: "many"})
    assert out.returncode == 2 and f"alphabar train: error: {name} must be" in out.stderr and "Traceback" not in out.stderr


def test_info_of_a_data_set(capsys: pytest.CaptureFixture[str]) -> None:
    assert info.main(["digits"]) == 0
    out = capsys.readouterr().out
    assert "1,797 of 8×8×1" in out and "1,442 train, 355 test" in out and "sha256" in out


def test_a_terminal_without_unicode() -> None:
    words = [sys.executable, "-m", "alphabar.tools.info", "digits"]
    out = subprocess.run(words, capture_output=True, text=True, env={"PATH": "", "PYTHONIOENCODING": "ascii"})
    assert out.returncode == 0 and r"1,797 of 8\xd78\xd71" in out.stdout and not out.stderr


def test_the_bar_shows_on_a_terminal_of_unknown_size() -> None:
    """Such as that of `script`, `docker run -t` or a CI job: 0 rows of 0 columns."""
    pty = pytest.importorskip("pty")
    code = "from alphabar.tools.progress import Progress\nwith Progress('work', 2) as bar:\n  bar.advance()\n  bar.advance()\n"
    ours, theirs = pty.openpty()
    subprocess.run([sys.executable, "-c", code], stderr=theirs, check=True, env={"PATH": ""})
    os.close(theirs)
    shown = os.read(ours, 1 << 16).decode(errors="replace")
    os.close(ours)
    assert "work 100%" in shown and "2/2" in shown


def test_info_of_a_run_and_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["model.channels=8", "model.blocks=1", "model.attention=", "model.groups=4", "train.batch=4", "train.warmup=0"]
    words = ["--steps", "2", "--out", str(tmp_path), "--name", "r", "--quiet", "--device", "cpu", "--set", "sample.steps=1"]
    with kernels.use("reference"):
        assert train.main([*words, *(w for s in settings for w in ("--set", s))]) == 0
    for path in (tmp_path / "r", checkpoint.step_path(tmp_path / "r" / "ckpt", 2)):
        assert info.main([str(path)]) == 0
        out = capsys.readouterr().out
        assert "step_00000002.h5" in out and "alphabar-training" in out and "weights/" in out and "data.name" in out
        assert ("metrics" in out) == path.is_dir()
    other = checkpoint.save(tmp_path / "other.h5", {"a/b": np.ones(3)}, {"kind": "else"})
    assert info.main([str(other)]) == 0
    assert "else" in capsys.readouterr().out


@pytest.mark.parametrize("path", ["/no/such", "/dev/null", __file__])
def test_info_of_what_it_does_not_know(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert info.main([path]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and path in err
