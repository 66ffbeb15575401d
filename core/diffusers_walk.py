"""The rows of a diffusers scheduler, and what is wrong with them: :mod:`alphabar.core.check` on what that library really does.

Rows are in the coordinates x_t = √ᾱ·x0 + √(1−ᾱ)·ε whatever the class works in (σ̄ = √(1−ᾱ)/√ᾱ; the EDM scheduler: x0 + σ·ε).
"""

from dataclasses import replace
from typing import Any

import numpy as np

from . import check
from .check import Finding, Walk
from .diffusers_scheduler import INDEXED, Grid, Scheduler

UNKNOWN_ROWS = ("PNDMScheduler", "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler")
CASTS = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler", "EDMEulerScheduler")
NO_SAMPLE = ("EulerAncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "PNDMScheduler", "EDMEulerScheduler")  # prediction x0
FLOWS = ("use_flow_sigmas", "use_dynamic_shifting")
LMS_ORDER = 4
GAUSS_POINTS, GAUSS_WEIGHTS = np.polynomial.legendre.leggauss(4)
Columns = dict[str, Any]


def describable(s: Scheduler, g: Grid) -> bool:
    """Whether the scheduler runs at all, with betas in (0, 1), and works in levels of noise (flow matching does not)."""
    return not s.refused and g.failed is None and not flows(s) and not s.bad_betas.size


def flows(s: Scheduler) -> bool:
    """Whether the file asks for flow matching, whose levels are a = 1 − σ, n = σ."""
    return any(s.flag(k) for k in FLOWS) or s.prediction == "flow_prediction"


def walk(s: Scheduler, g: Grid, eta: float = 0.0) -> Walk:
    """The rows of a :func:`describable` scheduler; of PNDM, singlestep, UniPC and DEIS levels only. ``eta``: DDIM's, of step."""
    with np.errstate(all="ignore"):
        if s.name in INDEXED:
            columns = _indexed(s, g, eta)
        else:
            columns = _sigma_rows(s, g)
        label_signal, label_noise = _label_levels(s, columns["t"])
    prediction = s.prediction if s.prediction in ("eps", "x0", "v") else "eps"
    name = f"{s.name}({len(columns['t'])} rows)"
    return Walk(name, prediction, label_signal=label_signal, label_noise=label_noise, known=s.name not in UNKNOWN_ROWS, **columns)


def _label_levels(s: Scheduler, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if s.name == "EDMEulerScheduler":
        return np.ones(len(labels)), np.exp(4 * labels)
    if s.config.get("timestep_type") == "continuous" and s.prediction == "v":
        return _levels(np.exp(4 * labels))
    T, sigma = len(s.alpha_bar), s.sigma.astype(np.float64)
    inside = (labels >= 0) & (labels <= T - 1)
    if s.name in INDEXED:
        bar = s.alpha_bar[np.clip(labels, 0, T - 1).astype(np.int64)]
        return np.where(inside, np.sqrt(bar), np.nan), np.where(inside, np.sqrt(1 - bar), np.nan)
    if s.name == "KDPM2DiscreteScheduler" or any(s.flag(k) for k in s.config if k.startswith("use_")):
        told = np.exp(np.interp(labels, np.arange(T), np.log(sigma)))
    else:
        told = np.interp(labels, np.arange(T), sigma)
    a, n = _levels(told)
    return np.where(inside, a, np.nan), np.where(inside, n, np.nan)


def _levels(sigma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a = 1 / np.sqrt(1 + sigma**2)
    return a, sigma * a


# ------------------------------------------------------------------------------------------- classes that look up alphas_cumprod


def _indexed(s: Scheduler, g: Grid, eta: float) -> Columns:
    assert g.base is not None and g.previous is not None
    final = 1.0 if s.config.get("set_alpha_to_one", True) else s.alpha_bar[0]
    here, other = s.alpha_bar[g.base], np.where(g.previous >= 0, s.alpha_bar[g.previous], final)
    bar, to = (other, here) if s.name == "DDIMInverseScheduler" else (here, other)
    beta = 1 - bar / to
    posterior = (1 - to) / (1 - bar) * beta
    columns: Columns = {
        "t": g.base.astype(np.float64),
        "signal": np.sqrt(bar),
        "noise": np.sqrt(1 - bar),
        "signal_to": np.sqrt(to),
        "noise_to": np.sqrt(1 - to),
        "top": (float(np.sqrt(s.alpha_bar[-1])), float(np.sqrt(1 - s.alpha_bar[-1]))),
    }
    if s.name == "DDPMScheduler":
        kind = s.config["variance_type"]
        small = np.maximum(posterior, 1e-20)
        variance = {"fixed_small": small, "fixed_small_log": small, "fixed_large_log": np.log(beta)}.get(kind, beta)
        c = np.where(g.base > 0, np.sqrt(variance), 0.0)
        A, B0 = np.sqrt(bar / to) * (1 - to) / (1 - bar), np.sqrt(to) * beta / (1 - bar)
        return columns | {"A": A, "B0": B0, "c": c, "excess": np.where(c**2 > posterior + 1e-15, c**2 - posterior, 0)}
    if s.name == "PNDMScheduler":
        return columns
    c = eta * np.sqrt(posterior) if s.name == "DDIMScheduler" else np.zeros(len(bar))
    return columns | {"B0": np.sqrt(to), "Be": np.sqrt(1 - to - c**2), "c": c}


# ------------------------------------------------------------------------------------------------------- classes that walk in σ


def _sigma_rows(s: Scheduler, g: Grid) -> Columns:
    assert g.sigmas is not None
    sigmas = g.sigmas
    if s.name in ("HeunDiscreteScheduler", "KDPM2DiscreteScheduler"):  # they hold all σ but the first twice
        ends = np.r_[sigmas[0], sigmas[1:-1:2], sigmas[-1]][: len(g.timesteps) // 2 + 2]
    else:
        ends = sigmas[: len(g.timesteps) + 1]
    path = _path(s, ends)
    a, n = (np.ones(len(path)), path) if s.name == "EDMEulerScheduler" else _levels(path)
    columns: Columns = {"t": g.timesteps, "signal": a[:-1], "noise": n[:-1], "signal_to": a[1:], "noise_to": n[1:]}
    if s.name == "EDMEulerScheduler":
        columns |= {"top": (1.0, s.config["sigma_max"]), "start_std": float(np.hypot(s.config["sigma_max"], 1))}
    else:
        top = _levels(s.sigma[-1:].astype(np.float64))
        columns |= {"top": (float(top[0][0]), float(top[1][0]))}
        if "solver_order" not in s.config:  # the state is x/√ᾱ, and starts from N(0, σ_max²), or with "leading" N(0, σ_max² + 1)
            leading = s.config["timestep_spacing"] == "leading"
            columns |= {"start_std": float(a[0] * np.hypot(ends.max(), 1.0 if leading else 0.0))}
    if s.name in UNKNOWN_ROWS:
        return columns
    return columns | _COEFFICIENTS[s.name](s, g, path, a, n)


def _path(s: Scheduler, ends: np.ndarray) -> np.ndarray:
    """σ̄ where rows start and end."""
    if s.name == "HeunDiscreteScheduler":
        return np.r_[ends[:1], np.repeat(ends[1:-1], 2), ends[-1]]
    if s.name == "KDPM2DiscreteScheduler":
        return np.r_[np.stack([ends[:-2], np.sqrt(ends[:-2] * ends[1:-1])], axis=1).ravel(), ends[-2:]]
    return ends


def _euler(s: Scheduler, g: Grid, sigma: np.ndarray, a: np.ndarray, n: np.ndarray) -> Columns:
    return {"B0": a[1:], "Be": n[1:]}


def _ancestral(s: Scheduler, g: Grid, sigma: np.ndarray, a: np.ndarray, n: np.ndarray) -> Columns:
    here, to = sigma[:-1], sigma[1:]
    up = to * np.sqrt((here**2 - to**2) / here**2)
    return {"B0": a[1:], "Be": a[1:] * np.sqrt(to**2 - up**2), "c": a[1:] * up}


def _heun(s: Scheduler, g: Grid, sigma: np.ndarray, a: np.ndarray, n: np.ndarray) -> Columns:
    rows = len(sigma) - 1
    A, B0, Be, H = np.zeros(rows), a[1:].copy(), n[1:].copy(), np.zeros((rows, 3))
    second = np.arange(1, rows, 2)
    half = a[second] * (sigma[second] - sigma[second - 1]) / 2
    A[second], B0[second], Be[second], H[second, 0] = 1, 0, half, -half
    return {"A": A, "B0": B0, "Be": Be, "H": H}


def _kdpm2(s: Scheduler, g: Grid, sigma: np.ndarray, a: np.ndarray, n: np.ndarray) -> Columns:
    rows = len(sigma) - 1
    A, B0, Be, H = np.zeros(rows), a[1:].copy(), n[1:].copy(), np.zeros((rows, 3))
    second = np.arange(1, rows, 2)
    to = a[second + 1]
    A[second], B0[second] = to / a[second], 0
    Be[second], H[second, 0] = to * (sigma[second + 1] - sigma[second - 1]), -to * (sigma[second] - sigma[second - 1])
    return {"A": A, "B0": B0, "Be": Be, "H": H}


def _lms(s: Scheduler, g: Grid, sigma: np.ndarray, a: np.ndarray, n: np.ndarray) -> Columns:
    rows = len(sigma) - 1
    H = np.zeros((rows, 3))
    for i in range(rows):
        nodes, stop = sigma[max(0, i - LMS_ORDER + 1) : i + 1][::-1], sigma[i + 1]
        u = (stop + nodes[0]) / 2 + (stop - nodes[0]) / 2 * GAUSS_POINTS
        for k in range(1, len(nodes)):
            others = np.delete(nodes, k)
            basis = np.prod((u[:, None] - others) / (nodes[k] - others), axis=1)
            H[i, k - 1] = a[i + 1] * (stop - nodes[0]) / 2 * (basis @ GAUSS_WEIGHTS)
    return {"B0": a[1:], "Be": n[1:] - H.sum(axis=1), "H": H}


def _dpm(s: Scheduler, g: Grid, sigma: np.ndarray, a: np.ndarray, n: np.ndarray) -> Columns:
    """All four algorithms as on_m·m + on_D1·D1 + on_D2·D2, m = x0 or ε, D the divided differences of the last outputs."""
    kind, heun = s.config["algorithm_type"], s.config["solver_type"] == "heun"
    data, noisy = not kind.endswith("dpmsolver"), kind.startswith("sde")
    to_a, to_n = a[1:], n[1:]
    lam = -np.log(sigma)
    h = np.diff(lam)
    if data:
        u = 2 * h if noisy else h  # 1 − e^{−u}, the weight of x0
        whole = to_a * -np.expm1(-u)
        first = to_a * (1 + np.expm1(-u) / u)
        if not noisy:
            second = -to_a * ((np.expm1(-h) + h) / h**2 - 0.5)
            A = to_n / n[:-1]
        else:
            second = to_a * ((-np.expm1(-u) - u) / u**2 - 0.5)
            A = to_n / n[:-1] * np.exp(-h)
    else:
        twice = 2 if noisy else 1
        whole = -twice * to_n * np.expm1(h)
        first = -twice * to_n * (np.expm1(h) / h - 1)
        second = -to_n * ((np.expm1(h) - h) / h**2 - 0.5)
        A = to_a / a[:-1]
    if not noisy:
        c = np.zeros(len(h))
    else:
        c = to_n * np.sqrt(-np.expm1(-2 * h) if data else np.expm1(2 * h))
    on_m, H = whole.copy(), np.zeros((len(h), 3))
    for i, order in enumerate(g.orders):
        if order == 1:
            continue
        r0 = h[i - 1] / h[i]
        if order == 2:
            on_d1 = first[i] if heun else whole[i] / 2
            on_m[i] += on_d1 / r0
            H[i, 0] = -on_d1 / r0
        else:
            r1 = h[i - 2] / h[i]
            d2 = (first[i] * r0 + second[i]) / (r0 + r1)  # on D1_0 − D1_1
            on_10, on_11 = first[i] + d2, -d2
            on_m[i] += on_10 / r0
            H[i, :2] = on_11 / r1 - on_10 / r0, -on_11 / r1
    return {"A": A, ("B0" if data else "Be"): on_m, "H": H, "c": c, "history": "x0" if data else "eps"}


_COEFFICIENTS = {
    "EulerDiscreteScheduler": _euler,
    "EDMEulerScheduler": _euler,
    "EulerAncestralDiscreteScheduler": _ancestral,
    "HeunDiscreteScheduler": _heun,
    "KDPM2DiscreteScheduler": _kdpm2,
    "LMSDiscreteScheduler": _lms,
    "DPMSolverMultistepScheduler": _dpm,
}


# -------------------------------------------------------------------------------------------------------------------- findings


def findings(s: Scheduler, g: Grid, steps: int, w: Walk | None) -> list[Finding]:
    """All that is to be known of a scheduler at S = ``steps``; ``w`` its rows, None where it is not :func:`describable`."""
    found = _file(s)
    if flows(s):
        return found
    found += [*_tables(s), *_times(s, g, steps)]
    if w is None:
        return found
    return [*found, *_variance(s), *_solver(s, g, w), *(_trapped(f, s, g, steps) for f in check.check_walk(w))]


def _file(s: Scheduler) -> list[Finding]:
    found = [Finding("error", "refused", f"diffusers refuses this file: {reason}", "change the file") for reason in s.refused]
    if s.unknown:
        message = f"not understood: {', '.join(s.unknown)[:200]} (diffusers knows no such key in any class described here)"
        found.append(Finding("note", "unknown", message))
    if s.ignored:
        found.append(Finding("note", "ignored", f"{s.name} does not read: {', '.join(s.ignored)}"))
    if flows(s):
        message = "flow matching (use_flow_sigmas, flow_prediction) is not understood: no rows are made"
        found.append(Finding("warning", "unknown", message))
    if s.prediction == "x0" and s.name in NO_SAMPLE:
        message = f"{s.name} raises for prediction_type sample at the first step"
        found.append(Finding("error", "refused", message, "use another class"))
    left = [k for k in ("solver_p", "shift_terminal") if s.config.get(k) is not None]
    left += ["disable_corrector"] if s.config.get("disable_corrector") else []
    if left:
        found.append(Finding("note", "unknown", f"not described: {', '.join(left)}"))
    if s.flag("thresholding"):
        message = f"x0 is thresholded at its {s.config['dynamic_thresholding_ratio']:g} quantile, which the rows do not show"
        found.append(Finding("note", "clip", message))
    elif s.name == "DDIMScheduler" and s.flag("clip_sample"):
        message = f"x0 is clipped to ±{s.config['clip_sample_range']:g} while ε stays the model's own"
        found.append(Finding("note", "clip", message, "with guidance pass use_clipped_model_output=True to step"))
    if s.config.get("beta_start") == 0.00085 and not {"beta_start", "beta_end", "trained_betas"} & s.given:
        message = "the file names no betas: this class takes 0.00085..0.012, where most others take 0.0001..0.02"
        found.append(Finding("note", "betas", message, "write beta_start and beta_end of the training into the file"))
    return found


def _tables(s: Scheduler) -> list[Finding]:
    found: list[Finding] = []
    if s.name == "EDMEulerScheduler":
        return [_cast(s, 0.0)]
    if s.bad_betas.size:
        t = int(s.bad_betas[0])
        message = f"beta is outside (0, 1) {s.bad_betas.size} times, first {s.beta[t]:g} at t = {t}: no rows are made"
        found.append(Finding("error", "betas", message, "change the betas", t, float(s.beta[t])))
        return found
    if not s.flag("rescale_betas_zero_snr"):  # whose float32 betas are rough
        found += check.falling_betas(s.beta, 0)
    a, n = float(np.sqrt(s.exact[-1])), float(np.sqrt(1 - s.exact[-1]))
    gap = check.start_gap(a, n, 1.0)
    if gap > check.LARGE_GAP:
        advice = f"betas times 1000/T = {1000 / s.T:g}, larger betas or more steps"
        found.append(check.prior_finding(a, n, gap, advice, s.T))
    if s.flag("rescale_betas_zero_snr") and s.prediction == "eps" and s.name not in INDEXED:
        message = "zero terminal SNR with a model of ε: σ̄ starts at 4096, not ∞, and multiplies the error of ε by that"
        found.append(Finding("warning", "zero-snr", message, "use a model of v (v_prediction)", 0, 4096.0))
    off = abs((1 - s.alpha_bar[0]) / s.beta[0] - 1)
    if s.name in CASTS:
        found.append(_cast(s, off))
    elif off > 1e-4:
        message = f"float32 tables: 1 − alphas_cumprod[0] is {off:.2g} off, relatively"
        found.append(Finding("note", "float32", message, value=float(off)))
    return found


def _cast(s: Scheduler, off: float) -> Finding:
    message = f"{s.name} rounds the state to float32 in every step, float64 samples too"
    message += f"; 1 − alphas_cumprod[0] is {off:.2g} off, relatively" if off else ""
    return Finding("note", "float32", message, "compare with float64 at 5e-5 only", value=float(off), trap=6)


def _times(s: Scheduler, g: Grid, steps: int) -> list[Finding]:
    offset = s.config.get("steps_offset", 0)
    if g.failed is not None:
        trap = 5 if g.failed.startswith("IndexError") and offset else None
        advice = "use steps_offset 0 or fewer steps" if trap else "take another number of steps"
        return [Finding("error", "fails", f"{steps} steps fail: {g.failed}", advice, 0, trap=trap)]
    found = []
    times = g.timesteps if g.base is None else g.base
    if len(times) > 1 and np.all(times == times[0]):
        message = f"all {len(times)} times are t = {times[0]:g}: the step of the grid is rounded down to 0"
        found.append(Finding("error", "duplicate", message, "take fewer steps, or spacing linspace", 1, float(times[0]), trap=5))
    if g.base is not None and len(g.base) != steps:
        message = f"spacing trailing makes {len(g.base)} times of {steps}, the last one t = {g.base[-1]}, by rounding of T/S"
        row = int(np.argmin(g.base))
        found.append(Finding("error", "range", message, "take another number of steps", row, float(g.base[row])))
    elif s.beta.size and np.any((times < 0) | (times >= s.T)) and s.config.get("timestep_type") != "continuous":
        row = int(np.argmax((times < 0) | (times >= s.T)))
        taken = "counted from the end" if s.name in INDEXED else "of the nearest time inside"
        message = f"the model is told t = {times[row]:g}, outside 0..{s.T - 1}, and the level is that {taken}"
        trap = 5 if offset and times[row] >= s.T else None
        advice = "use steps_offset 0 or another number of steps"
        found.append(Finding("error", "range", message, advice, row, float(times[row]), trap))
    return found


def _variance(s: Scheduler) -> list[Finding]:
    kind = s.config.get("variance_type")
    if kind == "fixed_large_log" and s.name == "DDPMScheduler":
        message = "variance_type fixed_large_log takes the root of log beta, which is negative: NaN at the first step"
        return [Finding("error", "variance", message, "use fixed_large", 0, trap=3)]
    if kind == "fixed_small_log" and s.name == "DDPMScheduler":
        message = "variance_type fixed_small_log: _get_variance returns a standard deviation, not a variance"
        return [Finding("note", "variance", message, "step uses it rightly; do not take it for a variance", trap=3)]
    if kind in ("learned", "learned_range") and s.name == "DDPMScheduler":
        message = f"variance_type {kind}: the model decides the noise; the column c shows its upper end, beta"
        return [Finding("note", "variance", message, "the lower end of the last row is clipped to 1e-20 (std 1e-10)")]
    return []


def _solver(s: Scheduler, g: Grid, w: Walk) -> list[Finding]:
    found: list[Finding] = []
    c = s.config
    if s.name == "UniPCMultistepScheduler" and c["final_sigmas_type"] == "zero":
        reasons = {
            "solver_type bh1": c["solver_type"] == "bh1",
            "predict_x0 false": not c["predict_x0"],
            "lower_order_final false": not c["lower_order_final"] and c["solver_order"] > 1 and len(w) > 1,
        }
        for reason in (k for k, wrong in reasons.items() if wrong):
            message = f"{reason} with final_sigmas_type zero: the last step is ∞·0, not a number"
            trap = 4 if reason == "solver_type bh1" else None
            advice = "use final_sigmas_type sigma_min, or the default"
            found.append(Finding("error", "nan", message, advice, len(w) - 1, trap=trap))
    if s.name == "DPMSolverMultistepScheduler" and c["algorithm_type"] == "sde-dpmsolver" and 3 in g.orders:
        found.append(Finding("error", "refused", "sde-dpmsolver has no order 3: the third step raises", "use solver_order 2", 2))
    return found


def _trapped(f: Finding, s: Scheduler, g: Grid, steps: int) -> Finding:
    """A finding on the rows with the number of the known trap that it is."""
    if f.code == "previous" and g.previous is not None:
        message = f.message + f" (the class steps by t − T//S = t − {s.T // steps})"
        return replace(f, message=message, advice="use spacing leading, or trailing with an S that divides T", trap=1)
    if f.code == "residual" and g.previous is not None and s.config.get("set_alpha_to_one") and g.previous[-1] >= 0:
        message = f.message + f": the last t − T//S is {g.previous[-1]}, not below 0"
        return replace(f, message=message, advice="use spacing leading, or trailing with an S that divides T", trap=1)
    if f.code == "start" and f.advice and s.name in INDEXED and s.name != "DDPMScheduler":
        return replace(f, advice="use spacing trailing with an S that divides T")
    if f.code == "residual" and s.name == "DDPMScheduler" and f.message.startswith("fresh"):
        message = f.message + f": noise is added where t > 0, and the last t is {g.timesteps[-1]:g}"
        return replace(f, message=message, advice="use spacing leading with steps_offset 0, or linspace, or fixed_small", trap=2)
    return f
