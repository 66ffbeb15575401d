"""What is wrong with a noise process, a grid of times or a sampler: findings with a row, a number and what to do.

A :class:`Walk` is a sampler row by row as in :class:`~alphabar.core.table.Table`, without its laws: so it can say what another
library's sampler does, right or wrong.
"""

from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from .convert import coefficients
from .levels import Levels, Schedule
from .table import STORED, Table

SEVERITIES = ("note", "warning", "error")
LARGE_GAP = 0.01  # nats per dimension between the start of a sampler and the prior
SMALL_GAP = 1e-3  # below it nothing need be done
LOUD = 0.1  # fresh noise in the last step that nobody can have meant
GREY = 1 / 255  # half a grey level of 8-bit images in [-1, 1]
LABEL_GAP = 0.05  # |Δ ln σ̄| between the time told to the model and the level of the state
RESIDUE = 0.05  # noise level after the last step
ROUNDING = 2.0**-24  # half a unit in the last place of float32


@dataclass(frozen=True)
class Finding:
    """One thing to know; "note" where nothing need be done. ``trap`` is the number of a known trap of published samplers."""

    severity: str
    code: str
    message: str
    advice: str = ""
    row: int | None = None
    value: float | None = None
    trap: int | None = None

    def __post_init__(self) -> None:
        if self.severity not in SEVERITIES:
            raise ValueError(f"severity must be one of {SEVERITIES}, not {self.severity!r}")


@dataclass(frozen=True, eq=False)
class Walk:
    """A sampler's rows: x' = A·x + B0·x0 + Be·ε + Σ_j H_j·y_{−back_j} + c·z from (signal, noise) to (signal_to, noise_to).

    ``t`` is the label told to the model, trained to mean the level (label_signal, label_noise); the sampler takes its state for
    one of (signal, noise). ``start_std``: deviation of the state it starts from. ``top``: the levels (a_T, n_T) of the last time.
    Where ``known`` is False only the times and levels are known, and A, B0, Be, H are 0.
    """

    name: str
    prediction: str
    t: np.ndarray
    label_signal: np.ndarray
    label_noise: np.ndarray
    signal: np.ndarray
    noise: np.ndarray
    signal_to: np.ndarray
    noise_to: np.ndarray
    top: tuple[float, float]
    start_std: float = 1.0
    history: str = "eps"
    A: np.ndarray = field(default_factory=lambda: np.zeros(0))
    B0: np.ndarray = field(default_factory=lambda: np.zeros(0))
    Be: np.ndarray = field(default_factory=lambda: np.zeros(0))
    H: np.ndarray = field(default_factory=lambda: np.zeros((0, STORED)))
    back: np.ndarray = field(default_factory=lambda: np.zeros((0, STORED), np.int64))
    c: np.ndarray = field(default_factory=lambda: np.zeros(0))
    excess: np.ndarray = field(default_factory=lambda: np.zeros(0))
    known: bool = True

    def __post_init__(self) -> None:
        rows = len(self.t)
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, np.ndarray) and value.shape[0] != rows:
                if value.size:
                    raise ValueError(f"{f.name} must have {rows} rows like t, not {value.shape[0]}")
                filled = np.tile(np.arange(1, STORED + 1), (rows, 1)) if f.name == "back" else np.zeros((rows, *value.shape[1:]))
                object.__setattr__(self, f.name, filled)

    def __len__(self) -> int:
        return len(self.t)

    @property
    def descends(self) -> bool:
        """True for a sampler, False for an encoder (data to noise)."""
        return bool(self.noise_to[-1] * self.signal[0] < self.noise[0] * self.signal_to[-1])

    @property
    def stays(self) -> np.ndarray:
        """Rows that end at the level where they start: corrections."""
        return (self.signal == self.signal_to) & (self.noise == self.noise_to)

    @property
    def asks(self) -> np.ndarray:
        """Rows that ask the model: they use its answer, or a later row does."""
        if not self.known:
            return np.ones(len(self), bool)
        asks = (self.B0 != 0) | (self.Be != 0)
        row, column = np.nonzero(self.H)
        asks[row - self.back[row, column]] = True
        return asks

    @property
    def past(self) -> np.ndarray:
        """How many stored outputs each row reads."""
        return np.where(self.H != 0, np.arange(1, STORED + 1), 0).max(axis=1)


def walk(table: Table, s: Levels) -> Walk:
    """The rows of ``table``, with the levels that its times have under ``s``."""
    a, n = s.levels(table.t)
    top_signal, top_noise = s.levels(s.T)
    same = {f.name: getattr(table, f.name) for f in fields(table) if f.name not in ("exact", "stops")}
    return Walk(**same, label_signal=a, label_noise=n, top=(float(top_signal), float(top_noise)), start_std=s.prior_std)


@dataclass(frozen=True)
class Law:
    """The law N(mean·m, variance) of the last state for data N(m, std²); that of the process: right_mean, right_variance."""

    std: float
    mean: float
    variance: float
    right_mean: float
    right_variance: float


def gaussian_law(w: Walk, std: float = 1.0) -> Law:
    """The exact law that a walk ends in, for data N(m, std²) per element and their perfect model.

    Every prediction is then linear in x, and (x, y_{−1}, y_{−2}, …) stays Gaussian. The model knows its label alone: where the
    label means another level than the state has, its answer is converted as the sampler converts it.
    """
    asks = w.asks
    kx, k0, ex, e0 = (np.where(asks, v, 0.0) for v in _gaussian_model(w, std))
    a_T, n_T = w.signal_to[-1], w.noise_to[-1]
    if w.descends:
        start, spread, right = 0.0, w.start_std, (1.0, std**2)
    else:
        start, spread, right = 1.0, std, (a_T, (a_T * std) ** 2 + n_T**2)
    depth = int(w.back[w.H != 0].max(initial=1))
    mean, cov = np.r_[start, np.zeros(depth)], np.zeros((depth + 1, depth + 1))
    cov[0, 0] = spread**2
    with np.errstate(all="ignore"):
        for i in range(len(w)):
            M, offset = np.eye(depth + 1, k=-1), np.zeros(depth + 1)
            M[1, 0], offset[1] = (kx[i], k0[i]) if w.history == "x0" else (ex[i], e0[i])
            M[0, 0] = w.A[i] + w.B0[i] * kx[i] + w.Be[i] * ex[i]
            offset[0] = w.B0[i] * k0[i] + w.Be[i] * e0[i]
            used = np.flatnonzero(w.H[i])
            M[0, w.back[i, used]] = w.H[i, used]
            mean, cov = M @ mean + offset, M @ cov @ M.T
            cov[0, 0] += w.c[i] ** 2
    return Law(std, float(mean[0]), float(cov[0, 0]), float(right[0]), float(right[1]))


def _gaussian_model(w: Walk, std: float) -> tuple[np.ndarray, ...]:
    """(kx, k0, ex, e0): the x0 and ε that the sampler reads from the model's answer are kx·x + k0·m and ex·x + e0·m."""
    a, n = w.label_signal, w.label_noise
    blind = np.where((w.signal == 0) & (w.prediction in ("eps", "score")), np.nan, 1.0)  # x0 does not follow there
    with np.errstate(all="ignore"):
        total = (a * std) ** 2 + n**2
        forms = {"x0": (a * std**2 / total * blind, n**2 / total * blind), "eps": (n / total, -a * n / total)}
        same = (a == w.signal) & (n == w.noise)
        if same.all():
            return *forms["x0"], *forms["eps"]
        P, Q = _coefficients("x0", w.prediction, a, n)
        mx, m0 = P + Q * forms["x0"][0], Q * forms["x0"][1]
        out = []
        for target in ("x0", "eps"):
            P, Q = _coefficients(w.prediction, target, w.signal, w.noise)
            out += [np.where(same, forms[target][0], P + Q * mx), np.where(same, forms[target][1], Q * m0)]
    return tuple(out)


def _coefficients(source: str, target: str, a: np.ndarray, n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As :func:`alphabar.core.convert.coefficients`, NaN where it does not exist."""
    bad = np.isnan(a + n)
    if source != target:
        bad |= ((n == 0) & ((source in ("x0", "score")) | (target == "score"))) | ((a == 0) & (source in ("eps", "score")))
    P, Q = coefficients(source, target, np.where(bad, 0.6, a), np.where(bad, 0.8, n))
    return np.where(bad, np.nan, P), np.where(bad, np.nan, Q)


# -------------------------------------------------------------------------------------------------------------------- findings


def start_gap(signal: float, noise: float, std: float) -> float:
    """KL(q(x_t|x_0) ‖ N(0, std²)), nats per dimension, at E[x_0²] = 1."""
    with np.errstate(divide="ignore"):
        ratio = np.float64((noise / std) ** 2)
        return float(0.5 * (ratio + (signal / std) ** 2 - 1 - np.log(ratio)))


def check_levels(s: Levels) -> list[Finding]:
    """Findings on a process alone: its gap to the prior, zero terminal signal, falling betas."""
    found = []
    a, n = (float(v) for v in s.levels(s.T))
    gap = start_gap(a, n, s.prior_std)
    if gap > LARGE_GAP:
        if isinstance(s, Schedule):
            advice = f"rescale=True (betas times 1000/T = {1000 / s.T:g}), larger betas or more steps"
        else:
            advice = "more noise at the end"
        found.append(prior_finding(a, n, gap, advice, s.T if isinstance(s, Schedule) else None))
    if a == 0:
        message = f"no signal is left at t = {s.T:g}: there x_t tells a model of ε nothing about x0"
        found.append(Finding("note", "zero-snr", message))
    return [*found, *falling_betas(s.beta[1:], 1)] if isinstance(s, Schedule) else found


def falling_betas(beta: np.ndarray, first: int) -> list[Finding]:
    """A note where the variances β_t, t = first, first + 1, …, do not rise."""
    fall = np.flatnonzero(np.diff(beta) < 0)
    if not fall.size:
        return []
    i = int(fall[0])
    message = (
        f"beta is not monotone: it falls {fall.size} times, first from {beta[i]:.4g} to {beta[i + 1]:.4g} at t = {i + 1 + first}"
    )
    return [Finding("note", "monotone", message, value=float(beta[i + 1]))]


def prior_finding(a: float, n: float, gap: float, advice: str, T: float | None = None) -> Finding:
    """A gap between q(x_T) and the prior; the trap of the usual betas at a small T where ``T`` is below 1000."""
    message = f"q(x_T|x_0) is {gap:.3g} nats ({gap / np.log(2):.3g} bits) per dimension from the prior: x_T has"
    message += f" signal {a:.3g} and noise {n:.4g} (alpha_bar_T = {a * a:.3g})"
    return Finding("warning", "prior", message, f"use {advice}", value=gap, trap=7 if T is not None and T < 1000 else None)


def check_times(times: Any, s: Levels) -> list[Finding]:
    """Findings on a grid of times as given, in ascending order or not: duplicates, disorder, times out of range."""
    t = np.asarray(times, np.float64)
    bad = ~(np.isfinite(t) & (t > 0) & (t <= s.T))
    if bad.any():
        i = int(np.flatnonzero(bad)[0])
        message = f"time {t[i]:g} is outside (0, {s.T:g}]"
        return [Finding("error", "range", message, f"give times above 0 and at most {s.T:g}", i, float(t[i]))]
    found = []
    same = np.flatnonzero(np.isin(t, [v for v, k in zip(*np.unique(t, return_counts=True), strict=True) if k > 1]))
    if same.size:
        times, extra = int((t == t[same[0]]).sum()), t.size - np.unique(t).size
        message = f"time {t[same[0]]:g} stands {times} times ({extra} too many in all)"
        found.append(Finding("error", "duplicate", message, "drop the duplicates", int(same[1]), float(t[same[0]])))
    steps = np.diff(t)
    if np.any(steps > 0) and np.any(steps < 0):
        way = 1 if np.sum(steps > 0) >= np.sum(steps < 0) else -1
        i = int(np.flatnonzero(steps * way < 0)[0]) + 1
        message = f"{t[i]:g} follows {t[i - 1]:g}: the times are out of order"
        found.append(Finding("error", "order", message, "sort the times", i, float(t[i])))
    return found


def check_walk(w: Walk) -> list[Finding]:
    """Findings on a sampler's rows, and on the law that they end in."""
    found = [*_finite(w), *_labels(w)]
    if w.descends:
        found += [*_start(w), *_end(w)]
    found += [*_joints(w), *_accuracy(w), *_rounding(w)]
    if w.known and not any(f.severity == "error" for f in found):
        law = gaussian_law(w)
        if not 0.8 < law.variance / law.right_variance < 1.25:
            message = f"on data N(m, 1) the samples have variance {law.variance:.4g}, not {law.right_variance:.4g}"
            advice = "expect it of few steps or of variance added on purpose"
            found.append(Finding("note", "law", message, advice, value=law.variance))
    return found


def _finite(w: Walk) -> list[Finding]:
    columns = {k: getattr(w, k) for k in ("signal", "noise", "signal_to", "noise_to", "A", "B0", "Be", "c")}
    bad = {k: ~np.isfinite(v) for k, v in columns.items()} | {"H": ~np.isfinite(w.H).all(axis=1)}
    rows = np.logical_or.reduce(list(bad.values()))
    if not rows.any():
        if w.prediction in ("eps", "score") and np.any(w.signal == 0):
            i = int(np.flatnonzero(w.signal == 0)[0])
            message = f"the row starts where no signal is left, and x0 does not follow from {w.prediction} there (0/0)"
            return [Finding("error", "zero-snr", message, "use a model of x0 or v, or end the grid below T", i)]
        return []
    i = int(np.flatnonzero(rows)[0])
    names = ", ".join(k for k, v in bad.items() if v[i])
    message = f"{names} is not a number in {int(rows.sum())} of {len(w)} rows"
    return [Finding("error", "nan", message, "see the other findings", i)]


def _labels(w: Walk) -> list[Finding]:
    found = []
    with np.errstate(all="ignore"):
        rises = w.noise_to * w.signal > w.noise * w.signal_to
    moving = np.flatnonzero(~w.stays & w.asks)
    steps = np.diff(w.t[moving]) * (-1 if w.descends else 1)
    churned = np.add.reduceat(rises, moving)[:-1] > 0 if w.descends and len(moving) else np.zeros(len(steps), bool)
    steps = np.where(churned, 1, steps)
    same, back = np.flatnonzero(steps == 0), np.flatnonzero(steps < 0)
    if same.size:
        i = int(moving[same[0] + 1])
        message = f"{same.size} of {len(moving)} steps tell the model the time of the step before, first t = {w.t[i]:g}"
        found.append(Finding("warning", "duplicate", message, "take fewer steps or another spacing", i, float(w.t[i])))
    if back.size:
        i = int(moving[back[0] + 1])
        message = f"t goes back {back.size} times, first from {w.t[moving[back[0]]]:g} to {w.t[i]:g}"
        found.append(Finding("error", "order", message, "sort the times", i, float(w.t[i])))
    with np.errstate(all="ignore"):
        gap = np.log(w.label_noise * w.signal / (w.label_signal * w.noise))
    gap = np.where(np.isfinite(gap) & w.asks, gap, 0.0)
    i = int(np.argmax(np.abs(gap)))
    if abs(gap[i]) > 1e-3 and w.descends:
        wrong = int(np.sum(np.abs(gap) > 1e-3))
        sigma, told = w.noise[i] / w.signal[i], w.label_noise[i] / w.label_signal[i]
        message = f"label and σ disagree in {wrong} of {len(w)} rows: in this one the state has σ̄ = {sigma:.4g}, the label"
        message += f" t = {w.t[i]:g} means {told:.4g} ({np.expm1(gap[i]):+.1%})"
        severity = "warning" if abs(gap[i]) > LABEL_GAP else "note"
        found.append(Finding(severity, "label", message, "give the model times that are not rounded", i, float(gap[i])))
    elif abs(gap[i]) > 1e-3:
        message = "an encoder: the model is told another time than that of the state it sees"
        found.append(Finding("note", "label", message, "samples and reconstructions depend on this choice", i, float(gap[i])))
    return found


def _start(w: Walk) -> list[Finding]:
    found = []
    a, n = w.signal[0], w.noise[0]
    with np.errstate(all="ignore"):
        below = np.log((w.top[1] * a) / (w.top[0] * n))  # NaN where both have no signal
    gap, least = start_gap(a, n, w.start_std), start_gap(*w.top, w.start_std)
    if below > 1e-3:
        top = f"{w.top[1] / w.top[0]:.4g}" if w.top[0] else "inf"
        message = f"the grid starts at t = {w.t[0]:g}, σ̄ = {n / a:.4g}, not at T, σ̄ = {top}:"
        message += f" x_T is taken for a sample of that time, {gap:.3g} nats per dimension off"
        severity = "warning" if gap > max(LARGE_GAP, 2 * least) else "note"
        advice = "" if gap < SMALL_GAP else "use a spacing that starts at T (trailing or linspace)"
        found.append(Finding(severity, "start", message, advice, 0, float(n / a)))
    elif gap > max(LARGE_GAP, 2 * least):
        message = f"x_T ~ N(0, {w.start_std:.4g}²) is {gap:.3g} nats per dimension from the state that the first row expects"
        found.append(Finding("warning", "start", message, "start from noise of the right deviation", 0, gap))
    return found


def _end(w: Walk) -> list[Finding]:
    found = []
    last = len(w) - 1
    c, left = float(w.c[-1]), float(w.noise_to[-1])
    if 0 < c <= 1e-6:
        message = f"the posterior variance of the last step, 0, is clipped to {c * c:.2g}"
        found.append(Finding("note", "clipped", message, row=last, value=c))
    if c > 1e-6:
        severity = "error" if c > LOUD else "warning" if c > GREY else "note"
        message = f"fresh noise of std {c:.3g} is added in the last step and stays in the samples (residual variance {c * c:.3g})"
        found.append(Finding(severity, "residual", message, "no noise belongs in the last step", last, c))
    if left > 1e-6:
        severity = "warning" if left > RESIDUE else "note"
        message = f"the last step ends at noise level {left:.3g} (signal {w.signal_to[-1]:.4g}), not at clean data"
        found.append(Finding(severity, "residual", message, "end at σ = 0, or denoise once more", last, left))
    return found


def _joints(w: Walk) -> list[Finding]:
    found = []
    with np.errstate(all="ignore"):
        end, start = w.noise_to[:-1] / w.signal_to[:-1], w.noise[1:] / w.signal[1:]
        gap = np.abs(end - start) > 1e-6 * np.maximum(end, start)
    if gap.any():
        worst = int(np.argmax(np.where(gap, np.abs(np.log(np.maximum(end, 1e-9) / np.maximum(start, 1e-9))), 0)))
        message = f"wrong previous alpha_bar in {int(gap.sum())} of {len(w)} steps: this one ends at σ̄ = {end[worst]:.4g},"
        message += f" and the next takes its state for one of σ̄ = {start[worst]:.4g}"
        advice = "take the previous time from the grid, or a spacing whose steps are those"
        found.append(Finding("error", "previous", message, advice, worst, float(end[worst] - start[worst])))
    if w.known:
        idle = w.stays & np.isclose(w.A * w.signal + w.B0, w.signal) & np.isclose(w.A * w.noise + w.Be, w.noise)
        idle &= ~w.H.any(axis=1) & (w.c == 0)
    else:
        idle = w.stays
    if idle.any():
        message = f"{int(idle.sum())} of {len(w)} rows end at the level where they start: their evaluations do nothing"
        found.append(Finding("warning", "idle", message, "take fewer steps", int(np.flatnonzero(idle)[0])))
    return found


def _accuracy(w: Walk) -> list[Finding]:
    """Multistep rows of order 3 or more, every one a step, after which the order is 2 none the less."""
    past = w.past
    plain = (w.back == np.arange(1, STORED + 1))[past > 0].all()
    if len(w) < 3 or past[0] > 0 or past[1] > 1 or past.max() < 2 or w.stays.any() or not plain:
        return []
    order, why = int(past.max()) + 1, _square_error(w)
    if why is None:
        return []
    message = f"rows of order {order} {why}: globally the order is 2"
    return [Finding("note", "accuracy", message, f"do not expect errors to fall with order {order}", 0, 2.0, trap=8)]


def _square_error(w: Walk) -> str | None:
    """Why a row that reads two outputs or more, tried on outputs that are a square, does not give their integral.

    d(x/n)/dλ = e^λ·x0 with x0 = (λ − λ_i)², λ = ln(a/n); or d(x/a)/dσ̄ = ε with ε = (ln σ̄ − ln σ̄_i)², or (σ̄ − σ̄_i)².
    """
    rows = np.flatnonzero((w.past >= 2) & (w.noise_to > 0))
    if not rows.size:
        return None
    i = int(rows[-1])
    sigma, to = w.noise[i - w.past[i] : i + 1][::-1] / w.signal[i - w.past[i] : i + 1][::-1], w.noise_to[i] / w.signal_to[i]
    u, H = np.log(to / sigma[0]), w.H[i, : w.past[i]]
    got = H @ np.log(sigma[1:] / sigma[0]) ** 2
    if w.history == "x0":
        ratio = got * sigma[0] / w.noise_to[i] / (np.exp(-u) * (u**2 + 2 * u + 2) - 2)
    else:
        ratio = got / w.signal_to[i] / sigma[0] / (np.exp(u) * (u**2 - 2 * u + 2) - 2)
    uniform = H @ (sigma[1:] - sigma[0]) ** 2 / w.signal_to[i] / ((to - sigma[0]) ** 3 / 3)
    if abs(ratio - 0.5) < 1e-6:
        return "that count the second derivative by half"
    if w.history == "eps" and min(abs(ratio - 1), abs(uniform - 1)) < 1e-6:
        return "after a first step of order 1"
    return None


def _rounding(w: Walk) -> list[Finding]:
    P, Q = _coefficients(w.prediction, "x0", w.signal, w.noise)
    size = np.where(w.asks, np.nan_to_num(np.maximum(np.abs(P), np.abs(Q))), 0.0) * ROUNDING
    i = int(np.argmax(size))
    if size[i] <= 1e-4:
        return []
    message = (
        f"x0 is found from {w.prediction} times {size[i] / ROUNDING:.3g}: float32 rounding alone puts it off by {size[i]:.2g}"
    )
    severity = "warning" if size[i] > GREY else "note"
    return [Finding(severity, "float32", message, "clip x0, or use a model of v or x0", i, float(size[i]))]
