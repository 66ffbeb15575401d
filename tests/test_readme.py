"""What the README promises: its Python lines run, its commands are understood, its links lead somewhere."""

import argparse
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from alphabar.core import samplers, schedules
from alphabar.tools import cli, config

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)
COMMANDS = [
    line.partition("#")[0].strip()
    for block in re.findall(r"```sh\n(.*?)```", README, re.S)
    for line in block.splitlines()
    if line.startswith(("alphabar ", "python tools/"))
]


def block(word: str) -> str:
    """The one block of Python that holds a word."""
    (found,) = (b for b in BLOCKS if word in b)
    return found


def test_the_api_in_twenty_lines() -> None:
    names: dict = {}
    code = block("tables.dpm_solver_pp(")
    exec(code, names)
    assert len([line for line in code.splitlines() if line.strip()]) <= 22
    assert abs(names["x"].mean() - 0.7) < 0.01 and abs(names["x"].std() - 0.2) < 0.02  # the last table's samples


def test_scores_sdes_and_likelihood() -> None:
    names: dict = {}
    exec(block("GaussianMixture("), names)
    x, law, x0 = names["x"], names["law"], names["x0"]
    assert abs((x < 0).mean() - 0.2) < 0.05 and abs(abs(x).mean() - 4) < 0.05
    exact, flow, vlb = -law.log_prob(x0).mean(), -names["exact"].log_prob.mean(), names["vlb"].nats.mean()
    assert abs(flow - exact) < 0.01 and exact < vlb < exact + 1


def test_discrete_states() -> None:
    names: dict = {}
    exec(block("discrete_bound"), names)
    x, words, bound = names["x"], names["words"], names["bound"]
    share = (x[:, None] == words).all(axis=2).mean(axis=0)
    assert share.sum() > 0.99 and np.abs(share - 1 / 3).max() < 0.04
    assert -4 * bound.error < bound.bits - np.log2(3) / 3 < 0.02 + 4 * bound.error
    assert np.isneginf(names["log_q"]).any() and np.allclose(np.exp(names["log_q"]).sum(axis=-1), 1)


def test_a_new_solver(gaussian: type, linear: schedules.Schedule) -> None:
    names: dict = {}
    code = block("def exponential_midpoint")
    exec(code, names)
    assert len(code.partition("def ")[2].strip().splitlines()) <= 12
    data, x_T = gaussian(0.7, 0.2), samplers.prior((50, 1), dtype=np.float64)
    exact = data.flow(x_T, linear.signal[-1], linear.noise[-1], *linear.levels(1))
    errors = []
    for steps in (10, 20, 40):
        table = names["exponential_midpoint"](linear, steps)
        states = samplers.sample(data.model(linear), table, x_T, trajectory=True)
        errors.append(np.abs(states[-2] - exact).max())  # before the last step, to clean data
    assert errors[0] / errors[1] > 3.3 and errors[1] / errors[2] > 3.3


def test_network_lines(tmp_path: Path) -> None:
    from alphabar import nets

    made = nets.UNet(image_size=16, in_channels=3, channels=(16, 32), blocks=1, groups=8)
    nets.save_diffusers_unet(made, tmp_path)
    x = np.zeros((2, 32, 32, 3), np.float32)
    code = block("load_diffusers_unet(").replace("folder-with-config-and-safetensors", str(tmp_path))
    names: dict = {"x": x, "t": np.array([1, 1000]), "y": np.array([3, 10])}
    exec(code, names)
    assert names["eps"].shape == x.shape and names["net"].config["channels"] == [16, 32]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_understood(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Parsed(BaseException):
        pass

    def parse(self: argparse.ArgumentParser, arguments: list[str] | None = None) -> None:
        raise Parsed(original(self, arguments))

    original = argparse.ArgumentParser.parse_args
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    words = shlex.split(command)
    arguments = words[1:] if words[0] == "alphabar" else [Path(words[1]).stem.replace("_", "-"), *words[2:]]
    with pytest.raises(Parsed) as parsed:
        cli.main(arguments)
    if arguments[0] == "train":
        given = parsed.value.args[0]
        config.load(None, [*([f"data.path={given.data}"] if given.data else []), *given.set])  # every setting named there exists


def test_links_and_pictures_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if "://" not in target:
            assert (ROOT / target).exists(), target


def test_the_table_is_what_was_measured() -> None:
    measured = (ROOT / "bench" / "results" / "cpu.md").read_text(encoding="utf-8").splitlines()
    for first in ("| kernel ", "| network "):
        (shown,) = (block.splitlines() for block in README.split("\n\n") if block.startswith(first))
        assert len(shown) > 10 and set(shown) <= set(measured)
