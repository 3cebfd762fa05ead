"""Runs on cached latents, with classes or captions, from the cache to the pictures."""

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from diffusers import AutoencoderKL, DiffusionPipeline, LDMPipeline, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel

from tests.training.runs import assert_equal_bits, assert_same_tensors, weights
from unetgn import UNet
from unetgn.pipelines import UNetPipeline
from unetgn.pipelines.pictures import tile_pixels
from unetgn.sampling.app import main as serve
from unetgn.sampling.folder import SamplingError
from unetgn.sampling.page.artist import Artist
from unetgn.sampling.page.asked import read_asked
from unetgn.sampling.sample import main as draw
from unetgn.sampling.strips import pixels_of
from unetgn.sampling.trained import load_trained
from unetgn.training.cache_latents import main as cache
from unetgn.training.checkpoint import find_checkpoint
from unetgn.training.config_files import load_config
from unetgn.training.data.latents import Latents
from unetgn.training.data.samples import IndexedSamples
from unetgn.training.network import load_initial_weights, load_network
from unetgn.training.objective import Objective, ObjectiveConfig, make_scheduler
from unetgn.training.pipeline import save_pipeline
from unetgn.training.prepare import prepare_samples
from unetgn.training.train import main

COMMON = {
    "train": {"steps": 4, "batch_size": 4, "log_every": 1, "trackers": []},
    "ema": {"decay": 0.5},
    "preview": {"every": 2, "count": 3, "steps": 2},
    "checkpoint": {"every": 2, "keep": 9},
}
SMALL = {"in_channels": 4, "out_channels": 4, "channels": [8, 16], "depth": 1, "norm": {"num_groups": 4}}


def make_cache(pipeline: Path, images: Path, out: Path, *arguments: str) -> Path:
    keys = ["data.name=folder", f"data.path={images}", "data.image_size=16", "--shard-size", "4"]
    assert cache(["--autoencoder", str(pipeline), "--out", str(out), *keys, *arguments]) == 0
    return out


@pytest.fixture(scope="module")
def classes(stable_diffusion: Path, photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with classes and flips."""
    return make_cache(stable_diffusion, photographs, tmp_path_factory.mktemp("classes"), "--flip")


@pytest.fixture(scope="module")
def captions(stable_diffusion: Path, photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with captions."""
    out = tmp_path_factory.mktemp("captions")
    return make_cache(stable_diffusion, photographs, out, "--text-encoder", str(stable_diffusion))


@pytest.fixture
def class_config(classes: Path, tmp_path: Path) -> Path:
    keys = {
        **COMMON,
        "model": {**SMALL, "num_classes": 2},
        "data": {"name": "latents", "path": str(classes), "image_size": 8, "random_flip": True, "held_out": 0.2},
        "objective": {"clip_sample": False, "label_dropout": 0.2},
    }
    (tmp_path / "classes.yaml").write_text(yaml.safe_dump(keys | {"train": COMMON["train"] | {"validate_every": 2}}))
    return tmp_path / "classes.yaml"


@pytest.fixture
def text_config(captions: Path, stable_diffusion: Path, tmp_path: Path) -> Path:
    keys = {
        **COMMON,
        "model": UNet.from_diffusers(stable_diffusion).unet_config.to_dict(),
        "data": {"name": "latents", "path": str(captions), "image_size": 8},
        "objective": {"clip_sample": False, "label_dropout": 0.2, "schedule": "scaled_linear", "beta_start": 0.00085,
                      "beta_end": 0.012},
        "preview": {**COMMON["preview"], "guidance_scale": 3.0},
        "train": {**COMMON["train"], "initial_weights": str(stable_diffusion)},
    }  # fmt: skip
    (tmp_path / "text.yaml").write_text(yaml.safe_dump(keys))
    return tmp_path / "text.yaml"


def train(config: Path, output: Path, *arguments: str) -> int:
    return main(["--config", str(config), "--output", str(output), *arguments])


def pixels(file: Path) -> np.ndarray:
    return np.asarray(Image.open(file)).astype(int)


def test_a_run_on_latents_shows_validates_and_samples_pictures(class_config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(class_config, run) == 0
    assert (run / "validation.csv").read_text().count("\n") == 3
    # Three pictures of 16 pixels, four times enlarged, two a row, with a white line around each.
    assert pixels(run / "samples" / "step-000004.png").shape == (132, 132, 3)
    assert (run / "denoise" / "step-000004.png").is_file()
    line = ["--checkpoint", str(run), "--steps", "3", "--seeds", "0-3", "--guidance-scale", "2"]
    assert draw([*line, "--out", str(tmp_path / "images")]) == 0
    assert pixels(tmp_path / "images" / "000003.png").shape == (16, 16, 3)
    assert not np.array_equal(pixels(tmp_path / "images" / "000000.png"), pixels(tmp_path / "images" / "000001.png"))


def test_the_final_pipeline_of_latents_gives_the_pictures_of_our_sampler(class_config: Path, tmp_path: Path) -> None:
    """On a schedule that ends in pure noise, where nothing is clipped, both begin where there is some of the image."""
    keys = ["model.num_classes=null", "objective.label_dropout=0", "preview.every=0", "data.random_flip=false"]
    assert train(class_config, tmp_path / "run", *keys, "objective.schedule=squared_cosine") == 0
    folder = tmp_path / "run" / "pipeline"
    pipeline = DiffusionPipeline.from_pretrained(folder, custom_pipeline=str(folder), trust_remote_code=True)
    assert pipeline.scheduler.alphas_cumprod[-1] > 1e-3
    assert_same_tensors(pipeline.unet.state_dict(), weights(tmp_path / "run", 4, "ema"))
    line = ["--checkpoint", str(tmp_path / "run"), "--steps", "4", "--scheduler", "ddim", "--seeds", "5"]
    assert draw([*line, "--out", str(tmp_path / "images")]) == 0
    from unetgn.pipelines.sampling import make_sampling_scheduler

    wanted = pixels(tmp_path / "images" / "000005.png")
    theirs = LDMPipeline(vqvae=pipeline.vae, unet=pipeline.unet,
                         scheduler=make_sampling_scheduler("ddim", pipeline.scheduler, 4))  # fmt: skip
    pipeline.use_scheduler("ddim")
    for image in (
        pipeline(seeds=5, num_inference_steps=4).images[0],
        theirs(generator=torch.Generator().manual_seed(5), num_inference_steps=4).images[0],
    ):
        assert abs(np.asarray(image).astype(int) - wanted).max() <= 1


def test_latents_are_never_mirrored_themselves(class_config: Path, classes: Path) -> None:
    samples, _ = prepare_samples(load_config(class_config), Accelerator(cpu=True), None)
    assert isinstance(samples, IndexedSamples)
    latents = Latents(str(classes), random_flip=True)
    plain = IndexedSamples(latents, samples.indices, samples.seed, random_flip=False)
    assert all(torch.equal(samples[i]["image"], plain[i]["image"]) for i in range(16))


def test_a_run_on_latents_that_is_resumed_is_the_unbroken_run(class_config: Path, tmp_path: Path) -> None:
    assert train(class_config, tmp_path / "whole", "data.num_workers=2") == 0
    assert train(class_config, tmp_path / "broken", "train.steps=3", "checkpoint.every=3") == 0
    assert train(class_config, tmp_path / "broken", "--resume", "auto") == 0
    assert_equal_bits(tmp_path / "whole", tmp_path / "broken", 4)


def test_sampling_finds_the_autoencoder_or_is_told_where_it_is(
    class_config: Path, classes: Path, stable_diffusion: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(classes, tmp_path / "cache")
    run, moved = tmp_path / "run", f"data.path={tmp_path / 'cache'}"
    assert train(class_config, run, moved, "preview.every=0") == 0
    line = ["--checkpoint", str(run), "--steps", "2", "--seeds", "0"]
    assert draw([*line, "--out", str(tmp_path / "here")]) == 0
    shutil.rmtree(tmp_path / "cache")
    assert draw([*line, "--out", str(tmp_path / "gone")]) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path / 'cache'}: there is no such folder" in error
    assert "Give the autoencoder of its latents as --autoencoder" in error
    assert draw([*line, "--out", str(tmp_path / "told"), "--autoencoder", str(stable_diffusion)]) == 0
    assert np.array_equal(pixels(tmp_path / "told" / "000000.png"), pixels(tmp_path / "here" / "000000.png"))
    told = [*line, "--out", str(tmp_path / "x"), "--autoencoder", str(stable_diffusion)]
    assert draw([*told, "--prompts", "a cat"]) == 2
    assert "this network reads no text: leave it out" in capsys.readouterr().err


def test_sampling_refuses_networks_that_do_not_fit_and_goes_on_with_those_that_do(
    text_config: Path, stable_diffusion: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    assert train(text_config, run, "preview.every=0", "train.steps=1") == 0
    line = ["--checkpoint", str(run), "--steps", "2", "--seeds", "0", "--prompts", "a cat", "--out", str(out)]
    shutil.copytree(stable_diffusion, tmp_path / "other")
    AutoencoderKL(latent_channels=8, block_out_channels=(8,), norm_num_groups=4).save_pretrained(tmp_path / "vae")
    config = CLIPTextConfig.from_pretrained(stable_diffusion / "text_encoder", hidden_size=32)
    CLIPTextModel(config).save_pretrained(tmp_path / "other" / "text_encoder")
    assert draw([*line, "--autoencoder", str(tmp_path / "vae")]) == 2
    assert "makes images of latents with 8 channels, but those of the network have 4" in capsys.readouterr().err
    assert draw([*line, "--text-encoder", str(tmp_path / "other")]) == 2
    assert "makes texts 32 wide, but the network reads texts [24] wide: give" in capsys.readouterr().err
    assert not out.exists()
    assert draw(line) == 0


@pytest.mark.parametrize("gone", ["autoencoder", "text_encoder", "tokenizer", "transformers"])
def test_what_the_end_of_a_run_needs_is_opened_before_it_begins(
    gone: str, text_config: Path, captions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    shutil.copytree(captions, tmp_path / "cache")
    if gone == "transformers":
        monkeypatch.setitem(sys.modules, "transformers", None)
    else:
        shutil.rmtree(tmp_path / "cache" / gone)
    assert train(text_config, tmp_path / "run", "--dry-run", f"data.path={tmp_path / 'cache'}") == 2
    error = capsys.readouterr().err
    assert ("text embeddings need the package transformers" if gone == "transformers" else f"cache/{gone}/") in error


def test_a_run_with_captions_that_is_resumed_with_workers_is_the_unbroken_run(
    text_config: Path, tmp_path: Path
) -> None:
    keys = ["preview.every=0", "data.num_workers=2"]
    assert train(text_config, tmp_path / "whole", *keys) == 0
    assert train(text_config, tmp_path / "broken", *keys, "train.steps=3", "checkpoint.every=3") == 0
    assert train(text_config, tmp_path / "broken", *keys, "--resume", "auto") == 0
    assert_equal_bits(tmp_path / "whole", tmp_path / "broken", 4)


def test_a_text_network_is_fine_tuned_into_a_stable_diffusion_pipeline(text_config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(text_config, run) == 0
    assert pixels(run / "samples" / "step-000004.png").shape == (132, 132, 3)
    pipeline = StableDiffusionPipeline.from_pretrained(run / "pipeline", safety_checker=None)
    assert type(pipeline.unet) is UNet2DConditionModel
    assert_same_tensors(pipeline.unet.state_dict(), weights(run, 4, "ema"))
    first = UNet2DConditionModel.from_pretrained(yaml.safe_load(text_config.read_text())["train"]["initial_weights"],
                                                 subfolder="unet")  # fmt: skip
    assert not torch.equal(first.conv_in.weight, pipeline.unet.conv_in.weight)

    line = ["--checkpoint", str(run), "--scheduler", "ddim", "--steps", "4", "--seeds", "5", "--guidance-scale", "3"]
    assert draw([*line, "--out", str(tmp_path / "cat"), "--prompts", "a cat"]) == 0
    assert draw([*line, "--out", str(tmp_path / "dog"), "--prompts", "dog"]) == 0
    cat, dog = (pixels(tmp_path / name / "000005.png") for name in ("cat", "dog"))
    assert not np.array_equal(cat, dog)
    from unetgn.pipelines.sampling import make_sampling_scheduler

    pipeline.scheduler = make_sampling_scheduler("ddim", pipeline.scheduler, 4)
    settings = {"guidance_scale": 3.0, "num_inference_steps": 4}
    image = pipeline("a cat", **settings, generator=torch.Generator().manual_seed(5)).images[0]
    assert abs(np.asarray(image).astype(int) - cat).max() <= 1
    assert draw([*line, "--out", str(tmp_path / "not"), "--prompts", "a cat", "--negative-prompt", "dog"]) == 0
    led_away = pixels(tmp_path / "not" / "000005.png")
    assert not np.array_equal(led_away, cat)
    expected = pipeline("a cat", negative_prompt="dog", **settings, generator=torch.Generator().manual_seed(5)).images[
        0
    ]
    assert abs(np.asarray(expected).astype(int) - led_away).max() <= 1
    assert draw([*line, "--out", str(tmp_path / "not"), "--prompts", "a cat"]) == 2  # of another request


def test_fine_tuning_begins_with_the_loss_of_the_network_that_it_begins_with(
    text_config: Path, stable_diffusion: Path
) -> None:
    config = load_config(text_config)
    samples, _ = prepare_samples(config, Accelerator(cpu=True), None)
    items = [samples[i] for i in range(4)]  # type: ignore[index]
    batch = {key: torch.stack([item[key] for item in items]) for key in items[0]}
    objective = Objective(config.objective, None, torch.zeros(12, 24))
    initial = load_initial_weights(config)
    assert initial is not None
    theirs = UNet2DConditionModel.from_pretrained(stable_diffusion, subfolder="unet").eval()
    prepared = objective.prepare(batch)
    with torch.no_grad():
        ours = objective.losses(initial.eval(), prepared)
        noisy = objective.scheduler.add_noise(batch["image"], batch["noise"], prepared["timesteps"])
        error = theirs(noisy, prepared["timesteps"], prepared["text"]).sample - batch["noise"]
    assert torch.allclose(ours, error.square().flatten(1).mean(1), rtol=1e-4)


def test_initial_weights_come_from_runs_and_pipelines_of_ours_too(text_config: Path, tmp_path: Path) -> None:
    run, quick = tmp_path / "run", ("preview.every=0", "checkpoint.every=9")
    assert train(text_config, run, *quick, "train.steps=2", "ema.decay=0.9", "train.learning_rate=1e-3") == 0
    load_network(run).save_pretrained(tmp_path / "saved")
    averaged = weights(run, 2, "ema")
    assert not torch.equal(averaged["conv_in.weight"], weights(run, 2)["conv_in.weight"])
    for source in (run, run / "checkpoints" / "step-000002", run / "pipeline", tmp_path / "saved"):
        assert_same_tensors(load_network(source).state_dict(), averaged)
    again = tmp_path / "again"
    few = (*quick, "train.steps=1", "train.learning_rate=1e-30")  # a step that moves nothing
    assert train(text_config, again, f"train.initial_weights={run}", *few) == 0
    assert_same_tensors(weights(again, 1), averaged)


def test_what_a_run_of_captions_alone_never_met_is_known_to_the_run_that_begins_with_it(
    text_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without dropped captions, from a network that met the empty one, from random weights, and from that run's."""
    keys = ["preview.every=0", "preview.guidance_scale=1", "train.steps=1", "objective.label_dropout=0"]
    for name, first, met in (("fine", None, True), ("alone", "null", False), ("after", "alone", False)):
        weights = [] if first is None else [f"train.initial_weights={first if first == 'null' else tmp_path / first}"]
        assert train(text_config, tmp_path / name, *keys, *weights) == 0
        trained = load_trained(find_checkpoint(tmp_path / name), "ema")
        assert trained.unconditional == met
        assert trained.unet.unet_config.condition.null_class_trained == met
        line = ["--checkpoint", str(tmp_path / name), "--steps", "2", "--seeds", "0", "--out", str(tmp_path / "out")]
        for ask in (["--prompts", "a cat", "--guidance-scale", "2"], ["--prompts", ""]):
            assert draw([*line, *ask]) == (0 if met else 2)
            shutil.rmtree(tmp_path / "out", ignore_errors=True)


def test_a_resumed_run_needs_its_initial_weights_no_more_but_takes_no_others(
    text_config: Path, stable_diffusion: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(stable_diffusion, tmp_path / "source")
    run, keys = tmp_path / "run", [f"train.initial_weights={tmp_path / 'source'}", "preview.every=0"]
    assert train(text_config, run, *keys, "train.steps=2") == 0
    shutil.rmtree(tmp_path / "source")
    assert train(text_config, run, "preview.every=0", "--resume", "auto") == 2
    assert "train.initial_weights was" in capsys.readouterr().err
    assert train(text_config, run, *keys, "--resume", "auto") == 0
    assert train(text_config, tmp_path / "whole", "preview.every=0") == 0
    assert_same_tensors(weights(run, 4), weights(tmp_path / "whole", 4))


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        (
            "text",
            ["train.initial_weights=nowhere"],
            "train.initial_weights nowhere: there is no such folder: give",
        ),
        (
            "text",
            ["model.attention.num_heads=2"],
            "is another network than model.* describes: encoder attention's num_h",
        ),
        ("text", ["model.channels=[32,32]"], "channels is [[32], [64]] there and [[32], [32]] here"),
        (
            "text",
            ["model.transformer=null", "objective.label_dropout=0", "preview.guidance_scale=1"],
            "cached with captions 24 wide, but the network reads no text",
        ),
        ("text", ["model.transformer.context_dim=32"], "but the network reads texts [32] wide: set"),
        ("classes", ["model.transformer.context_dim=24"], "context_dim is 24, but these latents were cached without"),
        ("classes", ["objective.clip_sample=true"], "objective.clip_sample is true, but latents are not confined"),
        ("classes", ["model.num_classes=3"], "model.num_classes is 3, but the images have 2 classes"),
        ("classes", ["data.image_size=16"], "set data.image_size to 8, and model.in_channels and"),
        ("classes", ["data.path=nowhere"], "nowhere: there is no such folder: give a folder that"),
        ("classes", ["model.condition.null_class=false"], "there is no class for the dropped labels"),
        ("classes", ["model.condition.vector_dim=8"], "model.condition.vector_dim is 8, but training has nothing"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    name: str, keys: list[str], message: str, request: pytest.FixtureRequest, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    config = request.getfixturevalue({"text": "text_config", "classes": "class_config"}[name])
    assert train(config, tmp_path / "run", "--dry-run", *keys) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_damaged_cache_is_an_error_before_the_first_step(
    class_config: Path, classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(classes, tmp_path / "cache")
    here = f"data.path={tmp_path / 'cache'}"
    shard = tmp_path / "cache" / "latents-00001.safetensors"
    contents = bytearray(shard.read_bytes())
    contents[-5] ^= 1
    shard.write_bytes(contents)
    assert train(class_config, tmp_path / "run", here) == 2
    assert "latents-00001.safetensors is not what was written (its sha256 differs)" in capsys.readouterr().err
    shutil.copy(classes / shard.name, shard)
    shutil.rmtree(tmp_path / "cache" / "autoencoder")
    assert train(class_config, tmp_path / "run", here) == 2
    assert "autoencoder/config.json is missing: delete it and start" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def drawn(artist: Artist, **fields: Any) -> tuple[str, np.ndarray]:
    """Draw by the fields of the page; return the last words, and the pixels of the grid."""
    asked = {"seeds": "0-3", "subject": None, "prompt": None, "negative_prompt": None, "scheduler": "ddim", "steps": 2,
             "guidance_scale": 1, "size": ""} | fields  # fmt: skip
    *_, last = artist.draw(read_asked(**asked))
    assert last.grid is not None
    return last.words, np.asarray(last.grid).astype(int)


def test_the_page_draws_latents_by_prompt_and_says_what_it_cannot(text_config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(text_config, run, "preview.every=0", "train.steps=1") == 0
    artist, cat = Artist(run, batch_size=3), {"prompt": "a cat", "guidance_scale": 2}
    pipeline = UNetPipeline.from_pretrained(run / "pipeline")
    pipeline.use_scheduler("ddim")
    settings = {"prompt": "a cat", "guidance_scale": 2, "num_inference_steps": 2}
    expected = [pixels_of(picture) for picture in pipeline(range(4), **settings).images]
    words, grid = drawn(artist, **cat)
    assert "4 images of step 1 in" in words
    assert abs(grid - np.asarray(tile_pixels(torch.stack(expected)))).max() <= 1
    assert abs(drawn(artist, prompt="a dog", guidance_scale=2)[1] - grid).max() > 1
    led_away = [pixels_of(picture) for picture in pipeline(range(4), negative_prompt="a dog", **settings).images]
    negative = drawn(artist, **cat, negative_prompt="a dog")[1]
    assert abs(negative - np.asarray(tile_pixels(torch.stack(led_away)))).max() <= 1
    assert abs(negative - grid).max() > 1
    assert np.array_equal(drawn(artist, **cat, negative_prompt="")[1], grid)
    assert drawn(artist, **cat, size="24")[1].shape == (100, 100, 3)  # twice enlarged, two a row, a line around each
    assert drawn(artist, prompt="a dog " * 9)[0].endswith("; the prompt is cut off after 12 tokens")
    both = {"prompt": "a dog " * 9, "negative_prompt": "a cat " * 9, "guidance_scale": 2}
    assert drawn(artist, **both)[0].endswith("; the prompt and the negative prompt are cut off after 12 tokens")
    nothing = drawn(artist)[1]  # a field that nobody has touched is the empty prompt
    assert np.array_equal(drawn(artist, prompt="")[1], nothing)
    for fields, said in {
        ("size", "15"): "size is 15; it must be a multiple of the autoencoder's 2",
        ("size", "34"): "makes 32 at most",
        ("subject", "3"): "class is '3'; this network has no classes",
        ("prompt", " "): "guidance 2: guidance leads away from the empty prompt, and no other is given",
    }.items():
        with pytest.raises(SamplingError, match=said):
            drawn(artist, **cat | dict([fields]))
    with pytest.raises(ValueError, match="negative_prompt was given, but guidance_scale is 1"):
        drawn(artist, prompt="a cat", negative_prompt="a dog")
    artist.close()


@pytest.mark.parametrize("option", ["--autoencoder", "--text-encoder"])
def test_the_page_refuses_parts_that_its_network_has_no_use_for_at_its_start(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text("{}")
    assert serve(["--checkpoint", str(tmp_path), option, str(tmp_path)]) == 2
    assert f"{option} was given, but this network" in capsys.readouterr().err


@pytest.mark.parametrize("of", ["a pipeline", "a cache"])
def test_a_saved_pipeline_does_not_say_where_its_parts_lay(
    of: str, stable_diffusion: Path, captions: Path, tmp_path: Path
) -> None:
    """It is sent to others, and paths name people and what they work on."""
    place = stable_diffusion if of == "a pipeline" else captions
    unet, scheduler = UNet.from_diffusers(stable_diffusion), make_scheduler(ObjectiveConfig(clip_sample=False))
    save_pipeline(unet, scheduler, tmp_path / "pipeline", cache=place)
    files = [file for file in (tmp_path / "pipeline").rglob("*") if file.suffix in (".json", ".md", ".txt")]
    assert {"vae", "text_encoder", "tokenizer"} <= {file.parent.name for file in files}
    said = {str(file): file.read_text() for file in files}
    assert not [name for name, text in said.items() if any(str(part) in text for part in (place, tmp_path))]
    assert UNetPipeline.from_pretrained(tmp_path / "pipeline").vae is not None
