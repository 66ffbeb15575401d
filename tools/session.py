"""The training loop around the steps: progress, metrics, checkpoints, previews, signals, and what a failure leads to."""

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from alphabar.nets import checkpoint
from alphabar.tools import sampling, sheets, sources
from alphabar.tools.command import Failure
from alphabar.tools.config import ConfigError
from alphabar.tools.progress import Progress
from alphabar.tools.runs import Run
from alphabar.tools.sampling import Sampler
from alphabar.tools.trainer import NotFinite, Step, Trainer

Result = TypeVar("Result")
ROWS = 20  # classes on a sheet, at most
MAX_FAILED_SAVES = 3


def own_sampler(trainer: Trainer) -> Sampler:
    """The sampler that the section [sample] of a trainer's configuration asks for; ConfigError where it cannot be."""
    try:
        return sampling.sampler(trainer.process, trainer.config.sample)
    except ValueError as e:
        raise ConfigError(f"[sample]: {e}") from e


class Stop:
    """SIGINT and SIGTERM as a wish to stop after the step at hand; a second signal changes nothing."""

    def __init__(self) -> None:
        self.signal = 0

    def __call__(self, number: int, frame: Any) -> None:
        self.signal = self.signal or number

    @contextlib.contextmanager
    def listening(self) -> Iterator["Stop"]:
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        old = {s: signal.signal(s, self) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for s, handler in old.items():
                signal.signal(s, handler)


class Session:
    """One start of the training program on a run folder: steps, metrics, checkpoints, previews."""

    def __init__(self, trainer: Trainer, run: Run, quiet: bool = False) -> None:
        self.trainer, self.run, self.quiet = trainer, run, quiet
        self.log = trainer.config.log
        self.sampler = own_sampler(trainer)
        self.failed_saves, self.told = 0, False
        self.saved = trainer.done if checkpoint.listing(run.checkpoints) else -1

    def attempt(self, what: str, action: Any, *arguments: Any) -> bool:
        """Do what the training can go on without: an error of the disk becomes a warning."""
        try:
            action(*arguments)
        except OSError as e:
            print(f"alphabar train: warning: {what} was not written ({e.strerror or e})", file=sys.stderr)
            return False
        return True

    def save(self) -> None:
        """Write a checkpoint unless this step has one; Failure when it went wrong too often in a row."""
        self.finite(self.trainer.check)
        done = self.trainer.done
        if self.saved == done:
            return
        if self.attempt(f"checkpoint of step {done}", self.run.save, *self.trainer.state(), self.log.keep):
            self.saved, self.failed_saves = done, 0
            return
        self.failed_saves += 1
        if self.failed_saves >= MAX_FAILED_SAVES:
            raise Failure(
                f"{self.run.checkpoints}: {self.failed_saves} checkpoints in a row could not be written: stopped at step {done}"
            )

    def sheet(self, name: str, progress: Any = None) -> Path:
        """Draw a sheet of samples from the averaged weights, images with a row for each class; returns its file."""
        self.finite(self.trainer.check)
        t, s = self.trainer, self.trainer.config.sample
        classes = t.data.classes[:ROWS] if t.conditional else ()
        n = s.columns * (len(classes) or (s.columns if sources.kind(t.data) == "images" else 1))
        labels = np.repeat(np.arange(len(classes)), s.columns) if classes else None
        try:
            with t.averaged() as net:
                chosen = (t.process, net, self.sampler, labels, n, t.config.train.seed)
                drawn = np.concatenate(list(sampling.draw(*chosen, batch=n, progress=progress, how=sampling.guide(s))))
        except ValueError as e:
            raise Failure(f"no samples could be drawn: {e}") from e
        title = f"{self.run.path.name}, step {t.done}: {self.sampler.name}" + (f", w = {s.guidance:g}" if classes else "")
        path = (self.run.samples / name).with_suffix(sheets.SUFFIX[sources.kind(t.data)])
        self.attempt("a sheet of samples", sheets.write, t.data, drawn, s.columns, classes, title, path)
        return path

    def steps(self, stop: Stop) -> None:
        """Train to the last step, or to the end of the step in which a signal came."""
        trainer, log, total = self.trainer, self.log, self.trainer.config.train.steps
        steps, seconds, unit = 0, 0.0, sources.UNITS[sources.kind(trainer.data)]  # since the last line of metrics
        with Progress("training", total, trainer.done, self.quiet) as bar:
            while trainer.done < total and not stop.signal:
                start = time.perf_counter()
                self.finite(trainer.step if trainer.waits else trainer.advance)
                steps += 1
                last = trainer.done == total or bool(stop.signal)
                if trainer.done % log.every == 0 or last:
                    report = self.finite(trainer.report)  # a GPU is waited for here alone, and below where the weights are wanted
                    seconds += time.perf_counter() - start
                    speed = steps * trainer.config.train.batch / seconds
                    self.attempt("a line of metrics.jsonl", self.run.log, _record(trainer.done, report, unit, speed))
                    bar.note(f"loss {report.loss:.4f}, {speed:,.0f} {unit}/s")
                    steps, seconds = 0, 0.0
                    self.tell_of_plain_steps()
                else:
                    seconds += time.perf_counter() - start
                bar.advance()
                if trainer.done % log.checkpoints == 0 and not last:
                    self.save()
                if log.samples and trainer.done % log.samples == 0 and not last:
                    self.sheet(f"step_{trainer.done:08d}")
                    self.attempt("loss.png", self.run.draw_curve)
        self.save()
        self.attempt("loss.png", self.run.draw_curve)
        if self.saved != trainer.done:
            raise Failure(f"{self.run.checkpoints}: the last checkpoint, of step {trainer.done}, could not be written")

    def tell_of_plain_steps(self) -> None:
        """One line, once, where steps should have been made in one piece and could not be."""
        captured = self.trainer.captured
        if captured is not None and captured.refused is not None and not self.told:
            self.told = True
            print(f"alphabar train: warning: steps are made call by call, not in one piece ({captured.refused})", file=sys.stderr)

    def finite(self, of_trainer: Callable[[], Result]) -> Result:
        """What the trainer answers; where a step is not finite the run ends, with its inputs kept and no checkpoint touched."""
        try:
            return of_trainer()
        except NotFinite as e:
            path = self.run.path / f"crash_step_{self.trainer.done + 1:08d}.h5"
            meta = {
                "kind": "alphabar-crash",
                "step": self.trainer.done + 1,
                "seed": self.trainer.config.train.seed,
                "error": str(e),
            }
            self.attempt(path.name, checkpoint.save, path, e.arrays, meta)
            raise Failure(f"{e}. What it worked on is in {path}; the checkpoints before it are untouched") from e


def _record(step: int, report: Step, unit: str, speed: float) -> dict[str, Any]:
    return {
        "step": step,
        "loss": report.loss,
        "grad_norm": report.grad_norm,
        "lr": report.lr,
        f"{unit}_per_s": round(speed, 1),
        "time": round(time.time(), 3),
    }
