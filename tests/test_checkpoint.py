"""Checkpoints: whole or refused, whatever happens to the disk, the process or the file."""

import errno
import hashlib
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import textwrap
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from alphabar.nets import checkpoint
from alphabar.nets.checkpoint import CheckpointError
from alphabar.tools.files import replacing


def arrays(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "weights/conv.weight": rng.standard_normal((3, 3, 2, 4)).astype(np.float32),
        "weights/conv.bias": rng.standard_normal(4),
        "state/count": np.array(7),
        "state/bytes": rng.integers(0, 256, 50, np.uint8),
    }


META = {"kind": "test", "step": 3, "config": {"lr": 1e-3, "name": 'ε, \x00 and "quotes"'}, "list": [1, None, True]}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return checkpoint.save(tmp_path / "step_00000003.h5", arrays(), META)


def same(path: Path, seed: int = 0) -> bool:
    loaded, _ = checkpoint.load(path)
    want = arrays(seed)
    return loaded.keys() == want.keys() and all(
        np.array_equal(loaded[k], a) and loaded[k].dtype == a.dtype for k, a in want.items()
    )


# ----------------------------------------------------------------------------------------------------------- there and back


def test_round_trip(saved: Path) -> None:
    assert same(saved)
    assert checkpoint.load(saved)[1] == {**META, "version": checkpoint.VERSION}


def test_same_state_same_bytes(saved: Path) -> None:
    assert checkpoint.image(arrays(), META) == saved.read_bytes()
    assert checkpoint.image(arrays(1), META) != saved.read_bytes()


def test_h5py_opens_the_file_as_it_is(saved: Path) -> None:
    with h5py.File(saved) as f:
        np.testing.assert_array_equal(f["weights/conv.weight"][:], arrays()["weights/conv.weight"])


def test_arrays_that_are_not_contiguous(tmp_path: Path) -> None:
    a = np.arange(24.0).reshape(4, 6)
    path = checkpoint.save(tmp_path / "x.h5", {"g/t": a.T, "g/s": a[::2, ::3], "g/big": a.astype(">f8")}, {})
    loaded, _ = checkpoint.load(path)
    np.testing.assert_array_equal(loaded["g/t"], a.T)
    np.testing.assert_array_equal(loaded["g/s"], a[::2, ::3])
    np.testing.assert_array_equal(loaded["g/big"], a)
    assert all(v.dtype == np.float64 and v.dtype.isnative for v in loaded.values())


@pytest.mark.parametrize("name", ["plain", "a/b/c", "/a", "a/", "./a", "a/.", "meta"])
def test_names_that_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="group/name"):
        checkpoint.save(tmp_path / "x.h5", {name: np.ones(2)}, {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [np.array(["a"]), np.array([None]), np.ones(2, complex), np.ones(2, bool)])
def test_dtypes_that_are_refused(tmp_path: Path, value: np.ndarray) -> None:
    with pytest.raises(TypeError, match="float or integer"):
        checkpoint.save(tmp_path / "x.h5", {"a/b": value}, {})


def test_nan_is_data_in_arrays_but_not_in_the_meta_data(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path / "x.h5", {"a/b": np.array([np.nan, np.inf])}, {})
    assert np.isnan(checkpoint.load(path)[0]["a/b"][0])
    with pytest.raises(ValueError):
        checkpoint.save(path, {"a/b": np.ones(1)}, {"loss": float("nan")})
    assert np.isnan(checkpoint.load(path)[0]["a/b"][0])


# --------------------------------------------------------------------------------------------------------------- corruption


def test_no_corruption_goes_unseen(saved: Path, tmp_path: Path) -> None:
    """1,000 byte flips, truncations, zeroed blocks and junk tails: every one is refused."""
    whole, dice, bad = saved.read_bytes(), random.Random(0), tmp_path / "bad.h5"
    for trial in range(1000):
        at, length, data = dice.randrange(len(whole)), dice.choice((1, 8, 512)), bytearray(whole)
        kind = trial % 4
        if kind == 0:
            for k in range(at, min(at + dice.choice((1, 8)), len(data))):
                data[k] ^= 1 << dice.randrange(8)
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            data[at : at + length] = bytes(len(data[at : at + length]))
            if data == whole:
                data[at] ^= 255
        else:
            data += dice.randbytes(length)
        bad.write_bytes(data)
        with pytest.raises(CheckpointError) as e:
            checkpoint.load(bad)
        assert str(bad) in str(e.value)


def test_every_bit_of_the_trailer_counts(saved: Path, tmp_path: Path) -> None:
    whole, bad = saved.read_bytes(), tmp_path / "bad.h5"
    for bit in range(8 * checkpoint.TRAILER):
        data = bytearray(whole)
        data[-1 - bit // 8] ^= 1 << bit % 8
        bad.write_bytes(data)
        with pytest.raises(CheckpointError):
            checkpoint.load(bad)


def test_foreign_files(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "short").write_bytes(checkpoint.MAGIC)
    (tmp_path / "png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    (tmp_path / "pickle").write_bytes(pickle.dumps(arrays()))
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    np.savez(tmp_path / "npz", a=np.ones(2))
    with zipfile.ZipFile(tmp_path / "zip", "w") as z:
        z.writestr("a", "b")
    with h5py.File(tmp_path / "hdf5", "w") as f:
        f["images"] = np.ones(3)
    for path in [*tmp_path.iterdir(), tmp_path / "missing"]:
        with pytest.raises(CheckpointError) as e:
            checkpoint.load(path)
        assert str(path) in str(e.value)


# ----------------------------------------------------------------------------------- hostile files, sealed with a right trailer


def sealed(path: Path, build: Callable[[h5py.File], None]) -> Path:
    with h5py.File(path, "w") as f:
        f["meta"] = np.frombuffer(b'{"version": 1, "kind": "test"}', np.uint8)
        build(f)
    body = path.read_bytes()
    path.write_bytes(body + hashlib.sha256(body).digest() + checkpoint.MAGIC)
    return path


def many_links(f: h5py.File) -> None:
    f["a/x"] = np.ones(100_000)
    for k in range(50):
        f[f"a/y{k}"] = f["a/x"]


def meta_of(text: bytes) -> Callable[[h5py.File], None]:
    def build(f: h5py.File) -> None:
        del f["meta"]
        if text:
            f["meta"] = np.frombuffer(text, np.uint8)

    return build


def virtual(f: h5py.File) -> None:
    layout = h5py.VirtualLayout((4,), np.float32)
    layout[:] = h5py.VirtualSource("other.h5", "a", (4,))
    f.create_group("a").create_virtual_dataset("x", layout)


def cycle(f: h5py.File) -> None:
    f.create_group("a")["again"] = f["/"]


HOSTILE: dict[str, tuple[Callable[[h5py.File], Any], str]] = {
    "external link": (lambda f: f.__setitem__("a/x", h5py.ExternalLink("/etc/passwd", "/x")), "link"),
    "external group": (lambda f: f.__setitem__("a", h5py.ExternalLink("other.h5", "/x")), "link"),
    "soft link": (lambda f: f.__setitem__("a/x", h5py.SoftLink("/meta")), "link"),
    "external storage": (lambda f: f.create_dataset("a/x", (4,), "f4", external=[("/etc/passwd", 0, 16)]), "contiguous"),
    "virtual": (virtual, "contiguous"),
    "chunked": (
        lambda f: f.create_dataset("a/x", data=np.zeros((1024, 1024)), chunks=(1024, 1024), compression="gzip"),
        "contiguous",
    ),
    "shape bomb": (lambda f: f.create_dataset("a/x", (1 << 40,), "f4"), "claims"),
    "many links": (many_links, "claims"),
    "strings": (lambda f: f.create_dataset("a/x", data=["text"]), "dtype"),
    "compound": (lambda f: f.create_dataset("a/x", data=np.zeros(3, [("p", "f4")])), "dtype"),
    "references": (lambda f: f.create_dataset("a/x", (2,), h5py.ref_dtype), "dtype"),
    "null": (lambda f: f.__setitem__("a/x", h5py.Empty("f4")), "a/x"),
    "too deep": (lambda f: f.__setitem__("a/b/x", np.ones(2)), "not an array"),
    "cycle": (cycle, "not an array"),
    "at the root": (lambda f: f.__setitem__("x", np.ones(2)), "outside"),
    "no meta": (meta_of(b""), "no meta data"),
    "meta no json": (meta_of(b"{'a'"), "JSON"),
    "meta deep": (meta_of(b"[" * 100_000), "JSON"),
    "meta a list": (meta_of(b"[1]"), "version"),
    "version": (meta_of(b'{"version": 99}'), "version 99"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused(tmp_path: Path, name: str) -> None:
    build, word = HOSTILE[name]
    with pytest.raises(CheckpointError) as e:
        checkpoint.load(sealed(tmp_path / "bad.h5", build))
    assert word in e.value.reason, e.value.reason


def test_the_sealing_of_these_tests_is_right(tmp_path: Path) -> None:
    path = sealed(tmp_path / "good.h5", lambda f: f.__setitem__("a/x", np.ones(2)))
    assert checkpoint.load(path)[0]["a/x"].sum() == 2


# -------------------------------------------------------------------------------------------------------------- disk and crash


def test_synced_before_the_rename_and_the_directory_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    fsync, replace = os.fsync, os.replace

    def watch_fsync(fd: int) -> None:
        calls.append("directory" if os.path.isdir(f"/proc/self/fd/{fd}") else f"file of {os.fstat(fd).st_size}")
        fsync(fd)

    def watch_replace(a: Any, b: Any) -> None:
        calls.append("rename")
        replace(a, b)

    monkeypatch.setattr(os, "fsync", watch_fsync)
    monkeypatch.setattr(os, "replace", watch_replace)
    path = checkpoint.save(tmp_path / "x.h5", arrays(), META)
    assert calls == [f"file of {path.stat().st_size}", "rename", "directory"]


@pytest.mark.parametrize("call", ["fsync", "replace", "open"])
def test_an_error_of_the_disk_leaves_the_old_file(saved: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if call == "open":
        monkeypatch.setattr("builtins.open", fail)
    else:
        monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(saved, arrays(1), META)
    monkeypatch.undo()
    assert same(saved) and list(saved.parent.iterdir()) == [saved]


def test_a_full_disk_at_any_byte(saved: Path) -> None:
    """With the file size limited by the system: a clean error, the old file untouched, the process alive."""
    code = textwrap.dedent("""
        import resource, signal, sys, pathlib, random
        import numpy as np
        from alphabar.nets import checkpoint
        path = pathlib.Path(sys.argv[1])
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        whole, dice = path.read_bytes(), random.Random(1)
        big = {"a/b": np.random.default_rng(0).standard_normal(20_000)}
        size = len(checkpoint.image(big, {}))
        for _ in range(20):
            resource.setrlimit(resource.RLIMIT_FSIZE, (dice.randrange(size), resource.RLIM_INFINITY))
            try:
                checkpoint.save(path, big, {})
            except OSError as e:
                assert e.strerror, e
            else:
                raise SystemExit("no error")
            assert path.read_bytes() == whole and list(path.parent.iterdir()) == [path]
        print("alive")
    """)
    out = subprocess.run([sys.executable, "-c", code, saved], capture_output=True, text=True)
    assert out.returncode == 0 and out.stdout.strip() == "alive", out.stderr


def test_kill_at_any_instant_leaves_a_whole_file(tmp_path: Path) -> None:
    """A process that saves without end is killed: the newest checkpoint it told of, or a newer one, is whole."""
    code = textwrap.dedent("""
        import sys
        import numpy as np
        from alphabar.nets import checkpoint
        step = int(sys.argv[2])
        while True:
            step += 1
            checkpoint.save(checkpoint.step_path(sys.argv[1], step), {"a/b": np.full(100_000, step)}, {"step": step})
            checkpoint.prune(sys.argv[1], 2)
            print(step, flush=True)
    """)
    dice, told = random.Random(2), 0
    for _ in range(6):
        with subprocess.Popen([sys.executable, "-c", code, tmp_path, str(told)], stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            told = int(child.stdout.readline())
            time.sleep(dice.random() * 0.1)
            child.send_signal(signal.SIGKILL)
            told = max([told, *map(int, child.stdout.read().split()[:-1])])
        _, loaded, meta = checkpoint.newest(tmp_path)
        assert meta["step"] >= told and (loaded["a/b"] == meta["step"]).all() and len(loaded["a/b"]) == 100_000
        told = meta["step"]
        checkpoint.sweep(tmp_path)
        assert len(checkpoint.listing(tmp_path)) == len(list(tmp_path.iterdir())) <= 3


def test_memory_does_not_grow(tmp_path: Path) -> None:
    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    big = {"a/b": np.ones(250_000)}
    for k in range(90):
        checkpoint.load(checkpoint.save(tmp_path / "x.h5", big, {}))
        if k == 30:
            before = peak()
    assert peak() - before < 20_000  # KiB; a leak of one image would be 120,000


# ---------------------------------------------------------------------------------------------------- a directory of checkpoints


def test_the_newest_valid_one_is_found(tmp_path: Path) -> None:
    for step in (5, 100, 20):
        checkpoint.save(checkpoint.step_path(tmp_path, step), {"a/b": np.array(step)}, {"step": step})
    (tmp_path / "step_x.h5").touch()
    (tmp_path / "notes.txt").touch()
    assert [s for s, _ in checkpoint.listing(tmp_path)] == [100, 20, 5]
    assert checkpoint.newest(tmp_path)[2]["step"] == 100
    for step, left in ((100, 20), (20, 5)):
        path = checkpoint.step_path(tmp_path, step)
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.warns(UserWarning, match="skipped a bad checkpoint"):
            assert checkpoint.newest(tmp_path)[2]["step"] == left
    checkpoint.step_path(tmp_path, 5).write_bytes(b"")
    with pytest.warns(UserWarning), pytest.raises(CheckpointError, match="no valid checkpoint"):
        checkpoint.newest(tmp_path)


def test_prune_keeps_the_newest(tmp_path: Path) -> None:
    for step in range(1, 6):
        checkpoint.save(checkpoint.step_path(tmp_path, step), {"a/b": np.ones(1)}, {})
    checkpoint.prune(tmp_path, 2)
    assert [s for s, _ in checkpoint.listing(tmp_path)] == [5, 4]
    with pytest.raises(ValueError, match="keep"):
        checkpoint.prune(tmp_path, 0)


def test_sweep_takes_temporary_files_only(saved: Path) -> None:
    stale = saved.with_name(f".{saved.name}.123.tmp")
    stale.touch()
    assert checkpoint.sweep(saved.parent) == [stale]
    assert list(saved.parent.iterdir()) == [saved]


def test_a_device_or_a_folder_is_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, tmp_path):
        with pytest.raises(OSError, match="not a regular file"):
            checkpoint.save(path, {"a": np.zeros(3)}, {})
        with pytest.raises(OSError, match="not a regular file"), replacing(path) as temporary:
            temporary.write_text("a")
    assert pipe.is_fifo() and list(tmp_path.iterdir()) == [pipe]
