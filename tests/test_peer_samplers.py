"""Step-by-step agreement with the schedulers of diffusers themselves: as they are to 5e-5, and run in float64 to 1e-11."""

import importlib

import numpy as np
import pytest

from alphabar.core import convert, samplers, schedules, tables
from alphabar.core.sde import EDM

diffusers = pytest.importorskip("diffusers")
torch = pytest.importorskip("torch")

LINEAR = schedules.linear()
pytestmark = pytest.mark.filterwarnings("ignore")  # the peer's own
X_T = np.random.default_rng(5).standard_normal((3, 2, 2, 1))
BETAS = {"beta_start": 1e-4, "beta_end": 0.02}
KARRAS, LOWEST = {"use_karras_sigmas": True}, {"final_sigmas_type": "sigma_min"}


class Double:
    """A module whose float32 is float64."""

    def __init__(self, module):
        self._module = module

    def __getattr__(self, name):
        return getattr(self._module, "float64" if name == "float32" else name)


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    return request.param


@pytest.fixture
def make(dtype, monkeypatch):
    """make(class name, steps, **arguments) -> a scheduler that computes in ``dtype``, with its timesteps set."""

    def build(name, steps, **arguments):
        cls = getattr(diffusers, name)
        module = importlib.import_module(cls.__module__)
        if dtype == "float64":
            for library in ("torch", "np"):
                if hasattr(module, library):
                    monkeypatch.setattr(module, library, Double(getattr(module, library)))
        scheduler = cls(**arguments)
        if dtype == "float64" and isinstance(getattr(scheduler, "final_alpha_cumprod", None), torch.Tensor):
            scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
        scheduler.set_timesteps(steps)
        return scheduler

    return build


@pytest.fixture
def data(mixture):
    return mixture([0.35, 0.65], [-0.7, 0.5], [0.2, 0.35])


def walk(scheduler, model, x, level, noise, monkeypatch, **step):
    """Every state of a scheduler's loop from x, ``model`` at ``level(scheduler, timestep)``, its noise injected."""
    kind = torch.float64 if torch.is_tensor(scheduler.timesteps) and _wide(scheduler) else torch.float32
    module = importlib.import_module(type(scheduler).__module__)
    draws = iter(noise)
    if hasattr(module, "randn_tensor"):
        monkeypatch.setattr(module, "randn_tensor", lambda shape, **_: torch.from_numpy(next(draws)).to(kind))
    x = torch.from_numpy(x).to(kind)
    states = [x.double().numpy()]
    for t in scheduler.timesteps:
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(x, t)
        a, n = level(scheduler, t)
        m = torch.from_numpy(model(x.double().numpy(), np.asarray(a), np.asarray(n))).to(kind)
        x = scheduler.step(m, t, x, **step).prev_sample
        states.append(x.double().numpy())
    return np.stack(states)


def _wide(scheduler):
    table = getattr(scheduler, "sigmas", None)
    table = scheduler.alphas_cumprod if table is None else table
    return table.dtype == torch.float64


def by_label(scheduler, t):
    """Classes that look up alphas_cumprod, and keep the data's scale."""
    alpha_bar = float(scheduler.alphas_cumprod[int(t)])
    return alpha_bar**0.5, (1 - alpha_bar) ** 0.5


def by_sigma(scheduler, t):
    """Classes that walk in σ and keep the data's scale."""
    if scheduler.step_index is None:
        scheduler._init_step_index(t)
    sigma = float(scheduler.sigmas[scheduler.step_index])
    return 1 / (1 + sigma**2) ** 0.5, sigma / (1 + sigma**2) ** 0.5


def by_sigma_alone(scheduler, t):
    """Classes whose state is x/a. (KDPM2's second stage stands at the σ between.)"""
    between = hasattr(scheduler, "sigmas_interpol") and scheduler.sample is not None
    sigmas = scheduler.sigmas_interpol if between else scheduler.sigmas
    return 1.0, float(sigmas[scheduler.step_index])


def close(got, want, dtype, low=5e-5):
    """Largest difference over the largest value; ``low`` is allowed in float32."""
    assert got.shape == want.shape
    assert np.max(np.abs(got - want)) <= (low if dtype == "float32" else 1e-11) * np.max(np.abs(want))


def noise_for(steps):
    return np.random.default_rng(6).standard_normal((steps, *X_T.shape))


def compare(scheduler, table, data, level, dtype, monkeypatch, low=5e-5, **step):
    z = noise_for(len(table))
    in_sigma = level is by_sigma_alone
    a = table.signal[0]
    want = walk(scheduler, data.eps, X_T / a if in_sigma else X_T, level, z, monkeypatch, **step)
    got = samplers.sample(data.model(LINEAR), table, X_T, noise=z, trajectory=True)
    if in_sigma:  # ours keep the data's scale
        got = got / np.r_[a, table.signal_to].reshape(-1, *(1,) * X_T.ndim)
    close(got, want, dtype, low)


# ---------------------------------------------------------------------------------------------- by alphas_cumprod: DDPM and DDIM


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_ddpm(make, data, dtype, monkeypatch, variance):
    for steps in (10, 50):
        scheduler = make("DDPMScheduler", steps, variance_type=variance, clip_sample=False)
        table = tables.ddpm(LINEAR, steps, {"fixed_small": "posterior", "fixed_large": "beta"}[variance])
        compare(scheduler, table, data, by_label, dtype, monkeypatch)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim(make, data, dtype, monkeypatch, eta):
    for steps in (10, 50):
        scheduler = make("DDIMScheduler", steps, clip_sample=False)
        compare(scheduler, tables.ddim(LINEAR, steps, eta), data, by_label, dtype, monkeypatch, eta=eta)


@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_clipped(make, data, dtype, monkeypatch, eta, raw):
    scheduler, table = make("DDIMScheduler", 20, clip_sample=True, clip_sample_range=0.6), tables.ddim(LINEAR, 20, eta)
    z = noise_for(len(table))
    want = walk(scheduler, data.eps, 2 * X_T, by_label, z, monkeypatch, eta=eta, use_clipped_model_output=not raw)
    options = {"noise": z, "clip": (-0.6, 0.6), "rederive_eps": not raw, "trajectory": True}
    close(samplers.sample(data.model(LINEAR), table, 2 * X_T, **options), want, dtype)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_ddpm_clipped(make, data, dtype, monkeypatch, variance):
    scheduler = make("DDPMScheduler", 20, variance_type=variance, clip_sample=True, clip_sample_range=0.6)
    table = tables.ddpm(LINEAR, 20, {"fixed_small": "posterior", "fixed_large": "beta"}[variance])
    z = noise_for(len(table))
    want = walk(scheduler, data.eps, 2 * X_T, by_label, z, monkeypatch)
    got = samplers.sample(data.model(LINEAR), table, 2 * X_T, noise=z, clip=(-0.6, 0.6), trajectory=True)
    close(got, want, dtype)


OTHER = {
    "scaled_linear": ({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}, schedules.scaled_linear()),
    "cosine": ({"beta_schedule": "squaredcos_cap_v2"}, schedules.cosine()),
    "zero_snr": (
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "rescale_betas_zero_snr": True},
        schedules.zero_terminal_snr(schedules.scaled_linear()),
    ),
}


@pytest.mark.parametrize("name", OTHER)
def test_ddim_of_v_on_other_schedules(make, gaussian, dtype, monkeypatch, name):
    """With v and trailing steps, from pure noise where the terminal SNR is 0."""
    arguments, s = OTHER[name]
    data = gaussian(0.2, 0.6)
    v = lambda x, a, n: a * data.eps(x, a, n) - n * data.x0(x, a, n)  # noqa: E731
    scheduler = make(
        "DDIMScheduler", 20, clip_sample=False, prediction_type="v_prediction", timestep_spacing="trailing", **arguments
    )
    want = walk(scheduler, v, X_T, by_label, noise_for(20), monkeypatch, eta=0.5)
    table = tables.ddim(s, 20, 0.5, "trailing", prediction="v")
    got = samplers.sample(data.model(s, "v"), table, X_T, noise=noise_for(20), trajectory=True)
    assert (scheduler.timesteps.numpy() + 1 == table.t).all()
    close(got, want, dtype)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_ddim_inverse(make, data, dtype, spacing):
    """Told the label of the level that the step ends at; started from data."""
    scheduler = make("DDIMInverseScheduler", 20, clip_sample=False, timestep_spacing=spacing)
    table = tables.ddim_encode(LINEAR, 20, spacing)
    kind = torch.float64 if _wide(scheduler) else torch.float32
    x, states, path = torch.from_numpy(X_T).to(kind), [X_T], np.r_[0.0, table.t]
    for i, t in enumerate(scheduler.timesteps):
        assert int(t) + 1 == table.t[i]
        m = torch.from_numpy(data.eps(x.double().numpy(), *LINEAR.levels(path[i + 1]))).to(kind)
        x = scheduler.step(m, t, x).prev_sample
        states.append(x.double().numpy())
    close(samplers.sample(data.model(LINEAR), table, X_T, trajectory=True), np.stack(states), dtype)


@pytest.mark.parametrize("steps", [10, 20, 50])
def test_pndm(make, data, dtype, monkeypatch, steps):
    """Compared at the ends of whole steps: the Runge–Kutta stages of diffusers are the states of ours too."""
    scheduler = make("PNDMScheduler", steps, set_alpha_to_one=True)
    table = tables.pndm(LINEAR, steps)
    assert len(table) == steps + 9 and (scheduler.timesteps.numpy() + 1 == table.t).all()
    compare(scheduler, table, data, by_label, dtype, monkeypatch)


@pytest.mark.parametrize("steps", [5, 20, 50])
def test_plms(make, data, dtype, monkeypatch, steps):
    scheduler = make("PNDMScheduler", steps, set_alpha_to_one=True, skip_prk_steps=True)
    table = tables.plms(LINEAR, steps)
    assert (scheduler.timesteps.numpy() + 1 == table.t).all()
    compare(scheduler, table, data, by_label, dtype, monkeypatch)


# ----------------------------------------------------------------------------------------------------------- by σ, VE coordinates


@pytest.mark.parametrize("arguments", [{}, KARRAS, {"timestep_spacing": "trailing"}, {"use_exponential_sigmas": True}], ids=str)
def test_euler(make, data, dtype, monkeypatch, arguments):
    spacing = {"use_karras_sigmas": "karras", "timestep_spacing": "trailing", "use_exponential_sigmas": "logsnr"}
    table = tables.euler(LINEAR, 15, next((spacing[k] for k in arguments), "linspace"))
    compare(make("EulerDiscreteScheduler", 15, **arguments), table, data, by_sigma_alone, dtype, monkeypatch)


@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
def test_euler_ancestral(make, data, dtype, monkeypatch, spacing):
    scheduler = make("EulerAncestralDiscreteScheduler", 15, timestep_spacing=spacing)
    table = tables.euler_ancestral(LINEAR, 15, spacing=spacing)
    compare(scheduler, table, data, by_sigma_alone, dtype, monkeypatch)


@pytest.mark.parametrize("arguments", [{}, KARRAS], ids=str)
@pytest.mark.parametrize("name", ["heun", "kdpm2", "lms"])
def test_second_order_and_multistep_in_sigma(make, data, dtype, monkeypatch, name, arguments):
    cls = {"heun": "HeunDiscreteScheduler", "kdpm2": "KDPM2DiscreteScheduler", "lms": "LMSDiscreteScheduler"}[name]
    for steps in (10, 20):
        table = getattr(tables, name)(LINEAR, steps, spacing="karras" if arguments else "linspace")
        scheduler = make(cls, steps, **BETAS, **arguments)
        assert len(scheduler.timesteps) == len(table)
        compare(scheduler, table, data, by_sigma_alone, dtype, monkeypatch)


# ---------------------------------------------------------------------------------------------------------------- solvers in λ

DPM = {
    **{f"++{o}M": ({"solver_order": o}, {"order": o}) for o in (1, 2, 3)},
    "++2M_heun": ({"solver_type": "heun"}, {"solver_type": "heun"}),
    "++2M_karras": (KARRAS, {"spacing": "karras"}),
    "++2M_trailing": ({"timestep_spacing": "trailing"}, {"spacing": "trailing"}),
    "++2M_exponential": ({"use_exponential_sigmas": True}, {"spacing": "exponential"}),
    "++2M_lowest": (LOWEST, {"final": "lowest"}),
    "++3M_lowest": ({"solver_order": 3} | LOWEST, {"order": 3, "final": "lowest"}),
    "++3M_free": ({"solver_order": 3, "lower_order_final": False}, {"order": 3, "lower_order_final": False}),
    "sde++1M": ({"solver_order": 1, "algorithm_type": "sde-dpmsolver++"}, {"order": 1, "eta": 1.0}),
    "sde++2M": ({"algorithm_type": "sde-dpmsolver++"}, {"eta": 1.0}),
    "sde++2M_heun": ({"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"}, {"eta": 1.0, "solver_type": "heun"}),
    **{f"eps{o}M": ({"solver_order": o, "algorithm_type": "dpmsolver"} | LOWEST, {"order": o, "eps": True}) for o in (1, 2, 3)},
    "eps2M_heun": (
        {"solver_type": "heun", "algorithm_type": "dpmsolver"} | LOWEST,
        {"solver_type": "heun", "eps": True},
    ),
}


@pytest.mark.parametrize("name", DPM)
def test_dpm_solver_multistep(make, data, dtype, monkeypatch, name):
    theirs, ours = DPM[name]
    builder = tables.dpm_solver if "eps" in ours else tables.dpm_solver_pp
    options = {k: v for k, v in ours.items() if k != "eps"}
    for steps in (5, 10, 20):
        scheduler = make("DPMSolverMultistepScheduler", steps, **theirs)
        compare(scheduler, builder(LINEAR, steps, **options), data, by_sigma, dtype, monkeypatch)


@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("form", ["dpmsolver++", "dpmsolver"])
def test_dpm_solver_singlestep(make, data, dtype, monkeypatch, form, order, solver_type):
    for steps in (6, 7, 8, 20):
        options = {"method": "singlestep", "order": order, "solver_type": solver_type}
        arguments = {"algorithm_type": form, "solver_order": order, "solver_type": solver_type}
        builder = tables.dpm_solver_pp
        if form == "dpmsolver":
            builder, arguments = tables.dpm_solver, arguments | LOWEST
        scheduler = make("DPMSolverSinglestepScheduler", steps, **arguments)
        low = 2e-4 if form == "dpmsolver" and order == 3 else 5e-5  # few steps extrapolate far, and magnify float32's rounding
        compare(scheduler, builder(LINEAR, steps, **options), data, by_sigma, dtype, monkeypatch, low)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
def test_unipc(make, data, dtype, monkeypatch, variant, order):
    for steps in (6, 20):
        for final in ("lowest", "data"):
            if final == "data" and variant == "bh1":
                continue  # not a number there: bh1 with a last σ of 0
            arguments = {"solver_order": order, "solver_type": variant} | (LOWEST if final == "lowest" else {})
            scheduler = make("UniPCMultistepScheduler", steps, **arguments)
            table = tables.unipc(LINEAR, steps, order, variant=variant, final=final)
            compare(scheduler, table, data, by_sigma, dtype, monkeypatch)


def test_unipc_predictor_alone(make, data, dtype, monkeypatch):
    scheduler = make("UniPCMultistepScheduler", 10, disable_corrector=list(range(10)))
    compare(scheduler, tables.unipc(LINEAR, 10, corrector=False), data, by_sigma, dtype, monkeypatch)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_deis(make, data, dtype, monkeypatch, order):
    for steps in (10, 20):
        scheduler = make("DEISMultistepScheduler", steps, solver_order=order)
        compare(scheduler, tables.deis(LINEAR, steps, order, final="lowest"), data, by_sigma, dtype, monkeypatch)


# ------------------------------------------------------------------------------------------------------------------------- EDM


@pytest.mark.parametrize("churn", [0.0, 3.0, 40.0])
def test_edm_euler_with_the_raw_network(make, dtype, monkeypatch, churn):
    """The scheduler gets F itself; ours the same F through ``edm_model``."""
    s, steps = EDM(), 12

    def network(x, c_noise):
        return np.tanh(x + np.reshape(c_noise, (-1, 1, 1, 1)))

    scheduler = make("EDMEulerScheduler", steps)
    if dtype == "float64":
        ramp = np.linspace(80 ** (1 / 7), 0.002 ** (1 / 7), steps) ** 7
        scheduler.sigmas = torch.from_numpy(np.r_[ramp, 0.0])
        scheduler.timesteps = 0.25 * torch.log(scheduler.sigmas[:-1])
    kind, module = getattr(torch, dtype), importlib.import_module(type(scheduler).__module__)
    z = np.random.default_rng(6).standard_normal((steps, *X_T.shape))
    table = tables.euler(s, steps, "karras", prediction="F", churn=churn, s_tmin=0.05, s_tmax=50)
    added = np.flatnonzero(~table.asks)
    assert len(table) == steps + len(added) and (len(added) > 0) == (churn > 0)
    given = np.zeros((len(table), *X_T.shape))
    x, states = torch.from_numpy(X_T * 80).to(kind), [X_T * 80]
    for i, t in enumerate(scheduler.timesteps):
        sigma = float(scheduler.sigmas[i])
        monkeypatch.setattr(module, "randn_tensor", lambda *_, i=i, **__: torch.from_numpy(z[i]).to(kind))
        scheduler.scale_model_input(x, t)
        hat, noisy = sigma, x.double().numpy()
        if churn and 0.05 <= sigma <= 50:
            hat = sigma * (1 + min(churn / steps, 2**0.5 - 1))
            noisy = noisy + z[i] * (hat**2 - sigma**2) ** 0.5
        c = convert.preconditioning(hat)
        m = torch.from_numpy(network(c.into * noisy, c.noise)).to(kind)
        options = {"s_churn": churn, "s_tmin": 0.05, "s_tmax": 50} if churn else {}
        x = scheduler.step(m, t, x, **options).prev_sample
        states.append(x.double().numpy())
    starts = np.flatnonzero(table.asks)
    for i, row in enumerate(starts):
        given[row - 1 if row and not table.asks[row - 1] else row] = z[i]
    model = convert.edm_model(network, s)
    got = samplers.sample(model, table, X_T * 80, noise=given, trajectory=True)
    close(got[np.r_[0, starts + 1]], np.stack(states), dtype)


def test_dynamic_thresholding(make, data, dtype, monkeypatch):
    for largest in (1.0, 1.5):
        arguments = {"thresholding": True, "dynamic_thresholding_ratio": 0.8, "sample_max_value": largest, "clip_sample": False}
        scheduler = make("DDIMScheduler", 20, **arguments)
        x = 3 * X_T
        kind = torch.float64 if _wide(scheduler) else torch.float32
        state, states = torch.from_numpy(x).to(kind), [x]
        for t in scheduler.timesteps:
            m = torch.from_numpy(data.eps(state.double().numpy(), *map(np.asarray, by_label(scheduler, t)))).to(kind)
            state = scheduler.step(m, t, state, use_clipped_model_output=True).prev_sample
            states.append(state.double().numpy())
        got = samplers.sample(data.model(LINEAR), tables.ddim(LINEAR, 20), x, threshold=(0.8, largest), trajectory=True)
        close(got, np.stack(states), dtype)
