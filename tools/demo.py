"""`alphabar demo`: what the documents claim, computed and drawn as one picture each."""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from alphabar.tools.command import Failure, Parser, UserError, integer, output, program
from alphabar.tools.demos import discrete, figures, forward, langevin, low_density, trajectories

DEMOS: dict[str, tuple[ModuleType, str]] = {
    "low-density": (low_density, "scores learned by sliced score matching fail where data are rare; noise cures it"),
    "langevin": (langevin, "plain Langevin dynamics loses the shares of two modes, annealed finds them"),
    "forward": (forward, "an image noised step by step: linear, cosine, ladder, with log-SNR"),
    "discrete": (discrete, "pixels and letters noised: uniform, absorbing, discretised Gaussian; what they remember"),
    "trajectories": (trajectories, "paths of an SDE and of its probability-flow ODE over the density, both ways"),
}
ALL = "all"


@program("demo")
def main(argv: Sequence[str] | None = None) -> int:
    """Run one demonstration, or all; without a name list them. Returns the exit code."""
    parser = _parser()
    given = parser.parse_args(argv)
    if given.demo is None:
        for name, (_, what) in DEMOS.items():
            print(f"  {name:<13} {what}")
        print(f"  {ALL:<13} every one of them, into the folder --out\n\nalphabar demo NAME --help shows the options of one")
        return 0
    figures.require()
    if given.demo != ALL:
        output(given.out)
        _demonstrate(given.demo, given)
        return 0
    try:
        given.out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--out {given.out}: {e.strerror or e}") from e
    for name in DEMOS:
        print(f"{name}: {DEMOS[name][1]}")
        alone = parser.parse_args([name, "--seed", str(given.seed), "--out", str(given.out / f"demo_{name}.png")])
        _demonstrate(name, alone)
        print()
    return 0


def _parser() -> Parser:
    parser = Parser(prog="alphabar demo", description=__doc__)
    names = parser.add_subparsers(dest="demo", metavar="NAME", title="demonstrations")
    for name, (demo, what) in DEMOS.items():
        one = names.add_parser(name, help=what, description=demo.__doc__)
        one.add_argument("--out", type=Path, default=Path(f"demo_{name}.png"), metavar="FILE.png", help="picture to write")
        one.add_argument("--seed", type=integer(0, 2**63), default=0, metavar="N", help="default 0")
        demo.options(one)
    every = names.add_parser(ALL, help="every one of them", description="Run every demonstration with its default settings.")
    every.add_argument("--out", type=Path, default=Path("."), metavar="FOLDER", help="folder of the pictures, made if missing")
    every.add_argument("--seed", type=integer(0, 2**63), default=0, metavar="N", help="default 0")
    return parser


def _demonstrate(name: str, given: Namespace) -> None:
    if given.out.suffix != ".png":
        raise UserError(f"--out must end in .png, not {given.out}")
    with figures.style():
        lines, page = DEMOS[name][0].run(given)
        print(*lines, sep="\n")
        try:
            print(f"wrote {figures.write(page, given.out)}")
        except OSError as e:
            raise Failure(f"{given.out}: {e.strerror or e}") from e


if __name__ == "__main__":
    raise SystemExit(main())
