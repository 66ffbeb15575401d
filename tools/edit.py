"""`alphabar edit`: encode, interpolate, vary, inpaint and restore images with a trained network."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from alphabar.core import data, editing, operators
from alphabar.core.data import DataError, to_uint8, to_unit
from alphabar.core.metrics import per_dimension_mse
from alphabar.kernels import counter, streams
from alphabar.kernels.arrays import to_numpy
from alphabar.tools import command, dataset_file, editor, pictures, trained
from alphabar.tools.command import Failure, Parser, UserError, device, integer, program, real
from alphabar.tools.config import Config
from alphabar.tools.editor import METHODS, ONLY, Batch, Job
from alphabar.tools.make_dataset import read_image
from alphabar.tools.methods import Process
from alphabar.tools.progress import Progress

EXAMPLES = """examples:
  alphabar edit reconstruct runs/digits-001 --steps 100
  alphabar edit interpolate runs/digits-001 --index 0,1,2,3 --frames 9
  alphabar edit vary runs/digits-001 --strength 0.2,0.4,0.6,0.8 --class 3
  alphabar edit inpaint runs/digits-001 --mask right --method repaint
  alphabar edit inpaint runs/faces-001 --image me.png --mask hole.png --class none
  alphabar edit super-resolve runs/digits-001 --factor 2 --method dps --noise 0.05
  alphabar edit super-resolve runs/digits-001 --image small.png --measured
  alphabar edit deblur runs/digits-001 --sigma 1 --noise 0.02
  alphabar edit colourise runs/photos-001
Image k follows from the seed, k and its class alone: --batch changes none.
"""
COLUMNS = 20  # of a sheet, at most
STEPS = 50
RESTORE = ("ddrm", "pigdm", "moment", "dps")
MASKS = ("left", "right", "top", "bottom", "centre", "border")


@program("edit")
def main(argv: Sequence[str] | None = None) -> int:
    """Edit or restore images; returns the exit code."""
    options = _parser().parse_args(argv)
    xp, where = device(options.device)
    outputs = command.outputs(options.out, ("edit.png",))
    network = trained.load(options.checkpoint, options.raw_weights, xp)
    net, config, classes = network.net, network.config, network.classes
    process, shape = Process(config), network.shape
    job = _job(options, process, shape)
    measured = getattr(options, "measured", False)
    wanted = _operator(options, shape).shape_out if measured else shape
    images, own, names = _images(options, config, wanted)
    if options.mode == "interpolate" and len(images) % 2:
        raise UserError(f"interpolate takes pairs of images, not {len(images)} of them")
    labels = _classes(options, classes, own, names, len(images))
    if labels is None and options.guidance:
        raise UserError("--guidance needs classes to guide to" + ("" if classes else ", and this network has none"))
    batch = options.batch + options.batch % 2 if options.mode == "interpolate" else options.batch
    found: dict[str, list[np.ndarray]] = {}
    try:
        with Progress("editing", len(images) * job.calls, 0, options.quiet, "image step") as bar:
            for at in range(0, len(images), batch):
                chosen = None if labels is None else xp.asarray(labels[at : at + batch])
                block = to_unit(xp.asarray(images[at : at + batch]))
                rows = job.run(Batch(process, net, block, chosen, options.guidance, options.seed, at, bar.advance))
                for name, row in rows.items():
                    found.setdefault(name, []).append(to_numpy(row))
        pixels = {name: to_uint8(np.concatenate(row)) for name, row in found.items()}
    except ValueError as e:
        raise Failure(f"the images could not be edited: {e}") from e
    title = f"{network.path.name}, {job.title}, seed {options.seed}"
    try:
        if ".png" in outputs:
            _draw(job, pixels, title, outputs[".png"])
        if ".h5" in outputs:
            about = {
                "checkpoint": network.path.name,
                "step": network.step,
                "mode": options.mode,
                "what": job.title,
                "seed": options.seed,
            }
            about |= {"weights": "raw" if options.raw_weights else "average", "guidance": options.guidance}
            _write(job, pixels, labels, classes, about, outputs[".h5"])
    except OSError as e:
        raise Failure(f"the images could not be written ({e.strerror or e})") from e
    if not options.quiet:
        for line in _report(job, found):
            print(line)
        for out in outputs.values():
            print(f"wrote {out}: {len(images):,} images {'×'.join(map(str, shape))}, on {where}")
    return 0


# ------------------------------------------------------------------------------------------------------------------- arguments


def _parser() -> Parser:
    parser = Parser(prog="alphabar edit", description=__doc__, epilog=EXAMPLES)
    modes = parser.add_subparsers(dest="mode", metavar="MODE", required=True)

    def mode(name: str, what: str) -> argparse.ArgumentParser:
        p = modes.add_parser(name, help=what, description=what)
        _common(p)
        return p

    for name, what in (
        ("reconstruct", "encode images by DDIM and decode them"),
        ("interpolate", "decode a path between two codes"),
    ):
        p = mode(name, what)
        p.add_argument("--label", choices=("target", "current"), default="target", help="time told to the network while encoding")
        p.add_argument("--steps", type=integer(1, 10**6), default=STEPS, help=f"each way (default {STEPS})")
    p.add_argument("--frames", type=integer(2, 100), default=9, help="pictures on each path (default 9)")

    p = mode("vary", "noise images and sample down again (SDEdit)")
    p.add_argument(
        "--strength",
        type=_strengths,
        default=(0.2, 0.4, 0.6, 0.8),
        metavar="LIST",
        help="in (0, 1], e.g. 0.2,0.5: how far up to go",
    )
    p.add_argument(
        "--convention",
        choices=("time", "steps"),
        default="time",
        help="of the strength: the part of T, with all steps below it (default), or the part of the steps that is run",
    )
    p.add_argument("--eta", type=real(0, 1), default=1.0, help="1 (default) is ancestral, 0 deterministic DDIM")
    p.add_argument("--repeats", type=integer(1, 1000), default=1, help="times over (default 1)")
    p.add_argument("--steps", type=integer(1, 10**6), default=STEPS, help=f"default {STEPS}")

    p = mode("inpaint", "fill in what a mask hides")
    p.add_argument(
        "--mask",
        default="centre",
        help=f"what is hidden: {', '.join(MASKS)}, random:FRACTION, or an image file in which black is hidden (default centre)",
    )
    _solving(p, ("repaint", "replacement", *RESTORE))
    p = mode("super-resolve", "enlarge images of which each element is a mean")
    p.add_argument("--factor", type=integer(2, 1024), default=2, help="how much smaller the measurement is (default 2)")
    _solving(p, RESTORE)
    p = mode("deblur", "undo a Gaussian blur")
    p.add_argument("--sigma", type=real(1e-3, 1000), default=1.0, help="its deviation in elements (default 1)")
    _solving(p, RESTORE)
    _solving(mode("colourise", "find the colours of grey images"), RESTORE)
    return parser


def _common(p: argparse.ArgumentParser) -> None:
    p.add_argument("checkpoint", type=Path, metavar="CKPT", help="checkpoint, run folder (its newest one) or folder of runs")
    p.add_argument("--data", metavar="FILE", help="data set that the images come from; default: the run's")
    p.add_argument("--split", choices=("train", "test", "all"), default="test", help="part of the data set (default test)")
    p.add_argument("--index", type=_indices, metavar="LIST", help="which images of it, e.g. 0,5,7; default: each class in turn")
    p.add_argument("--n", type=integer(1, 10**6), help="how many of them, where no --index is given (default 10)")
    p.add_argument("--image", type=Path, action="append", metavar="FILE", help="an image file instead, of the network's size")
    p.add_argument(
        "--class",
        dest="classes",
        default=None,
        help="labels (each its own), none, or names or numbers such as 3 or 1,4; default: labels, in interpolate none",
    )
    p.add_argument(
        "--guidance", type=real(-1, 1000), default=0.0, metavar="W", help="w in (1 + w)·eps_c - w·eps_u (default 0: none)"
    )
    p.add_argument("--seed", type=integer(0, 2**64 - 1), default=0)
    p.add_argument("--batch", type=integer(1, 1 << 20), default=64, help="images at a time: changes speed and memory only")
    p.add_argument("--out", type=Path, action="append", metavar="FILE", help=".png or .h5, once for each; default: edit.png")
    p.add_argument("--device", default="auto", help="auto (default), cpu, cuda or cuda:N")
    p.add_argument("--raw-weights", action="store_true", help="the last weights instead of their running average")
    p.add_argument("--quiet", action="store_true", help="print errors only")


def _solving(p: argparse.ArgumentParser, methods: tuple[str, ...]) -> None:
    usual = ", ".join(f"{METHODS[m]} for {m}" for m in methods)
    p.add_argument("--method", choices=methods, default=methods[0], help=f"default {methods[0]}")
    p.add_argument("--steps", type=integer(1, 10**6), help=f"default: {usual}")
    usual = "0.02" if "deblur" in p.prog else "0"
    p.add_argument(
        "--noise", type=real(0, 1), default=float(usual), help=f"deviation of its noise, the range being 2 (default {usual})"
    )
    p.add_argument("--eta", type=real(0, 1), help=f"of {', '.join(ONLY['eta'][0])}: 0 deterministic, 1 most random")
    p.add_argument("--zeta", type=real(0, 1000), help=f"of dps: length of a step (default {ONLY['zeta'][1]})")
    p.add_argument("--data-std", type=real(1e-3, 1000), help=f"of pigdm: deviation of the data (default {ONLY['data_std'][1]})")
    p.add_argument("--iterations", type=integer(1, 1000), help=f"of moment: solver steps (default {ONLY['iterations'][1]})")
    if "repaint" in methods:
        p.add_argument("--jump", type=integer(1, 10**6), help=f"of repaint: steps back up at a time (default {ONLY['jump'][1]})")
        p.add_argument("--resample", type=integer(1, 1000), help=f"of repaint: times over (default {ONLY['resample'][1]})")
    else:
        p.add_argument("--measured", action="store_true", help="the images given are measurements already")


def _indices(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and len(part) < 10 for part in parts):
        raise argparse.ArgumentTypeError(f"must be whole numbers such as 0,5,7, not {text!r}")
    return [int(part) for part in parts]


def _strengths(text: str) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = (-1.0,)
    if not all(0 < v <= 1 for v in values):
        raise argparse.ArgumentTypeError(f"must be numbers in (0, 1] such as 0.2,0.5, not {text!r}")
    if len(set(values)) != len(values):
        raise argparse.ArgumentTypeError(f"must not hold a number twice, not {text!r}")
    return values


# ------------------------------------------------------------------------------------------------------------------------ jobs


def _job(options: Any, process: Process, shape: tuple[int, ...]) -> Job:
    try:
        if options.mode == "reconstruct":
            return editor.reconstruct(process, options.steps, options.label)
        if options.mode == "interpolate":
            return editor.interpolate(process, options.steps, options.label, options.frames)
        if options.mode == "vary":
            given = (options.strength, options.convention, options.eta, options.repeats)
            return editor.vary(process, options.steps, *given)
        operator = _operator(options, shape)
        if options.noise and options.method not in RESTORE:
            raise UserError(f"--noise goes with the methods {', '.join(RESTORE)}: {options.method} keeps the known part as it is")
        settings = {name: _setting(options, name) for name in ONLY}
        steps = options.steps or METHODS[options.method]
        measured = getattr(options, "measured", False)
        return editor.restore(process, operator, options.method, steps, options.noise, settings, _what(options), measured)
    except (ValueError, TypeError) as e:
        raise UserError(str(e)) from e


def _setting(options: Any, name: str) -> Any:
    """A setting of the method; UserError where it is given and the method has none such."""
    methods, default = ONLY[name]
    value = getattr(options, name, None)
    if value is None:
        return default.get(options.method) if isinstance(default, dict) else default
    if options.method not in methods:
        raise UserError(f"--{name.replace('_', '-')} goes with the method{'s' * (len(methods) > 1)} {', '.join(methods)}")
    return value


def _what(options: Any) -> str:
    if options.mode == "inpaint":
        return f"inpainting, mask {Path(options.mask).name}"
    return {
        "super-resolve": f"super-resolution by {getattr(options, 'factor', 0)}",
        "deblur": f"deblurring, sigma {getattr(options, 'sigma', 0):g}",
        "colourise": "colourisation",
    }[options.mode]


def _operator(options: Any, shape: tuple[int, ...]) -> operators.Operator:
    if options.mode == "inpaint":
        return operators.Mask(_mask(options.mask, shape, options.seed), shape)
    if options.mode == "super-resolve":
        return operators.box(shape, options.factor)
    if options.mode == "deblur":
        return operators.blur(shape, options.sigma)
    if shape[2] < 2:
        raise UserError("colourise needs a network of coloured images, and this one's have 1 channel")
    return operators.grey(shape)


def _mask(text: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Where the image is known (H, W, 1)."""
    height, width, _ = shape
    known, (h, w) = np.ones((height, width, 1), bool), (height // 4, width // 4)
    if text in MASKS:
        hidden: dict[str, tuple[slice, slice]] = {
            "left": (slice(None), slice(0, width // 2)),
            "right": (slice(None), slice(width - width // 2, None)),
            "top": (slice(0, height // 2), slice(None)),
            "bottom": (slice(height - height // 2, None), slice(None)),
            "centre": (slice(h, height - h), slice(w, width - w)),
            "border": (slice(h, height - h), slice(w, width - w)),
        }
        known[hidden[text]] = False
        return ~known if text == "border" else known
    kind, colon, number = text.partition(":")
    if kind == "random" and colon:
        share = _fraction(number)
        order = counter.permutation(height * width, seed, 1, streams.MEASURE)
        known.reshape(-1)[order[: round(share * height * width)]] = False
        return known
    path = Path(text)
    if not path.suffix:
        raise UserError(f"--mask must be one of {', '.join(MASKS)}, random:FRACTION or an image file, not {text!r}")
    pixels = read_image(path, "L", None)
    if pixels.shape[:2] != (height, width):
        raise UserError(f"--mask {text}: the image is {_size(pixels.shape)}, the network takes {height}×{width}")
    return pixels >= 128


def _fraction(text: str) -> float:
    try:
        return real(0, 1)(text)
    except (ValueError, argparse.ArgumentTypeError):
        raise UserError(f"--mask random:FRACTION needs a number in 0..1, not {text!r}") from None


def _size(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape[:2]))


# ----------------------------------------------------------------------------------------------------------------------- input


def _images(options: Any, config: Config, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray | None, tuple[str, ...]]:
    """(images uint8 (n, H, W, C), their labels where there are, the names of the classes)."""
    if options.image:
        for name, value in (("--data", options.data), ("--index", options.index), ("--n", options.n)):
            if value is not None:
                raise UserError(f"{name} does not go with --image")
        return np.stack([_image(path, shape) for path in options.image]), None, ()
    found = data.load(options.data or config.data.path, options.split)
    if found.shape != shape:
        sizes = "×".join(map(str, found.shape)), "×".join(map(str, shape))
        raise UserError(f"{found.name}: its images are {sizes[0]}, want {sizes[1]} here")
    if options.index is None:
        n = options.n or min(10, len(found) // 2 * 2)
        if n > len(found):
            raise UserError(f"--n must be in 1..{len(found)}, the images of the {options.split} split, not {n}")
        rows = _spread(found.labels, n, len(found))
    else:
        if options.n is not None:
            raise UserError("--n does not go with --index")
        if max(options.index) >= len(found):
            raise UserError(f"--index must be in 0..{len(found) - 1}, not {max(options.index)}")
        rows = np.array(options.index)
    return np.asarray(found.images[rows]), None if found.labels is None else found.labels[rows], found.classes


def _spread(labels: np.ndarray | None, n: int, total: int) -> np.ndarray:
    """n rows: the first of each class, then the second of each, …; the first n where there are no classes."""
    if labels is None:
        return np.arange(n)
    rank = np.empty(total, np.int64)
    for c in np.unique(labels):
        at = np.flatnonzero(labels == c)
        rank[at] = np.arange(len(at))
    return np.lexsort((labels, rank))[:n]


def _image(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    if shape[2] not in (1, 3):
        raise UserError(f"--image: the network's images have {shape[2]} channels, image files have 1 or 3")
    pixels = read_image(path, "L" if shape[2] == 1 else "RGB", None)
    if pixels.shape != shape:
        raise DataError(path, f"is {_size(pixels.shape)}, want {_size(shape)} here (images are not resized)")
    return pixels


def _classes(options: Any, classes: tuple[str, ...], own: np.ndarray | None, names: tuple[str, ...], n: int) -> np.ndarray | None:
    """The classes that the network is told (n,), or None for none."""
    asked = options.classes
    if asked is None:
        asked = "labels" if classes and own is not None and options.mode != "interpolate" else "none"
    if asked == "none":
        return None
    if not classes:
        raise UserError(f"--class {asked}: this network has no classes")
    if asked == "labels":
        if own is None:
            raise UserError("--class labels: these images have no labels")
        if names != classes:
            raise UserError("--class labels: these images have other classes than the network: give --class none, or one class")
        return own
    parts = [asked] if asked in classes else [part.strip() for part in asked.split(",")]  # a name may hold a comma
    numbers = [trained.class_number(part, classes) for part in parts]
    if None in numbers:
        raise UserError(f"--class must be labels, none, numbers in 0..{len(classes) - 1} or names of classes, not {asked!r}")
    return np.resize(np.array(numbers, np.int64), n)


# ---------------------------------------------------------------------------------------------------------------------- output


def _draw(job: Job, pixels: dict[str, np.ndarray], title: str, path: Path) -> None:
    stacked = np.stack([row[:COLUMNS] for row in pixels.values()])
    if job.across:
        stacked = stacked.swapaxes(0, 1)
    tiles = stacked.reshape(-1, *stacked.shape[2:])
    pictures.write(pictures.sheet(tiles, stacked.shape[1], () if job.across else tuple(pixels), title), path)


def _write(
    job: Job,
    pixels: dict[str, np.ndarray],
    labels: np.ndarray | None,
    classes: tuple[str, ...],
    about: dict[str, Any],
    path: Path,
) -> None:
    """`images`: the results, one row of the sheet after the other, and beside them every other row under its name."""
    images = np.concatenate([pixels[name] for name in job.result])
    columns = {name: row for name, row in pixels.items() if name not in job.result}
    if labels is not None and not job.across:
        columns["labels"] = np.tile(labels, len(job.result)).astype(np.int32)
    if len(job.result) > 1:
        columns["row"] = np.repeat(np.array(job.result, "S"), len(images) // len(job.result))
    dataset_file.write(path, images.shape, [images], columns, classes if labels is not None else (), about)


def _report(job: Job, found: dict[str, list[np.ndarray]]) -> list[str]:
    """One line for each row that is compared: per-dimension MSE and PSNR, of images in [−1, 1]."""
    whole: dict[str, np.ndarray] = {name: np.clip(np.concatenate(row), -1, 1) for name, row in found.items()}
    lines = []
    for name, to in job.compared.items():
        error, decibels = per_dimension_mse(whole[name], whole[to]), editing.psnr(whole[name], whole[to])
        lines.append(
            f"{name} against {to}: MSE {error.mean():.3g} per dimension ({error.min():.2g}..{error.max():.2g}), "
            f"median PSNR {np.median(decibels):.1f} dB"
        )
    return lines


if __name__ == "__main__":
    raise SystemExit(main())
