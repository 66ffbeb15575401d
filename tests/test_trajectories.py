"""Step-by-step parity with the trajectories of diffusers, in the float64 recomputation stored beside them."""

import json
from pathlib import Path

import numpy as np
import pytest

from alphabar.core import samplers, schedules, tables

with np.load(Path(__file__).parent / "data" / "sampler_trajectories.npz") as stored:
    META = json.loads(str(stored["meta.json"]))
CASES = sorted(META)


def build(case, s):
    """(table, clip) of a stored case, from its name and the arguments of the diffusers scheduler."""
    kind, *rest = case.split("/")
    args, step = META[case]["args"], META[case].get("step", {})
    steps = int(next(part[1:] for part in rest if part.startswith("S")))
    if kind == "ddpm":
        variance = {"fixed_small": "posterior", "fixed_large": "beta"}[args["variance_type"]]
        return tables.ddpm(s, steps, variance, args["timestep_spacing"]), (-1.0, 1.0) if args["clip_sample"] else None
    if kind == "ddim":
        return tables.ddim(s, steps, step["eta"]), None
    if kind == "dpm":
        return tables.dpm_solver_pp(s, steps, args["solver_order"]), None
    spacing = "karras" if args.get("use_karras_sigmas") else args.get("timestep_spacing", "linspace")
    return {"euler": tables.euler, "heun": tables.heun}[kind](s, steps, spacing), None


@pytest.mark.parametrize("case", CASES)
def test_every_state_of_a_stored_trajectory(case, vectors, linear, gaussian, mixture):
    want = vectors[f"{case}/ref64"]
    table, clip = build(case, linear)
    if f"{case}/timesteps" in vectors:
        np.testing.assert_array_equal(table.t, vectors[f"{case}/timesteps"] + 1)
    a, n = (np.r_[level[:1], to] for level, to in ((table.signal, table.signal_to), (table.noise, table.noise_to)))
    if case.startswith(("euler", "heun")):  # stored in x/√ᾱ
        want = want * a[np.searchsorted(-n / a, -vectors[f"{case}/sigmas"] * (1 + 1e-9))].reshape(-1, 1, 1, 1, 1)
    w, m1, s1, m2, s2 = vectors["model/GMM"]
    data = gaussian(vectors["model/M"], vectors["model/S0"]) if "/gauss/" in case else mixture([w, 1 - w], [m1, m2], [s1, s2])
    model = data.model(linear)
    got = samplers.sample(model, table, want[0], noise=vectors.get(f"{case}/noise"), clip=clip, trajectory=True)
    if case.startswith("heun"):  # a step is two rows, the last one
        got = got[np.r_[0, np.arange(2, len(table), 2), len(table)]]
    assert got.dtype == np.float64 and got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-10 * np.abs(want).max())


def test_every_group_of_cases_is_stored():
    kinds = {case.split("/")[0] for case in CASES}
    assert kinds == {"ddpm", "ddim", "dpm", "euler", "heun"} and len(CASES) == 44


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "squaredcos_cap_v2", "zero_snr_scaled_linear"])
def test_schedules_agree_with_diffusers(name, vectors):
    s = {
        "linear": schedules.linear,
        "scaled_linear": schedules.scaled_linear,
        "squaredcos_cap_v2": schedules.cosine,
        "zero_snr_scaled_linear": lambda: schedules.zero_terminal_snr(schedules.scaled_linear()),
    }[name]()
    np.testing.assert_allclose(s.alpha_bar[1:], vectors[f"alphas_cumprod/{name}"], rtol=1e-10, atol=1e-17)


def test_grids_agree_with_diffusers(vectors):
    found = 0
    for key, want in vectors.items():
        if not key.startswith("grid/"):
            continue
        family, spacing, steps = key.removeprefix("grid/").split("_")
        steps = int(steps)
        if family == "ermon":
            continue
        if family == "ddim" or spacing == "trailing":
            got = schedules.timesteps(1000, steps, spacing)
        elif steps < 999:  # from 999 steps on, the stored grid repeats times
            got = schedules.timesteps(1000, steps + 1, spacing)[1:]
        else:
            continue
        np.testing.assert_array_equal(got[::-1] - 1, want, err_msg=key)
        found += 1
    assert found > 55
