"""Runs of format 1, whose keys had other names, go on exactly; whoever writes such a key today is told the new one."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import yaml

from tests.training.launched import SIX_STEPS
from tests.training.runs import assert_equal_bits, losses
from unetgn.sampling.sample import main as draw
from unetgn.training.checkpoint import Checkpoint, verify
from unetgn.training.config_files import RENAMED, load_config
from unetgn.training.errors import ConfigError
from unetgn.training.manifest import FORMAT
from unetgn.training.train import main


def value_of(keys: dict, dotted: str) -> object:
    """Take the value of a dotted key."""
    group, name = dotted.split(".")
    return keys[group].pop(name)


def age_config(file: Path) -> None:
    """Write a configuration as it was before keys were renamed."""
    keys = yaml.safe_load(file.read_text())
    for old, new in RENAMED.items():
        group, name = old.split(".")
        keys[group][name] = value_of(keys, new)
    file.write_text(yaml.safe_dump(keys, sort_keys=False))


def age_checkpoint(folder: Path) -> None:
    """Write a checkpoint as format 1 had it: no number, counters and window as groups, the keys of its time."""
    age_config(folder / "config.yaml")
    new = json.loads((folder / "manifest.json").read_text())
    sums = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}
    del sums["manifest.json"]
    old = {
        "step": new["step"],
        "counters": {"ema_step": new["ema_step"], "scaler": new["scaler"]},
        "window": {"sums": new["window_sums"], "steps": new["window_steps"]},
        "world_size": new["world_size"],
        "images": new["images"],
        "torch": new["torch_version"],
        "sha256": sums,
    }
    (folder / "manifest.json").write_text(json.dumps(old))


@pytest.fixture
def old(finished: Path, tmp_path: Path) -> Path:
    """Return a copy of the finished run in the form of format 1, without its checkpoint of the last step."""
    shutil.copytree(finished, tmp_path / "old")
    shutil.rmtree(tmp_path / "old" / "checkpoints" / "step-000006")
    age_config(tmp_path / "old" / "config.yaml")
    for folder in (tmp_path / "old" / "checkpoints").iterdir():
        age_checkpoint(folder)
    return tmp_path / "old"


def test_an_old_checkpoint_says_what_the_same_one_says_today(finished: Path, old: Path) -> None:
    name = "checkpoints/step-000004"
    then, now = verify(old / name), verify(finished / name)
    for field in ("step", "world_size", "images", "ema_step", "scaler", "window_sums", "window_steps"):
        assert getattr(then, field) == getattr(now, field), field
    assert load_config(then.config_file) == load_config(now.config_file)


def test_an_old_run_goes_on_exactly_with_its_own_configuration_and_writes_todays_format(
    finished: Path, old: Path
) -> None:
    line = ["--config", str(old / "config.yaml"), "--output", str(old), "--resume", "auto"]
    assert main(line) == 0
    assert_equal_bits(finished, old, 6)
    assert losses(old) == losses(finished)
    last = old / "checkpoints" / "step-000006"
    assert json.loads((last / "manifest.json").read_text())["format"] == FORMAT
    assert not set(yaml.safe_load((old / "config.yaml").read_text())["train"]) & {
        key.split(".")[1] for key in RENAMED if key.startswith("train.")
    }
    assert Checkpoint.read(last).step == 6


def test_an_old_run_is_sampled_from_and_gives_the_same_images(finished: Path, old: Path, tmp_path: Path) -> None:
    for name, run in (("then", old), ("now", finished)):
        checkpoint = str(run / "checkpoints" / "step-000004")
        assert draw(["--checkpoint", checkpoint, "--seeds", "0-1", "--steps", "2", "--out", str(tmp_path / name)]) == 0
    for image in ("000000.png", "000001.png"):
        assert (tmp_path / "then" / image).read_bytes() == (tmp_path / "now" / image).read_bytes()


@pytest.mark.parametrize("old_name", RENAMED)
def test_an_old_key_is_refused_with_its_new_name_in_files_and_on_the_command_line(
    old_name: str, tmp_path: Path
) -> None:
    group, name = old_name.split(".")
    assert RENAMED[old_name] != old_name
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({group: {name: 3}}))
    with pytest.raises(ConfigError, match=rf"mine\.yaml: {old_name} is now called {RENAMED[old_name]}"):
        load_config(file)
    file.write_text(SIX_STEPS)
    with pytest.raises(ConfigError, match=rf"command line: {old_name} is now called {RENAMED[old_name]}"):
        load_config(file, [f"{old_name}=3"])
    value = load_config(file, [f"{RENAMED[old_name]}=3"])
    new_group, new_name = RENAMED[old_name].split(".")
    assert getattr(getattr(value, new_group), new_name) == 3


@pytest.mark.parametrize("beside", [{"every": 9}, None, 7])
def test_an_old_key_of_a_run_beside_its_new_one_or_a_group_that_is_none_is_refused(
    beside: object, old: Path, tmp_path: Path
) -> None:
    """Somebody edited it: neither of the two may win without a word."""
    run = shutil.copytree(old, tmp_path / "run")
    keys = yaml.safe_load((run / "config.yaml").read_text())
    keys["checkpoint"] = beside
    (run / "config.yaml").write_text(yaml.safe_dump(keys))
    with pytest.raises(ConfigError, match=r"train.checkpoint_every is now called checkpoint.every|checkpoint "):
        load_config(run / "config.yaml")


def test_a_file_called_config_that_no_run_wrote_is_not_translated(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("train: {sample_every: 3}\n")
    with pytest.raises(ConfigError, match=r"train\.sample_every is now called preview\.every"):
        load_config(tmp_path / "config.yaml")
