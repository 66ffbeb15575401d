"""`alphabar check`: the grid, the coefficients and the faults of a sampler, ours or one of diffusers."""

import argparse
import inspect
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from alphabar.core import check, diffusers_scheduler, diffusers_walk, langevin, schedules, tables
from alphabar.core.check import Finding
from alphabar.core.convert import PREDICTIONS
from alphabar.core.levels import Ladder, Levels, Tabulated
from alphabar.core.sde import EDM, SDE, VESDE, VPSDE, SubVPSDE
from alphabar.nets.checkpoint import CheckpointError
from alphabar.tools import check_report, runs, sampling
from alphabar.tools import config as configs
from alphabar.tools.check_report import Report
from alphabar.tools.command import Parser, UserError, integer, program, real
from alphabar.tools.config import Config, ConfigError
from alphabar.tools.methods import Process, own_steps

EPILOG = """examples:
  alphabar check                                           DDIM, 50 steps of the usual 1000
  alphabar check dpm++ --steps 10 --order 3 --spacing karras
  alphabar check ddpm --T 100                              the usual betas with too few steps
  alphabar check ddim --grid 1,250,500,1000 --eta 1 --rows 0
  alphabar check pc --sde vp --steps 200                   or --ladder 0.01,50,232
  alphabar check runs/digits-001                           a run's own settings; also --config run.toml
  alphabar check scheduler_config.json --steps 20          what a scheduler of diffusers really does
  alphabar check scheduler_config.json --spacing trailing --set steps_offset=1 --json

exit code: 0 without findings above "note", 1 with warnings or errors found, 2 for mistakes in the arguments

known traps, all measured in diffusers 0.42.1, which findings name by number:
  1  DDIM, inverse DDIM and PNDM step by t − T//S: wrong previous alpha_bar on linspace grids, and on trailing ones unless S
     divides T
  2  DDPM adds noise where t > 0: with fixed_large and a grid that ends above 0, fresh noise stays in the samples
  3  variance_type fixed_large_log is NaN at once; fixed_small_log gives a standard deviation, not a variance
  4  UniPC with solver_type bh1 and final_sigmas_type zero is NaN
  5  steps_offset 1 with S = T is an IndexError; the solvers' leading grid with S = T is all zeros
  6  Euler and DPM-Solver++ round float64 samples to float32, and the tables are float32
  7  betas 0.0001..0.02 with a small T leave much of the data in x_T
  8  multistep order 3 with the usual start is globally order 2
"""
_NAMED = set(sampling.TABLES.values())
OWN: dict[str, Callable[..., tables.Table]] = {
    **sampling.TABLES,
    **{name: f for name in tables.__all__ if inspect.isfunction(f := getattr(tables, name)) and f not in _NAMED},
    "langevin": langevin.annealed_langevin,
}
SDES: dict[str, Callable[..., SDE]] = {"vp": VPSDE, "ve": VESDE, "subvp": SubVPSDE, "edm": EDM}
NO_TABLE = {"flow": "the sampler flow chooses its steps by its tolerance: it has no table"}
DIFFUSERS_FILE = "scheduler_config.json"
DIFFUSERS_KEYS = {
    "spacing": "timestep_spacing",
    "order": "solver_order",
    "variance": "variance_type",
    "prediction": "prediction_type",
    "clip": "clip_sample",
}
DIFFUSERS_STEPS = 50  # the default of its pipelines
MAX_STEPS = 1_000_000
LEVEL_OPTIONS = ("schedule", "T", "beta_start", "beta_end", "rescale", "zero_snr", "ladder", "sde", "range")


@program("check")
def main(argv: Sequence[str] | None = None) -> int:
    """Check a sampler; returns the exit code."""
    options = _parser().parse_args(argv)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the builders' warnings are findings here
        report = _report(options)
    if options.json:
        print(check_report.as_json(report))
    elif options.csv:
        if report.walk is None:
            raise UserError("--csv: there are no rows; without it the reasons are shown")
        print(check_report.as_csv(report.walk))
    else:
        print(check_report.as_text(report, options.rows))
    return report.exit_code


def _parser() -> Parser:
    parser = Parser(prog="alphabar check", description=__doc__, epilog=EPILOG)
    names = ", ".join(OWN)
    what = f"sampler ({names}), scheduler_config.json of diffusers, checkpoint, run folder or run.toml"
    parser.add_argument("what", nargs="?", help=what)
    parser.add_argument("--config", type=Path, metavar="RUN.toml", help="the settings of a run")
    levels = parser.add_argument_group("the process")
    levels.add_argument("--schedule", choices=("linear", "scaled_linear", "cosine", "sigmoid"), help="default linear")
    levels.add_argument("--T", type=integer(1, MAX_STEPS), help="number of steps of the schedule (1000); end time of an SDE")
    levels.add_argument("--beta-start", type=real(0.0, 1.0))
    levels.add_argument("--beta-end", type=real(0.0, 1.0))
    levels.add_argument("--rescale", action="store_true", default=None, help="betas times 1000/T")
    levels.add_argument("--zero-snr", action="store_true", default=None, help="rescale to zero terminal signal")
    levels.add_argument("--ladder", type=_numbers, metavar="MIN,MAX,LEVELS", help="geometric noise levels")
    levels.add_argument("--sde", choices=tuple(SDES))
    levels.add_argument("--range", type=_numbers, metavar="LOW,HIGH", help="beta or sigma of the SDE")
    rows = parser.add_argument_group("the sampler")
    rows.add_argument("--steps", type=integer(1, MAX_STEPS))
    rows.add_argument("--spacing", help="leading, linspace, trailing, quadratic, karras or logsnr")
    rows.add_argument("--grid", type=_numbers, metavar="T1,T2,…", help="the times themselves")
    rows.add_argument("--eta", type=real(0.0, 1.0))
    rows.add_argument("--variance", help="of ddpm: posterior or beta; of diffusers: fixed_small, fixed_large, …")
    rows.add_argument("--order", type=integer(1, 4))
    kinds = ", ".join((*PREDICTIONS, "F", *diffusers_scheduler.PREDICTIONS))
    rows.add_argument("--prediction", help=f"what the model returns: {kinds}")
    rows.add_argument("--clip", action=argparse.BooleanOptionalAction, default=None, help="clip_sample of a diffusers file")
    words = "another argument of the sampler's table, or key of a diffusers file"
    rows.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=words)
    out = parser.add_argument_group("output")
    out.add_argument("--rows", type=integer(0, MAX_STEPS), default=20, metavar="N", help="rows to show (20; 0 shows all)")
    form = out.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="everything, with all rows")
    form.add_argument("--csv", action="store_true", help="all rows")
    return parser


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.strip("[]()").split(",") if part.strip()]


_numbers.__name__ = "list of numbers"


def _report(options: argparse.Namespace) -> Report:
    what = options.what
    if options.config is not None:
        if what is not None and what not in OWN:
            raise UserError("--config goes with the name of a sampler, or with none")
        return _run(configs.load(options.config, ()), options.config.name, options, what)
    if what is None or what in OWN:
        return _ours(_levels(options), what or "ddim", options)
    if what in NO_TABLE:
        raise UserError(NO_TABLE[what])
    path = Path(what)
    for file in (path, path / DIFFUSERS_FILE, path / "scheduler" / DIFFUSERS_FILE):
        if file.suffix == ".json" and file.is_file():
            return _diffusers(file, options)
    if path.suffix == ".toml":
        return _run(configs.load(path, ()), path.name, options, None)
    if not path.exists() and path.suffix != ".json":
        raise UserError(f"{what[:80]!r} is neither a sampler ({', '.join(OWN)}) nor a file")
    if path.suffix == ".json":
        raise UserError(f"{path}: No such file or directory")
    path, _, meta = runs.read(path)
    if not isinstance(meta.get("config"), Mapping):
        raise CheckpointError(path, "it holds no configuration of a run")
    return _run(configs.from_dict(meta["config"]), path.name, options, None)


# ------------------------------------------------------------------------------------------------------------ our own samplers


def _levels(o: argparse.Namespace) -> Levels:
    kinds = [k for k in ("ladder", "sde") if getattr(o, k) is not None]
    of_schedule = [k for k in ("schedule", "beta_start", "beta_end", "rescale", "zero_snr") if getattr(o, k) is not None]
    if len(kinds) == 2 or (kinds and of_schedule):
        given = [*kinds, *of_schedule]
        raise UserError(f"--{given[0].replace('_', '-')} does not go with --{given[1].replace('_', '-')}")
    if o.range is not None and (o.sde is None or len(o.range) != 2):
        raise UserError("--range takes two numbers LOW,HIGH and goes with --sde")
    try:
        if o.ladder is not None:
            if len(o.ladder) != 3 or o.ladder[2] != int(o.ladder[2]) or o.T is not None:
                raise UserError("--ladder takes MIN,MAX,LEVELS, LEVELS a whole number, and no --T")
            return schedules.geometric(o.ladder[0], o.ladder[1], int(o.ladder[2]))
        if o.sde is not None:
            if o.sde == "edm" and o.T is not None:
                raise UserError("--T does not go with --sde edm, whose time is sigma")
            end = {} if o.sde == "edm" else {"T": float(o.T or 1)}
            return SDES[o.sde](*(o.range or ()), **end)
        kind = o.schedule or "linear"
        builder = getattr(schedules, kind)
        betas = {k: getattr(o, k) for k in ("T", "beta_start", "beta_end", "rescale") if getattr(o, k) is not None}
        wrong = [k for k in betas if k not in inspect.signature(builder).parameters]
        if wrong:
            raise UserError(f"--{wrong[0].replace('_', '-')} does not go with --schedule {kind}")
        s = builder(**betas)
        return schedules.zero_terminal_snr(s) if o.zero_snr else s
    except ValueError as e:
        raise UserError(str(e)) from e


def _ours(s: Levels, name: str, o: argparse.Namespace, settings: Mapping[str, Any] | None = None) -> Report:
    """The report on a sampler of ours; ``settings`` of a run come after those of the command line."""
    builder = OWN[name]
    takes = inspect.signature(builder).parameters
    if name == "langevin" and not isinstance(s, Ladder):
        raise UserError("the sampler langevin needs a ladder: --ladder MIN,MAX,LEVELS")
    given = {k: getattr(o, k) for k in ("spacing", "grid", "eta", "variance", "order", "prediction")}
    given = {k: v for k, v in given.items() if v is not None} | _set_words(o.set)
    open_ended = any(p.kind is p.VAR_KEYWORD for p in takes.values())
    for key in given:
        if key not in takes and not open_ended:
            having = [k for k, b in OWN.items() if key in inspect.signature(b).parameters]
            hint = f"it goes with {', '.join(having)}" if having else f"{name} takes {', '.join(list(takes)[1:])}"
            raise UserError(f"the sampler {name} does not take {key}; {hint}")
    if o.clip is not None:
        raise UserError("--clip goes with a scheduler_config.json: the samplers here take clip when they run")
    arguments = {k: v for k, v in (settings or {}).items() if k in takes or k == "prediction"} | given
    if arguments.get("prediction") in diffusers_scheduler.PREDICTIONS:
        arguments["prediction"] = diffusers_scheduler.PREDICTIONS[arguments["prediction"]]
    found, numbers = check.check_levels(s), _numbers_of(s)
    if "grid" in given:
        if o.steps is not None or "spacing" in given:
            raise UserError("--grid takes the place of --steps and --spacing")
        found += check.check_times(given["grid"], s)
        arguments["grid"] = sorted(given["grid"])
    elif name == "langevin":
        arguments["steps_per_level"] = o.steps or (settings or {}).get("steps") or configs.STEPS[name]
        arguments.setdefault("epsilon", sampling.step_size(s, arguments["steps_per_level"]) if isinstance(s, Ladder) else 0.0)
        arguments.setdefault("prediction", "eps")
    else:
        arguments["steps"] = o.steps or (settings or {}).get("steps") or own_steps(s, name if name in configs.STEPS else "ddim")
    lines = [("process", repr(s)), *check_report.number_lines(numbers)]
    walk = None
    if not any(f.severity == "error" for f in found):
        try:
            table = builder(s, **arguments)
        except (ValueError, TypeError) as e:
            if not (numbers["alpha_bar_T"] == 0 and "signal" in str(e)):
                raise UserError(str(e)) from e
            found.append(Finding("error", "zero-snr", str(e), "use a model of x0 or v, or end the grid below T"))
        else:
            walk = check.walk(table, s)
            found += check.check_walk(walk)
            told = "t counts 1..T" if isinstance(s, Tabulated) else f"t lies in (0, {s.T:g}]"
            model = f"predicts {table.prediction}, {int(walk.asks.sum())} evaluations; {told}"
            lines += [("sampler", table.name), ("model", model)]
    return Report(
        f"alphabar {name}", lines, numbers, found, walk, {"time": "1..T" if isinstance(s, Tabulated) else f"(0, {s.T:g}]"}
    )


def _numbers_of(s: Levels) -> dict[str, Any]:
    times = np.arange(1.0, s.T + 1) if isinstance(s, Tabulated) else np.array([s.t_min, s.T])
    return {"T": s.T, **check_report.level_numbers(*s.levels(times), s.prior_std)}


def _set_words(words: Sequence[str]) -> dict[str, Any]:
    found = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key.strip():
            raise UserError(f"--set is written key=value, not {word!r}")
        try:
            found[key.strip()] = json.loads(text)
        except ValueError:
            found[key.strip()] = text
    return found


def _run(config: Config, file: str, o: argparse.Namespace, name: str | None) -> Report:
    """The report on the sampler that a run is set to, or on another one, on its levels."""
    given = [k for k in LEVEL_OPTIONS if getattr(o, k) is not None]
    if given:
        raise UserError(f"--{given[0].replace('_', '-')} does not go with a run, which has its own levels")
    try:
        process = Process(configs.check(config))
    except ConfigError as e:
        open_end = config.diffusion.sigma_max == 0 and configs.belongs(config, "diffusion.sigma_max")
        hint = " (the run's own config.toml has the numbers that are found from its data)" if open_end else ""
        raise UserError(f"{file}: {e}{hint}") from e
    name = name or configs.sampler(config)
    if name in NO_TABLE:
        raise UserError(f"{file}: {NO_TABLE[name]}; name another sampler: alphabar check ddim --config FILE")
    settings = {**configs.to_dict(config)["sample"], "prediction": process.prediction}
    if name != configs.sampler(config):
        settings = {"prediction": process.prediction}
    if not settings.get("epsilon"):
        settings.pop("epsilon", None)
    report = _ours(process.levels, name, o, settings)
    report.subject = f"{file}: method {config.method}, sampler {name}"
    return report


# ---------------------------------------------------------------------------------------------------------------------- diffusers


def _diffusers(file: Path, o: argparse.Namespace) -> Report:
    """The report on a scheduler_config.json."""
    given = [k for k in (*LEVEL_OPTIONS, "grid") if getattr(o, k) is not None]
    if given:
        raise UserError(f"--{given[0].replace('_', '-')} does not go with a scheduler_config.json; use --set key=value")
    config = _read_json(file)
    ours = {v: k for k, v in diffusers_scheduler.PREDICTIONS.items()}
    for option, key in DIFFUSERS_KEYS.items():
        value = getattr(o, option)
        if value is not None:
            config[key] = ours.get(value, value)
    config |= _set_words(o.set)
    try:
        s = diffusers_scheduler.read(config)
    except ValueError as e:
        raise UserError(f"{file}: {e}") from e
    if o.eta and s.name != "DDIMScheduler":
        raise UserError(f"--eta goes with DDIMScheduler, not with {s.name}")
    steps = o.steps or (DIFFUSERS_STEPS if s.T >= 2 * DIFFUSERS_STEPS else max(1, s.T // 2))
    numbers: dict[str, Any] = {"class": s.name, "T": s.T, "steps": steps}
    if s.beta.size and not s.bad_betas.size and not diffusers_walk.flows(s):
        bar = np.clip(s.exact, 0, 1)
        numbers |= check_report.level_numbers(np.sqrt(bar), np.sqrt(1 - bar), 1.0)
    lines = [("class", f"{s.name}, T = {s.T}, {steps} steps")]
    walk, grid = None, diffusers_scheduler.Grid(np.zeros(0))
    if not s.refused and not diffusers_walk.flows(s):
        grid = diffusers_scheduler.grid(s, steps)
        if diffusers_walk.describable(s, grid):
            walk = diffusers_walk.walk(s, grid, o.eta or 0.0)
    lines += _scheduler_lines(s, grid) if not diffusers_walk.flows(s) else []
    lines += check_report.number_lines(numbers) if "alpha_bar_T" in numbers else []
    found = diffusers_walk.findings(s, grid, steps, walk)
    extra = {
        "config": s.config,
        "timesteps": grid.timesteps.tolist(),
        "sigmas": None if grid.sigmas is None else grid.sigmas.tolist(),
        "previous": None if grid.previous is None else grid.previous.tolist(),
        "orders": list(grid.orders),
        "time": "0..T-1",
    }
    return Report(f"{file.name}: a scheduler of diffusers", lines, numbers, found, walk, extra)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(f"{file}: {e.strerror or e}") from e
    except (ValueError, RecursionError) as e:
        raise UserError(f"{file}: not valid JSON ({e})") from e
    if not isinstance(config, dict):
        raise UserError(f"{file}: not a JSON object, so not a scheduler of diffusers")
    return config


def _scheduler_lines(s: diffusers_scheduler.Scheduler, g: diffusers_scheduler.Grid) -> list[tuple[str, str]]:
    c = s.config
    lines = []
    if s.beta.size:
        ends = "" if c["beta_schedule"] in ("squaredcos_cap_v2", "laplace", "exp") else f" {c['beta_start']:g}..{c['beta_end']:g}"
        kind = c["beta_schedule"] + ends if c["trained_betas"] is None else "trained_betas"
        lines.append(("betas", kind + (", rescaled to zero terminal SNR" if s.flag("rescale_betas_zero_snr") else "")))
    else:
        lines.append(("sigmas", f"{c['sigma_schedule']} {c['sigma_min']:g}..{c['sigma_max']:g}, rho {c['rho']:g}"))
    model = f"predicts {c['prediction_type']}, {len(g.timesteps)} evaluations; t counts 0..T−1"
    lines.append(("model", model))
    spread = next((k for k in ("karras", "exponential", "beta") if s.flag(f"use_{k}_sigmas")), None)
    grid = [c.get("timestep_spacing", "linspace"), f"steps_offset {c.get('steps_offset', 0)}"] if s.beta.size else []
    grid += [f"{spread} sigmas"] if spread else []
    grid += [f"last sigma {c['final_sigmas_type']}"] if "final_sigmas_type" in c else []
    grid += [f"last alpha_bar {'1' if c['set_alpha_to_one'] else 'alphas_cumprod[0]'}"] if "set_alpha_to_one" in c else []
    lines.append(("grid", ", ".join(grid)))
    if g.previous is not None:
        rule = "the next time of the grid" if s.name == "DDPMScheduler" else f"t − T//S = t − {s.T // max(1, len(g.previous))}"
        lines.append(("previous", rule))
    if s.name == "DDPMScheduler":
        lines.append(("noise", f"{c['variance_type']}, added where t > 0"))
    if "solver_order" in c:
        kind = f"{c['algorithm_type']}, " if "algorithm_type" in c else "" if c.get("predict_x0", True) else "of ε, "
        orders = "".join(map(str, g.orders[:24])) + ("…" if len(g.orders) > 24 else "")
        lines.append(("solver", f"{kind}{c['solver_type']}, order {c['solver_order']}; order by row {orders}"))
    if s.flag("thresholding"):
        lines.append(("clip", f"dynamic thresholding, ratio {c['dynamic_thresholding_ratio']:g}, max {c['sample_max_value']:g}"))
    elif s.flag("clip_sample"):
        lines.append(("clip", f"x0 to ±{c['clip_sample_range']:g}"))
    return lines


if __name__ == "__main__":
    raise SystemExit(main())
