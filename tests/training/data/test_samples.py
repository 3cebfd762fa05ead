"""The order of the images and all noise are functions of (seed, sample counter), however training is divided up."""

import numpy as np
import pytest
import torch

from unetgn.training.data.config import DataConfig, open_images, split
from unetgn.training.data.images import Digits
from unetgn.training.data.samples import IndexedSamples, Purpose, StepBatches, random_generator
from unetgn.training.errors import DataError


@pytest.fixture(scope="module")
def digits() -> Digits:
    return Digits()


def counters(rank: int, ranks: int, batch: int, accumulation: int, steps: range) -> list[list[int]]:
    return list(StepBatches(steps.start, steps.stop, batch, accumulation, rank, ranks))


@pytest.mark.parametrize(("ranks", "batch", "accumulation"), [(1, 12, 1), (2, 6, 1), (3, 2, 2), (1, 4, 3), (2, 3, 2)])
def test_a_step_takes_the_same_samples_however_it_is_divided(ranks: int, batch: int, accumulation: int) -> None:
    per_step = batch * accumulation * ranks
    for step in (0, 7):
        taken = [
            counter
            for rank in range(ranks)
            for one in counters(rank, ranks, batch, accumulation, range(step, step + 1))
            for counter in one
        ]
        assert sorted(taken) == list(range(step * per_step, (step + 1) * per_step))


def test_batches_after_a_resume_are_those_of_the_unbroken_run() -> None:
    whole = counters(1, 2, 5, 2, range(0, 10))
    assert counters(1, 2, 5, 2, range(0, 4)) + counters(1, 2, 5, 2, range(4, 10)) == whole
    assert len(StepBatches(4, 10, 5, 2, 1, 2)) == len(whole) - 8


def test_every_epoch_visits_every_image_once_in_an_order_of_its_own(digits: Digits) -> None:
    stream = IndexedSamples(digits, np.arange(100, 150), seed=3)
    epochs = [[int(i) for i in stream.order(epoch)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(100, 150)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_sample_is_a_function_of_seed_and_counter(digits: Digits) -> None:
    first, again = (IndexedSamples(digits, np.arange(1797), seed=5) for _ in range(2))
    again[3]  # whatever was asked for before
    for key, value in first[1234].items():
        assert torch.equal(value, again[1234][key]), key
    other_seed = IndexedSamples(digits, np.arange(1797), seed=6)
    assert not torch.equal(first[1234]["noise"], other_seed[1234]["noise"])
    assert not torch.equal(first[1234]["noise"], first[1234 + 1797]["noise"])


class Captioned(Digits):
    """Digits whose text is their number, three tokens wide two; their image takes a draw of its own."""

    def image(self, index: int, random: np.random.Generator | None = None) -> np.ndarray:
        return super().image(index) * (1 if random is None else np.float32(random.random()))

    def text(self, index: int) -> np.ndarray:
        return np.full((3, 2), index, dtype=np.float32)


def test_texts_travel_with_their_images() -> None:
    stream = IndexedSamples(Captioned(), np.arange(100, 150), seed=3)
    for counter in (0, 70):
        index = float(stream.order(counter // 50)[counter % 50])
        assert torch.equal(stream[counter]["text"], torch.full((3, 2), index))
    assert "text" not in IndexedSamples(Digits(), np.arange(10), seed=3)[0]


def test_what_an_image_draws_for_itself_changes_nothing_else(digits: Digits) -> None:
    own, none = (
        IndexedSamples(Captioned(), np.arange(1797), seed=3)[5],
        IndexedSamples(digits, np.arange(1797), seed=3)[5],
    )
    assert not torch.equal(own["image"], none["image"])
    assert all(torch.equal(own[key], none[key]) for key in ("noise", "label", "time", "drop"))
    assert torch.equal(own["image"], IndexedSamples(Captioned(), np.arange(1797), seed=3)[5]["image"])


def test_worker_processes_give_the_same_batches_as_none(digits: Digits) -> None:
    stream = IndexedSamples(digits, np.arange(1797), seed=1, random_flip=True)
    batches = StepBatches(2, 6, 8, 1, 0, 1)
    here = list(stream.loader(batches, num_workers=0, pin_memory=False))
    there = list(stream.loader(batches, num_workers=2, pin_memory=False))
    assert len(here) == len(there) == 4
    for one, other in zip(here, there, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_noise_is_standard_normal_and_times_are_uniform(digits: Digits) -> None:
    stream = IndexedSamples(digits, np.arange(1797), seed=0)
    samples = [stream[i] for i in range(1500)]
    noise = torch.stack([sample["noise"] for sample in samples]).double()
    assert abs(noise.mean()) < 4 / noise.numel() ** 0.5
    assert abs(noise.var() - 1) < 4 * (2 / noise.numel()) ** 0.5
    for key in ("time", "drop"):
        values = torch.stack([sample[key] for sample in samples])
        assert values.min() >= 0
        assert values.max() < 1
        assert abs(values.mean() - 0.5) < 4 * (1 / 12 / len(samples)) ** 0.5


def test_random_flip_mirrors_about_half_of_the_images(digits: Digits) -> None:
    plain, flipped = (IndexedSamples(digits, np.arange(1797), seed=0, random_flip=flip) for flip in (False, True))
    mirrored = 0
    for i in range(200):
        one, other = plain[i]["image"], flipped[i]["image"]
        assert torch.equal(other, one) or torch.equal(other, one.flip(-1))
        mirrored += not torch.equal(other, one)
    assert 70 < mirrored < 130


def test_held_out_images_are_never_trained_on_and_do_not_depend_on_the_seed() -> None:
    train, held = split(1797, 0.1)
    assert len(held) == 180
    assert sorted([*train, *held]) == list(range(1797))
    assert np.array_equal(split(1797, 0.1)[1], held)
    assert len(split(10, 0.0)[1]) == 0


def test_streams_of_different_purpose_differ() -> None:
    draws = {tuple(random_generator(0, purpose, 1).random(2)) for purpose in Purpose}
    assert len(draws) == len(Purpose)


@pytest.mark.parametrize(
    ("config", "channels", "message"),
    [
        (DataConfig(image_size=16), 1, r"data\.image_size is 16, but the digits are 8 pixels wide"),
        (DataConfig(), 3, r"model\.in_channels is 3, but the digits are grey: set it to 1"),
        (DataConfig(), 4, r"1 \(grey\) or 3 \(RGB\)"),
        (DataConfig(name="folder", path="nowhere"), 3, r"data\.path 'nowhere' is not a folder"),
        (DataConfig(name="datasets", path="nowhere"), 3, r"data\.path 'nowhere' should be a folder .*; found no file"),
        (DataConfig(name="stream", path="a/b"), 3, r"data\.name is stream, but here images are asked for by number"),
    ],
)
def test_wrong_data_is_refused_with_the_key_and_the_remedy(config: DataConfig, channels: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_images(config, channels)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"held_out": 1.0}, r"data\.held_out is 1\.0"),
        ({"num_workers": -1}, r"data\.num_workers is -1"),
        ({"image_size": 0}, r"data\.image_size is 0"),
        ({"path": "x"}, r"data\.path is 'x', but data\.name digits takes none.* for folder, datasets, stream"),
        ({"random_crop": True}, r"data\.random_crop is True, but data\.name digits takes none"),
        ({"name": "folder", "path": "x", "image_column": "png"}, r"data\.image_column is 'png', but data\.name folder"),
        ({"name": "folder", "path": "x", "crop_scale": 1.2}, r"crop_scale is 1\.2, but data\.random_crop is off"),
        ({"name": "folder", "path": "x", "crop_scale": 0.9, "random_crop": True}, r"crop_scale is 0\.9; .*at least 1"),
        ({"name": "datasets", "path": "x", "shuffle_buffer": 2}, r"data\.shuffle_buffer is 2, but .* for stream"),
        ({"name": "stream", "path": "x", "shuffle_buffer": 0}, r"data\.shuffle_buffer is 0; .* at least 1"),
        ({"name": "stream", "path": "x", "held_out_most": 0}, r"data\.held_out_most is 0; .* at least 1"),
        ({"name": "folder", "path": "x", "cut_shards": "read"}, r"data\.cut_shards is 'read', but .* for stream"),
        ({"without": ("a",)}, r"data\.without is \('a',\), but data\.name digits takes none"),
        ({"name": "folder"}, r"data\.name folder needs data\.path"),
        (
            {"name": "datasets", "path": "x", "split": "test"},
            r"data\.split is 'test', but data\.name datasets takes none",
        ),
        ({"name": "folder", "path": "x", "subset": "a"}, r"data\.subset is 'a', but data\.name folder takes none"),
    ],
)
def test_contradictory_data_keys_are_refused(keys: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**keys)


def test_the_fingerprint_of_samples_is_of_the_images_of_which_are_taken_and_of_their_labels() -> None:
    class Relabelled(Digits):
        def label(self, index: int) -> int:
            return 9 - super().label(index)

    class Others(Digits):
        def fingerprint(self) -> str:
            return "others"

    sources = [(Digits(), 0), (Digits(), 1), (Relabelled(), 0), (Others(), 0)]
    streams = [IndexedSamples(images, np.arange(first, first + 10), seed=0) for images, first in sources]
    assert len({stream.fingerprint() for stream in streams}) == 4
    assert IndexedSamples(Digits(), np.arange(10), seed=1).fingerprint() == streams[0].fingerprint()


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("error", [OSError("truncated"), SyntaxError("broken PNG file"), ValueError("too many")])
def test_an_image_that_breaks_during_a_run_is_named(error: Exception, num_workers: int) -> None:
    class Breaking(Digits):
        def image(self, index: int, random: np.random.Generator | None = None) -> np.ndarray:
            if index == 7:
                raise error
            return super().image(index, random)

    stream = IndexedSamples(Breaking(), np.arange(10), seed=0)
    place = [int(i) for i in stream.order(0)].index(7)
    loaded = stream.loader([[c] for c in range(10)], num_workers=num_workers, pin_memory=False)
    assert [float(next(loaded)["label"]) for _ in range(place)] == [float(i) for i in stream.order(0)[:place]]
    message = rf"^digit 7 cannot be read any more: {type(error).__name__}: {error}$"
    with pytest.raises(DataError, match=message):
        next(loaded)
