"""`alphabar train`: train a diffusion model on images or text and draw samples. With no argument: handwritten digits."""

import dataclasses
import resource
import sys
import time
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from alphabar.kernels.device_memory import OutOfDeviceMemory, memory_told
from alphabar.nets import checkpoint
from alphabar.nets.checkpoint import CheckpointError
from alphabar.tools import compiling, families, memory, networks, runs, sources
from alphabar.tools import config as configs
from alphabar.tools.command import Failure, Parser, UserError, device, integer, program
from alphabar.tools.config import Config, ConfigError
from alphabar.tools.progress import Progress
from alphabar.tools.session import Session, Stop, own_sampler
from alphabar.tools.trainer import Trainer, check_data, check_kind

EXAMPLES = """examples:
  alphabar train                                            handwritten digits, a few minutes on two cores
  alphabar train --data photos.h5 --steps 20000 --set model.channels=64,128,256
  alphabar train --set method=ncsn                          another way to train: ddpm, ncsn, vpsde, vesde, subvpsde
  alphabar train --set method=d3pm --set diffusion.transition=gaussian    images in grey levels: also multinomial
  alphabar train --data kjv --set method=d3pm               text: the built-in one, or a .txt file
  alphabar train --set train.loss=hybrid --set train.importance=true      learn the variance of the steps too
  alphabar train --device cuda --set train.precision=bf16   on a GPU, on its tensor cores
  alphabar train --resume auto                              go on with the latest run
  alphabar train --dry-run --set model.blocks=3             what would it cost?
"""
FIXED = ("method", "model", "diffusion", "train.loss", "data.length")  # what a resumed run cannot change


@program("train")
def main(argv: Sequence[str] | None = None) -> int:
    """Train; returns the exit code."""
    options = _parser().parse_args(argv)
    xp, where = device(options.device)
    found = _to_resume(options)
    config = _config(options, found)
    dataset = sources.load(config)
    config = families.of(config).resolved(config, dataset)
    if found is not None:
        _check_fixed(config, found, dataset)
    if config.model.conditional and dataset.labels is None and sources.kind(dataset) == "images":
        _say(options, f"{dataset.name} has no labels: training without classes")
    if found is not None:
        check_data(found[0], found[2], dataset)
    try:
        with memory_told():
            return _run(options, config, found, dataset, xp, where)
    except OutOfDeviceMemory as e:
        failed = OutOfDeviceMemory(e.asked, e.free, e.total)  # without the frames that hold the run's arrays
    raise Failure(memory.advice(config, dataset, xp, failed, where))


def _run(options: Any, config: Config, found: "Found | None", dataset: Any, xp: ModuleType, where: str) -> int:
    """The run, or the dry run, once its settings are known."""
    trainer = Trainer(config, dataset, xp)
    if found is not None:
        trainer.restore(*found)
    for line in (trainer.precision_note, _other_precision(config, found)):
        if line is not None:
            _say(options, line)
    own_sampler(trainer)  # a mistake there should show now, not after the training
    if options.dry_run:
        return _dry_run(trainer, where)
    run = runs.Run(_folder(options, config, found))
    try:
        return _train(trainer, run, options, where)
    finally:
        run.close()


def _parser() -> Parser:
    parser = Parser(prog="alphabar train", description=__doc__, epilog=EXAMPLES)
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file with settings, such as a run's config.toml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="one setting, e.g. train.lr=1e-3")
    parser.add_argument(
        "--data", metavar="FILE", help=f"HDF5 data set, text file (.txt), or a built-in one: {', '.join(sources.BUILT_IN)}"
    )
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda or cuda:N")
    parser.add_argument("--seed", type=integer(0, 2**63 - 1), help="the one number that all randomness follows from")
    parser.add_argument("--steps", type=integer(1, 10**9), help="training steps in all")
    parser.add_argument("--resume", metavar="auto|PATH", help="go on: with the latest run, or with a run folder or checkpoint")
    parser.add_argument("--out", type=Path, default=Path("runs"), metavar="FOLDER", help="folder of the runs (default: runs)")
    parser.add_argument("--name", help="name of the run folder (default: the data's name and a number)")
    parser.add_argument("--dry-run", action="store_true", help="print settings, size and time of a step; write nothing")
    parser.add_argument("--quiet", action="store_true", help="print errors only")
    return parser


def _say(options: Any, text: str) -> None:
    if not options.quiet:
        print(text, file=sys.stderr, flush=True)


# ----------------------------------------------------------------------------------------------------------- what to train

Found = tuple[Path, dict[str, np.ndarray], dict[str, Any]]


def _to_resume(options: Any) -> Found | None:
    """(path, arrays, meta) of the checkpoint to go on from, or None for a new run."""
    if options.name is not None and (options.name in ("", "..") or Path(options.name).name != options.name):
        raise UserError(f"--name must be the name of a folder inside --out, not {options.name!r}")
    if options.resume is None:
        return None
    if options.resume == "auto":
        folder = runs.latest(options.out, None if options.name is None else [options.name])
        if folder is None:
            _say(options, f"nothing to resume in {options.out}: starting a new run")
            return None
    else:
        folder = Path(options.resume)
        if options.name is not None and folder.is_dir():
            raise UserError("--name cannot be given with --resume FOLDER")
    path, arrays, meta = runs.read(folder)
    check_kind(path, meta)
    return path, arrays, meta


def _config(options: Any, found: Found | None) -> Config:
    """Defaults or the resumed run's configuration, then the file, then --set, then the options of their own."""
    base = None
    if found is not None:
        try:
            base = configs.from_dict(found[2]["config"])
        except ConfigError as e:
            raise CheckpointError(found[0], f"its configuration cannot be used: {e}") from e
    own = {"data.path": options.data, "train.seed": options.seed, "train.steps": options.steps}
    config = configs.load(options.config, options.set, base, {k: v for k, v in own.items() if v is not None})
    if config.data.path not in sources.BUILT_IN:  # found again from another directory
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, path=str(Path(config.data.path).absolute())))
    return config


def _check_fixed(config: Config, found: Found, dataset: Any) -> None:
    """UserError where a resumed run would change what its checkpoint was trained with."""
    before = configs.from_dict(found[2]["config"])
    before = families.of(before).resolved(before, dataset)  # what an older version did not write down
    for name in FIXED:
        of_section = [key for key in configs.TYPES if key.startswith(f"{name}.")]
        for key in of_section or [name]:
            value = attrgetter(key)
            if value(config) != value(before):
                raise UserError(f"a resumed run cannot change {key}: its checkpoint has {value(before)}")


def _other_precision(config: Config, found: Found | None) -> str | None:
    """What to say where a resumed run goes on in another precision than it was trained in."""
    before = None if found is None else configs.from_dict(found[2]["config"]).train.precision
    return None if before in (None, config.train.precision) else f"precision   {config.train.precision}, {before} before"


def _folder(options: Any, config: Config, found: Found | None) -> Path:
    """The run folder: the resumed run's own if the checkpoint is its newest, else a new one."""
    if found is not None:
        home = found[0].parent.parent
        inside = found[0].parent.name == "ckpt" and (home / "config.toml").exists()
        newer = [p for step, p in checkpoint.listing(found[0].parent) if step > found[2]["step"] and _valid(p)]
        if inside and not newer and options.name in (None, home.name):
            return home
        reason = f"its run goes on to {newer[0].name}" if newer else "it stands outside a run folder"
        _say(options, f"{found[0]}: {reason}, so this training gets a folder of its own")
    if options.name is None:
        return runs.new_folder(options.out, Path(config.data.path).stem)
    folder = options.out / options.name
    if checkpoint.listing(folder / "ckpt"):
        raise UserError(f"{folder} holds a run already: --resume auto goes on with it, another --name starts a new one")
    return folder


def _valid(path: Path) -> bool:
    try:
        checkpoint.load(path)
    except CheckpointError:
        return False
    return True


# ----------------------------------------------------------------------------------------------------------------- dry run


def _dry_run(trainer: Trainer, where: str) -> int:
    """Print what a run would be and cost, from three real steps; write nothing."""
    print(configs.to_toml(trainer.config))
    store = trainer.net.params
    print(f"parameters        {store.count:,}")
    print(f"data              {sources.described(trainer.data)}", flush=True)
    print("measuring a step …", file=sys.stderr, flush=True)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        trainer.step()
        times.append(time.perf_counter() - start)
    step, unit = min(times[1:]), sources.UNITS[sources.kind(trainer.data)]
    state, work = 5 * store.data.nbytes, trainer.work_nbytes
    print(f"weights           {state / 2**20:,.0f} MiB with gradient, moments and running average")
    print(f"work arrays       {work / 2**20:,.0f} MiB; {_peak():,.0f} MiB peak of this process")
    print(f"one step          {step * 1e3:,.1f} ms on {where}, {trainer.config.train.batch / step:,.0f} {unit}/s")
    print(f"the whole run     {_clock(step * max(0, trainer.config.train.steps - trainer.done + len(times)))}")
    return 0


def _peak() -> float:
    """The most memory that this process has held, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


# ---------------------------------------------------------------------------------------------------------------- training


def _train(trainer: Trainer, run: runs.Run, options: Any, where: str) -> int:
    """Train in a run folder, draw the last sheet, say where things are. Returns the exit code."""
    session, start, total = Session(trainer, run, options.quiet), trainer.done, trainer.config.train.steps
    try:
        run.begin(trainer.config, where, start)
    except OSError as e:
        raise Failure(f"{run.path}: {e.strerror or e}") from e
    classes = f", {len(trainer.data.classes)} classes" if trainer.conditional else ""
    _say(options, f"data        {trainer.data.name}: {sources.described(trainer.data)}{classes}")
    within = "" if trainer.net.computes == "fp32" else f" in {trainer.net.computes}"
    _say(options, f"network     {trainer.net.params.count:,} parameters on {where}{within}")
    _say(options, f"run folder  {run.path}" + (f", going on after step {start:,} of {total:,}" if start else ""))
    if where == "cpu" and start < total:
        compiling.ahead(compiling.needed(networks.kind_of(trainer.net), trainer.config.method, training=True), options.quiet)
    begun = time.perf_counter()
    if start < total:
        with Stop().listening() as stop:
            session.steps(stop)
        if stop.signal and trainer.done < total:
            _say(options, f"stopped after step {trainer.done:,} of {total:,}; go on with: alphabar train --resume {run.path}")
            return 128 + stop.signal
    trained = time.perf_counter() - begun
    with Progress("sampling", session.sampler.rows, 0, options.quiet) as bar:
        sheet = session.sheet(f"final_{trainer.done:08d}", lambda samples: bar.advance())
    _say(options, f"{trainer.done - start:,} steps in {_clock(trained)}, peak memory {_peak():,.0f} MiB")
    if not options.quiet:
        print(f"samples     {sheet}")
        print(f"loss curve  {run.path / 'loss.png'}")
        print(f"checkpoint  {checkpoint.step_path(run.checkpoints, session.saved)}")
        print(f"more        alphabar sample {run.path} --n 100")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
