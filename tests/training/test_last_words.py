"""Ctrl-C, and packages that are missing, end every script in one line; a dry run says what would be deleted."""

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.training.launched import ROOT, SIX_STEPS
from unetgn.programs import last_words
from unetgn.programs.last_words import EXTRAS, STOPPED
from unetgn.training.config import RunConfig, TrainConfig
from unetgn.training.run_directory import RunDirectory
from unetgn.training.train import main as train
from unetgn.training.train import start_trackers

# Where each script spends its time, as (module, name) that is called there; and a line that gets there.
PLACES = {
    ("unetgn.training.train", "--config digits8_ddpm --dry-run"): (
        "unetgn.training.train.prepare_samples", "unetgn.training.train.ask_main",
        "unetgn.training.train.import_pyplot",
        "unetgn.training.data.images.Digits.usable", "unetgn.training.train.load_config",
        "unetgn.training.train.make_accelerator",
    ),
    ("unetgn.sampling.sample", "--checkpoint x --seeds 0 --out y"): (
        "unetgn.sampling.sample.find_checkpoint", "unetgn.sampling.sample.start_processes",
        "unetgn.sampling.sample.parse_arguments",
    ),
    ("unetgn.sampling.evaluate", "--samples {}"): (
        "unetgn.sampling.evaluate.open_real", "unetgn.sampling.evaluate.load_config",
        "unetgn.training.data.images.Digits.usable",
    ),
    ("unetgn.sampling.train_classifier", "--config digits8_ddpm"): (
        "unetgn.sampling.train_classifier.load_config", "unetgn.training.data.images.Digits.usable",
    ),
    ("unetgn.sampling.app", "--checkpoint x"): (
        "unetgn.sampling.app.parse_arguments", "unetgn.sampling.app.find_run",
    ),
    ("unetgn.training.cache_latents", "--autoencoder x --out y data.name=folder data.path=x"): (
        "unetgn.training.cache_latents.load_autoencoder", "unetgn.training.cache_latents.load_data_config",
    ),
}  # fmt: skip
CASES = [(script, line, place) for (script, line), places in PLACES.items() for place in places]


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def miss(*_: object, **__: object) -> None:
    raise ModuleNotFoundError("No module named 'matplotlib.x'", name="matplotlib.x")


@pytest.mark.parametrize(
    ("end", "code", "words"),
    [(interrupt, 130, "stopped"), (miss, 2, 'the package matplotlib is not installed: pip install -e ".[train]"')],
)
@pytest.mark.parametrize(("script", "line", "place"), CASES, ids=[f"{script}-{place}" for script, _, place in CASES])
def test_what_ends_a_script_anywhere_is_one_line(
    script: str, line: str, place: str, end: Callable[..., None], code: int, words: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(place, end)
    monkeypatch.chdir(tmp_path)
    assert importlib.import_module(script).main(line.format(tmp_path).split()) == code
    said = capsys.readouterr().err.splitlines()[-1]
    assert words in said
    assert said.startswith(f"{script.rpartition('.')[2]}.py: ")


@pytest.mark.parametrize("script", ["unetgn.training.train", "unetgn.sampling.sample"])
def test_a_rank_whose_others_have_gone_before_the_first_step_says_so_in_a_line(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def left_alone(_: object) -> None:
        raise RuntimeError("[pair.cc:553] Connection closed by peer\nThis is caused by a remote worker crashing")

    monkeypatch.setattr("unetgn.training.processes.broadcast_object_list", left_alone)
    monkeypatch.chdir(tmp_path)
    line = "--config digits8_ddpm --dry-run" if "train" in script else "--checkpoint x --seeds 0 --out y"
    assert importlib.import_module(script).main(line.split()) in (1, 2)
    (said,) = capsys.readouterr().err.splitlines()
    assert "another process of this start has ended: RuntimeError: [pair.cc:553] Connection closed by peer" in said


SCRIPTS = [file for folder in ("training", "sampling") for file in sorted((ROOT / folder).glob("*.py"))]


def test_each_script_has_words_for_its_end() -> None:
    assert {*(script.name for script in SCRIPTS), "push.py"} == set(STOPPED)  # which the command alone starts


ENDS = [
    (error, script)
    for error in ("KeyboardInterrupt", "ModuleNotFoundError(name='tqdm')")
    for script in (*SCRIPTS, ROOT / "benchmarks/host_overhead.py")
]
# What a name is called by is found in one way: one of each folder, and each end, in every run of the tests.
OFTEN = [("KeyboardInterrupt", "train"), ("ModuleNotFoundError(name='tqdm')", "sample"), ENDS[-1]]


@pytest.mark.parametrize(
    ("error", "script"),
    [
        pytest.param(*end, marks=() if (end[0], end[1].stem) in OFTEN or end in OFTEN else pytest.mark.slow)
        for end in ENDS
    ],
    ids=lambda value: getattr(value, "stem", value),
)
def test_the_imports_of_a_script_end_in_one_line_too(error: str, script: Path) -> None:
    program = f"import sys; sys.argv = [{str(script)!r}]; import unetgn.programs; raise {error}"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == (130 if error == "KeyboardInterrupt" else 2)
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(f"{script.name}: ")


def test_in_programs_of_others_ctrl_c_is_theirs() -> None:
    program = "import sys; sys.argv = ['/home/somebody/train.py']; import unetgn.programs; raise KeyboardInterrupt"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert "Traceback" in done.stderr


def test_scripts_import_the_package_and_the_package_its_last_words_before_all_that_may_be_missing() -> None:
    for script in SCRIPTS:
        assert [name.partition(".")[0] for name in named_by(ast.parse(script.read_text()))] == ["sys", "unetgn"], script
    first, *_ = named_by(ast.parse((ROOT / "unetgn/__init__.py").read_text()))
    assert first == "unetgn.programs"
    for file in (ROOT / "unetgn/programs").glob("*.py"):
        for name in named_by(ast.parse(file.read_text())):
            assert name.startswith("unetgn.programs") or name.partition(".")[0] in sys.stdlib_module_names, name


PROGRAMS = [
    file
    for folder in ("unetgn/training", "unetgn/sampling", "benchmarks", "examples")
    for file in sorted((ROOT / folder).rglob("*.py"))
    if '__name__ == "__main__"' in file.read_text() or "add_argument" in file.read_text()
]


def named_by(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield (
                "unetgn.programs" if node.module == "unetgn" and node.names[0].name == "programs" else str(node.module)
            )
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("file", PROGRAMS, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_program_says_which_package_is_missing_and_takes_a_tilde(file: Path) -> None:
    tree = ast.parse(file.read_text())
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        if isinstance(call.func, ast.Attribute) and call.func.attr == "add_argument":
            assert "Path" not in [ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg == "type"]
    if file.parent == ROOT / "benchmarks" / "gpu":  # its supervisor has the standard library alone, and says so
        return
    if file.parent.name != "examples":
        if '__name__ == "__main__"' in file.read_text():
            assert next(name for name in named_by(tree) if name != "__future__").startswith("unetgn")
        return
    # Examples may be copied elsewhere, and so have it of themselves.
    blocks = [node for node in tree.body if isinstance(node, ast.Try)]
    rest = [statement for statement in tree.body if statement not in blocks]
    needed = {name.partition(".")[0] for statement in rest for name in named_by(statement)}
    assert not {name for name in needed if EXTRAS.get(name)}
    assert any("ModuleNotFoundError" in ast.unparse(block) for block in blocks) or needed <= sys.stdlib_module_names


def test_every_package_that_scripts_need_has_its_extra() -> None:
    wanted = set()
    for folder in ("unetgn/training", "unetgn/sampling"):
        for file in (ROOT / folder).rglob("*.py"):
            wanted |= set(re.findall(r"^\s*(?:from|import) (\w+)", file.read_text(), re.MULTILINE))
    wanted -= {"unetgn", "transformers", "trackio", *sys.stdlib_module_names}
    assert wanted <= set(EXTRAS), wanted - set(EXTRAS)


def test_a_module_of_ours_that_is_missing_is_no_package() -> None:
    with pytest.raises(ModuleNotFoundError):
        last_words.last_words("train.py", ModuleNotFoundError(name="unetgn.training.nothing"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train six steps, with checkpoints at 2, 4 and 6 and rows in TensorBoard."""
    folder = tmp_path_factory.mktemp("resumed")
    (folder / "tiny.yaml").write_text(SIX_STEPS.replace("trackers: []", "trackers: [tensorboard]"))
    assert train(line(folder)) == 0
    return folder


def line(folder: Path, *more: str) -> list[str]:
    return ["--config", str(folder / "tiny.yaml"), "--output", str(folder / "run"), "preview.every=0", *more]


def test_a_dry_run_names_what_the_run_would_delete_and_rows_are_not_shown_twice(
    run: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints, again = run / "run" / "checkpoints", ["--resume", str(run / "run" / "checkpoints" / "step-000004")]
    capsys.readouterr()
    assert train(line(run, "--resume", "auto", "--dry-run")) == 0
    assert "would delete" not in capsys.readouterr().out
    assert train(line(run, *again, "--dry-run", "checkpoint.keep=1")) == 0
    said = [text for text in capsys.readouterr().out.splitlines() if text.startswith("the run would delete ")]
    before = {path for path in checkpoints.iterdir() if path.is_dir()}
    assert {text.split()[4] for text in said if "checkpoints" in text} == {
        str(checkpoints / "step-000002"), str(checkpoints / "step-000006")
    }  # fmt: skip
    rows = "(after step 4; metrics.csv.left has them until then)"
    assert f"the run would delete 2 rows of {run / 'run' / 'metrics.csv'} {rows}" in said
    assert train(line(run, *again, "checkpoint.keep=1", "train.steps=5")) == 0
    after = {path for path in checkpoints.iterdir() if path.is_dir()}
    assert before - after == {checkpoints / "step-000002", checkpoints / "step-000004", checkpoints / "step-000006"}
    shown = EventAccumulator(str(run / "run" / "tb" / "run"), size_guidance={"scalars": 0})
    shown.Reload()
    assert [event.step for event in shown.Scalars("loss")] == [1, 2, 3, 4, 5]


def test_matplotlib_is_there_before_the_first_step_or_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    (tmp_path / "tiny.yaml").write_text(SIX_STEPS)
    for more in ([], ["--dry-run"]):
        assert train([*line(tmp_path), *more]) == 2
        assert 'matplotlib is not installed: pip install -e ".[train]"' in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("trackers", [(), ("tensorboard",), ("wandb",), ("tensorboard", "mlflow", "wandb")])
@pytest.mark.parametrize("step", [0, 7])
def test_a_resume_says_which_trackers_begin_anew(
    step: int, trackers: tuple[str, ...], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given: dict[str, Any] = {}
    accelerator = SimpleNamespace(is_main_process=True, init_trackers=lambda name, **options: given.update(options))
    config = RunConfig(train=TrainConfig(trackers=trackers))
    run, state = RunDirectory(tmp_path), SimpleNamespace(step=step)
    start_trackers(SimpleNamespace(config=config, accelerator=accelerator, run=run, state=state))  # type: ignore[arg-type]
    assert given["init_kwargs"].pop("wandb", {}).keys() == ({"id", "resume"} if "wandb" in trackers else set())
    assert given["init_kwargs"] == ({"tensorboard": {"purge_step": step + 1}} if step else {})
    others = [name for name in trackers if name not in ("tensorboard", "wandb")]
    assert caplog.messages == [message for message in caplog.messages if "begins a new run at step 8" in message]
    assert len(caplog.messages) == bool(step and others)
    assert all(name in caplog.text for name in others if step)


def test_wandb_goes_on_with_the_run_that_it_knows_until_the_run_begins_anew(tmp_path: Path) -> None:
    def started(step: int) -> str:
        given: dict[str, Any] = {}
        accelerator = SimpleNamespace(is_main_process=True, init_trackers=lambda name, **options: given.update(options))
        start_trackers(
            SimpleNamespace(  # type: ignore[arg-type]
                config=RunConfig(train=TrainConfig(trackers=("wandb",))),
                accelerator=accelerator,
                run=RunDirectory(tmp_path),
                state=SimpleNamespace(step=step),
            )
        )
        assert given["init_kwargs"]["wandb"]["resume"] == "allow"
        return str(given["init_kwargs"]["wandb"]["id"])

    first = started(0)
    assert started(7) == started(9) == first
    second = started(0)
    assert second != first
    for damage in (b"", b"\xff" * 16, b"../../../etc/abc", second.encode() * 1000):
        (tmp_path / "tracker_id").write_bytes(damage)
        assert len(started(7)) == 16


def test_an_installed_package_is_not_told_to_install_a_clone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert last_words.what_brings("[train]") == '-e ".[train]"'  # this is a clone
    monkeypatch.setattr(last_words, "__file__", str(tmp_path / "unetgn" / "programs" / "last_words.py"))
    assert last_words.what_brings("[train]") == '"unetgn[train]"'
