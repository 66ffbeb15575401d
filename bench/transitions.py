"""Memory and time of the structured discretised Gaussian law beside the dense table of all Q̄_t, K = 256, T = 1000.

    python -m bench.transitions --write        # also into bench/results/transitions.md and .json

The dense table is what D3PM's code keeps: Q̄_t and Q_t for all t. It is tried in NumPy (float64, as the laws here are) and in
PyTorch (float32), with the same formulas: a gather of rows for x_t ~ q(x_t|x_0), and for p_θ(x_{t−1}|x_t) a gather of columns
times a product p̃·Q̄_{t−1}. Contestants take turns; medians.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from alphabar.core import discrete, rates
from alphabar.core.transitions import DiscretizedGaussian
from alphabar.kernels.cpu import threads  # holds BLAS to one thread, as everywhere here
from bench import report, timing

K, T = 256, 1000
RESULTS = Path(__file__).parent / "results"
SHAPE = (16, 32, 32, 3)


class Table:
    """All Q̄_t and Q_t as arrays (T + 1, K, K): NumPy or PyTorch."""

    def __init__(self, cumulative: Any, steps: Any) -> None:
        self.cumulative, self.steps = cumulative, steps

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return sum(a.nbytes for a in (self.cumulative, self.steps))


def table(beta: np.ndarray) -> Table:
    """The dense table in float64, by the definition of Q_t and one product for each t."""
    apart = np.abs(np.arange(K)[:, None] - np.arange(K))
    steps, cumulative = np.empty((T + 1, K, K)), np.empty((T + 1, K, K))
    steps[0] = cumulative[0] = np.eye(K)
    for t in range(1, T + 1):
        g = np.exp(-4 * np.arange(K) ** 2 / ((K - 1) ** 2 * beta[t]))
        Q = (g / (g[0] + 2 * g[1:].sum()))[apart]
        np.fill_diagonal(Q, 0)
        np.fill_diagonal(Q, 1 - Q.sum(axis=1))
        steps[t], cumulative[t] = Q, cumulative[t - 1] @ Q
    return Table(cumulative, steps)


def dense_sample(dense: Table, x0: np.ndarray, t: np.ndarray, u: np.ndarray) -> np.ndarray:
    """x_t by the inverse of the distribution function of each row of Q̄_t."""
    p = np.stack([dense.cumulative[k][x] for k, x in zip(t, x0, strict=True)])
    return (np.cumsum(p, axis=-1) < u[..., None]).sum(axis=-1)


def dense_reverse(dense: Table, logits: np.ndarray, x_t: np.ndarray, t: np.ndarray) -> np.ndarray:
    """p_θ(x_{t−1}|x_t) ∝ Q_t[·, x_t]·(p̃ Q̄_{t−1})."""
    p = np.exp(logits - logits.max(axis=-1, keepdims=True))
    w = np.stack([(a @ dense.cumulative[k - 1]) * dense.steps[k].T[x] for k, a, x in zip(t, p, x_t, strict=True)])
    return w / w.sum(axis=-1, keepdims=True)


def torch_sample(dense: Table, x0: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The same in PyTorch, drawn by torch.multinomial."""
    p = dense.cumulative[t.reshape(-1, *[1] * (x0.ndim - 1)), x0]
    return torch.multinomial(p.reshape(-1, K), 1).reshape(x0.shape)


def torch_reverse(dense: Table, logits: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The same in PyTorch: a batched product, and the columns as rows of the symmetric Q_t."""
    p = torch.softmax(logits.reshape(len(t), -1, K), dim=-1)
    w = torch.bmm(p, dense.cumulative[t - 1]) * dense.steps[t[:, None], x_t.reshape(len(t), -1)]
    return (w / w.sum(dim=-1, keepdim=True)).reshape(logits.shape)


def measure(rounds: int) -> dict[str, Any]:
    """Bytes, seconds to build, seconds of each operation, and the largest difference of the results."""
    torch.set_num_threads(threads.threads())
    timing.keep_freed_memory()
    beta = rates.linear(T)
    start = time.perf_counter()
    law = DiscretizedGaussian(K, beta)
    built = time.perf_counter()
    dense = table(beta)
    built_dense = time.perf_counter()
    in_torch = Table(*(torch.from_numpy(a.astype(np.float32)) for a in (dense.cumulative, dense.steps)))
    rng = np.random.default_rng(0)
    x0, t = rng.integers(0, K, SHAPE), rng.integers(1, T + 1, SHAPE[0])
    logits, u = 3 * rng.standard_normal((*SHAPE, K)).astype(np.float32), rng.random(SHAPE)
    x_t = discrete.q_sample(x0, t, law)
    t0, tt, tx, tl = torch.from_numpy(x0), torch.from_numpy(t), torch.from_numpy(x_t.astype(np.int64)), torch.from_numpy(logits)
    one = slice(0, 1)
    groups: dict[str, dict[str, Callable[[], object]]] = {
        "x_t ~ q(x_t|x_0), 16 times": {
            "structured": partial(discrete.q_sample, x0, t, law),
            "dense": partial(dense_sample, dense, x0, t, u),
            "torch": partial(torch_sample, in_torch, t0, tt),
        },
        "p(x_{t-1}|x_t), 16 times": {
            "structured": partial(discrete.reverse_from_x0, logits, x_t, t, law),
            "dense": partial(dense_reverse, dense, logits, x_t, t),
            "torch": partial(torch_reverse, in_torch, tl, tx, tt),
        },
        "p(x_{t-1}|x_t), one image": {
            "structured": partial(discrete.reverse_from_x0, logits[one], x_t[one], int(t[0]), law),
            "dense": partial(dense_reverse, dense, logits[one], x_t[one], t[one]),
            "torch": partial(torch_reverse, in_torch, tl[one], tx[one], tt[one]),
        },
    }
    ours = np.exp(discrete.reverse_from_x0(logits.astype(np.float64), x_t, t, law))
    return {
        "environment": report.environment(),
        "K": K,
        "T": T,
        "shape": SHAPE,
        "bytes": {"structured": law.nbytes, "dense": dense.nbytes, "torch": in_torch.nbytes},
        "seconds to build": {"structured": built - start, "dense": built_dense - built},
        "seconds": {name: {k: v.median for k, v in timing.interleaved(g, rounds).items()} for name, g in groups.items()},
        "largest difference of p(x_{t-1}|x_t)": float(np.abs(ours - dense_reverse(dense, logits, x_t, t)).max()),
    }


def lines(found: dict[str, Any]) -> list[str]:
    """The result as a Markdown table."""
    columns = ("structured", "dense", "torch")
    out = ["| | structured | dense, NumPy float64 | dense, PyTorch float32 |", "|---|---:|---:|---:|"]
    out.append("| memory, MB | " + " | ".join(f"{found['bytes'][c] / 1e6:,.0f}" for c in columns) + " |")
    build = found["seconds to build"]
    out.append(f"| build, s | {build['structured']:.2f} | {build['dense']:.2f} | – |")
    for name, seconds in found["seconds"].items():
        out.append(f"| {name}, ms | " + " | ".join(f"{1e3 * seconds[c]:.1f}" for c in columns) + " |")
    return out


def main() -> None:
    """Measure and print; with --write also write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="write bench/results/transitions.md and .json")
    options = parser.parse_args()
    found = measure(options.rounds)
    print(*lines(found), sep="\n")
    if options.write:
        e = found["environment"]
        head = [
            "# Discretised Gaussian transitions, K = 256, T = 1000",
            "",
            f"{e['date']}, {e['processor']}, {e['threads']} threads, commit {e['commit']}. Images {'×'.join(map(str, SHAPE))}.",
            "The dense tables hold Q̄_t and Q_t. Made by `python -m bench.transitions --write`.",
            "",
        ]
        (RESULTS / "transitions.md").write_text("\n".join([*head, *lines(found), ""]))
        (RESULTS / "transitions.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
