"""What a kernel's machine code does in one pass through its main loop: read from the disassembly, without running it."""

import re
from dataclasses import dataclass

_LINE = re.compile(r"/\*([0-9a-f]+)\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]+)([^;]*);|^(\.L_\w+):", re.M)
_TARGET = re.compile(r"`\((\.L_\w+)\)")


@dataclass(frozen=True)
class Instruction:
    """One instruction: its operation with all suffixes, the label that it may branch to, whether the next one never follows."""

    operation: str
    target: str | None
    ends: bool

    @property
    def name(self) -> str:
        return self.operation.partition(".")[0]

    @property
    def bits(self) -> int:
        """Of each lane's access to memory."""
        parts = self.operation.split(".")
        return next((b for b in (128, 64) if str(b) in parts), 32)

    @property
    def moved(self) -> int:
        """Bytes of global memory."""
        return self.bits // 8 if self.name in ("LDG", "STG") else 0


@dataclass(frozen=True)
class Pass:
    """One thread's way once through a loop (or through a kernel without one): the shortest that makes the most global accesses.

    instructions: all of it. moved: bytes loaded from and stored to global memory. special: reciprocals, roots, exponentials,
    logarithms, sines. loop: whether it is a loop. within: whether other loops lie within, whose work counts once.
    """

    instructions: int
    moved: int
    special: int
    loop: bool
    within: bool


def code(body: str) -> tuple[list[Instruction], dict[str, int]]:
    """(instructions, label -> index of the instruction after it) of one kernel's disassembly."""
    found: list[Instruction] = []
    labels: dict[str, int] = {}
    for _, guard, operation, rest, label in _LINE.findall(body):
        if label:
            labels[label] = len(found)
            continue
        target = _TARGET.search(rest) if operation.startswith("BRA") else None
        always = operation in ("BRA", "BRA.U", "JMP", "BRX", "RET", "EXIT") or operation.startswith("RET.")
        ends = always and not guard and (target is None or rest.strip().startswith("`"))  # no predicate before or in it
        found.append(Instruction(operation, target[1] if target else None, ends))
    return found, labels


def main_pass(body: str) -> Pass:
    """The pass through the loop that moves most, the smallest where several do; through the kernel where no loop moves any."""
    instructions, labels = code(body)
    last = max((i for i, x in enumerate(instructions) if x.name == "EXIT"), default=len(instructions) - 1)
    loops = {
        (labels[x.target], i) for i, x in enumerate(instructions) if x.target in labels and labels[x.target] < i and i <= last
    }

    def way(first: int, end: int, loop: bool) -> Pass | None:
        found = _way(instructions, labels, first, end)
        within = any(first <= a and b <= end and (a, b) != (first, end) for a, b in loops)
        return None if found is None else Pass(*found, loop, within)

    ways = [way(first, end, True) for first, end in sorted(loops)]
    moving = [w for w in ways if w is not None and w.moved]
    if moving:
        return max(moving, key=lambda w: (w.moved, -w.instructions))
    ends = [i for i, x in enumerate(instructions) if x.name == "EXIT"]
    whole = [w for w in (way(0, end, False) for end in ends) if w is not None]
    return max(whole, key=lambda w: (w.moved, w.instructions))


def _way(instructions: list[Instruction], labels: dict[str, int], first: int, end: int) -> tuple[int, int, int] | None:
    """(instructions, bytes, special functions) from ``first`` to ``end`` by forward branches; None where there is no way."""
    best: dict[int, tuple[int, int, int]] = {first: (0, 0, 0)}  # (bytes, -instructions, special functions) before it
    for i in range(first, end + 1):
        if i not in best:
            continue
        x = instructions[i]
        moved, taken, special = best[i]
        after = (moved + x.moved, taken - 1, special + (x.name == "MUFU"))
        if i == end:
            return -after[1], after[0], after[2]
        following = [] if x.ends else [i + 1]
        if x.target in labels and labels[x.target] > i:
            following.append(labels[x.target])
        for j in following:
            if j not in best or best[j][:2] < after[:2]:
                best[j] = after
    return None
