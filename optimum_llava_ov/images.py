"""Images from outside: opened within limits, and made as small as the model sees them.

Whatever the sides of an image are, opening and preparing it takes at most about 5 bytes for each of `ImageLimits.max_pixels`, and one
image is opened at a time. What stays in memory is what the model sees.
"""

from __future__ import annotations

import io
import math
import os
import stat
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from optimum_llava_ov.errors import ImageError


# Pillow decodes these itself. EPS would start Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
_JPEGS = ("JPEG", "MPO")  # Pillow calls a JPEG of several images "MPO"

# A larger image is reduced by a whole factor before it is resampled; up to here, pixels are those of the original code.
_LARGE = 4096 * 4096
_STRIP = 1024 * 1024  # pixels that are converted at a time
_BYTES_PER_PIXEL = 5  # of `ImageLimits.max_pixels`, that decoding may take
_MAX_SCANS = 100  # of a JPEG. Usual are 1 to 10, and each takes the time of a whole image, even if it is empty.
_START_OF_SCAN = b"\xff\xda"

_one_at_a_time = threading.RLock()


@dataclass(frozen=True)
class ImageLimits:
    """
    Attributes:
        max_bytes (`int`): of an image's file.
        max_pixels (`int`): width times height. Formats whose decoders need several copies of an image may have fewer.
        max_aspect_ratio (`float`): the longer side divided by the shorter one.
        max_images (`int`): in one question.
    """

    max_bytes: int = 20_000_000
    max_pixels: int = 50_000_000
    max_aspect_ratio: float = 100
    max_images: int = 16


DEFAULT_LIMITS = ImageLimits()


def see_image(source: Any, image_processor: Any, limits: ImageLimits = DEFAULT_LIMITS) -> Image.Image:
    """What the model sees of an image: [`open_image`], then [`fit_to_model`].

    Args:
        source: a `PIL.Image`, a path, or the bytes of a file.
        image_processor: the bundle's.

    Raises:
        [`ImageError`]: it is not an image of a format that is read here, or is more than `limits` allow.
    """
    with _one_at_a_time:
        return fit_to_model(open_image(source, limits), image_processor)


def open_image(source: Any, limits: ImageLimits = DEFAULT_LIMITS) -> Image.Image:
    """
    Args:
        source: a `PIL.Image`, a path, or the bytes of a file. Of a file of several images, the first one is taken.

    Returns:
        The image in RGB of 8 bits, turned as its EXIF orientation says. Deeper images are scaled to 8 bits, and transparency is left
        out. Images of more than 4096 x 4096 pixels are reduced to fewer.

    Raises:
        [`ImageError`]: it is not an image of a format that is read here, or is more than `limits` allow.
    """
    if isinstance(source, Image.Image):
        name = "The image"
    elif isinstance(source, (str, os.PathLike, bytes)):
        name = "The image" if isinstance(source, bytes) else f"The image {source}"
    else:
        raise ImageError(
            f"An image is given as a PIL.Image, a path or the bytes of a file, not as {type(source).__name__}."
        )
    try:
        with _one_at_a_time:
            if isinstance(source, Image.Image):
                _check(source, name, limits)
                return _decoded(source, name)
            data = source if isinstance(source, bytes) else _read(Path(source), name, limits.max_bytes)
            _check_bytes(len(data), name, limits.max_bytes)
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                _check(image, name, limits)
                factor = _factor(image.width * image.height)
                image.draft(None, (image.width // factor, image.height // factor))  # a JPEG is decoded at reduced size
                return _decoded(image, name)
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(f"{name} cannot be read: it is not one of {', '.join(FORMATS)}.") from error
    except Exception as error:  # decoders raise anything when a file is damaged
        raise ImageError(f"{name} cannot be read: {error or type(error).__name__}") from error


def fit_to_model(image: Image.Image, image_processor: Any) -> Image.Image:
    """Make an image as small as the model sees it, in steps that stay small.

    The image processor makes the same `pixel_values` of the result as of `image`, so it takes the place of `image` everywhere.
    Only if the square around it has more than 4096 x 4096 pixels, an image that the model sees in a square is reduced first.

    Args:
        image: in RGB.
        image_processor: the bundle's. One that resizes in another way than CLIP's or LLaVA's gets the image as it is.
    """
    if getattr(image_processor, "do_pad", None) and hasattr(image_processor, "pad_to_square"):
        factor = _factor(max(image.size) ** 2)
        image = _padded(image.reduce(factor) if factor > 1 else image, image_processor.image_mean)
    if not image_processor.do_resize:
        return image
    size = image_processor.size
    if size.get("height") and size.get("width"):
        return image.resize((size.get("width"), size.get("height")), image_processor.resample)
    edge = size.get("shortest_edge")
    if not edge or size.get("longest_edge"):
        return image
    image = image.resize([int(edge * side / min(image.size)) for side in image.size], image_processor.resample)
    return _cropped(image, image_processor.crop_size, edge) if image_processor.do_center_crop else image


def check_number_of_images(number: int, limits: ImageLimits = DEFAULT_LIMITS) -> None:
    """
    Raises:
        [`ImageError`]: these are too many for one question.
    """
    if number > limits.max_images:
        raise ImageError(
            f"The question comes with {number} images, and at most {limits.max_images} are accepted. Leave some out."
        )


def _read(path: Path, name: str, max_bytes: int) -> bytes:
    with open(path, "rb", opener=_open_at_once) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ImageError(f"{name} cannot be read: it is not a file.")
        _check_bytes(status.st_size, name, max_bytes)
        return file.read(max_bytes + 1)


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # a pipe would wait for somebody who writes


def _check_bytes(size: int, name: str, max_bytes: int) -> None:
    if size > max_bytes:
        raise ImageError(f"{name} has {size / 1e6:.1f} MB, and at most {max_bytes / 1e6:g} MB are accepted.")


def _check(image: Image.Image, name: str, limits: ImageLimits) -> None:
    """Before anything is decoded."""
    if image.format not in (None, *FORMATS, *_JPEGS):
        raise ImageError(
            f"{name} cannot be read: it is {image.format}, not one of {', '.join(FORMATS)}. Convert it first."
        )
    width, height = image.size
    found = f"{name} has {width} x {height} pixels"
    if min(image.size) < 1:
        raise ImageError(f"{found}; at least 1 x 1 are expected.")
    if width * height > limits.max_pixels:
        raise ImageError(
            f"{found}, and at most {limits.max_pixels / 1e6:g} million are accepted. "
            "Make it smaller; the model itself sees a few hundred pixels a side."
        )
    if max(image.size) > limits.max_aspect_ratio * min(image.size):
        raise ImageError(
            f"{found}: one side is {max(image.size) / min(image.size):.0f} times the other, and at most "
            f"{limits.max_aspect_ratio:g} times is accepted. Cut out what the question is about."
        )
    scans = _scans(image) if image.format in _JPEGS else 1
    if scans > _MAX_SCANS:
        raise ImageError(f"{name} has {scans} scans, and at most {_MAX_SCANS} are accepted. Save it again as a JPEG.")
    needed, allowed = _decoding_bytes(image, scans), _BYTES_PER_PIXEL * limits.max_pixels
    if needed > allowed:
        raise ImageError(
            f"{found}, and as this kind of {image.format} takes {needed / 1e6:.0f} MB to decode; at most {allowed / 1e6:.0f} MB are "
            "accepted. Make it smaller, or save it as PNG."
        )


def _scans(image: Image.Image) -> int:
    """How many times a JPEG goes through its image; several with a progressive one. Not too few."""
    file = getattr(image, "fp", None)
    if file is None:  # decoded already
        return 1
    place = file.tell()  # behind the start of the first one
    scans = 1 + file.read().count(_START_OF_SCAN)
    file.seek(place)
    return scans


def _decoding_bytes(image: Image.Image, scans: int) -> int:
    """Memory that Pillow takes to decode an image, at its peak. Each number was measured."""
    pixels = image.width * image.height
    if image.format == "WEBP":
        return 16 * pixels
    if image.format in _JPEGS and scans > 1:  # libjpeg keeps the coefficients of all scans, in 16 bits
        samples = sum(across * down for _, across, down, _ in image.layer)
        most = max(across for _, across, *_ in image.layer) * max(down for _, _, down, _ in image.layer)
        return 2 * pixels * samples // most + 4 * pixels // _factor(pixels) ** 2
    if image.format == "TIFF":  # libtiff holds a strip or tile, as large as the file says
        tags = image.tag_v2
        bits = max(tags.get(ExifTags.Base.BitsPerSample, (1,))) * tags.get(ExifTags.Base.SamplesPerPixel, 1)
        rows = min(tags.get(ExifTags.Base.RowsPerStrip, image.height), image.height)
        tile = tags.get(ExifTags.Base.TileWidth, image.width) * tags.get(ExifTags.Base.TileLength, rows)
        return 4 * pixels + tile * max(4, math.ceil(bits / 8))
    return 4 * pixels


def _factor(pixels: int) -> int:
    """By how much to reduce the sides of an image that is large."""
    return math.ceil(math.sqrt(pixels / _LARGE))


def _decoded(image: Image.Image, name: str) -> Image.Image:
    """In RGB, the right way up, with nothing of the file's but its pixels. Large ones are never there twice at full size."""
    image.load()
    orientation = image.getexif().get(ExifTags.Base.Orientation)
    scale = _scale(image, name)
    factor = _factor(image.width * image.height)
    if factor == 1:
        rgb = _in_rgb(image, scale)
    else:
        rgb = Image.new("RGB", (math.ceil(image.width / factor), math.ceil(image.height / factor)))
        rows = factor * max(1, _STRIP // (factor * image.width))
        for top in range(0, image.height, rows):
            strip = image.crop((0, top, image.width, min(top + rows, image.height)))
            rgb.paste(_in_rgb(strip, scale).reduce(factor), (0, top // factor))
    rgb.info = {}
    if orientation is not None:
        rgb.getexif()[ExifTags.Base.Orientation] = orientation
        ImageOps.exif_transpose(rgb, in_place=True)
    return rgb


def _scale(image: Image.Image, name: str) -> float | None:
    """What brings the values of a deep image to 0 ... 255; `None` for one of 8 bits.

    Values of 32 bits have no range of their own: integers are taken as 8 bits if all of them are up to 255, else as 16 bits; fractions
    as shares if all are up to 1. If there are larger ones, the largest is white.
    """
    if image.mode.startswith("I;16"):
        return 255 / 65535
    if image.mode not in ("I", "F"):
        return None
    lowest, highest = image.getextrema()
    if not math.isfinite(highest - lowest):
        raise ImageError(f"{name} has values that are not finite numbers.")
    whites = (255, 65535) if image.mode == "I" else (1, 255, 65535)
    return 255 / next((white for white in whites if highest <= white), highest)


def _in_rgb(image: Image.Image, scale: float | None) -> Image.Image:
    if scale is not None:
        image = image if image.mode in ("I;16", "F") else image.convert("I")
        image = image.point(lambda value: value * scale + 0.5).convert("L")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns of the direct way, which gives the same
    return image.convert("RGB")


def _padded(image: Image.Image, image_mean: list[float]) -> Image.Image:
    """In the middle of a square of the mean colour, as `LlavaImageProcessor.pad_to_square`."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), tuple(int(mean * 255) for mean in image_mean))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _cropped(image: Image.Image, crop_size: Any, edge: int) -> Image.Image:
    """The middle that the processor's own crop is cut from. It stays in the middle to the pixel: as many go on the left as on the right."""
    left, top = (
        max(0, side - max(edge, crop_size.get(name))) // 2 for side, name in zip(image.size, ("width", "height"))
    )
    return image.crop((left, top, image.width - left, image.height - top))
