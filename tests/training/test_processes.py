"""Several processes are one run: launched as users launch them, on the CPU."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from training.launch import command_for

ROOT = Path(__file__).resolve().parents[2]
TWO = ROOT / "configs" / "accelerate" / "cpu_2_processes.yaml"
FSDP2 = ROOT / "configs" / "accelerate" / "fsdp2.yaml"
ON_CPUS = "tests/training/train_with_fsdp2_on_cpus.py"
BAD_RANK = "tests/training/train_with_a_bad_rank.py"
PAIR = ("--num_processes", "2")

TINY = """
model: {sample_size: 8, in_channels: 1, out_channels: 1, channels: [8, 16], depth: 1, attention_levels: [1],
        num_classes: 10, norm: {num_groups: 4}}
objective: {label_dropout: 0.2}
data: {held_out: 0.05}
train: {steps: 25, batch_size: 4, learning_rate: 1e-3, learning_rate_schedule: cosine, warmup_steps: 2, log_every: 1,
        checkpoint_every: 10, sample_every: 20, validate_every: 25, trackers: []}
ema: {decay: 0.9}
preview: {count: 4, steps: 3}
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("processes") / "tiny.yaml"
    file.write_text(TINY)
    return file


def command(
    *arguments: str, script: str = "training/train.py", launcher: Path | None = TWO, options: Sequence[str] = ()
) -> list[str]:
    port = str(29600 + os.getpid() % 300)  # test workers side by side
    start = [] if launcher is None else ["--config_file", str(launcher), "--main_process_port", port, *options]
    return [sys.executable, "-m", "accelerate.commands.launch", *start, str(ROOT / script), *arguments]


def launch(*arguments: str, **more: object) -> None:
    done = subprocess.run(command(*arguments, **more), capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def weights(run: Path, step: int, name: str = "model") -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step-{step:06d}" / f"{name}.safetensors")


def status(run: Path) -> dict:
    return json.loads((run / "status.json").read_text()) if (run / "status.json").exists() else {"step": 0, "state": ""}


def logged(run: Path) -> list[str]:
    return (run / "metrics.csv").read_text().splitlines() if (run / "metrics.csv").exists() else []


@pytest.fixture(scope="module")
def two(config: Path) -> Path:
    output = config.parent / "two"
    launch("--config", str(config), "--output", str(output))
    return output


def test_two_processes_and_one_with_the_same_images_a_step_agree(config: Path, two: Path, tmp_path: Path) -> None:
    launch("--config", str(config), "--output", str(tmp_path / "one"), "train.batch_size=8", launcher=None)
    for name in ("model", "ema"):
        one, other = weights(tmp_path / "one", 25, name), weights(two, 25, name)
        assert max((one[key] - other[key]).abs().max().item() for key in one) < 1e-4
    rows = [(run / "metrics.csv").read_text().splitlines() for run in (tmp_path / "one", two)]
    for one_row, other_row in zip(*rows, strict=True):
        assert one_row.split(",")[3] == other_row.split(",")[3]  # the learning rate of every step
    held_out = [float((run / "validation.csv").read_text().split(",")[-1]) for run in (tmp_path / "one", two)]
    assert held_out[0] == pytest.approx(held_out[1], rel=1e-4)


def test_a_run_of_two_stopped_by_a_signal_to_one_and_resumed_is_the_unbroken_run(
    config: Path, two: Path, tmp_path: Path
) -> None:
    """One rank gets SIGTERM, both save the same step and leave; the rest of the run is exact."""
    output = tmp_path / "broken"
    line = ["--config", str(config), "--output", str(output), "--resume", "auto"]
    process = subprocess.Popen(command(*line), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        wait_until(lambda: status(output)["state"] == "running" and len(logged(output)) > 2)
        os.kill(status(output)["pid"], signal.SIGTERM)
        process.wait(timeout=60)
    finally:
        process.kill()
    assert status(output)["state"] == "preempted"
    assert (output / "checkpoints" / f"step-{status(output)['step']:06d}").is_dir()
    launch(*line)
    for name in ("model", "ema", "optimizer"):
        whole, resumed = weights(two, 25, name), weights(output, 25, name)
        assert [key for key in whole if not torch.equal(whole[key], resumed[key])] == []
    without_speed = [
        [row.rsplit(",", 2)[0] for row in (run / "metrics.csv").read_text().splitlines()] for run in (two, output)
    ]
    assert without_speed[0] == without_speed[1]


def test_two_processes_sample_the_images_that_one_does(two: Path, tmp_path: Path) -> None:
    arguments = ["--checkpoint", str(two), "--seeds", "0-6", "--steps", "4"]
    launch(*arguments, "--out", str(tmp_path / "two"), script="sampling/sample.py")
    launch(*arguments, "--out", str(tmp_path / "one"), script="sampling/sample.py", launcher=None)
    from sampling.evaluate import read_samples

    (one, labels), (other, other_labels) = (read_samples(tmp_path / name) for name in ("one", "two"))
    assert len(one) == 7
    assert labels.tolist() == other_labels.tolist() == list(range(7))
    assert abs(one - other).max() <= 1.01 / 255  # a shade, by rounding


def test_a_loss_that_is_not_finite_stops_all_ranks_and_names_its_own(config: Path, tmp_path: Path) -> None:
    """The other rank sees it, too, in the gradient that both share."""
    line = ["--config", str(config), "--output", str(tmp_path / "a"), "train.sample_every=0"]
    bad = os.environ | {"BAD": "nan", "BAD_FROM": str(6 * 8)}  # of the seventh step
    done = subprocess.run(
        command(*line, script=BAD_RANK), env=bad, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 1
    assert status(tmp_path / "a")["error"] == "the loss is not finite at step 7, rank 1"
    assert status(tmp_path / "a")["state"] == "diverged"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_signal_to_one_rank_ends_the_other_ones_wait_for_its_loader(
    workers: int, config: Path, tmp_path: Path
) -> None:
    output = tmp_path / "a"
    line = ["--config", str(config), "--output", str(output), "train.sample_every=0", f"data.num_workers={workers}"]
    stuck = os.environ | {"BAD": "stuck", "BAD_FROM": str(6 * 8)}
    process = subprocess.Popen(
        command(*line, script=BAD_RANK), env=stuck, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    try:
        wait_until(lambda: len(logged(output)) > 6)  # six steps and the header
        time.sleep(1)
        os.kill(status(output)["pid"], signal.SIGTERM)  # rank 0
        process.wait(timeout=30)
    finally:
        process.kill()
    assert status(output) | {"state": "preempted", "step": 6} == status(output)
    assert weights(output, 6)


def test_two_ranks_that_accumulate_with_workers_in_bf16_go_on_exactly_across_epochs(
    config: Path, tmp_path: Path
) -> None:
    keys = ["train.batch_size=128", "train.gradient_accumulation=2", "data.num_workers=2", "train.mixed_precision=bf16",
            "train.steps=6", "train.checkpoint_every=1", "train.sample_every=0", "checkpoint.keep=9"]  # fmt: skip
    line = ["--config", str(config), *keys]  # 512 of 1,707 images a step: the fourth step has the end of the first pass
    launch(*line, "--output", str(tmp_path / "whole"))
    middle = tmp_path / "whole" / "checkpoints" / "step-000003"
    launch(*line, "--output", str(tmp_path / "resumed"), "--resume", str(middle))
    assert_equal_bits(tmp_path / "whole", tmp_path / "resumed", 6)


def test_a_refusal_with_several_processes_is_said_once_and_alone(config: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.yaml").touch()
    line = command("--config", str(config), "--output", str(tmp_path / "a"))
    done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=300)
    assert done.stderr.count("already holds a run: go on with --resume auto") == 1
    assert "Traceback" not in done.stderr.split("torch/distributed/elastic")[0]


@pytest.mark.parametrize("processes", [1, 2])
def test_the_command_that_is_advised_starts_as_many_processes(processes: int, config: Path, tmp_path: Path) -> None:
    advised = command_for(processes).replace("training/train.py …", f"{ROOT}/training/train.py").split(" (")[0]
    line = [sys.executable, "-m", "accelerate.commands.launch", *advised.split()[2:]]
    port = ["--main_process_port", str(29600 + os.getpid() % 300)]
    line[3:3] = port
    line += ["--config", str(config), "--output", str(tmp_path / "a"), "--dry-run", f"train.processes={processes}"]
    done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{processes} process(es)" in done.stdout


def test_a_process_whose_launcher_died_while_it_was_starting_stops(config: Path, tmp_path: Path) -> None:
    output = tmp_path / "orphan"
    line = ["--config", str(config), "--output", str(output), "train.steps=100000", "train.sample_every=0"]
    launcher = subprocess.Popen(command(*line, launcher=None), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
    wait_until(lambda: bool(children.read_text()))
    process = int(children.read_text().split()[0])
    wait_until(lambda: "train.py" in Path(f"/proc/{process}/cmdline").read_text())
    time.sleep(0.5)  # the first line of train.py
    launcher.kill()
    launcher.wait()
    wait_until(lambda: not Path(f"/proc/{process}").exists())
    assert status(output)["state"] in ("", "preempted")


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_a_process_whose_launcher_died_saves_and_stops(end: signal.Signals, config: Path, tmp_path: Path) -> None:
    """A launcher of one process passes no signal on."""
    output = tmp_path / "orphan"
    line = ["--config", str(config), "--output", str(output), "train.steps=100000", "train.sample_every=0",
            "train.validate_every=0", "train.checkpoint_every=100000"]  # fmt: skip
    process = subprocess.Popen(command(*line, launcher=None), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    wait_until(lambda: status(output)["state"] == "running")
    process.send_signal(end)
    process.wait()
    wait_until(lambda: status(output)["state"] == "preempted")
    assert list((output / "checkpoints").glob("step-*"))


def test_a_run_of_three_processes_goes_on_exactly(config: Path, tmp_path: Path) -> None:
    """From three on, the order in which DDP sums gradients shows; with two, a + b = b + a hides it."""
    keys = ["--num_processes", "3"], ["train.steps=6", "train.checkpoint_every=3", "train.sample_every=0"]
    launch("--config", str(config), "--output", str(tmp_path / "whole"), *keys[1], options=keys[0])
    middle = tmp_path / "whole" / "checkpoints" / "step-000003"
    launch("--config", str(config), "--output", str(tmp_path / "b"), "--resume", str(middle), *keys[1], options=keys[0])
    assert_equal_bits(tmp_path / "whole", tmp_path / "b", 6)


def test_another_number_of_processes_goes_on_with_a_notice_and_close(config: Path, two: Path, tmp_path: Path) -> None:
    middle = two / "checkpoints" / "step-000020"
    for name, keys, notice in (
        ("same", ["train.batch_size=4", "train.gradient_accumulation=2"], "close to the unbroken run, but not equal"),
        ("half", [], "a step takes another number of images"),
    ):
        line = ["--config", str(config), "--output", str(tmp_path / name), "--resume", str(middle), *keys]
        done = subprocess.run(command(*line, launcher=None), capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        assert f"2 processes were at work and now 1: {notice}" in done.stderr
    assert_close(two, tmp_path / "same", 25)
    line = ["--config", str(config), "--output", str(tmp_path / "c"), "--resume", str(middle), "train.batch_size=5"]
    done = subprocess.run(command(*line, launcher=None), capture_output=True, text=True, check=False, timeout=300)
    assert "train.batch_size was 4 and is 5" in done.stderr


def test_two_processes_that_accumulate_are_one_that_does(config: Path, tmp_path: Path) -> None:
    keys = ["train.gradient_accumulation=2", "train.steps=10", "train.sample_every=0"]
    launch("--config", str(config), "--output", str(tmp_path / "two"), *keys)
    launch("--config", str(config), "--output", str(tmp_path / "one"), *keys, "train.batch_size=8", launcher=None)
    assert_close(tmp_path / "one", tmp_path / "two", 10)


@pytest.fixture(scope="module")
def sharded(config: Path) -> Path:
    output = config.parent / "sharded"
    launch("--config", str(config), "--output", str(output), script=ON_CPUS, launcher=FSDP2, options=PAIR)
    return output


def test_fsdp2_trains_what_ddp_trains(two: Path, sharded: Path) -> None:
    """Accelerate's and PyTorch's own FSDP2, over gloo: whole tensors in the checkpoint, the same up to rounding."""
    assert_close(two, sharded, 25)
    assert weights(two, 25, "optimizer").keys() == weights(sharded, 25, "optimizer").keys()
    held_out = [float((run / "validation.csv").read_text().split(",")[-1]) for run in (two, sharded)]
    assert held_out[0] == pytest.approx(held_out[1], rel=1e-5)
    assert (sharded / "samples" / "step-000020.png").is_file()
    assert json.loads((sharded / "checkpoints/step-000025/config.json").read_text())["_class_name"] == "UNet"
    averaged, pipeline = (
        weights(sharded, 25, "ema"),
        sharded / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors",
    )
    assert all(torch.equal(tensor, averaged[name]) for name, tensor in load_file(pipeline).items())


def test_fsdp2_goes_on_exactly_and_from_what_ddp_left(config: Path, two: Path, sharded: Path, tmp_path: Path) -> None:
    for number, before in enumerate((sharded, two)):
        middle, output = before / "checkpoints" / "step-000020", tmp_path / str(number)
        line = ["--config", str(config), "--output", str(output), "--resume", str(middle)]
        launch(*line, script=ON_CPUS, launcher=FSDP2, options=PAIR)
    assert_equal_bits(sharded, tmp_path / "0", 25)
    assert_close(two, tmp_path / "1", 25)


@pytest.mark.slow
def test_fsdp2_in_bfloat16_with_accumulation_and_channels_last_trains_what_ddp_trains(
    config: Path, tmp_path: Path
) -> None:
    line = ["--config", str(config), "train.mixed_precision=bf16", "train.gradient_accumulation=2", "train.steps=6",
            "train.channels_last=true", "train.sample_every=0", "train.learning_rate=1e-4"]  # fmt: skip
    launch(*line, "--output", str(tmp_path / "sharded"), script=ON_CPUS, launcher=FSDP2, options=PAIR)
    launch(*line, "--output", str(tmp_path / "two"))
    losses = [[row.split(",")[2] for row in logged(tmp_path / run)[1:]] for run in ("sharded", "two")]
    assert [float(x) for x in losses[0]] == pytest.approx([float(x) for x in losses[1]], rel=1e-4)
    assert_close(tmp_path / "sharded", tmp_path / "two", 6)


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
    file: str, options: Sequence[str], says: str, config: Path, tmp_path: Path
) -> None:
    launcher = ROOT / "configs" / "accelerate" / f"{file}.yaml"
    line = command("--config", str(config), "--output", str(tmp_path), "--dry-run", launcher=launcher, options=options)
    done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert says in done.stdout


@pytest.mark.parametrize(("keys", "code"), [((), 0), (("train.processes=3",), 2), (("data.held_out=0.9999",), 2)])
def test_no_process_group_is_left_to_the_exit(keys: Sequence[str], code: int, config: Path, tmp_path: Path) -> None:
    """Else C++ sometimes aborts: "terminate called without an active exception"."""
    script = """
import sys, torch
from training.train import main
code = main(sys.argv[1:])
assert not torch.distributed.is_initialized()
sys.exit(code)
"""
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true"}
    environment = os.environ | rank | {"MASTER_PORT": str(29600 + os.getpid() % 300)}
    line = [sys.executable, "-c", script, "--config", str(config), "--output", str(tmp_path), "--dry-run", *keys]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == code, done.stderr[-3000:]


def test_two_machines_find_each_other(config: Path, tmp_path: Path) -> None:
    """One process on each; the machines are one here."""
    launcher = ROOT / "configs" / "accelerate" / "machines.yaml"
    line = ["--config", str(config), "--output", str(tmp_path / "a"), "train.steps=3", "train.sample_every=0"]
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


def assert_equal_bits(one: Path, other: Path, step: int) -> None:
    for name in ("model", "ema", "optimizer"):
        first, second = weights(one, step, name), weights(other, step, name)
        assert first.keys() == second.keys()
        assert [key for key in first if not torch.equal(first[key], second[key])] == []


def assert_close(one: Path, other: Path, step: int) -> None:
    for name in ("model", "ema"):
        first, second = weights(one, step, name), weights(other, step, name)
        assert max((first[key] - second[key]).abs().max().item() for key in first) < 1e-4


def wait_until(condition: object, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.05)
