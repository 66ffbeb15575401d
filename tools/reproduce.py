"""`alphabar reproduce`: the documents' tables and figures, computed here, beside what was published, as one report.

Published FIDs belong to networks trained on CIFAR-10 and CelebA; none of them is reproduced. What is checked is the shape of each
claim: on data whose exact network is known, and with --checkpoint on a trained network of method ddpm.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import alphabar
from alphabar.tools import pictures
from alphabar.tools.command import Failure, Parser, UserError, device, integer, program
from alphabar.tools.demos import figures
from alphabar.tools.files import replacing
from alphabar.tools.reproductions import (
    analytic,
    consistency,
    frechet,
    guidance,
    interpolation,
    reconstruction,
    report,
    timing,
)
from alphabar.tools.reproductions.network import Network
from alphabar.tools.reproductions.report import Section, Settings

PARTS: dict[str, tuple[ModuleType, str]] = {
    "frechet": (frechet, "Distance over steps and noise: the analogue of DDIM's Table 1"),
    "reconstruction": (reconstruction, "Encode and decode: the analogue of DDIM's Table 2"),
    "time": (timing, "Time over steps: DDIM's Figure 4"),
    "consistency": (consistency, "One x_T, several numbers of steps: DDIM's Figure 5"),
    "interpolate": (interpolation, "Between two codes: DDIM's interpolation"),
    "guidance": (guidance, "Fidelity and diversity over the guidance weight"),
    "analytic": (analytic, "The optimal variance: Analytic-DPM"),
}
EXAMPLES = """examples:
  alphabar reproduce                                        every part in closed form
  alphabar reproduce frechet analytic --out report
  alphabar reproduce --checkpoint runs/digits-001           and each part's trained network, a few minutes
"""


@program("reproduce")
def main(argv: Sequence[str] | None = None) -> int:
    """Compute the parts asked for, write the report; returns the exit code: 0 also where a claim's shape does not hold."""
    given = _parser().parse_args(argv)
    unknown = [name for name in given.names if name not in PARTS]
    if unknown:
        raise UserError(f"unknown part {unknown[0]!r}; the parts are {', '.join(PARTS)}")
    figures.require()
    xp, _ = device(given.device)
    network = None if given.checkpoint is None else Network(given.checkpoint, xp)
    settings = Settings(given.quick, given.seed, network)
    try:
        given.out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--out {given.out}: {e.strerror or e}") from e
    sections: dict[str, Section] = {}
    with figures.style():
        for name in PARTS:
            if given.names and name not in given.names:
                continue
            begun = time.monotonic()
            print(f"{name}: {PARTS[name][1]}", flush=True)
            sections[name] = PARTS[name][0].run(settings)
            for check in sections[name].checks:
                print(f"  {'holds ' if check.holds else 'DIFFERS'} {check.claim}: {check.found}")
            print(f"  {time.monotonic() - begun:.1f} s", flush=True)
        written = []
        try:
            for picture in (picture for section in sections.values() for picture in section.pictures):
                write = figures.write if hasattr(picture.page, "savefig") else pictures.write
                written.append(write(picture.page, given.out / f"reproduce_{picture.name}.png"))
            with replacing(given.out / "reproduce.md") as temporary:
                temporary.write_text(page(sections, settings), encoding="utf-8")
        except OSError as e:
            raise Failure(f"the report could not be written ({e.strerror or e})") from e
    for path in (*written, given.out / "reproduce.md"):
        print(f"wrote {path}")
    return 0


def page(sections: dict[str, Section], settings: Settings) -> str:
    """The report as Markdown."""
    network = settings.network
    told = "no trained network" if network is None else f"the trained network {network.name}"
    every = [check for section in sections.values() for check in section.checks]
    words = ["alphabar reproduce", *([] if len(sections) == len(PARTS) else sections), *(["--checkpoint RUN"] if network else [])]
    words += ["--quick"] * settings.quick + [f"--seed {settings.seed}"] * (settings.seed != 0)
    blocks = [
        "# The documents' tables and figures, computed",
        f"`{' '.join(words)}`, alphabar {alphabar.__version__}, with {told}, seed "
        f"{settings.seed}{', reduced sizes' if settings.quick else ''}.",
        "Each part says what the documents claim, what is computed here, and whether the claim's shape holds. The "
        "published FIDs were measured on networks trained on CIFAR-10 and CelebA, by features of Inception; they stand "
        "here for comparison, and **none of them is reproduced**. Ids such as S2-T1 are those of `alphabar equations`.",
        f"{sum(c.holds for c in every)} of {len(every)} shapes hold."
        + "".join(f"\n\n- Not this one: {c.claim}. Here: {c.found}." for c in every if not c.holds),
    ]
    for name, section in sections.items():
        blocks += [f"## {PARTS[name][1]}", f"**Claim.** {section.claim}", *section.body, report.checks(section.checks)]
        blocks += [f"![{picture.caption}](reproduce_{picture.name}.png)\n\n*{picture.caption}*" for picture in section.pictures]
    return "\n\n".join(blocks) + "\n"


def _parser() -> Parser:
    parser = Parser(prog="alphabar reproduce", description=__doc__, epilog=EXAMPLES)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(PARTS)}; default: all")
    parser.add_argument("--checkpoint", type=Path, metavar="RUN", help="checkpoint, run folder or folder of runs: a network too")
    parser.add_argument(
        "--out", type=Path, default=Path("reproduce"), metavar="FOLDER", help="made if missing (default reproduce)"
    )
    parser.add_argument("--quick", action="store_true", help="reduced sizes: a look in seconds")
    parser.add_argument("--seed", type=integer(0, 2**62), default=0, metavar="N", help="default 0")
    parser.add_argument("--device", default="auto", help="of the network: auto (default), cpu, cuda or cuda:N")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
