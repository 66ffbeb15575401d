"""What a likelihood looks like: the terms of a bound by decades of time, and lines of a table."""

import math
from typing import Any

import numpy as np

from alphabar.core.bound import Bound

HEAD = f"{'term':<28} {'bits/dim':>9}   {'± s.e.':>7}"


def terms(b: Bound) -> list[dict[str, Any]]:
    """L_0, the KL terms summed over each decade of t, L_T."""
    t = b.t[1:]
    decade = np.ceil(np.round(np.log10(t), 9)).astype(int)
    groups = [("L_0", b.t[:1], b.decoder)]
    for k in np.unique(decade):
        at = np.flatnonzero(decade == k)
        low, high = t[at[0]], t[at[-1]]
        name = f"t = {low:.4g}" if low == high else f"t = {low:.4g}..{high:.4g}"
        groups.append((f"L_t-1, {name}", t[at], b.terms[1 + at].sum(axis=0)))
    groups.append(("L_T", b.t[-1:], b.prior))
    found = []
    for name, times, nats in groups:
        mean, error = b.bits_of(nats)
        ends = {"t_from": float(times[0]), "t_to": float(times[-1])}
        found.append({"name": name, **ends, "bits": float(mean), "standard_error": number(float(error))})
    return found


def report(b: Bound, unit: str = "dimension") -> dict[str, Any]:
    """The numbers of a bound for a file; ``unit``: what an element of a sample is called."""
    bits, errors = b.term_bits
    return {
        f"bits_per_{unit}": number(b.bits),
        "standard_error": number(b.error),
        "steps": b.t.size,
        "terms": terms(b),
        "t": b.t.tolist(),
        "bits_of_terms": [number(v) for v in bits],
        "errors_of_terms": [number(e) for e in errors],
    }


def line(name: str, bits: float, error: float | None) -> str:
    """One line of the table."""
    unknown = error is None or math.isnan(error)
    return f"{name:<28} {bits:>9.4f} ± {'unknown' if unknown else f'{error:7.4f}'}"


def number(value: float) -> float | None:
    """A float, None where it is not finite, as JSON needs it."""
    return float(value) if math.isfinite(value) else None
