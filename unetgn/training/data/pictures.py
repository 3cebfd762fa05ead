"""Opens pictures: raster formats from a list, their size looked at first; then upright, with 8 bits, sRGB or grey.

Every image that is trained on, encoded or compared with comes in through `open_picture` and `normalize`.
"""

from __future__ import annotations

import functools
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageChops, ImageCms, UnidentifiedImageError, features

from unetgn.training.data.folders import check_ordinary

# By their names in Pillow, with the endings of their files. None of these runs a program or follows a link, as EPS, PDF
# and WMF do. TGA has no signature, so that it is tried last.
ENDINGS = {
    "PNG": ("png", "apng"),
    "JPEG": ("jpg", "jpeg", "jpe", "jfif", "mpo"),
    "WEBP": ("webp",),
    "GIF": ("gif",),
    "BMP": ("bmp",),
    "DIB": ("dib",),
    "TIFF": ("tif", "tiff"),
    "PPM": ("ppm", "pgm", "pbm", "pnm"),
    "JPEG2000": ("jp2", "j2k", "jpc", "jpf", "jpx", "j2c"),
    "AVIF": ("avif", "avifs"),
    "QOI": ("qoi",),
    "PCX": ("pcx",),
    "SGI": ("sgi", "rgb", "rgba", "bw"),
    "TGA": ("tga", "icb", "vda", "vst"),
}
NEEDS = {"WEBP": "webp", "JPEG2000": "jpg_2000", "AVIF": "avif"}  # which a Pillow may have been built without
Image.init()
FORMATS = [name for name in ENDINGS if name in Image.OPEN and (name not in NEEDS or features.check(NEEDS[name]))]
IMAGE_SUFFIXES = frozenset(f".{ending}" for name in FORMATS for ending in ENDINGS[name])

MAX_PIXELS = 89_478_485  # what Pillow takes for a decompression bomb: a quarter of a gibibyte with three bytes a pixel
Image.MAX_IMAGE_PIXELS = None  # data.max_pixels is the limit, and its error names the file and the key

GREY_WITHIN = 2  # shades of 255 by which a profile's rounding may part the channels of grey

ORIENTATION = 0x0112  # Exif 2.3: how the camera was held, and the way to turn the picture upright
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

Profile = Literal["none", "applied", "broken"]


class TooLarge(ValueError):
    """Says that an image has more pixels than data.max_pixels lets through."""


@dataclass(frozen=True)
class Facts:
    """Says what a picture was found to be."""

    size: tuple[int, int]
    """Width and height, upright."""
    colour: bool
    """False where the three channels are equal in every pixel."""
    profile: Profile
    """Says what became of its colour profile; "none" also for one that is sRGB's."""


def open_picture(source: Path | bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Open a file, or the contents of one, whatever its ending says; nothing but its head is decoded.

    Of several pictures in it the first is taken. Raises TooLarge; UnidentifiedImageError for one that is empty, or
    of no format that is read; and whatever Pillow raises of a broken file.
    """
    if not isinstance(source, bytes):
        check_ordinary(source)
    if not (len(source) if isinstance(source, bytes) else source.stat().st_size):
        raise UnidentifiedImageError("it is empty")
    try:
        picture = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS)
    except UnidentifiedImageError as error:  # which names the file, or where in memory its contents are
        raise UnidentifiedImageError("it is no picture of a format that is read") from error
    width, height = picture.size
    if width * height > max_pixels:
        picture.close()
        raise TooLarge(f"{width}×{height} pixels, more than data.max_pixels, which is {max_pixels}")
    return picture


def normalize(picture: Image.Image) -> tuple[Image.Image, Profile]:
    """Return the picture upright, in L or RGB of sRGB, what was transparent white; and what became of its profile.

    A profile that cannot be applied is left aside. Raises ValueError for pixels whose range of values is not known.
    """
    profile = picture.info.get("icc_profile")
    picture.load()  # which turns some formats upright already, and then says so
    turn = orientation(picture)
    picture = to_8_bit(picture)
    alpha = None
    if picture.has_transparency_data:
        picture = picture.convert("LA" if picture.mode in ("1", "L", "LA") else "RGBA")
        alpha = picture.getchannel("A")
    elif picture.mode == "LAB":
        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    if picture.mode not in ("LAB", "CMYK"):
        picture = picture.convert("L" if picture.mode in ("1", "L", "LA") else "RGB")
    picture, applied = to_srgb(picture, profile)
    if alpha is not None:
        picture = Image.composite(picture, Image.new(picture.mode, picture.size, "white"), alpha)
    if turn is not None:
        picture = picture.transpose(turn)
    return picture, applied


def orientation(picture: Image.Image) -> Image.Transpose | None:
    """Return what turns the picture upright, None where it stands so, or its Exif data are broken."""
    try:
        return UPRIGHT.get(picture.getexif().get(ORIENTATION, 1))
    except Exception:  # of a damaged header, which has nothing to do with the pixels, anything comes
        return None


def to_8_bit(picture: Image.Image) -> Image.Image:
    """Return the picture with 8 bits a channel.

    Raises ValueError for modes whose range of values is not known (32-bit integers and floats).
    """
    if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format == "PPM"):  # whose range is 16 bits
        return Image.fromarray((np.asarray(picture, dtype=np.uint32) // 257).astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {picture.mode} (32 bits) have no known range: save it with 8 or 16 bits")
    return picture


def to_srgb(picture: Image.Image, profile: bytes | None) -> tuple[Image.Image, Profile]:
    """Return the picture, in L, RGB, CMYK or LAB, in L or RGB of sRGB, and what became of its profile."""
    plain = picture if picture.mode == "L" else picture.convert("RGB") if picture.mode != "LAB" else None
    if profile is None:
        return plain or picture, "none"
    try:
        transform = transform_of(profile, picture.mode)
    except (ImageCms.PyCMSError, OSError, ValueError):
        return plain or picture.getchannel("L"), "broken"
    if transform is None:
        return plain or picture, "none"
    return transform.apply(picture if picture.mode == transform.input_mode else picture.convert("RGB")), "applied"


@functools.lru_cache(maxsize=64)  # the pictures of a camera have one profile, and a transform takes a while to make
def transform_of(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Make what takes pixels of a mode from their profile to sRGB; None where that changes nothing.

    Raises PyCMSError, OSError or ValueError where the profile is broken, or not one for such pixels.
    """
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    space = source.profile.xcolor_space.strip()
    modes = {"RGB": ("RGB", "L"), "GRAY": ("L",), "CMYK": ("CMYK",), "Lab": ("LAB",)}.get(space, ())
    if mode not in modes:
        raise ValueError(f"a profile of {space} for pixels of mode {mode}")
    transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), modes[0], "RGB")
    if modes[0] in ("L", "RGB"):
        shades = Image.fromarray(np.indices((16, 16, 16), dtype=np.uint8).reshape(3, 64, 64).transpose(1, 2, 0) * 17)
        before = shades.convert(modes[0])
        after = np.asarray(transform.apply(before), dtype=int)
        if np.abs(after - np.asarray(before.convert("RGB"), dtype=int)).max() <= 1:
            return None
    return transform


def is_colour(picture: Image.Image) -> bool:
    """Return True where the channels of a picture differ somewhere."""
    if picture.mode == "L":
        return False
    red, green, blue = picture.split()
    apart = (np.asarray(ImageChops.difference(green, other)).max() for other in (red, blue))
    return any(shades > GREY_WITHIN for shades in apart)
