"""What `alphabar check` prints: key numbers, rows, laws and findings, as text, JSON or CSV."""

import csv
import dataclasses
import io
import json
import math
import textwrap
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from alphabar.core import check
from alphabar.core.check import Finding, Walk

STDS = (1.0, 0.25)  # of the Gaussian data whose law is told
WIDTH = 118


@dataclass
class Report:
    """What was checked: ``lines`` of (name, value), the rows where there are any, and the findings."""

    subject: str
    lines: list[tuple[str, str]]
    numbers: dict[str, Any]
    findings: list[Finding]
    walk: Walk | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        """0 where there is nothing above a note."""
        return int(any(f.severity != "note" for f in self.findings))


def level_numbers(signal: Any, noise: Any, std: float) -> dict[str, Any]:
    """Key numbers of levels from the first time to the last, ``std`` that of the prior."""
    a, n = np.asarray(signal, np.float64), np.asarray(noise, np.float64)
    gap = check.start_gap(float(a[-1]), float(n[-1]), std)
    with np.errstate(divide="ignore"):
        snr = 2 * np.log(a / n)
    return {
        "alpha_bar_T": float(a[-1] ** 2),
        "sigma_T": float(n[-1]),
        "prior_std": float(std),
        "prior_gap_nats": gap,
        "prior_gap_bits": gap / math.log(2),
        "log_snr_max": float(snr[0]),
        "log_snr_min": float(snr[-1]),
    }


def number_lines(numbers: dict[str, Any]) -> list[tuple[str, str]]:
    """The key numbers as text."""
    levels = f"noise level {numbers['sigma_T']:.6g}, prior std {numbers['prior_std']:.6g}"
    return [
        ("alpha_bar_T", f"{numbers['alpha_bar_T']:.4g}, {levels}"),
        ("prior gap", f"{numbers['prior_gap_bits']:.3g} bits/dim ({numbers['prior_gap_nats']:.3g} nats)"),
        ("log-SNR", f"{numbers['log_snr_max']:.4g} down to {numbers['log_snr_min']:.4g} (ln of signal²/noise²)"),
    ]


def rows(w: Walk) -> list[dict[str, Any]]:
    """Every column of every row."""
    with np.errstate(all="ignore"):
        columns: dict[str, Any] = {
            "t": w.t,
            "sigma": w.noise / w.signal,
            "log_snr": 2 * np.log(w.signal / w.noise),
            "sigma_to": w.noise_to / w.signal_to,
            "sigma_told": w.label_noise / w.label_signal,
            "signal": w.signal,
            "noise": w.noise,
            "signal_to": w.signal_to,
            "noise_to": w.noise_to,
        }
    if w.known:
        columns |= {"A": w.A, "B0": w.B0, "Be": w.Be, **{f"H{k + 1}": w.H[:, k] for k in range(3)}, "c": w.c, "excess": w.excess}
    return [{"row": i, **{k: float(v[i]) for k, v in columns.items()}} for i in range(len(w))]


def laws(w: Walk) -> list[check.Law]:
    """The laws that the walk ends in; none where the coefficients are not known."""
    return [check.gaussian_law(w, std) for std in STDS] if w.known else []


def as_json(r: Report) -> str:
    """The whole report; numbers that are not finite are null."""
    out: dict[str, Any] = {"subject": r.subject, **r.numbers, **r.extra}
    if r.walk is not None:
        out |= {"prediction": r.walk.prediction, "history": r.walk.history, "rows": rows(r.walk)}
        out["laws"] = [dataclasses.asdict(law) for law in laws(r.walk)]
    out["findings"] = [dataclasses.asdict(f) for f in r.findings]
    return json.dumps(_finite(out), ensure_ascii=False, indent=1, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_csv(w: Walk) -> str:
    """The rows."""
    out = io.StringIO()
    table = rows(w)
    writer = csv.DictWriter(out, list(table[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: v if k == "row" else repr(v) for k, v in row.items()} for row in table)
    return out.getvalue().rstrip("\n")


def as_text(r: Report, limit: int) -> str:
    """The report for people; ``limit`` rows at most, 0 for all."""
    width = max(len(name) for name, _ in r.lines)
    out = [r.subject, "", *(f"  {name:<{width}}  {value}" for name, value in r.lines)]
    if r.walk is not None:
        out += ["", *_table(r.walk, limit)]
        found = laws(r.walk)
        if found:
            out += ["", "Law of the samples on data N(m, std²) with their perfect model, no clipping:"]
        for law in found:
            right = f"{law.right_mean:.4g}·m and {law.right_variance:.4g}"
            if not math.isfinite(law.mean + law.variance):
                out.append(f"  std {law.std:<5g} not a number; exact would be {right}")
                continue
            mean = f"mean {law.mean:.6g}·m, variance {law.variance:.6g} (std {math.sqrt(max(law.variance, 0)):.4g})"
            out.append(f"  std {law.std:<5g} {mean}; exact would be {right}")
    return "\n".join([*out, "", *finding_lines(r.findings)])


def finding_lines(findings: list[Finding]) -> list[str]:
    """Findings, the worst first."""
    if not findings:
        return ["No findings."]
    order = sorted(findings, key=lambda f: -check.SEVERITIES.index(f.severity))
    counts = [(sum(f.severity == s for f in order), s) for s in reversed(check.SEVERITIES)]
    out = ["Findings: " + ", ".join(f"{k} {s}{'s' * (k > 1)}" for k, s in counts if k)]
    for f in order:
        where = "" if f.row is None else f"row {f.row}: "
        trap = "" if f.trap is None else f" [trap\0{f.trap}]"  # \0: a space where no line ends
        text = f"{where}{f.message}{trap}" + (f" → {f.advice}" if f.advice else "")
        out += textwrap.wrap(f"  {f.severity:<7}  {f.code:<9}  {text}", WIDTH, subsequent_indent=" " * 22, break_long_words=False)
    return [line.replace("\0", " ") for line in out]


def _table(w: Walk, limit: int) -> list[str]:
    names = ["row", "t", "sigma", "log_snr"]
    head = ["row", "t", "σ̄", "log-SNR"]
    told = np.abs(np.log(w.label_noise * w.signal / (w.label_signal * w.noise))) > 1e-3 if _levels_positive(w) else np.zeros(1)
    if np.any(told):
        names, head = [*names, "sigma_told"], [*head, "t means σ̄"]
    table = rows(w)
    names, head = [*names, "sigma_to"], [*head, "→ σ̄"]
    if w.known:
        past = [f"H{k + 1}" for k in range(3) if w.H[:, k].any()]
        more = ["A", "B0", "Be", *past, "c", *(["excess"] if w.excess.any() else [])]
        names, head = [*names, *more], [*head, *more]
    n = len(table)
    shown = range(n) if not limit or n <= limit else [*range((limit + 1) // 2), *range(n - limit // 2, n)]
    cells = [head, *([str(row[k]) if k == "row" else _number(row[k]) for k in names] for row in (table[i] for i in shown))]
    widths = [max(_width(line[j]) for line in cells) for j in range(len(head))]
    padded = ([" " * (wide - _width(cell)) + cell for cell, wide in zip(line, widths, strict=True)] for line in cells)
    lines = ["  " + "  ".join(line) for line in padded]
    if len(shown) < n:
        lines.insert(1 + (limit + 1) // 2, f"  … {n - len(shown)} more rows (--rows 0 shows all)")
    kept = "x0" if w.history == "x0" else "ε"
    about = f"{n} rows: x' = A·x + B0·x0 + Be·ε + c·z" + (f", H on the {kept} of earlier rows" if w.H.any() else "")
    return [about if w.known else f"{n} steps; the coefficients of this class are not derived, its times and levels are:", *lines]


def _levels_positive(w: Walk) -> bool:
    return bool(np.all(w.label_noise * w.signal > 0) and np.all(w.label_signal * w.noise > 0))


def _width(text: str) -> int:
    return len(text.replace("\u0304", ""))  # the bar of σ̄ takes no room


def _number(value: float) -> str:
    return f"{value:.6g}" if value else "0"
