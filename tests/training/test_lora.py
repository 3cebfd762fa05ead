"""Adapters are trained in the place of a network's weights, resumed exactly, and read by diffusers."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, safe_open, save_file

from tests.attacks.files import seal_checkpoint_at
from tests.training.data.caches import cache
from tests.training.runs import assert_equal_bits, assert_same_tensors, rows, weights
from tests.training.test_kills import kill_again_and_again
from unetgn import UNet
from unetgn.sampling.sample import main as draw
from unetgn.training import lora
from unetgn.training.checkpoint import find_checkpoint
from unetgn.training.config_files import load_config
from unetgn.training.lora import LoRAConfig, add_adapter, base_digest, merged, trained_parameters, trained_state
from unetgn.training.network import load_checkpoint, load_network
from unetgn.training.throughput import flops_per_image
from unetgn.training.train import main

KEYS = ["lora.rank=3", "lora.alpha=6", "lora.dropout=0.2"]


@pytest.fixture(scope="module")
def config(stable_diffusion: Path, photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps on captions, which begins with the network of a tiny Stable Diffusion."""
    folder = tmp_path_factory.mktemp("lora")
    assert cache(stable_diffusion, photographs, folder / "cache", "--text-encoder", str(stable_diffusion)) == 0
    keys = {
        "model": UNet.from_diffusers(stable_diffusion).unet_config.to_dict(),
        "data": {"name": "latents", "path": str(folder / "cache"), "image_size": 8},
        "objective": {"clip_sample": False, "label_dropout": 0.2, "schedule": "scaled_linear", "beta_start": 0.00085,
                      "beta_end": 0.012},
        "train": {"steps": 4, "batch_size": 4, "log_every": 1, "trackers": [], "learning_rate": 0.05,
                  "initial_weights": str(stable_diffusion)},
        "ema": {"decay": 0.5, "power_widths": [0.1]},
        "preview": {"every": 2, "count": 2, "steps": 2},
        "checkpoint": {"every": 2, "keep": 9},
    }  # fmt: skip
    (folder / "lora.yaml").write_text(yaml.safe_dump(keys))
    return folder / "lora.yaml"


def train(config: Path, output: Path, *arguments: str) -> int:
    return main(["--config", str(config), "--output", str(output), *KEYS, *arguments])


@pytest.fixture(scope="module")
def run(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return what a run of four steps left."""
    folder = tmp_path_factory.mktemp("run") / "run"
    assert train(config, folder) == 0
    return folder


def inputs() -> tuple[torch.Tensor, int, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(2, 4, 8, 8, generator=generator, dtype=torch.float64), 500,
            torch.randn(2, 12, 24, generator=generator, dtype=torch.float64))  # fmt: skip


def by_definition(network: torch.nn.Module, tensors: dict[str, torch.Tensor], scale: float) -> torch.nn.Module:
    """Add scale·B·A to each weight, in float64."""
    state = network.double().state_dict()
    for name in tensors:
        if ".lora_A." in name:
            key = f"{name.partition('.lora_A.')[0].removeprefix('unet.')}.weight"
            state[key] += scale * tensors[name.replace("lora_A", "lora_B")].double() @ tensors[name].double()
    network.load_state_dict(state)
    return network


def test_a_checkpoint_has_adapters_only_and_the_network_below_stays(run: Path, stable_diffusion: Path) -> None:
    for kind in ("model", "ema"):
        assert all(".lora_" in name for name in weights(run, 4, kind))
    assert all(tensor.ndim == 2 and 3 in tensor.shape for tensor in weights(run, 4).values())
    moments = {name.rpartition("/")[0] for name in weights(run, 4, "optimizer")}
    assert moments == weights(run, 4).keys()
    assert any(tensor.any() for name, tensor in weights(run, 4).items() if "lora_B" in name)
    checkpoint = find_checkpoint(run)
    assert checkpoint.base() == base_digest(UNet.from_diffusers(stable_diffusion))


def test_diffusers_loads_the_adapter_and_predicts_what_the_merged_network_predicts(
    run: Path, stable_diffusion: Path
) -> None:
    """Theirs with the adapter and theirs merged by the definition are one in float64; alpha / rank is 2.

    Ours is theirs but for embeddings of time, which diffusers rounds to float32.
    """
    theirs = StableDiffusionPipeline.from_pretrained(stable_diffusion)
    theirs.load_lora_weights(run / "lora")
    tensors = load_file(run / "lora" / lora.WEIGHTS)
    averaged = weights(run, 4, "ema")
    assert_same_tensors({f"unet.{n.replace('.default.', '.')}": t for n, t in averaged.items()}, tensors)
    merged_theirs = UNet2DConditionModel.from_pretrained(stable_diffusion, subfolder="unet")
    ours = by_definition(UNet.from_diffusers(stable_diffusion), tensors, 6 / 3)
    with torch.no_grad():
        plain = UNet.from_diffusers(stable_diffusion).double()(*inputs()).sample
        wanted = by_definition(merged_theirs, tensors, 6 / 3)(*inputs()).sample
        own = ours(*inputs()).sample
        found = theirs.unet.double()(*inputs()).sample
        sampled = load_checkpoint(find_checkpoint(run), "ema").double()(*inputs()).sample
        whole = DiffusionPipeline.from_pretrained(run / "pipeline", custom_pipeline=str(run / "pipeline"),
                                                  trust_remote_code=True).unet.double()(*inputs()).sample  # fmt: skip
    assert (wanted - plain).abs().max() > 1e-3
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    for rounded in (own, sampled, whole):  # of the last two the merged weights are float32
        torch.testing.assert_close(rounded, wanted, rtol=0, atol=1e-5)


def test_our_network_loads_the_adapter_by_itself(run: Path, stable_diffusion: Path) -> None:
    unet = UNet.from_diffusers(stable_diffusion)
    unet.load_lora_adapter(run / "lora", prefix="unet")
    with torch.no_grad():
        wanted = by_definition(UNet.from_diffusers(stable_diffusion), load_file(run / "lora" / lora.WEIGHTS), 2.0)
        torch.testing.assert_close(unet.double()(*inputs()).sample, wanted(*inputs()).sample, rtol=0, atol=1e-12)


def test_a_run_of_adapters_that_is_resumed_is_the_unbroken_run(run: Path, config: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(run, broken)
    shutil.rmtree(broken / "checkpoints" / "step-000004")
    assert train(config, broken, "--resume", "auto") == 0
    assert_equal_bits(run, broken, 4)
    assert_same_tensors(weights(run, 4, "averages"), weights(broken, 4, "averages"))
    assert [row["loss"] for row in rows(run)] == [row["loss"] for row in rows(broken)]


@pytest.mark.slow
def test_a_run_of_adapters_that_is_killed_ends_with_the_same_bits(config: Path, tmp_path: Path) -> None:
    keys = yaml.safe_load(config.read_text()) | {"preview": {"every": 0}, "checkpoint": {"every": 5, "keep": 1}}
    keys["lora"] = {"rank": 3, "alpha": 6.0, "dropout": 0.2}
    (tmp_path / "lora.yaml").write_text(yaml.safe_dump(keys))
    kill_again_and_again(tmp_path / "lora.yaml", tmp_path, kills=2, steps=80, seed=0)


def test_the_network_may_move_and_no_other_takes_its_place(
    run: Path, config: Path, stable_diffusion: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken, moved = tmp_path / "broken", tmp_path / "moved"
    shutil.copytree(run, broken)
    shutil.rmtree(broken / "checkpoints" / "step-000004")
    shutil.copytree(stable_diffusion, moved)
    line = ["--resume", "auto", f"train.initial_weights={moved}"]
    assert train(config, broken, *line, "preview.every=0") == 0
    assert_equal_bits(run, broken, 4)
    file = moved / "unet" / "diffusion_pytorch_model.safetensors"
    with safe_open(file, "pt") as opened:
        facts = opened.metadata()
    changed = load_file(file)
    changed["conv_in.bias"] += 1
    save_file(changed, file, metadata=facts)
    capsys.readouterr()
    assert train(config, broken, *line, "train.steps=5") == 2
    assert "adapters of another network than is in train.initial_weights now" in capsys.readouterr().err
    sample = ["--checkpoint", str(broken), "--prompts", "a cat", "--steps", "2", "--seeds", "0"]
    assert draw([*sample, "--out", str(tmp_path / "out")]) == 2
    assert "has adapters only, and not the network that they are for" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_samples_are_drawn_and_another_run_begins_with_the_merged_network(
    run: Path, stable_diffusion: Path, tmp_path: Path
) -> None:
    sample = ["--checkpoint", str(run), "--prompts", "a cat", "--steps", "2", "--seeds", "0"]
    assert draw([*sample, "--out", str(tmp_path / "out")]) == 0
    network = load_network(run)
    assert_same_tensors(network.state_dict(), load_network(run / "pipeline").state_dict())
    assert not torch.equal(
        network.state_dict()["mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"],
        UNet.from_diffusers(stable_diffusion).state_dict()[
            "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"
        ],
    )


@pytest.mark.parametrize(
    ("file", "before", "after", "message"),
    [
        ("config.yaml", "rank: 3", "rank: 100000000", "the shape of"),
        ("config.yaml", "rank: 3", "rank: -1", "lora.rank is -1"),
        ("base.json", "sha256", "sha257", "base.json has no sha256 of weights"),
        ("base.json", '"sha256": "', '"sha256": "0', "base.json has no sha256 of weights"),
        ("config.yaml", "targets:", "targets: [nothing]\n  others:", "others"),
    ],
)
def test_a_strangers_checkpoint_of_adapters_is_refused_in_a_line(
    file: str, before: str, after: str, message: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its sums are right, and nothing of it fits."""
    shutil.copytree(run, tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000004"
    text = (checkpoint / file).read_text()
    assert before in text
    (checkpoint / file).write_text(text.replace(before, after, 1))
    seal_checkpoint_at(checkpoint)
    line = ["--checkpoint", str(checkpoint), "--prompts", "a cat", "--steps", "2", "--seeds", "0"]
    assert draw([*line, "--out", str(tmp_path / "out")]) == 2
    assert message in (said := capsys.readouterr().err)
    assert said.count("\n") == 1


def test_the_card_of_an_adapter_says_how_to_load_it(run: Path) -> None:
    card = (run / "lora" / "README.md").read_text()
    for part in ("load_lora_weights", "factors of rank 3", "4 steps of 4 images", "`pipeline`"):
        assert part in card
    assert str(run.parent) not in card


def test_convolutions_get_adapters_too_and_their_products_are_added() -> None:
    torch.manual_seed(0)
    unet = UNet(in_channels=1, out_channels=1, channels=(8, 16), depth=1, norm={"num_groups": 4})
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    add_adapter(unet, LoRAConfig(rank=2, targets=("conv1", "to_q")))
    with torch.no_grad():
        for parameter in trained_parameters(unet).values():
            parameter.normal_()
    state, after = trained_state(unet), merged(unet).state_dict()
    name = "down_blocks.0.resnets.0.conv1"
    down, up = (state[f"{name}.lora_{part}.default.weight"].double() for part in "AB")
    wanted = before[f"{name}.weight"].double() + torch.einsum("or,rikl->oikl", up[:, :, 0, 0], down)
    torch.testing.assert_close(after[f"{name}.weight"].double(), wanted, rtol=1e-5, atol=1e-5)
    assert after.keys() == before.keys()
    assert torch.equal(after["conv_in.weight"], before["conv_in.weight"])


def test_gradients_of_frozen_weights_are_not_counted() -> None:
    config = UNet(in_channels=1, out_channels=1, channels=(8,), depth=1, norm={"num_groups": 4}).unet_config
    whole, adapted = (flops_per_image(config, 16, None, choice) for choice in (None, LoRAConfig(rank=1)))
    assert whole / 2 < adapted < whole


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["lora.rank=0"], "lora.rank is 0; it must be at least 1"),
        (["lora.alpha=0"], "lora.alpha is 0.0; it must be above 0"),
        (["lora.dropout=1"], "lora.dropout is 1.0; it is a probability"),
        (["lora.targets=[]"], "lora.targets is empty"),
        (["lora.rank=2", "train.initial_weights=null"], "lora is set and train.initial_weights is not"),
        (["lora.rank=2", "optimizer.name=muon"], "optimizer.name is muon, but the two factors"),
    ],
)
def test_keys_that_make_no_adapter_are_refused(keys: list[str], message: str, config: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(config, keys)


def test_a_target_that_no_layer_is_called_ends_the_start(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(config, tmp_path / "run", "lora.targets=[to_q,to_qq]") == 2
    assert (
        "'to_qq', and no linear layer or convolution of the network is called so; there are" in capsys.readouterr().err
    )
    assert not (tmp_path / "run").exists()
