"""Own pictures in one line: what the data decide, and all that does not fit named at once."""

import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unetgn.training.config_files import find_in_data, load_config
from unetgn.training.config_yaml import CONFIGS, find_config
from unetgn.training.errors import ConfigError
from unetgn.training.on_cpu import trains_on_cpu
from unetgn.training.train import main, parse_arguments

SMALL = [
    *("model.channels=[8,16]", "model.depth=1", "model.attention_levels=[]", "model.norm.num_groups=4"),
    *("train.steps=2", "train.batch_size=2", "train.trackers=[]", "train.warmup_steps=0"),
    *("preview.count=2", "preview.steps=2", "data.num_workers=0"),
]


def write(file: Path, size: tuple[int, int], *, colour: bool = True) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(len(file.name))
    pixels = random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels if colour else pixels[..., 0]).save(file)


@pytest.fixture
def photographs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four pictures, the smallest of 40 × 47 pixels, in two folders."""
    monkeypatch.chdir(tmp_path)
    for number, size in enumerate([(64, 50), (47, 40), (90, 41), (41, 77)]):
        write(tmp_path / "Holidays" / ("sea", "hills")[number % 2] / f"{number}.png", size, colour=number == 2)
    return tmp_path / "Holidays"


def test_a_folder_is_all_that_is_needed(photographs: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["Holidays", "data.image_size=16", *SMALL]) == 0
    run = Path("runs/Holidays")
    config = load_config(run / "config.yaml")
    assert (config.data.path, config.model.in_channels, config.model.num_classes) == ("Holidays", 3, None)
    assert (run / "pipeline" / "unet" / "config.json").is_file()
    assert list((run / "samples").glob("*.png"))
    assert "4 images from Holidays" in capfd.readouterr().out


def on(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend another device than the CPU, or none."""
    monkeypatch.setattr("torch.accelerator.is_available", lambda: device != "cpu")


SHORT, LONG = ["Holidays"], ["--config", "my_images", "data.path=Holidays"]
OF_MY_IMAGES = "configuration: my_images; on a CPU it would be my_images32"
OF_MY_IMAGES32 = (
    "configuration: my_images32, my_images in small, since this trains on a CPU; on_cpu=null for my_images "
)


def first_lines(line: list[str], capfd: pytest.CaptureFixture[str], after: int = 0) -> list[str]:
    """What a dry run says up to the folder that it would write to."""
    capfd.readouterr()
    assert main([*line, "--dry-run"]) == 0
    said = capfd.readouterr().out.splitlines()
    return said[: 1 + said.index("writing to runs/Holidays" + f", going on after step {after}" * bool(after))]


def printed(line: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    """The whole configuration, and nothing but it."""
    capfd.readouterr()
    assert main([*line, "--print-config"]) == 0
    return capfd.readouterr().out


@pytest.mark.parametrize(
    ("device", "keys", "name", "says"),
    [
        ("cpu", [], "my_images32", OF_MY_IMAGES32),
        ("cpu", ["data.image_size=24"], "my_images32", OF_MY_IMAGES32),
        ("cpu", ["on_cpu=null"], "my_images", "1 process(es) on cpu"),
        ("cuda", [], "my_images", OF_MY_IMAGES),
        ("cuda", ["on_cpu=null"], "my_images", "1 process(es) on cpu"),  # whatever is pretended
    ],
)
def test_a_folder_alone_and_the_configuration_s_name_are_the_same_command(
    device: str,
    keys: list[str],
    name: str,
    says: str,
    photographs: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    on(device, monkeypatch)
    keys = [*keys, "data.enlarge=true"]
    said = first_lines([*SHORT, *keys], capfd)
    assert said == first_lines([*LONG, *keys], capfd)
    assert said[0].startswith(says)
    named = ["--config", str(CONFIGS / f"{name}.yaml"), "on_cpu=null", "data.path=Holidays"]
    others = [key for key in keys if not key.startswith("on_cpu")]
    assert printed([*SHORT, *keys], capfd) == printed([*LONG, *keys], capfd) == printed([*named, *others], capfd)


@pytest.mark.parametrize(("device", "other", "size"), [("cpu", "cuda", 32), ("cuda", "cpu", 64)])
def test_a_run_that_goes_on_keeps_its_configuration_on_another_device(
    device: str,
    other: str,
    size: int,
    photographs: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    on(device, monkeypatch)
    assert main([*SHORT, *SMALL, "data.enlarge=true"]) == 0
    run = Path("runs/Holidays/config.yaml")
    assert "on_cpu" not in run.read_text()
    on(other, monkeypatch)
    said = [
        first_lines([*line, "--resume", resumed, "train.steps=3"], capfd, after=2)
        for line in (SHORT, LONG)
        for resumed in ("auto", "runs/Holidays")
    ]
    assert [said[0]] * 4 == said
    assert said[0][0] == "configuration: runs/Holidays/config.yaml, of the run that goes on"
    assert main([*LONG, "--resume", "auto", "train.steps=3"]) == 0
    config = load_config(run)
    assert (config.data.image_size, config.model.depth, config.train.steps) == (size, 1, 3)
    # Who names the one or the other means it.
    named = ["--output", "runs/Holidays", "--resume", "auto", *SMALL, "data.enlarge=true", "train.steps=4", "--dry-run"]
    assert main([*SHORT, *named, "on_cpu=null"]) == (0 if size == 64 else 2)
    assert main([*SHORT, *named, "--config", "my_images32"]) == (0 if size == 32 else 2)


def test_a_launcher_that_takes_no_gpu_trains_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    on("cuda", monkeypatch)
    assert not trains_on_cpu()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")  # of `accelerate launch --cpu`
    assert trains_on_cpu()


def test_a_file_has_no_on_cpu_from_the_one_that_it_builds_on(
    photographs: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    on("cpu", monkeypatch)
    Path("mine.yaml").write_text("base: my_images\ndata: {path: Holidays}\n")
    assert load_config(Path("mine.yaml")) == load_config(find_config("my_images"), ["data.path=Holidays"])
    assert "sample_size: 64" in printed(["--config", "mine.yaml"], capfd)
    Path("mine.yaml").write_text("base: my_images\non_cpu: folder/small.yaml\ndata: {path: Holidays}\n")
    Path("folder").mkdir()
    Path("folder/small.yaml").write_text("base: ../mine.yaml\ndata: {image_size: 16}\n")
    assert "sample_size: 16" in printed(["--config", "mine.yaml"], capfd)
    assert "sample_size: 8" in printed(["--config", "mine.yaml", "on_cpu=digits8_ddpm"], capfd)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(
    ("text", "keys", "says"),
    [
        ("on_cpu: my_image32", [], "mine.yaml: on_cpu my_image32: no such file"),
        ("on_cpu: my_image32", [], "Did you mean 'my_images32'?"),
        ("on_cpu: [my_images32]", [], "mine.yaml: on_cpu is ['my_images32']; it names one file"),
        ("on_cpu: mine.yaml", [], "mine.yaml: on_cpu mine.yaml names another one in its turn"),
        ("on_cpu: my_images", [], "mine.yaml: on_cpu my_images names another one in its turn"),
        ("on_cpu: my_images32", ["on_cpu=my_images"], "command line: on_cpu my_images names another one in its turn"),
        ("seed: 1", ["on_cpu="], "command line: on_cpu is empty"),
        ("seed: 1", ["on_cpu"], "'on_cpu' is neither an option nor key=value"),
        ("oncpu: my_images32", [], "unknown key 'oncpu'. Did you mean 'on_cpu'?"),
        ("train: {on_cpu: my_images32}", [], "unknown key 'train.on_cpu'. Did you mean 'on_cpu'?"),
    ],
)
def test_a_wrong_on_cpu_is_refused_on_every_device(
    device: str,
    text: str,
    keys: list[str],
    says: str,
    photographs: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    on(device, monkeypatch)
    Path("mine.yaml").write_text(f"{text}\n")
    assert says in refused(["--config", "mine.yaml", *keys, "--dry-run"], capfd)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ([], []),
        (["data.image_size=null"], ["data.image_size=40"]),  # two levels: a multiple of 2
        (["data.image_size=null", "data.random_crop=true", "data.crop_scale=1.25"], ["data.image_size=32"]),
        (["data.image_size=null", "data.image_size=24"], []),  # of a key, the last one counts
        (["data.image_size=24", "data.image_size=null"], ["data.image_size=40"]),
        (["model.in_channels=null", "model.out_channels=null"], ["model.in_channels=3", "model.out_channels=3"]),
        (
            ["model.in_channels=null", "model.out_channels=null", "data.to_grey=true"],
            ["model.in_channels=1", "model.out_channels=1"],
        ),
        (["model.num_classes=auto", "objective.label_dropout=0.1"], ["model.num_classes=2"]),
    ],
)
def test_the_data_decide_what_is_left_to_them(given: list[str], found: list[str], photographs: Path) -> None:
    path = find_config("my_images")
    keys = [*SMALL, f"data.path={photographs}", *given]
    assert find_in_data(path, keys) == found
    settled = load_config(path, keys + found)
    for key in found:
        group, name = key.partition("=")[0].split(".")
        assert str(getattr(getattr(settled, group), name)) == key.partition("=")[2]


def test_a_file_leaves_keys_to_the_data_too_and_a_run_remembers_what_was_found(
    photographs: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("mine.yaml").write_text(
        "model: {in_channels: null, out_channels: null, num_classes: auto, channels: [8, 16], depth: 1, "
        "attention_levels: [], norm: {num_groups: 4}}\n"
        "data: {name: folder, image_size: null}\n"
        "train: {steps: 2, batch_size: 2, trackers: []}\npreview: {every: 0}\n"
    )
    line = ["--config", "mine.yaml", "--output", "run", f"data.path={photographs}"]
    assert main(line) == 0
    said = "left to the data: model.num_classes=2 data.image_size=40 model.in_channels=3 model.out_channels=3"
    assert said in capfd.readouterr().out
    config = load_config(Path("run/config.yaml"))
    assert (config.data.image_size, config.model.in_channels, config.model.num_classes) == (40, 3, 2)
    assert main([*line, "--resume", "auto", "train.steps=3"]) == 0
    with pytest.raises(ConfigError, match=r"data\.image_size, .* is left to the data"):
        load_config(Path("mine.yaml"), [f"data.path={photographs}"])


def test_data_without_classes_leave_the_keys_of_classes_empty(photographs: Path) -> None:
    keys = [*SMALL, f"data.path={photographs / 'sea'}", "model.num_classes=auto", "objective.label_dropout=0.1"]
    found = find_in_data(find_config("my_images"), keys)
    assert found == ["model.num_classes=null", "objective.label_dropout=0"]
    assert load_config(find_config("my_images"), keys + found).model.num_classes is None


def test_embedded_data_have_a_size_and_channels(tmp_path: Path) -> None:
    keys = ["data.name=digits", "data.path=null", "data.image_size=null", "model.in_channels=null"]
    found = find_in_data(find_config("digits8_ddpm"), [*keys, "model.out_channels=null", "model.num_classes=auto"])
    assert found == ["model.num_classes=10", "data.image_size=8", "model.in_channels=1", "model.out_channels=1"]


def refused(line: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    capfd.readouterr()
    assert main(line) == 2
    *_, last = capfd.readouterr().err.strip().splitlines()
    return last


# What does not fit the pictures of `photographs`, and the words that say so.
MISFITS: dict[str, tuple[list[str], str]] = {
    "size": (["data.image_size=64"], "are smaller than data.image_size"),
    "channels": (["model.in_channels=1", "model.out_channels=1"], "are in colour, but model.in_channels is 1"),
    "classes": (["model.num_classes=7"], "the images have 2 classes"),
}


@pytest.mark.parametrize(
    "kinds", [["size"], ["size", "channels"], ["channels", "classes"], list(MISFITS)], ids="+".join
)
def test_all_that_does_not_fit_is_said_at_once_with_a_line_that_works(
    kinds: list[str], photographs: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    keys = [key for kind in kinds for key in MISFITS[kind][0]]
    if "size" not in kinds:
        keys.append("data.image_size=16")
    line = ["Holidays", *SMALL, *keys]
    said = refused(line, capfd)
    for kind, (_, words) in MISFITS.items():
        assert (words in said) == (kind in kinds)
    if len(kinds) > 1:
        advised = shlex.split(said.rpartition("All at once: ")[2])
        assert main([*line, *advised, "--dry-run"]) == 0
    assert not Path("runs").exists()


def test_the_keys_of_embedded_data_are_said_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    line = ["--config", "digits8_ddpm", "data.image_size=16", "model.sample_size=16", "model.in_channels=3"]
    said = refused([*line, "model.out_channels=3", "--dry-run"], capfd)
    assert said.endswith("All at once: data.image_size=8 model.in_channels=1 model.out_channels=1")


def test_small_images_are_enlarged_where_that_is_asked_for(
    photographs: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    line = ["Holidays", *SMALL, "data.image_size=64"]
    assert "enlarge them by data.enlarge=true" in refused(line, capfd)
    assert main([*line, "data.enlarge=true", "--dry-run"]) == 0
    assert "shorter side enlarged or reduced to 64" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ([], "give --config NAME, or a folder of your own images"),
        (["train.steps=3"], "give --config NAME, or a folder of your own images"),
        (["Picturs"], "Picturs: there is no such folder of pictures"),
        (["/", "/tmp"], "one folder, or one zip archive, holds the pictures"),
    ],
)
def test_a_line_without_a_configuration_or_pictures_says_what_is_missing(
    line: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(line)
    assert says in capsys.readouterr().err


NOWHERE: list[tuple[Callable[[Path], None], str]] = [
    (lambda folder: None, "holds no images"),
    (lambda folder: (folder / "a.png").write_bytes(b"none") and None, "holds no image that can be read"),
]


@pytest.mark.parametrize(("fill", "says"), NOWHERE)
def test_a_folder_without_images_decides_nothing(
    fill: Callable[[Path], None], says: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    fill(tmp_path / "empty")
    assert says in refused([str(tmp_path / "empty"), "data.image_size=null"], capfd)


def test_a_stream_decides_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    line = ["--config", "my_images", "data.name=stream", f"data.path={tmp_path}", "data.image_size=null"]
    assert "data.image_size cannot be left open for a stream" in refused(line, capfd)


def test_a_run_goes_on_with_what_it_found_though_the_smallest_image_has_rotten(
    photographs: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Measured anew, the images are larger, and the run would be another one."""
    smallest = photographs / "hills" / "smallest.png"
    write(smallest, (30, 31))
    line = ["Holidays", *SMALL, "data.image_size=null"]
    assert main(line) == 0
    smallest.write_bytes(b"none")
    resumed = [*line, "--resume", "auto", "train.steps=3"]
    said = refused(resumed, capfd)
    assert "data.without=" in said
    assert "data.image_size" not in said
    without = f'data.without=["{smallest.relative_to(photographs).as_posix()}"]'
    assert main([*resumed, without]) == 0
    assert load_config(Path("runs/Holidays/config.yaml")).data.image_size == 30
