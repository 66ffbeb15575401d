"""`alphabar`: the commands under one name."""

import importlib
import sys
from collections.abc import Sequence

import alphabar

COMMANDS = {
    "train": ("alphabar.tools.train", "train a model on images or text; with no argument, on handwritten digits"),
    "train-classifier": ("alphabar.tools.train_classifier", "train a classifier of a run's noised images, to guide samples by"),
    "sample": ("alphabar.tools.sample", "draw images or text from a checkpoint"),
    "edit": ("alphabar.tools.edit", "encode, interpolate, vary, inpaint and restore images with a checkpoint"),
    "evaluate": ("alphabar.tools.evaluate", "tell the likelihood of images or text under a checkpoint, in bits"),
    "make-dataset": ("alphabar.tools.make_dataset", "make a data set from a folder of images or from IDX files"),
    "info": ("alphabar.tools.info", "tell what a checkpoint, a data set, a text or a run holds"),
    "check": ("alphabar.tools.check", "show the grid, the coefficients and the faults of a sampler, or of a diffusers file"),
    "equations": ("alphabar.tools.equations", "the documents' equations, with their functions and tests"),
    "demo": ("alphabar.tools.demo", "compute and draw what the documents claim, one picture each"),
    "reproduce": ("alphabar.tools.reproduce", "compute the documents' tables and figures beside the published ones: one report"),
    "warmup": ("alphabar.tools.warmup", "compile every kernel ahead, so that no later command has to wait"),
    "gpu-check": ("alphabar.tools.gpu_check", "try everything on this machine's GPU"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `alphabar COMMAND …`; returns the exit code: 0, or 2 after a mistake in the arguments."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    first = arguments[0] if arguments else "--help"
    if first in ("--version", "-V"):
        print(f"alphabar {alphabar.__version__}")
        return 0
    if first in ("--help", "-h", "help"):
        print("usage: alphabar COMMAND …   (alphabar COMMAND --help shows its options; alphabar --version)\n")
        for name, (_, what) in COMMANDS.items():
            print(f"  {name:<16} {what}")
        return 0 if arguments else 2
    if first not in COMMANDS:
        import difflib

        near = difflib.get_close_matches(first, COMMANDS, 1)
        hint = f"the nearest is {near[0]!r}" if near else f"the commands are {', '.join(COMMANDS)}"
        print(f"alphabar: error: unknown command {first[:80]!r}; {hint}", file=sys.stderr)
        return 2
    return importlib.import_module(COMMANDS[first][0]).main(arguments[1:])


if __name__ == "__main__":
    raise SystemExit(main())
