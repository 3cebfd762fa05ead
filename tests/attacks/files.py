"""Attacks every file that is read: damages one of a folder, loads it, and compares with what the folder vouches for."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import logging
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import UNet2DModel
from PIL import Image
from safetensors.torch import save_file

import unetgn.sampling.evaluate
import unetgn.sampling.sample
import unetgn.training.train
from tests.attacks.damage import BYTES, attack_folder, damage_json
from tests.attacks.judge import Draw, Kind, Lost, Verdict, Wrong, check_line, ended, fingerprint, refused, same
from tests.interop.fixtures import fixture
from tests.training.forked import succeed
from tests.training.runs import everything
from tests.training.test_step import batches
from unetgn import UNet
from unetgn.interop import load
from unetgn.sampling.folder import Request, SamplingError, Subject, claim, file_of
from unetgn.training.checkpoint import (
    CONFIGS,
    TENSORS,
    Checkpoint,
    checkpoint_path,
    newest_valid,
    put_aside,
    verify,
)
from unetgn.training.config import EMAConfig, TrainConfig
from unetgn.training.config_files import load_config, to_yaml
from unetgn.training.data.autoencoder import load_autoencoder
from unetgn.training.data.config import DataConfig, open_images
from unetgn.training.data.latents import Manifest
from unetgn.training.data.report import read_class_names
from unetgn.training.data.samples import StepBatches
from unetgn.training.errors import CheckpointError, ConfigError, DataError
from unetgn.training.files import sha256
from unetgn.training.manifest import CHECKSUM, checksum
from unetgn.training.network import load_checkpoint, load_network
from unetgn.training.objective import Objective, ObjectiveConfig
from unetgn.training.pipeline import save_pipeline
from unetgn.training.run_directory import RunDirectory
from unetgn.training.step import TrainState

RUN = """
model: {sample_size: 8, in_channels: 1, out_channels: 1, channels: [8, 16], depth: 1, attention_levels: [1],
        num_classes: 10, dropout: 0.1, norm: {num_groups: 4}}
objective: {label_dropout: 0.2}
train: {steps: 6, batch_size: 8, learning_rate: 1e-3, warmup_steps: 2, log_every: 1, trackers: []}
checkpoint: {every: 2, keep: 9}
preview: {every: 0}
"""
RUN_OF_STREAM = """
model: {sample_size: 8, in_channels: 3, out_channels: 3, channels: [8], depth: 1, attention_levels: [],
        norm: {num_groups: 4}}
data: {name: stream, image_size: 8, shuffle_buffer: 4}
train: {steps: 4, batch_size: 2, log_every: 1, trackers: []}
checkpoint: {every: 2, keep: 9}
preview: {every: 0}
"""
MADE: dict[Callable[[Path], object], Path] = {}  # folders of sound files, by what made them
WANTED: dict[str, Any] = {}  # what is loaded of sound files, by the name of the readable


@dataclass(frozen=True)
class Readable:
    """Describes a folder of files that something of ours reads.

    `load` returns what the files vouch for, which is to be as it was: everything where checksums cover it, names,
    shapes and types where nothing does. `refusals` are the errors that it promises.
    """

    name: str
    make: Callable[[Path], object]
    load: Callable[[Path], Any]
    refusals: tuple[type[BaseException], ...] = ()
    files: tuple[str, ...] = ("**/*",)
    seal: Callable[[Path], object] | None = None
    """Makes checksums right again after the damage, as a stranger would."""
    writes: bool = False
    """True where loading may change files: then none of the sound ones may be gone."""


def made(readable: Readable) -> Path:
    """Return the folder of sound files, made once."""
    if readable.make not in MADE:
        MADE[readable.make] = Path(tempfile.mkdtemp(prefix="sound-"))
        readable.make(MADE[readable.make])
    return MADE[readable.make]


def attack(readable: Readable, draw: Draw, folder: Path) -> Verdict:
    """Damage a copy, load it, and judge."""
    sound = made(readable)
    copy, reference = folder / "files", folder / "reference"
    shutil.copytree(sound, copy)
    if readable.name not in WANTED:
        shutil.copytree(sound, reference)
        with quiet():
            WANTED[readable.name] = readable.load(reference)
        shutil.rmtree(reference)
    how = attack_folder(copy, draw, readable.files)
    if readable.seal is not None and not any(path.exists() and not path.is_file() for path in copy.glob("**/*.*")):
        with contextlib.suppress(Exception):
            readable.seal(copy)
    before = fingerprint(folder)
    try:
        with quiet():
            found = readable.load(copy)
        verdict = found if isinstance(found, Verdict) else Verdict("survived", how)
        if not isinstance(found, Verdict) and not same(WANTED[readable.name], found):
            raise Wrong(f"{how}: other contents")
    except readable.refusals as error:
        verdict = refused(error)
    except (Wrong, Lost) as error:
        raise type(error)(f"{how}: {error}") from None
    except Exception as error:
        raise Wrong(f"{how}: {type(error).__name__}: {str(error)[:500]}") from error
    after = fingerprint(folder)
    gone = [
        path for path in before if before[path] not in after.values() and ("/step-" in path or path.endswith(".png"))
    ]
    if readable.writes and verdict.outcome == "refused" and gone:
        raise Lost(f"{how}: {gone[:5]} are gone")
    if not readable.writes and before != after:
        raise Lost(f"{how}: files changed: {sorted(path for path in before if before[path] != after.get(path))[:5]}")
    return verdict


@contextlib.contextmanager
def quiet() -> Any:
    """Keep warnings to themselves, and judge what of ours is logged."""
    logger, listener = logging.getLogger("unetgn"), Listener()
    logger.addHandler(listener)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.removeHandler(listener)
        for line in listener.lines:
            check_line(line)


class Listener(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


# Checkpoints.


def small_unet() -> UNet:
    torch.manual_seed(0)
    return UNet(in_channels=1, out_channels=1, channels=[8], attention_levels=[], depth=1, norm={"num_groups": 4})


def make_checkpoints(folder: Path) -> None:
    state = new_state()
    text = folder / "config.yaml"
    text.write_text(RUN)
    whole = to_yaml(load_config(text))
    text.unlink()
    for batch in batches(2, 4):
        state.run_step([batch])
        facts: dict[str, Any] = {"ema_step": state.step, "scaler": None, "window_sums": [[0.0, 0.0]], "window_steps": 0}
        checkpoint = Checkpoint(checkpoint_path(folder, state.step), state.step, 1, "images", **facts)
        scheduler = state.objective.scheduler.to_json_string()
        checkpoint.write(state.tensors(), config=whole, unet_config=state.config_json, scheduler_config=scheduler)


def make_adapters(folder: Path) -> None:
    """Make a checkpoint that says which weights its tensors are for, has power averages, and where readers stood."""
    make_checkpoints(folder)
    checkpoint = verify(checkpoint_path(folder, 2))
    texts = [(checkpoint.path / name).read_text() for name in CONFIGS]
    tensors = {name: checkpoint.tensors(name) for name in TENSORS}
    averages = {f"{width}/{name}": tensor.clone() for name, tensor in tensors["ema"].items() for width in (0.05, 0.1)}
    stood = {"readers": [{"begun": 1, "number": 0, "taken": 2, "finished": [3]}]}
    more: dict[str, Any] = {"samples": [stood], "base": "a" * 64}
    made = dict(zip(("config", "unet_config", "scheduler_config"), texts, strict=True))
    checkpoint.write({**tensors, "averages": averages}, **made, **more)


def read_adapters(folder: Path) -> dict[str, Any]:
    checkpoint = verify(checkpoint_path(folder, 2))
    more = {"base": checkpoint.base(), "samples": checkpoint.samples(), "averages": checkpoint.tensors("averages")}
    return {**contents(checkpoint), **more}


def read_strangers_adapters(folder: Path) -> Any:
    """Read what the sums of a stranger's are right for: a base is a sha256, or there is none."""
    checkpoint = verify(checkpoint_path(folder, 2))
    base = checkpoint.base()
    if base is not None and (not isinstance(base, str) or len(base) != 64):
        raise Wrong(f"a base that is none: {base!r}")
    checkpoint.samples()
    return "read"


def contents(checkpoint: Checkpoint) -> dict[str, Any]:
    """Read all that is in a checkpoint."""
    facts = asdict(checkpoint)
    facts.pop("path")
    tensors = {name: checkpoint.tensors(name) for name in ("model", "ema", "optimizer")}
    configs = load_config(checkpoint.config_file), checkpoint.unet_config(), checkpoint.scheduler_config()
    return {"facts": facts, "configs": configs, **tensors}


def read_checkpoint(folder: Path) -> dict[str, Any]:
    return contents(verify(checkpoint_path(folder, 2)))


def seal_checkpoint(folder: Path) -> None:
    """Make the checksums of a checkpoint those of its files."""
    seal_checkpoint_at(checkpoint_path(folder, 2))


def seal_checkpoint_at(path: Path) -> None:
    file = path / "manifest.json"
    keys = json.loads(file.read_text())
    keys.pop(CHECKSUM)
    keys["sha256"] = {name: sha256(path / name) for name in keys["sha256"]}
    file.write_text(json.dumps({**keys, CHECKSUM: checksum(keys)}, indent=1) + "\n")


def shapes(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Say what tensors are, but not their numbers; these are to be finite."""
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise Wrong("numbers that are not finite")
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def resume_from_a_stranger(folder: Path) -> Any:
    """Load a checkpoint for sampling and go on from it: its tensors are to be those of the network."""
    checkpoint = verify(checkpoint_path(folder, 2))
    load_checkpoint(checkpoint, "ema")
    state = new_state()
    state.restore(checkpoint)
    state.run_step(batches(1, 4))
    load_config(checkpoint.config_file)
    return [checkpoint.step, *(shapes(tensors) for tensors in state.tensors().values())]


def new_state() -> TrainState:
    AcceleratorState._reset_state(reset_partial_state=True)
    return TrainState(
        small_unet(), Objective(ObjectiveConfig(), None), TrainConfig(steps=20), EMAConfig(), Accelerator(cpu=True), 0
    )


def take_newest(folder: Path) -> Any:
    """Find the newest sound checkpoint and put the others aside, as a resume does; it is one of the two."""
    found = newest_valid(folder)
    if found is None:
        raise CheckpointError("none is left")
    put_aside(folder, found.step)
    number = json.loads((made(CHECKPOINTS) / found.path.name / "manifest.json").read_text())["step"]
    if not same(contents(found), contents(verify(checkpoint_path(made(CHECKPOINTS), number)))):
        raise Wrong("the checkpoint that was found has other contents")
    return "found"


CHECKED = (CheckpointError, ConfigError, OSError)
CHECKPOINTS = Readable("checkpoint", make_checkpoints, read_checkpoint, CHECKED, ("step-000002/*",))


# Runs.


def make_run(folder: Path) -> None:
    (folder / "tiny.yaml").write_text(RUN)
    succeed("--config", str(folder / "tiny.yaml"), "--output", str(folder / "run"))


def resume_run(folder: Path) -> Verdict:
    """Go on with a run that was at its end, after the damage; the end has to be the same."""
    AcceleratorState._reset_state(reset_partial_state=True)
    line = ["--config", str(folder / "tiny.yaml"), "--output", str(folder / "run"), "--resume", "auto"]
    verdict = script(unetgn.training.train.main, line)
    whole = made(RUNS) / "run"
    if verdict.outcome == "survived" and not same(everything(whole, 6), everything(folder / "run", 6)):
        raise Wrong("the run ended with other tensors")
    return verdict


def resume_strangers_run(folder: Path) -> Verdict:
    """Go on with a run whose last checkpoint is a stranger's: its numbers are theirs."""
    AcceleratorState._reset_state(reset_partial_state=True)
    line = ["--config", str(folder / "tiny.yaml"), "--output", str(folder / "run"), "--resume", "auto"]
    return script(unetgn.training.train.main, [*line, "train.steps=7"])


def script(main: Callable[[list[str]], int], line: list[str]) -> Verdict:
    """Run a script of ours in this process."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = main(line)
        except SystemExit as error:  # of argparse
            code = error.code if isinstance(error.code, int) else 1
    return ended(code, said.getvalue())


def sample_run(folder: Path) -> Verdict:
    """Draw two images with the newest checkpoint of a run."""
    out = folder / "images"
    line = ["--checkpoint", str(folder / "run"), "--seeds", "0-1", "--steps", "2", "--out", str(out)]
    verdict = script(unetgn.sampling.sample.main, line)
    shutil.rmtree(out, ignore_errors=True)
    return verdict


def read_logs(folder: Path) -> Any:
    """Read the logs of a run and what is known of its classes, and go on logging after step 3."""
    run = RunDirectory(folder / "run")
    read_class_names(run.path)
    for name in ("metrics.csv", "validation.csv"):
        rows = run.rows(name)
        if any(row.keys() != {*row} or int(row["step"]) < -(10**30) for row in rows):
            raise Wrong("a row that is none")
    return "read"


RUNS = Readable("resume of a run", make_run, resume_run, files=("run/**/*",), writes=True)


# Networks.


def make_pretrained(folder: Path) -> None:
    small_unet().save_pretrained(folder)


def make_diffusers(folder: Path) -> None:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    UNet2DModel(
        sample_size=8, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1, **blocks
    ).save_pretrained(folder)


def make_pipeline(folder: Path) -> None:
    save_pipeline(small_unet(), Objective(ObjectiveConfig(), None).scheduler, folder / "pipeline", cache=None)


def read_network(folder: Path) -> Any:
    """Load a network; where a tensor of diffusers' is of a wider type, all have that, and the same numbers."""
    inner = folder / "pipeline"
    found = shapes(load_network(inner if inner.is_dir() else folder).state_dict())
    return {name: shape for name, (shape, _) in found.items()}


def make_autoencoder(folder: Path) -> None:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    kinds = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, sample_size=8, **kinds).save_pretrained(folder)


def read_autoencoder(folder: Path) -> Any:
    return shapes(load_autoencoder(folder).model.state_dict())


def make_family(name: str, folder: Path) -> None:
    save_file(
        {key: tensor.contiguous() for key, tensor in fixture(name).state_dict().items()}, folder / "weights.safetensors"
    )


def read_family(name: str, folder: Path) -> Any:
    config = dict(fixture(name).config)
    unet = load(fixture(name).meta["family"], folder / "weights.safetensors", class_name=config.pop("class"), **config)
    return {key: tuple(tensor.shape) for key, tensor in unet.state_dict().items()}


# Configurations, data, samples.


def make_config(folder: Path) -> None:
    (folder / "run.yaml").write_text(RUN)


def read_config(folder: Path) -> Any:
    """Read a configuration; what is taken is written and read again as it was."""
    config = load_config(folder / "run.yaml")
    (folder.parent / "again.yaml").write_text(to_yaml(config))
    again = load_config(folder.parent / "again.yaml")
    (folder.parent / "again.yaml").unlink()
    if again != config:
        raise Wrong("a configuration that is not the same when it is written and read again")
    return "a configuration"


FORMATS = {
    "png": "PNG",
    "jpg": "JPEG",
    "webp": "WEBP",
    "gif": "GIF",
    "bmp": "BMP",
    "tif": "TIFF",
    "ppm": "PPM",
    "tga": "TGA",
}


def make_images(folder: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 10, 3), dtype=np.uint8)
    for number, (ending, kind) in enumerate(FORMATS.items()):
        (folder / "ab"[number % 2]).mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / "ab"[number % 2] / f"{number}.{ending}", kind)


def read_images(folder: Path, name: str = "folder") -> Any:
    images = open_images(DataConfig(name=name, path=str(folder), image_size=8, max_pixels=10_000), 3)  # type: ignore[arg-type]
    for index in images.usable():
        array = images.image(int(index))
        if array.shape != (3, 8, 8) or array.dtype != np.float32 or not (np.abs(array) <= 1).all():
            raise Wrong("an array that is no image")
    return "images"


def make_table(kind: str, folder: Path) -> None:
    from tests.training.shards import write_shards

    write_shards(folder, kind, count=4, shards=1)


def read_stream(folder: Path) -> Any:
    """Check shards as a start does, and read a pass and a half of them as training does; both say what is cut."""
    from unetgn.training.data.stream import ShardStream

    for held_out, cut_shards in ((0.0, "refuse"), (0.5, "read")):
        keys: dict[str, Any] = {"held_out": held_out, "cut_shards": cut_shards, "shuffle_buffer": 3}
        stream = ShardStream(DataConfig(name="stream", path=str(folder), image_size=8, **keys), 3, None, 0)
        stream.check(1, 0)
        for batch in stream.loader(StepBatches(0, 3, 2, 1, 0, 1), num_workers=0, pin_memory=False):
            if batch["image"].shape != (2, 3, 8, 8) or not batch["image"].isfinite().all():
                raise Wrong("an array that is no image")
    return "images"


def damaged_members(kind: str, draw: Draw, folder: Path) -> Verdict:
    """Damage what is in the rows of sound shards: pictures, labels, JSON. A row is left out, or the set is refused."""
    from tests.training.shards import png, table, write_tar

    rows = [{"png": png(number), "cls": b"1", "json": b'{"label": 1}'} for number in range(6)]
    for _ in range(draw.choice((1, 1, 3))):
        row = draw.choice(rows)
        part = draw.choice(("png", "png", "json", "cls"))
        row[part] = damage_json(row[part].decode(), draw).encode() if part == "json" else (
            draw.choice(list(BYTES.values()))(row[part], draw))  # fmt: skip
        if draw.random() < 0.1:
            row[draw.choice(("pth", "npy", "mp4", "pickle", "PNG", "seg.png"))] = draw.randbytes(50)
    if kind == "tar":
        write_tar(folder / "0.tar", {f"{number}": row for number, row in enumerate(rows)})
    else:
        made = table([row["png"] for row in rows], [row["cls"].decode("latin-1") for row in rows], None, text=True)
        if kind == "parquet":
            made.to_parquet(folder / "0.parquet")
        else:
            made.save_to_disk(folder / "set")
            (folder / "set" / "data-00000-of-00001.arrow").rename(folder / "0.arrow")
            shutil.rmtree(folder / "set")
    try:
        with quiet():
            read_stream(folder)
    except DATA as error:
        return refused(error)
    except Exception as error:
        raise Wrong(f"{type(error).__name__}: {str(error)[:500]}") from error
    return Verdict("survived")


def make_stream_run(folder: Path) -> None:
    """Make a run of a stream, with the readers' places in its checkpoints."""
    from tests.training.shards import write_shards

    (folder / "tiny.yaml").write_text(RUN_OF_STREAM)
    path = write_shards(folder / "set", "tar", count=12, shards=2)
    succeed(
        "--config", str(folder / "tiny.yaml"), "--output", str(folder / "run"), f"data.path={path}", "train.steps=4"
    )


def resume_stream_run(folder: Path) -> Verdict:
    """Go on with a run of a stream from what a stranger says of its readers."""
    AcceleratorState._reset_state(reset_partial_state=True)
    line = ["--config", str(folder / "tiny.yaml"), "--output", str(folder / "run"), "--resume", "auto"]
    return script(unetgn.training.train.main, [*line, f"data.path={folder / 'set'}", "train.steps=6"])


def seal_run(folder: Path) -> None:
    """Make the checksums of the newest checkpoint of a run those of its files."""
    seal_checkpoint_at(max((folder / "run" / "checkpoints").iterdir()))


def make_latents(folder: Path) -> None:
    numbers = np.random.default_rng(0)
    manifest = Manifest(6, 4, (2, 4, 4), 0.5, 0.0, ["a", "b"], False, None, {"name": "folder"}, {})
    for name, rows in zip(manifest.shards, (4, 2), strict=True):
        rows_of = {kind: torch.tensor(numbers.random((rows, 2, 4, 4), np.float32)) for kind in ("mean", "std")}
        save_file({**rows_of, "label": torch.tensor(numbers.integers(0, 2, rows))}, folder / name)
        manifest.sha256[name] = sha256(folder / name)
    manifest.write(folder)


def seal_latents(folder: Path) -> None:
    """Make the checksums of a cache those of its shards."""
    keys = json.loads((folder / "manifest.json").read_text())
    keys["sha256"] = {name: sha256(folder / name) for name in keys["sha256"]}
    (folder / "manifest.json").write_text(json.dumps(keys))


def read_latents(folder: Path, *, values: bool = True) -> Any:
    images = open_images(DataConfig(name="latents", path=str(folder), image_size=4), 2)
    usable = [int(index) for index in images.usable()]
    arrays = [images.image(index, np.random.default_rng(0)) for index in usable]
    if not all(array.shape == (2, 4, 4) and array.dtype == np.float32 for array in arrays):
        raise Wrong("an array that is no latent")
    labels = [images.label(index) for index in usable]
    # The manifest has no checksum of its own: scale and names are what it says.
    return [usable, labels, [torch.from_numpy(array) for array in arrays]] if values else [usable, len(labels)]


REQUEST = Request("a" * 64, "ddim", 10, 1.0, 8)
SUBJECTS = {0: Subject(3), 1: Subject(None, "é")}


def make_samples(folder: Path) -> None:
    claim(folder, REQUEST, SUBJECTS)
    for seed in SUBJECTS:
        Image.new("RGB", (8, 8)).save(file_of(folder, seed))


def claim_samples(folder: Path) -> Any:
    """Ask for the same images again: they are these, or it is refused."""
    claim(folder, REQUEST, SUBJECTS)
    return {key: json.loads((folder / "request.json").read_text())[key] for key in asdict(REQUEST)}


def make_judged(folder: Path) -> None:
    (folder / "samples.csv").write_text(
        "file,seed,class_label\r\n" + "".join(f"{n:06d}.png,{n},{n}\r\n" for n in range(3))
    )
    for number in range(3):
        Image.new("L", (8, 8), 80 * number).save(folder / f"{number:06d}.png")


def read_judged(folder: Path) -> Any:
    pictures, labels = unetgn.sampling.evaluate.open_samples(folder)
    if len(pictures) != len(labels):
        raise Wrong("other labels than pictures")
    for vector in pictures:
        if not ((vector >= 0) & (vector <= 1)).all():
            raise Wrong("a vector that is no image")
    return "samples"


NETWORK = (ValueError, OSError, CheckpointError)
FAMILIES = ("edm_song_ddpmpp_class_augment", "unet2d_butterflies")  # the smallest
DATA = (ValueError, DataError, OSError)
READABLE = [
    CHECKPOINTS,
    Readable("checkpoint of a stranger", make_checkpoints, resume_from_a_stranger, CHECKED, ("step-000002/*",),
             seal_checkpoint),
    Readable("checkpoint of adapters", make_adapters, read_adapters, CHECKED, ("step-000002/*",)),
    Readable("base and samples of a stranger", make_adapters, read_strangers_adapters, CHECKED,
             ("step-000002/base.json", "step-000002/samples.json"), seal_checkpoint),
    Readable("newest checkpoint", make_checkpoints, take_newest, CHECKED, writes=True),
    RUNS,
    Readable("sampling of a run", make_run, sample_run, files=("run/checkpoints/step-000006/*", "run/*"), writes=True),
    Readable("resume of a stranger's run", make_run, resume_strangers_run, files=("run/checkpoints/step-000006/*",),
             seal=seal_run, writes=True),
    Readable("sampling of a stranger's run", make_run, sample_run, files=("run/checkpoints/step-000006/*",),
             seal=seal_run, writes=True),
    Readable("resume of a stranger's stream", make_stream_run, resume_stream_run,
             files=("run/checkpoints/step-000004/*.json",), seal=seal_run, writes=True),
    Readable("logs", make_run, read_logs, files=("run/*.csv", "run/*.json"), refusals=(OSError,)),
    Readable("our network", make_pretrained, read_network, NETWORK),
    Readable("diffusers' network", make_diffusers, read_network, NETWORK),
    Readable("pipeline", make_pipeline, read_network, NETWORK, files=("pipeline/unet/*", "pipeline/*.json")),
    Readable("autoencoder", make_autoencoder, read_autoencoder, (ValueError,)),
    *(Readable(f"family {name}", functools.partial(make_family, name), functools.partial(read_family, name), NETWORK)
      for name in FAMILIES),
    Readable("configuration", make_config, read_config, (ConfigError,)),
    Readable("images", make_images, read_images, DATA),
    Readable("parquet", functools.partial(make_table, "parquet"), read_stream, DATA),
    Readable("arrow", functools.partial(make_table, "arrow"), read_stream, DATA),
    Readable("tar", functools.partial(make_table, "tar"), read_stream, DATA),
    Readable("latents", make_latents, read_latents, DATA, files=("*.safetensors",)),
    Readable("latents' manifest", make_latents, functools.partial(read_latents, values=False), DATA, seal=seal_latents),
    Readable("request of samples", make_samples, claim_samples, (SamplingError, OSError), files=("*.json",),
             writes=True),
    Readable("samples", make_judged, read_judged, (unetgn.sampling.evaluate.EvaluationError,)),
]  # fmt: skip
KINDS = [
    *(Kind(f"file: {readable.name}", functools.partial(attack, readable)) for readable in READABLE),
    *(Kind(f"members of {kind}", functools.partial(damaged_members, kind)) for kind in ("tar", "parquet", "arrow")),
]


def prepare(kinds: Iterable[Kind]) -> None:
    """Make the sound files of these kinds, before processes are forked."""
    names = {kind.name.removeprefix("file: ") for kind in kinds}
    for readable in READABLE:
        with quiet():
            if readable.name in names:
                made(readable)
