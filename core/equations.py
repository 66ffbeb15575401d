"""The equation map: every equation, claim, algorithm and table of the five documents, with the function and the test behind it.

The data stand in ``equation_map/*.toml``, one file a document, with two more: where the documents err (``errata.toml``) and what
they leave out (``omissions.toml``). Ids: ``S0-E28`` is equation 28 of document S0; the letter after the dash tells the kind (E
numbered and U unnumbered equations, C claims, P problems, A algorithms, T tables, F figures, M mentions, R references); X and N
are errata, L omissions, T1 and T2 quoted tables.
"""

import ast
import difflib
import functools
import importlib.resources
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DOCUMENTS = ("S0", "S1", "S2", "S3", "S4")
STATES = ("done", "context")
KINDS = {
    "E": "equation",
    "U": "equation",
    "C": "claim",
    "P": "problem",
    "A": "algorithm",
    "T": "table",
    "F": "figure",
    "M": "mention",
    "R": "reference",
    "X": "erratum",
    "N": "erratum",
    "L": "omission",
}
PACKAGE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Document:
    """A source document: ``id`` S0 to S4; ``notation`` says how its symbols are to be read."""

    id: str
    title: str
    author: str
    about: str
    notation: str


@dataclass(frozen=True)
class Entry:
    """One entry of the map.

    ``formula`` is the correct statement (an erratum has none: ``printed`` is what the document has, ``right`` what it should
    have, ``number`` the figure that decides); ``line`` counts in the plain text of the document. ``functions`` are dotted names
    below ``alphabar`` ("tests.…" for the oracle of a test), ``tests`` pytest names, ``errata`` the ids of the slips in this
    place. ``state``: "done" or "context" (nothing to compute).
    """

    id: str
    kind: str
    state: str
    document: str = ""
    line: str = ""
    place: str = ""
    formula: str = ""
    printed: str = ""
    right: str = ""
    number: str = ""
    source: str = ""
    note: str = ""
    errata: tuple[str, ...] = ()
    functions: tuple[str, ...] = ()
    tests: tuple[str, ...] = ()

    @property
    def summary(self) -> str:
        """The formula, or for an erratum what is printed and what is right, in one line."""
        text = f"{self.printed}  →  {self.right}" if self.kind == "erratum" else self.formula
        return " ".join(text.split())


def _read(name: str) -> dict[str, Any]:
    files = importlib.resources.files(__package__) / "equation_map"
    return tomllib.loads((files / f"{name}.toml").read_text(encoding="utf-8"))


def _entry(name: str, letter: str, values: dict[str, Any], **more: str) -> Entry:
    lists = {key: tuple(values.get(key, ())) for key in ("errata", "functions", "tests")}
    kind = KINDS[letter]
    state = "context" if letter == "N" else "done"
    return Entry(**{"id": name, "kind": kind, "state": state} | more | values | lists)


@functools.cache
def documents() -> dict[str, Document]:
    """The five documents by id."""
    return {name: Document(name, **_read(name.lower())["document"]) for name in DOCUMENTS}


@functools.cache
def entries() -> dict[str, Entry]:
    """Every entry by id: the documents' in their order, then errata, omissions and quoted tables."""
    found = {}
    for document in DOCUMENTS:
        for key, values in _read(document.lower()).items():
            if key != "document":
                name = f"{document}-{key}"
                found[name] = _entry(name, key[0], values, document=document)
    for file in ("errata", "omissions"):
        found |= {name: _entry(name, name[0], values) for name, values in _read(file).items()}
    return found


def places(erratum: str) -> list[Entry]:
    """The entries in which an erratum stands."""
    return [e for e in entries().values() if erratum in e.errata]


def search(*words: str) -> list[Entry]:
    """The entries that have every word in formula, functions, tests or other text; letters' case does not matter."""
    wanted = [w.casefold() for w in words]

    def text(e: Entry) -> str:
        parts = (e.id, e.kind, e.place, e.formula, e.printed, e.right, e.number, e.source, e.note)
        return "\n".join((*parts, *e.errata, *e.functions, *e.tests)).casefold()

    return [e for e in entries().values() if all(w in text(e) for w in wanted)]


def nearest(name: str, count: int = 3) -> list[str]:
    """The ids most like ``name``."""
    return difflib.get_close_matches(name.upper(), entries(), count, cutoff=0.0)


def locate(name: str, root: Path = PACKAGE) -> tuple[Path, int] | None:
    """(file, line) where ``core.forward.q_sample``, a class, a method or a module's variable is defined; None if nowhere.

    The sources are read, not imported. ``root`` is the folder that holds core, kernels, nets, tools and, in a checkout, tests.
    """
    parts = name.split(".")
    for k in range(len(parts) - 1, 0, -1):
        base = root.joinpath(*parts[:k])
        for path in (base.with_suffix(".py"), base / "__init__.py"):
            if path.is_file():
                wanted = ".".join(parts[k:])
                line = _definitions(path).get(wanted)
                if line is not None:
                    return path, line
                module = _imports(path).get(parts[k])  # a name that the module passes on from another
                return None if module is None else locate(".".join([*path.relative_to(root).parts[:-1], module, wanted]), root)
    return None


def locate_test(name: str, root: Path = PACKAGE) -> tuple[Path, int] | None:
    """(file, line) of a test by its pytest name, ``tests/test_forward.py::test_x`` or ``…::test_x[case]``; None if nowhere."""
    file, _, function = name.partition("::")
    path = root / file
    if not path.is_file():
        return None
    line = _definitions(path).get(function.partition("[")[0].replace("::", "."))
    return None if line is None else (path, line)


@functools.cache
def _imports(path: Path) -> dict[str, str]:
    """The sibling module that each name of ``from .module import name`` comes from."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    siblings = [node for node in body if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module]
    return {alias.name: str(node.module) for node in siblings for alias in node.names if alias.asname is None}


@functools.cache
def _definitions(path: Path) -> dict[str, int]:
    """Line numbers of the functions, classes, methods and module variables of a source, by dotted name."""
    found: dict[str, int] = {}

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found[prefix + node.name] = node.lineno
                if isinstance(node, ast.ClassDef):
                    visit(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                found.update({prefix + t.id: node.lineno for t in targets if isinstance(t, ast.Name)})

    visit(ast.parse(path.read_text(encoding="utf-8")).body, "")
    return found
