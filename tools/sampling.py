"""Drawing images from a trained network: shared by the trainer's sheets and by the sampling program."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from alphabar.core import analytic, guidance, langevin, ode, predictor_corrector, samplers, tables, variance
from alphabar.core.levels import Ladder, Levels, Schedule
from alphabar.core.sde import VESDE, VPSDE
from alphabar.kernels.arrays import array_module, native, to_numpy
from alphabar.tools.config import CHURNED, ORDERS, SAMPLERS, Sample
from alphabar.tools.methods import CLIP, Process, own_steps
from alphabar.tools.networks import Network

Array = Any
Model = Callable[[Array, Array], Array]

TABLES: dict[str, Callable[..., tables.Table]] = {
    "ddim": tables.ddim,
    "ddpm": tables.ddpm,
    "euler": tables.euler,
    "euler-a": tables.euler_ancestral,
    "heun": tables.heun,
    "kdpm2": tables.kdpm2,
    "rk4": tables.rk4,
    "dpm": partial(tables.dpm_solver, final="data"),
    "dpm++": tables.dpm_solver_pp,
    "dpm++sde": tables.sde_dpm_solver_pp,
    "unipc": tables.unipc,
    "ab": tables.adams_bashforth,
    "deis": tables.deis,
    "lms": tables.lms,
    "pndm": tables.pndm,
    "plms": tables.plms,
    "em": tables.euler_maruyama,
    "rd": tables.reverse_diffusion,
    "pc": tables.reverse_diffusion,  # its predictor
    "learned": tables.ddpm,  # its means; the variance is the network's
}
LEADING = ("ddim", "ddpm", "pndm", "plms", "learned")  # their own spacing, that of their papers
SPACINGS = ("leading", "linspace", "trailing", "quadratic", "karras", "logsnr", "optimal")
ANALYTIC = ("ddpm", "ddim", "euler", "euler-a")  # they take the best variance for their network
FORMS = ("score", "mean")
Interval = tuple[float, float] | None


@dataclass(frozen=True)
class Sampler:
    """A sampler with its settings: run(model, x_T, seed=, first_sample=, progress=) -> x_0, ``rows`` steps of progress.

    ``table``: the table that it runs, and nothing else. ``learned``: its model answers with the prediction and v.
    """

    name: str
    rows: int
    run: Callable[..., Array]
    table: tables.Table | None = None
    learned: bool = False


def sampler(process: Any, settings: Sample, spacing: str | None = None, gamma: analytic.Gamma | None = None) -> Sampler:
    """The sampler that ``settings`` ask for, on the levels of a process. ValueError for steps or spacing that it cannot take.

    A process of another kind than :class:`~alphabar.tools.methods.Process` brings its own sampler, and its own guidance.

    A step count of 0 is the sampler's own. All but "flow" clip the predicted x0 to the range of the data, or bound it by
    ``settings.threshold``, and re-derive ε from it; the corrections of "pc" take the network's score as it is. With ``gamma`` the
    steps have the best variance for the network that it was measured on, in the place of their own; ``spacing`` "optimal" needs
    it too, and is the path of the least bound for ddpm, or for ddim with its eta.
    """
    if not isinstance(process, Process):
        return process.sampler(settings, spacing, gamma)
    s, name, prediction = process.levels, settings.sampler, process.prediction
    if name == "auto":
        name = "learned" if process.learned else SAMPLERS[process.name][0]
    steps = settings.steps or own_steps(s, name)
    if settings.eta and name != "ddim":
        raise ValueError(f"eta goes with the sampler ddim, not with {name}")
    if 0 < settings.interval_high < settings.interval_low:
        raise ValueError(f"interval_high must be 0 or at least interval_low ({settings.interval_low:g})")
    if name in ("langevin", "flow"):
        if spacing is not None:
            raise ValueError(f"spacing does not go with the sampler {name}")
        if name == "flow" and settings.steps:
            raise ValueError("steps do not go with the sampler flow, which chooses its own by its tolerance")
    if name in ("flow", "pc", "learned") and settings.threshold:
        raise ValueError(f"threshold does not go with the sampler {name}")
    if gamma is not None and name not in ANALYTIC:
        raise ValueError(f"the best variance goes with the samplers {', '.join(ANALYTIC)}, not with {name}")
    if spacing == "leading" and isinstance(s, (Ladder, VESDE)):
        raise ValueError(f"spacing leading does not go with {process.name}: samples must start at its largest noise level")
    if name == "flow":
        return Sampler(f"flow, tolerance {settings.tolerance:g}", 1, partial(_flow, s, prediction, settings.tolerance))
    threshold = settings.threshold or None
    if name == "langevin":
        if not isinstance(s, Ladder):
            raise ValueError(f"the sampler langevin needs a ladder of noise levels (method ncsn), not {process.name}")
        epsilon = settings.epsilon or step_size(s, steps)
        rows = langevin.annealed_langevin(s, steps, epsilon, prediction=prediction)
        return Sampler(f"langevin, {s.T} levels of {steps} steps", len(rows), partial(_table, rows, threshold))
    options: dict[str, Any] = {"eta": settings.eta} if name == "ddim" else {}
    if name in ORDERS:
        options["order"] = settings.order
    if name in CHURNED and settings.churn:
        options["churn"] = settings.churn
    if spacing is None and name in LEADING and process.name != "ddpm":
        spacing = "trailing"  # from T itself
    if spacing == "optimal":
        if gamma is None:
            raise ValueError("spacing optimal needs what was measured of the network for its best variance")
        options["grid"] = analytic.optimal_path(s, gamma, steps, settings.eta or 1.0)[0]
    elif spacing is not None:
        options["spacing"] = spacing
    if name == "learned":
        where = {"steps": steps, **options, "prediction": prediction}
        return Sampler(f"learned variance, {steps} steps", steps, partial(_learned, s, where), learned=True)
    rows = TABLES[name](s, steps, prediction=prediction, **options)
    if name == "pc":
        run = partial(_corrected, rows, s, settings.snr, settings.corrections)
        return Sampler(f"pc {steps} steps", len(rows), run)
    words = [f"{name} {steps} steps", *(f"{k} = {options[k]:g}" for k in ("eta", "churn") if options.get(k))]
    if options.get("order", 2) != 2:
        words.append(f"order {settings.order}")
    if gamma is not None:
        rows = analytic.analytic_table(rows, gamma, CLIP)
        words.append("best variance")
    return Sampler(", ".join(words), len(rows), partial(_table, rows, threshold), None if threshold else rows)


def step_size(ladder: Ladder, steps: int) -> float:
    """ε of annealed Langevin by technique 4 of Song & Ermon 2020. Eq: S4-C16."""
    high, low = float(ladder.sigma[-1]), float(ladder.sigma[1])
    return langevin.ncsnv2_settings(max_distance=high, dim=1, sigma_min=low, steps_per_level=steps, levels=ladder.T).epsilon


def _table(rows: tables.Table, threshold: float | None, model: Model, x_T: Array, clip: Interval = CLIP, **options: Any) -> Array:
    return samplers.sample(model, rows, x_T, clip=None if threshold else clip, threshold=threshold, **options)


def _learned(s: Levels, where: dict[str, Any], model: Model, x_T: Array, **options: Any) -> Array:
    return variance.sample_learned(model, s, x_T, clip=CLIP, **where, **options)


def _corrected(rows: tables.Table, s: Levels, snr: float, corrections: int, model: Model, x_T: Array, **options: Any) -> Array:
    return predictor_corrector.sample(model, rows, x_T, s, snr, corrections, clip=CLIP, **options)


def _flow(s: Levels, prediction: str, tolerance: float, model: Model, x_T: Array, progress: Any = None, **_: Any) -> Array:
    try:
        x = ode.decode(model, s, x_T, prediction, rtol=tolerance, atol=tolerance).x
    except RuntimeError as e:
        raise ValueError(str(e)) from e
    if progress is not None:
        progress(1, 1)
    return x


@dataclass(frozen=True)
class Guide:
    """How samples are guided to their labels: classifier-free, by a classifier, or both.

    weight: w of classifier-free guidance, rescaled by ``rescale``. gradient(labels): that of a classifier, with its weight and
    form: "score" adds to the score, "mean" moves the mean of each step. interval: of the noise levels σ̄ that are guided.
    """

    weight: float = 0.0
    rescale: float = 0.0
    interval: Interval = None
    gradient: Callable[[Array], Model] | None = None
    classifier_weight: float = 1.0
    form: str = "score"


def guide(settings: Sample, weight: float | None = None, **by_classifier: Any) -> Guide:
    """The guide that ``settings`` ask for, with another weight where one is given."""
    low, high = settings.interval_low, settings.interval_high
    interval = (low, high or np.inf) if low or high else None
    return Guide(settings.guidance if weight is None else weight, settings.rescale, interval, **by_classifier)


class _Split:
    """A network's prediction for guidance, which is not of v; v is that of the last call."""

    def __init__(self, predict: Callable[..., Array]) -> None:
        self.predict = predict
        self.v: Array = None

    def __call__(self, x: Array, t: Array, y: Any = None) -> Array:
        mean, self.v = variance.split(native(self.predict(x, t, y)))
        return array_module(mean).ascontiguousarray(mean)

    def joined(self, model: Model) -> Model:
        """``model`` of the prediction, and v; that of the conditional half where there are two."""

        def whole(x: Array, t: Array) -> Array:
            mean = native(model(x, t))
            return array_module(mean).concatenate([mean, self.v[: len(mean)]], axis=-1)

        return whole


def guided(process: Any, net: Network, chosen: Sampler, y: Array | None, how: Guide) -> tuple[Model, dict[str, Any]]:
    """(model(x, t) of samples with labels y, options of the sampler's run). ValueError for a form that it cannot take."""
    if not isinstance(process, Process):
        return process.guided(net, chosen, y, how)
    s = process.levels
    predict = process.predict(net.predict, whole=chosen.learned)
    mean = _Split(predict) if chosen.learned else predict
    model: Model = mean
    if y is not None and net.config["classes"] is not None:
        model = guidance.classifier_free(mean, y, how.weight, net.null, how.rescale, how.interval, s)
    options: dict[str, Any] = {}
    if how.gradient is not None:
        gradient = how.gradient(y)
        if how.form == "score":
            model = guidance.classifier_guided(model, gradient, s, how.classifier_weight, process.prediction, how.interval)
        elif how.interval is not None:
            raise ValueError("an interval goes with guidance of the form score, not mean")
        elif chosen.learned:
            options["guidance"] = lambda x, t: gradient(x, t) * how.classifier_weight
        elif chosen.table is None:
            raise ValueError(f"guidance of the form mean needs a sampler with fixed steps that clips x0, not {chosen.name}")
        else:
            model = guidance.mean_guided(model, gradient, chosen.table, how.classifier_weight, clip=CLIP)
            options["clip"] = None
    return mean.joined(model) if isinstance(mean, _Split) else model, options


def capturable(process: Any, chosen: Sampler, how: Guide) -> bool:
    """Whether the steps of a sampler are launches alone, always the same ones, so that a GPU can hold them as graphs.

    That is a table of steps for a network that reads the state as it is and answers with nothing but its prediction, with
    classifier-free guidance at all levels or none.
    """
    plain = isinstance(process, Process) and not process.learned and isinstance(process.levels, (Schedule, VPSDE))
    return plain and chosen.table is not None and how.gradient is None and how.interval is None and not how.rescale


class _Graphs:
    """The model of batches of one size, its steps as graphs that all of them share: the labels change in place."""

    def __init__(self, process: Any, net: Network, chosen: Sampler, how: Guide) -> None:
        self.process, self.net, self.chosen, self.how = process, net, chosen, how
        self.size = 0
        self.labels: Array = None
        self.told = False

    def model(self, y: Array | None, size: int) -> tuple[Model, dict[str, Any]]:
        """As :func:`guided`, for ``size`` samples."""
        from alphabar.core.captured import Captured

        if size == self.size:
            if y is not None:
                self.labels[...] = y
        else:
            self.size, self.labels, how = size, y, self.how
            if y is None and self.net.config["classes"] is not None:  # the labels of no class, there before the capture
                self.labels, how = self.net.params.xp.full(size, self.net.null), replace(how, weight=0.0)
            self.made, options = guided(self.process, self.net, self.chosen, self.labels, how)
            self.kept = Captured()
            self.options = {**options, "captured": self.kept}
        return self.made, dict(self.options)

    def tell(self) -> None:
        """Say once why steps could not be captured."""
        if self.kept.refused is not None and not self.told:
            print(f"alphabar: note: steps run one by one, not as graphs: {self.kept.refused}", file=sys.stderr)
            self.told = True


def draw(
    process: Any,
    net: Network,
    chosen: Sampler,
    labels: np.ndarray | None,
    n: int,
    seed: int = 0,
    weight: float = 0.0,
    batch: int = 64,
    progress: Callable[[int], Any] | None = None,
    how: Guide | None = None,
    known: tuple[np.ndarray, np.ndarray] | None = None,
) -> Iterator[np.ndarray]:
    """``n`` samples as blocks uint8 (≤ batch, …): images (H, W, C), or tokens. Sample k follows from (seed, k, labels[k]) alone.

    labels (n,), or None for a network without classes, or for one with classes the null class. weight: that of classifier-free
    guidance; ``how``, in its place, says more. progress(samples): called after each step with the size of the batch. known:
    (values, mask) of one sample, the part of it that is given, where the sampler can fill in the rest.
    Raises ValueError where a sample is not a number. (The steps of "flow" are chosen for a whole batch: there an image follows
    from its batch within the tolerance.) On a GPU steps are captured as graphs where they can be (:func:`capturable`); where that
    fails one line says why, and they run plainly.
    """
    xp = net.params.xp
    how = how or Guide(weight)
    graphs = _Graphs(process, net, chosen, how) if xp is not np and known is None and capturable(process, chosen, how) else None
    for start in range(0, n, batch):
        size = min(batch, n - start)
        y = None if labels is None else xp.asarray(labels[start : start + size])
        model, options = guided(process, net, chosen, y, how) if graphs is None else graphs.model(y, size)
        if known is not None:
            options["known"] = tuple(xp.asarray(np.broadcast_to(part, (size, *part.shape))) for part in known)
        x = chosen.run(
            model,
            process.prior(net, size, seed, start),
            seed=seed,
            first_sample=start,
            progress=None if progress is None else partial(_count, progress, size),
            **options,
        )
        yield to_numpy(process.decoded(net, x))
        if graphs is not None:
            graphs.tell()


def _count(progress: Callable[[int], Any], images: int, done: int, rows: int) -> None:
    progress(images)
