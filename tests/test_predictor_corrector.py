"""Predictor–corrector sampling: the step-size rule, the published loop, independence of the batch, noise keys, refusals."""

import numpy as np
import pytest

from alphabar import kernels
from alphabar.core import predictor_corrector as pc
from alphabar.core import samplers, schedules, tables
from alphabar.core.sde import VESDE, VPSDE, SubVPSDE
from alphabar.kernels import streams

LINEAR = schedules.linear()


def model(x, t):
    t = np.asarray(t, np.float64).reshape(-1, *(1,) * (x.ndim - 1))
    return (np.tanh(x) * (0.4 + t / 2000)).astype(x.dtype)


# ----------------------------------------------------------------------------------------------------------------- the step size


@pytest.mark.parametrize("norm", ["sample", "batch"])
def test_the_drift_is_r_times_the_noise(norm):
    """L14. ‖ε·g‖/‖√(2ε)·z‖ = r, for each sample or for the batch means."""
    g, z = 3 * np.random.default_rng(0).standard_normal((4, 10, 5)), np.random.default_rng(1).standard_normal((4, 10, 5))
    size = pc.step_size(g, z, 0.16, norm)
    drift, spread = (np.sqrt((v**2).sum(axis=(1, 2))) for v in (size * g, np.sqrt(2 * size) * z))
    ratio = drift / spread if norm == "sample" else drift.mean() / spread.mean()
    np.testing.assert_allclose(ratio, 0.16, rtol=1e-12)
    np.testing.assert_allclose(pc.step_size(g, z, 0.16, norm, alpha=0.5), size / 2, rtol=1e-12)


def test_the_level_norm_is_the_mean_of_the_others_in_many_dimensions():
    noise, rng = 0.3, np.random.default_rng(0)
    z, eps = rng.standard_normal((2, 50, 20_000))
    sizes = pc.step_size(-eps / noise, z, 0.16, "sample")
    np.testing.assert_allclose(sizes, pc.step_size(None, None, 0.16, "level", noise=noise), rtol=0.1)
    assert sizes.mean() == pytest.approx(2 * (0.16 * noise) ** 2, rel=0.01)


def test_a_score_of_zero_moves_nothing():
    size = pc.step_size(np.zeros((2, 3)), np.ones((2, 3)))
    assert size.shape == (2, 1) and not size.any()


def test_alpha_is_that_of_the_unit_step(linear):
    """VP: times α_i; the published 1 − β_i of 1000 steps."""
    t = np.array([1, 500, 1000])
    np.testing.assert_allclose(pc.corrector_alpha(linear, t), linear.alpha[t])
    beta = np.linspace(0.1, 20, 1000) / 1000
    for s in (VPSDE(), SubVPSDE(), VPSDE(T=1000)):
        np.testing.assert_allclose(pc.corrector_alpha(s, np.linspace(0, 1, 1000) * s.T), 1 - beta, rtol=1e-12)
    for s in (VESDE(), schedules.geometric()):
        assert np.all(pc.corrector_alpha(s, np.array([1.0])) == 1)


# ---------------------------------------------------------------------------------------------------------------------- the loop


def published(s, times, x, norm, corrections, z, zc, snr=0.16):
    """Algorithms 2 to 5 of the paper as its code runs them: at each time the corrector, then reverse diffusion."""
    path = np.r_[times[::-1], 0.0]
    for i in range(len(times)):
        t, (a, n), (a_to, n_to) = path[i], s.levels(path[i]), s.levels(path[i + 1])
        vec = np.full(len(x), t)
        alpha = s.alpha[int(t)] if hasattr(s, "alpha") else 1 - s.beta(t) * s.T / 1000 if hasattr(s, "beta") else 1.0
        for j in range(corrections):
            g = -model(x, vec) / n
            norms = [np.sqrt((v.reshape(len(x), -1) ** 2).sum(1)) for v in (zc[i, j], g)]
            if norm == "batch":
                norms = [np.full(len(x), v.mean()) for v in norms]
            eps = (2 * alpha * (snr * norms[0] / norms[1]) ** 2).reshape(-1, 1, 1)
            x = x + eps * g + np.sqrt(2 * eps) * zc[i, j]
        v = n**2 - (a / a_to * n_to) ** 2
        x = (2 - a / a_to) * x + v * (-model(x, vec) / n) + (np.sqrt(v) * z[i] if path[i + 1] > 0 else 0)
    return x


@pytest.mark.parametrize("norm", ["sample", "batch"])
@pytest.mark.parametrize("corrections", [1, 3])
@pytest.mark.parametrize("s", [LINEAR, schedules.geometric(0.01, 5, 40), VESDE(), VPSDE(), SubVPSDE()], ids=repr)
def test_it_is_the_published_loop(s, norm, corrections):
    table = tables.reverse_diffusion(s, 9)
    rng = np.random.default_rng(3)
    x = rng.standard_normal((4, 3, 2)) * s.prior_std
    z, zc = rng.standard_normal((9, *x.shape)), rng.standard_normal((9, corrections, *x.shape))
    got = pc.sample(model, table, x, s, corrections=corrections, norm=norm, noise=z, corrector_noise=zc)
    want = published(s, table.t[::-1], x, norm, corrections, z, zc)
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9)


def test_it_is_the_pipeline_of_diffusers():
    diffusers, torch = pytest.importorskip("diffusers"), pytest.importorskip("torch")
    steps, ladder = 12, schedules.geometric(0.02, 8.0, 12)
    scheduler = diffusers.ScoreSdeVeScheduler(num_train_timesteps=steps, snr=0.15, sigma_min=0.02, sigma_max=8.0)
    scheduler.set_timesteps(steps)
    scheduler.set_sigmas(steps)
    scheduler.timesteps = (torch.arange(steps - 1, -1, -1) + 0.1) / (steps - 1)  # its own lose an index to truncation
    score = lambda x, sigma: -(x - torch.sin(x) / 2) / (0.5 + sigma**2)  # noqa: E731
    start = x = 8 * torch.from_numpy(np.random.default_rng(0).standard_normal((3, 2, 4, 4)))
    generator, rows, corrections = torch.Generator().manual_seed(5), [], []
    for i, t in enumerate(scheduler.timesteps):
        sigma = scheduler.discrete_sigmas[steps - 1 - i]
        state = generator.get_state()
        corrections.append(torch.randn(x.shape, generator=generator).double())
        generator.set_state(state)
        x = scheduler.step_correct(score(x, sigma), x, generator=generator).prev_sample
        state = generator.get_state()
        rows.append(torch.randn(x.shape, generator=generator, dtype=x.dtype))
        generator.set_state(state)
        output = scheduler.step_pred(score(x, sigma), t, x, generator=generator)
        x = output.prev_sample
    table = tables.reverse_diffusion(ladder, prediction="score")
    got = pc.sample(
        lambda x, t: score(x, torch.from_numpy(ladder.sigma[t.numpy()]).reshape(-1, 1, 1, 1)),
        table,
        start,
        ladder,
        snr=0.15,
        norm="batch",
        noise=torch.stack(rows),
        corrector_noise=torch.stack(corrections)[:, None],
    )
    assert isinstance(got, torch.Tensor) and got.dtype == torch.float64
    np.testing.assert_allclose(got.numpy(), output.prev_sample_mean.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_sample_does_not_depend_on_its_batch(dtype):
    s = VPSDE()
    table, x = tables.reverse_diffusion(s, 6), samplers.prior((7, 5, 7, 3), seed=1, dtype=dtype)
    whole = pc.sample(model, table, x, s, corrections=2, seed=4)
    parts = [pc.sample(model, table, x[i:j], s, corrections=2, seed=4, first_sample=i) for i, j in ((0, 1), (1, 3), (3, 7))]
    assert whole.dtype == dtype and np.array_equal(np.concatenate(parts), whole)
    batch = [pc.sample(model, table, x[i:j], s, norm="batch", seed=4, first_sample=i) for i, j in ((0, 1), (1, 7))]
    assert not np.array_equal(np.concatenate(batch), pc.sample(model, table, x, s, norm="batch", seed=4))


def test_made_noise_is_keyed_by_row_correction_and_sample():
    s, x = VPSDE(), samplers.prior((3, 40), seed=1, dtype=np.float64)
    table = tables.reverse_diffusion(s, 4)
    make = lambda step, stream: kernels.normals(np.empty((3, 40)), 9, step=step, stream=stream, first_sample=5)  # noqa: E731
    z = np.stack([make(i, streams.SAMPLER) for i in range(4)])
    zc = np.stack([[make(2 * i + j, streams.CORRECTOR) for j in range(2)] for i in range(4)])
    made = pc.sample(model, table, x, s, corrections=2, seed=9, first_sample=5)
    given = pc.sample(model, table, x, s, corrections=2, noise=z, corrector_noise=zc)
    np.testing.assert_allclose(made, given, rtol=1e-12)


@pytest.mark.parametrize("prediction", ["eps", "score", "x0", "v"])
def test_any_prediction_gives_the_same_samples(gaussian, prediction):
    s, data, x = SubVPSDE(), gaussian(0.2, 0.6), np.random.default_rng(0).standard_normal((3, 8))
    want = pc.sample(data.model(s), tables.ddpm(s, 8, spacing="trailing"), x, s, seed=1)
    got = pc.sample(data.model(s, prediction), tables.ddpm(s, 8, spacing="trailing", prediction=prediction), x, s, seed=1)
    np.testing.assert_allclose(got, want, rtol=1e-9)


def test_stages_of_one_step_stay_together_and_calls_are_counted():
    s, x = VPSDE(), np.random.default_rng(0).standard_normal((2, 6))
    for build, rows, starts in ((tables.heun, 9, 5), (tables.rk4, 17, 5), (tables.ddpm, 5, 5)):
        calls = []

        def counted(x, t, calls=calls):
            calls.append(float(t[0]))
            return model(x, t)

        table = build(s, 5)
        seen = []
        pc.sample(counted, table, x, s, corrections=2, progress=lambda done, total, seen=seen: seen.append((done, total)))
        assert len(calls) == rows + 2 * starts and seen == [(i + 1, rows) for i in range(rows)]
    for table in (tables.adams_bashforth(s, 9), tables.dpm_solver_pp(s, 9)):
        with pytest.raises(ValueError, match="must not keep outputs from step to step"):
            pc.sample(model, table, x, s)


def test_without_corrections_it_is_the_predictor():
    s, x = VPSDE(), np.random.default_rng(0).standard_normal((2, 6))
    table = tables.reverse_diffusion(s, 5)
    path = pc.sample(model, table, x, s, corrections=0, seed=3, clip=(-1, 1), trajectory=True)
    assert np.array_equal(path, samplers.sample(model, table, x, seed=3, clip=(-1, 1), trajectory=True))
    corrected = pc.sample(model, table, x, s, seed=3, clip=(-1, 1), trajectory=True)
    assert corrected.shape == (6, 2, 6) and np.array_equal(corrected[0], x) and not np.array_equal(corrected[1], path[1])


def test_wrong_arguments_are_named():
    s, x = VPSDE(), np.ones((2, 3))
    table = tables.reverse_diffusion(s, 3)
    for options, error, text in (
        ({"snr": 0}, ValueError, "snr must be"),
        ({"norm": "all"}, ValueError, "norm must be one of"),
        ({"corrections": -1}, ValueError, "corrections must be"),
        ({"corrections": 1.5}, TypeError, "corrections must be"),
        ({"corrector_noise": np.ones((3, 2, 3))}, ValueError, r"corrector_noise must have shape \(3, 1, 2, 3\)"),
        ({"corrector_noise": 1.0}, TypeError, "corrector_noise must be a float array"),
    ):
        with pytest.raises(error, match=text):
            pc.sample(model, table, x, s, **options)
    with pytest.raises(TypeError, match="table must be a Table"):
        pc.sample(model, s, x, s)
    with pytest.raises(TypeError, match="s must be a Schedule"):
        pc.sample(model, table, x, 1.0)
    with pytest.raises(TypeError, match="model must return an array"):
        pc.sample(lambda x, t: None, table, x, s)
    with pytest.raises(ValueError, match="norm must be one of"):
        pc.step_size(x, x, norm="none")
