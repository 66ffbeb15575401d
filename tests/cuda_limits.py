"""The limits of three GPUs: how many warps of a kernel fit on a multiprocessor, and what its main loop waits for."""

from dataclasses import dataclass

from tests.cuda_sass import Pass


@dataclass(frozen=True)
class Limits:
    """Of one multiprocessor (CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; data sheets).

    warps, blocks: resident at most. registers: in all. shared: bytes for all blocks, of which each takes ``reserved`` more than
    it asks for. bytes_per_cycle: its part of the memory's bandwidth at the highest clock of the named device.
    """

    device: str
    warps: int
    blocks: int
    registers: int
    shared: int
    bytes_per_cycle: float
    reserved: int = 1024


LIMITS = {
    "sm_80": Limits("A100 80GB SXM", 64, 32, 65536, 164 << 10, 2039e9 / (108 * 1.41e9)),
    "sm_90": Limits("H100 SXM", 64, 32, 65536, 228 << 10, 3352e9 / (132 * 1.98e9)),
    "sm_100": Limits("B200", 64, 32, 65536, 228 << 10, 8000e9 / (148 * 1.965e9)),
}
PARTS = 4  # of a multiprocessor, each with a quarter of its registers; each issues an instruction of one warp a cycle
REGISTERS_AT_ONCE = 256  # of a warp
SHARED_AT_ONCE = 128  # bytes
SPECIAL_LANES = 16  # results of the special functions a cycle


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def resident_warps(architecture: str, threads: int, registers: int, shared: int) -> tuple[int, str]:
    """(warps on a multiprocessor, what keeps more away) for blocks of so many threads and bytes of shared memory."""
    limits = LIMITS[architecture]
    warps = -(-threads // 32)
    by_part = limits.registers // PARTS // _up(32 * max(registers, 1), REGISTERS_AT_ONCE)
    blocks = {
        "threads": limits.warps // warps,
        "blocks": limits.blocks,
        "registers": by_part * PARTS // warps,
        "shared memory": limits.shared // _up(shared + limits.reserved, SHARED_AT_ONCE),
    }
    least = min(blocks, key=lambda k: blocks[k])
    return warps * blocks[least], least


def cycles(architecture: str, work: Pass) -> dict[str, float]:
    """Cycles that a warp's pass keeps the issue slots, the special functions and its part of the memory busy."""
    return {
        "memory": 32 * work.moved / LIMITS[architecture].bytes_per_cycle,
        "issue": work.instructions / PARTS,
        "special functions": 32 * work.special / SPECIAL_LANES,
    }


def bound(architecture: str, work: Pass) -> tuple[str, float | None]:
    """(what the loop waits for at best, cycles of the other units over those of the memory: below 1 memory is the limit).

    ("inner loops", None) where loops within it hold work that is not counted.
    """
    if work.within:
        return "inner loops", None
    found = cycles(architecture, work)
    most = max(found, key=lambda k: found[k])
    others = max(v for k, v in found.items() if k != "memory")
    return most, others / found["memory"] if found["memory"] else None
