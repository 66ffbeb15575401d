"""`alphabar info`: what a checkpoint, a data set, a text or a run folder holds."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from alphabar.core import data, ngram, text
from alphabar.nets import checkpoint
from alphabar.tools import config as configs
from alphabar.tools import runs, sources
from alphabar.tools.command import Parser, program


@program("info")
def main(argv: Sequence[str] | None = None) -> int:
    """Describe a file or a folder; returns the exit code."""
    parser = Parser(prog="alphabar info", description=__doc__)
    parser.add_argument("path", help=f"checkpoint, HDF5 data set, text file, run folder, or one of {', '.join(sources.BUILT_IN)}")
    path = Path(parser.parse_args(argv).path)
    if configs.is_text(str(path)):
        lines = _text(path)
    elif str(path) in data.BUILT_IN or not (path.is_dir() or _is_checkpoint(path)):
        lines = _dataset(path)
    else:
        lines = _run(path) if path.is_dir() else _checkpoint(*runs.read(path))
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        print(f"{name:<{width}}  {value}")
    return 0


def _is_checkpoint(path: Path) -> bool:
    try:
        with open(path, "rb") as f:
            f.seek(-len(checkpoint.MAGIC), 2)
            return f.read() == checkpoint.MAGIC
    except OSError:
        return False


def _dataset(path: Path) -> list[tuple[str, Any]]:
    everything = data.load(path, "all")
    lines: list[tuple[str, Any]] = [
        ("data set", everything.name),
        ("images", f"{len(everything):,} of {_by(everything.shape)}, uint8"),
    ]
    try:
        test = len(data.load(path, "test", memory=0))
    except data.DataError:
        test = 0
    lines.append(("split", f"{len(everything) - test:,} train, {test:,} test"))
    if everything.labels is not None:
        counts = np.bincount(everything.labels, minlength=len(everything.classes))
        lines += [
            (f"class {k}", f"{name}: {count:,}") for k, (name, count) in enumerate(zip(everything.classes, counts, strict=True))
        ]
    return [*lines, ("sha256", everything.sha256)]


def _text(path: Path) -> list[tuple[str, Any]]:
    train, test = (text.load(path, split, 1) for split in ("train", "test"))
    given = range(min(3, len(train.tokens)))  # letters before the one that is told
    entropies = [f"{ngram.entropy(train.tokens, n + 1, train.states):.3f}" for n in given]
    return [
        ("text", train.name),
        ("letters", f"{len(train.tokens):,} train, {len(test.tokens):,} test, of {train.states}: {train.alphabet!r}"),
        ("entropy", f"{', '.join(entropies)} bits a letter, given {', '.join(map(str, given))} letters before it"),
        ("begins", train.decode(train.tokens[:60])),
        ("sha256", train.sha256),
    ]


def _checkpoint(path: Path, arrays: dict[str, np.ndarray], meta: dict[str, Any]) -> list[tuple[str, Any]]:
    groups: dict[str, list[np.ndarray]] = {}
    for name, a in arrays.items():
        groups.setdefault(name.partition("/")[0], []).append(a)
    lines: list[tuple[str, Any]] = [("checkpoint", path), ("kind", meta.get("kind")), ("step", f"{meta.get('step', 0):,}")]
    lines += [(f"{g}/", f"{len(of):,} arrays, {sum(a.size for a in of):,} numbers") for g, of in groups.items()]
    for key in ("seed", "alphabar", "error", "property", "data", "model", "config"):
        if isinstance(value := meta.get(key), dict):
            lines += [(f"{key}.{name}", _plain(v)) for name, v in value.items()]
        elif value is not None:
            lines.append((key, value))
    return lines


def _run(path: Path) -> list[tuple[str, Any]]:
    lines: list[tuple[str, Any]] = [("run", path)]
    if written := runs.metrics(path):
        last = written[-1]
        lines.append(("metrics", f"{len(written):,} lines, loss {last['loss']:.4f} at step {last['step']:,}"))
    lines.append(("checkpoints", ", ".join(f"{step:,}" for step, _ in checkpoint.listing(path / "ckpt")) or "none"))
    return [*lines, *_checkpoint(*runs.read(path))]


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_plain(v)}" for k, v in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _by(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))


if __name__ == "__main__":
    raise SystemExit(main())
