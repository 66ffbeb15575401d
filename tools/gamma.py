"""Γ of a checkpoint's network, for the best variance of its samplers: measured once on the run's images and kept in the file."""

import os
import sys

import numpy as np

from alphabar.core import analytic, data
from alphabar.core.data import to_unit
from alphabar.core.levels import Levels
from alphabar.nets import checkpoint
from alphabar.nets.checkpoint import CheckpointError
from alphabar.tools.methods import Process
from alphabar.tools.progress import Progress
from alphabar.tools.trained import Trained
from alphabar.tools.trainer import check_data, group_of

GROUP = "gamma"
IMAGES, TIMES = 128, 200  # that Γ is measured on, at most


def of(network: Trained, conditional: bool, raw_weights: bool = False, quiet: bool = False) -> analytic.Gamma:
    """Γ of these weights, told the class of each image where ``conditional``: from the checkpoint, or measured and put there.

    The file then holds four groups at most, ``gamma`` for averaged weights, ``gamma_none`` where a network with classes is not
    told them, and both of raw weights; all else in it stays, and so does its time. Raises DataError or CheckpointError where the
    images of the run are not there any more.
    """
    path, arrays, meta = network.path, *checkpoint.load(network.path)
    group = GROUP + "_none" * (bool(network.classes) and not conditional) + "_raw" * raw_weights
    saved = group_of(arrays, group)
    if saved:
        try:
            return analytic.Gamma.from_arrays(saved)
        except (KeyError, ValueError) as e:
            raise CheckpointError(path, f"its {group} cannot be used: {e}") from e
    images = data.load(network.config.data.path, network.config.data.split)
    check_data(path, meta, images)
    xp, process = network.net.params.xp, Process(network.config)
    batch, labels, _ = images.batch(0, min(IMAGES, len(images)))
    y = xp.asarray(labels) if conditional else None
    predict, times = process.predict(network.net.predict), _times(process.levels)
    with Progress("measuring", len(times), 0, quiet) as bar:
        found = analytic.measure_gamma(
            lambda x, t: predict(x, t, y),
            to_unit(xp.asarray(batch)),
            process.levels,
            times,
            prediction=process.prediction,
            batch=len(batch),  # at once, in the order of y
            progress=lambda done, calls: bar.advance(),
        )
    try:
        before = os.stat(path)
        checkpoint.save(path, arrays | {f"{group}/{name}": a for name, a in found.arrays().items()}, meta)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # the latest run is found by it
    except OSError as e:
        print(f"alphabar sample: warning: {path}: {group} could not be kept ({e.strerror or e})", file=sys.stderr)
    return found


def _times(s: Levels) -> np.ndarray:
    """Both ends and times between them, dense near the data."""
    return np.unique(np.r_[s.t_min, s.times(min(TIMES, int(s.T)), "quadratic"), s.T])
