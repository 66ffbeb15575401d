"""`alphabar demo`: each demonstration at a reduced size shows what it claims, and draws it."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from alphabar.core import data as data_sets
from alphabar.core import schedules
from alphabar.core.mixture import GaussianMixture
from alphabar.tools import cli, demo, make_dataset
from alphabar.tools.demos import figures, forward, langevin, low_density, trajectories

Image = pytest.importorskip("PIL.Image")


def draw(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], *words: str) -> list[list[str]]:
    """Run a demonstration, check its picture, return its lines as cells."""
    pytest.importorskip("matplotlib")
    out = tmp_path / "picture.png"
    assert cli.main(["demo", name, "--out", str(out), *words]) == 0
    picture(out)
    assert [p.name for p in tmp_path.iterdir() if p.suffix != ".h5"] == ["picture.png"]
    lines = capsys.readouterr().out.splitlines()
    assert lines.pop() == f"wrote {out}"
    return [re.split(r"\s{2,}", line.strip()) for line in lines]


def picture(path: Path) -> None:
    """A PNG of the expected width, neither blank nor heavy."""
    with Image.open(path) as image:
        assert image.format == "PNG" and image.width == round(figures.WIDTH * figures.DPI) and 500 < image.height < 1000
        grey = np.asarray(image.convert("L"), np.float64)
    assert path.stat().st_size < 150_000
    assert 0.02 < (grey < 250).mean() < 0.8  # the paper is white
    halves = [half for axis in (0, 1) for half in np.array_split(grey, 2, axis)]
    assert all(half.std() > 10 for half in halves)  # something in each


def test_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in (*demo.DEMOS, "all"))


@pytest.mark.parametrize("name", demo.DEMOS)
def test_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", name, "--help"]) == 0
    out = capsys.readouterr().out
    assert f"usage: alphabar demo {name}" in out and "Eq: S" in out


# ------------------------------------------------------------------------------------------------- what they show


def test_discrete(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """S4-F1, S4-F2: what is masked is forgotten, the rest known: I = (1 − t/T)·H. All laws forget in the end."""
    rows = draw("discrete", tmp_path, capsys)
    header, cells = rows[0], np.array(rows[1:], float)
    column = {name: cells[:, i] for i, name in enumerate(header) if name != "kept"}
    kept = cells[:, 2::2]
    for kind in ("pixels", "letters"):
        masked = column[f"absorbing {kind}, bits"]
        np.testing.assert_allclose(masked, masked[0] * (1 - column["t"] / 1000), atol=1.1e-3)  # both are rounded to 1e-3
        np.testing.assert_allclose(column[f"uniform {kind}, bits"][0], masked[0], atol=1e-9)
    np.testing.assert_allclose(kept[:, 1], 1 - column["t"] / 1000, atol=6e-4)
    assert (kept[0] == 1).all() and (np.diff(kept, axis=0) <= 0).all()
    information = cells[:, 1::2]
    assert (np.diff(information, axis=0) <= 0).all() and (information[-1] < 0.02).all()


def test_low_density(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """S0-C4: more than 10 : 1 without noise, below 2 : 1 with noise of the modes' distance."""
    cells = draw("low-density", tmp_path, capsys, "--steps", "500", "--networks", "3", "--samples", "4000")
    rows = {row[0]: [float(v) for v in row[1:]] for row in cells[1:]}
    low, high, ratio, everywhere = rows["box, σ = 0.0"]
    assert ratio == pytest.approx(low / high, rel=0.01) and ratio > 50 and everywhere > 0.1
    low, high, ratio, everywhere = rows["box, σ = 14.1"]
    assert ratio == pytest.approx(low / high, rel=0.01) and ratio < 2 and everywhere < 0.01
    assert rows["own samples, σ = 0.0"][2] > 10


def test_tenths_of_the_density() -> None:
    law = GaussianMixture([1.0], [[0.0, 0.0]], 1.0)
    points = low_density.grid()
    log_prob = law.log_prob(points)
    error = (np.hypot(*points.T) > low_density.BOX).astype(np.float64)  # 1 outside a circle
    fit = low_density.Fit(0.0, law, log_prob, law.score(points), law.score(points), error, np.zeros(2))
    low, high = fit.tenths
    assert len(low) == len(high) == len(points) // 10 and log_prob[low].max() < log_prob[high].min()
    assert fit.low_high == (1.0, 0.0)
    assert fit.size == pytest.approx((points**2).sum(axis=1).mean())  # the score of N(0, I) is −x


def test_training_learns_the_score_of_a_normal_law() -> None:
    law = GaussianMixture([1.0], [[1.0, -2.0]], 4.0)
    samples = law.sample(4000, 3).astype(np.float32)
    x = law.sample(500, 4)
    for sigma in (0.0, 2.0):
        scale = np.sqrt(4 + sigma**2)
        with low_density.one_thread():
            net = low_density.train(samples, sigma, scale, 400, 0)
        error = net.predict((x / scale).astype(np.float32)) / scale - law.convolve(sigma).score(x)
        assert (error**2).mean() < 0.06 * (law.convolve(sigma).score(x) ** 2).mean()


def test_one_thread_is_undone() -> None:
    from alphabar.kernels.cpu.threads import threads

    before = threads()
    with pytest.raises(KeyError), low_density.one_thread():
        assert threads() == 1
        raise KeyError
    assert threads() == before


def test_langevin(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """S0-C5: plain near 0.5, the share of the start; annealed within 0.05 of 0.2."""
    cells = draw("langevin", tmp_path, capsys, "--particles", "1500", "--seed", "3")
    rows = {row[0]: row[1:] for row in cells[1:]}
    assert rows["density"] == ["0.2000", "1.000"]
    share, error = (float(v) for v in rows["exact samples"][1:3])
    assert error == pytest.approx(0.4 / 1500**0.5, rel=0.1) and abs(share - 0.2) < 4 * error
    steps, share, error, spread = (float(v) for v in rows["plain Langevin"])
    assert steps == 1000 and abs(share - 0.5) < 4 * error and share - 0.2 > 15 * error and abs(spread - 1) < 0.06
    steps, share, error, spread = (float(v) for v in rows["annealed Langevin"])
    assert steps == 1001 and abs(share - 0.2) < 0.05 and abs(spread - 1) < 0.06


def test_langevin_chains_start_alike_and_are_reproducible() -> None:
    first, second, other = (langevin.measure(200, 2, seed) for seed in (1, 1, 2))
    assert first[1].shares[0] == first[2].shares[0] and len(first[1].shares) == 21 and len(first[2].shares) == 22
    assert np.array_equal(first[2].particles, second[2].particles) and not np.array_equal(first[2].particles, other[2].particles)


def test_forward(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cells = draw("forward", tmp_path, capsys)
    steps = {row[0]: row[1:] for row in cells if re.fullmatch(r"\d+", row[0])}
    assert list(steps) == [str(t) for t in range(0, 1001, 125)] and steps["0"] == ["1", "inf", "1", "inf", "0", "inf"]
    for t in range(125, 1001, 125):
        linear, linear_snr, cosine, cosine_snr, sigma, ladder_snr = (float(v) for v in steps[str(t)])
        u = t / 1000
        assert linear_snr == pytest.approx(np.log(linear / (1 - linear)), abs=0.01)
        assert ladder_snr == pytest.approx(-2 * np.log(sigma), abs=0.01)
        if t < 1000:  # there β is cut at 0.999
            start, now = (np.cos((v + 0.008) / 1.008 * np.pi / 2) ** 2 for v in (0, u))
            assert cosine == pytest.approx(now / start, rel=1e-3)
        assert cosine_snr == pytest.approx(np.log(cosine / (1 - cosine)), abs=0.01)
    ends = {row[0]: [float(v) for v in row[1:]] for row in cells[-3:]}
    for mean, std, gap in ends.values():
        assert abs(mean) < 0.03 and abs(std - 1) < 0.02 and 0 < gap < 1e-3  # 512 images of 64 pixels: errors 0.006 and 0.004


def test_forward_images() -> None:
    strips = forward.measure("digits", 7, 5)
    clean = data_sets.to_unit(data_sets.load("digits").images[7])
    eps = strips[0].images[-1]  # ᾱ_T is 4e-5
    for strip in strips:
        a = np.sqrt(forward.share(strip.levels)[strip.times])[:, None, None, None]
        assert np.array_equal(strip.images[0], clean)
        np.testing.assert_allclose(strip.images, a * clean + np.sqrt(1 - a**2) * eps, atol=0.02)
    assert isinstance(strips[2].levels, schedules.Ladder)


def test_forward_of_coloured_images_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for k in range(2):
        pixels = np.random.default_rng(k).integers(0, 256, (12, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{k}.png")
    assert make_dataset.main([str(folder), "--out", str(tmp_path / "two.h5"), "--quiet"]) == 0
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    capsys.readouterr()
    draw("forward", tmp_path, capsys, "--data", str(tmp_path / "two.h5"), "--image", "1")
    assert cli.main(["demo", "forward", "--data", str(tmp_path / "two.h5"), "--image", "2"]) == 2
    assert "--image must be below 2" in capsys.readouterr().err


@pytest.mark.parametrize("process", trajectories.PROCESSES)
def test_trajectories(process: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cells = draw("trajectories", tmp_path, capsys, "--process", process, "--steps", "300", "--samples", "1500")
    rows = {row[0]: row[1:] for row in cells[1:7]}
    gap, n = trajectories.prior_gap(trajectories.PROCESSES[process]), 1500
    for way in ("forward", "reverse"):
        mean, std, share = (float(v) for v in next(v for k, v in rows.items() if k.endswith(f"{way}: exact")))
        assert abs(mean) < 1e-4
        if way == "reverse":
            assert share == pytest.approx(0.3 + 0.7 * 0.0051, abs=1e-3)  # Φ(−0.9/0.35) = 0.0051 of the strong mode
        for kind in ("SDE", "ODE"):
            found = next(v for k, v in rows.items() if k.endswith(f"{way}: {kind}"))
            assert found[4] == str(n)
            m, sd, below, distance = (float(v) for v in found[:4])
            assert abs(m - mean) < 4 * std / n**0.5 and abs(sd / std - 1) < 4 / (2 * n) ** 0.5
            assert abs(below - share) < 4 * (share * (1 - share) / n) ** 0.5 + gap
            assert distance < 1.95 / n**0.5 + gap + 0.003  # Kolmogorov's 1 in 1000, the prior, the steps


def test_trajectories_in_one_dimension_keep_their_quantiles_and_never_cross() -> None:
    s = trajectories.PROCESSES["vp"]
    for steps, forward_error, reverse_error in ((200, 0.01, 0.004), (800, 0.0025, 0.0005)):
        found = trajectories.measure("vp", steps, 100, 0)
        assert found.forward.quantile_error < forward_error and found.reverse.quantile_error < reverse_error
    for paths in (found.forward, found.reverse):
        assert (np.diff(paths.ode, axis=1) > 0).all() and not (np.diff(paths.sde, axis=1) > 0).all()
        u = [trajectories.cdf(trajectories.law(s, t), x) for t, x in zip(paths.times[::100], paths.ode[::100], strict=True)]
        np.testing.assert_allclose(u, np.broadcast_to(trajectories.ODE_QUANTILES, np.shape(u)), atol=0.005)
    assert np.array_equal(found.forward.times, found.reverse.times[::-1])


def test_quantiles_invert_the_distribution() -> None:
    law = trajectories.law(trajectories.PROCESSES["ve"], 0.7)
    u = np.array([1e-6, 0.2, 0.5, 0.99])
    np.testing.assert_allclose(trajectories.cdf(law, trajectories.quantiles(law, u)), u, rtol=1e-9)
    x = np.linspace(-40, 40, 8001)
    density = np.exp(law.log_prob(x[:, None]))
    np.testing.assert_allclose(np.gradient(trajectories.cdf(law, x), x), density, atol=1e-4)


# ---------------------------------------------------------------------------------------------------- how they run


def test_all(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every demonstration is run with its defaults, into a folder that is made."""
    pytest.importorskip("matplotlib")
    seen = {}

    def stand_in(name):
        def run(given):
            seen[name] = given
            page = figures.figure(name, 4)
            page.subplots().plot([0, 1])
            return [f"{name} ran"], page

        return run

    for name, (module, _) in demo.DEMOS.items():
        monkeypatch.setattr(module, "run", stand_in(name))
    folder = tmp_path / "made" / "here"
    assert cli.main(["demo", "all", "--out", str(folder), "--seed", "9"]) == 0
    assert {p.name for p in folder.iterdir()} == {f"demo_{name}.png" for name in demo.DEMOS}
    assert all(given.seed == 9 for given in seen.values())
    assert seen["langevin"].particles == 4000 and seen["trajectories"].process == "vp"
    assert "trajectories ran" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["langevins"], "invalid choice: 'langevins'"),
        (["langevin", "--process", "vp"], "--process"),
        (["langevin", "--particles", "1"], "must be in 100..1000000"),
        (["langevin", "--out", "picture.jpg"], "must end in .png"),
        (["langevin", "--out", "/no/such/folder/picture.png"], "there is no folder /no/such/folder"),
        (["trajectories", "--process", "vpp"], "invalid choice: 'vpp'"),
        (["forward", "--data", "no.h5"], "no.h5: No such file"),
        (["forward", "--image", "100000"], "--image must be below"),
        (["all", "--out", __file__], "--out"),
    ],
)
def test_mistakes(words: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert cli.main(["demo", *words]) == 2
    err = capsys.readouterr().err
    assert err.startswith("alphabar demo: error: ") and err.count("\n") == 1 and reason in err


def test_a_folder_that_may_not_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "picture.png").mkdir()
    assert cli.main(["demo", "forward", "--out", str(tmp_path / "picture.png")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "picture.png: is not a regular file" in err and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", ["forward", "all"])
def test_without_matplotlib(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert cli.main(["demo", name, "--out", str(tmp_path / "new.png")]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and "pip install 'alphabar[plots]'" in err and not list(tmp_path.iterdir())
    assert cli.main(["demo"]) == 0  # the list needs none


def test_the_list_loads_nothing_heavy() -> None:
    code = "import sys; from alphabar.tools import cli; cli.main(['demo']); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/").stdout.split()
    assert not {"matplotlib", "numba", "PIL", "h5py", "scipy"} & set(loaded)
