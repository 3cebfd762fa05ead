"""Checks that a checkpoint that does not fit is refused as a whole, with a message that says what is wrong."""

import random
import re

import pytest
import torch
from safetensors.torch import save_file

from tests.interop.fixtures import NAMES, fixture
from unetgn.interop import convert, load
from unetgn.interop.families import FAMILIES


@pytest.fixture
def case():
    it = fixture("adm_conv_additive_legacy")
    return it.config, it.state_dict()


def test_missing_and_unexpected_keys_are_listed_together(case):
    config, state = case
    state["middle_block.0.in_layer.0.weight"] = state.pop("middle_block.0.in_layers.0.weight")
    both = r"1 missing: middle_block\.0\.in_layers\.0\.weight; 1 unexpected: middle_block\.0\.in_layer\.0\.weight"
    with pytest.raises(ValueError, match=both):
        convert("guided-diffusion", config, state)


@pytest.mark.parametrize("key", ["out.2.bias", "middle_block.1.qkv.weight", "middle_block.1.proj_out.weight"])
def test_a_misshapen_key_is_listed_with_both_shapes(case, key):
    config, state = case
    state[key] = torch.zeros(7, *state[key].shape[1:])
    with pytest.raises(ValueError, match=rf"{key} \(7,.* should give"):
        convert("guided-diffusion", config, state)


def test_a_prefix_makes_all_keys_missing_and_unexpected(case):
    config, state = case
    with pytest.raises(ValueError, match=r"128 missing: .* and 116 more; 128 unexpected"):
        convert("guided-diffusion", config, {f"net.{key}": value for key, value in state.items()})


def test_the_caller_keeps_a_state_dict_of_their_own(case):
    config, state = case
    unet = convert("guided-diffusion", config, state)
    before = {key: value.clone() for key, value in state.items()}
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(1)
    assert all(torch.equal(state[key], before[key]) for key in state)


def test_filter_taps_other_than_the_configuration_says_are_an_error():
    it = fixture("edm_song_ncsnpp_augment")
    state = it.state_dict()
    state["enc.8x8_down.skip.resample_filter"] = torch.full((1, 1, 4, 4), 1 / 16)
    with pytest.raises(ValueError, match=r"enc.8x8_down.skip.resample_filter is"):
        convert("edm", it.config, state)


@pytest.mark.parametrize(
    ("family", "config", "message"),
    [
        ("sdxl", {}, "family 'sdxl' is not supported"),
        ("edm", {}, "give DhariwalUNet or SongUNet as 'class'"),
        ("edm", {"class": "EDMPrecond"}, "class 'EDMPrecond' is not supported"),
        ("guided-diffusion", {"class": "UNetModel", "attention_resolution": [2]}, "attention_resolution.*did you mean"),
        ("guided-diffusion", {"class": "UNetModel"}, "needs in_channels"),
    ],
)
def test_a_wrong_family_class_or_option_is_named(family, config, message):
    with pytest.raises(ValueError, match=message):
        convert(family, config, {})


PLAIN = {"use_spatial_transformer": False, "context_dim": None, "legacy": True}  # attention as in guided-diffusion


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("compvis_sd1", {"n_embed": 8}, "n_embed=8 is not supported"),
        ("compvis_sd1", {"num_classes": "continuous"}, "num_classes='continuous' is not supported"),
        ("compvis_sd1", {"num_classes": "sequential"}, "needs adm_in_channels"),
        ("compvis_sd1", {"num_heads": -1}, "num_heads or num_head_channels"),
        ("compvis_sd1", {"use_spatial_transformer": False}, "context_dim=48 is not supported .it needs use_spatial"),
        ("sgm_sdxl_base", {"spatial_transformer_attn_type": "linear"}, "spatial_transformer_attn_type='linear'"),
        ("edm_song_ncsnpp_augment", {"encoder_type": "skip"}, "encoder_type='skip' is not supported"),
        ("edm_song_ncsnpp_augment", {"decoder_type": "skip"}, "decoder_type='skip' is not supported"),
        ("edm_dhariwal_class_augment", {"num_blocks": 0}, "DhariwalUNet: num_blocks=0 is not supported"),
        ("edm_song_ncsnpp_augment", {"embedding_type": "zero"}, "embedding_type='zero' is not supported"),
        ("adm_conv_additive_legacy", {"num_heads": 5}, "num_heads=5 does not divide 128"),
        ("unet2d_ddpm_cifar10", {"time_embedding_type": "fourier"}, "time_embedding_type='fourier'"),
        ("unet2d_ddpm_cifar10", {"class_embed_type": "projection"}, "class_embed_type='projection'"),
        ("unet2d_ddpm_cifar10", {"center_input_sample": True}, "center_input_sample=True"),
        ("unet2d_ddpm_cifar10", {"act_fn": "tanh"}, "act_fn='tanh'"),
        ("unet2d_ddpm_cifar10", {"downsample_padding": 2}, "downsample_padding=2"),
        ("unet2d_ddpm_cifar10", {"norm_num_groups": None}, "norm_num_groups=None"),
        ("unet2d_ddpm_cifar10", {"resnet_time_scale_shift": "spatial"}, "resnet_time_scale_shift='spatial'"),
        ("unet2d_ddpm_cifar10", {"attention_head_dim": 300}, "attention_head_dim=300 .* at most 128 channels"),
        ("unet2d_condition_sd15", {"attention_head_dim": 65}, "attention_head_dim=65 .* at most 64 channels"),
        ("adm_conv_additive_legacy", {"num_head_channels": 24}, "num_head_channels=24 does not divide 128"),
        ("compvis_sd1", {"num_heads": 7}, "UNetModel: num_heads=7 does not divide 64"),
        ("sgm_sdxl_base", {"num_head_channels": 24}, "num_head_channels=24 does not divide 128"),
        ("unet2d_ddpm_cifar10", {"norm_num_groups": 0}, "norm.num_groups must be at least 1, got 0"),
        ("unet2d_condition_sd15", {"dual_cross_attention": True}, "dual_cross_attention=True"),
        ("unet2d_condition_sd15", {"encoder_hid_dim_type": "ip_image_proj"}, "encoder_hid_dim_type='ip_image_proj'"),
        ("unet2d_condition_sd15", {"encoder_hid_dim_type": "text_proj"}, "'text_proj' needs encoder_hid_dim"),
        ("unet2d_condition_sd15", {"class_embed_type": "words"}, "class_embed_type='words'"),
        (
            "unet2d_condition_sd15",
            {"class_embed_type": "simple_projection"},
            "'simple_projection' needs projection_class_embeddings_input_dim",
        ),
        ("unet2d_condition_sd15", {"addition_embed_type": "words"}, "addition_embed_type='words'"),
        ("unet2d_condition_sd15", {"time_embedding_act_fn": "tanh"}, "time_embedding_act_fn='tanh'"),
        ("unet2d_condition_sd15", {"timestep_post_act": "tanh"}, "timestep_post_act='tanh'"),
        ("unet2d_condition_sd15", {"attention_type": "gated-3d"}, "attention_type='gated-3d' is not supported"),
        ("unet2d_condition_sd15", {"down_block_types": ["KDownBlock2D"] * 3}, "KDownBlock2D.*the x2 upscaler"),
        ("unet2d_condition_sd15", {"up_block_types": ["CrossAttnUpBlock3D"] * 3}, "3D.*a block of a video network"),
        ("unet2d_ddpm_cifar10", {"down_block_types": ["AttnSkipDownBlock2D"] * 3}, "AttnSkipDown.*a block of NCSN"),
        (
            "unet2d_condition_sd15",
            {
                "down_block_types": ["AttnDownBlock2D", "SimpleCrossAttnDownBlock2D", "DownBlock2D"],
                "norm_eps": 1e-6,
                "mid_block_type": None,
                "attention_head_dim": 32,
            },
            "norm_eps=1e-06 is not supported where blocks named Attn and Simple",
        ),
        ("unet2d_condition_sd15", {"resnet_out_scale_factor": 2.0}, "resnet_out_scale_factor=2.0"),
        ("unet2d_condition_sd15", {"resnet_skip_time_act": True}, "resnet_skip_time_act=True"),
        ("unet2d_condition_sd15", {"num_attention_heads": 8}, "num_attention_heads=8"),
        ("unet2d_condition_sd15", {"mid_block_type": "UNetMidBlock3DCrossAttn"}, "mid_block_type="),
        ("unet2d_condition_sd15", {"mid_block_scale_factor": 0}, "mid_block_scale_factor=0.* above 0"),
        ("unet2d_ddpm_cifar10", {"mid_block_scale_factor": 0}, "mid_block_scale_factor=0.* above 0"),
        ("adm_conv_additive_legacy", {"num_heads_upsample": 5}, "UNetModel: num_heads_upsample=5 does not divide 128"),
        ("compvis_sd1", {**PLAIN, "num_heads_upsample": 5}, "UNetModel: num_heads_upsample=5 does not divide 64"),
        ("adm_conv_additive_legacy", {"num_heads": 0}, "UNetModel: num_heads=0 does not divide 128"),
    ],
)
def test_an_option_that_is_not_supported_is_named_with_its_value(name, changes, message):
    it = fixture(name)
    with pytest.raises(ValueError, match=message):
        convert(it.meta["family"], {**it.config, **changes}, {})


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("compvis_sd1", {**PLAIN, "transformer_depth": 4}, "transformer_depth=4 .*needs use_spatial_transformer"),
        ("compvis_sd1", {**PLAIN, "use_linear_in_transformer": True}, "use_linear_in_transformer=True .*needs use_sp"),
        (
            "compvis_sd1",
            {**PLAIN, "disable_self_attentions": [True] * 3},
            "disable_self_attentions=.*needs use_spatial",
        ),
        (
            "compvis_sd1",
            {**PLAIN, "disable_middle_self_attn": True},
            "disable_middle_self_attn=True .*needs use_spatial",
        ),
        ("compvis_sd1", {"context_dim": None, "disable_self_attentions": [True] * 3}, "needs context_dim"),
        ("compvis_sd1", {"context_dim": None, "disable_middle_self_attn": True}, "needs context_dim"),
        (
            "compvis_sd1",
            {"resblock_updown": True, "conv_resample": False},
            "conv_resample=False .*resblock_updown=True",
        ),
        ("compvis_sd1", {"use_new_attention_order": True}, "use_new_attention_order=True .*rows are not packed"),
        ("compvis_sd1", {"num_heads_upsample": 4}, "num_heads_upsample=4 .*plain attention with legacy=True only"),
        ("compvis_sd1", {**PLAIN, "legacy": False, "num_heads_upsample": 4}, "num_heads_upsample=4 .*legacy=True only"),
        ("compvis_sd1", {**PLAIN, "num_head_channels": 32, "num_heads_upsample": 4}, "without num_head_channels"),
        (
            "adm_conv_additive_legacy",
            {"num_head_channels": 32, "num_heads_upsample": 2},
            "num_heads_upsample=2 .*num_head_channels decides",
        ),
        (
            "adm_conv_additive_legacy",
            {"resblock_updown": True, "conv_resample": False},
            "conv_resample=False .*resblock_updown=True",
        ),
        (
            "compvis_sd1",
            {"adm_in_channels": 4},
            "adm_in_channels=4 is not supported .it needs num_classes='sequential'",
        ),
        (
            "sgm_sdxl_base",
            {"disable_middle_transformer": True, "transformer_depth_middle": 4},
            "transformer_depth_middle=4 .*disable_middle_transformer=True leaves the middle without it",
        ),
        (
            "sgm_sdxl_base",
            {"disable_middle_transformer": True, "disable_middle_self_attn": True},
            "disable_middle_self_attn=True .*disable_middle_transformer=True leaves the middle without it",
        ),
    ],
)
def test_an_option_that_the_original_ignores_is_refused_by_name(name, changes, message):
    it = fixture(name)
    with pytest.raises(ValueError, match=message):
        convert(it.meta["family"], {**it.config, **changes}, {})


@pytest.mark.parametrize(
    ("name", "option", "given"),
    [
        ("compvis_sd1", "num_res_blocks", [1]),
        ("compvis_sd1", "transformer_depth", [1, 1, 1, 1]),
        ("compvis_sd1", "disable_self_attentions", [True]),
        ("compvis_sd1", "num_attention_blocks", [1, 1]),
        ("sgm_sdxl_base", "num_res_blocks", [1]),
        ("sgm_sdxl_base", "transformer_depth", [1]),
        ("sgm_sdxl_base", "disable_self_attentions", [True]),
        ("sgm_sdxl_base", "num_attention_blocks", [1]),
        ("unet2d_ddpm_cifar10", "down_block_types", ["DownBlock2D"] * 4),
        ("unet2d_ddpm_cifar10", "up_block_types", ["UpBlock2D"]),
        ("unet2d_condition_sd15", "down_block_types", ["DownBlock2D"]),
        ("unet2d_condition_sd15", "up_block_types", ["UpBlock2D"]),
        ("unet2d_condition_sd15", "layers_per_block", [1]),
        ("unet2d_condition_sd15", "attention_head_dim", [8]),
        ("unet2d_condition_sd15", "only_cross_attention", [True]),
        ("unet2d_condition_sd15", "cross_attention_dim", [48, 48]),
        ("unet2d_condition_sd15", "transformer_layers_per_block", [1]),
        ("unet2d_condition_sd15", "reverse_transformer_layers_per_block", [1, 2]),
    ],
)
def test_an_option_with_another_number_of_entries_than_levels_is_named_with_both(name, option, given):
    it = fixture(name)
    message = rf": {option}={re.escape(str(given))} has {len(given)} entries, but \w+ names 3 levels"
    with pytest.raises(ValueError, match=message):
        convert(it.meta["family"], {**it.config, option: given}, {})


def test_an_option_of_a_wrong_type_is_named(case):
    config, state = case
    with pytest.raises(TypeError, match=r"num_heads='four' is not int"):
        convert("guided-diffusion", {**config, "num_heads": "four"}, state)


@pytest.mark.parametrize("key", ["line\nend", "\x1b[31mred", "x" * 10**6, "\u202eright to left", ""], ids=ascii)
@pytest.mark.parametrize(
    "family", ["adm_conv_additive_legacy", "edm_song_ncsnpp_augment", "sgm_sdxl_base", "unet2d_butterflies"]
)
def test_whatever_a_key_is_called_the_error_is_a_line(family, key, tmp_path):
    it = fixture(family)
    state = it.state_dict() | {key: torch.zeros(1)}
    save_file(state, tmp_path / "weights.safetensors")
    for door in (
        lambda: convert(it.meta["family"], it.config, state),
        lambda: load(tmp_path / "weights.safetensors"),
        lambda: load(it.meta["family"], tmp_path / "weights.safetensors", **it.config),
    ):
        with pytest.raises(ValueError, match=r".") as refused:
            door()
        said = str(refused.value)
        assert said.isprintable()
        assert len(said) < 3000


@pytest.mark.parametrize("taps", [torch.zeros(1), torch.full((1, 1, 2, 2), torch.nan), torch.full((1, 1, 4, 4), 0.1)])
def test_filter_taps_are_told_in_a_line(taps):
    it = fixture("edm_song_ncsnpp_augment")
    state = it.state_dict() | {"enc.8x8_down.skip.resample_filter": taps}
    with pytest.raises(ValueError, match=r"enc\.8x8_down\.skip\.resample_filter .*filter taps make it") as refused:
        convert("edm", it.config, state)
    assert str(refused.value).isprintable()


NO_WEIGHTS = (torch.int64, torch.int8, torch.uint8, torch.bool, torch.complex64)
ONE_EACH = {fixture(name).meta["family"]: name for name in NAMES}  # a network of each family
# improved-diffusion is guided-diffusion's, and MONAI's has no fixture: its names are those of its own network.
UNTRIED = {"improved-diffusion", "monai"}


def test_each_family_has_a_network_here():
    assert ONE_EACH.keys() == FAMILIES.keys() - UNTRIED


@pytest.mark.parametrize("dtype", NO_WEIGHTS, ids=str)
@pytest.mark.parametrize("family", ONE_EACH)
def test_weights_that_are_no_floating_point_numbers_are_named_with_their_dtype(family, dtype):
    """One of a network, drawn, and all of them; names and shapes are enough to tell."""
    it = fixture(ONE_EACH[family])
    state = {key: torch.empty(shape, device="meta") for key, shape in it.meta["shapes"].items()}
    key = random.Random(f"{family}/{dtype}").choice(sorted(state))
    with pytest.raises(ValueError, match=rf"1 weights of a dtype .*: {re.escape(key)} \({dtype}\)"):
        convert(family, it.config, {**state, key: state[key].to(dtype)})
    with pytest.raises(ValueError, match=rf"has {len(state)} weights of a dtype .* \({dtype}\) and \d+ more"):
        convert(family, it.config, {key: tensor.to(dtype) for key, tensor in state.items()})


@pytest.mark.parametrize("many", ["one", "all"])
def test_a_file_of_whole_numbers_is_refused_whether_its_family_is_named_or_not(many, tmp_path):
    it = fixture("edm_dhariwal_class_augment")
    key = "out_norm.bias"
    wrong = {name: value.long() if many == "all" or name == key else value for name, value in it.state_dict().items()}
    save_file(wrong, tmp_path / "it.safetensors")
    config = dict(it.config)
    for door in (
        lambda: load(tmp_path / "it.safetensors"),
        lambda: load("edm", tmp_path / "it.safetensors", class_name=config.pop("class"), **config),
    ):
        with pytest.raises(ValueError, match=r"weights of a dtype that weights do not have: .*torch\.int64"):
            door()
