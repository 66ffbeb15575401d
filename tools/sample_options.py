"""The options of `alphabar sample`, and the configuration that they make of a run's."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from alphabar.nets.computing import COMPUTE
from alphabar.tools import config as configs
from alphabar.tools import gamma, sampling
from alphabar.tools.command import Parser, UserError, integer, real
from alphabar.tools.config import Config, Sample
from alphabar.tools.trained import Trained

EXAMPLES = """examples:
  alphabar sample runs/digits-001                                    64 images, every class in turn
  alphabar sample runs/digits-001 --class 3 --n 16 --out threes.png
  alphabar sample runs/digits-001/ckpt/step_00001500.h5 --n 1000 --steps 50 --class all --out digits.h5
  alphabar sample runs/digits-001 --sampler dpm++ --steps 12 --guidance 0.5
  alphabar sample runs/digits-001 --sampler unipc --order 3 --steps 10 --spacing logsnr
  alphabar sample runs/digits-001 --sampler ddpm --steps 25 --analytic --spacing optimal
  alphabar sample runs/digits-001 --guidance 4 --rescale 0.7 --interval 0.2 3
  alphabar sample runs/digits-001 --classifier runs/digits-001/classifier.h5 --classifier-weight 2 --class 8
  alphabar sample runs/digits-002 --sampler pc --steps 200 --set sample.snr=0.2
  alphabar sample runs/kjv-001 --n 8 --temperature 0.9 --out samples.txt              text
  alphabar sample runs/kjv-001 --infill "in the beginning ___ created the"            each _ is a letter to fill in
  alphabar sample runs/kjv-002 --classifier runs/kjv-002/classifier.h5 --class yes    text with a property, of diffusion-lm
Sample k follows from the seed, k and its class alone: --batch and --n change none of the others.
"""
N = {"images": 64, "text": 8}
IMAGES_ONLY = {  # options that mean nothing for text, and their values where not given
    "spacing": None,
    "analytic": False,
    "guidance": None,
    "classifier": None,
    "classifier_weight": 1.0,
    "classifier_form": "score",
    "classes": "all",
}
SAMPLE = ("sampler", "steps", "eta", "order", "threshold", "guidance", "rescale", "temperature")  # those that are settings


def parser() -> Parser:
    """The options."""
    parser = Parser(prog="alphabar sample", description="Draw images or text from a trained checkpoint.", epilog=EXAMPLES)
    parser.add_argument("checkpoint", type=Path, metavar="CKPT", help="checkpoint, run folder (its newest one) or folder of runs")
    parser.add_argument("--sampler", choices=tuple(configs.STEPS), help="default: the run's; langevin is for method ncsn only")
    parser.add_argument(
        "--steps", type=integer(1, 10**6), help="default: the run's, or the sampler's own; of langevin, those at each noise level"
    )
    parser.add_argument("--eta", type=real(0, 1), help="0 is deterministic DDIM, 1 is ancestral (ddim only)")
    parser.add_argument("--order", type=integer(1, 4), help=f"of {', '.join(configs.ORDERS)} (default 2)")
    parser.add_argument(
        "--spacing",
        choices=sampling.SPACINGS,
        help="of the times, or of the noise levels: karras, logsnr; default: the sampler's; optimal goes with --analytic",
    )
    parser.add_argument(
        "--analytic",
        action="store_true",
        help=f"the best variance for this network (Analytic-DPM), of {', '.join(sampling.ANALYTIC)}; what it needs is measured"
        f" once, on {gamma.IMAGES} images of the run, and kept in the checkpoint",
    )
    parser.add_argument(
        "--threshold", type=real(0, 1), metavar="P", help="dynamic thresholding of x0 at this quantile, such as 0.995"
    )
    parser.add_argument(
        "--guidance",
        type=real(-1, 1000),
        metavar="W",
        help="w in (1 + w)·eps_c - w·eps_u: 0 is none; default: the run's, with --classifier 0",
    )
    parser.add_argument("--rescale", type=real(0, 1), metavar="PHI", help="of the guided answer, against over-exposure")
    parser.add_argument(
        "--interval", type=real(0, 1e9), nargs=2, metavar=("LOW", "HIGH"), help="guide only where the noise level n/a is in it"
    )
    parser.add_argument(
        "--temperature", type=real(0.01, 100), metavar="T", help="divides the logits of discrete states (default 1)"
    )
    parser.add_argument("--classifier", type=Path, metavar="FILE", help="guide by a classifier of alphabar train-classifier")
    parser.add_argument("--classifier-weight", type=real(0, 1000), default=1.0, metavar="W", help="of its gradient (default 1)")
    parser.add_argument(
        "--classifier-form", choices=sampling.FORMS, default="score", help="score (default): any sampler; mean: one with noise"
    )
    parser.add_argument(
        "--class", dest="classes", default="all", help="all (in turn), none, or names or numbers such as 3 or 1,4"
    )
    parser.add_argument("--infill", metavar="TEXT", help="fill in the blanks of a text, one letter for each _ in it")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="another setting of [sample], e.g. sample.snr=0.2"
    )
    parser.add_argument("--n", type=integer(1, 10**9), help="number of samples (default: 64 images, 8 texts)")
    parser.add_argument("--seed", type=integer(0, 2**64 - 1), default=0)
    parser.add_argument("--batch", type=integer(1, 1 << 20), default=64, help="samples at a time: changes speed and memory only")
    parser.add_argument(
        "--out",
        type=Path,
        action="append",
        metavar="FILE",
        help=".h5, .png (images) or .txt (text), once for each; default: samples.h5 and samples.png, or samples.txt",
    )
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda or cuda:N")
    parser.add_argument("--precision", choices=COMPUTE, help="of the network, on a GPU; default: the one that it was trained in")
    parser.add_argument("--raw-weights", action="store_true", help="the last weights instead of their running average")
    parser.add_argument("--quiet", action="store_true", help="print errors only")
    return parser


def refuse(options: Any, names: Iterable[str], what: str) -> None:
    """UserError for the first of these options that is given."""
    for name in names:
        if getattr(options, name) != IMAGES_ONLY[name]:
            option = {"classes": "class"}.get(name, name.replace("_", "-"))
            raise UserError(f"--{option} {what}")


def chosen(options: Any, config: Config) -> Config:
    """The configuration with what the options say of sampling; another sampler than the run's begins with its own settings."""
    words = list(options.set)
    for word in words:
        if not word.startswith("sample."):
            raise UserError(f"--set takes settings of [sample] here, such as sample.snr=0.2, not {word!r}")
    given = {name: getattr(options, name) for name in SAMPLE}
    if options.interval is not None:
        given["interval_low"], given["interval_high"] = options.interval
    if options.classifier is not None and options.guidance is None and configs.belongs(config, "sample.guidance"):
        given["guidance"] = 0.0
    words += [f"sample.{name}={value}" for name, value in given.items() if value is not None]
    old, new = configs.sampler(config), configs.sampler(configs.from_words(words, config))
    if new != old:
        s = config.sample
        steps = s.steps if configs.STEPS[new] == configs.STEPS[old] else 0
        kept = {name: getattr(s, name) for name in ("guidance", "rescale", "interval_low", "interval_high")}
        config = dataclasses.replace(config, sample=Sample(sampler=new, steps=steps, **kept))
    return configs.load(None, words, config)


def stated(options: Any, network: Trained, config: Config) -> dict[str, Any]:
    """What a file of samples says of how they were drawn."""
    return {
        "checkpoint": network.path.name,
        "step": network.step,
        "weights": "raw" if options.raw_weights else "average",
        "method": config.method,
        "precision": network.net.computes,
        **{k: v for k, v in configs.to_dict(config)["sample"].items() if k not in ("guidance", "columns")},
    }
