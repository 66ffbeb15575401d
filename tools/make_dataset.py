"""`alphabar make-dataset`: images from a folder, or from IDX files, into one HDF5 data set for training."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from alphabar.core.data import DataError
from alphabar.kernels.counter import permutation
from alphabar.kernels.streams import ORDER
from alphabar.tools import dataset_file, idx
from alphabar.tools.command import Failure, Parser, UserError, integer, output, program, real
from alphabar.tools.progress import Progress

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm", ".pbm"}
EXAMPLES = """examples:
  alphabar make-dataset photos --size 32 --out photos.h5          labels are the names of the subfolders
  alphabar make-dataset --images train-images-idx3-ubyte.gz --labels train-labels-idx1-ubyte.gz \\
      --test-images t10k-images-idx3-ubyte.gz --test-labels t10k-labels-idx1-ubyte.gz --out mnist.h5
  alphabar make-dataset photos --size 28 --pad 32 --background 255 --limit 500 --out few.h5
"""


@program("make-dataset")
def main(argv: Sequence[str] | None = None) -> int:
    """Build a data set; returns the exit code."""
    parser = Parser(prog="alphabar make-dataset", description=__doc__, epilog=EXAMPLES)
    parser.add_argument("folder", nargs="?", type=Path, help="folder of images; each subfolder is a class")
    parser.add_argument("--images", type=Path, help="IDX file of images, plain or .gz")
    parser.add_argument("--labels", type=Path, help="IDX file of their labels")
    parser.add_argument("--test-images", type=Path, help="IDX file of test images")
    parser.add_argument("--test-labels", type=Path, help="IDX file of their labels")
    parser.add_argument("--out", type=Path, required=True, help="HDF5 file to write")
    parser.add_argument("--size", type=_size, help="N or HxW: crop to this shape from the centre and resize (folders)")
    parser.add_argument("--pad", type=_size, metavar="SIZE", help="N or HxW: bring images to this shape by an even border")
    parser.add_argument(
        "--background", type=integer(0, 255), metavar="VALUE", help="grey value of that border: 0 (default) is black, 255 white"
    )
    parser.add_argument(
        "--limit",
        type=integer(1, 10**9),
        metavar="N",
        help="the first N images of every class only (without labels: the first N), of training and test images alike",
    )
    colour = parser.add_mutually_exclusive_group()
    colour.add_argument("--gray", action="store_const", const="L", dest="mode", help="one channel (folders)")
    colour.add_argument("--rgb", action="store_const", const="RGB", dest="mode", help="three channels (folders)")
    parser.add_argument("--classes", help="names of the classes, comma-separated, in the order of their labels (IDX)")
    parser.add_argument("--split", type=real(0, 0.9), default=0.0, metavar="FRACTION", help="share of test images, 0 by default")
    parser.add_argument("--force", action="store_true", help="replace the file if it exists")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    options = parser.parse_args(argv)
    if (options.folder is None) == (options.images is None):
        raise UserError("give either a folder or --images")
    if options.background is not None and options.pad is None:
        raise UserError("--background goes with --pad")
    if options.out.exists() and not options.force:
        raise UserError(f"{options.out} exists already; --force replaces it")
    output(options.out)
    try:
        if options.folder is not None:
            given = [n for n in ("labels", "test_images", "test_labels", "classes") if getattr(options, n) is not None]
            if given:
                raise UserError(f"--{given[0].replace('_', '-')} goes with --images, not with a folder")
            report = _from_folder(options)
        else:
            if options.size or options.mode:
                raise UserError("--size, --gray and --rgb go with a folder, not with --images")
            report = _from_idx(options)
    except OSError as e:
        raise Failure(f"{options.out}: {e.strerror or e}") from e
    print(f"wrote {options.out}: {report}")
    return 0


def _size(text: str) -> tuple[int, int]:
    parts = [int(p) for p in text.lower().split("x")]
    if len(parts) not in (1, 2) or not all(1 <= p <= 8192 for p in parts):
        raise ValueError(text)
    return parts[0], parts[-1]


_size.__name__ = "size (N or HxW)"


def _padded(block: np.ndarray, size: tuple[int, int] | None, background: int | None, path: Path) -> np.ndarray:
    """Images (n, H, W, C) in the middle of a border that makes them ``size``; an odd row or column goes below or to the right."""
    if size is None:
        return block
    missing = [want - have for want, have in zip(size, block.shape[1:3], strict=True)]
    if min(missing) < 0:
        raise DataError(path, f"is {block.shape[1]}×{block.shape[2]}, too large to be padded to {size[0]}×{size[1]}")
    border = [(0, 0), *((m // 2, m - m // 2) for m in missing), (0, 0)]
    return np.pad(block, border, constant_values=background or 0)


def _first(labels: np.ndarray | None, n: int, limit: int | None) -> np.ndarray:
    """The rows of the first ``limit`` images of every class, ascending."""
    if limit is None or labels is None:
        return np.arange(n if limit is None else min(n, limit))
    return np.sort(np.concatenate([np.flatnonzero(labels == c)[:limit] for c in np.unique(labels)]))


def _test_part(labels: np.ndarray | None, n: int, fraction: float) -> np.ndarray:
    """The column `split`: ``fraction`` of each class, drawn at random but always the same."""
    split = np.zeros(n, np.uint8)
    groups = [np.arange(n)] if labels is None else [np.flatnonzero(labels == c) for c in np.unique(labels)]
    for k, rows in enumerate(groups):
        split[rows[permutation(len(rows), 0, k, ORDER)[: round(len(rows) * fraction)]]] = 1
    return split


def _columns(labels: np.ndarray | None, split: np.ndarray) -> dict[str, np.ndarray]:
    columns = {} if labels is None else {"labels": labels.astype(np.uint8 if labels.max() < 256 else np.int32)}
    return columns | ({"split": split} if split.any() else {})


def _report(shape: Sequence[int], classes: Sequence[str], split: np.ndarray) -> str:
    n, h, w, c = shape
    kind = f"{len(classes)} classes" if classes else "no labels"
    return f"{n:,} images {h}×{w}×{c}, {kind}, {int((split == 0).sum()):,} train, {int((split == 1).sum()):,} test"


# --------------------------------------------------------------------------------------------------------------- IDX files


def _from_idx(options: Any) -> str:
    parts = [(options.images, options.labels)]
    if options.test_images is not None:
        parts.append((options.test_images, options.test_labels))
        if (options.labels is None) != (options.test_labels is None):
            raise UserError("--labels and --test-labels go together")
        if options.split:
            raise UserError("--split cannot be given with --test-images")
    elif options.test_labels is not None:
        raise UserError("--test-labels goes with --test-images")
    images, labels, first = [], [], None
    for image_path, label_path in parts:
        images.append(idx.read(image_path, 3))
        (h, w), first = images[-1].shape[1:], first or images[-1].shape[1:]
        if (h, w) != first:
            raise DataError(image_path, f"its images are {h}×{w}, those of {parts[0][0]} are {first[0]}×{first[1]}")
        if label_path is not None:
            labels.append(idx.read(label_path, 1))
            if len(labels[-1]) != len(images[-1]):
                raise DataError(label_path, f"holds {len(labels[-1]):,} labels for {len(images[-1]):,} images")
        kept = _first(labels[-1] if labels else None, len(images[-1]), options.limit)
        images[-1] = _padded(images[-1][kept, ..., None], options.pad, options.background, image_path)
        if labels:
            labels[-1] = labels[-1][kept]
    n = sum(map(len, images))
    shape = (n, *images[0].shape[1:])
    all_labels = np.concatenate(labels) if labels else None
    classes = _idx_classes(options.classes, all_labels)
    split = np.repeat([0, 1], [len(images[0]), n - len(images[0])]).astype(np.uint8)
    if options.split:
        split = _test_part(all_labels, n, options.split)
    source = ", ".join(p.name for pair in parts for p in pair if p is not None)
    dataset_file.write(options.out, shape, images, _columns(all_labels, split), classes, {"source": source})
    return _report(shape, classes, split)


def _idx_classes(names: str | None, labels: np.ndarray | None) -> tuple[str, ...]:
    if labels is None:
        if names:
            raise UserError("--classes goes with --labels")
        return ()
    count = int(labels.max()) + 1
    classes = tuple(names.split(",")) if names else tuple(map(str, range(count)))
    if len(classes) < count:
        raise UserError(f"--classes names {len(classes)} classes, the labels reach {count - 1}")
    return classes


# ------------------------------------------------------------------------------------------------------- folders of images


def _from_folder(options: Any) -> str:
    files, classes = _files(options.folder)
    labels = np.array([k for _, k in files]) if classes else None
    kept = _first(labels, len(files), options.limit)
    files, labels = [files[k] for k in kept], None if labels is None else labels[kept]
    first = read_image(files[0][0], options.mode, options.size)
    mode = options.mode or ("L" if all(_is_gray(path) for path, _ in files) else "RGB")
    channels = 1 if mode == "L" else 3
    shape = (len(files), *(options.pad or first.shape[:2]), channels)
    split = _test_part(labels, len(files), options.split)

    def blocks() -> Iterator[np.ndarray]:
        with Progress("reading", len(files), 0, options.quiet, "image") as bar:
            for path, _ in files:
                image = read_image(path, mode, options.size)
                if image.shape != (*first.shape[:2], channels):
                    raise DataError(
                        path,
                        f"is {image.shape[0]}×{image.shape[1]}, {files[0][0].name} is {first.shape[0]}×{first.shape[1]}: "
                        "give --size to bring all to one shape",
                    )
                yield _padded(image[None], options.pad, options.background, path)
                bar.advance()

    attributes = {"source": f"folder {options.folder.resolve().name}"}
    dataset_file.write(options.out, shape, blocks(), _columns(labels, split), classes, attributes)
    return _report(shape, classes, split)


def _files(folder: Path) -> tuple[list[tuple[Path, int]], tuple[str, ...]]:
    """(path, label) of every image in a folder, sorted, and the class names; files that are no images are passed over."""

    def images(directory: Path) -> list[Path]:
        try:
            entries = sorted(directory.iterdir())
        except OSError as e:
            raise DataError(directory, e.strerror or str(e)) from e
        return [p for p in entries if p.suffix.lower() in SUFFIXES and not p.name.startswith(".") and p.is_file()]

    top = images(folder)
    subfolders = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    inside = {p.name: found for p in subfolders if (found := images(p))}
    if top and inside:
        raise DataError(folder, f"has images beside the class folder {next(iter(inside))!r}: put every image into a class folder")
    if not top and not inside:
        raise DataError(folder, f"holds no images ({', '.join(sorted(s[1:] for s in SUFFIXES))})")
    if top:
        return [(p, 0) for p in top], ()
    return [(p, k) for k, found in enumerate(inside.values()) for p in found], tuple(inside)


def _is_gray(path: Path) -> bool:
    with _opened(path) as image:
        return image.mode in ("1", "L") or image.mode.startswith("I")


def _opened(path: Path) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(path)
    except UnidentifiedImageError as e:
        raise DataError(path, "not an image that can be read") from e
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
        raise DataError(path, getattr(e, "strerror", None) or str(e)) from e


def read_image(path: Path, mode: str | None, size: tuple[int, int] | None) -> np.ndarray:
    """One image as uint8 (H, W, C): upright, on white where it is transparent, cropped from the centre and resized."""
    from PIL import Image, ImageOps

    with _opened(path) as image:
        try:
            upright = ImageOps.exif_transpose(image)
            if upright.mode == "F":
                raise DataError(path, "holds floating-point numbers, whose white is not known: save it with 8 or 16 bits")
            if upright.mode.startswith("I"):  # 16 bits a pixel
                wide = np.asarray(upright, np.int64)
                upright = Image.fromarray((wide.clip(0, 65535) / 257 + 0.5).astype(np.uint8))
            if upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info:
                clear = upright.convert("RGBA")
                upright = Image.alpha_composite(Image.new("RGBA", clear.size, (255, 255, 255, 255)), clear)
            plain = upright.convert(mode or "RGB")
            if size is not None and plain.size != size[::-1]:
                plain = ImageOps.fit(plain, size[::-1], Image.Resampling.LANCZOS)
        except DataError:
            raise
        except (OSError, ValueError, SyntaxError, EOFError) as e:
            raise DataError(path, f"cannot be decoded ({e})") from e
    pixels = np.asarray(plain, np.uint8)
    return pixels[..., None] if pixels.ndim == 2 else pixels


if __name__ == "__main__":
    raise SystemExit(main())
