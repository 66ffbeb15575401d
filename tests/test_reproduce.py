"""`alphabar reproduce`: each part against closed forms and published numbers, and the report that it writes."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest

from alphabar import kernels
from alphabar.core import analytic as core_analytic
from alphabar.core import guidance as core_guidance
from alphabar.core import metrics, paper_tables, samplers, schedules, tables
from alphabar.core.mixture import GaussianMixture
from alphabar.tools import cli, reproduce, train
from alphabar.tools.reproductions import analytic, consistency, frechet, guidance, interpolation, reconstruction, report, timing
from alphabar.tools.reproductions.judge import Judge, diversity
from alphabar.tools.reproductions.network import Network
from alphabar.tools.reproductions.report import Check, Section, Settings

RNG = np.random.default_rng(0)
S = schedules.linear()

# Fréchet distances of Gaussian data, 3072 dimensions, power-law spectrum, uniform grid, S = 10, 20, 50, 100, 1000, computed
# elsewhere to the digits given
FRECHET = {
    "eta=0.0": (39.2, 12.6, 2.38, 0.652, 0.0136),
    "eta=0.2": (39.9, 12.9, 2.48, 0.686, 0.0133),
    "eta=0.5": (43.5, 14.7, 3.08, 0.906, 0.0157),
    "eta=1.0": (69.2, 26.7, 7.01, 2.41, 0.048),
    "sigma_hat": (115.3, 21.9, 3.10, 0.743, 0.0056),
}


# --------------------------------------------------------------------------------------------------------------- closed forms


def test_frechet_table_to_every_digit_given() -> None:
    found, worst = frechet.measure()
    assert worst < 1e-12
    for row, values in FRECHET.items():
        for value, wanted in zip(found[row], values, strict=True):
            digits = len(repr(wanted).partition(".")[2])
            assert round(value, digits) == wanted, (row, value, wanted)
    assert frechet.best_without_noise(found) and frechet.falls_with_steps(found) and frechet.hat_worst_then_best(found)
    assert frechet.hat_worst(found) == [10]  # in the paper at 20, 50 and 100 too
    for table in paper_tables.DDIM_FID.values():
        assert frechet.best_without_noise(table) and frechet.hat_worst_then_best(table) and frechet.falls_with_steps(table)
        assert frechet.hat_worst(table) == [10, 20, 50, 100]


def test_the_checks_of_the_table_can_fail() -> None:
    table = {name: list(row) for name, row in paper_tables.DDIM_FID["CIFAR-10"].items()}
    for row, column, value, test in (
        ("eta=0.2", 1, 6.0, frechet.best_without_noise),
        ("sigma_hat", 4, 4.05, frechet.hat_worst_then_best),
        ("eta=0.5", 4, 5.0, frechet.falls_with_steps),
    ):
        assert not test({**table, row: [value if k == column else v for k, v in enumerate(table[row])]})


@pytest.mark.parametrize("options", [{"eta": 0.0}, {"eta": 0.5}, {"eta": 1.0}, {"sigma": "hat"}])
def test_variances_by_the_rows_are_those_of_samples(options: dict) -> None:
    """The law by the rows against sampling itself, and the distance against that of matrices in another basis."""
    data = np.array([2.0, 0.3, 0.01])
    turn, _ = np.linalg.qr(RNG.normal(size=(3, 3)))
    law = GaussianMixture([1.0], np.zeros((1, 3)), (turn * data @ turn.T)[None])
    table = tables.ddim(S, 10, **options)
    x = samplers.sample(law.model(S), table, samplers.prior((20000, 3), 5, dtype=np.float64), 6) @ turn
    v = frechet.variances(table, data)
    np.testing.assert_allclose(x.var(axis=0) / v, 1, atol=4 * np.sqrt(2 / 20000))
    np.testing.assert_allclose(frechet.by_formula(S, 10, data, **options), v, rtol=1e-12)
    zero = np.zeros(3)
    distance = metrics.frechet_distance(zero, turn * v @ turn.T, zero, turn * data @ turn.T)
    assert frechet.distance(v, data) == pytest.approx(distance, rel=1e-9)


def test_spectrum_and_tables_refused() -> None:
    data = frechet.spectrum()
    assert data.mean() == pytest.approx(0.25) and data[1] / data[0] == pytest.approx(2**-1.2) and len(data) == 3072
    for table in (tables.adams_bashforth(S, 10), tables.ddim(S, 10, prediction="x0")):
        with pytest.raises(ValueError, match="eps and keep no history"):
            frechet.variances(table, data)


def test_reconstruction() -> None:
    """Against numbers computed elsewhere from samples of the mixture, and against a sum over samples here."""
    elsewhere = {"current": (0.037, 0.011, 0.0024, 0.00066), "target": (0.0128, 0.0041, 0.00084, 0.00023)}
    steps = (10, 20, 50, 100)
    for label, wanted in elsewhere.items():
        errors = reconstruction.exact(steps, label)
        np.testing.assert_allclose(errors, wanted, rtol=0.1)
        each = reconstruction.slopes(steps, errors)
        assert np.all((each > -2.1) & (each < -1)) and reconstruction.fitted(steps, errors) == pytest.approx(each.mean(), abs=0.1)
    law = reconstruction.mixture()
    x = law.sample(4000, 1)
    up, down = tables.ddim_encode(S, 10), tables.ddim(S, 10)
    error = (samplers.sample(law.model(S), down, samplers.sample(law.model(S), up, x)) - x)[:, 0] ** 2
    assert error.mean() == pytest.approx(reconstruction.exact((10,), "target")[0], abs=4 * error.std() / 4000**0.5)
    assert reconstruction.fitted((10, 100), [1.0, 0.01]) == pytest.approx(-2)


def test_time_counts_calls_and_takes_the_shortest() -> None:
    now, calls = 0.0, 0

    def model(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        nonlocal now, calls
        calls += 1
        now += 0.5 if calls < 40 else 0.25  # a busy machine at first
        return x

    seconds, counts = timing.measure(model, S, np.zeros((2, 3)), (5, 10, 20), 2, clock=lambda: now)
    assert counts == [5, 10, 20] and calls == 5 + 2 * 35
    np.testing.assert_allclose(seconds, [1.25, 2.5, 5.0])
    line = metrics.fit_linear_cost((5, 10, 20), seconds)
    assert line.slope == pytest.approx(0.25) and line.r2 == pytest.approx(1)


def test_consistency() -> None:
    """Distances fall as 1/S; modes agree as often as the sampled 98.9 % at S = 10 and 99.85 % at S = 50."""
    apart, alike = consistency.exact((10, 20, 50, 100))
    assert consistency.slope(apart) == pytest.approx(-1, abs=0.1)
    assert alike[10] == pytest.approx(0.989, abs=0.01) and alike[50] > 0.998 and alike[100] >= alike[10]
    nodes, p = consistency.starts()
    assert p.sum() == pytest.approx(1) and p @ nodes[:, 0] ** 2 == pytest.approx(1, abs=1e-4)


def test_interpolation() -> None:
    ranges, found = interpolation.exact((11, 41), 0)
    assert ranges["great circle"] == pytest.approx((1, 1), abs=1e-12) and 0.5 < ranges["straight line"][0] < 0.8
    assert found["η = 0"][11] / found["η = 0"][41] > 2.5 and found["η = 1"][11] / found["η = 1"][41] < 1.2
    line = np.linspace(0, 1, 5)[:, None, None] * np.ones((1, 2, 3))
    assert interpolation.strides(line) == pytest.approx(0.25)
    line[2] += 1
    assert interpolation.strides(line) == pytest.approx(1.25)


def test_guided_laws() -> None:
    """w = 0 is the class itself, w = −1 both of them; densities are normed; the tilt against its closed form at w = 1."""
    for w, mean, deviation in ((0.0, 1 - S.signal[-1], 1.0), (-1.0, 0.0, 2**0.5)):  # x_T lacks the mean √ᾱ_T
        law = guidance.guided_ode(w)
        assert law.p @ law.x == pytest.approx(mean, abs=1e-4) and law.deviation == pytest.approx(deviation, abs=2e-3)
    for law in (guidance.guided_ode(2.0), guidance.tilted(2.0)):
        assert np.trapezoid(law.density, law.x) == pytest.approx(1, abs=1e-4)
        assert np.trapezoid(law.density * guidance.posterior(law.x), law.x) == pytest.approx(law.fidelity, abs=1e-4)
    trade = [(law.fidelity, law.deviation) for law in map(guidance.guided_ode, (-0.5, 0.0, 1.0, 4.0))]
    assert np.all(np.diff(trade, axis=0) * (1, -1) > 0)
    x = np.linspace(-12, 12, 24001)
    p = np.exp(-((x - 1) ** 2) / 2) / (1 + np.exp(-2 * x))
    mean, variance = (p @ x) / p.sum(), (p @ x**2) / p.sum() - ((p @ x) / p.sum()) ** 2
    law = guidance.tilted(1.0)
    assert law.p @ law.x == pytest.approx(mean, abs=1e-5) and law.deviation**2 == pytest.approx(variance, abs=1e-5)


def test_the_guided_ode_against_samples() -> None:
    """By classifier_free on one network with labels, and by drawing x_T."""
    own, both = (GaussianMixture(np.ones(len(m)), np.array(m)[:, None], 1.0).model(S) for m in ([1.0], [-1.0, 1.0]))
    n = 4000

    def predict(x: np.ndarray, t: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.where(y[:, None] == 1, own(x, t), both(x, t))

    model = core_guidance.classifier_free(predict, np.ones(n, np.int64), 2.0, 0)
    x = samplers.sample(model, tables.heun(S, 60), samplers.prior((n, 1), 3, dtype=np.float64))[:, 0]
    law = guidance.guided_ode(2.0)
    assert x.mean() == pytest.approx(law.p @ law.x, abs=4 * law.deviation / n**0.5)
    assert x.std() == pytest.approx(law.deviation, rel=4 / (2 * n) ** 0.5)


def test_analytic() -> None:
    """The numbers computed elsewhere; the optimum is the optimum; the best path costs least among many."""
    five = analytic.deviations()
    assert five["β̃"] == pytest.approx(0.0102, abs=5e-5) and five["β"] == pytest.approx(0.564, abs=5e-4)
    assert five["optimal, last step too"] == pytest.approx(0.05, abs=1e-4) and 0.045 < five["optimal"] < 0.05
    data = frechet.spectrum(50)
    gamma = analytic.exact_gamma(S, data)
    n = S.noise[gamma.t.astype(int)]
    np.testing.assert_allclose(1 - n**2 * gamma.gamma, gamma.residual, atol=1e-12)
    best = core_analytic.analytic_table(tables.ddpm(S, 10), gamma)
    least = analytic.divergence(best, gamma)
    assert least * np.log(2) == pytest.approx(core_analytic.path_cost(S, gamma, best.t[::-1]), rel=1e-9)
    for variance in ("posterior", "beta"):
        assert analytic.divergence(tables.ddpm(S, 10, variance), gamma) > least
    found = analytic.distances((5, 20), 50)
    assert all(o < min(a, b) for o, a, b in zip(found["optimal"], found["β̃"], found["β"], strict=True))
    _, cost, path = analytic.paths((6,), 50)[6]
    assert path[0] == 1 and path[-1] == 1000 and len(path) == 6
    others = [np.r_[1, np.sort(RNG.choice(np.arange(2, 1000), 4, replace=False)), 1000] for _ in range(8)]
    assert all(core_analytic.path_cost(S, gamma, p) >= cost for p in others)


def test_judge_and_diversity(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = np.repeat([0, 1], 20)
    images = np.clip((2 * labels - 1)[:, None, None, None] * 0.5 + RNG.normal(0, 0.1, (40, 2, 2, 1)), -1, 1)
    assert np.array_equal(Judge(images, labels).read(images), labels)
    monkeypatch.setitem(sys.modules, "sklearn.svm", None)
    nearest = Judge(images, labels)
    assert nearest.name == "nearest training image" and np.array_equal(nearest.read(images * 0.9), labels)
    x = np.array([[-1.0], [1.0], [0.0], [0.5], [0.0]])[..., None, None]  # in [0, 1]: 0, 1, ½, ¾, ½
    np.testing.assert_allclose(diversity(x, np.array([3, 3, 5, 5, 5])), [1, 1 / 6])


# ----------------------------------------------------------------------------------------------------------------- the report


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny networks: of three classes predicting v, of none, and of another method."""
    folder = tmp_path_factory.mktemp("reproduce")
    images = np.random.default_rng(0).integers(0, 256, (30, 4, 4), np.uint8)
    small = ["model.channels=8", "model.blocks=1", "model.attention=4", "model.groups=4", "train.batch=8", "train.warmup=1"]
    small += ["log.samples=0", "log.checkpoints=100"]
    kinds = {"classes": ["diffusion.prediction=v"], "plain": ["model.conditional=false"], "vesde": ["method=vesde"]}
    with h5py.File(folder / "data.h5", "w") as f:
        f["images"], f["split"] = images, (np.arange(30) % 3 == 2).astype(np.uint8)
        f["labels"] = np.arange(30) // 3 % 3
        f.attrs["classes"] = "red,green,blue"
    for name, words in kinds.items():
        given = ["--data", folder / "data.h5", "--steps", 2, "--out", folder, "--name", name, "--quiet", "--device", "cpu"]
        settings = [w for s in [*small, *words] for w in ("--set", s)]
        with kernels.use("reference"):
            assert train.main([*map(str, given), *settings]) == 0
    return {name: folder / name for name in kinds}


@pytest.fixture
def reference() -> Iterator[None]:
    with kernels.use("reference"):
        yield


def test_network(runs: dict[str, Path], reference: None) -> None:
    net = Network(runs["classes"])
    assert net.shape == (4, 4, 1) and net.steps((10, 5000)) == (10,)
    x0, labels = net.images("test", 4)
    assert x0.shape == (4, 4, 4, 1) and labels is not None and labels.shape == (4,) and np.abs(x0).max() <= 1
    x, t = np.asarray(net.prior(3, 0)), np.full(3, 300)
    a, n = S.levels(300)
    v = net.net.predict(x, t, np.array([0, 1, 2]))
    np.testing.assert_allclose(net.model(np.array([0, 1, 2]))(x, t), a * v + n * x, atol=1e-5)  # ε = a·v + n·x
    table = tables.ddim(S, 2, eta=1.0)
    many = net.sample(table, 103, 1, np.zeros(103, np.int64))
    alone = samplers.sample(net.model(np.zeros(1, np.int64)), table, net.prior(1, 1, 102), 1, clip=(-1, 1), first_sample=102)
    np.testing.assert_allclose(many[102:], np.clip(alone, -1, 1), atol=1e-6)
    assert Network(runs["plain"]).images("train")[1] is None


def test_the_whole_report(runs: dict[str, Path], reference: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    from PIL import Image

    out = tmp_path / "new" / "folder"
    words = ["reproduce", "--quick", "--checkpoint", str(runs["classes"]), "--out", str(out), "--device", "cpu"]
    assert cli.main(words) == 0
    told = capsys.readouterr().out
    text = (out / "reproduce.md").read_text(encoding="utf-8")
    assert (
        "none of them is reproduced" in " ".join(text.split()) and str(tmp_path) not in text and str(runs["classes"]) not in text
    )
    for name, (_, title) in reproduce.PARTS.items():
        assert f"## {title}\n" in text and f"{name}: {title}" in told
    pictures = re.findall(r"!\[.+\]\((.+\.png)\)", text)
    assert sorted(pictures) == sorted(p.name for p in out.glob("*.png")) and len(pictures) == 10
    for name in pictures:
        assert (out / name).stat().st_size < 150_000
        with Image.open(out / name) as image:
            grey = np.asarray(image.convert("L"), np.float64)
        assert min(grey.shape) > 100 and 0.02 < (grey < 250).mean()
    for line in text.splitlines():  # every table is square
        assert not line.startswith("|") or line.count("|") - line.count("\\|") > 2
    for block in re.split(r"\n\n", text):
        if block.startswith("|"):
            assert len({line.count("|") - line.count("\\|") for line in block.splitlines()}) == 1, block
    assert "| η = 0 | 39.3 | 12.6 | 2.38 | 0.652 | 0.0136 |" in text or "| η = 0 | 39.2 | 12.6 | 2.38 | 0.652 | 0.0136 |" in text
    assert text.count("| yes |") + text.count("| **no** |") == told.count("\n  holds ") + told.count("\n  DIFFERS ")


def test_some_parts_without_classes(
    runs: dict[str, Path], reference: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    words = ["guidance", "frechet", "--quick", "--checkpoint", str(runs["plain"]), "--out", str(tmp_path), "--device", "cpu"]
    assert reproduce.main(words) == 0
    text = (tmp_path / "reproduce.md").read_text(encoding="utf-8")
    assert "knows no classes" in text and text.count("\n## ") == 2 and "`alphabar reproduce frechet guidance" in text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["reproduce.md", "reproduce_frechet.png", "reproduce_guidance.png"]


def test_a_claim_that_does_not_hold_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    section = Section("a claim", ["body"], [Check("the sky is green", "blue", False, "green"), Check("so", "so", True)])
    monkeypatch.setattr(frechet, "run", lambda settings: section)
    assert reproduce.main(["frechet", "--out", str(tmp_path)]) == 0
    text = (tmp_path / "reproduce.md").read_text(encoding="utf-8")
    assert "| the sky is green | green | blue | **no** |" in text and "1 of 2 shapes hold" in text
    assert "DIFFERS the sky is green: blue" in capsys.readouterr().out


def test_numbers_and_sizes() -> None:
    assert [report.number(v) for v in (115.31, 39.25, 2.379, 0.00559, 9.5e-6)] == ["115.3", "39.2", "2.38", "0.00559", "9.5e-06"]
    assert Settings(quick=True).size(5, 2) == 2 and Settings().size(5, 2) == 5


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["frechets"], "unknown part 'frechets'; the parts are frechet, reconstruction"),
        (["--out", __file__], "--out"),
        (["--checkpoint", "nothing"], "nothing: No such file"),
        (["--seed", "-1"], "must be in 0.."),
    ],
)
def test_mistakes(words: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert cli.main(["reproduce", *words]) == 2
    err = capsys.readouterr().err
    assert err.startswith("alphabar reproduce: error: ") and err.count("\n") == 1 and reason in err


def test_another_method_is_refused(runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert cli.main(["reproduce", "--checkpoint", str(runs["vesde"]), "--out", str(tmp_path / "x"), "--device", "cpu"]) == 2
    assert "must be a network of method ddpm" in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_without_matplotlib(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert cli.main(["reproduce", "--out", str(tmp_path / "x")]) == 2
    assert "pip install 'alphabar[plots]'" in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_the_help_loads_nothing_heavy(capsys: pytest.CaptureFixture[str]) -> None:
    code = "import sys; from alphabar.tools import cli; cli.main(['reproduce', '--help']); print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/").stdout
    assert "usage: alphabar reproduce" in out and not {"matplotlib", "numba", "PIL", "h5py", "sklearn"} & set(out.split())
