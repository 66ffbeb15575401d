"""`alphabar equations`: the map from the documents' equations to functions and tests."""

import dataclasses
import json
import re
import shutil
import textwrap
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from alphabar.core import equations
from alphabar.core.equations import Entry
from alphabar.tools.command import Parser, UserError, program

GROUPS = {"X": "Errata that a number settles", "N": "Errata of notation, wording, bibliography", "L": "Left out by the documents"}
LABEL = 11
LOOKS_LIKE_AN_ID = re.compile(r"(S\d-)?[A-Z]\d+[a-z]?|S\d-[A-Z]*\d*", re.IGNORECASE)


@program("equations")
def main(argv: Sequence[str] | None = None) -> int:
    """Print the map, one entry or a search; returns the exit code."""
    parser = Parser(prog="alphabar equations", description=__doc__)
    parser.add_argument(
        "what", nargs="*", help="ids (S0-E28, X05), a document (S0), or words to search for: entries that have all of them"
    )
    parser.add_argument("--document", choices=equations.DOCUMENTS, help="the entries of one document")
    parser.add_argument("--state", choices=equations.STATES, help="the entries in one state")
    parser.add_argument("--json", action="store_true", help="as JSON, with every field")
    arguments = parser.parse_args(argv)
    ids, found = _select(arguments.what)
    found = [e for e in found if arguments.document in (None, e.document) and arguments.state in (None, e.state)]
    if arguments.json:
        print(json.dumps([dataclasses.asdict(e) for e in found], ensure_ascii=False, indent=1))
    elif ids:
        print("\n\n".join("\n".join(_details(e)) for e in found))
    else:
        print("\n".join(_table(found)))
    return 0


def _select(what: Sequence[str]) -> tuple[bool, list[Entry]]:
    """(whether ids were asked for, the entries)."""
    known = equations.entries()
    upper = {name.upper(): name for name in known}
    if len(what) == 1 and what[0].upper() in equations.DOCUMENTS:
        return False, [e for e in known.values() if e.document == what[0].upper()]
    names = [upper.get(word.upper()) for word in what]
    if what and all(names):
        return True, [known[name] for name in names if name]
    for word, name in zip(what, names, strict=True):
        if name is None and LOOKS_LIKE_AN_ID.fullmatch(word):
            raise UserError(f"there is no entry {word!r}; the nearest are {', '.join(equations.nearest(word))}")
    found = equations.search(*what)
    if not found:
        raise UserError(f"no entry has {' and '.join(map(repr, what))}")
    return False, found


# ------------------------------------------------------------------------------------------------------------------------ tables


def _table(found: Sequence[Entry]) -> list[str]:
    width = min(max(shutil.get_terminal_size((120, 24)).columns, 100), 130)
    lines: list[str] = []
    for title, group in _groups(found):
        lines += [title, "─" * min(_width(title), width)]
        for e in group:
            state = "–" if e.state == "context" else e.state
            room = width - 19
            lines.append(f"{e.id:<8} {_pad(_cut(e.summary, room), room)}  {state:>8}".rstrip())
        lines.append("")
    return [*lines, f"{len(found)} entries: {_counts(found)}"]


def _groups(found: Sequence[Entry]) -> Iterable[tuple[str, list[Entry]]]:
    for document in equations.documents().values():
        if group := [e for e in found if e.document == document.id]:
            yield f"{document.id}  {document.title}: {_counts(group)}", group
    rest = [e for e in found if not e.document]
    for letter, title in (*GROUPS.items(), ("T", "Tables quoted")):
        if group := [e for e in rest if e.id[0] == letter]:
            yield f"{title}: {_counts(group)}", group


def _counts(group: Sequence[Entry]) -> str:
    counts = Counter(e.state for e in group)
    return ", ".join(f"{counts[state]} {state}" for state in equations.STATES if counts[state]) or "none"


# ------------------------------------------------------------------------------------------------------------------------ details


def _details(e: Entry) -> list[str]:
    document = equations.documents().get(e.document)
    where = f"{document.title} ({document.author}), line {e.line}" if document else e.place
    lines = [f"{e.id}  {e.kind}: {where}", ""]
    if e.kind == "erratum":
        lines += [*_field("printed", e.printed), *_field("right", e.right), *_field("number", e.number)]
    else:
        lines += [line for k, part in enumerate(e.formula.splitlines()) for line in _field("" if k else "formula", part)]
    lines += [*_field("note", e.note), *_field("source", e.source)]
    if document:
        lines += _field("symbols", document.notation)
    for name in e.errata:
        slip = equations.entries()[name]
        lines += _field(name, f"printed {slip.printed};  right {slip.right}" + (f";  {slip.number}" if slip.number else ""))
    if e.kind == "erratum":
        lines += _field("entries", ", ".join(place.id for place in equations.places(e.id)))
    for k, name in enumerate(e.functions):
        lines.append(_labelled("" if k else "function", _located(name, equations.locate(name))))
    for k, name in enumerate(e.tests):
        lines.append(_labelled("" if k else "test", _located(name, equations.locate_test(name))))
    return [*lines, *_field("state", e.state)]


def _located(name: str, place: tuple[Path, int] | None) -> str:
    if place is None:
        return name
    path, line = place
    file = path.relative_to(equations.PACKAGE).as_posix()
    return f"{name}, line {line}" if name.startswith(f"{file}::") else f"{name}  ({file}:{line})"


def _labelled(label: str, text: str) -> str:
    return f"  {label:<{LABEL}}{text}"


def _field(label: str, text: str) -> list[str]:
    """``text`` beside its label, wrapped; no line where it is empty."""
    parts = textwrap.wrap(text, 112 - LABEL, break_long_words=False, break_on_hyphens=False)
    return [_labelled("" if k else label, part) for k, part in enumerate(parts)]


# ------------------------------------------------------------------------------------------------------- widths of Unicode text


def _width(text: str) -> int:
    """Columns on a terminal: combining marks (the tilde of β̃) take none."""
    return sum(not unicodedata.combining(c) for c in text)


def _cut(text: str, room: int) -> str:
    if _width(text) <= room:
        return text
    kept, columns = [], 0
    for c in text:
        columns += not unicodedata.combining(c)
        if columns > room - 1:
            break
        kept.append(c)
    return "".join(kept).rstrip() + "…"


def _pad(text: str, room: int) -> str:
    return text + " " * (room - _width(text))


if __name__ == "__main__":
    raise SystemExit(main())
