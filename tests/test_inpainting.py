"""Inpainting: what is known comes out as given, and how far both methods are from the posterior of a Gaussian."""

from itertools import pairwise

import numpy as np
import pytest

from alphabar import kernels
from alphabar.core import forward, inpainting, samplers, schedules, tables
from alphabar.core.mixture import GaussianMixture

LINEAR = schedules.linear()
COVARIANCE = np.array([[1, 0.8, 0.3], [0.8, 1, 0.5], [0.3, 0.5, 1]])
DATA = GaussianMixture([1.0], [[0.1, 0.0, -0.2]], COVARIANCE[None])
GIVEN = 1.5  # the first of the three elements; the others follow from it
MEAN = np.array([0.0, -0.2]) + COVARIANCE[1:, 0] * (GIVEN - 0.1)
SPREAD = COVARIANCE[1:, 1:] - np.outer(COVARIANCE[1:, 0], COVARIANCE[1:, 0])


def half(x, t):
    return x * x.dtype.type(0.5)


def published_path(rows, jump, resample):
    """get_schedule_jump of the RePaint paper's appendix, with its levels −1, 0, … as our 0, 1, …"""
    left = {j: resample - 1 for j in range(0, rows - jump, jump)}
    t, visited = rows, []
    while t >= 1:
        t -= 1
        visited.append(t)
        if left.get(t, 0) > 0:
            left[t] -= 1
            for _ in range(jump):
                t += 1
                visited.append(t)
    visited.append(-1)
    path = [t + 1 for t in visited]
    merged = [path[0]]  # its single steps upwards as one jump
    for a, b in pairwise(path):
        if b == a + 1 and len(merged) > 1 and merged[-1] > merged[-2]:
            merged[-1] = b
        else:
            merged.append(b)
    return merged


@pytest.mark.parametrize(("rows", "jump", "resample"), [(50, 10, 10), (20, 1, 3), (23, 5, 2), (7, 3, 4), (10, 10, 5), (9, 2, 1)])
def test_path_is_the_published_one(rows: int, jump: int, resample: int) -> None:
    path = inpainting.repaint_path(rows, jump, resample)
    assert path[0] == rows and path[-1] == 0 and (path == 0).sum() == 1
    steps = np.diff(path)
    assert set(steps) <= {-1, jump} and path.max() == rows
    assert (steps == -1).sum() == rows + jump * (steps == jump).sum()
    assert (steps == jump).sum() == (resample - 1) * len(range(1, rows - jump + 1, jump))
    if jump > 1 or resample == 1:  # at jump = 1 single steps up cannot be told from each other after merging
        assert path.tolist() == published_path(rows, jump, resample)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_known_part_comes_out_bit_for_bit(dtype: type) -> None:
    rng = np.random.default_rng(0)
    x = samplers.prior((5, 4, 6, 2), seed=1, dtype=dtype)
    known, mask = rng.standard_normal(x.shape).astype(dtype), rng.integers(0, 2, (4, 6, 1))
    hidden = np.broadcast_to(mask == 0, x.shape)
    nothing = np.where(hidden, np.nan, known)
    table = tables.ddpm(LINEAR, 12)
    for run in (
        lambda k, m: inpainting.replacement(half, table, x, k, m, seed=3, clip=(-2, 2)),
        lambda k, m: inpainting.repaint(half, table, x, k, m, 3, 2, seed=3),
        lambda k, m: inpainting.replacement(half, tables.ddim(LINEAR, 9), x, k, m),
    ):
        out = run(known, mask)
        assert out.dtype == dtype and np.array_equal(out[~hidden], known[~hidden]) and np.isfinite(out).all()
        assert np.array_equal(out, run(nothing, mask.astype(bool))), "what the mask hides is not read"
        assert not np.allclose(out[hidden], known[hidden], atol=0.1)


def test_masks_broadcast() -> None:
    x = samplers.prior((3, 4, 4, 2), seed=1)
    known, table = np.ones_like(x), tables.ddpm(LINEAR, 5)
    for mask in (1, True, np.ones((4, 4, 1)), np.ones((3, 1, 1, 1), bool), np.ones(x.shape, np.int8)):
        assert np.array_equal(inpainting.replacement(half, table, x, known, mask), known)
    own = np.array([1, 0, 1]).reshape(3, 1, 1, 1)  # a mask for each sample
    out = inpainting.replacement(half, table, x, known, own)
    assert np.array_equal(out[[0, 2]], known[[0, 2]]) and not np.any(out[1] == 1)


def test_without_a_known_part_it_is_the_sampler() -> None:
    x, table = samplers.prior((4, 30), seed=2), tables.ddpm(LINEAR, 10)
    plain = samplers.sample(half, table, x, seed=5, clip=(-1, 1))
    np.testing.assert_allclose(inpainting.replacement(half, table, x, x, 0, seed=5, clip=(-1, 1)), plain, rtol=1e-5, atol=1e-6)
    assert not np.allclose(inpainting.repaint(half, table, x, x, 0, 2, 3, seed=5), plain, atol=0.01)


def test_a_sample_depends_on_its_number_only() -> None:
    x, table = samplers.prior((6, 10), seed=2), tables.ddpm(LINEAR, 8)
    known, mask = np.ones_like(x), np.arange(10) < 4

    def run(i: int, j: int, seed: int = 9) -> np.ndarray:
        return inpainting.repaint(half, table, x[i:j], known[i:j], mask, 2, 2, seed=seed, first_sample=i)

    assert np.array_equal(run(0, 6), np.concatenate([run(0, 1), run(1, 4), run(4, 6)]))
    assert not np.any(run(0, 6)[:, 4:] == run(0, 6, 8)[:, 4:])


def test_the_known_part_has_the_law_of_the_forward_process() -> None:
    """A model that answers 0 shows each state it meets: their mean and deviation are those of q(x_t|known)."""
    seen: dict[float, list[np.ndarray]] = {}

    def watch(x, t):
        seen.setdefault(float(t[0]), []).append(x.copy())
        return np.zeros_like(x)

    x = samplers.prior((500, 8), seed=0, dtype=np.float64)
    for jump, resample in ((1, 1), (1, 2), (3, 3)):
        seen.clear()
        inpainting.repaint(watch, tables.ddpm(LINEAR, 9, spacing="trailing"), x, np.full_like(x, 2.0), 1, jump, resample)
        for t, states in seen.items():
            a, n = (float(v) for v in LINEAR.levels(t))
            for state in states:
                assert abs(state.mean() - 2 * a) < 4 * n / np.sqrt(x.size) and abs(state.std() / n - 1) < 4 / np.sqrt(2 * x.size)
        assert max(map(len, seen.values())) == resample


def test_no_noise_is_used_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, real = [], kernels.normals

    def record(out, seed, step=0, stream=0, first_sample=0):
        drawn.append((step, stream))
        return real(out, seed, step, stream, first_sample)

    monkeypatch.setattr(kernels, "normals", record)
    x = np.ones((2, 3))
    inpainting.repaint(half, tables.ddpm(LINEAR, 8), x, x, [1, 0, 0], 2, 3)
    # all rows but the last of DDPM have noise, each level but clean data is mixed with a noisy copy, each jump has its noise
    downs, ups = 8 + 2 * 2 * 3, 2 * 3
    assert len(drawn) == len(set(drawn)) == (downs - 1) + downs + ups


def moments(x: np.ndarray) -> tuple[float, float]:
    """(largest error of the posterior mean, smallest ratio to the posterior variances)."""
    assert np.all(x[:, 0] == GIVEN)
    return float(np.abs(x[:, 1:].mean(axis=0) - MEAN).max()), float((x[:, 1:].var(axis=0) / np.diag(SPREAD)).min())


def test_resampling_brings_the_mean_nearer_to_the_posterior() -> None:
    """Replacement is biased however many steps it takes: the model meets the known part with noise on it. RePaint is less so."""
    x = samplers.prior((3000, 3), seed=1, dtype=np.float64)
    known, mask, model = np.array([[GIVEN, np.nan, np.nan]]).repeat(len(x), 0), [1, 0, 0], DATA.model(LINEAR)
    error = 4 * np.sqrt(SPREAD.max() / len(x))
    table = tables.ddpm(LINEAR, 40, spacing="trailing")
    replaced, _ = moments(inpainting.replacement(model, table, x, known, mask))
    more, _ = moments(inpainting.replacement(model, tables.ddpm(LINEAR, 160, spacing="trailing"), x, known, mask))
    few, _ = moments(inpainting.repaint(model, table, x, known, mask, 4, 3))
    many, ratio = moments(inpainting.repaint(model, table, x, known, mask, 4, 8))
    assert replaced > 0.35 and more > 0.35, "the bias of replacement does not vanish with the steps"
    assert many + error < few < replaced - error
    assert many < 0.5 * replaced and ratio > 0.7


def test_image_to_image_with_a_region_left_alone() -> None:
    x0 = np.random.default_rng(0).standard_normal((4, 6))
    table = tables.ddpm(LINEAR, grid=np.arange(20, 401, 20))
    x_t, _ = forward.q_sample(x0, 400, LINEAR, seed=1)
    out = inpainting.replacement(half, table, x_t, x0, np.arange(6) < 3)
    assert np.array_equal(out[:, :3], x0[:, :3]) and not np.allclose(out[:, 3:], x0[:, 3:], atol=0.01)


def test_a_torch_state_gives_a_torch_answer() -> None:
    torch = pytest.importorskip("torch")
    x, known = torch.randn(3, 5, dtype=torch.float64), torch.ones(3, 5, dtype=torch.float64)

    def model(x, t):
        assert isinstance(x, torch.Tensor) and isinstance(t, torch.Tensor)
        return 0.5 * x

    mask = torch.tensor([1, 1, 0, 0, 0])
    out = inpainting.repaint(model, tables.ddpm(LINEAR, 6), x, known, mask, 2, 2)
    want = inpainting.repaint(half, tables.ddpm(LINEAR, 6), x.numpy(), known.numpy(), mask.numpy(), 2, 2)
    assert isinstance(out, torch.Tensor) and np.array_equal(out.numpy(), want) and torch.equal(out[:, :2], known[:, :2])


def test_wrong_arguments() -> None:
    x, table = np.zeros((2, 3)), tables.ddpm(LINEAR, 4)
    for call, message in (
        (lambda: inpainting.replacement(half, tables.heun(LINEAR, 4), x, x, 1), "table must not store outputs"),
        (lambda: inpainting.replacement(half, tables.ddim_encode(LINEAR, 4), x, x, 1), "table must end at clean data"),
        (lambda: inpainting.replacement(half, table, x, x, 0.5), "mask must hold booleans"),
        (lambda: inpainting.replacement(half, table, x, x, np.ones(4)), "mask must broadcast to x_T"),
        (lambda: inpainting.replacement(half, table, x, x[:1], 1), "known must have the shape of x_T"),
        (lambda: inpainting.repaint(half, table, x, x, 1, 0), "jump must be at least 1"),
        (lambda: inpainting.repaint(half, table, x, x, 1, 1, 0), "resample must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="table must be a Table"):
        inpainting.replacement(half, LINEAR, x, x, 1)
    with pytest.raises(TypeError, match="x_T must be a float array"):
        inpainting.replacement(half, table, np.zeros((2, 3), int), x, 1)
