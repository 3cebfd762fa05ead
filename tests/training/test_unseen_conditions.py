"""A condition that training never met draws nothing: the network, its pipelines and the samplers refuse it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler

from unetgn import UNet, UNetConfig, interop
from unetgn.pipelines import UNetPipeline
from unetgn.pipelines.sampling import make_sampling_scheduler, sample
from unetgn.sampling.folder import SamplingError
from unetgn.sampling.sample import main as sample_main
from unetgn.sampling.trained import Trained, open_text_encoder
from unetgn.training.checkpoint import find_checkpoint
from unetgn.training.config import TrainConfig
from unetgn.training.config_files import load_config
from unetgn.training.network import load_checkpoint, load_initial_weights, make_network
from unetgn.training.objective import ObjectiveConfig, make_scheduler
from unetgn.training.train import main as train

KEYS = """
model: {sample_size: 8, in_channels: 1, out_channels: 1, channels: [8, 16], depth: 1, attention_levels: [],
        num_classes: 10, norm: {num_groups: 4}}
train: {steps: 2, batch_size: 4, trackers: []}
preview: {every: 0}
"""
NULL_ROW = torch.tensor([[0.0] * 10 + [1.0]])
# Every way to ask for a sample without a class.
WAYS: dict[str, Callable[[UNet], object]] = {
    "labels None": lambda unet: unet(torch.zeros(1, 1, 8, 8), 5),
    "the last index": lambda unet: unet(torch.zeros(1, 1, 8, 8), 5, class_labels=torch.tensor([10])),
    "a one-hot row": lambda unet: unet(torch.zeros(1, 1, 8, 8), 5, class_labels=NULL_ROW),
    "guidance": lambda unet: sample(
        unet, make_sampling_scheduler("ddim", DDPMScheduler(), 2), [0], (1, 8, 8), class_labels=[3], guidance_scale=2.0
    ),
    "no labels": lambda unet: sample(unet, make_sampling_scheduler("ddim", DDPMScheduler(), 2), [0], (1, 8, 8)),
    "a pipeline": lambda unet: DDPMPipeline(unet, DDPMScheduler())(num_inference_steps=2, output_type="np"),
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("unseen") / "tiny.yaml"
    file.write_text(KEYS)
    return file


@pytest.fixture(scope="module")
def run(config: Path) -> Path:
    """Train without dropped labels; the folder of the run."""
    assert train(["--config", str(config), "--output", str(config.parent / "run")]) == 0
    return config.parent / "run"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dropped", [0, 0.2])
def test_every_way_without_a_class_is_refused_where_no_label_was_dropped(
    config: Path, way: str, dropped: float
) -> None:
    unet = make_network(load_config(config, [f"objective.label_dropout={dropped}"]), None).eval()
    if dropped:
        assert WAYS[way](unet) is not None
    else:
        with pytest.raises(ValueError, match="class_labels"):
            WAYS[way](unet)


@pytest.mark.parametrize("dropped", [0, 0.2])
@pytest.mark.parametrize("before", [None, False, True])
def test_the_null_class_is_trained_by_this_run_or_by_the_one_before_and_that_is_kept_by_resumes(
    config: Path, tmp_path: Path, dropped: float, before: bool | None
) -> None:
    keys = load_config(config, [f"objective.label_dropout={dropped}"])
    if before is not None:
        source = replace(keys.model, condition=replace(keys.model.condition, null_class_trained=before))
        UNet.from_unet_config(source).save_pretrained(tmp_path)
        keys = replace(keys, train=replace(keys.train, initial_weights=str(tmp_path)))
    unet = make_network(keys, load_initial_weights(keys))
    assert unet.unet_config.condition.null_class_trained == (dropped > 0 or before is True)

    class Start:
        @staticmethod
        def unet_config() -> dict:
            return dict(unet.config)

    assert make_network(keys, None, Start()).unet_config == unet.unet_config  # type: ignore[arg-type]


@pytest.mark.parametrize("classes", [None, 3])
@pytest.mark.parametrize("dropped", [0, 0.2])
@pytest.mark.parametrize("before", [None, False, True])
def test_the_empty_text_is_trained_likewise(
    tmp_path: Path, classes: int | None, dropped: float, before: bool | None
) -> None:
    options = {"channels": (32, 64), "depth": 1, "num_classes": classes, "transformer": {"context_dim": 4}}
    model = UNetConfig.from_dict({**options, "attention": {"norm": {"eps": 1e-6}}})
    parts = {"objective": ObjectiveConfig(label_dropout=dropped), "train": TrainConfig(), "lora": None, "seed": 0}
    keys = SimpleNamespace(model=model, **parts)
    if before is not None:
        source = replace(model, condition=replace(model.condition, null_class_trained=before))
        UNet.from_unet_config(source).save_pretrained(tmp_path)
        keys.train = TrainConfig(initial_weights=str(tmp_path))
    unet = make_network(keys, load_initial_weights(keys))  # type: ignore[arg-type]
    met = dropped > 0 or before is True
    assert unet.unet_config.condition.null_class_trained == met
    assert ("null_class_trained=False" in repr(unet)) is not met
    pipeline = UNetPipeline(unet.eval(), make_scheduler(ObjectiveConfig()))
    pipeline.set_progress_bar_config(disable=True)
    empty = {"negative_prompt_embeds": torch.zeros(1, 3, 4)}
    given = {"prompt_embeds": torch.ones(1, 3, 4), "height": 8, "width": 8, "num_inference_steps": 1,
             "output_type": "pt", "class_labels": None if classes is None else 1}  # fmt: skip
    assert len(pipeline(0, **given).images) == 1
    if met:
        assert len(pipeline(0, **given, **empty, guidance_scale=2.0).images) == 1
    else:
        with pytest.raises(ValueError, match="guidance needs a network that was trained with c"):
            pipeline(0, **given, **empty, guidance_scale=2.0)
    pipeline.save_pretrained(tmp_path / "saved")
    assert ("guidance_scale=2" in (tmp_path / "saved" / "README.md").read_text()) is met
    theirs = interop.to_diffusers(unet)
    assert theirs.config.num_class_embeds == (None if classes is None else classes + met)


def test_a_pipeline_refuses_what_is_no_empty_text_of_the_others_shape() -> None:
    unet = UNet(channels=(32, 64), depth=1, transformer={"context_dim": 4}, sample_size=8).eval()
    texts = {"prompt_embeds": torch.ones(1, 3, 4), "guidance_scale": 2.0, "num_inference_steps": 1}
    for shape in ((2, 3, 4), (1, 5, 4), (1, 3, 2)):
        with pytest.raises(ValueError, match=r"negative_prompt_embeds are .*; one text like the others is \(1, 3, 4\)"):
            UNetPipeline(unet, make_scheduler(ObjectiveConfig()))(0, negative_prompt_embeds=torch.ones(shape), **texts)


def test_what_a_run_leaves_refuses_samples_without_a_class(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match="so that without one it draws rubbish: give class_labels from 0 to 9"):
        UNetPipeline.from_pretrained(run / "pipeline")(num_inference_steps=2)
    checkpoint = find_checkpoint(run)
    unet = load_checkpoint(checkpoint, "ema")
    assert unet(torch.zeros(1, 1, 8, 8), 5, class_labels=torch.tensor([9])).sample is not None
    line = ["--checkpoint", str(run), "--seeds", "0-1", "--steps", "2"]
    assert sample_main([*line, "--out", str(tmp_path / "guided"), "--guidance-scale", "2"]) == 2
    assert "objective.label_dropout above 0" in capsys.readouterr().err
    assert sample_main([*line, "--out", str(tmp_path / "plain")]) == 0
    # What was written before this was kept loads as it did.
    old = dict(checkpoint.unet_config())
    old["condition"] = {key: value for key, value in old["condition"].items() if key != "null_class_trained"}
    assert UNet.from_config(old)(torch.zeros(1, 1, 8, 8), 5).sample is not None


def test_a_run_cannot_claim_it(config: Path) -> None:
    with pytest.raises(ValueError, match=r"null_class_trained is false, but that is for training to find out"):
        load_config(config, ["model.condition.null_class_trained=false"])


def test_a_null_class_that_was_not_trained_does_not_become_a_class_of_diffusers() -> None:
    unet = UNet(channels=(32, 64), depth=1, num_classes=10, condition={"null_class_trained": False}).eval()
    theirs = interop.to_diffusers(unet)
    assert theirs.config.num_class_embeds == 10
    x, labels = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([9])
    torch.testing.assert_close(theirs(x, 5, class_labels=labels).sample, unet(x, 5, class_labels=labels).sample)


def test_an_empty_text_is_refused_where_training_had_captions_only() -> None:
    text = UNet(channels=(32, 64), depth=1, transformer={"context_dim": 4})
    trained = Trained(text, DDPMScheduler(), unconditional=False, digest="", cache=None, class_names=[])
    for prompts in ([""], ["a cat", " "]):
        with pytest.raises(SamplingError, match="--prompts has an empty text, but this network was trained with"):
            open_text_encoder(trained, None, prompts)
    for allowed, prompts in ((replace(trained, unconditional=True), [""]), (trained, ["a cat"])):
        with pytest.raises(SamplingError, match="holds no CLIP text encoder"):
            open_text_encoder(allowed, None, prompts)


def test_classes_without_images_are_named(config: Path, caplog: pytest.LogCaptureFixture) -> None:
    line = ["--config", str(config), "--dry-run", "--output", str(config.parent / "dry")]
    assert train([*line, "--overfit", "8"]) == 0
    assert "2 of 10 classes (8, 9) have no image to train on" in caplog.text
    caplog.clear()
    assert train(line) == 0
    assert "no image to train on" not in caplog.text


def test_the_start_says_what_the_network_will_not_draw(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for keys, said in (([], True), (["objective.label_dropout=0.1"], False), (["model.num_classes=null"], False)):
        assert train(["--config", str(config), "--dry-run", "--output", str(config.parent / "dry"), *keys]) == 0
        assert ("never without its class" in capsys.readouterr().out) == said
