"""Reads a file of sampled text: does it have a property, how likely is it, are its words words, and is it copied?

    python bench/judge_text.py SAMPLES.txt [--property word:god] [--reference kjv] [--at-least 0.5]

The samples are those of `alphabar sample` (.txt or .h5), one window each. Beside each number stands that of held-out windows of
the reference text, which begin at any letter as the training windows do. The likelihood is that of an n-gram model fitted on the
training split, which no sampler saw. Words that stand whole in a window are looked up in the training split. Copies show in the
longest run of letters that a sample shares with the training split: near that of held-out text for new text, near the length of
a window for copies.
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from alphabar.core import data, ngram, text
from alphabar.tools import command, properties

WINDOWS = 2000  # held-out ones, at most
COPIES = 64  # texts whose longest copied run is sought, at most


def read(path: Path) -> list[str]:
    """The samples of a file in the 27 letters, without its title and without the blanks that they fill in."""
    if path.suffix == ".h5":
        import h5py

        with h5py.File(path) as f:
            letters = np.array(list(str(f.attrs["alphabet"])))
            return ["".join(row) for row in letters[f["tokens"][:]]]
    parts = path.read_text().split("\n\n")[1:]
    return [s for s in (text.fold(" ".join(part.splitlines())) for part in parts if text.MASK not in part) if s.strip()]


def held_out(reference: text.Text, length: int, n: int) -> list[str]:
    """``n`` windows of a length, evenly spread over a text."""
    whole = properties.letters(reference)
    return [whole[s : s + length] for s in np.linspace(0, len(whole) - length, n).astype(int).tolist()]


def known(windows: Iterable[str], words: set[str]) -> float:
    """The share of the words that are among ``words``; the first and the last of a window, which may be cut, do not count."""
    whole = [w for window in windows for w in window.split()[1:-1]]
    return float(np.mean([w in words for w in whole])) if whole else float("nan")


def longest_run(window: str, source: str) -> int:
    """The most letters in a row of ``window`` that stand in ``source`` too."""
    best = 0
    for start in range(len(window)):
        while start + best < len(window) and window[start : start + best + 1] in source:
            best += 1
    return best


def bits(model: ngram.NGram, windows: Sequence[str], reference: text.Text) -> tuple[float, float]:
    """(mean, standard error) of −log₂ P a letter."""
    each = np.array([model.bits(reference.encode(w)[None])[0] for w in windows])
    return float(each.mean()), float(each.std(ddof=1) / np.sqrt(len(each))) if len(each) > 1 else float("nan")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="property, likelihood, words and copies of sampled text, beside held-out text")
    parser.add_argument("samples", type=Path, help="text (.txt or .h5) as alphabar sample writes it")
    parser.add_argument("--property", help=f"{properties.FORMS}")
    parser.add_argument("--reference", default="kjv", help="the text that was learned: a built-in one, or a file .txt")
    parser.add_argument("--order", type=int, default=6, help="of the n-gram model (default 6)")
    parser.add_argument("--at-least", type=float, default=0.0, metavar="SHARE", help="exit 1 where fewer have the property")
    args = parser.parse_args(argv)
    if args.at_least and not args.property:
        parser.error("--at-least goes with --property")
    try:
        asked = properties.parse(args.property) if args.property else None
        made = read(args.samples)
        if not made:
            parser.error(f"{args.samples} holds no samples")
        length = max(map(len, made))
        train, test = (text.load(args.reference, split, length) for split in ("train", "test"))
        model = ngram.fit(train.tokens, args.order, train.states)
    except (OSError, KeyError, ValueError, command.UserError, data.DataError) as e:
        parser.error(str(e))
    real = held_out(test, length, min(WINDOWS, len(test.tokens) // length))
    source = properties.letters(train)
    shares = [float(np.mean([asked(w) for w in windows])) for windows in (made, real)] if asked else []
    if asked:
        print(f"property      {shares[0]:.4f} of {len(made)} samples have {asked.name}, {shares[1]:.4f} of held-out windows")
    (ours, its), (theirs, of_real) = (bits(model, windows, test) for windows in (made, real))
    print(f"likelihood    {ours:.3f} ± {its:.3f} bits a letter by {args.order}-grams, held-out {theirs:.3f} ± {of_real:.3f}")
    as_much = real[: max(1, sum(map(len, made)) // length)]  # entropies of few letters come out low
    for name, windows in (("samples", made), ("held-out", as_much)):
        tokens = test.encode(" ".join(windows))
        longest = range(1, min(3, tokens.size) + 1)
        print(f"entropy       {', '.join(f'{ngram.entropy(tokens, n, test.states):.3f}' for n in longest)} bits ({name})")
    words = set(source.split())
    print(f"words         {known(made, words):.4f} stand in the training text, of held-out {known(real, words):.4f}")
    runs, of_held = ([longest_run(w, source) for w in windows[:COPIES]] for windows in (made, real))
    print(f"copies        longest run in the training text: median {np.median(runs):g}, most {max(runs)} of {length} letters;")
    print(f"              of held-out text: median {np.median(of_held):g}, most {max(of_held)}")
    if asked and shares[0] < args.at_least:
        print(f"below the {args.at_least:.2f} asked for", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
