"""What a launcher may start, and what is refused on the way."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.training.launched import (
    PAIR,
    ROOT,
    command,
)
from training.processes import command_for


def test_a_refusal_with_several_processes_is_said_once_and_alone(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.yaml").touch()
    line = command("--config", str(tiny), "--output", str(tmp_path / "a"))
    done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=300)
    assert done.stderr.count("already holds a run: go on with --resume auto") == 1
    assert "Traceback" not in done.stderr.split("torch/distributed/elastic")[0]


@pytest.mark.parametrize("processes", [1, 2])
def test_the_command_that_is_advised_starts_as_many_processes(processes: int, tiny: Path, tmp_path: Path) -> None:
    advised = command_for(processes).replace("training/train.py …", f"{ROOT}/training/train.py").split(" (")[0]
    line = [sys.executable, "-m", "accelerate.commands.launch", *advised.split()[2:]]
    port = ["--main_process_port", str(29600 + os.getpid() % 300)]
    line[3:3] = port
    line += ["--config", str(tiny), "--output", str(tmp_path / "a"), "--dry-run", f"train.processes={processes}"]
    done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{processes} process(es)" in done.stdout


@pytest.mark.parametrize(
    ("file", "options", "says"),
    [
        ("cpu", (), "1 process(es) on cpu,"),
        ("gpu", (), "1 process(es) on "),
        ("gpus", PAIR, "2 process(es) on "),
        ("fsdp2", PAIR, "this tries out the configuration, not FSDP"),
    ],
)
def test_every_launch_configuration_starts_what_it_says(
    file: str, options: Sequence[str], says: str, tiny: Path, tmp_path: Path
) -> None:
    launcher = ROOT / "configs" / "accelerate" / f"{file}.yaml"
    line = command("--config", str(tiny), "--output", str(tmp_path), "--dry-run", launcher=launcher, options=options)
    done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert says in done.stdout


def test_two_machines_find_each_other(tiny: Path, tmp_path: Path) -> None:
    """One process on each; the machines are one here."""
    launcher = ROOT / "configs" / "accelerate" / "machines.yaml"
    line = ["--config", str(tiny), "--output", str(tmp_path / "a"), "train.steps=3", "preview.every=0"]
    machines = []
    for rank in "01":
        options = [*PAIR, "--machine_rank", rank, "--main_process_ip", "127.0.0.1"]
        started = command(*line, launcher=launcher, options=options)
        machines.append(subprocess.Popen(started, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL))
    try:
        assert [machine.wait(timeout=300) for machine in machines] == [0, 0]
    finally:
        for machine in machines:
            machine.kill()
    manifest = json.loads((tmp_path / "a" / "checkpoints" / "step-000003" / "manifest.json").read_text())
    assert manifest["world_size"] == 2
