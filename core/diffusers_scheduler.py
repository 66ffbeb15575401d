"""What the schedulers of the diffusers library make of a ``scheduler_config.json``: betas, grid, σ, index rules; without it.

The tables are float32 as there, and every rounding is made where it is made there, so that the grids are equal with their faults.
Times are its own: t = 0 … T−1, one below ours. Described from version 0.42.1.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["CLASSES", "Grid", "Scheduler", "grid", "read"]

_BETAS = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
}
_BETAS_SD = _BETAS | {"beta_start": 0.00085, "beta_end": 0.012}
_LEADING = {"timestep_spacing": "leading", "steps_offset": 0}
_LINSPACE = {"timestep_spacing": "linspace", "steps_offset": 0}
_SIGMAS = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
_CLIP = {"clip_sample": True, "clip_sample_range": 1.0}
_THRESHOLD = {"thresholding": False, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0}
_ZERO_SNR = {"rescale_betas_zero_snr": False}
_FLOW = {"use_flow_sigmas": False, "flow_shift": 1.0, "use_dynamic_shifting": False, "time_shift_type": "exponential"}
_SOLVER = {"solver_order": 2, "solver_type": "midpoint", "lower_order_final": True}
_DPM = {"algorithm_type": "dpmsolver++", "final_sigmas_type": "zero", "lambda_min_clipped": float("-inf"), "variance_type": None}

CLASSES: dict[str, dict[str, Any]] = {  # each with its keys and their defaults
    "DDPMScheduler": _BETAS | _LEADING | _CLIP | _THRESHOLD | _ZERO_SNR | {"variance_type": "fixed_small"},
    "DDIMScheduler": _BETAS | _LEADING | _CLIP | _THRESHOLD | _ZERO_SNR | {"set_alpha_to_one": True},
    "DDIMInverseScheduler": _BETAS | _LEADING | _CLIP | _ZERO_SNR | {"set_alpha_to_one": True},
    "PNDMScheduler": _BETAS | _LEADING | {"skip_prk_steps": False, "set_alpha_to_one": False},
    "EulerDiscreteScheduler": _BETAS
    | _LINSPACE
    | _SIGMAS
    | _ZERO_SNR
    | {
        "interpolation_type": "linear",
        "sigma_min": None,
        "sigma_max": None,
        "timestep_type": "discrete",
        "final_sigmas_type": "zero",
    },
    "EulerAncestralDiscreteScheduler": _BETAS | _LINSPACE | _ZERO_SNR,
    "HeunDiscreteScheduler": _BETAS_SD | _LINSPACE | _SIGMAS | {"clip_sample": False, "clip_sample_range": 1.0},
    "KDPM2DiscreteScheduler": _BETAS_SD | _LINSPACE | _SIGMAS,
    "LMSDiscreteScheduler": _BETAS | _LINSPACE | _SIGMAS,
    "DPMSolverMultistepScheduler": _BETAS
    | _LINSPACE
    | _SIGMAS
    | _THRESHOLD
    | _FLOW
    | _SOLVER
    | _DPM
    | _ZERO_SNR
    | {"euler_at_final": False, "use_lu_lambdas": False},
    "DPMSolverSinglestepScheduler": _BETAS | _SIGMAS | _THRESHOLD | _FLOW | _SOLVER | _DPM | {"lower_order_final": False},
    "UniPCMultistepScheduler": _BETAS
    | _LINSPACE
    | _SIGMAS
    | _THRESHOLD
    | _FLOW
    | _SOLVER
    | _ZERO_SNR
    | {
        "solver_type": "bh2",
        "predict_x0": True,
        "disable_corrector": [],
        "solver_p": None,
        "final_sigmas_type": "zero",
        "sigma_min": None,
        "sigma_max": None,
        "shift_terminal": None,
    },
    "DEISMultistepScheduler": _BETAS
    | _LINSPACE
    | _SIGMAS
    | _THRESHOLD
    | _FLOW
    | _SOLVER
    | {"solver_type": "logrho", "algorithm_type": "deis"},
    "EDMEulerScheduler": {
        "sigma_min": 0.002,
        "sigma_max": 80.0,
        "sigma_data": 0.5,
        "sigma_schedule": "karras",
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
        "rho": 7.0,
        "final_sigmas_type": "zero",
    },
}
INDEXED = ("DDPMScheduler", "DDIMScheduler", "DDIMInverseScheduler", "PNDMScheduler")  # they read alphas_cumprod at whole times
PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
CHOICES: dict[str, tuple[str, ...]] = {
    "beta_schedule": (*BETA_SCHEDULES, "sigmoid", "laplace", "exp"),
    "timestep_spacing": ("leading", "linspace", "trailing"),
    "final_sigmas_type": ("zero", "sigma_min"),
    "variance_type": ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range"),
    "algorithm_type": ("dpmsolver++", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver", "deis"),
    "solver_type": ("midpoint", "heun", "logrho", "bh1", "bh2"),
    "prediction_type": (*PREDICTIONS, "flow_prediction"),
    "interpolation_type": ("linear", "log_linear"),
    "timestep_type": ("discrete", "continuous"),
    "sigma_schedule": ("karras", "exponential"),
    "time_shift_type": ("exponential",),
}
KARRAS_RHO = 7.0
TINY = np.float32(2.0**-24)  # the last alpha_bar of a zero-SNR schedule in the σ schedulers


@dataclass(frozen=True, eq=False)
class Scheduler:
    """A scheduler as its file describes it.

    ``config`` has every key of the class; ``given`` those that the file sets. ``beta`` and ``alpha_bar`` are the float32 tables
    of length T, as float64; ``exact`` is the ᾱ of the same betas in float64. All are empty for the EDM scheduler. ``refused``:
    why the library does not take the file; ``ignored`` and ``unknown``: keys of other classes, and of none.
    """

    name: str
    config: dict[str, Any]
    given: frozenset[str]
    beta: np.ndarray
    alpha_bar: np.ndarray
    exact: np.ndarray
    refused: tuple[str, ...]
    ignored: tuple[str, ...]
    unknown: tuple[str, ...]

    @property
    def T(self) -> int:
        return int(self.config["num_train_timesteps"])

    @property
    def sigma(self) -> np.ndarray:
        """σ̄ at t = 0 … T−1, float32 as the library rounds it."""
        a = self.alpha_bar.astype(np.float32)
        with np.errstate(divide="ignore"):
            return np.sqrt((np.float32(1) - a) / a)

    @property
    def prediction(self) -> str:
        """The name here of what the model predicts."""
        return PREDICTIONS.get(self.config["prediction_type"], self.config["prediction_type"])

    @property
    def bad_betas(self) -> np.ndarray:
        """Times whose beta is outside (0, 1); a last one of 1 is taken (zero terminal signal)."""
        bad = ~((self.beta > 0) & (self.beta < 1))
        bad[-1:] &= self.beta[-1:] != 1
        return np.flatnonzero(bad)

    def flag(self, key: str) -> bool:
        return bool(self.config.get(key))


@dataclass(frozen=True, eq=False)
class Grid:
    """What ``set_timesteps(S)`` makes.

    ``timesteps``: the labels told to the model, in the order of the calls. ``sigmas`` with the last one, where the class has
    them, in its own order. ``base``: the descending (for the inverse, ascending) times of the steps, and ``previous`` the index
    that each step goes to (for the inverse: comes from), below 0 for the final one, where the class reads alphas_cumprod by
    index. ``orders`` of a solver, row by row. ``failed``: what the library raises, or None.
    """

    timesteps: np.ndarray
    sigmas: np.ndarray | None = None
    base: np.ndarray | None = None
    previous: np.ndarray | None = None
    orders: tuple[int, ...] = ()
    failed: str | None = None


# ------------------------------------------------------------------------------------------------------------------- the file


def read(config: Mapping[str, Any]) -> Scheduler:
    """The scheduler of a parsed file. ValueError for a class that is not known, or a value of the wrong kind."""
    name = config.get("_class_name")
    if not isinstance(name, str):
        raise ValueError("it has no _class_name, so it is not a scheduler of diffusers")
    if name not in CLASSES:
        near = difflib.get_close_matches(name, CLASSES, 1, 0.9)
        hint = f"did you mean {near[0]}?" if near else f"these are: {', '.join(CLASSES)}"
        raise ValueError(f"the class {name[:80]} is not understood; {hint}")
    defaults = CLASSES[name]
    keys = {k: v for k, v in config.items() if not k.startswith("_")}
    everything = set().union(*CLASSES.values())
    given = {k: _checked(k, v, defaults[k]) for k, v in keys.items() if k in defaults}
    full = {**defaults, **given}
    others = [k for k in keys if k not in defaults]
    refused = _refusals(name, full)
    beta: np.ndarray = np.zeros(0)
    alpha_bar, exact = beta, beta
    if name != "EDMEulerScheduler":
        b = _betas(full)
        if full.get("rescale_betas_zero_snr"):
            b = _zero_snr(b)
        beta = b.astype(np.float64)
        alpha_bar = _product(np.float32(1) - b)
        if full.get("rescale_betas_zero_snr") and name not in INDEXED:
            alpha_bar[-1] = TINY
        exact = np.cumprod(1 - beta)
        if len(beta) != full["num_train_timesteps"]:
            refused = (*refused, f"trained_betas has {len(beta)} values, num_train_timesteps is {full['num_train_timesteps']}")
    return Scheduler(
        name,
        full,
        frozenset(given),
        beta,
        alpha_bar.astype(np.float64),
        exact,
        refused,
        tuple(k for k in others if k in everything),
        tuple(k for k in others if k not in everything),
    )


def _checked(key: str, value: Any, default: Any) -> Any:
    """``value``, or ValueError where it is not of the kind of the key."""
    if value is None and (default is None or key in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")):
        return default
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if key == "trained_betas":
        if not isinstance(value, list) or not value or not all(isinstance(v, (int, float)) for v in value):
            raise ValueError(f"trained_betas must be a list of numbers, not {str(value)[:80]}")
        return value
    if key in CHOICES:
        if value not in CHOICES[key]:
            raise ValueError(f"{key} must be one of {', '.join(CHOICES[key])}, not {value!r}")
    elif key in ("sigma_min", "sigma_max", "lambda_min_clipped") or isinstance(default, float):
        if not number:
            raise ValueError(f"{key} must be a number, not {value!r}")
        if key in ("sigma_min", "sigma_max", "rho", "sigma_data") and not value > 0:
            raise ValueError(f"{key} must be positive, not {value!r}")
        return float(value)
    elif isinstance(default, bool):
        if not isinstance(value, bool):
            raise ValueError(f"{key} must be true or false, not {value!r}")
    elif isinstance(default, int):
        low, high = {"num_train_timesteps": (1, 1_000_000), "solver_order": (1, 3)}.get(key, (-1_000_000, 1_000_000))
        if not number or not isinstance(value, int) or not low <= value <= high:
            raise ValueError(f"{key} must be a whole number in {low}..{high}, not {value!r}")
    return value


def _refusals(name: str, c: dict[str, Any]) -> tuple[str, ...]:
    """What the constructor of the class raises for these settings."""
    out = []
    allowed = BETA_SCHEDULES + {"DDPMScheduler": ("sigmoid", "laplace"), "HeunDiscreteScheduler": ("exp",)}.get(name, ())
    if c.get("trained_betas") is None and c.get("beta_schedule", "linear") not in allowed:
        out.append(f"beta_schedule {c['beta_schedule']} is not implemented for {name}")
    if sum(bool(c.get(k)) for k in _SIGMAS) > 1:
        out.append("only one of use_karras_sigmas, use_exponential_sigmas and use_beta_sigmas may be true")
    algorithm = c.get("algorithm_type")
    if name == "DPMSolverSinglestepScheduler" and algorithm == "sde-dpmsolver":
        out.append(f"algorithm_type {algorithm} is not implemented for {name}")
    if name.startswith("DPMSolver") and algorithm in ("dpmsolver", "sde-dpmsolver") and c["final_sigmas_type"] == "zero":
        out.append(f"final_sigmas_type zero is not supported for algorithm_type {algorithm}: use sigma_min")
    if name == "DEISMultistepScheduler" and algorithm not in ("deis", "dpmsolver", "dpmsolver++"):
        out.append(f"algorithm_type {algorithm} is not implemented for {name}")
    if name == "DDIMInverseScheduler" and c["timestep_spacing"] == "linspace":
        out.append("timestep_spacing linspace is not supported by DDIMInverseScheduler")
    return tuple(out)


def _product(alpha: np.ndarray) -> np.ndarray:
    """∏ α of a float32 table, accumulated in float64 and rounded once, as torch.cumprod does."""
    return np.cumprod(alpha.astype(np.float64)).astype(np.float32)


def _linspace(start: float, stop: float, n: int) -> np.ndarray:
    """torch.linspace in float32: a float32 step, fused multiply-add, from both ends."""
    low, high = np.float64(np.float32(start)), np.float64(np.float32(stop))
    if n == 1:
        return np.array([low], np.float32)
    step = np.float64(np.float32(np.float32(high - low) / np.float32(n - 1)))
    i = np.arange(n)
    return np.where(i < n // 2, low + step * i, high - step * (n - 1 - i)).astype(np.float32)


def _betas(c: dict[str, Any]) -> np.ndarray:
    T, low, high = c["num_train_timesteps"], c["beta_start"], c["beta_end"]
    if c["trained_betas"] is not None:
        return np.array(c["trained_betas"], np.float32)
    kind = c["beta_schedule"]
    if kind == "linear":
        return _linspace(low, high, T)
    if kind == "scaled_linear":
        if low < 0 or high < 0:
            raise ValueError(f"beta_start and beta_end must not be negative, not {low} and {high}")
        return _linspace(low**0.5, high**0.5, T) ** 2
    if kind == "sigmoid":
        return (1 / (1 + np.exp(-_linspace(-6, 6, T)))) * np.float32(high - low) + np.float32(low)
    t = np.arange(T + 1) / T
    if kind == "laplace":
        logs = -0.5 * np.copysign(1, 0.5 - t) * np.log(1 - 2 * np.abs(0.5 - t) + 1e-6)
        bar = np.sqrt(np.exp(logs) / (1 + np.exp(logs)))
    else:
        bar = np.exp(-12.0 * t) if kind == "exp" else np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - bar[1:] / bar[:-1], 0.999).astype(np.float32)


def _zero_snr(beta: np.ndarray) -> np.ndarray:
    root = np.sqrt(_product(np.float32(1) - beta))
    first, last = root[0], root[-1]
    with np.errstate(all="ignore"):
        bar = ((root - last) * (first / (first - last))) ** 2
        return np.float32(1) - np.r_[bar[:1], bar[1:] / bar[:-1]]


# ------------------------------------------------------------------------------------------------------------------- the grid


def grid(s: Scheduler, steps: int) -> Grid:
    """What ``set_timesteps(steps)`` makes of a scheduler; ``refused`` ones must not be asked. ValueError unless steps ≥ 1."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    if s.name == "EDMEulerScheduler":
        return _edm(s, steps)
    if s.name in INDEXED:
        return _indexed(s, steps)
    return _plus_one(s, steps) if "solver_order" in s.config else _floats(s, steps)


def _spaced(s: Scheduler, steps: int) -> np.ndarray:
    """Whole times, descending. "trailing" steps down by floats, which for some S gives one time too many, −1."""
    c, T = s.config, s.T
    if c["timestep_spacing"] == "linspace":
        return np.linspace(0, T - 1, steps).round()[::-1].astype(np.int64)
    if c["timestep_spacing"] == "leading":
        return (np.arange(steps) * (T // steps))[::-1] + c["steps_offset"]
    return np.round(np.arange(T, 0, -T / steps)).astype(np.int64) - 1


def _indexed(s: Scheduler, steps: int) -> Grid:
    c, T = s.config, s.T
    base = _spaced(s, steps)
    ratio = T // steps
    if s.name == "DDIMInverseScheduler":
        base = base[::-1]
    if s.name == "DDPMScheduler":
        at = [int(np.flatnonzero(base == t)[0]) for t in base]
        previous = np.array([base[i + 1] if i + 1 < len(base) else -1 for i in at])
    else:
        previous = np.minimum(base - ratio, T - 1)
    timesteps, failed = base, None
    if steps > T and s.name != "PNDMScheduler":
        failed = f"ValueError: num_inference_steps {steps} is above num_train_timesteps {T}"
    elif s.name == "PNDMScheduler":
        timesteps, failed = _pndm(base[::-1], ratio, c["skip_prk_steps"], failed)
    if failed is None and np.any(base >= len(s.alpha_bar)):
        failed = f"IndexError: alphas_cumprod has {len(s.alpha_bar)} entries, the grid asks for t = {base.max()}"
    return Grid(timesteps, None, base, previous, failed=failed)


def _pndm(up: np.ndarray, ratio: int, skip: bool, failed: str | None) -> tuple[np.ndarray, str | None]:
    """The calls of PLMS, which asks once more at the second time, or of the Runge–Kutta start and PLMS."""
    if skip:
        return np.concatenate([up[:-1], up[-2:-1], up[-1:]])[::-1], failed
    if len(up) < 4:
        return up[::-1], "ValueError: the Runge–Kutta start needs at least 4 steps"
    prk = np.repeat(up[-4:], 2) + np.tile([0, ratio // 2], 4)
    return np.concatenate([np.repeat(prk[:-1], 2)[1:-1][::-1], up[:-3][::-1]]).astype(np.int64), failed


def _label(sigma: np.ndarray, log_sigmas: np.ndarray) -> np.ndarray:
    """Times by linear interpolation in ln σ̄."""
    if len(log_sigmas) < 2:
        return np.zeros(len(sigma))
    x = np.log(np.maximum(sigma, 1e-10))
    low = np.clip(np.searchsorted(log_sigmas, x, side="right") - 1, 0, len(log_sigmas) - 2)
    with np.errstate(all="ignore"):
        w = np.clip((log_sigmas[low] - x) / (log_sigmas[low] - log_sigmas[low + 1]), 0, 1)
    return (1 - w) * low + w * (low + 1)


def _spread(s: Scheduler, first: float, last: float, steps: int) -> np.ndarray | None:
    """σ from first to last by the rule that the file asks for (Karras, exponential, beta); None without one."""
    low, high = s.config.get("sigma_min"), s.config.get("sigma_max")
    first, last = (high if high is not None else first), (low if low is not None else last)
    ramp = np.linspace(0, 1, steps)
    if s.flag("use_karras_sigmas"):
        top, bottom = first ** (1 / KARRAS_RHO), last ** (1 / KARRAS_RHO)
        return (top + ramp * (bottom - top)) ** KARRAS_RHO
    if s.flag("use_exponential_sigmas"):
        return np.exp(np.linspace(np.log(first), np.log(last), steps))
    if s.flag("use_beta_sigmas"):
        from scipy.special import betaincinv

        return last + betaincinv(0.6, 0.6, 1 - ramp) * (first - last)
    return None


def _floats(s: Scheduler, steps: int) -> Grid:
    """Euler, Euler ancestral, Heun, KDPM2, LMS: real times, σ by interpolation."""
    c, T = s.config, s.T
    if c["timestep_spacing"] == "linspace":
        t = np.linspace(0, T - 1, steps, dtype=np.float32)[::-1].astype(np.float64)
    else:
        t = _spaced(s, steps).astype(np.float64)
    table = s.sigma
    with np.errstate(divide="ignore"):
        log_sigmas = np.log(table)
    sigmas = np.interp(t, np.arange(len(table)), table)
    if c.get("interpolation_type") == "log_linear":
        sigmas = np.exp(_linspace(log_sigmas[-1], log_sigmas[0], steps + 1))
    spread = _spread(s, float(sigmas[0]), float(sigmas[-1]), steps)
    if spread is not None:
        sigmas, t = spread, _label(spread, log_sigmas)
        if s.name == "KDPM2DiscreteScheduler" and s.flag("use_karras_sigmas"):
            t = t.round()
    last = table[0] if c.get("final_sigmas_type") == "sigma_min" else 0.0
    sigmas = np.r_[sigmas, last].astype(np.float32)
    labels = t.astype(np.float32)
    if c.get("timestep_type") == "continuous" and s.prediction == "v":
        labels = np.float32(0.25) * np.log(sigmas[:-1])
    if s.name == "HeunDiscreteScheduler":
        labels, sigmas = _twice(labels, sigmas[:-1], sigmas[-1:])
    elif s.name == "KDPM2DiscreteScheduler":
        middle = np.sqrt(sigmas[:-2].astype(np.float64) * sigmas[1:-1])
        between = np.stack([_label(middle, log_sigmas), t[1:]], axis=1).ravel()
        labels = np.r_[t[:1], between]
        sigmas = np.r_[sigmas[:1], np.repeat(sigmas[1:], 2), sigmas[-1:]]
    return Grid(labels.astype(np.float64), sigmas.astype(np.float64))


def _twice(labels: np.ndarray, sigmas: np.ndarray, last: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.r_[labels[:1], np.repeat(labels[1:], 2)], np.r_[sigmas[:1], np.repeat(sigmas[1:], 2), last]


def _plus_one(s: Scheduler, steps: int) -> Grid:
    """DPM-Solver, UniPC, DEIS: the upper S of S+1 whole times; Karras labels are rounded, and all labels end as integers."""
    c, T = s.config, s.T
    last_time = T
    if np.isfinite(c.get("lambda_min_clipped", -np.inf)):
        with np.errstate(divide="ignore"):
            lam = 0.5 * (np.log(s.alpha_bar) - np.log1p(-s.alpha_bar))
        last_time = T - int(np.searchsorted(lam[::-1], c["lambda_min_clipped"]))
    spacing = c.get("timestep_spacing", "linspace")
    if spacing == "linspace":
        t = np.linspace(0, last_time - 1, steps + 1).round()[::-1][:-1]
    elif spacing == "leading":
        t = (np.arange(steps + 1) * (last_time // (steps + 1)))[::-1][:-1] + c["steps_offset"]
    else:
        t = np.arange(last_time, 0, -T / steps).round() - 1
    table = s.sigma
    with np.errstate(divide="ignore"):
        log_sigmas = np.log(table)
    t = t.astype(np.float64)
    sigmas, rounds = np.interp(t, np.arange(len(table)), table), False
    spread = _spread(s, float(table[-1]), float(table[0]), steps)
    multistep = s.name == "DPMSolverMultistepScheduler"
    if spread is None and c.get("use_lu_lambdas"):
        spread, rounds = np.exp(np.linspace(float(log_sigmas[-1]), float(log_sigmas[0]), steps)), True
    final = float(table[0])
    if spread is not None:
        sigmas, t = spread, _label(spread, log_sigmas)
        rounds |= s.flag("use_karras_sigmas")
        if rounds and not (multistep and c["beta_schedule"] == "squaredcos_cap_v2"):
            t = t.round()
        if s.name in ("UniPCMultistepScheduler", "DEISMultistepScheduler"):
            final = float(sigmas[-1])
    if c.get("final_sigmas_type") == "zero":
        final = 0.0
    labels = np.trunc(t)
    sigmas = np.r_[sigmas, final].astype(np.float32).astype(np.float64)
    return Grid(labels, sigmas, orders=_orders(s, len(labels)))


def _orders(s: Scheduler, n: int) -> tuple[int, ...]:
    """The order of each row of a solver."""
    c, order = s.config, s.config["solver_order"]
    final = c["lower_order_final"]
    if s.name == "DPMSolverSinglestepScheduler":
        zero = c["final_sigmas_type"] == "zero"
        if not final and (n % order or zero):
            final = True
        cycle = list(range(1, order + 1))
        rows = cycle * (n // order)
        if final and order == 3:
            rows = cycle * (n // 3 - 1) + [1, 2, 1] if n % 3 == 0 else cycle * (n // 3) + [1, 2][: n % 3]
        elif final and order == 2:
            rows = cycle * (n // 2 - 1) + [1, 1] if n % 2 == 0 else cycle * (n // 2) + [1]
        if zero and rows:
            rows[-1] = 1
        return tuple(rows)
    rows = [min(order, i + 1) for i in range(n)]
    if s.name == "UniPCMultistepScheduler":
        return tuple(min(k, n - i) for i, k in enumerate(rows)) if final else tuple(rows)
    low = final and n < 15
    if n > 1 and low:
        rows[-2] = min(rows[-2], 2)
    if low or c.get("euler_at_final") or c.get("final_sigmas_type") == "zero":
        rows[-1] = 1
    return tuple(rows)


def _edm(s: Scheduler, steps: int) -> Grid:
    c = s.config
    if c["sigma_schedule"] == "karras":
        with np.errstate(all="ignore"):
            low, high = np.array([c["sigma_min"], c["sigma_max"]]) ** (1 / c["rho"])
            sigmas = (high + np.linspace(0, 1, steps) * (low - high)) ** c["rho"]
    else:
        sigmas = np.exp(np.linspace(np.log(c["sigma_min"]), np.log(c["sigma_max"]), steps))[::-1]
    sigmas = sigmas.astype(np.float32).astype(np.float64)
    last = sigmas[-1] if c["final_sigmas_type"] == "sigma_min" else 0.0
    return Grid((0.25 * np.log(sigmas)).astype(np.float32).astype(np.float64), np.r_[sigmas, last])
