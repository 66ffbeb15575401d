"""Codes, paths between them and image to image, on data whose perfect network is known."""

from functools import partial

import numpy as np
import pytest

from alphabar.core import editing, forward, samplers, schedules, sde, tables
from alphabar.core.metrics import per_dimension_mse
from alphabar.core.mixture import GaussianMixture

LINEAR = schedules.linear()
MIXTURE = GaussianMixture([0.3, 0.7], [[1.5, 0.5], [-1.0, -0.5]], [0.04, 0.09])
SMOOTH = GaussianMixture([0.4, 0.6], [[0.8, 0.3], [-0.7, -0.4]], [0.1, 0.15])  # whose flow splits the modes less sharply
STEPS = (10, 20, 50, 100, 200, 500, 1000)


# -------------------------------------------------------------------------------------------------------------- encode and decode


@pytest.fixture(scope="module")
def round_trips() -> dict[str, np.ndarray]:
    """Per-dimension MSE of decode(encode(x)) for each label over STEPS."""
    x, model = SMOOTH.sample(200), SMOOTH.model(LINEAR)
    return {
        label: np.array([editing.reconstruct(model, LINEAR, x, steps, label)[1].mean() for steps in STEPS])
        for label in ("target", "current")
    }


@pytest.mark.parametrize("label", ["target", "current"])
def test_reconstruction_error_falls_with_the_steps(round_trips: dict[str, np.ndarray], label: str) -> None:
    """DDIM's Table 2 in closed form: monotone, between 1/S and 1/S² (the paper's own numbers fall as S^−1.1 to S^−1.5)."""
    errors = round_trips[label]
    slopes = np.diff(np.log(errors)) / np.diff(np.log(STEPS))
    assert np.all((slopes > -2.1) & (slopes < -1)), slopes
    assert errors[0] < 0.1 and errors[-1] < 2e-5


def test_the_target_label_inverts_more_closely(round_trips: dict[str, np.ndarray]) -> None:
    assert np.all(round_trips["target"] < 0.7 * round_trips["current"])


def test_labels_are_the_times_told_to_the_model() -> None:
    times = {"encode": [], "decode": []}

    def watch(name, x, t):
        times[name].append(int(t[0]))
        return np.zeros_like(x)

    x = np.zeros((1, 2))
    for label, told in (("target", [1, 251, 501, 751]), ("current", [1, 1, 251, 501])):
        times["encode"].clear()
        editing.encode(partial(watch, "encode"), LINEAR, x, 4, label)
        assert times["encode"] == told
    editing.decode(partial(watch, "decode"), LINEAR, x, 4)
    assert times["decode"] == [751, 501, 251, 1]


def test_the_code_is_where_the_flow_goes(gaussian) -> None:
    data = gaussian(0.3, 0.5)
    x = np.linspace(-1, 1, 12).reshape(2, 6)
    code = editing.encode(data.model(LINEAR), LINEAR, x, 1000)
    a, n = (float(v) for v in LINEAR.levels(LINEAR.T))
    np.testing.assert_allclose(code, data.flow(x, 1.0, 0.0, a, n), atol=5e-3)
    np.testing.assert_allclose(editing.decode(data.model(LINEAR), LINEAR, code, 1000), x, atol=5e-3)
    eps, error = editing.reconstruct(data.model(LINEAR), LINEAR, x, 100)
    _, error_v = editing.reconstruct(data.model(LINEAR, "v"), LINEAR, x, 100, label="current", prediction="v")
    assert error.max() < 2e-3 and error_v.max() < 4e-3
    np.testing.assert_allclose(error, per_dimension_mse(x, eps))


# ------------------------------------------------------------------------------------------------------------------ interpolation


def test_the_path_begins_and_ends_at_the_reconstructions_and_is_continuous() -> None:
    model, x = SMOOTH.model(LINEAR), SMOOTH.sample(4, seed=2)
    paths = [editing.interpolate(model, LINEAR, x[:2], x[2:], n, 25) for n in (11, 41, 161)]
    ends = editing.reconstruct(model, LINEAR, x, 25)[0]
    steps = []
    for n, path in zip((11, 41, 161), paths, strict=True):
        assert path.shape == (n, 2, 2)
        np.testing.assert_allclose(np.concatenate([path[0], path[-1]]), ends, atol=1e-9)
        steps.append(np.abs(np.diff(path, axis=0)).max())
    assert steps[1] < steps[0] / 2 and steps[2] < steps[1] / 2.5, "with four times the pictures nothing jumps"


def test_pairs_do_not_know_of_each_other() -> None:
    model, x = MIXTURE.model(LINEAR), MIXTURE.sample(8, seed=2)
    path = editing.interpolate(model, LINEAR, x[:4], x[4:], 3, 10)
    alone = editing.interpolate(model, LINEAR, x[1:2], x[5:6], 3, 10)
    np.testing.assert_allclose(path[:, 1:2], alone, rtol=1e-12)


# ----------------------------------------------------------------------------------------------------------------- image to image


def test_at_full_strength_nothing_of_the_guide_is_left() -> None:
    """Exactly nothing where no signal is left at T; else its share √ᾱ_T."""
    zero = schedules.zero_terminal_snr(LINEAR)
    model, guide = MIXTURE.model(zero, "v"), np.full((50, 2), 5.0)
    build = partial(tables.ddim, eta=1.0)
    out = editing.sdedit(model, zero, guide, 1.0, 20, sampler=build, prediction="v", seed=3)
    _, z = forward.q_sample(guide, zero.T, zero, seed=3)
    table = tables.ddim(zero, 20, 1.0, "trailing", prediction="v")
    np.testing.assert_allclose(out, samplers.sample(model, table, z, seed=3), rtol=1e-12)
    x = editing.sdedit(MIXTURE.model(LINEAR), LINEAR, np.full((3000, 2), 1.0), 1.0, 60, seed=1)
    share = float(np.mean(x[:, 0] > 0.3))  # the weights of the modes
    assert abs(share - 0.3) < 4 * np.sqrt(0.21 / 3000) + 0.01


def test_at_small_strength_the_guide_comes_back() -> None:
    guide, model = MIXTURE.sample(200, seed=4), MIXTURE.model(LINEAR)
    edited = [editing.sdedit(model, LINEAR, guide, strength, 20) for strength in (1e-3, 0.05, 0.3, 1)]
    errors = [per_dimension_mse(guide, x).mean() for x in edited]
    assert errors[0] < 2e-4 and np.all(np.diff(errors) > 0)


def test_sdedit_keeps_the_law_of_the_data() -> None:
    """Noising samples of the data and sampling down again gives samples of the data, at every strength."""
    data = GaussianMixture([1.0], [[0.5]], 0.09)
    guide = data.sample(4000, seed=1)
    for strength in (0.1, 0.4):
        x = editing.sdedit(data.model(LINEAR), LINEAR, guide, strength, 200, repeats=1)
        assert abs(x.mean() - 0.5) < 4 * 0.3 / np.sqrt(4000) and abs(x.var() / 0.09 - 1) < 4 * np.sqrt(2 / 4000) + 0.02


def test_repeats_draw_noise_of_their_own() -> None:
    guide, model = np.zeros((3, 50)), lambda x, t: 0.3 * x
    once = editing.sdedit(model, LINEAR, guide, 0.5, 10, seed=7)
    twice = editing.sdedit(model, LINEAR, guide, 0.5, 10, seed=7, repeats=2)
    again = editing.sdedit(model, LINEAR, once, 0.5, 10, seed=7)
    assert np.array_equal(once, editing.sdedit(model, LINEAR, guide, 0.5, 10, seed=7))
    assert not np.any(twice == again)
    calls = []
    editing.sdedit(model, LINEAR, guide, 0.5, 10, repeats=3, progress=lambda done, all: calls.append((done, all)))
    assert calls == [(k, 30) for k in range(1, 31)]


@pytest.mark.parametrize("s", [LINEAR, schedules.geometric(0.01, 5.0, 40), sde.VPSDE()], ids=lambda s: s.name)
def test_a_sample_depends_on_its_number_only(s) -> None:
    guide, model = np.linspace(-1, 1, 30).reshape(6, 5), lambda x, t: 0.3 * x
    whole = editing.sdedit(model, s, guide, 0.6, 8, seed=2, repeats=2)
    parts = [editing.sdedit(model, s, guide[i:j], 0.6, 8, seed=2, repeats=2, first_sample=i) for i, j in ((0, 1), (1, 6))]
    assert np.array_equal(np.concatenate(parts), whole) and np.isfinite(whole).all()


def test_conventions_of_strength() -> None:
    assert editing.strength_grid(LINEAR, 0.5, 5).tolist() == [100, 200, 300, 400, 500]
    assert editing.strength_grid(LINEAR, 0.5, 10, "steps").tolist() == [100, 200, 300, 400, 500]
    assert editing.strength_grid(LINEAR, 0.75, 50, "steps", "leading").tolist() == (np.arange(37) * 20 + 1).tolist()
    assert editing.strength_grid(LINEAR, 1e-9, 50).tolist() == [1]
    assert editing.strength_grid(LINEAR, 0.003, 50).tolist() == [
        1,
        2,
        3,
    ]
    assert editing.strength_grid(LINEAR, 0.29, 100, "steps").size == 29  # 0.29·100 is 28.999… in binary
    whole, part = (editing.strength_grid(sde.VPSDE(), strength, 4) for strength in (1, 0.5))
    np.testing.assert_allclose(part, whole / 2)
    for strength in (0.2, 0.6, 1):
        assert editing.strength_grid(LINEAR, strength, 50)[-1] == 1000 * strength


def test_decibels() -> None:
    x = np.zeros((2, 5))
    np.testing.assert_allclose(editing.psnr(x, x + np.array([[0.2], [2.0]])), [20, 0])
    assert editing.psnr(x, x).tolist() == [np.inf, np.inf]
    np.testing.assert_allclose(editing.psnr(x, x + 0.1, peak=1.0), 20)


def test_a_torch_image_gives_a_torch_answer() -> None:
    torch = pytest.importorskip("torch")
    x = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(4, 6)

    def model(x, t):
        assert isinstance(x, torch.Tensor)
        return 0.3 * x

    path = editing.interpolate(model, LINEAR, x[:2], x[2:], 3, 5)
    again, error = editing.reconstruct(model, LINEAR, x, 5)
    varied = editing.sdedit(model, LINEAR, x, 0.3, 5, repeats=2)
    assert all(isinstance(v, torch.Tensor) for v in (path, again, varied)) and isinstance(error, np.ndarray)
    np.testing.assert_allclose(varied.numpy(), editing.sdedit(model_numpy, LINEAR, x.numpy(), 0.3, 5, repeats=2))


def model_numpy(x, t):
    return 0.3 * x


def test_wrong_arguments() -> None:
    x, model = np.zeros((2, 3)), model_numpy
    for call, message in (
        (lambda: editing.encode(model, LINEAR, x, label="next"), "label must be 'target' or 'current'"),
        (lambda: editing.encode(model, LINEAR, x, prediction="x0"), "prediction must be 'eps'"),
        (lambda: editing.interpolate(model, LINEAR, x, x, 1), "n must be at least 2, not 1"),
        (lambda: editing.interpolate(model, LINEAR, x, x[:1]), "x and y must be"),
        (lambda: editing.sdedit(model, LINEAR, x, 0), r"strength must be in \(0, 1\], not 0"),
        (lambda: editing.sdedit(model, LINEAR, x, 1.1), r"strength must be in \(0, 1\], not 1.1"),
        (lambda: editing.sdedit(model, LINEAR, x, 0.01, 50, convention="steps"), "strength 0.01 of 50 steps leaves none"),
        (lambda: editing.sdedit(model, LINEAR, x, 0.5, convention="noise"), "convention must be 'time' or 'steps'"),
        (lambda: editing.sdedit(model, LINEAR, x, 0.5, repeats=0), "repeats must be at least 1"),
        (lambda: editing.sdedit(model, LINEAR, x, 0.5, 0), "steps must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="s must be a Schedule"):
        editing.strength_grid(3, 0.5)
