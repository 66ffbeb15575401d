"""Runs the mutants of a project: which of them do its probes notice?

All mutants of a file lie in one library (mutants.py). Each is switched on in a process of its own, with a time limit, and tried
on the probes that pass its place: in the three orders of threads, then under the checker. What no test can notice is listed with
its reason.
"""

import ctypes
import faulthandler
import hashlib
import json
import os
import resource
import shutil
import signal
import tempfile
import time
import tomllib
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from alphabar.kernels.compile import source

from .building import ORDERS, cache_folder, complaints, prepare
from .launching import Host, Module
from .mutants import Mutant, changed_text, find, instrument
from .probes import Probe, Project

EXPLAINED = Path(__file__).parent / "equivalent.toml"
CHECKED = 0.3  # s that the probes of a mutant take as they are: so many of them, the shortest, are run under the checker too
CHECKED_IN_TEXT = 1.0  # likewise of mutants that are changed in the text, whose cases are not narrowed down
SAVED = 50  # verdicts are written down after so many
LEAST_TIME, TIMES_SLOWER = 4.0, 20.0  # s; a mutant may take that many times as long as the kernel
STAGES = (*(("mutants", order) for order in ORDERS), ("mutants-check", "forward"))
Key = tuple[str, str, str, str, int]


@dataclass
class Verdict:
    """How a mutant ended. ``by``: forward, reverse, random or check, crash, time; "" for a survivor, "unreached", "invalid"."""

    by: str
    probe: str = ""
    why: str = ""
    same_bits: bool = False  # a survivor that changes no bit of what any launch wrote
    tried: str = ""  # a hash of the names of the probes that a survivor was tried on

    @property
    def killed(self) -> bool:
        return self.by not in ("", "unreached", "invalid")


def explained(path: Path = EXPLAINED) -> dict[Key, str]:
    """The mutants that no test can notice, and why."""
    if not path.exists():
        return {}
    found = {}
    for group in tomllib.loads(path.read_text(encoding="utf-8"))["because"]:
        for file, text, before, after, nth in group["mutants"]:
            found[file, text, before, after, nth] = group["reason"]
    return found


class _Recorder(Host):
    """A device that remembers a hash of all that its launches left behind, and the files they came from."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.hash = hashlib.sha256()
        self.files: set[str] = set()

    def launch(self, file: str, name: str, grid: tuple[int, ...], block: tuple[int, ...], args: tuple, shared: int = 0) -> None:
        self.files.add(f"{file}.cu")
        super().launch(file, name, grid, block, args, shared)
        for a in args:
            if isinstance(a, np.ndarray):
                self.hash.update(a.tobytes())


@dataclass
class _Base:
    """What a probe does when nothing is changed."""

    seconds: float
    digest: str
    files: set[str]
    passed: frozenset[int]


class Run:
    """The mutants of some files of a project, built and ready to be tried one after another."""

    def __init__(self, project: Project, files: Iterable[str] = (), log: Callable[[str], None] = lambda _: None) -> None:
        self.project, self.log = project, log
        self.texts = {p.name: p.read_text(encoding="utf-8") for p in sorted(project.folder.glob("*.cu*"))}
        chosen = set(files) or set(self.texts)
        if not chosen <= set(self.texts):
            raise ValueError(f"no {', '.join(sorted(chosen - set(self.texts)))} in {project.folder}")
        self.mutants = [m for name, text in self.texts.items() if name in chosen for m in find(name, text)]
        self.number = {m.key: i + 1 for i, m in enumerate(self.mutants)}
        self.includes = {p.name: source(p) for p in project.files}
        self.built_files = [p.name for p in project.files if self.holds(p.name, chosen)]
        self.folder = self._instrumented()
        self.modules: dict[tuple[str, str], Module] = {}
        self._seen: set[str] = set()
        self.base = self._baseline()

    def holds(self, cu: str, names: set[str]) -> bool:
        """Whether a kernel file is one of these, or includes one."""
        return cu in names or any(f'#line 1 "{n}"' in self.includes[cu] for n in names)

    def _instrumented(self) -> Path:
        """A folder with every mutant in the text that the compiler takes there; the rest is to be changed in the text."""
        left = {m.key for m in self.mutants if m.edits}
        while True:
            text = "".join(map(repr, sorted(left))) + "".join(self.texts.values())
            folder = cache_folder() / f"mutants-{hashlib.sha256(text.encode()).hexdigest()[:20]}"
            if not folder.exists():
                self._write(folder, left)
            wrong = {place for name in self.built_files for place in complaints(folder / name, "mutants")}
            bad = {m.key for m in self.mutants if m.key in left and self._on(m, wrong)}
            if not wrong:
                prepare([folder / n for n in self.built_files], ("mutants", "mutants-check"))
                self.in_text = [m for m in self.mutants if m.key not in left]
                return folder
            if not bad:
                raise RuntimeError(f"the kernel files do not compile: {sorted(wrong)}")
            self.log(f"{len(bad)} mutants are changed in the text")
            left -= bad

    def _on(self, m: Mutant, places: set[tuple[str, int]]) -> bool:
        lines = range(m.line, m.line + self.texts[m.file].count("\n", m.begin, m.end) + 1)
        return any(name == m.file and number in lines for name, number in places)

    def _write(self, folder: Path, keys: set[Key]) -> None:
        draft = Path(tempfile.mkdtemp(dir=folder.parent))
        for name, text in self.texts.items():
            inside = [(self.number[m.key], m) for m in self.mutants if m.file == name and m.key in keys]
            (draft / name).write_text(instrument(text, inside), encoding="utf-8")
        draft.rename(folder)

    def _module(self, path: Path, mode: str, folder: Path | None = None) -> Module:
        """A file with its mutants, or as it is where it has none; ``folder``: where the files with mutants lie."""
        key = path.name, mode
        if key not in self.modules:
            changed = folder is not None and path.name in self.built_files
            plain = "check" if mode.endswith("check") else "fast"
            place = folder / path.name if changed and folder else path
            self.modules[key] = Module(place, mode if changed and folder == self.folder else plain)
        return self.modules[key]

    def _device(self, mode: str, order: str, folder: Path | None = None) -> _Recorder:
        return _Recorder(
            mode=mode, order=order, folder=self.project.folder, modules=lambda p, m: self._module(p, m, folder or self.folder)
        )

    def _switch(self, number: int) -> None:
        for built in self.modules.values():
            if hasattr(built.library, "cusim_mutant"):
                built.library.cusim_mutant(number)

    def _baseline(self) -> dict[str, _Base]:
        """Every probe as it is. Raises where a probe fails."""
        size = 1 << 14
        found = {}
        for mode in ("mutants", "mutants-check"):
            for name in self.built_files:
                self._module(self.project.folder / name, mode, self.folder)
        places = []
        for name in self.built_files:
            function = self.modules[name, "mutants"].library.cusim_passed
            function.restype = ctypes.POINTER(ctypes.c_ubyte * size)
            places.append(np.frombuffer(function().contents, np.uint8))
        for probe in self.project.probes:
            for p in places:
                p[:] = 0
            device = self._device("mutants", "forward")
            probe.call(device)
            passed = frozenset(int(i) for p in places for i in np.nonzero(p)[0])
            start = time.process_time()
            if device.files & set(self.built_files):  # again: the first time it also made what it compares with
                probe.call(self._device("mutants", "forward"))
            seconds = time.process_time() - start
            found[probe.name] = _Base(seconds, device.hash.hexdigest(), device.files, passed)
        return found

    # ------------------------------------------------------------------------------------------------------------- one mutant

    def reached(self, m: Mutant) -> list[Probe]:
        """The probes that pass a mutant's place, or launch from a file that holds it."""
        if m in self.in_text:
            holders = {n for n in self.built_files if self.holds(n, {m.file})}
            return [p for p in self.project.probes if self.base[p.name].files & holders]
        return [p for p in self.project.probes if self.number[m.key] in self.base[p.name].passed]

    def try_one(self, m: Mutant, hint: str = "") -> Verdict:
        """Run the probes that reach a mutant, in a process of its own."""
        number = self.number[m.key]
        in_text = m in self.in_text
        reached = self.reached(m)
        if not reached:
            return Verdict("unreached")
        reached.sort(key=lambda p: (p.name != hint, self.base[p.name].seconds))
        folder = None
        try:
            if in_text:
                folder = Path(tempfile.mkdtemp(dir=cache_folder()))
                for name, text in self.texts.items():
                    (folder / name).write_text(changed_text(text, m) if name == m.file else text, encoding="utf-8")
                try:
                    prepare([folder / n for n in self.built_files if self.holds(n, {m.file})], ("fast",), 1)
                except RuntimeError:
                    return Verdict("invalid", why="does not compile")
            seconds = LEAST_TIME + TIMES_SLOWER * sum(self.base[p.name].seconds for p in reached)
            return _in_process(lambda: self._child(number, reached, folder), seconds)
        finally:
            if folder:
                shutil.rmtree(folder)

    def _child(self, number: int, reached: list[Probe], folder: Path | None) -> Verdict:
        if folder:
            self.modules = {}
            self.built_files = [n for n in self.built_files if (folder / n).exists()]
        else:
            self._switch(number)
        same = True
        by_time = sorted(reached, key=lambda p: self.base[p.name].seconds)
        spent = np.cumsum([self.base[p.name].seconds for p in by_time])
        checked = by_time[: max(1, int((spent < (CHECKED_IN_TEXT if folder else CHECKED)).sum()))]
        for mode, order in STAGES:
            for probe in checked if mode.endswith("check") else reached:
                device = self._device(mode, order, folder)
                try:
                    probe.call(device)
                except Exception as e:
                    text = " ".join(str(e).split())
                    return Verdict("check" if mode.endswith("check") else order, probe.name, f"{type(e).__name__}: {text[:160]}")
                if (mode, order) == STAGES[0]:
                    same = same and device.hash.hexdigest() == self.base[probe.name].digest
        return Verdict("", same_bits=same, tried=_names(reached))


def _names(probes: Iterable[Probe]) -> str:
    return hashlib.sha256("".join(sorted(p.name for p in probes)).encode()).hexdigest()[:16]


def _in_process(work: Callable[[], Verdict], seconds: float) -> Verdict:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(read)
            faulthandler.disable()  # a crash is an answer here
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1), os.dup2(null, 2)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1, int(seconds) + 2))
            with open(write, "w") as out:
                out.write(json.dumps(asdict(work())))
        finally:
            os._exit(0)
    os.close(write)
    signal.signal(signal.SIGALRM, lambda *_: os.kill(child, signal.SIGKILL))
    signal.setitimer(signal.ITIMER_REAL, 3 * seconds)
    with open(read) as given:
        text = given.read()
    signal.setitimer(signal.ITIMER_REAL, 0)
    _, status = os.waitpid(child, 0)
    if text:
        return Verdict(**json.loads(text))
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL):
        return Verdict("time", why=f"ran for more than {seconds:.0f} s")
    name = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else f"status {status}"
    return Verdict("crash", why=name)


# ------------------------------------------------------------------------------------------------------------------- many mutants


class _Known:
    """Verdicts of earlier runs: by mutant and the text of what it is compiled into; and by mutant alone, as hints."""

    def __init__(self, path: Path) -> None:
        self.path, self.new = path, {}
        self.all = self._read()

    def _read(self) -> dict[str, dict]:
        try:
            return json.loads(self.path.read_text())
        except (OSError, ValueError):
            return {}

    def save(self) -> None:
        draft = self.path.with_suffix(f".{os.getpid()}")
        draft.write_text(json.dumps(self._read() | self.new))
        draft.replace(self.path)


def sample(mutants: list[Mutant], count: int) -> list[Mutant]:
    """So many of them, spread by their names: the same ones for as long as the lines stay."""
    return sorted(mutants, key=lambda m: hashlib.sha256(repr(m.key).encode()).digest())[:count]


def judge(
    run: Run,
    mutants: list[Mutant] | None = None,
    fresh: bool = False,
    seconds: float = float("inf"),
    workers: int = 2,
    settled: Container[Key] = (),
) -> dict[Mutant, Verdict]:
    """The verdict of each mutant, as far as the time goes.

    What is known of an unchanged text is not run again, but for survivors of other probes and those that are not ``settled``;
    ``fresh`` runs everything.
    """
    names = {p.name for p in run.project.probes}
    known = _Known(cache_folder() / "verdicts.json")
    verdicts, keys, left = {}, {}, []
    for m in run.mutants if mutants is None else mutants:
        held = "".join(run.includes[n] for n in run.built_files if run.holds(n, {m.file}))
        keys[m] = hashlib.sha256((repr(m.key) + held).encode()).hexdigest()[:24]
        old = Verdict(**known.all[keys[m]]) if keys[m] in known.all and not fresh else None
        lasts = old and (old.by in ("invalid", "crash", "time") or old.probe in names)
        if old and not old.killed:
            lasts = old.by == "invalid" or (m.key in settled and old.tried == _names(run.reached(m)))
        if old and lasts:
            verdicts[m] = old
        else:
            left.append((m, known.all.get(repr(m.key), {}).get("probe", "")))
    run.log(f"{len(verdicts)} known, {len(left)} to run")
    for i, (m, v) in enumerate(_shared(run, left, time.monotonic() + seconds, workers), 1):
        verdicts[m] = v
        known.new[keys[m]] = known.new[repr(m.key)] = asdict(v)
        if i % SAVED == 0:
            known.save()
            run.log(f"{i} of {len(left)}")
    known.save()
    return verdicts


def _shared(run: Run, work: list[tuple[Mutant, str]], end: float, workers: int) -> Iterator[tuple[Mutant, Verdict]]:
    """Verdicts as they come, from several processes that each take every so many-th mutant."""
    read, write = os.pipe()
    children = []
    for k in range(workers):
        child = os.fork()
        if child == 0:
            try:
                os.close(read)
                for i in range(k, len(work), workers):
                    if time.monotonic() > end:
                        break
                    line = json.dumps([i, asdict(run.try_one(*work[i]))]) + "\n"
                    os.write(write, line.encode())  # shorter than a pipe's buffer: not mixed with another's
            finally:
                os._exit(0)
        children.append(child)
    os.close(write)
    with open(read) as lines:
        for line in lines:
            i, verdict = json.loads(line)
            yield work[i][0], Verdict(**verdict)
    for child in children:
        os.waitpid(child, 0)


def table(verdicts: dict[Mutant, Verdict], reasons: dict[Key, str]) -> str:
    """The outcome as Markdown: by file, and by kind of change."""
    rows = []
    for title, group in (("file", lambda m: m.file), ("change", lambda m: m.kind)):
        counts: dict[str, Counter] = defaultdict(Counter)
        for m, v in verdicts.items():
            if v.by == "invalid":
                continue
            how = v.by if v.killed else "explained" if m.key in reasons else "open"
            for row in (group(m), "all"):
                counts[row]["made"] += 1
                counts[row][how] += 1
                counts[row]["killed"] += v.killed
        columns = ("made", "killed", *ORDERS, "check", "crash", "time", "explained", "open")
        rows += [f"| {title} | {' | '.join(columns)} |", "|---" + "|---:" * len(columns) + "|"]
        for name in (*sorted(counts.keys() - {"all"}), "all"):
            rows.append(f"| {name} | {' | '.join(str(counts[name][c]) for c in columns)} |")
        rows.append("")
    return "\n".join(rows)


def survivors(verdicts: dict[Mutant, Verdict], reasons: dict[Key, str]) -> list[tuple[Mutant, Verdict]]:
    """What was neither noticed nor explained."""
    return [(m, v) for m, v in verdicts.items() if not v.killed and v.by != "invalid" and m.key not in reasons]


def stale(verdicts: dict[Mutant, Verdict], reasons: dict[Key, str]) -> list[Key]:
    """Explanations of mutants that are noticed after all, or are no more. ``verdicts`` are those of whole files."""
    files = {m.file for m in verdicts}
    open_ = {m.key for m, v in verdicts.items() if not v.killed}
    return [key for key in reasons if key[0] in files and key not in open_]


def report(verdicts: dict[Mutant, Verdict], reasons: dict[Key, str]) -> str:
    """The page that is committed: what was made and how it ended, and the reasons of what no test can notice."""
    made = sum(v.by != "invalid" for v in verdicts.values())
    groups: dict[str, int] = Counter(reasons[m.key] for m, v in verdicts.items() if not v.killed and m.key in reasons)
    lines = [
        "# Mutants of the device code",
        "",
        f"`python -m tests.cusim mutate --out tests/cusim/mutants.md` made this page: {made} mutants. A mutant is killed by a",
        "wrong result in one of three orders of the threads (tried in this order), by the checker, by a crash or by running",
        "for too long. What no test can notice is listed with its reason in `equivalent.toml`.",
        "",
        table(verdicts, reasons),
        "| explained | reason |",
        "|---:|---|",
        *(f"| {count} | {reason} |" for reason, count in sorted(groups.items(), key=lambda g: -g[1])),
        "",
    ]
    return "\n".join(lines)
