"""The time of the sections: each may use what the earlier ones have left, but not what the later ones are sure to need."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Section:
    """One section and the seconds that are kept for it."""

    name: str
    kept: float
    words: str


SECTIONS = (  # the order in which they run; what only a GPU can tell, and soonest, comes first
    Section("build", 20, "compile every kernel file with the machine's own compiler"),
    Section("noise", 10, "golden hashes of the normals"),
    Section("kernels", 70, "each kernel against its definition in float64, small cases, aligned and not"),
    Section("networks", 60, "networks, training, samplers, elementwise functions, checkpoints beside the CPU"),
    Section("sanitizer", 60, "NVIDIA's compute-sanitizer over the small cases"),
    Section("large", 45, "each kernel against its definition, cases of 256 MiB"),
    Section("speed", 200, "bandwidth and rate beside a copy, PyTorch eager and torch.compile"),
    Section("train", 35, "a short training by the public program"),
)
WHOLE = (  # of --train
    Section("steps", 220, "whole training steps beside PyTorch eager and torch.compile"),
    Section("trajectories", 130, "50 steps of DDIM beside them"),
    Section("runs", 150, "trainings by the public program: losses beside the CPU's, sheets of samples"),
)
NAMES, WHOLE_NAMES = (tuple(s.name for s in sections) for sections in (SECTIONS, WHOLE))
SECONDS = float(sum(s.kept for s in SECTIONS))


def limits(names: Sequence[str], seconds: float) -> dict[str, float]:
    """The second, counted from the start, at which each of the chosen sections must be over.

    Where ``seconds`` is less than what is kept for them together, every part shrinks alike.
    """
    chosen = [s for s in (*SECTIONS, *WHOLE) if s.name in names]
    scale = min(1.0, seconds / sum(s.kept for s in chosen)) if chosen else 1.0
    later = [sum(s.kept for s in chosen[i + 1 :]) for i in range(len(chosen))]
    return {s.name: seconds - scale * rest for s, rest in zip(chosen, later, strict=True)}
