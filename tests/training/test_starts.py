"""What a launcher may start, and what is refused on the way."""

import contextlib
import json
import socket
from pathlib import Path

import pytest

from tests.training.forked import LAUNCHER, finish, start, succeed
from tests.training.launched import PAIR, ROOT, TWO, launcher_line
from tests.training.runs import assert_equal_bits
from unetgn.training.processes import command_for


def test_a_refusal_with_several_processes_is_said_once_and_alone(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.yaml").touch()
    done = finish("--config", str(tiny), "--output", str(tmp_path / "a"), launcher=TWO, processes=2)
    assert done.codes == [2, 2]
    assert done.stderr.count("already holds a run: go on with --resume auto") == 1
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("processes", [1, 2])
def test_the_command_that_is_advised_starts_as_many_processes(processes: int, tiny: Path, tmp_path: Path) -> None:
    program, *options = command_for(processes).split(" training/train.py …")[0].split()
    line = ["--config", str(tiny), "--output", str(tmp_path / "a"), "--dry-run", f"train.processes={processes}"]
    if processes == 1:
        assert (program, options) == ("python", [])
        done = succeed(*line)
    else:
        assert (program, options.pop(0)) == ("accelerate", "launch")
        done = succeed(*line, launcher=options, processes=processes)
    assert f"{processes} process(es)" in done.stdout


@pytest.mark.parametrize(
    ("file", "processes", "says"),
    [
        ("cpu", 1, "1 process(es) on cpu,"),
        ("gpu", 1, "1 process(es) on "),
        ("gpus", 2, "2 process(es) on "),
        ("fsdp2", 2, "this tries out the configuration, not FSDP"),
    ],
)
def test_every_launch_configuration_starts_what_it_says(
    file: str, processes: int, says: str, tiny: Path, tmp_path: Path
) -> None:
    launcher = ROOT / "configs" / "accelerate" / f"{file}.yaml"
    line = ["--config", str(tiny), "--output", str(tmp_path), "--dry-run"]
    done = succeed(*line, launcher=launcher, processes=processes)
    assert says in done.stdout


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


@pytest.mark.thorough
def test_two_machines_find_each_other(tiny: Path, tmp_path: Path) -> None:
    """One process on each, with imports and a hash seed of its own; the machines are one here."""
    launcher = ROOT / "configs" / "accelerate" / "machines.yaml"
    line = ["--config", str(tiny), "train.steps=3", "preview.every=0", "--output"]
    succeed(*line, str(tmp_path / "b"), launcher=TWO, processes=2)
    line.append(str(tmp_path / "a"))
    with contextlib.ExitStack() as stack:
        port, machines = free_port(), []
        for rank in "01":
            options = [*PAIR, "--machine_rank", rank, "--main_process_ip", "127.0.0.1", "--main_process_port", port]
            started = start(*launcher_line(*line, launcher=launcher, options=options), script=LAUNCHER)
            machines.append(stack.enter_context(started))
        for machine in machines:
            assert machine.wait().code == 0
    manifest = json.loads((tmp_path / "a" / "checkpoints" / "step-000003" / "manifest.json").read_text())
    assert manifest["world_size"] == 2
    assert_equal_bits(tmp_path / "a", tmp_path / "b", 3)
