"""`alphabar check`: findings with closed forms as oracle, and the schedulers of diffusers against diffusers itself."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from alphabar.core import check, langevin, samplers, schedules, tables
from alphabar.core import diffusers_scheduler as peer
from alphabar.core.diffusers_walk import describable, findings, walk
from alphabar.core.sde import VESDE, VPSDE
from alphabar.nets import checkpoint
from alphabar.tools import check as tool
from alphabar.tools import config as configs

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of diffusers

# ------------------------------------------------------------------------------------------------------------------ the exact law


LAWS = {
    "ddpm": lambda s: tables.ddpm(s, 8, "beta"),
    "ddim": lambda s: tables.ddim(s, 8, 0.6, "trailing"),
    "x0": lambda s: tables.ddim(s, 8, 1.0, prediction="x0"),
    "heun": lambda s: tables.heun(s, 6, prediction="v"),
    "rk4": lambda s: tables.rk4(s, 4),
    "dpm++3": lambda s: tables.dpm_solver_pp(s, 9, 3),
    "ab4": lambda s: tables.adams_bashforth(s, 9, 4),
    "pndm": lambda s: tables.pndm(s, 8),
    "unipc": lambda s: tables.unipc(s, 6, 3),
    "churn": lambda s: tables.heun(s, 6, churn=20.0),
    "single": lambda s: tables.dpm_solver_pp(s, 6, 3, method="singlestep"),
    "em": lambda s: tables.euler_maruyama(s, 9, prediction="score"),
    "encode": lambda s: tables.ddim_encode(s, 6),
    "encode, current label": lambda s: tables.ddim_encode(s, 6, label="current", prediction="v"),
}


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("levels", [schedules.linear(), schedules.geometric(0.01, 20.0, 60), VPSDE()], ids=repr)
def test_the_law_of_gaussian_data(name, levels, gaussian):
    """The sampler is linear in (x_T, noises): its slopes, measured one by one with the perfect network, give the law."""
    table, mean, std = LAWS[name](levels), 0.7, 0.4
    w = check.walk(table, levels)
    size = len(table) + 2  # rest, a unit of x_T, a unit of each noise
    x_T, noise = np.zeros((size, 1)), np.zeros((len(table), size, 1))
    x_T[1] = 1
    noise[np.arange(len(table)), np.arange(2, size)] = 1
    model = gaussian(mean, std).model(levels, table.prediction)
    if name.startswith("encode"):
        x_T[0], x_T[2:], start = mean, mean, std
        x_T[1] += mean
    else:
        start = levels.prior_std
    out = samplers.sample(model, table, x_T, noise=noise)[:, 0]
    slopes = (out[1:] - out[0]) * np.r_[start, np.ones(size - 2)]
    law = check.gaussian_law(w, std)
    np.testing.assert_allclose([law.mean * mean, law.variance], [out[0], np.sum(slopes**2)], rtol=1e-9)


def test_the_right_law():
    law = check.gaussian_law(check.walk(tables.ddpm(schedules.linear(), 1000), schedules.linear()), 0.5)
    assert (law.right_mean, law.right_variance) == (1, 0.25) and abs(law.variance - 0.25) < 0.005
    s = schedules.linear()
    law = check.gaussian_law(check.walk(tables.ddim_encode(s, 50, spacing="trailing"), s), 0.5)
    assert law.right_mean == s.signal[-1] and law.right_variance == pytest.approx(s.alpha_bar[-1] / 4 + 1 - s.alpha_bar[-1])


# ----------------------------------------------------------------------------------------------------------------------- findings


def codes(found):
    return {f.code for f in found}


def only(found, code):
    (f,) = [f for f in found if f.code == code]
    return f


def rows(table, s, **changes):
    return replace(check.walk(table, s), **changes)


def test_a_sane_sampler_has_no_findings():
    s = schedules.linear()
    for table in (tables.ddim(s, 50, spacing="trailing"), tables.ddpm(s, 200, spacing="trailing"), tables.heun(s, 20)):
        assert not check.check_levels(s) and not check.check_walk(check.walk(table, s)), table


def test_the_gap_to_the_prior():
    s = schedules.Schedule(np.r_[0.0, np.linspace(1e-4, 0.02, 100)])
    f = only(check.check_levels(s), "prior")
    assert f.severity == "warning" and f.trap == 7 and f.value == pytest.approx(schedules.prior_gap(s).kl)
    assert not check.check_levels(schedules.linear(100, rescale=True))
    f = only(check.check_levels(schedules.geometric(0.01, 1.0, 10)), "prior")
    assert f.value == pytest.approx(0.5) and f.trap is None
    assert not check.check_levels(VESDE())


def test_zero_terminal_snr():
    s = schedules.zero_terminal_snr(schedules.linear())
    assert only(check.check_levels(s), "zero-snr").severity == "note"
    for prediction, bad in (("eps", True), ("v", False), ("x0", False)):
        found = check.check_walk(check.walk(tables.ddim(s, 10, spacing="trailing", prediction=prediction), s))
        assert (codes(found) & {"zero-snr"} != set()) == bad
    assert np.isnan(check.gaussian_law(check.walk(tables.ddim(s, 10, spacing="trailing"), s)).variance)


def test_falling_betas():
    s = schedules.from_betas(np.r_[np.full(500, 0.02), np.full(500, 0.01)])
    assert "t = 501" in only(check.check_levels(s), "monotone").message


@pytest.mark.parametrize(
    ("times", "code", "row"),
    [
        ([1, 5, 5, 9], "duplicate", 2),
        ([1, 9, 5, 20], "order", 2),
        ([9, 5, 7, 1], "order", 2),
        ([0, 5], "range", 0),
        ([5, 1001], "range", 1),
    ],
)
def test_grids(times, code, row):
    f = only(check.check_times(times, schedules.linear()), code)
    assert f.severity == "error" and f.row == row


def test_a_sane_grid():
    assert not check.check_times([1, 2.5, 1000], schedules.linear()) and not check.check_times([9, 5, 1], schedules.linear())


def test_a_grid_that_starts_below_T():
    s = schedules.linear()
    for steps, severity in ((2, "warning"), (50, "note")):
        f = only(check.check_walk(check.walk(tables.ddim(s, steps), s)), "start")
        t = 1000 // steps * (steps - 1) + 1
        a, n = s.levels(t)
        assert f.severity == severity and f.value == pytest.approx(n / a) and f"t = {t}" in f.message
    ladder = schedules.geometric(0.01, 40.0, 120)  # leading on a ladder: x_T ~ N(0, 40²) taken for one of σ = 25
    f = only(check.check_walk(check.walk(tables.ddim(ladder, 20), ladder)), "start")
    assert f.severity == "warning"


def test_residual_noise():
    s = schedules.linear()
    w = rows(tables.ddpm(s, 10), s)
    for c, severity in ((0.2, "error"), (0.01, "warning"), (1e-3, "note")):
        f = only(check.check_walk(replace(w, c=np.r_[w.c[:-1], c])), "residual")
        assert (f.severity, f.row, f.value) == (severity, 9, c)
    assert "clipped" in codes(check.check_walk(replace(w, c=np.r_[w.c[:-1], 1e-10])))
    level = replace(w, noise_to=np.r_[w.noise_to[:-1], 0.3])
    assert only(check.check_walk(level), "residual").severity == "warning"


def test_rows_that_do_not_join():
    s = schedules.linear()
    w = rows(tables.ddim(s, 10, spacing="trailing"), s)
    f = only(check.check_walk(replace(w, noise_to=w.noise_to * np.r_[np.ones(4), 1.01, np.ones(5)])), "previous")
    assert f.severity == "error" and f.row == 4 and "1 of 10" in f.message


def test_labels_and_sigma():
    s = schedules.linear()
    w = rows(tables.euler(s, 10, "karras"), s)
    assert "label" not in codes(check.check_walk(w))
    t = np.maximum(w.t.round(-2), 1)
    a, n = s.levels(t)
    f = only(check.check_walk(replace(w, t=t, label_signal=a, label_noise=n)), "label")
    gap = np.log(s.sigma_bar_at(t) / (w.noise / w.signal))
    assert f.value == pytest.approx(gap[np.argmax(np.abs(gap))]) and f.severity == "warning"
    assert only(check.check_walk(rows(tables.ddim_encode(s, 10), s)), "label").severity == "note"


def test_duplicate_and_disordered_labels_and_numbers_that_are_none():
    s = schedules.linear()
    w = rows(tables.ddim(s, 10), s)
    assert only(check.check_walk(replace(w, t=np.r_[w.t[:5], w.t[4], w.t[6:]])), "duplicate").row == 5
    assert only(check.check_walk(replace(w, t=np.r_[w.t[:5], w.t[3], w.t[6:]])), "order").row == 5
    f = only(check.check_walk(replace(w, c=np.r_[np.zeros(3), np.nan, np.zeros(6)])), "nan")
    assert f.row == 3 and "c is not" in f.message


def test_corrections_are_no_duplicates_and_not_idle():
    s = schedules.linear()
    for table in (tables.heun(s, 8), tables.rk4(s, 8)):
        assert not codes(check.check_walk(check.walk(table, s))) & {"duplicate", "idle"}
    ladder = schedules.geometric(0.01, 50.0, 232)
    assert not check.check_walk(check.walk(langevin.annealed_langevin(ladder, 5, 1.24e-5, prediction="eps"), ladder))


def test_float32_rounding():
    s = schedules.cosine()
    f = only(check.check_walk(check.walk(tables.ddim(s, 10, spacing="trailing"), s)), "float32")
    assert f.value == pytest.approx(2.0**-24 / s.signal[-1], rel=1e-6) and f.row == 0
    v = tables.ddim(s, 10, spacing="trailing", prediction="v")
    assert "float32" not in codes(check.check_walk(check.walk(v, s)))


@pytest.mark.parametrize(
    ("options", "named", "low", "high"),
    [({"order": 2}, False, 1.9, 2.1), ({"order": 3}, True, 1.9, 2.2), ({"order": 3, "taylor": True}, False, 2.8, 4)],
)
def test_orders_that_are_not_reached(options, named, low, high):
    """Trap 8: the finding says what the slopes of the exact law say."""
    s = schedules.linear()

    def deviation(steps):
        sigma = np.geomspace(0.05, s.sigma_bar[-1], steps).clip(max=s.sigma_bar[-1])
        w = check.walk(tables.dpm_solver_pp(s, grid=s.time(sigma), **options), s)
        assert ({f.trap for f in check.check_walk(w)} == {8}) == named
        return check.gaussian_law(w, 0.5).variance ** 0.5

    steps = np.abs(np.diff([deviation(n) for n in (80, 160, 320)]))
    assert low < np.log2(steps[0] / steps[1]) < high


def test_a_finding_of_no_severity():
    with pytest.raises(ValueError, match="severity must be one of"):
        check.Finding("fatal", "x", "y")


# ---------------------------------------------------------------------------------------------------------------------- diffusers


def read(name, **keys):
    return peer.read({"_class_name": name, "_diffusers_version": "0.42.1", **keys})


def report(name, steps, eta=0.0, **keys):
    s = read(name, **keys)
    g = peer.grid(s, steps)
    return findings(s, g, steps, walk(s, g, eta) if describable(s, g) else None)


@pytest.fixture(scope="module")
def make():
    """Makes the scheduler of diffusers of a name and settings."""
    pytest.importorskip("diffusers")
    from diffusers import schedulers
    from diffusers.utils import logging

    logging.set_verbosity_error()
    return lambda name, **keys: getattr(schedulers, name)(**keys)


SPACED = [{"timestep_spacing": k, "steps_offset": o} for k in ("leading", "linspace", "trailing") for o in (0, 1)]
GRIDS = {
    **{name: SPACED for name in peer.CLASSES if "timestep_spacing" in peer.CLASSES[name]},
    "DDIMInverseScheduler": [c for c in SPACED if c["timestep_spacing"] != "linspace"],
    "DPMSolverSinglestepScheduler": [{"solver_order": k, "lower_order_final": b} for k in (1, 2, 3) for b in (False, True)],
    "EDMEulerScheduler": [{}, {"sigma_schedule": "exponential", "rho": 5.0}, {"final_sigmas_type": "sigma_min"}],
}
MORE = [
    ("DDPMScheduler", {"beta_schedule": "sigmoid"}),
    ("DDPMScheduler", {"beta_schedule": "laplace"}),
    ("DDPMScheduler", {"trained_betas": [0.01, 0.02, 0.05, 0.3], "num_train_timesteps": 4}),
    ("PNDMScheduler", {"skip_prk_steps": True, "steps_offset": 1}),
    ("HeunDiscreteScheduler", {"beta_schedule": "exp"}),
    ("EulerDiscreteScheduler", {"use_exponential_sigmas": True}),
    ("EulerDiscreteScheduler", {"interpolation_type": "log_linear"}),
    ("EulerDiscreteScheduler", {"timestep_type": "continuous", "prediction_type": "v_prediction"}),
    (
        "EulerDiscreteScheduler",
        {"use_karras_sigmas": True, "sigma_min": 0.05, "sigma_max": 20.0, "final_sigmas_type": "sigma_min"},
    ),
    ("KDPM2DiscreteScheduler", {"use_exponential_sigmas": True}),
    ("LMSDiscreteScheduler", {"use_beta_sigmas": True}),
    ("DPMSolverMultistepScheduler", {"use_lu_lambdas": True}),
    ("DPMSolverMultistepScheduler", {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1}),
    ("DPMSolverSinglestepScheduler", {"lambda_min_clipped": -4.1}),
    ("UniPCMultistepScheduler", {"use_beta_sigmas": True, "final_sigmas_type": "sigma_min"}),
    ("DEISMultistepScheduler", {"use_exponential_sigmas": True}),
]


def same_grid(make, name, keys, steps):
    ours, theirs = read(name, **keys), make(name, **keys)
    assert not ours.refused
    if ours.beta.size:
        np.testing.assert_allclose(ours.beta, theirs.betas, rtol=2e-6)
        np.testing.assert_array_equal(ours.alpha_bar.astype(np.float32), theirs.alphas_cumprod)
    for S in steps:
        g = peer.grid(ours, S)
        try:
            theirs.set_timesteps(S)
        except (ValueError, IndexError):
            assert g.failed is not None, (name, keys, S)
            continue
        t = theirs.timesteps.numpy()
        rounding = {"rtol": 2e-6, "atol": 1e-3} if t.dtype.kind == "f" else {"rtol": 0}
        np.testing.assert_allclose(g.timesteps, t, **rounding, err_msg=f"{name} {keys} {S}")
        if g.sigmas is not None:
            np.testing.assert_allclose(g.sigmas, theirs.sigmas, rtol=2e-5, err_msg=f"{name} {keys} {S}")
        if name == "DPMSolverSinglestepScheduler":
            again = make(name, **keys)  # one that was not asked for another number of steps before
            again.set_timesteps(S)
            assert list(g.orders) == list(again.order_list)


@pytest.mark.parametrize("name", GRIDS)
def test_betas_and_grids_are_those_of_diffusers(name, make):
    for keys in GRIDS[name]:
        same_grid(make, name, keys, (1, 2, 3, 7, 20, 50, 61))
    if "steps_offset" in peer.CLASSES[name] and name in (*peer.INDEXED, "UniPCMultistepScheduler"):
        same_grid(make, name, {"timestep_spacing": "leading"}, (300, 999, 1000))
    for schedule in ("scaled_linear", "squaredcos_cap_v2") if name != "EDMEulerScheduler" else ():
        karras = {"use_karras_sigmas": True} if "use_karras_sigmas" in peer.CLASSES[name] else {}
        same_grid(make, name, {"beta_schedule": schedule, "beta_start": 0.0009, "beta_end": 0.015, **karras}, (1, 9, 20))


@pytest.mark.parametrize(("name", "keys"), MORE, ids=str)
def test_other_keys_are_those_of_diffusers(name, keys, make):
    same_grid(make, name, keys, (1, 2, 4) if "trained_betas" in keys else (1, 4, 6, 20, 31))


def test_zero_snr_tables(make):
    """Its square root is a unit in the last place off in PyTorch, so these are not equal to the bit."""
    for name in ("DDIMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"):
        s, theirs = read(name, rescale_betas_zero_snr=True), make(name, rescale_betas_zero_snr=True)
        np.testing.assert_allclose(s.alpha_bar, theirs.alphas_cumprod, rtol=1e-5, atol=0)
        assert s.alpha_bar[-1] == (0 if name == "DDIMScheduler" else 2.0**-24)


@pytest.mark.parametrize("keys", SPACED, ids=str)
@pytest.mark.parametrize("steps", [7, 20, 300])
def test_the_previous_index_of_ddpm(keys, steps, make):
    theirs = make("DDPMScheduler", **keys)
    theirs.set_timesteps(steps)
    g = peer.grid(read("DDPMScheduler", **keys), steps)
    assert [int(theirs.previous_timestep(t)) for t in theirs.timesteps] == g.previous.tolist()


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("DDPMScheduler", {"beta_schedule": "exp"}),
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True, "use_beta_sigmas": True}),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver"}),
        ("DPMSolverSinglestepScheduler", {"algorithm_type": "sde-dpmsolver"}),
        ("DEISMultistepScheduler", {"algorithm_type": "sde-dpmsolver"}),
    ],
)
def test_what_diffusers_refuses(name, keys, make):
    assert read(name, **keys).refused
    with pytest.raises((ValueError, NotImplementedError)):
        make(name, **keys)


def run(theirs, w, x, noise, mean=0.3, std=0.4, eta=0.0):
    """x through the scheduler with the perfect model of N(mean, std²) at each label, and the noises given."""
    import torch

    name, module = type(theirs).__name__, sys.modules[type(theirs).__module__]
    x = torch.tensor(x)
    for i, t in enumerate(theirs.timesteps):
        seen = theirs.scale_model_input(x, t).double().numpy()
        a, n = w.label_signal[i], w.label_noise[i]
        if name == "EDMEulerScheduler":
            seen = seen * np.hypot(n, 0.5)
        total = (a * std) ** 2 + n**2
        x0, eps = mean + a * std**2 * (seen - a * mean) / total, n * (seen - a * mean) / total
        m = {"eps": eps, "x0": x0, "v": a * eps - n * x0}[w.prediction]
        if name == "EDMEulerScheduler":
            m = (x0 - 0.25 / (n**2 + 0.25) * seen) / (n * 0.5 / np.hypot(n, 0.5))
        options = {"eta": eta} if name == "DDIMScheduler" else {}
        z = torch.tensor(noise[i])
        if eta or getattr(theirs.config, "algorithm_type", "").startswith("sde"):
            options["variance_noise"] = z
        elif hasattr(module, "randn_tensor"):
            module.randn_tensor = lambda *_, z=z, **__: z
        x = theirs.step(torch.tensor(m), t, x, **options).prev_sample
    return x.double().numpy()


def ours(w, x, noise, mean=0.3, std=0.4):
    kx, k0, ex, e0 = check._gaussian_model(w, std)
    kept = [np.zeros_like(x)] * 3
    for i in range(len(w)):
        x0, eps = kx[i] * x + k0[i] * mean, ex[i] * x + e0[i] * mean
        past = sum(w.H[i, k] * kept[k] for k in range(3))
        x = w.A[i] * x + w.B0[i] * x0 + w.Be[i] * eps + past + w.c[i] * noise[i]
        kept = [x0 if w.history == "x0" else eps, *kept[:2]]
    return x


DPM = "DPMSolverMultistepScheduler"
RUNS = [
    ("DDPMScheduler", {"timestep_spacing": "trailing", "variance_type": "fixed_large"}),
    ("DDPMScheduler", {"variance_type": "fixed_small_log", "prediction_type": "v_prediction", "timestep_spacing": "linspace"}),
    ("DDIMScheduler", {"timestep_spacing": "linspace"}),
    ("DDIMScheduler", {"timestep_spacing": "trailing", "set_alpha_to_one": False, "prediction_type": "sample"}),
    ("DDIMScheduler", {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}),
    ("DDIMInverseScheduler", {"timestep_spacing": "trailing"}),
    ("EulerDiscreteScheduler", {}),
    ("EulerDiscreteScheduler", {"timestep_spacing": "leading", "use_karras_sigmas": True}),
    ("EulerDiscreteScheduler", {"interpolation_type": "log_linear"}),
    ("EulerAncestralDiscreteScheduler", {"timestep_spacing": "trailing", "prediction_type": "v_prediction"}),
    ("HeunDiscreteScheduler", {"use_karras_sigmas": True}),
    ("KDPM2DiscreteScheduler", {}),
    ("LMSDiscreteScheduler", {}),
    ("EDMEulerScheduler", {}),
    (DPM, {"solver_order": 3}),
    (DPM, {"solver_type": "heun", "use_karras_sigmas": True, "beta_schedule": "scaled_linear"}),
    (DPM, {"algorithm_type": "sde-dpmsolver++", "solver_order": 3, "euler_at_final": True}),
    (DPM, {"algorithm_type": "dpmsolver", "solver_order": 3, "final_sigmas_type": "sigma_min", "timestep_spacing": "trailing"}),
    (DPM, {"algorithm_type": "sde-dpmsolver", "solver_type": "heun", "final_sigmas_type": "sigma_min"}),
]


@pytest.mark.parametrize(("name", "keys"), RUNS, ids=str)
@pytest.mark.parametrize("steps", [7, 20])
def test_rows_do_what_diffusers_does(name, keys, steps, make, monkeypatch):
    """The whole walk, faults and all: the last state of both from the same x_T and noises."""
    theirs = make(name, **({"clip_sample": False} if name.startswith("DD") else {}), **keys)
    theirs.set_timesteps(steps)
    monkeypatch.setattr(sys.modules[type(theirs).__module__], "randn_tensor", None, raising=False)
    s, eta = read(name, **keys), 0.7 if name == "DDIMScheduler" else 0.0
    g = peer.grid(s, steps)
    w = walk(s, g, eta)
    rng = np.random.default_rng(0)
    x, noise = rng.standard_normal((1, 3, 4, 4)), rng.standard_normal((len(w), 1, 3, 4, 4))
    scaled = "solver_order" not in s.config and g.sigmas is not None and name != "EDMEulerScheduler"  # the state is x/√ᾱ
    first, last = (1 / w.signal[0], w.signal_to[-1]) if scaled else (1.0, 1.0)
    got = run(theirs, w, x * first, noise, eta=eta) * last
    np.testing.assert_allclose(ours(w, x, noise), got, atol=2e-4 if "sde" in str(keys) else 3e-5)
    if scaled:
        assert float(theirs.init_noise_sigma) * w.signal[0] == pytest.approx(w.start_std, rel=1e-5)


TRAPS = [
    (1, "DDIMScheduler", 20, {"timestep_spacing": "linspace"}),
    (1, "DDIMScheduler", 7, {"timestep_spacing": "trailing"}),
    (1, "PNDMScheduler", 20, {"timestep_spacing": "linspace"}),
    (1, "DDIMInverseScheduler", 7, {"timestep_spacing": "trailing"}),
    (2, "DDPMScheduler", 10, {"variance_type": "fixed_large", "timestep_spacing": "trailing"}),
    (2, "DDPMScheduler", 50, {"variance_type": "fixed_large", "steps_offset": 1}),
    (3, "DDPMScheduler", 10, {"variance_type": "fixed_large_log"}),
    (3, "DDPMScheduler", 10, {"variance_type": "fixed_small_log"}),
    (4, "UniPCMultistepScheduler", 10, {"solver_type": "bh1"}),
    (5, "DDIMScheduler", 1000, {"steps_offset": 1}),
    (5, "DDPMScheduler", 1000, {"steps_offset": 1}),
    (5, DPM, 1000, {"timestep_spacing": "leading"}),
    (6, "EulerDiscreteScheduler", 10, {}),
    (6, DPM, 10, {}),
    (7, "DDPMScheduler", 50, {"num_train_timesteps": 100}),
    (7, "DDIMScheduler", 50, {"num_train_timesteps": 200}),
    (8, DPM, 20, {"solver_order": 3}),
]


@pytest.mark.parametrize(("trap", "name", "steps", "keys"), TRAPS, ids=str)
def test_every_trap_is_named(trap, name, steps, keys):
    found = report(name, steps, **keys)
    assert trap in {f.trap for f in found}
    assert {f.trap for f in found} <= {trap, None, 6}


SANE = [
    ("DDPMScheduler", 50, {}),
    ("DDPMScheduler", 10, {"variance_type": "fixed_large"}),
    ("DDPMScheduler", 10, {"timestep_spacing": "trailing"}),
    ("DDPMScheduler", 20, {"timestep_spacing": "linspace", "variance_type": "fixed_large"}),
    ("DDIMScheduler", 20, {}),
    ("DDIMScheduler", 500, {"steps_offset": 1}),
    ("DDIMScheduler", 20, {"timestep_spacing": "trailing"}),
    ("DDIMScheduler", 30, {}),
    ("DDIMInverseScheduler", 20, {}),
    ("UniPCMultistepScheduler", 10, {}),
    ("UniPCMultistepScheduler", 10, {"solver_type": "bh1", "final_sigmas_type": "sigma_min"}),
    ("HeunDiscreteScheduler", 20, {"beta_start": 1e-4, "beta_end": 0.02}),
    ("DDPMScheduler", 100, {"num_train_timesteps": 100, "beta_start": 1e-3, "beta_end": 0.2}),
]


@pytest.mark.parametrize(("name", "steps", "keys"), SANE, ids=str)
def test_no_trap_is_named_without_reason(name, steps, keys):
    found = report(name, steps, **keys)
    assert all(f.trap is None and f.severity == "note" for f in found), found


def test_trap_1_as_diffusers_runs(make):
    """19 of 20 steps go to another time than the next one, and the result is far from DDIM's on that grid."""
    name, keys = "DDIMScheduler", {"timestep_spacing": "linspace"}
    f = only(report(name, 20, **keys), "previous")
    theirs = make(name, clip_sample=False, **keys)
    theirs.set_timesteps(20)
    t = theirs.timesteps.numpy()
    assert np.sum(t[:-1] - 1000 // 20 != t[1:]) == 19 and "19 of 20" in f.message and f.severity == "error"
    s = read(name, **keys)
    w = walk(s, peer.grid(s, 20))
    x = np.random.default_rng(1).standard_normal((1, 1, 8, 8))
    a = np.sqrt(s.alpha_bar[t.astype(int)])
    n = np.sqrt(1 - a**2)
    right = replace(w, signal_to=np.r_[a[1:], 1], noise_to=np.r_[n[1:], 0], B0=np.r_[a[1:], 1], Be=np.r_[n[1:], 0])
    none = np.zeros((20, 1))
    assert np.abs(run(theirs, w, x, np.zeros((20, *x.shape))) - ours(right, x, none)).max() > 0.01


@pytest.mark.parametrize(("steps", "keys"), [(10, {"timestep_spacing": "trailing"}), (50, {"steps_offset": 1}), (10, {})])
def test_trap_2_as_diffusers_runs(steps, keys, make):
    """The deviation of two last states from the same last but one."""
    import torch

    theirs = make("DDPMScheduler", variance_type="fixed_large", **keys)
    theirs.set_timesteps(steps)
    x, out = torch.zeros(1, 1, 300, 300, dtype=torch.float64), []
    for seed in (0, 1):
        out.append(theirs.step(x, theirs.timesteps[-1], x, generator=torch.Generator().manual_seed(seed)).prev_sample)
    measured = float((out[0] - out[1]).std()) / np.sqrt(2)
    found = [f for f in report("DDPMScheduler", steps, variance_type="fixed_large", **keys) if f.trap == 2]
    assert [f.value for f in found] == ([pytest.approx(measured, rel=0.02)] if keys else []) and (measured > 0) == bool(keys)


def test_traps_3_to_7_as_diffusers_runs(make):
    import torch

    x = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    log = make("DDPMScheduler", variance_type="fixed_large_log")
    log.set_timesteps(10)
    assert log.step(x, log.timesteps[0], x).prev_sample.isnan().all()
    small = make("DDPMScheduler", variance_type="fixed_small_log")
    assert small._get_variance(500) ** 2 == pytest.approx(float(make("DDPMScheduler")._get_variance(500)), rel=1e-4)
    for keys in ({"solver_type": "bh1"}, {"predict_x0": False}, {"lower_order_final": False}, {}, {"solver_type": "bh2"}):
        for last in ("zero", "sigma_min"):
            unipc, y = make("UniPCMultistepScheduler", final_sigmas_type=last, **keys), x
            unipc.set_timesteps(10)
            for t in unipc.timesteps:
                y = unipc.step(y, t, y).prev_sample
            found = report("UniPCMultistepScheduler", 10, final_sigmas_type=last, **keys)
            assert (not y.isfinite().all()) == ("nan" in codes(found)), (keys, last)
    offset = make("DDIMScheduler", steps_offset=1)
    offset.set_timesteps(1000)
    with pytest.raises(IndexError):
        offset.step(x, offset.timesteps[0], x)
    zeros = make(DPM, timestep_spacing="leading")
    zeros.set_timesteps(1000)
    assert not zeros.timesteps.any()
    for name in peer.CLASSES:
        out, keys = [], {"PNDMScheduler": {"skip_prk_steps": True}, DPM: {"prediction_type": "sample"}}.get(name, {})
        for state in (x, x * (1 + 1e-10)):  # one state in float32
            theirs = make(name, **keys)
            theirs.set_timesteps(4)
            theirs.scale_model_input(state, theirs.timesteps[0])
            torch.manual_seed(0)
            out.append(theirs.step(x / 9, theirs.timesteps[0], state).prev_sample)
        assert torch.equal(*out) == (6 in {f.trap for f in report(name, 4)}), name
    f = next(f for f in report("EulerDiscreteScheduler", 4) if f.trap == 6)
    assert f.value == pytest.approx(abs((1 - float(make("EulerDiscreteScheduler").alphas_cumprod[0])) / 1e-4 - 1), rel=0.01)
    left = float(make("DDPMScheduler", num_train_timesteps=100).alphas_cumprod[-1])
    f = only(report("DDPMScheduler", 50, num_train_timesteps=100), "prior")
    assert f.value == pytest.approx(-0.5 * np.log1p(-left), rel=1e-3) and left == pytest.approx(0.364, abs=1e-3)


def test_trailing_makes_one_time_too_many(make):
    """62 of the numbers of steps up to 1000 do, such as 61: the last time is −1."""
    theirs = make("DDIMScheduler", timestep_spacing="trailing")
    theirs.set_timesteps(61)
    assert len(theirs.timesteps) == 62 and int(theirs.timesteps[-1]) == -1
    f = only(report("DDIMScheduler", 61, timestep_spacing="trailing"), "range")
    assert f.severity == "error" and f.row == 61 and f.value == -1


def test_karras_with_cosine_repeats_times(make):
    keys = {"use_karras_sigmas": True, "beta_schedule": "squaredcos_cap_v2"}
    theirs = make(DPM, **keys)
    theirs.set_timesteps(20)
    repeated = 20 - len(set(theirs.timesteps.tolist()))
    found = report(DPM, 20, **keys)
    assert f"{repeated} of 20" in only(found, "duplicate").message and only(found, "label").severity == "warning"


def test_solvers_that_end_above_clean_data():
    f = only(report("DEISMultistepScheduler", 20), "residual")
    assert f.severity == "note" and f.value == pytest.approx(0.01, rel=1e-3)
    assert "idle" in codes(report("DEISMultistepScheduler", 20, use_karras_sigmas=True))
    assert "nan" in codes(report(DPM, 20, use_karras_sigmas=True, final_sigmas_type="sigma_min", solver_type="heun"))
    f = only(report("DDIMScheduler", 20, set_alpha_to_one=False), "residual")
    assert f.severity == "note" and f.trap is None


def test_zero_snr_and_eps_in_files():
    for name in ("DDIMScheduler", "EulerDiscreteScheduler"):
        keys = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        assert only(report(name, 10, **keys), "zero-snr").severity in ("error", "warning")
        assert "zero-snr" not in codes(report(name, 10, prediction_type="v_prediction", **keys))


def test_keys_that_are_not_understood():
    found = report("PNDMScheduler", 50, clip_sample=False, magic=3, skip_prk_steps=True)
    assert "magic" in only(found, "unknown").message and "clip_sample" in only(found, "ignored").message
    found = report(DPM, 20, use_flow_sigmas=True, prediction_type="flow_prediction")
    assert [f.code for f in found] == ["unknown"] and found[0].severity == "warning"
    assert only(report("HeunDiscreteScheduler", 20), "betas").severity == "note"
    assert only(report("DDPMScheduler", 20, beta_end=2.0), "betas").severity == "error"
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler is not understood"):
        read("FlowMatchEulerDiscreteScheduler")
    with pytest.raises(ValueError, match="no _class_name"):
        peer.read({"sample_size": 32})
    for keys in (
        {"beta_end": "x"},
        {"num_train_timesteps": 0},
        {"timestep_spacing": "even"},
        {"clip_sample": 1},
        {"trained_betas": []},
    ):
        with pytest.raises(ValueError, match=next(iter(keys))):
            read("DDPMScheduler", **keys)


# -------------------------------------------------------------------------------------------------------------------- the command


def call(capsys, *words):
    code = tool.main([str(w) for w in words])
    out = capsys.readouterr()
    assert "Traceback" not in out.err and out.err.count("\n") <= 1
    return code, out.out, out.err


def file(folder, name="DDIMScheduler", **keys):
    path = folder / "scheduler_config.json"
    path.write_text(json.dumps({"_class_name": name, **keys}))
    return path


def test_the_default(capsys):
    code, out, _ = call(capsys)
    assert code == 0 and "ddim(steps=50, leading, eta=0)" in out and "2.91e-05 bits/dim" in out and "30 more rows" in out
    assert "variance 0.929449" in out  # of the closed form, in test_the_law_of_gaussian_data


@pytest.mark.parametrize(
    "words",
    [
        *([name, "--steps", "6"] for name in tool.OWN if name not in ("langevin",)),
        ["dpm++", "--steps", "10", "--order", "3", "--spacing", "karras"],
        ["ddpm", "--variance", "beta", "--schedule", "cosine", "--rows", "0"],
        ["ddim", "--grid", "1,250,500,1000", "--eta", "1", "--prediction", "v"],
        ["ddim", "--set", "sigma=hat", "--T", "200", "--rescale"],
        ["pc", "--sde", "vp", "--steps", "20"],
        ["heun", "--sde", "edm", "--spacing", "karras", "--prediction", "F", "--set", "churn=40", "--steps", "18"],
        ["em", "--sde", "ve", "--range", "0.01,50", "--steps", "400"],
        ["ddim", "--sde", "subvp", "--spacing", "trailing", "--T", "1000"],
        ["langevin", "--ladder", "0.01,50,232", "--steps", "2"],
        ["ab", "--prediction", "epsilon", "--schedule", "scaled_linear", "--beta-end", "0.012"],
    ],
    ids=str,
)
def test_our_samplers(words, capsys):
    code, out, _ = call(capsys, *words)
    assert code in (0, 1) and ("x' = A·x" in out) and "indings" in out
    assert code == int("warning  " in out or "error  " in out)


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["ddpm", "--T", "100"], "[trap 7]"),
        (["dpm++", "--order", "3"], "[trap 8]"),
        (["ddim", "--grid", "1,5,5,3"], "out of order"),
        (["ddim", "--zero-snr", "--spacing", "trailing"], "no signal is left"),
        (["heun", "--zero-snr"], "no signal is left"),
    ],
    ids=str,
)
def test_faults_of_ours(words, shown, capsys):
    code, out, _ = call(capsys, *words)
    assert shown in out and code == (0 if "8" in shown else 1)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["nosuch"], "neither a sampler"),
        (["flow"], "no table"),
        (["ddim", "--order", "2"], "it goes with"),
        (["ddim", "--steps", "2000"], "steps must be in 1..1000"),
        (["ddim", "--grid", "a"], "--grid"),
        (["ddim", "--grid", "1,2", "--steps", "3"], "takes the place"),
        (["ddim", "--set", "magic=1"], "does not take magic"),
        (["ddim", "--set", "magic"], "key=value"),
        (["ddim", "--clip"], "--clip goes with"),
        (["ddim", "--ladder", "1,2"], "--ladder takes"),
        (["ddim", "--sde", "vp", "--schedule", "cosine"], "does not go with"),
        (["ddim", "--range", "1,2"], "--range takes"),
        (["ddim", "--beta-start", "0"], "beta must lie in"),
        (["ddim", "--schedule", "cosine", "--beta-end", "0.1"], "does not go with"),
        (["langevin"], "needs a ladder"),
        (["nosuch.json"], "No such file"),
        (["--config", "nosuch.toml"], "No such file"),
        (["/dev/null"], "/dev/null"),
    ],
    ids=str,
)
def test_mistakes(words, reason, capsys):
    code, _, err = call(capsys, *words)
    assert code == 2 and reason in err


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"a": 1}', '{"_class_name": 3}', '{"_class_name": "UNet2DModel"}', "\ud800"])
def test_files_that_are_no_scheduler(text, tmp_path, capsys):
    path = tmp_path / "x.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    code, _, err = call(capsys, path)
    assert code == 2 and "x.json" in err


def test_a_diffusers_file(tmp_path, capsys):
    path = file(tmp_path, timestep_spacing="linspace")
    code, out, _ = call(capsys, path, "--steps", "20")
    assert code == 1 and "19 of 20" in out and "[trap 1]" in out and "t − T//S = t − 50" in out
    (tmp_path / "scheduler").mkdir()
    file(tmp_path / "scheduler")
    assert call(capsys, tmp_path / "scheduler")[0] == 0  # the folder of the file, or of the pipeline
    path.unlink()
    code, out, _ = call(capsys, tmp_path, "--spacing", "trailing", "--steps", "7", "--no-clip")
    assert code == 1 and "[trap 1]" in out and "\n  clip" not in out
    code, out, _ = call(capsys, tmp_path, "--set", "steps_offset=1", "--steps", "1000")
    assert code == 1 and "[trap 5]" in out
    assert call(capsys, tmp_path, "--T", "5")[0] == 2 and call(capsys, tmp_path, "--set", "beta_end=[1]")[0] == 2
    file(tmp_path, "EDMEulerScheduler")
    assert call(capsys, tmp_path)[0] == 0 and call(capsys, tmp_path, "--eta", "0.5")[0] == 2


def test_json_and_csv(tmp_path, capsys):
    path = file(tmp_path, "DDPMScheduler", variance_type="fixed_large_log", timestep_spacing="trailing")
    code, out, _ = call(capsys, path, "--steps", "25", "--json")
    values = json.loads(out)
    assert code == 1 and len(values["rows"]) == 25 and values["rows"][0]["c"] is None and values["timesteps"][0] == 999
    assert {f["trap"] for f in values["findings"]} == {3, None} and values["previous"][-1] == -1
    code, out, _ = call(capsys, "ddim", "--steps", "25", "--csv")
    lines = out.splitlines()
    assert code == 0 and len(lines) == 26 and lines[0].startswith("row,t,sigma,")
    table = tables.ddim(schedules.linear(), 25)
    column = lines[0].split(",").index("B0")
    assert [float(line.split(",")[column]) for line in lines[1:]] == table.B0.tolist()
    assert call(capsys, "ddim", "--grid", "5,5", "--csv")[0] == 2


def test_a_run(tmp_path, capsys):
    config = configs.from_words(["method=ncsn", "diffusion.sigma_max=20", "diffusion.levels=40", "sample.steps=3"])
    (tmp_path / "config.toml").write_text(configs.to_toml(config))
    saved = checkpoint.save(tmp_path / "step_00000001.h5", {"a/b": np.ones(1)}, {"config": configs.to_dict(config)})
    for words in ([tmp_path / "config.toml"], ["--config", tmp_path / "config.toml"], [saved], [tmp_path]):
        code, out, _ = call(capsys, *words)
        assert code == 0 and "40 levels 0.01..20" in out and "121 rows" in out
    code, out, _ = call(capsys, "heun", "--config", tmp_path / "config.toml", "--steps", "5")
    assert code == 0 and "heun(steps=5" in out
    assert call(capsys, tmp_path, "--T", "10")[0] == 2
    (tmp_path / "open.toml").write_text('method = "ncsn"\n')
    code, _, err = call(capsys, tmp_path / "open.toml")
    assert code == 2 and "the run's own config.toml" in err
    other = checkpoint.save(tmp_path / "other.h5", {"a/b": np.ones(1)}, {"kind": "else"})
    assert call(capsys, other)[0] == 2


def test_odd_files_end_without_a_traceback(tmp_path, capsys):
    rng = np.random.default_rng(0)
    odd = [None, -1, 0, 1, 3, 0.5, 1e9, "x", "linspace", True, [], [0.1, 0.2], {}, float("inf"), float("nan")]
    for _ in range(150):
        name = str(rng.choice(list(peer.CLASSES)))
        keys = {}
        for key in rng.choice(list(peer.CLASSES[name]), 2):
            choices = peer.CHOICES.get(key, odd)
            keys[str(key)] = choices[rng.integers(len(choices))]
        steps = int(rng.choice([1, 2, 3, 15, 61]))
        assert call(capsys, file(tmp_path, name, **keys), "--steps", steps, "--json")[0] in (0, 1, 2), (name, keys)


def test_help_says_the_exit_codes_and_the_traps(capsys):
    _, out, _ = call(capsys, "--help")
    assert "exit code: 0 without findings" in out and all(f"\n  {k}  " in out for k in range(1, 9))


def test_the_command_loads_no_framework():
    code = "import sys, alphabar.tools.check; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path.home()
    ).stdout.split()
    assert not {"torch", "diffusers", "numba", "cupy", "matplotlib", "scipy"} & set(loaded)
