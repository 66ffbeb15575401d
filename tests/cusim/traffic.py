"""What each source line moves: sectors per request of global memory, passes through the banks of shared memory."""

from collections.abc import Iterable

from .launching import Host, Traffic
from .probes import Project


def measure(project: Project) -> list[Traffic]:
    """The accesses of all probes, those of one line and width together."""
    rows: list[Traffic] = []
    for probe in project.probes:
        device = Host("check", traffic=True, folder=project.folder)
        probe.call(device)
        rows += device.traffic
    return added(rows)


def added(rows: Iterable[Traffic]) -> list[Traffic]:
    """One row for each line, memory, kind and width, by file and line."""
    found: dict[tuple, Traffic] = {}
    for row in rows:
        key = row[:5]
        sums = (a + b for a, b in zip(found[key][5:], row[5:], strict=True)) if key in found else row[5:]
        found[key] = Traffic(*key, *sums)
    return sorted(found.values(), key=lambda r: (r.line.split(":")[0], int(r.line.split(":")[-1]), r[1:5]))


def table(rows: Iterable[Traffic]) -> str:
    """As text, a row for each access."""
    text = [
        f"{'line':22} {'in':16} {'access':14} {'bytes':>5} {'requests':>9} {'sectors/request':>15} {'useful':>7} {'conflict':>8}"
    ]
    for r in rows:
        what = f"{r.line:22} {r.via:16} {r.memory + ' ' + r.kind:14} {r.bytes:5} {r.requests:9}"
        moved = f"{r.sectors / r.requests:15.2f} {r.share:7.0%}" if r.memory == "global" else f"{'':15} {'':7} {r.conflict:8.2f}"
        text.append(f"{what} {moved}")
    return "\n".join(text)
