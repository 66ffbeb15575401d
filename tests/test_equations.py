"""The equation map: whole, in step with the docstrings, functions and tests that it names; and the tool that shows it."""

import ast
import functools
import json
import os
import re
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

import pytest

from alphabar.core import equations
from alphabar.tools import cli
from alphabar.tools import equations as tool

ROOT = Path(__file__).resolve().parents[1]
ENTRIES = equations.entries()
ID = r"(?:S\d-[A-Z]\d*|[XNLT]\d+)"
TAG = re.compile(rf"Eq:\s*({ID}(?:,\s*{ID})*)")
COUNTS = {"S0": 87, "S1": 38, "S2": 49, "S3": 26, "S4": 109}
KINDS = {
    "S0": {"equation": 51, "problem": 12, "claim": 21, "figure": 2, "reference": 1},
    "S1": {"equation": 23, "claim": 12, "algorithm": 2, "reference": 1},
    "S2": {"equation": 19, "claim": 23, "algorithm": 2, "table": 2, "figure": 3},
    "S3": {"equation": 14, "claim": 12},
    "S4": {"equation": 81, "claim": 19, "algorithm": 2, "figure": 2, "mention": 4, "reference": 1},
}


def sources():
    return [path for floor in ("core", "kernels", "nets", "tools") for path in sorted((ROOT / floor).rglob("*.py"))]


def ids(text):
    return [name for tag in TAG.finditer(text) for name in re.findall(ID, tag[1])]


def claims_of(source, module):
    """(name, id) for every id in the docstrings of a module, its classes and functions; an inner function is its outer one."""
    found = []

    def visit(node, name, inside_function):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                own = name if inside_function else f"{name}.{child.name}"
                found.extend((own, i) for i in ids(ast.get_docstring(child) or ""))
                visit(child, own, inside_function or isinstance(child, ast.FunctionDef))

    tree = ast.parse(source)
    found.extend((module, i) for i in ids(ast.get_docstring(tree) or ""))
    visit(tree, module, False)
    return found


@functools.cache
def claims():
    found = []
    for path in sources():
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        found += claims_of(path.read_text(encoding="utf-8"), module)
    return found


@functools.cache
def cases(path):
    """The strings that decorators of a test file register, such as @erratum("X05")."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    calls = [d for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) for d in n.decorator_list if isinstance(d, ast.Call)]
    return {a.value for call in calls for a in call.args if isinstance(a, ast.Constant) and isinstance(a.value, str)}


def missing_test(name):
    """Why there is no test of that pytest name, or None."""
    if equations.locate_test(name) is None:
        return f"{name} does not exist"
    file, _, function = name.partition("::")
    plain, bracket, case = function.partition("[")
    if not plain.rpartition("::")[2].startswith("test_"):
        return f"{name} is not a test"
    if bracket and case.removesuffix("]") not in cases(ROOT / file):
        return f"{name} is not registered"
    return None


# ---------------------------------------------------------------------------------------------------------------------- the map


def test_counts_by_document():
    assert {d: sum(e.document == d for e in ENTRIES.values()) for d in COUNTS} == COUNTS and sum(COUNTS.values()) == 309
    for document, kinds in KINDS.items():
        assert Counter(e.kind for e in ENTRIES.values() if e.document == document) == kinds
    letters = Counter(name[0] for name, e in ENTRIES.items() if not e.document)
    assert letters == {"X": 44, "N": 23, "L": 12, "T": 2}


def test_every_entry_is_filled_in():
    for e in ENTRIES.values():
        assert e.state in equations.STATES and e.kind in equations.KINDS.values()
        if e.kind == "erratum":
            assert e.printed and e.right and e.place and bool(e.number) == e.id.startswith("X"), e.id
        else:
            assert e.formula and (e.line if e.document else e.place and e.source), e.id
        assert len(set(e.functions)) == len(e.functions) and len(set(e.tests)) == len(e.tests), e.id
        assert e.state == "done" or not (e.functions and e.tests), f"{e.id} has a function and a test, and is {e.state}"


def test_the_data_are_packaged():
    globs = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-data"][
        "alphabar.core"
    ]
    packaged = {path for pattern in globs for path in (ROOT / "core").glob(pattern)}
    assert len(found := set((ROOT / "core").rglob("*.toml"))) == 7 and found <= packaged


def test_lines_ascend_within_a_document():
    """By the first line of each numbered equation, so that a wrong number shows."""
    for document in COUNTS:
        numbered = [e for e in ENTRIES.values() if e.document == document and re.search(r"-E\d+$", e.id)]
        order = sorted(numbered, key=lambda e: int(e.id.rpartition("E")[2]))
        order = [
            e for e in order if not (document == "S4" and 50 < int(e.id.rpartition("E")[2]))
        ]  # its appendix is numbered apart
        lines = [int(re.match(r"\d+", e.line)[0]) for e in order]
        assert lines == sorted(lines), document


def test_done_entries_have_a_function_and_a_test():
    lacking = [e.id for e in ENTRIES.values() if e.state == "done" and not (e.tests and (e.functions or e.kind == "erratum"))]
    assert not lacking


def test_functions_exist():
    lacking = {f"{e.id}: {name}" for e in ENTRIES.values() for name in e.functions if equations.locate(name) is None}
    assert not lacking


def test_tests_exist():
    lacking = {f"{e.id}: {why}" for e in ENTRIES.values() for name in e.tests if (why := missing_test(name))}
    assert not lacking


def test_every_erratum_has_its_place_and_every_place_its_erratum():
    slips = {name for name, e in ENTRIES.items() if e.kind == "erratum"}
    used = {name for e in ENTRIES.values() for name in e.errata}
    assert used == slips
    for name in slips:
        for place in re.findall(r"S\d-[A-Z]\d*", ENTRIES[name].place):  # a place that it names refers back to it
            assert name in ENTRIES[place].errata or " to " in ENTRIES[name].place or "against" in ENTRIES[name].place, (
                name,
                place,
            )
        assert {e.document for e in equations.places(name)} <= set(re.findall(r"S\d", ENTRIES[name].place))


def test_every_registered_erratum_is_in_the_map():
    named = {test for e in ENTRIES.values() if e.kind == "erratum" for test in e.tests}
    for case in cases(ROOT / "tests/test_errata.py"):
        if re.fullmatch(r"X\d+[a-z]?", case):
            assert f"tests/test_errata.py::test_erratum[{case}]" in named and case[:3] in ENTRIES


def test_every_problem_of_the_study_note_has_a_test():
    for k in range(1, 13):
        assert ENTRIES[f"S0-P{k}"].state == "done" and ENTRIES[f"S0-P{k}"].tests


# ------------------------------------------------------------------------------------------------------------- the docstrings


def test_ids_in_the_sources_are_known():
    wrong = []
    for path in sources():
        text = path.read_text(encoding="utf-8")
        wrong += [f"{path.relative_to(ROOT)}: {name}" for name in ids(text) if name not in ENTRIES]
        wrong += [f"{path.relative_to(ROOT)}: a tag without an id"] * (text.count("Eq:") - len(TAG.findall(text)))
    assert not wrong


def listed(name, i):
    """Whether the map lists the function (of a module: any of its functions) under the id."""
    functions = ENTRIES[i].functions
    module = ROOT / f"{name.replace('.', '/')}.py"
    if module.is_file():
        return any(f.startswith(f"{name}.") or equations.locate(f)[0] == module for f in functions)
    return equations.locate(name) in {equations.locate(f) for f in functions}  # by its public name or that of its module


def test_what_a_docstring_claims_the_map_lists():
    lacking = [f"{name} claims {i}" for name, i in claims() if i in ENTRIES and not listed(name, i)]
    assert not lacking


def test_claims_are_read_from_docstrings():
    source = '''"""Words (Eq: S4-E1)."""
class A:
    """Eq: S0-E1, S0-E2."""
    def f(self):
        """Words. Eq:
        S1-E3; more (Eq: X05)."""
        def inner():
            """Eq: S2-U1"""
def g():
    # Eq: S0-E9
    pass
'''
    want = {("m", "S4-E1"), ("m.A", "S0-E1"), ("m.A", "S0-E2"), ("m.A.f", "S1-E3"), ("m.A.f", "X05"), ("m.A.f", "S2-U1")}
    assert set(claims_of(source, "m")) == want


def test_places_of_functions_and_tests():
    path, line = equations.locate("core.forward.q_posterior")
    assert path == ROOT / "core/forward.py" and "def q_posterior" in path.read_text(encoding="utf-8").splitlines()[line - 1]
    assert equations.locate("core.mixture.GaussianMixture.score") and equations.locate("tests.test_equations.ID")
    for absent in ("core.forward.q_nothing", "core.nothing.q_sample", "core.forward", "core.mixture.GaussianMixture.nothing"):
        assert equations.locate(absent) is None
    assert missing_test("tests/test_errata.py::test_erratum[X05]") is None
    for absent in (
        "tests/test_errata.py::test_erratum[X99]",
        "tests/test_nothing.py::test_x",
        "tests/test_errata.py::test_nothing",
    ):
        assert missing_test(absent)
    assert missing_test("tests/test_errata.py::posterior") == "tests/test_errata.py::posterior is not a test"


# ---------------------------------------------------------------------------------------------------------------------- the tool


def shown(capsys, *words):
    assert tool.main(list(words)) == 0
    return capsys.readouterr().out


def test_all_entries_in_one_table(capsys, monkeypatch):
    for columns in (60, 100, 120, 300):
        monkeypatch.setenv("COLUMNS", str(columns))
        lines = shown(capsys).splitlines()
        assert all(tool._width(line) <= min(max(columns, 100), 130) for line in lines)
        assert {line.split()[0] for line in lines if line} >= set(ENTRIES)
        assert lines[-1].startswith("390 entries: ")
    assert sum(line.startswith("S2  Denoising Diffusion Implicit Models: 4") for line in lines) == 1


def test_one_entry_and_all_about_it(capsys):
    out = shown(capsys, "s0-e28")
    for words in (
        "√α_t·(1−ᾱ_{t−1})/(1−ᾱ_t)·x_t",
        "core.forward.q_posterior  (core/forward.py:",
        "X05",
        "printed √ᾱ_t",
        "line 229",
    ):
        assert words in out
    assert "tests/test_errata.py::test_erratum[X05], line " in out and "state      done" in out
    both = shown(capsys, "X05", "S4-E77")
    assert "entries    S0-E28, S1-E12, S1-E14, S4-E14" in both and "E75" not in both
    assert "VCLAB" not in shown(capsys, "X05")


def test_every_entry_can_be_shown(capsys):
    for name in ENTRIES:
        out = shown(capsys, name)
        assert out.startswith(f"{name}  ") and all(tool._width(line) <= 150 for line in out.splitlines())


def test_search(capsys):
    def found(*words):
        return {line.split()[0] for line in shown(capsys, *words).splitlines() if line.split()[:1] and line.split()[0] in ENTRIES}

    assert found("slerp") >= {"S2-C23", "S4-C7", "L10"} and found("slerp", "interpolation") < found("slerp")
    assert found("POSTERIOR") == found("posterior") == {e.id for e in equations.search("posterior")}
    assert found("S2") == found("--document", "S2") == {name for name in ENTRIES if name.startswith("S2-")}
    assert found("--state", "context") == {e.id for e in ENTRIES.values() if e.state == "context"}
    assert found("noise", "--document", "S3", "--state", "done") <= {name for name in ENTRIES if name.startswith("S3-")}


def test_as_json(capsys):
    everything = json.loads(shown(capsys, "--json"))
    assert [e["id"] for e in everything] == list(ENTRIES)
    (one,) = json.loads(shown(capsys, "--json", "S0-E28"))
    assert one["errata"] == ["X05", "X06"] and "core.forward.q_posterior" in one["functions"]


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["S0-E99"], "there is no entry 'S0-E99'; the nearest are S0-E"),
        (["X5"], "there is no entry 'X5'; the nearest are X"),
        (["S0-E28", "S9-E1"], "there is no entry 'S9-E1'"),
        (["no such words"], "no entry has 'no such words'"),
        (["--document", "S7"], "invalid choice: 'S7'"),
    ],
)
def test_mistakes_end_in_one_line(words, hint, capsys):
    assert tool.main(words) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("alphabar equations: error: ") and hint in err


def test_widths_of_combining_marks():
    assert tool._width("β̃_t") == 3 and tool._cut("β̃" * 5, 3) == "β̃β̃…" and tool._pad("β̃", 3) == "β̃  "


def test_as_a_script_and_a_command(capsys):
    script = subprocess.run(
        [sys.executable, ROOT / "tools/equations.py", "X06"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONIOENCODING": "utf-8"},
    )
    assert script.returncode == 0 and script.stdout.startswith("X06  erratum: S0-E28")
    assert cli.main(["equations", "X06"]) == 0
    assert capsys.readouterr().out == script.stdout
