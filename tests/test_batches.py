"""What the host makes for training steps: made ahead or one by one, each batch is what its definitions say."""

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from alphabar.core import data, guidance
from alphabar.kernels import counter, stepping
from alphabar.tools import batches, families
from alphabar.tools import config as configs
from alphabar.tools.batches import Batches, rate
from alphabar.tools.trainer import Trainer

DIGITS = data.load("digits")
SMALL = ["model.channels=4,8", "model.blocks=1", "model.attention=4", "model.groups=2", "train.batch=3", "train.warmup=2"]
SETTINGS: dict[str, list[str]] = {
    "dropped and mirrored": ["train.p_uncond=0.5", "data.flip=true"],
    "one image, all dropped": ["train.batch=1", "train.p_uncond=1"],
    "no classes": ["model.conditional=false", "data.flip=true"],
    "labels as they are": ["train.p_uncond=0", "train.batch=70"],
    "times of the host": ["method=subvpsde", "train.weighting=likelihood"],
    "times of the host, no weight": ["method=vesde", "diffusion.sigma_max=9", "train.batch=1"],
    "past the last step": ["train.steps=4", "train.decay=linear", "train.weight_decay=0.1"],
}


def trainer(*settings: str, images: Any = DIGITS) -> Trainer:
    config = configs.load(None, [*SMALL, *settings])
    return Trainer(families.of(config).resolved(config, images), images)


def batches_of(t: Trainer, ahead: int) -> Batches:
    return Batches(t.config, t.data, t.process, t.net, t.optimiser, ahead)


def wanted(t: Trainer, k: int, lr: float) -> dict[str, np.ndarray | None]:
    """The parts of step ``k`` by the functions that define them."""
    c, o = t.config, t.optimiser
    images, labels, _ = t.data.batch(k, c.train.batch, c.train.seed, c.data.flip)
    decay = min(o.ema_decay, (1 + o.count) / (10 + o.count))
    parts: dict[str, np.ndarray | None] = dict.fromkeys(("labels", "t", "levels"))
    parts |= {"images": images, "row": stepping.adamw_row(lr, *o.betas, o.weight_decay, o.count + 1, decay)[None]}
    if t.conditional:
        parts["labels"] = guidance.drop_condition(labels, t.net.null, c.train.p_uncond, c.train.seed, k)
    if c.method != "ddpm":
        parts["t"], weight = t.process.times(c.train.batch, c.train.seed, k)
        parts["levels"] = batches.levels(t.process, parts["t"], weight)
    return parts


def check(made: Batches, t: Trainer, k: int, lr: float | None = None) -> None:
    """The batch of step ``k``, made now, is the wanted one."""
    lr = rate(t.config.train, k) if lr is None else lr
    found = made.laid_out(made.of(k, lr))
    for name, part in wanted(t, k, lr).items():
        ours = getattr(found, name)
        assert (ours is None) == (part is None), name
        assert part is None or (ours.dtype == part.dtype and np.array_equal(ours, part)), (name, k)


@pytest.mark.parametrize("ahead", [1, 5, batches.AHEAD])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_batch_is_what_its_definitions_say(name: str, ahead: int) -> None:
    t = trainer(*SETTINGS[name])
    made = batches_of(t, ahead)
    for k in range(12):
        check(made, t, k)
        t.optimiser.count += 1


def test_images_that_stay_in_their_file(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "d.h5", "w") as f:
        f["images"] = np.random.default_rng(0).integers(0, 256, (11, 8, 8, 3), np.uint8)
        f["labels"] = np.arange(11) % 4
    t = trainer("data.flip=true", images=data.load(tmp_path / "d.h5", memory=0))
    assert isinstance(t.data.images, data.Slices)
    made = batches_of(t, 6)
    for k in range(13):  # over the end of an epoch, with an order of its own
        check(made, t, k)
        t.optimiser.count += 1


def test_what_was_not_foreseen_is_made_anew() -> None:
    """Steps in any order, and another learning rate, number of updates or setting of the optimiser while batches wait."""
    t = trainer()
    made, o = batches_of(t, 8), t.optimiser
    for k in (0, 1, 2, 2, 1, 7, 8, 30, 31, 29, 0):
        check(made, t, k)
    check(made, t, 3, lr=0.125)
    check(made, t, 3)
    o.count += 7
    check(made, t, 4)
    for name, value in (("weight_decay", 0.25), ("ema_decay", 0.5), ("betas", (0.5, 0.75))):
        setattr(o, name, value)
        check(made, t, 4)


def test_what_was_foreseen_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers of a training in which nothing unusual happens, with warm-up and decay."""
    t, made, row = trainer("train.steps=12"), [], stepping.adamw_row
    monkeypatch.setattr(stepping, "adamw_row", lambda *numbers: (made.append(numbers), row(*numbers))[1])
    for _ in range(12):
        t.step()
    assert len(made) == batches.AHEAD == len(set(made))


def test_a_batch_that_could_not_be_made_leaves_none_half_made(monkeypatch: pytest.MonkeyPatch) -> None:
    t, batch = trainer(), data.Dataset.batch
    made = batches_of(t, 4)
    check(made, t, 0)

    def fails(self: data.Dataset, k: int, *rest: Any) -> Any:
        if k == 6:
            raise data.DataError("d.h5", "gone")
        return batch(self, k, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(data.Dataset, "batch", fails)
        with pytest.raises(data.DataError, match="gone"):
            made.of(4, 1e-3)
    for k in (0, 1, 4, 6):
        check(made, t, k)


def test_batches_ahead_take_little_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as fit, one at least, and no image is read twice."""
    read: list[int] = []
    batch = data.Dataset.batch
    monkeypatch.setattr(data.Dataset, "batch", lambda self, k, *rest: (read.append(k), batch(self, k, *rest))[1])
    for size, ahead in ((3, batches.AHEAD), (1000, 14), (20000, 1)):
        t = trainer(f"train.batch={size}")
        read.clear()
        made = batches_of(t, batches.AHEAD)
        assert ahead * made.nbytes <= batches.ROOM or ahead == 1
        for k in range(ahead + 1):
            made.of(k, 1e-3)
        assert read == list(range(2 * ahead))


@pytest.mark.parametrize("change", ["count", "weight_decay", "rate", "data order"])
def test_a_training_heeds_what_changes_while_batches_wait(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bits of plain steps, which make each batch when its step comes."""
    ours, theirs = trainer("train.p_uncond=0.5"), trainer("train.p_uncond=0.5")
    theirs.captured = None
    for t in (ours, theirs):
        for _ in range(3):
            t.step()
        if change == "count":
            t.optimiser.count += 40
        elif change == "weight_decay":
            t.optimiser.weight_decay = 0.5
        elif change == "data order":
            t.done = 1
    if change == "rate":
        monkeypatch.setattr("alphabar.tools.trainer.rate", lambda train, k: 0.01 / (k + 1))
    for _ in range(3):
        assert ours.step().lr == theirs.step().lr
    assert ours.captured is not None and ours.captured.kept
    for name, a in ours.state()[0].items():
        assert np.array_equal(a, theirs.state()[0][name]), name


@pytest.mark.parametrize(
    ("n", "seed", "first", "steps"), [(1, 0, 0, 9), (7, 2**63 - 1, 2**32 - 3, 6), (128, 2**40 + 5, 77, 3), (5, 1, 4, 0)]
)
def test_the_uniforms_of_steps_are_those_of_each_step(n: int, seed: int, first: int, steps: int) -> None:
    found = counter.uniforms_of_steps(n, seed, range(first, first + steps), 9)
    assert found.shape == (steps, n) and found.dtype == np.float64
    for k, row in enumerate(found):
        assert np.array_equal(row, counter.uniform(n, seed, first + k, 9))
