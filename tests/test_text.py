"""Text as integers: what is read and how it is folded, in which order the windows come, and what is refused."""

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest

from alphabar.core import text
from alphabar.core.data import DataError
from alphabar.core.text import ALPHABET, Text


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def a_text(n: int, length: int) -> Text:
    """Tokens that tell their own place: 0, 1, …, n − 1 in an alphabet of so many letters."""
    return Text(np.arange(n, dtype=np.uint8), length, alphabet="".join(chr(0x100 + i) for i in range(n)))


# ------------------------------------------------------------------------------------------------------------ what is read


def test_the_built_in_text() -> None:
    train, test, everything = (text.load("kjv", s, 64) for s in ("train", "test", "all"))
    assert train.decode(train.tokens[:57]) == "in the beginning god created the heaven and the earth and"
    assert test.decode(test.tokens[-20:]) == "be with you all amen"
    np.testing.assert_array_equal(np.concatenate([train.tokens, test.tokens]), everything.tokens)
    assert len(train.tokens) == len(everything.tokens) * 9 // 10 and len(everything.tokens) == 4_013_872
    assert everything.alphabet == ALPHABET and everything.states == 27 and everything.shape == (64,) and everything.name == "kjv"
    assert np.bincount(everything.tokens).min() > 0
    spaces = everything.tokens == 26
    assert not (spaces[1:] & spaces[:-1]).any() and not spaces[0] and not spaces[-1]
    letters = bytes(ALPHABET.encode()[i] for i in range(27))
    content = np.frombuffer(letters, np.uint8)[everything.tokens].tobytes()
    assert hashlib.sha256(content).hexdigest() == "59804d9b66e3d9c09855bee87790cba8c14385c45dcceaffc9f3c5c0e5685f18"


def test_folding() -> None:
    assert text.fold("Ça va?  Élève nº 3;\n\tnaïve — ZÜRICH") == "ca va eleve no naive zurich"
    for s, want in (("", ""), ("7", " "), ("a1b", "a b"), ("İI", "ii"), ("\ufeffx", " x"), ("ﬁ", "fi"), ("λόγος end", " end")):
        assert text.fold(s) == want, s


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 1 << 20])
def test_a_file_is_folded_the_same_in_pieces_of_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(text, "CHUNK", chunk)
    content = "  Ångström, 😀 e\u0301té\r\n\r\n«Où?» 12 fin.\n"
    loaded = text.load(written(tmp_path / "a.txt", content), "all", 4)
    assert loaded.decode(loaded.tokens) == "angstrom ete ou fin" and loaded.name == "a"
    with pytest.raises(DataError, match="byte 4:"):
        text.load(written(tmp_path / "b.txt", "abé".encode() + b"\xff rest"), "all", 1)


def test_letters_and_back() -> None:
    t = text.load("kjv", "test", 8)
    assert t.decode(t.encode("Let there be LIGHT")) == "let there be light"
    assert t.decode(t.encode("the ____ of_god")) == "the ____ of_god"
    assert t.encode("_ ").tolist() == [27, 26] and t.encode("").shape == (0,)
    assert t.decode(np.array([], np.int64)) == ""
    binary = Text(np.array([0, 1, 1], np.uint8), 2, alphabet="01")
    assert binary.decode(binary.tokens) == "011" and binary.encode("10").tolist() == [1, 0]
    with pytest.raises(ValueError, match="x"):
        binary.encode("x1")
    for bad in ([28], [-1]):
        with pytest.raises(ValueError, match=r"0\.\.27"):
            t.decode(np.array(bad))
    for odd in ([0.5], [[1]]):
        with pytest.raises(TypeError, match="integers"):
            t.decode(np.array(odd))
    with pytest.raises(TypeError, match="str"):
        t.encode(b"a")  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------- the order of windows


def test_a_window_is_what_stands_in_the_text() -> None:
    t = text.load("kjv", "train", 33)
    tokens, labels, starts = t.batch(5, 7, seed=3)
    assert tokens.shape == (7, 33) and tokens.dtype == np.int32 and labels is None
    for row, start in zip(tokens, starts, strict=True):
        np.testing.assert_array_equal(row, t.tokens[start : start + 33])


@pytest.mark.parametrize(("n", "length"), [(100, 7), (98, 7), (97, 7), (10, 10), (19, 10), (20, 10), (21, 10), (13, 1)])
def test_an_epoch_takes_no_letter_twice_and_leaves_only_the_ends(n: int, length: int) -> None:
    t, offsets = a_text(n, length), set()
    for epoch in range(40):
        starts = np.concatenate([t.batch(epoch * len(t) + i, 1)[2] for i in range(len(t))])
        taken = (np.sort(starts)[:, None] + np.arange(length)).reshape(-1)
        np.testing.assert_array_equal(taken, np.arange(taken[0], taken[0] + len(taken)))
        assert taken[0] >= 0 and taken[-1] < n and n - len(taken) < 2 * length
        offsets.add(int(taken[0]))
    assert n - len(t) * length >= length - 1 or n < 2 * length - 1  # every phase of the windows can be drawn
    assert len(offsets) > 1 if n > len(t) * length else offsets == {0}


def test_the_order_depends_on_seed_and_step_alone() -> None:
    t = a_text(200, 9)
    long = np.concatenate([t.batch(0, 30, seed=2)[2], t.batch(1, 30, seed=2)[2]])
    short = np.concatenate([t.batch(i, 6, seed=2)[2] for i in range(10)])
    np.testing.assert_array_equal(long, short)
    assert not np.array_equal(t.batch(0, 30, seed=2)[2], t.batch(0, 30, seed=3)[2])
    assert not np.array_equal(np.diff(np.sort(long[: len(t)])), np.diff(long[: len(t)]))  # shuffled


def test_windows_from_the_first_letter_on() -> None:
    assert a_text(10, 4).windows.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_the_hash_is_of_letters_and_alphabet() -> None:
    one, two = a_text(9, 4), a_text(9, 3)
    assert one.sha256 == two.sha256 and len(one.sha256) == 64
    changed = one.tokens.copy()
    changed[3] = 5
    assert Text(changed, 4, alphabet=one.alphabet).sha256 != one.sha256
    assert Text(one.tokens, 4, alphabet=one.alphabet[::-1]).sha256 != one.sha256


# ------------------------------------------------------------------------------------------------------------ what is refused


def test_odd_files_are_refused_with_their_name_and_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fifo = tmp_path / "pipe.txt"
    os.mkfifo(fifo)
    cases = [
        (tmp_path / "missing.txt", "No such file"),
        (tmp_path / "missing", "built-in texts are: kjv"),
        (tmp_path, "not a regular file"),
        (fifo, "not a regular file"),
        (Path("a\0b.txt"), "null"),
        (written(tmp_path / "empty.txt", ""), "0 letters"),
        (written(tmp_path / "blank.txt", " \n" * 900), "0 letters"),
        (written(tmp_path / "short.txt", "too short"), "9 letters"),
        (written(tmp_path / "digits.txt", "0123456789" * 9), "0 letters"),
        (written(tmp_path / "binary.txt", b"abc\0" * 99), "NUL at byte 3"),
        (written(tmp_path / "latin.txt", "très bien ".encode("latin-1") * 9), "not UTF-8 text .byte 2"),
        (written(tmp_path / "utf16.txt", ("words " * 9).encode("utf-16")), "not UTF-8|NUL"),
        (written(tmp_path / "cut.txt", ("é" * 99).encode()[:-1]), "not UTF-8 text .byte 196"),
        (tmp_path / "loop", "[Ll]oop|symbolic|levels"),
    ]
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path, why in cases:
        with pytest.raises(DataError, match=why) as e:
            text.load(path, "all", 16)
        assert str(path) in str(e.value)
    monkeypatch.setattr(text, "MAX_BYTES", 50)
    with pytest.raises(DataError, match="108 bytes, at most 50"):
        text.load(written(tmp_path / "huge.txt", "some words " * 9 + "and a few"), "all", 16)


def test_a_split_too_short_for_one_window(tmp_path: Path) -> None:
    path = written(tmp_path / "a.txt", "x" * 100)
    assert len(text.load(path, "test", 10)) == 1
    with pytest.raises(DataError, match="test split has 10 letters, too few for a window of 11"):
        text.load(path, "test", 11)


def test_arguments_out_of_range() -> None:
    tokens = np.zeros(9, np.uint8)
    for wrong in (lambda: text.load("kjv", "valid", 8), lambda: text.load("kjv", "train", 0), lambda: Text(tokens, 10)):
        with pytest.raises(ValueError, match=r"split|length"):
            wrong()
    with pytest.raises(TypeError, match="length"):
        text.load("kjv", "train", 8.0)  # type: ignore[arg-type]
    for odd in (tokens.astype(int), tokens[None], [1, 2]):
        with pytest.raises(TypeError, match="tokens"):
            Text(odd, 1)  # type: ignore[arg-type]
    for alphabet in ("", "aa", "a_"):
        with pytest.raises(ValueError, match="alphabet"):
            Text(tokens, 2, alphabet=alphabet)
    with pytest.raises(ValueError, match=r"tokens must be in 0\.\.1, not 2"):
        Text(tokens + np.uint8(2), 2, alphabet="ab")
    t = Text(tokens, 2)
    for step, size in ((-1, 2), (0, 0)):
        with pytest.raises(ValueError, match=r"step|size"):
            t.batch(step, size)
    with pytest.raises(ValueError, match="flip"):
        t.batch(0, 2, flip=True)
