"""Memory does not grow with the number of images, wherever many of them are read or written."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tests.traced import peak_of
from unetgn.sampling import folder, judge, sample
from unetgn.sampling.figures import agreement, fit_classifier, moments, nearest
from unetgn.sampling.folder import Subject, file_of, write_summary
from unetgn.sampling.sets import Pictures
from unetgn.training.data import looking
from unetgn.training.data.images import Images
from unetgn.training.data.looking import look_at_all
from unetgn.training.data.pictures import Facts
from unetgn.training.data.pixels import TooSmall
from unetgn.training.data.text import TextEncoder

# Numbers of images. What keeps them shows between the first two; the others are those of true sets.
COUNTS = {"hundreds": (100, 600), "thousands": (1000, 10_000), "twenty thousand": (1000, 20_000)}
SIDE = 32  # an image takes 3 kB, and 25 kB in float64
CEILING = 700  # bytes that an image may leave behind: its name, its seed, a distance


class Numbered(Images):
    """Numbers images that are made when they are asked for; some are broken or too small."""

    shape, class_names = (3, SIDE, SIDE), None

    def __init__(self, count: int, problem: Callable[[str], Exception] | None = None) -> None:
        self.count, self.problem = count, problem

    def __len__(self) -> int:
        return self.count

    def image(self, index: int, random: np.random.Generator | None = None) -> np.ndarray:
        pixels = np.full(self.shape, index / self.count, np.float32)
        if self.problem and index % 2:
            raise self.problem(f"{pixels.shape}")  # with the image in its traceback
        return pixels

    def look(self, index: int) -> Facts:
        self.image(index)
        return Facts((SIDE, SIDE), colour=True, profile="none")

    def label(self, index: int) -> int:
        return index % 3

    def name(self, index: int) -> str:
        return f"image {index}"

    def usable(self) -> np.ndarray:
        return np.arange(self.count)


def read_broken(count: int, out: Path, problem: Callable[[str], Exception]) -> None:
    with pytest.raises(ValueError, match="images"):
        look_at_all(Numbered(count, problem))


def pictures(count: int) -> Pictures:
    """Give grey images of 16 pixels, which are vectors of 2 kB, from a reader."""
    return Pictures(lambda n: np.full((1, 16, 16), n / count), range(count))


def classify(count: int, out: Path) -> None:
    few, labels = np.stack(list(pictures(6))), np.arange(6) % 3
    agreement(fit_classifier(few, labels), pictures(count), np.arange(count) % 3)


def compare(samples: int, real: int, out: Path, patch: pytest.MonkeyPatch) -> None:
    """Judge so many samples against so many real images, of which twenty are held out."""
    opened = judge.Real(pictures(real), pictures(real), pictures(20), lambda part: np.arange(len(part)) % 3)
    patch.setattr(judge, "open_samples", lambda out: (pictures(samples), np.arange(samples) % 3))
    main = SimpleNamespace(is_main_process=True)
    assert judge.Judge(opened, main, "held_out", None, out).judge(out)["samples"] == samples  # type: ignore[arg-type]


def draw(count: int, out: Path, patch: pytest.MonkeyPatch) -> None:
    """Draw so many images, with a network that is not asked, to files that are not written."""
    patch.setattr(sample, "write_png", lambda file, picture: None)
    alone = SimpleNamespace(process_index=0, num_processes=1, is_main_process=True, wait_for_everyone=lambda: None)
    patch.setattr(sample, "ask_main", lambda accelerator, question: question())
    sample.make_images(
        lambda seeds, subjects: [Image.new("RGB", (SIDE, SIDE)) for _ in seeds],  # type: ignore[arg-type]
        {seed: Subject() for seed in range(count)},
        out,
        alone,  # type: ignore[arg-type]
        batch=25,
    )


def count_long(count: int, out: Path) -> None:
    """Count the captions that are too long, with a tokenizer that is as greedy as CLIP's."""
    encoder = TextEncoder.__new__(TextEncoder)
    encoder.tokens = 77

    class Tokens:
        def __init__(self, captions: list[str]) -> None:
            self.input_ids = [np.zeros(900, np.int64) for _ in captions]

    encoder.tokenizer = Tokens
    assert encoder.too_long(["a cat"] * count) == count


SUBJECTS: dict[str, Callable[[int], Subject]] = {
    "no classes": lambda seed: Subject(),
    "classes": lambda seed: Subject(seed % 10),
    "prompts": lambda seed: Subject(None, "a cat"),
}
# Everything that goes through many images.
WORK: dict[str, Callable[[int, Path], object]] = {
    **{
        f"the summary of {name}, npz={npz}": lambda count, out, make=make, npz=npz: write_summary(
            out, {seed: make(seed) for seed in range(count)}, npz=npz
        )
        for name, make in SUBJECTS.items()
        for npz in (False, True)
    },
    "reading all": lambda count, out: look_at_all(Numbered(count)),
    "reading broken ones": lambda count, out: read_broken(count, out, OSError),
    "reading small ones": lambda count, out: read_broken(count, out, lambda words: TooSmall(words, (SIDE, SIDE))),
    "moments": lambda count, out: moments(pictures(count)),
    "nearest of many": lambda count, out: nearest(pictures(9), pictures(count)),
    "nearest of few": lambda count, out: nearest(pictures(count), pictures(9)),
    "classes": classify,
    "captions": count_long,
    "drawing": lambda count, out: with_patches(lambda patch: draw(count, out, patch)),
    "judging many samples": lambda count, out: with_patches(lambda patch: compare(count, 30, out, patch)),
    "judging by many real images": lambda count, out: with_patches(lambda patch: compare(30, count, out, patch)),
}


def with_patches(work: Callable[[pytest.MonkeyPatch], None]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        work(patch)


# Those of true sets in CI; what is like another one with `-m slow`.
LIKE = ("the summary of no classes", "the summary of prompts", "reading broken", "reading small", "nearest of few")
MARKS = {"hundreds": (), "thousands": pytest.mark.thorough, "twenty thousand": pytest.mark.slow}
CASES = [
    pytest.param(name, counts, marks=pytest.mark.slow if marks and name.startswith(LIKE) else marks)
    for counts, marks in MARKS.items()
    for name in WORK
]


@pytest.mark.parametrize(("name", "counts"), CASES)
def test_the_most_memory_is_the_same_for_few_and_for_many_images(
    name: str, counts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few, many = COUNTS[counts]
    # Files of samples are made when they are read.
    monkeypatch.setattr(folder, "read_pixels", lambda file: np.full((SIDE, SIDE, 3), int(file.stem) % 256, np.uint8))
    # What is bounded is small here, so that few images reach it.
    monkeypatch.setattr(folder, "GRID", 40)
    monkeypatch.setattr(looking, "AHEAD", 2)
    monkeypatch.setattr("unetgn.training.data.text.BLOCK", 50)
    monkeypatch.setattr("unetgn.sampling.figures.BLOCK", 32)
    monkeypatch.setattr("unetgn.sampling.figures.KEPT", 64)
    monkeypatch.setattr(judge, "FITTED", 50)

    def left_behind() -> float:
        least, most = (peak_of(partial(WORK[name], count, tmp_path)) for count in (few, many))
        return (most - least) / (many - few)

    # Now and then the table of Python's interned strings doubles, which names of files go to; not twice in a row.
    assert left_behind() < CEILING or left_behind() < CEILING


def test_an_archive_is_what_numpy_would_have_written(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for channels in (1, 3):
        out = tmp_path / str(channels)
        out.mkdir()
        pixels = random.integers(0, 256, (5, 7, 6, channels), dtype=np.uint8)
        for seed, image in enumerate(pixels):
            Image.fromarray(image[..., 0] if channels == 1 else image).save(file_of(out, seed))
        write_summary(out, {seed: Subject(seed) for seed in range(5)}, npz=True)
        with np.load(out / "samples.npz") as archive:
            assert set(archive.files) == {"arr_0", "seeds", "labels"}
            assert np.array_equal(archive["arr_0"], pixels)
            assert archive["seeds"].tolist() == archive["labels"].tolist() == list(range(5))


def tiles(out: Path, side: int) -> Iterator[np.ndarray]:
    """Cut grid.png into its images, row by row; a white line lies around each."""
    grid = np.asarray(Image.open(out / "grid.png"))
    for top in range(1, grid.shape[0], side + 2):
        for left in range(1, grid.shape[1], side + 2):
            yield grid[top : top + side, left : left + side]


@pytest.mark.parametrize(
    ("labels", "columns", "said"),
    [
        ([4, 2, 4, 2, 4, 2], 2, "all of 6 images, a class a column: 2, 4"),
        ([7, 7, 7, 1], 2, "all of 4 images, a class a column: 1, 7"),
        ([None] * 5, 3, "all of 5 images"),
        ([3, 3], 2, "all of 2 images"),
        (list(range(10)) * 40, 10, "250 of 400 images, a class a column: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9"),
        ([None] * 300, 16, "256 of 300 images"),
        (list(range(100)), 32, f"32 of 100 images, a class a column: {', '.join(map(str, range(32)))}"),
    ],
)
def test_a_grid_has_a_class_a_column_and_says_how_many_it_shows(
    labels: list[int | None], columns: int, said: str, tmp_path: Path
) -> None:
    side = 64
    for seed, label in enumerate(labels):
        Image.new("L", (side, side), 2 * (label or 0)).save(file_of(tmp_path, seed))
    assert write_summary(tmp_path, {seed: Subject(label) for seed, label in enumerate(labels)}, npz=False) == said
    shown = list(tiles(tmp_path, side))
    assert Image.open(tmp_path / "grid.png").width == columns * (side + 2)
    wanted = sorted({label for label in labels if label is not None})
    for place, tile in enumerate(shown):
        grey = {2 * wanted[place % columns]} if len(wanted) > 1 else {2 * (labels[0] or 0)}
        assert set(tile.flat) in (grey, {255})
    assert sum(set(tile.flat) != {255} for tile in shown) == int(
        said.split(" of ")[1 if "all" in said else 0].split()[0]
    )


def test_a_grid_of_large_images_shows_fewer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "GRID_PIXELS", 8 * 8 * 5)
    for seed in range(9):
        Image.new("RGB", (8, 8)).save(file_of(tmp_path, seed))
    assert write_summary(tmp_path, {seed: Subject() for seed in range(9)}, npz=False) == "5 of 9 images"
