"""Checks what the U-Net takes beside the image, and what it says of inputs that do not fit."""

import numpy as np
import pytest
import torch

from tests.tensors import randomized
from tests.unet.test_model import SMALL, noise
from unetgn import UNet


@pytest.fixture
def unet():
    return randomized(UNet(**SMALL, num_classes=10)).eval()


# Classes.


def test_no_label_is_the_last_row_of_the_table(unet):
    x = noise(2, 3, 8, 8)
    assert unet.class_embedding.weight.shape[0] == 11
    with torch.no_grad():
        assert torch.equal(unet(x, 5).sample, unet(x, 5, class_labels=torch.tensor([10, 10])).sample)
        assert not torch.equal(unet(x, 5).sample, unet(x, 5, class_labels=torch.tensor([9, 9])).sample)


def test_labels_may_be_rows(unet):
    x = noise(2, 3, 8, 8)
    with torch.no_grad():
        rows = unet(x, 5, class_labels=torch.eye(10)[[3, 7]]).sample
        torch.testing.assert_close(rows, unet(x, 5, class_labels=torch.tensor([3, 7])).sample)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 11]), "class_labels has 11; this network's classes are 0 to 10"),
        (torch.tensor([-1, 0]), "class_labels has -1; this network's classes are 0 to 10"),
        (torch.tensor([1]), "one entry for each of 2 samples, got 1"),
        (torch.eye(10)[:1], "one entry for each of 2 samples, got 1"),
    ],
)
def test_labels_that_are_no_classes_or_not_one_a_sample_are_an_error(unet, labels, message):
    with pytest.raises(ValueError, match=message):
        unet(noise(2, 3, 8, 8), 5, class_labels=labels)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32])
def test_labels_may_be_integers_of_any_width(unet, dtype):
    x, labels = noise(2, 3, 8, 8), torch.tensor([3, 10])
    with torch.no_grad():
        expected = unet(x, 5, class_labels=labels).sample
        assert torch.equal(unet(x, 5, class_labels=labels.to(dtype)).sample, expected)


@pytest.mark.parametrize("timestep", [np.int64(7), np.float32(7)])
def test_a_timestep_may_be_a_number_of_numpy(unet, timestep):
    x = noise(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(unet(x, timestep).sample, unet(x, 7).sample)


@pytest.mark.parametrize(
    "labels", [torch.zeros(2, 3), torch.tensor([1.0, 2.0]), torch.zeros(2, 2, 2), torch.tensor([True, False])]
)
def test_labels_of_another_shape_are_an_error(unet, labels):
    with pytest.raises(ValueError, match=r"class_labels must be \(N,\) integers or \(N, 10\) rows"):
        unet(noise(2, 3, 8, 8), 5, class_labels=labels)


def test_each_sample_has_its_own_label_and_timestep(unet):
    x, t, labels = noise(3, 3, 8, 8), torch.tensor([3, 500, 999]), torch.tensor([0, 4, 10])
    with torch.no_grad():
        together = unet(x, t, class_labels=labels).sample
        for i in range(3):
            alone = unet(x[i : i + 1], t[i : i + 1], class_labels=labels[i : i + 1]).sample
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "timestep", [7, 7.0, torch.tensor(7), torch.tensor([7]), torch.tensor([7, 7]), torch.tensor(7.0)]
)
def test_a_timestep_may_be_a_number_or_a_tensor(unet, timestep):
    x = noise(2, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(unet(x, timestep).sample, unet(x, torch.tensor([7.0, 7.0])).sample)


# Classes that are no rows of a table.


def class_network(kind, **condition):
    """Build a network that takes labels of a kind; its features are 32 wide and its embedding 20."""
    options = {"class_embedding": kind, "class_dim": 6 if kind.endswith("projection") else None, **condition}
    return randomized(UNet(**SMALL, time={"embedding_width": 20}, condition=options)).eval()


KINDS = {"timestep": (), "identity": (20,), "projection": (6,), "simple_projection": (6,)}


@pytest.mark.parametrize("entry", ["after_mlp", "concat", "before_mlp"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_sample_has_its_own_label_of_any_kind(kind, entry):
    unet, x, t = class_network(kind, class_entry=entry), noise(2, 3, 8, 8), torch.tensor([3, 500])
    width = (32,) if (kind, entry) == ("identity", "before_mlp") else KINDS[kind]
    labels = noise(2, *width)
    with torch.no_grad():
        together = unet(x, t, class_labels=labels).sample
        assert unet.embed(x, t, labels).shape == (2, 40 if entry == "concat" else 20)
        assert not torch.equal(together, unet(x, t, class_labels=labels.flip(0)).sample)
        alone = unet(x[1:], t[1:], class_labels=labels[1:]).sample
        torch.testing.assert_close(together[1:], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_labels_of_any_kind_are_looked_at(kind):
    unet, x = class_network(kind), noise(2, 3, 8, 8)
    with pytest.raises(ValueError, match=f"class_labels are missing: condition.class_embedding='{kind}'"):
        unet(x, 5)
    shape = r"\(2,\) numbers" if kind == "timestep" else rf"\(2, {KINDS[kind][0]}\), its width being"
    for labels in (noise(1, *KINDS[kind]), noise(2, 7), noise(2, 1, 1), torch.tensor(1.0)):
        with pytest.raises(ValueError, match=f"class_labels must be {shape}"):
            unet(x, 5, class_labels=labels)


def test_a_projected_context_is_looked_at_by_its_own_width():
    options = {"transformer": {"context_dim": 5}, "condition": {"context_dim": 7}}
    unet, x = randomized(UNet(**SMALL, **options)).eval(), noise(2, 3, 8, 8)
    with torch.no_grad():
        projected = unet.encoder_hid_proj(noise(2, 4, 7))
        plain = randomized(UNet(**SMALL, transformer={"context_dim": 5})).eval()
        plain.load_state_dict({key: value for key, value in unet.state_dict().items() if "hid_proj" not in key})
        assert torch.equal(unet(x, 5, noise(2, 4, 7)).sample, plain(x, 5, projected).sample)
    for context in (None, noise(2, 4, 5), noise(1, 4, 7), noise(2, 7)):
        with pytest.raises(ValueError, match=r"encoder_hidden_states must be \(N, length, 7\) with N = 2"):
            unet(x, 5, context)


# Inputs that are missing or not this network's.


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sample": noise(2, 4, 8, 8)}, r"sample must be \(N, 3, H, W\), got \(2, 4, 8, 8\)"),
        ({"sample": noise(2, 3, 8)}, r"sample must be \(N, 3, H, W\), got \(2, 3, 8\)"),
        ({"timestep": torch.tensor([1, 2, 3])}, r"timestep must be a number or one for each of 2 samples, got 3"),
        ({"class_labels": torch.tensor([0, 1])}, r"class_labels were given, but num_classes is None"),
        ({"augment_labels": torch.zeros(2, 9)}, r"augment_labels were given, but condition\.augment_dim is None"),
        ({"added_cond_kwargs": {"vector": torch.zeros(2, 9)}}, r"has \['vector'\], but condition\.vector_dim is None"),
        ({"timestep_cond": torch.zeros(2, 9)}, r"timestep_cond was given, but time_cond_proj_dim is None"),
        ({"encoder_hidden_states": torch.zeros(2, 4, 9)}, r"encoder_hidden_states were given, but .* no transformer"),
        (
            {"cross_attention_kwargs": {"gligen": {"boxes": 1.0}}},
            "cross_attention_kwargs has 'gligen', but transformer.grounding is None: nothing reads boxes",
        ),
        (
            {"cross_attention_kwargs": {"others": 1.0}},
            r"cross_attention_kwargs=\['others'\] are for attention processors",
        ),
        ({"down_block_additional_residuals": [torch.zeros(1)]}, r"down_block_additional_residuals .* 4 .*, got 1"),
        (
            {"down_block_additional_residuals": [torch.zeros(2, 32, 1, 1)] * 4},
            r"down_block_additional_residuals\[0\] must be \(2, 32, 8, 8\), got \(2, 32, 1, 1\)",
        ),
        (
            {"mid_block_additional_residual": torch.zeros(2, 64, 1, 1)},
            r"mid_block_additional_residual must be \(2, 64, 4, 4\), got \(2, 64, 1, 1\)",
        ),
        ({"sample": noise(2, 3, 0, 8)}, r"at least one pixel along each axis, got \(2, 3, 0, 8\)"),
        ({"sample": noise(2, 3, 8, 8).double()}, r"sample is torch\.float64, but the network is torch\.float32"),
        ({"sample": torch.zeros(2, 3, 8, 8, dtype=torch.uint8)}, r"sample is torch\.uint8, but the network is"),
    ],
)
def test_an_input_that_does_not_fit_is_an_error(given, message):
    unet = UNet(**SMALL)
    with pytest.raises(ValueError, match=message):
        unet(**{"sample": noise(2, 3, 8, 8), "timestep": 5, **given})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sample": [[0.0]]}, "sample must be a tensor, got list"),
        ({"timestep": "3"}, "timestep must be a number or a tensor, got '3'"),
        ({"timestep": None}, "timestep must be a number or a tensor, got None"),
        ({"class_labels": [0, 1]}, "class_labels must be a tensor, got list"),
        ({"augment_labels": [0, 1]}, "augment_labels must be a tensor, got list"),
        ({"timestep_cond": 3.0}, "timestep_cond must be a tensor, got float"),
        ({"encoder_hidden_states": "a cat"}, "encoder_hidden_states must be a tensor, got str"),
        ({"added_cond_kwargs": {"vector": [0.0]}}, "vector must be a tensor, got list"),
        (
            {"down_block_additional_residuals": [0.0] * 4},
            r"residuals\[0\] must be a tensor, got float",
        ),
        ({"mid_block_additional_residual": 0.0}, "mid_block_additional_residual must be a tensor, got float"),
    ],
)
def test_an_input_that_is_no_tensor_is_named_with_its_type(unet, given, message):
    with pytest.raises(TypeError, match=message):
        unet(**{"sample": noise(2, 3, 8, 8), "timestep": 5, **given})


def test_empty_cross_attention_kwargs_are_accepted():
    assert UNet(**SMALL)(noise(1, 3, 8, 8), 5, cross_attention_kwargs={}).sample.shape == (1, 3, 8, 8)


@pytest.mark.parametrize(
    ("context", "message"),
    [
        (None, "got None"),
        (torch.zeros(2, 4, 5), r"must be \(N, length, 6\) with N = 2, got \(2, 4, 5\)"),
        (torch.zeros(1, 4, 6), r"must be \(N, length, 6\) with N = 2, got \(1, 4, 6\)"),
        (torch.zeros(2, 4, 6).half(), r"encoder_hidden_states are torch\.float16, but sample is torch\.float32"),
    ],
)
def test_a_context_is_checked(context, message):
    unet = UNet(**SMALL, transformer={"context_dim": 6})
    with pytest.raises(ValueError, match=message):
        unet(noise(2, 3, 8, 8), 5, context)


@pytest.mark.parametrize(
    ("added", "message"),
    [
        (None, r"needs added_cond_kwargs .* got \[\]"),
        ({"vector": torch.zeros(2, 5)}, r"must be \(2, 7\), its width being condition\.vector_dim, got \(2, 5\)"),
        ({"vector": torch.zeros(1, 7)}, r"must be \(2, 7\), its width being condition\.vector_dim, got \(1, 7\)"),
        ({"vector": torch.zeros(7)}, r"must be \(2, 7\), its width being condition\.vector_dim, got \(7,\)"),
        ({"text_embeds": torch.zeros(2, 5), "time_ids": torch.zeros(2, 1)}, "needs added_cond_kwargs"),
        ({"vector": torch.zeros(2, 7), "image_embeds": torch.zeros(2, 7)}, "needs added_cond_kwargs"),
    ],
)
def test_a_conditioning_vector_is_checked(added, message):
    unet = UNet(**SMALL, condition={"vector_dim": 7})
    with pytest.raises(ValueError, match=message):
        unet(noise(2, 3, 8, 8), 5, added_cond_kwargs=added)


@pytest.mark.parametrize(("pooled", "numbers"), [((1, 3), (2, 2)), ((2, 3), (1, 2)), ((3,), (2, 2)), ((2, 3), (2,))])
def test_size_numbers_and_pooled_text_are_checked(pooled, numbers):
    unet = UNet(**SMALL, condition={"vector_dim": 11}, addition_time_embed_dim=4)
    added = {"text_embeds": torch.zeros(pooled), "time_ids": torch.zeros(numbers)}
    with pytest.raises(ValueError, match=r"text_embeds and time_ids must be \(2, D\) and \(2, K\), got"):
        unet(noise(2, 3, 8, 8), 5, added_cond_kwargs=added)


@pytest.mark.parametrize(
    ("name", "field"), [("augment_labels", "condition.augment_dim"), ("timestep_cond", "time_cond_pr")]
)
@pytest.mark.parametrize("shape", [(2, 5), (1, 9), (9,)])
def test_augmentation_and_guidance_labels_are_checked(name, field, shape):
    unet = UNet(**SMALL, condition={"augment_dim": 9}, time_cond_proj_dim=9)
    with pytest.raises(ValueError, match=rf"{name} must be \(2, 9\), its width being {field}"):
        unet(noise(2, 3, 8, 8), 5, **{name: torch.zeros(shape)})


def test_autocast_and_layerwise_casting_meet_other_dtypes():
    unet, x = randomized(UNet(**SMALL)), noise(2, 3, 8, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert unet(x.bfloat16(), 5).sample.isfinite().all()
    unet.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    assert unet.conv_in.weight.dtype == torch.bfloat16
    with torch.no_grad():
        assert unet(x, 5).sample.isfinite().all()
    with pytest.raises(ValueError, match=r"sample is torch\.float64, but the network is torch\.float32"):
        unet(x.double(), 5)


def test_return_dict_false_gives_a_tuple(unet):
    x = noise(1, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(unet(x, 5, return_dict=False)[0], unet(x, 5).sample)


def test_an_image_that_becomes_the_context_may_stand_beside_a_vector():
    options = {"attention": {"context_dim": 5},
               "condition": {"vector_dim": 4, "context_dim": 7, "context_projection": "image"}}  # fmt: skip
    unet, x = randomized(UNet(**SMALL, **options)).eval(), noise(2, 3, 8, 8)
    with torch.no_grad():
        assert (
            unet(x, 5, added_cond_kwargs={"vector": noise(2, 4), "image_embeds": noise(2, 7)}).sample.isfinite().all()
        )
    with pytest.raises(ValueError, match="needs 'image_embeds'"):
        unet(x, 5, added_cond_kwargs={"vector": noise(2, 4)})
