"""Reads a file of digit samples: how many are what was asked for, and are they copies? The judge never saw the samples.

    python bench/judge_digits.py SAMPLES.h5 [--at-least 0.98]

An RBF-SVM trained on the real training digits reads each sample; the share read as the class asked for is the accuracy. Copies
show in the distance to the nearest training image: its median over the samples, divided by its median over held-out real digits,
is near 1 for new digits and near 0 for copies.
"""

import argparse
import sys

import numpy as np

from alphabar.core import data


def nearest(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Euclidean distance of each row of ``a`` to its nearest row of ``b``."""
    squares = (a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T
    return np.sqrt(np.maximum(squares, 0).min(axis=1))


def flat(digits: data.Dataset) -> np.ndarray:
    """Pixels in [0, 1], one row for each image."""
    return digits.images[:].reshape(len(digits), -1) / 255


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="share of samples read as the class asked for, and distance to the training set")
    parser.add_argument("samples", help="HDF5 file with images (uint8) and labels, as tools/sample.py writes it")
    parser.add_argument("--at-least", type=float, default=0.0, metavar="SHARE", help="exit 1 below this accuracy")
    args = parser.parse_args(argv)

    from sklearn.svm import SVC

    train, test, made = data.load("digits", "train"), data.load("digits", "test"), data.load(args.samples)
    seen, held, samples = flat(train), flat(test), flat(made)
    labels = made.labels
    if labels is None:
        parser.error(f"{args.samples} holds no labels")
    judge = SVC(kernel="rbf", gamma="scale", C=10).fit(seen, train.labels)
    on_real = float((judge.predict(held) == test.labels).mean())
    right = judge.predict(samples) == labels
    accuracy = float(right.mean())
    held_out, generated = nearest(held, seen), nearest(samples, seen)
    print(f"accuracy      {accuracy:.4f} of {len(samples)} samples (the judge reads {on_real:.4f} of held-out digits)")
    print("by class      " + "  ".join(f"{k}:{right[labels == k].mean():.3f}" for k in np.unique(labels)))
    ours, theirs = float(np.median(generated)), float(np.median(held_out))
    print(f"copies        median distance to a training digit {ours:.3f}, of held-out {theirs:.3f}, ratio {ours / theirs:.3f}")
    near = float((generated < np.percentile(held_out, 1)).mean())
    print(f"              {near:.3f} of the samples are nearer than the nearest 1 % of held-out digits")
    if accuracy < args.at_least:
        print(f"below the {args.at_least:.2f} asked for", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
