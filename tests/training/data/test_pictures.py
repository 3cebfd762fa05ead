"""Pictures of every format, mode, ending, orientation and profile: what is read is what the definition says."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from unetgn.training.data.images import ImageFolder
from unetgn.training.data.pictures import ENDINGS, FORMATS, IMAGE_SUFFIXES, TooLarge, normalize, open_picture
from unetgn.training.data.pixels import Framing, InColour

MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16")
LOSSY = {"JPEG", "WEBP", "AVIF", "GIF", "JPEG2000"}


def source(mode: str, size: tuple[int, int] = (24, 16)) -> Image.Image:
    """A smooth picture in colour, opaque but for its left quarter where the mode has transparency (no seed needed)."""
    across, down = np.meshgrid(np.linspace(0, 255, size[0]), np.linspace(0, 255, size[1]))
    colours = Image.fromarray(np.stack([across, down, 255 - across], axis=-1).astype(np.uint8))
    if mode == "I;16":
        return Image.fromarray(np.asarray(colours.convert("L")).astype(np.uint16) * 257)
    if mode in ("LA", "RGBA"):
        colours = colours.convert(mode)
        alpha = Image.new("L", size, 255)
        alpha.paste(0, (0, 0, size[0] // 4, size[1]))
        colours.putalpha(alpha)
        return colours
    return colours.convert(mode)


def expected(picture: Image.Image) -> np.ndarray:
    """RGB by definition: 16 bits over 257, what is transparent white, else Pillow's own conversion."""
    if picture.mode == "I;16":
        grey = np.asarray(picture).astype(float) / 257
        return np.stack([grey] * 3, axis=-1)
    if "A" in picture.mode:
        white = Image.new("RGBA", picture.size, "white")
        return np.asarray(Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB")).astype(float)
    return np.asarray(picture.convert("RGB")).astype(float)


def saved(kind: str, mode: str) -> tuple[bytes, Image.Image] | None:
    """A picture in a format, and what it was before; None where the format has no such mode."""
    file, picture = io.BytesIO(), source(mode)
    try:
        picture.save(file, kind, **({"lossless": True} if kind == "WEBP" else {}))
    except (OSError, KeyError, ValueError):
        return None
    if mode == "I;16" and not Image.open(io.BytesIO(file.getvalue())).mode.startswith("I"):
        return None  # it has 8 bits, and clips the others
    return file.getvalue(), picture


CASES = [(kind, mode) for kind in FORMATS for mode in MODES if saved(kind, mode) is not None]


def test_the_formats_are_pixels_only_and_each_can_be_tried() -> None:
    assert not {"EPS", "PDF", "WMF", "FITS", "HDF5", "GRIB", "BUFR", "MPEG", "IPTC"} & set(FORMATS)
    assert {kind for kind, _ in CASES} == set(FORMATS) & set(Image.SAVE)


@pytest.mark.parametrize(("kind", "mode"), CASES)
def test_every_mode_of_every_format_is_read_as_it_was(kind: str, mode: str) -> None:
    made = saved(kind, mode)
    assert made is not None
    found, profile = normalize(open_picture(made[0]))
    assert profile == "none"
    assert found.mode in ("L", "RGB")
    kept = "A" not in mode or open_picture(made[0]).has_transparency_data  # some formats drop the alpha channel
    wanted = expected(made[1] if kept else made[1].convert(mode.rstrip("A")))
    error = np.abs(np.asarray(found.convert("RGB")).astype(float) - wanted).mean()
    assert error < (25 if mode == "P" else 12 if kind in LOSSY else 0.6)  # a palette is dithered


@pytest.mark.parametrize("upper", [False, True])
def test_every_ending_is_taken_in_either_case_and_what_is_left_is_counted(upper: bool, tmp_path: Path) -> None:
    endings = [(kind, ending) for kind in FORMATS if kind in Image.SAVE for ending in ENDINGS[kind]]
    for kind, ending in endings:
        made = saved(kind, "RGB") or saved(kind, "L")
        assert made is not None
        (tmp_path / f"{ending}.{ending.upper() if upper else ending}").write_bytes(made[0])
    for name in ("a.txt", "b.txt", "c.svg", "d", "e.eps"):
        (tmp_path / name).write_text("x")
    images = ImageFolder(str(tmp_path), Framing(16, 3))
    assert len(images.usable()) == len(images) == len(endings)
    assert images.left_out == {".txt": 2, ".svg": 1, "no ending": 1, ".eps": 1}
    assert {f".{ending}" for _, ending in endings} <= IMAGE_SUFFIXES


@pytest.mark.parametrize("kind", ["EPS", "PDF"])
def test_a_program_named_as_a_picture_is_not_run(kind: str, tmp_path: Path) -> None:
    source("RGB").save(tmp_path / "a.png", kind)
    with pytest.raises(UnidentifiedImageError):
        open_picture(tmp_path / "a.png")


@pytest.mark.parametrize("kind", [kind for kind in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF") if kind in FORMATS])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_upright_as_the_definition_turns_it(orientation: int, kind: str) -> None:
    picture, exif, file = source("RGB"), Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    picture.save(file, kind, exif=exif)
    found, _ = normalize(open_picture(file.getvalue()))
    wanted = ImageOps.exif_transpose(Image.open(io.BytesIO(file.getvalue())))
    assert found.size == wanted.size == ((16, 24) if orientation > 4 else (24, 16))
    assert np.array_equal(np.asarray(found), np.asarray(wanted.convert("RGB")))


def test_broken_exif_data_do_no_harm() -> None:
    file = io.BytesIO()
    source("RGB").save(file, "PNG", exif=b"Exif\0\0nothing of the kind")
    assert normalize(open_picture(file.getvalue()))[0].size == (24, 16)


def swapped() -> bytes:
    """A profile in which red is green and green red: sRGB's own with the names of two of its tags exchanged."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for tag in range(struct.unpack(">I", profile[128:132])[0]):
        name = slice(132 + 12 * tag, 136 + 12 * tag)
        profile[name] = {b"rXYZ": b"gXYZ", b"gXYZ": b"rXYZ"}.get(bytes(profile[name]), bytes(profile[name]))
    return bytes(profile)


def with_profile(profile: bytes, mode: str = "RGB", kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    source(mode).save(file, kind, icc_profile=profile)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_a_colour_profile_is_applied(mode: str, kind: str) -> None:
    file = io.BytesIO()
    source(mode).save(file, kind, icc_profile=swapped(), **({"lossless": True} if kind == "WEBP" else {}))
    found, profile = normalize(open_picture(file.getvalue()))
    wanted = expected(source(mode))[..., [1, 0, 2]]  # in that profile red is what sRGB calls green
    assert profile == "applied"
    assert np.abs(np.asarray(found).astype(float) - wanted).max() <= 2


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGB", "RGBA"])
def test_srgb_as_a_profile_changes_nothing_and_a_broken_one_is_left_aside(mode: str) -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    plain, _ = normalize(open_picture(with_profile(b"", mode)))
    for profile, what in ((srgb, "none"), (b"nothing of the kind", "broken"), (srgb[:200], "broken")):
        found, became = normalize(open_picture(with_profile(profile, mode)))
        assert (np.asarray(found) == np.asarray(plain)).all()
        assert became == what


def test_broken_profiles_are_counted_once_each_and_said_in_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(with_profile(b"nothing"))
    images = ImageFolder(str(tmp_path), Framing(8, 3))
    assert len(images.usable()) == 3
    assert images.tally is not None
    assert images.tally.profiles == {"broken": 3}
    assert images.tally.first_broken_profile == str(tmp_path / "0.png")
    assert caplog.text == ""


def test_a_picture_with_too_many_pixels_is_refused_before_it_is_decoded_with_file_size_and_key(tmp_path: Path) -> None:
    """The large one is a PNG header alone: 30,000 × 30,000 pixels in 60 bytes."""
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    file = io.BytesIO()
    source("RGB").save(file, "PNG")
    whole = bytearray(file.getvalue())
    whole[16:29] = header
    whole[29:33] = struct.pack(">I", zlib.crc32(b"IHDR" + header))
    (tmp_path / "bomb.png").write_bytes(bytes(whole))
    source("RGB").save(tmp_path / "good.png")
    with pytest.raises(ValueError, match=r"1 of 2 .*data\.max_pixels, first .*bomb\.png \(30000×30000 pixels"):
        ImageFolder(str(tmp_path), Framing(8, 3)).usable()
    (tmp_path / "bomb.png").unlink()
    with pytest.raises(TooLarge, match=r"24×16 pixels, more than data\.max_pixels, which is 383"):
        ImageFolder(str(tmp_path), Framing(8, 3, max_pixels=383)).image(0)
    assert len(ImageFolder(str(tmp_path), Framing(8, 3, max_pixels=384)).usable()) == 1


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("to_grey", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_colour_for_one_channel_is_refused_unless_grey_is_asked_for(channels: int, to_grey: bool, mode: str) -> None:
    """Grey for three channels is repeated, in whatever mode it comes."""
    for picture in (source(mode), source("L").convert(mode) if mode != "I;16" else source(mode)):
        whole, _ = normalize(picture)
        colour = len(np.unique(np.ptp(np.asarray(whole.convert("RGB")).astype(int), axis=-1))) > 1 and whole.mode != "L"
        framing = Framing(16, channels, to_grey=to_grey)
        if colour and channels == 1 and not to_grey:
            with pytest.raises(InColour, match=r"in colour, but model\.in_channels is 1"):
                framing(picture)
            continue
        array = framing(picture)
        assert array.shape == (channels, 16, 16)
        assert channels == 1 or colour or (array == array[:1]).all()
