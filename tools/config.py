"""The settings of a training run: typed defaults, a TOML file over them, `--set key=value` over both."""

import dataclasses
import difflib
import os
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from alphabar.core import text
from alphabar.nets.computing import COMPUTE


class ConfigError(ValueError):
    """A setting that is unknown, of the wrong type or out of range."""


SDES = ("vpsde", "vesde", "subvpsde")
STEPS = {  # the number of steps of each sampler unless one is given; 0 where there is none to give
    **dict.fromkeys(("ddim", "ddpm", "euler", "heun", "dpm++", "ab"), 50),
    **dict.fromkeys(("euler-a", "kdpm2", "dpm", "dpm++sde", "deis", "lms", "pndm", "plms", "unipc"), 50),
    "learned": 50,
    "rk4": 12,
    "em": 250,
    "rd": 250,
    "pc": 125,  # each with its corrections
    "flow": 0,  # adaptive
    "langevin": 5,  # at each noise level
    "ancestral": 100,
}
GENERAL = tuple(name for name in STEPS if name not in ("langevin", "learned", "ancestral"))  # for the levels of any process
CONTINUOUS = tuple(name for name in STEPS if name != "ancestral")  # samplers whose states are real numbers
GAUSSIAN = ("ddpm", "ncsn", *SDES)  # methods of Gaussian noise on images
DISCRETE = ("multinomial", "d3pm")  # methods whose states are whole numbers
EMBEDDED = ("diffusion-lm",)  # methods of Gaussian noise on learned embeddings of text
SAMPLERS = {  # of each method; the first one is its own
    "ddpm": (*GENERAL, "learned"),  # with train.loss=hybrid the last one
    "ncsn": ("langevin", *GENERAL),
    **dict.fromkeys(SDES, ("pc", *(name for name in GENERAL if name != "pc"))),
    **dict.fromkeys(DISCRETE, ("ancestral",)),
    **dict.fromkeys(EMBEDDED, ("ddpm", "ddim")),
}
METHODS = tuple(SAMPLERS)
SCHEDULES = {  # of each method that has one; the first one is its own
    "ddpm": ("linear", "scaled_linear", "cosine", "sigmoid"),
    **dict.fromkeys(DISCRETE, ("cosine", "linear", "reciprocal")),
    **dict.fromkeys(EMBEDDED, ("sqrt", "cosine", "linear")),
}
TRANSITIONS = {"absorbing": "reciprocal", "uniform": "cosine", "gaussian": "linear", "nearest": "cosine"}  # and their schedules
NETWORKS = {"images": "unet", "text": "transformer"}  # of each kind of data, unless one is given
ORDERS = ("dpm", "dpm++", "dpm++sde", "ab", "deis", "unipc")  # samplers of a chosen order
CHURNED = ("euler", "heun", "kdpm2")


def _setting(
    default: Any,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
    only: tuple[str, ...] = (),
    methods: tuple[str, ...] = (),
) -> Any:
    """A field with its range, low ≤ value ≤ high, or its choices; ``only``: the methods or samplers that it belongs to.

    ``methods``: where that are samplers, the methods that it belongs to besides.
    """
    return field(default=default, metadata={"low": low, "high": high, "choices": choices, "only": only, "methods": methods})


@dataclass(frozen=True)
class Data:
    path: str = _setting("digits")  # a built-in name, an HDF5 file of images or a text file (.txt)
    split: str = _setting("train", choices=("train", "test", "all"))
    length: int = _setting(128, 1, 1 << 20, only=("text",))  # letters of one window
    flip: bool = _setting(False, only=("images",))  # mirror half of the images left to right


@dataclass(frozen=True)
class Model:
    network: str = _setting("auto", choices=("auto", "unet", "transformer"))  # auto: a U-Net of images, a transformer of text
    channels: tuple[int, ...] = _setting((32, 64), 1, 8192, only=("unet",))  # one entry for each resolution
    blocks: int = _setting(2, 1, 16, only=("unet",))  # residual blocks at each resolution
    attention: tuple[int, ...] = _setting((0,), 0, 8192, only=("unet",))  # at images of these sides; 0: the lowest resolution
    groups: int = _setting(8, 1, 1024, only=("unet",))
    dropout: float = _setting(0.0, 0.0, 0.99)
    scale_shift: bool = _setting(False, only=("unet",))
    width: int = _setting(192, 1, 8192, only=("transformer",))
    layers: int = _setting(4, 1, 256, only=("transformer",))
    heads: int = _setting(6, 1, 256, only=("transformer",))
    positions: str = _setting("rotary", choices=("rotary", "learned"), only=("transformer",))
    conditional: bool = _setting(True)  # learn the classes, where the data have labels


@dataclass(frozen=True)
class Diffusion:
    schedule: str = _setting("auto", choices=(*dict.fromkeys(sum(SCHEDULES.values(), ())), "auto"), only=tuple(SCHEDULES))
    T: int = _setting(1000, 1, 1_000_000, only=tuple(SCHEDULES))
    rescale: bool = _setting(False, only=("ddpm",))  # multiply the betas by 1000/T, so that T is no change of the process
    prediction: str = _setting("eps", choices=("eps", "x0", "v"), only=("ddpm",))
    sigma_min: float = _setting(0.01, 1e-6, 1e6, only=("ncsn", "vesde"))  # noise levels, of data in [-1, 1]
    sigma_max: float = _setting(0.0, 0.0, 1e6, only=("ncsn", "vesde"))  # 0: the largest distance between two images
    levels: int = _setting(0, 0, 100_000, only=("ncsn",))  # 0: as many as one level needs to overlap the next
    beta_min: float = _setting(0.1, 1e-6, 1e4, only=("vpsde", "subvpsde"))  # beta(t) rises linearly between these, t in [0, 1]
    beta_max: float = _setting(20.0, 1e-6, 1e4, only=("vpsde", "subvpsde"))
    transition: str = _setting("absorbing", choices=tuple(TRANSITIONS), only=("d3pm",))
    states: int = _setting(0, 0, 256, only=DISCRETE)  # equally spaced levels of an image; 0: as few as hold its values exactly
    features: int = _setting(16, 1, 8192, only=EMBEDDED)  # numbers of an embedding
    sigma0: float = _setting(1e-4, 1e-9, 1.0, only=EMBEDDED)  # deviation of x_0 from the embedding
    neighbours: int = _setting(3, 1, 255, only=("d3pm",))  # of the transition nearest: to so many states each state is joined


@dataclass(frozen=True)
class Train:
    """``importance`` draws the times by their share of the loss: for the SDEs (unless "false") with likelihood weighting, so that
    all weights are equal; for ddpm (only if "true") by the last losses at each time.
    """

    steps: int = _setting(1500, 1, 10**9)
    batch: int = _setting(128, 1, 1 << 20)
    lr: float = _setting(2e-3, 0.0, 10.0)
    warmup: int = _setting(100, 0, 10**9)  # steps; never more than a fifth of all
    decay: str = _setting("cosine", choices=("cosine", "linear", "constant"))
    loss: str = _setting("simple", choices=("simple", "hybrid"), only=("ddpm",))  # hybrid: the variance is learned too
    weighting: str = _setting("simple", choices=("simple", "min_snr", "p2", "likelihood"), only=GAUSSIAN)
    importance: str = _setting("auto", choices=("auto", "true", "false"), only=("ddpm", *SDES))
    hybrid: float = _setting(-1.0, -1.0, 1000.0, only=DISCRETE)  # λ of the cross-entropy beside the bound; below 0: the method's
    weight_decay: float = _setting(0.0, 0.0, 10.0)
    clip: float = _setting(1.0, 0.0)  # global norm of the gradient; 0 = no clipping
    ema: float = _setting(0.999, 0.0, 0.999999)
    p_uncond: float = _setting(0.1, 0.0, 1.0)
    precision: str = _setting("fp32", choices=COMPUTE)  # of a network on a GPU; a run may go on in another one
    seed: int = _setting(0, 0, 2**63 - 1)


@dataclass(frozen=True)
class Log:
    every: int = _setting(20, 1, 10**9)  # steps between two lines of metrics.jsonl
    samples: int = _setting(500, 0, 10**9)  # steps between two preview sheets; 0 = none
    checkpoints: int = _setting(500, 1, 10**9)  # steps between two checkpoints
    keep: int = _setting(3, 1, 10**6)  # checkpoints that stay


@dataclass(frozen=True)
class Sample:
    sampler: str = _setting("auto", choices=("auto", *STEPS))  # auto: the method's own
    steps: int = _setting(0, 0, 1_000_000)  # 0: the sampler's own number
    eta: float = _setting(0.0, 0.0, 1.0, only=("ddim",))
    epsilon: float = _setting(0.0, 0.0, 1.0, only=("langevin",))  # step size at the smallest level; 0: from levels and steps
    snr: float = _setting(0.16, 1e-4, 10.0, only=("pc",))  # signal-to-noise ratio of a corrector step
    corrections: int = _setting(1, 0, 100, only=("pc",))  # corrector steps after each predictor step
    tolerance: float = _setting(1e-4, 1e-12, 1.0, only=("flow",))
    order: int = _setting(2, 1, 4, only=ORDERS)
    churn: float = _setting(0.0, 0.0, 1e6, only=CHURNED)  # S_churn: noise added ahead of each step
    threshold: float = _setting(0.0, 0.0, 1.0, only=CONTINUOUS, methods=GAUSSIAN)  # quantile that bounds x0; 0: clip to [-1, 1]
    guidance: float = _setting(0.5, -1.0, 1000.0, methods=(*GAUSSIAN, *DISCRETE))  # w in (1 + w)·eps_c − w·eps_u
    rescale: float = _setting(0.0, 0.0, 1.0, only=CONTINUOUS, methods=GAUSSIAN)  # φ: guided answer to the deviation of eps_c
    interval_low: float = _setting(0.0, 0.0, 1e9, only=CONTINUOUS, methods=GAUSSIAN)  # guide only where n/a is between these
    interval_high: float = _setting(0.0, 0.0, 1e9, only=CONTINUOUS, methods=GAUSSIAN)  # 0: no limit
    temperature: float = _setting(1.0, 0.01, 100.0, only=("ancestral",))  # the logits are divided by it
    clamp: float = _setting(1.0, 0.0, 1.0, methods=EMBEDDED)  # x0 becomes the nearest embedding in this last share of the times
    resample: int = _setting(1, 1, 1000, methods=EMBEDDED)  # visits of each level where blanks are filled in, as RePaint makes
    # control by a classifier: the mean form of classifier guidance; the paper's is adagrad, 3 steps, rate 0.1, fluency 0.01
    control_method: str = _setting("sgd", choices=("adagrad", "sgd"), methods=EMBEDDED)  # sgd: rate·variance·gradient
    control_steps: int = _setting(1, 0, 10_000, methods=EMBEDDED)  # gradient steps at each level
    control_rate: float = _setting(1.0, 0.0, 1e6, methods=EMBEDDED)  # their size
    fluency: float = _setting(0.0, 0.0, 1e6, methods=EMBEDDED)  # λ of log p(x_{t−1}|x_t) beside a classifier's log p(c|x_{t−1})
    columns: int = _setting(8, 1, 1000)  # of a sheet; of text, how many samples are on it


@dataclass(frozen=True)
class Config:
    method: str = _setting("ddpm", choices=METHODS)
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    diffusion: Diffusion = field(default_factory=Diffusion)
    train: Train = field(default_factory=Train)
    log: Log = field(default_factory=Log)
    sample: Sample = field(default_factory=Sample)


TOP: dict[str, Any] = {f.name: f.metadata for f in dataclasses.fields(Config) if f.metadata}  # settings outside all sections
SECTIONS: dict[str, Any] = {f.name: f.default_factory for f in dataclasses.fields(Config) if f.name not in TOP}
TYPES: dict[str, Any] = {k: get_type_hints(Config)[k] for k in TOP}
TYPES |= {f"{s}.{k}": t for s, cls in SECTIONS.items() for k, t in get_type_hints(cls).items()}
RANGES: dict[str, Any] = TOP | {f"{s}.{f.name}": f.metadata for s, cls in SECTIONS.items() for f in dataclasses.fields(cls)}
WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", tuple[int, ...]: "whole numbers"}


def data_kind(config: Config) -> str:
    """ "images" or "text": what the data of ``config`` are, by their path."""
    return "text" if is_text(config.data.path) else "images"


def is_text(path: str) -> bool:
    """Whether a path, or the name of built-in data, is that of a text."""
    return path in text.BUILT_IN or path.lower().endswith(".txt")


def belongs(config: Config, key: str) -> bool:
    """Whether a setting means something for the method of ``config``, its sampler, its network or its kind of data."""
    return _stranger(config, key) is None


def _stranger(config: Config, key: str) -> tuple[str, tuple[str, ...], str] | None:
    """Where ``config`` does not take a setting: (what it goes with, which of them, the one that ``config`` has); else None."""
    only, methods = RANGES[key]["only"], RANGES[key]["methods"]
    word, mine = _owner(config, key)
    if only and mine not in only:
        return word, only, mine
    return ("method", methods, config.method) if methods and config.method not in methods else None


def _owner(config: Config, key: str) -> tuple[str, str]:
    """What the setting ``key`` may go with, and which of these ``config`` has."""
    owners = {"sample": ("sampler", sampler), "model": ("network", network), "data": ("data", data_kind)}
    word, of = owners.get(key.partition(".")[0], ("method", lambda config: config.method))
    return word, of(config)


def network(config: Config) -> str:
    """The kind of network of ``config``: that of its data where it says "auto"."""
    return NETWORKS[data_kind(config)] if config.model.network == "auto" else config.model.network


def schedule(config: Config) -> str:
    """The name of the schedule of ``config``: that of its method, or of its transition, where it says "auto"."""
    if config.diffusion.schedule != "auto" or config.method not in SCHEDULES:
        return config.diffusion.schedule
    return TRANSITIONS[config.diffusion.transition] if config.method == "d3pm" else SCHEDULES[config.method][0]


def completed(config: Config) -> Config:
    """``config`` with the names that it leaves to its method and its data, none of which need the data themselves."""
    model = dataclasses.replace(config.model, network=network(config))
    diffusion = dataclasses.replace(config.diffusion, schedule=schedule(config))
    return dataclasses.replace(
        config, model=model, diffusion=diffusion, sample=dataclasses.replace(config.sample, sampler=sampler(config))
    )


def sampler(config: Config) -> str:
    """The name of the sampler of ``config``: that of its method and loss where it says "auto"."""
    if config.sample.sampler != "auto":
        return config.sample.sampler
    own = SAMPLERS[config.method]
    return "learned" if config.train.loss == "hybrid" and "learned" in own else own[0]


def to_dict(config: Config) -> dict[str, Any]:
    """Plain values, those outside the sections first, for JSON and TOML; settings of other methods are left out."""
    plain: dict[str, Any] = {key: getattr(config, key) for key in TOP}
    for section in SECTIONS:
        values = dataclasses.asdict(getattr(config, section))
        plain[section] = {
            k: list(v) if isinstance(v, tuple) else v for k, v in values.items() if belongs(config, f"{section}.{k}")
        }
    return plain


def from_dict(values: Mapping[str, Any], base: Config | None = None) -> Config:
    """``base`` (the defaults) with settings {key: value} and {section: {key: value}} over it."""
    return _with(base or Config(), _flat(values))


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for section, table in values.items():
        if section in TOP:
            flat[section] = table
        elif isinstance(table, Mapping):
            flat |= {f"{section}.{key}": value for key, value in table.items()}
        else:
            raise ConfigError(
                f"{section} must be a table of settings such as [train]" if section in SECTIONS else _unknown(section)
            )
    return flat


def from_file(path: str | os.PathLike[str], base: Config | None = None) -> Config:
    """``base`` with the settings of a TOML file over it."""
    try:
        with open(path, "rb") as f:
            values = tomllib.load(f)
    except OSError as e:
        raise ConfigError(f"{path}: {e.strerror or e}") from e
    except (ValueError, RecursionError) as e:
        raise ConfigError(f"{path}: not valid TOML ({e})") from e
    try:
        return from_dict(values, base)
    except ConfigError as e:
        raise ConfigError(f"{path}: {e}") from e


def from_words(words: Iterable[str], base: Config | None = None) -> Config:
    """``base`` with settings written `section.key=value` over it; the later of two equal keys wins."""
    return _with(base or Config(), _from_words(words))


def _from_words(words: Iterable[str]) -> dict[str, Any]:
    flat = {}
    for word in words:
        key, equals, text = word.partition("=")
        key = key.strip()
        if not equals:
            raise ConfigError(f"a setting is written section.key=value, not {word!r}")
        if key not in TYPES:
            raise ConfigError(_unknown(key))
        flat[key] = _parse(key, text.strip())
    return flat


def to_toml(config: Config) -> str:
    """The text of a TOML file that gives this configuration back."""
    lines: list[str] = []
    for section, values in to_dict(config).items():
        if section in TOP:
            lines.append(f"{section} = {_toml(values)}")
        else:
            lines += ["", f"[{section}]", *(f"{key} = {_toml(value)}" for key, value in values.items())]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    return repr(value)


def _with(config: Config, flat: Mapping[str, Any]) -> Config:
    top: dict[str, Any] = {}
    sections: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        if key not in TYPES:
            raise ConfigError(_unknown(key))
        section, _, name = key.rpartition(".")
        (sections.setdefault(section, {}) if section else top)[name] = _checked(key, value)
    changed = {s: dataclasses.replace(getattr(config, s), **values) for s, values in sections.items()}
    return dataclasses.replace(config, **top, **changed)


def _unknown(key: str) -> str:
    key = key[:80]
    leaves = [k for k in TYPES if k.rpartition(".")[2] == key.rpartition(".")[2]]
    near = leaves[:1] or difflib.get_close_matches(key, TYPES, 1, 0.5)
    near = near or [k for k in TYPES if difflib.get_close_matches(key.rpartition(".")[2], [k.rpartition(".")[2]], 1, 0.5)][:1]
    return f"unknown setting {key!r}; " + (f"the nearest is {near[0]!r}" if near else f"the sections are {', '.join(SECTIONS)}")


def _parse(key: str, text: str) -> Any:
    """The value that a text means for the type of ``key``."""
    kind = TYPES[key]
    try:
        if kind is str:
            return text
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        if kind is int or kind is float:
            return kind(text)
        return tuple(int(part) for part in text.strip("[]()").split(",") if part.strip())
    except (ValueError, KeyError):
        raise ConfigError(f"{key} must be {WORDS[kind]}, not {text!r}") from None


def _checked(key: str, value: Any) -> Any:
    """``value`` in the type of ``key`` and inside its range."""
    kind, rule = TYPES[key], RANGES[key]
    wrong = ConfigError(f"{key} must be {WORDS[kind]}, not {value!r}")
    if kind == tuple[int, ...]:
        if not isinstance(value, (list, tuple)) or any(isinstance(v, bool) or not isinstance(v, int) for v in value):
            raise wrong
        value = tuple(value)
    elif kind is float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not -1e300 < value < 1e300:
            raise wrong
        value = float(value)
    elif isinstance(value, bool) and "true" in rule["choices"]:
        value = str(value).lower()
    elif not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise wrong
    if rule["choices"] and value not in rule["choices"]:
        near = difflib.get_close_matches(value, rule["choices"], 1)
        hint = f"; the nearest is {near[0]!r}" if near else ""
        raise ConfigError(f"{key} must be one of {', '.join(rule['choices'])}, not {value!r}{hint}")
    low, high = rule["low"], rule["high"]
    for v in value if isinstance(value, tuple) else (value,):
        if (low is not None and v < low) or (high is not None and v > high):
            limits = f"at least {low}" if high is None else f"in {low}..{high}"
            raise ConfigError(f"{key} must be {limits}, not {v}")
    if key == "model.channels" and not value:
        raise ConfigError("model.channels must hold at least one number")
    if kind is str and not value.isprintable():
        raise ConfigError(f"{key} must be printable text, not {value!r}")
    return value


def load(
    file: str | Path | None, words: Iterable[str], base: Config | None = None, over: Mapping[str, Any] | None = None
) -> Config:
    """A run's configuration: ``base`` or the defaults, a TOML file, settings on the command line, those ``over`` it; checked.

    ``over`` holds values by key, ``{"train.steps": 5}``.
    """
    config = base or Config()
    if file is not None:
        config = from_file(file, config)
    flat = _from_words(words) | dict(over or {})
    return check(_with(config, flat), flat)


def check(config: Config, given: Iterable[str] = ()) -> Config:
    """``config``, or ConfigError for a sampler or another setting that its method, sampler, network or data do not take.

    A setting of another one passes where it has its default value and is not among the ``given`` ones.
    """
    names, key = SAMPLERS[config.method], sampler(config)
    if key not in names:
        raise ConfigError(f"sample.sampler must be one of {', '.join(names)} for method {config.method}, not {key!r}")
    if key == "learned" and config.train.loss != "hybrid":
        raise ConfigError("the sampler learned needs a network that has learned its variance (train.loss=hybrid)")
    kind, net = data_kind(config), network(config)
    if config.method in GAUSSIAN and kind != "images":
        raise ConfigError(f"method {config.method} is for images, not for text: {', '.join(DISCRETE)} are for both")
    if kind == "text" and net != "transformer":
        raise ConfigError(f"model.network must be transformer for text, not {net!r}")
    if config.method in EMBEDDED and kind != "text":
        raise ConfigError(f"method {config.method} is for text, not for images: data.path=kjv, or a file .txt")
    if config.method in GAUSSIAN and net != "unet":
        raise ConfigError(f"model.network must be unet for method {config.method}, not {net!r}")
    if config.method in SCHEDULES and schedule(config) not in SCHEDULES[config.method]:
        allowed = ", ".join(SCHEDULES[config.method])
        raise ConfigError(f"diffusion.schedule must be one of {allowed} for method {config.method}, not {schedule(config)!r}")
    default, given = Config(), set(given)
    for key in (k for k in RANGES if k not in TOP):
        section, _, name = key.partition(".")
        changed = getattr(getattr(config, section), name) != getattr(getattr(default, section), name)
        if (changed or key in given) and (wrong := _stranger(config, key)) is not None:
            word, only, mine = wrong
            raise ConfigError(f"{key} goes with the {word}{'s' * (len(only) > 1)} {', '.join(only)}, not with {mine}")
    return config
