"""Checks what is shipped, and what it claims."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

from unetgn import __version__

ROOT = Path(__file__).resolve().parent.parent


def build(what: str, source: Path, out: Path) -> Path:
    line = [sys.executable, "-m", "hatchling", "build", "-t", what, "-d", str(out)]
    subprocess.run(line, cwd=source, check=True, capture_output=True)
    (file,) = out.iterdir()
    return file


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution."""
    return build("sdist", ROOT, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel_file(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from what is in the source distribution alone."""
    unpacked = tmp_path_factory.mktemp("unpacked")
    shutil.unpack_archive(source, unpacked, filter="data")
    (root,) = unpacked.iterdir()
    return build("wheel", root, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def wheel(wheel_file: Path) -> list[str]:
    return zipfile.ZipFile(wheel_file).namelist()


@pytest.fixture(scope="module")
def installed(wheel_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the wheel alone is installed into."""
    folder = tmp_path_factory.mktemp("installed")
    line = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(folder)]
    subprocess.run([*line, str(wheel_file)], check=True, capture_output=True)
    where = [sys.executable, "-c", "import unetgn; print(unetgn.__file__)"]
    environment = os.environ | {"PYTHONPATH": str(folder)}
    found = subprocess.run(where, cwd=folder, env=environment, capture_output=True, text=True, check=True).stdout
    assert found.startswith(str(folder))
    return folder


LINES = [
    (["configs"], "my_images"),
    (["train", "--config", "digits8_ddpm", "--dry-run"], "a dry run: nothing was written"),
]


@pytest.mark.parametrize(("line", "says"), LINES)
def test_the_installed_command_works_in_an_empty_folder(
    line: list[str], says: str, installed: Path, tmp_path: Path
) -> None:
    environment = os.environ | {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    command = [str(installed / "bin" / "unetgn"), *line]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert says in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.thorough
@pytest.mark.parametrize("what", ["source", "wheel_file"])
def test_each_distribution_works_in_an_empty_environment(
    what: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """An environment with what unetgn depends on, which is found elsewhere, and nothing of unetgn."""
    environment, empty = tmp_path / "environment", tmp_path / "empty"
    empty.mkdir()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    (site,) = environment.glob("lib/python*/site-packages")
    found = [path for path in sys.path if path.endswith("site-packages")]
    (site / "elsewhere.pth").write_text("\n".join(found))  # of these no .pth is read, which may lead to a checkout
    options = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    plain = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    pip = [str(environment / "bin" / "python"), "-m", "pip", "install", *options, str(request.getfixturevalue(what))]
    subprocess.run(pip, cwd=empty, env=plain, check=True, capture_output=True)
    assert (site / "unetgn").is_dir()
    for line, says in LINES:
        command = [str(environment / "bin" / "unetgn"), *line]
        done = subprocess.run(command, cwd=empty, env=plain, capture_output=True, text=True)
        assert (done.returncode, says in done.stdout) == (0, True), done.stderr
    assert not list(empty.iterdir())


def test_the_source_distribution_has_every_file_of_the_repository_but_what_git_ignores(source: Path) -> None:
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("this is no checkout of git")
    files = {name for name in listed.stdout.splitlines() if (ROOT / name).is_file()}
    with tarfile.open(source) as archive:
        assert {name.partition("/")[2] for name in archive.getnames()} == files | {"PKG-INFO"}


def test_the_wheel_ships_the_library_alone_typed_and_licensed(wheel: list[str]) -> None:
    assert {name.split("/")[0].split("-")[0] for name in wheel} == {"unetgn"}
    assert "unetgn/py.typed" in wheel
    assert any(name.endswith("licenses/LICENSE") for name in wheel)


def test_every_configuration_is_shipped(wheel: list[str]) -> None:
    configurations = {str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.yaml")}
    assert configurations == {name.removeprefix("unetgn/") for name in wheel if name.endswith(".yaml")}


def test_every_module_of_the_library_is_shipped(wheel: list[str]) -> None:
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "unetgn").rglob("*.py")}
    assert modules == {name for name in wheel if name.endswith(".py")}


def test_the_constraints_pin_every_dependency() -> None:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    asked = [
        *project["dependencies"],
        *extras["train"],
        *extras["data"],
        *extras["dev"],
        *extras["onnx"],
        *extras["app"],
        *extras["docs"],
        *extras["peers"],
    ]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.split("==")[0] for line in lines if "==" in line and not line.startswith("#")}
    assert {name.split(">=")[0].split("[")[0] for name in asked} <= pinned


def test_the_version_stands_in_one_place_and_the_citation_repeats_it(wheel: list[str]) -> None:
    assert any(name.startswith(f"unetgn-{__version__}.dist-info/") for name in wheel)
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == __version__
    assert "version" not in (ROOT / "pyproject.toml").read_text().partition("dynamic")[0]


def test_the_oldest_constraints_are_the_floors_of_what_the_package_asks_for() -> None:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    floors = {}
    for asked in [*project["dependencies"], *extras["train"], *extras["data"], *extras["onnx"], *extras["app"]]:
        name, _, floor = asked.partition(">=")
        floors[name.split("[")[0]] = floor
    pins = dict(
        line.split(";")[0].strip().split("==")
        for line in (ROOT / "constraints-oldest.txt").read_text().splitlines()
        if not line.startswith("#")
    )
    assert not [name for name, floor in floors.items() if not (pins[name] + ".0").startswith(f"{floor}.")]


def test_the_workflow_runs_what_lands_on_every_python_that_the_package_supports() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    (job,) = workflow["jobs"].values()
    combinations = job["strategy"]["matrix"]["include"]
    assert [each["python"] for each in combinations] == ["3.10", "3.11", "3.12", "3.13"]
    assert {each["constraints"] for each in combinations} == {"constraints.txt", "constraints-oldest.txt"}
    assert all((ROOT / each["constraints"]).is_file() for each in combinations)
    assert job["steps"][-1]["run"] == "bash .ci/run"
    versions = [f"Programming Language :: Python :: {each['python']}" for each in combinations]
    project = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text())["project"]
    assert [name for name in project["classifiers"] if re.search(r":: 3\.\d+$", name)] == versions


def test_a_tag_publishes_what_was_built_and_checked_and_no_password_is_kept() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())
    assert workflow[True] == {"push": {"tags": ["v*"]}}  # YAML reads the key `on` as true
    build, publish = workflow["jobs"]["build"], workflow["jobs"]["publish"]
    assert publish["needs"] == "build"
    assert (workflow["permissions"], publish["permissions"]) == ({"contents": "read"}, {"id-token": "write"})
    said = "\n".join(step.get("run", "") for step in build["steps"])
    assert all(f'unetgn" {" ".join(line)}' in said for line, _ in LINES)
    assert "secrets." not in (ROOT / ".github" / "workflows" / "release.yml").read_text()


def test_the_actions_of_workflows_are_pinned_to_commits() -> None:
    workflows = [yaml.safe_load(path.read_text()) for path in (ROOT / ".github" / "workflows").glob("*.yml")]
    steps = [step for workflow in workflows for job in workflow["jobs"].values() for step in job["steps"]]
    used = [step["uses"] for step in steps if "uses" in step]
    assert [action for action in used if not re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", action)] == []


def test_hooks_and_templates_are_yaml_with_what_their_readers_ask_for() -> None:
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local"  # no tool from elsewhere: the pinned ones of the environment
    assert all({"id", "name", "entry", "language"} <= set(hook) for hook in repository["hooks"])
    for name in ("bug", "feature"):
        form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml").read_text())
        assert {"name", "description", "body"} <= set(form)
        assert all({"type", "attributes"} <= set(part) for part in form["body"])


@pytest.mark.parametrize("version", [(2, 7, 18), (3, 8, 10), (3, 9, 0)])
def test_make_says_which_python_it_needs(version: tuple[int, ...], tmp_path: Path) -> None:
    """The Python of the test says that it is an older one."""
    python = tmp_path / "python3"
    python.write_text(
        f"#!/bin/sh\nexec {sys.executable} -c 'import sys; sys.version_info = {version}; exec(sys.argv[1])' \"$2\"\n"
    )
    python.chmod(0o755)
    shutil.copy(ROOT / "Makefile", tmp_path)
    line = ["make", f"PYTHON={python}", ".venv/bin/python"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    assert f"needs Python 3.10 or later, and {python} is {version[0]}.{version[1]}: " in done.stderr
    assert not (tmp_path / ".venv").exists()
