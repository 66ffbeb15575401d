"""The judge of sampled text, on samples whose properties, words and copies are known."""

import importlib.util
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alphabar.core import text
from alphabar.tools import dataset_file, sheets

TRAIN = "in the beginning god created the heaven and the earth and the earth was without form and void "
NEW = "a spirit of god moved upon the face of all these waters and light was called day "


@pytest.fixture(scope="module")
def judge() -> Any:
    path = Path(__file__).parents[1] / "bench" / "judge_text.py"
    spec = importlib.util.spec_from_file_location("judge_text", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    learned, kept = (" ".join(rng.permutation(s.split())) for s in (TRAIN * 30, NEW * 4))
    (tmp_path / "reference.txt").write_text(f"{learned} {kept}")
    return tmp_path / "reference.txt"


def numbers(out: str, line: str) -> list[float]:
    found = next(row for row in out.splitlines() if row.startswith(line))
    return [float(v) for v in re.findall(r"-?\d+\.?\d*", found)]


def test_copies_nonsense_and_a_property(judge: Any, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = text.load(reference, "train", 40)
    copies = [whole.decode(whole.tokens[k : k + 40]) for k in (0, 101, 502, 1003)]
    rng = np.random.default_rng(1)
    nonsense = ["".join(rng.choice(list("qxzjkv "), 40)) for _ in range(4)]
    found = {}
    for name, samples in (("copies", copies), ("nonsense", nonsense)):
        sheets.write_text("run.h5, ddpm 5 steps, seed 0", samples, tmp_path / "s.txt")
        assert judge.main([str(tmp_path / "s.txt"), "--reference", str(reference), "--property", "word:the", "--order", "3"]) == 0
        found[name] = capsys.readouterr().out
    share, n, held_out = numbers(found["copies"], "property")
    assert n == 4 and share == np.mean(["the" in s.split() for s in copies]) and 0 <= held_out <= 1
    assert numbers(found["nonsense"], "property")[0] == 0
    assert numbers(found["copies"], "likelihood")[0] + 2 < numbers(found["nonsense"], "likelihood")[0]
    assert numbers(found["copies"], "words")[0] == 1 and numbers(found["nonsense"], "words")[0] < 0.2
    median, most, length = numbers(found["copies"], "copies")
    assert most == length == 40 and median >= 38
    assert numbers(found["nonsense"], "copies")[1] < 8
    asked = [str(tmp_path / "s.txt"), "--reference", str(reference), "--property", "word:the", "--at-least", "0.5"]
    assert judge.main(asked) == 1 and "below the 0.50 asked for" in capsys.readouterr().err


def test_what_it_reads(judge: Any, tmp_path: Path) -> None:
    texts = ["and the earth was " * 8, "let there be light"]
    path = sheets.write_text("title, of god", ["in _ beginning", *texts], tmp_path / "s.txt")
    assert judge.read(path) == [s.strip() for s in texts]
    tokens = np.array([[0, 26, 1], [25, 25, 26]], np.uint8)
    assert judge.read(dataset_file.write_tokens(tmp_path / "s.h5", tokens, text.ALPHABET, {})) == ["a b", "zz "]
    assert judge.longest_run("xabcy", "zabcabz") == 3 and judge.longest_run("q", "a") == 0
    assert judge.longest_run("abab", "ab abab") == 4
    assert judge.known(["cut the earth of", "no"], {"the"}) == 0.5


def test_samples_of_a_letter_or_two(judge: Any, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for letters in ("a", "ab"):
        path = sheets.write_text("title", [letters], tmp_path / "s.txt")
        assert judge.main([str(path), "--reference", str(reference)]) == 0
        assert f"of {len(letters)} letters" in capsys.readouterr().out


def test_mistakes_end_with_one_line(judge: Any, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sheets.write_text("title", ["and the"], tmp_path / "s.txt")
    (tmp_path / "empty.txt").write_text("title\n")
    for options, message in (
        (["none.txt"], "No such file"),
        ([str(tmp_path / "empty.txt")], "holds no samples"),
        ([str(tmp_path / "s.txt"), "--property", "god"], "--property must be word:WORD"),
        ([str(tmp_path / "s.txt"), "--at-least", "0.5"], "--at-least goes with --property"),
        ([str(tmp_path / "s.txt"), "--reference", "none"], "none"),
        ([str(tmp_path / "s.txt"), "--reference", str(reference), "--order", "0"], "order"),
    ):
        with pytest.raises(SystemExit) as e:
            judge.main(options)
        assert e.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]
