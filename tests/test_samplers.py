"""The sampler loop: determinism, noise, clipping, guidance, arrays of other libraries, and the errors of a wrong call."""

import numpy as np
import pytest

from alphabar import kernels
from alphabar.core import forward, samplers, schedules, tables

LINEAR = schedules.linear()


def contraction(x, t):
    """A cheap model that depends on the time of each sample."""
    t = np.asarray(t).reshape(-1, *(1,) * (x.ndim - 1))
    return (x * (0.3 + t / 2000)).astype(x.dtype)


# ----------------------------------------------------------------------------------------------------------- noise and batches


@pytest.mark.parametrize(
    "table", [tables.ddpm(LINEAR, 12), tables.ddim(LINEAR, 6, eta=0.7), tables.heun(LINEAR, 4)], ids=lambda t: t.name
)
def test_one_batch_of_64_is_64_batches_of_one(table):
    shape = (64, 5, 7, 3)
    x = samplers.prior(shape, seed=11)
    whole = samplers.sample(contraction, table, x, seed=11)
    single = [
        samplers.sample(contraction, table, samplers.prior((1, *shape[1:]), seed=11, first_sample=k), seed=11, first_sample=k)
        for k in range(64)
    ]
    assert whole.dtype == np.float32 and np.array_equal(np.concatenate(single), whole)
    uneven = [samplers.sample(contraction, table, x[i:j], seed=11, first_sample=i) for i, j in ((0, 1), (1, 30), (30, 64))]
    assert np.array_equal(np.concatenate(uneven), whole)


def test_the_seed_decides_where_there_is_noise_and_only_there(linear):
    x = samplers.prior((4, 30), seed=0)
    stochastic, deterministic = tables.ddim(linear, 5, eta=1.0), tables.ddim(linear, 5)
    first = samplers.sample(contraction, stochastic, x, seed=1)
    assert np.array_equal(first, samplers.sample(contraction, stochastic, x, seed=1))
    assert not np.any(first == samplers.sample(contraction, stochastic, x, seed=2))
    assert not np.any(first[1:] == samplers.sample(contraction, stochastic, x, seed=1, first_sample=1)[1:])
    one, two = (samplers.sample(contraction, deterministic, x, seed=seed) for seed in (1, 2))
    assert np.array_equal(one, two)


def test_made_noise_is_the_kernel_normals_of_row_and_sample(linear):
    table, x = tables.ddpm(linear, 6), samplers.prior((3, 40), seed=5, first_sample=7)
    z = np.stack([kernels.normals(np.empty((3, 40), np.float32), 5, step=i, stream=0, first_sample=7) for i in range(6)])
    made = samplers.sample(contraction, table, x, seed=5, first_sample=7)
    given = samplers.sample(contraction, table, x, noise=z)
    np.testing.assert_allclose(made, given, rtol=1e-5, atol=1e-6)


def test_prior_is_standard_normal_and_keyed_by_sample():
    x = samplers.prior((300, 1000), seed=3, dtype=np.float64)
    assert x.dtype == np.float64 and samplers.prior((2, 3)).dtype == np.float32
    assert abs(x.mean()) < 4 / np.sqrt(x.size) and abs(x.var() - 1) < 4 * np.sqrt(2 / x.size)
    assert np.array_equal(samplers.prior((10, 1000), seed=3, first_sample=290, dtype=np.float64), x[290:])
    z = kernels.normals(np.empty((300, 1000), np.float32), 3)  # the stream of the sampler steps
    assert abs(np.corrcoef(z.ravel(), x.ravel())[0, 1]) < 4 / np.sqrt(x.size)


def test_noise_may_end_where_the_table_has_none(linear):
    table, x = tables.ddpm(linear, 5), np.ones((2, 3))
    z = np.random.default_rng(0).standard_normal((5, 2, 3))
    whole = samplers.sample(contraction, table, x, noise=z)
    assert np.array_equal(samplers.sample(contraction, table, x, noise=z[:4]), whole)
    deterministic = tables.ddim(linear, 5)
    assert np.array_equal(
        samplers.sample(contraction, deterministic, x, noise=z[:0]), samplers.sample(contraction, deterministic, x)
    )
    for bad in (z[:3], z[:, :1], z[..., None]):
        with pytest.raises(ValueError, match=r"noise must have shape \(5, 2, 3\)"):
            samplers.sample(contraction, table, x, noise=bad)
    with pytest.raises(TypeError, match="noise must be of a float dtype, not int64"):
        samplers.sample(contraction, table, x, noise=z.astype(np.int64))
    with pytest.raises(TypeError, match="noise must be an array"):
        samplers.sample(contraction, table, x, noise=0.5)


# ------------------------------------------------------------------------------------------------------------ what comes back


def test_float32_follows_float64(linear, gaussian):
    model, x = gaussian(0.2, 0.4).model(linear), samplers.prior((4, 6, 6, 2), seed=1)
    for table in (tables.ddpm(linear, 40), tables.ddim(linear, 40), tables.dpm_solver_pp(linear, 12, 3), tables.heun(linear, 12)):
        for clip in (None, (-0.5, 0.5)):
            z = np.random.default_rng(0).standard_normal((len(table), *x.shape))
            low = samplers.sample(model, table, x, noise=z.astype(np.float32), clip=clip)
            high = samplers.sample(model, table, x.astype(np.float64), noise=z, clip=clip)
            assert low.dtype == np.float32 and high.dtype == np.float64
            np.testing.assert_allclose(low, high, atol=5e-4)
            with kernels.use("reference"):
                slow = samplers.sample(model, table, x, noise=z.astype(np.float32), clip=clip)
            np.testing.assert_allclose(slow, low, atol=5e-4)


def test_trajectory_holds_every_state_and_x_T_is_left_alone(linear):
    table, x = tables.ddpm(linear, 9), np.random.default_rng(0).standard_normal((3, 4))
    before = x.copy()
    path = samplers.sample(contraction, table, x, trajectory=True)
    assert path.shape == (10, 3, 4) and np.array_equal(path[0], x) and np.array_equal(x, before)
    assert np.array_equal(path[-1], samplers.sample(contraction, table, x))
    assert len({p.tobytes() for p in path}) == 10


@pytest.mark.parametrize(
    "x",
    [np.zeros((0, 3, 3, 1)), np.ones(5), np.ones((3, 2, 4), order="F"), np.ones((6, 4))[::2]],
    ids=["empty", "flat", "fortran", "strided"],
)
def test_any_shape_and_layout(linear, x):
    for table in (tables.ddpm(linear, 4), tables.dpm_solver_pp(linear, 4)):
        for dtype in (np.float32, np.float64):
            y = samplers.sample(contraction, table, x.astype(dtype), clip=(-1, 1))
            assert y.shape == x.shape and y.dtype == dtype and np.all(np.isfinite(y))


def test_the_model_gets_times_of_the_batch(linear):
    seen = []

    def model(x, t):
        seen.append(t)
        return contraction(x, t)

    samplers.sample(model, tables.ddim(linear, 4), np.ones((3, 2)))
    assert [t.tolist() for t in seen] == [[751] * 3, [501] * 3, [251] * 3, [1] * 3]
    assert all(t.dtype == np.int64 for t in seen)
    seen.clear()
    samplers.sample(model, tables.euler(linear, 4, "karras"), np.ones((3, 2)))
    assert all(t.dtype == np.float64 and t.shape == (3,) for t in seen) and len(seen) == 4


def test_progress_is_told_every_row(linear):
    seen = []
    samplers.sample(contraction, tables.heun(linear, 3), np.ones((1, 2)), progress=lambda done, rows: seen.append((done, rows)))
    assert seen == [(k, 5) for k in range(1, 6)]


@pytest.mark.parametrize("steps", [1, 10, 50])
def test_model_calls_are_rows(linear, steps):
    for table, calls in ((tables.ddim(linear, steps), steps), (tables.heun(linear, steps), 2 * steps - 1)):
        count = []
        samplers.sample(lambda x, t, n=count: n.append(1) or x * 0.1, table, np.ones((1, 2)))
        assert len(count) == calls == len(table)


def test_torch_tensors_in_torch_tensors_out(linear):
    torch = pytest.importorskip("torch")
    seen = []

    def model(x, t):
        seen.append((type(x), type(t), t.dtype, x.dtype))
        return x * (0.3 + t.reshape(-1, 1) / 2000).to(x.dtype)

    for dtype in (torch.float32, torch.float64):
        x = torch.linspace(-2, 2, 12, dtype=dtype).reshape(4, 3)
        for table in (tables.ddpm(linear, 5), tables.dpm_solver_pp(linear, 5), tables.euler(linear, 5, "karras")):
            y = samplers.sample(model, table, x, seed=2)
            path = samplers.sample(model, table, x, seed=2, trajectory=True)
            want = samplers.sample(contraction, table, x.numpy().copy(), seed=2)
            assert isinstance(y, torch.Tensor) and y.dtype == dtype and path.shape == (6, 4, 3)
            np.testing.assert_allclose(y.numpy(), want, rtol=1e-5, atol=1e-5)
            assert torch.equal(path[-1], y) and torch.equal(path[0], x)
    assert {s[0] for s in seen} == {torch.Tensor} == {s[1] for s in seen} and {s[2] for s in seen} == {torch.int64, torch.float64}


# ------------------------------------------------------------------------------------------------------------ wrong calls


def test_wrong_answers_of_the_model_are_named(linear):
    table, x = tables.ddim(linear, 3), np.ones((2, 3), np.float32)
    with pytest.raises(ValueError, match=r"model must return floats of shape \(2, 3\) .* not float32 of shape \(2, 1\)"):
        samplers.sample(lambda x, t: x[:, :1], table, x)
    with pytest.raises(ValueError, match="not int64 of shape"):
        samplers.sample(lambda x, t: x.astype(np.int64), table, x)
    with pytest.raises(TypeError, match="model must return an array, not tuple"):
        samplers.sample(lambda x, t: (x, t), table, x)
    with pytest.raises(TypeError, match="model must return an array, not NoneType"):
        samplers.sample(lambda x, t: None, table, x)
    with pytest.raises(ValueError, match="guidance must return"):
        samplers.sample(contraction, table, x, guidance=lambda x, t: x[:1])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_model_may_answer_in_another_float_dtype(linear, dtype):
    """A factor such as s.noise[t] is float64 and makes a float32 state's answer float64."""
    table, x = tables.ddpm(linear, 5), np.random.default_rng(0).standard_normal((2, 3)).astype(dtype)
    noise = np.random.default_rng(1).standard_normal((5, 2, 3))
    got = samplers.sample(lambda x, t: x.astype(np.float64) * linear.noise[t[0]], table, x, noise=noise)
    want = samplers.sample(lambda x, t: x * dtype(linear.noise[t[0]]), table, x, noise=noise.astype(dtype))
    assert got.dtype == dtype
    np.testing.assert_allclose(got, want, rtol=1e-5 if dtype == np.float32 else 1e-14)


def test_wrong_tables_are_named(linear):
    for bad in (None, "ddim", linear):
        with pytest.raises(TypeError, match="table must be a Table"):
            samplers.sample(contraction, bad, np.ones((2, 3)))
    for make in (tables.ddpm, tables.ddim, tables.heun, tables.dpm_solver_pp, tables.euler_maruyama):
        with pytest.raises(TypeError, match="s must be a Schedule"):
            make(1000)


def test_wrong_states_are_named(linear):
    table = tables.ddim(linear, 3)
    for bad in (np.ones((2, 3), int), [[1.0, 2.0]], None):
        with pytest.raises(TypeError, match="x_T must be a float array"):
            samplers.sample(contraction, table, bad)
    with pytest.raises(ValueError, match="batch axis"):
        samplers.sample(contraction, table, np.full((), 3.0))
    for options in ({"seed": -1}, {"first_sample": -1}, {"clip": (1, -1)}):
        with pytest.raises(ValueError):
            samplers.sample(contraction, tables.ddpm(linear, 3), np.ones((2, 3)), **options)


@pytest.mark.parametrize("clip", [None, (-9, 9)])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_a_model_may_answer_with_its_input_or_always_with_one_buffer(linear, clip, dtype):
    table, x = tables.adams_bashforth(linear, 9, order=4), np.random.default_rng(0).standard_normal((2, 3)).astype(dtype)
    buffer = np.empty_like(x)

    def reuse(x, t):
        buffer[...] = x * 0.5
        return buffer

    for answers, with_new_arrays in ((lambda x, t: x, lambda x, t: x.copy()), (reuse, lambda x, t: x * dtype(0.5))):
        got = samplers.sample(answers, table, x, clip=clip)
        assert np.array_equal(got, samplers.sample(with_new_arrays, table, x, clip=clip))


# ------------------------------------------------------------------------------------------------------------ guidance and laws


@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "score"])
@pytest.mark.parametrize("clip", [None, (-0.4, 0.5)])
def test_guidance_adds_to_the_score(linear, gaussian, prediction, clip):
    """The gradient of the guidance, given apart, does what a model with that score does."""
    data, x = gaussian(0.1, 0.6), np.random.default_rng(0).standard_normal((3, 4))
    model = data.model(linear, prediction)

    def guided(x, t):
        eps = forward.convert(model(x, t), x, t, linear, prediction, "eps")
        n = linear.noise[t].reshape(-1, 1)
        return forward.convert(eps - n * (1.5 - x), x, t, linear, "eps", prediction)

    for table in (
        tables.ddpm(linear, 10, prediction=prediction),
        tables.ddim(linear, 10, 0.5, prediction=prediction),
        tables.heun(linear, 10, "leading", prediction=prediction),
        tables.dpm_solver_pp(linear, 10, 3, prediction=prediction),
        tables.adams_bashforth(linear, 10, 4, "leading", prediction=prediction),
    ):
        got = samplers.sample(model, table, x, seed=4, clip=clip, guidance=lambda x, t: 1.5 - x)
        want = samplers.sample(guided, table, x, seed=4, clip=clip)
        np.testing.assert_allclose(got, want, rtol=1e-8, atol=1e-9)


def test_ancestral_samples_have_the_law_of_the_data(linear, mixture):
    data = mixture([0.3, 0.7], [-1.0, 1.0], [0.2, 0.3])
    x = samplers.prior((20_000,), seed=8, dtype=np.float64)
    got = np.sort(samplers.sample(data.model(linear), tables.ddpm(linear, 200, "beta"), x, seed=8))
    grid = np.linspace(-4, 4, 4001)
    cdf = np.interp(got, grid, np.cumsum(data.density(grid)) * (grid[1] - grid[0]))
    assert np.max(np.abs(cdf - (np.arange(got.size) + 0.5) / got.size)) < 0.02
