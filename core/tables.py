"""Samplers as tables: one short function for each paper. Nothing here loops over an image or knows a device; see :class:`Table`.

Common arguments: ``s`` the process, a schedule, a ladder or an SDE; ``steps`` and ``spacing`` the times, "leading", "linspace",
"trailing" or "quadratic" as in :func:`schedules.timesteps`, or "karras" (with ``rho``), "logsnr" as in :func:`grids.sigma_times`;
or ``grid``, the ascending times themselves, in (0, T] (between whole times the levels are interpolated: :meth:`Schedule.levels`);
or ``sigmas``, the levels σ̄; ``prediction`` what the model returns: "eps", "x0", "v", "score" or "F" (:func:`convert.edm_model`).
Every sampler steps down its times and, unless it says so, from the lowest one to clean data.

The levels are a (signal) and n (noise), √ᾱ and √(1−ᾱ) for a schedule; σ̄ = n/a is the noise level of x/a, in which the
probability-flow ODE reads d(x/a) = ε dσ̄ (Eq: S2-E14).

A new sampler is ten lines: its steps written as in a paper, on states and outputs as symbols (:mod:`alphabar.core.rows`). An
exponential midpoint rule, with its middle halfway in λ = −ln σ̄:

    def exponential_midpoint(s, steps):
        path = levels_at(s, np.r_[grids.times(s, steps, "logsnr")[0][::-1], 0.0])
        rows = Rows(path[0])
        for now, to in pairwise(path):
            x, eps = rows.x, rows.ask()
            if to.n > 0:
                middle = levels_at(s, [s.time((now.sigma * to.sigma) ** 0.5)])[0]
                rows.go(middle, flow(x, now, middle, eps))
                eps = rows.ask()
            rows.go(to, flow(x, now, to, eps))
        return rows.table("exponential_midpoint", "eps")
"""

from .table import Table
from .tables_ancestral import ddim, ddim_encode, ddpm, euler_ancestral
from .tables_exponential import dpm_solver, dpm_solver_pp, sde_dpm_solver_pp, unipc
from .tables_flow import euler, heun, kdpm2, rk4
from .tables_multistep import adams_bashforth, deis, lms, plms, pndm
from .tables_sde import euler_maruyama, reverse_diffusion

__all__ = [
    "Table",
    "adams_bashforth",
    "ddim",
    "ddim_encode",
    "ddpm",
    "deis",
    "dpm_solver",
    "dpm_solver_pp",
    "euler",
    "euler_ancestral",
    "euler_maruyama",
    "heun",
    "kdpm2",
    "lms",
    "plms",
    "pndm",
    "reverse_diffusion",
    "rk4",
    "sde_dpm_solver_pp",
    "unipc",
]
