"""The settings of a run: types, ranges, the nearest name, and the way to TOML and back."""

import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alphabar.tools import config as configs
from alphabar.tools.config import Config, ConfigError


def test_defaults_survive_toml() -> None:
    assert configs.from_dict(tomllib.loads(configs.to_toml(Config()))) == Config()


def test_values_of_every_type() -> None:
    words = [
        "train.steps=7",
        "train.lr=1e-4",
        "data.flip=TRUE",
        "data.path=a b=c.h5",
        "model.channels=8, 16",
        "model.attention=[]",
    ]
    c = configs.from_words(words)
    assert (c.train.steps, c.train.lr, c.data.flip, c.data.path) == (7, 1e-4, True, "a b=c.h5")
    assert (c.model.channels, c.model.attention) == ((8, 16), ())
    assert configs.from_words(["model.channels=(8,)"]).model.channels == (8,)


@settings(max_examples=50, deadline=None)
@given(
    st.text(st.characters(exclude_categories=("C", "Z")), min_size=1),
    st.floats(0, 10, allow_nan=False),
    st.lists(st.integers(1, 8192), min_size=1, max_size=5),
    st.booleans(),
)
def test_any_value_survives_toml(path: str, lr: float, channels: list[int], flip: bool) -> None:
    c = configs.from_dict({"data": {"path": path, "flip": flip}, "train": {"lr": lr}, "model": {"channels": channels}})
    assert configs.from_dict(tomllib.loads(configs.to_toml(c))) == c
    assert configs.from_dict(configs.to_dict(c)) == c


def test_later_sources_win(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text("[train]\nsteps = 5\nlr = 1\n[model]\nchannels = [16]\n")
    c = configs.load(file, ["train.steps=6", "train.steps=7"], configs.from_words(["train.batch=3", "train.lr=0.5"]))
    assert (c.train.steps, c.train.lr, c.train.batch, c.model.channels) == (7, 1.0, 3, (16,))


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("lr=1", "the nearest is 'train.lr'"),
        ("train.lrr=1", "the nearest is 'train.lr'"),
        ("trian.steps=1", "the nearest is 'train.steps'"),
        ("channel=3", "the nearest is 'model.channels'"),
        ("model.attn=4", "the nearest is 'model.attention'"),
        ("methods=ncsn", "the nearest is 'method'"),
        ("method=", "must be one of ddpm, ncsn"),
        ("method=vpsd", "the nearest is 'vpsde'"),
        ("qqqq=1", "the sections are data, model"),
        ("=", "unknown setting"),
        ("", "section.key=value"),
        ("train.steps", "section.key=value"),
        ("train=3", "unknown setting 'train'"),
        ("x" * 100_000 + "=1", "unknown setting"),
        ("train.steps=", "must be a whole number, not ''"),
        ("train.steps=1.0", "must be a whole number, not '1.0'"),
        ("train.steps=0", "must be in 1..1000000000, not 0"),
        ("train.steps=-4", "not -4"),
        ("train.steps=" + "9" * 4000, "must be in 1.."),
        ("train.steps=" + "9" * 5000, "must be a whole number"),
        ("train.lr=nan", "must be a number, not nan"),
        ("train.lr=-inf", "must be a number, not -inf"),
        ("train.lr=fast", "must be a number, not 'fast'"),
        ("train.p_uncond=1.5", "must be in 0.0..1.0, not 1.5"),
        ("train.clip=-1", "must be at least 0.0"),
        ("data.flip=1", "must be true or false"),
        ("data.path=a\0b", "must be printable text"),
        ("model.channels=", "at least one"),
        ("model.channels=32,,x", "must be whole numbers"),
        ("model.channels=32,-1", "not -1"),
        ("diffusion.schedule=cosin", "the nearest is 'cosine'"),
        ("diffusion.schedule=", "must be one of linear"),
    ],
)
def test_mistakes_on_the_command_line(word: str, message: str) -> None:
    with pytest.raises(ConfigError) as e:
        configs.from_words([word])
    assert message in str(e.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[train]\nstep = 5", "the nearest is 'train.steps'"),
        ("[trains]\nsteps = 5", "the nearest is 'train.steps'"),
        ("steps = 5", "the nearest is 'train.steps'"),
        ("train = 5", "train must be a table"),
        ("[method]\nname = 'ncsn'", "must be text"),
        ("method = 3", "must be text"),
        ("[train]\nsteps = 5.0", "must be a whole number, not 5.0"),
        ("[train]\nsteps = true", "must be a whole number, not True"),
        ("[train]\nlr = true", "must be a number, not True"),
        ("[train]\nlr = nan", "must be a number, not nan"),
        ("[train]\nlr = 1" + "0" * 400, "must be a number"),
        ("[train]\nlr = '1'", "must be a number"),
        ("[data]\npath = 3", "must be text"),
        ("[model]\nchannels = 32", "must be whole numbers"),
        ("[model]\nchannels = [32, true]", "must be whole numbers"),
        ("[model]\nchannels = [[32]]", "must be whole numbers"),
        ("[train\nsteps=5", "not valid TOML"),
        ("[train]\nsteps = 5\nsteps = 6", "not valid TOML"),
        ("[train]\nsteps = 1" + "0" * 5000, "not valid TOML"),
    ],
)
def test_mistakes_in_a_file(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "c.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as e:
        configs.from_file(file)
    assert message in str(e.value) and str(file) in str(e.value)


def test_the_method_stands_at_the_top_and_takes_its_settings_with_it(tmp_path: Path) -> None:
    c = configs.load(None, ["method=vesde", "diffusion.sigma_max=7", "sample.snr=0.2"])
    text = configs.to_toml(c)
    assert text.startswith('method = "vesde"\n') and "sigma_max = 7.0" in text and "snr = 0.2" in text
    assert "schedule" not in text and "beta_max" not in text and "eta" not in tomllib.loads(text)["sample"]
    (tmp_path / "c.toml").write_text(text)
    assert configs.load(tmp_path / "c.toml", []) == c and configs.from_dict(configs.to_dict(c)) == c
    assert configs.sampler(c) == "pc" and configs.sampler(Config()) == "ddim"


def test_what_belongs_to_another_method_is_refused_where_it_would_change_something(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text("[sample]\nsampler = 'heun'\neta = 0.0\n[diffusion]\nT = 1000\n")  # at their defaults, in an older file
    assert configs.load(file, ["method=ncsn"]).sample.sampler == "heun"
    with pytest.raises(ConfigError, match=r"sample\.eta goes with the sampler ddim, not with heun"):
        configs.load(file, ["sample.eta=0"])
    file.write_text("method = 'ncsn'\n[diffusion]\nT = 10\n")
    with pytest.raises(ConfigError, match=r"diffusion\.T goes with the methods ddpm, multinomial, d3pm.*, not with ncsn"):
        configs.load(file, [])
    with pytest.raises(ConfigError, match=r"sample\.sampler must be one of ddim, .* for method ddpm, not 'langevin'"):
        configs.load(None, ["sample.sampler=langevin"])


def test_importance_was_a_switch_once() -> None:
    assert configs.from_dict({"train": {"importance": True}}).train.importance == "true"
    assert configs.from_words(["train.importance=false"]).train.importance == "false"
    with pytest.raises(ConfigError, match=r"train\.importance must be one of auto, true, false, not 'yes'"):
        configs.from_words(["train.importance=yes"])
    with pytest.raises(ConfigError, match=r"data\.path must be text, not True"):
        configs.from_dict({"data": {"path": True}})


def test_a_sampler_and_a_method_of_one_name_are_two_things() -> None:
    c = configs.from_words(["method=vpsde", "sample.sampler=ddpm"])
    assert not configs.belongs(c, "train.loss") and not configs.belongs(c, "diffusion.schedule")
    assert configs.sampler(configs.from_words(["train.loss=hybrid"])) == "learned"


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "missing.toml", tmp_path, tmp_path / "binary"):
        with pytest.raises(ConfigError, match=path.name):
            configs.from_file(path)
