"""Peak memory of the steps of one network, and their time where malloc is left as it is: each contestant in a process of its own.

python -m bench.network_memory FOLDER BATCH STEP ENGINE     # as the benchmarks call it: STEP train or sample,
                                                            # ENGINE alphabar, contiguous_format or channels_last
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]
STEPS = 4  # the first one warms up


def _status(key: str) -> int | None:
    """Bytes that Linux gives for this process; None elsewhere."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), None)


def measure(folder: str, batch: str, step: str, engine: str) -> dict[str, Any]:
    """Bytes at the peak (of the whole process, and above what the imports took) and seconds of a step, in this process."""
    from bench import peers

    if engine == "alphabar":
        from alphabar.kernels import cpu  # noqa: F401
        from bench.steps import Ours
    else:
        import diffusers.models.unets.unet_2d  # noqa: F401
        import torch

        from alphabar.kernels.cpu import threads
        from bench.steps import Theirs

        torch.set_num_threads(threads.threads())
    imported = _status("VmRSS") or 0
    example = peers.example(Path(folder), int(batch))
    contestant: Any = Ours(Path(folder), example) if engine == "alphabar" else Theirs(Path(folder), example, engine)
    seconds = []
    for _ in range(STEPS):
        start = time.perf_counter()
        getattr(contestant, step)()
        seconds.append(time.perf_counter() - start)
    peak = _status("VmHWM")  # of this program alone, unlike ru_maxrss, which starts from the parent's
    return {"peak": peak, "above": None if peak is None else peak - imported, "seconds": median(seconds[1:])}


def measured(folder: Path, batch: int, step: str, engine: str) -> dict[str, Any]:
    """:func:`measure` in a new process."""
    command = [sys.executable, "-m", "bench.network_memory", str(folder), str(batch), step, engine]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    print(json.dumps(measure(*sys.argv[1:])))
