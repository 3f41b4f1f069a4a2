"""Open images within limits, and reduce them to the size that the model sees.

Opening and preparing an image takes at most about 5 bytes for each of `ImageLimits.max_pixels`, whatever its width and
height are. One image is opened at a time. Only the reduced image stays in memory.
"""

from __future__ import annotations

import io
import math
import os
import stat
import threading
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from PIL.TiffImagePlugin import TiffImageFile

from optimum_llava_ov.errors import ImageError
from optimum_llava_ov.units import readable_size


# Pillow decodes these itself. EPS would start Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
_JPEGS = ("JPEG", "MPO")  # Pillow calls a JPEG of several images "MPO"

# Larger images are reduced by a whole factor before they are resampled. Smaller ones give the original code's pixels.
_LARGE = 4096 * 4096
_STRIP = 1024 * 1024  # pixels to convert at a time
_BYTES_PER_PIXEL = 5  # limit of the memory for decoding, per pixel of `ImageLimits.max_pixels`
_MAX_SCANS = 100  # of a JPEG. 1 to 10 are usual. Each takes the time of a whole image, even if it is empty.
_START_OF_SCAN = b"\xff\xda"

# Of an image processor
_SETTINGS = (
    *("crop_size", "do_center_crop", "do_pad", "do_resize", "image_grid_pinpoints", "image_mean", "pad_to_square"),
    *("resample", "size"),
)
_SIDES = ("height", "width", "shortest_edge", "longest_edge")

_one_at_a_time = threading.RLock()


@dataclass(frozen=True)
class ImageLimits:
    """Limit the images that users may give.

    Attributes:
        max_bytes (`int`): maximum size of the file, in bytes.
        max_pixels (`int`): maximum of width times height. It is lower for formats whose decoders copy the image.
        max_aspect_ratio (`float`): maximum of the longer side divided by the shorter side.
        max_images (`int`): maximum number of images in one question.
    """

    max_bytes: int = 20_000_000
    max_pixels: int = 50_000_000
    max_aspect_ratio: float = 100
    max_images: int = 16


DEFAULT_LIMITS = ImageLimits()


def see_image(source: Any, image_processor: Any, limits: ImageLimits = DEFAULT_LIMITS) -> Image.Image:
    """Open an image and reduce it to what the model sees: [`open_image`], then [`fit_to_model`].

    Args:
        source: a `PIL.Image`, a path, or the bytes of a file.
        image_processor: image processor of the bundle.

    Raises:
        [`ImageError`]: `source` is not an image of a supported format, or exceeds `limits`.
    """
    with _one_at_a_time:
        return fit_to_model(open_image(source, limits), image_processor)


def open_image(source: Any, limits: ImageLimits = DEFAULT_LIMITS) -> Image.Image:
    """Open an image and convert it to RGB.

    Args:
        source: a `PIL.Image`, a path, or the bytes of a file. If a file holds several images, the first one is opened.

    Returns:
        The image in RGB with 8 bits per channel, rotated as its EXIF orientation says. Deeper images are scaled to 8
        bits. Transparency is dropped. Images of more than 4096 x 4096 pixels are reduced.

    Raises:
        [`ImageError`]: `source` is not an image of a supported format, or exceeds `limits`.
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
                return _decode(source, name)
            data = source if isinstance(source, bytes) else _read(Path(source), name, limits.max_bytes)
            _check_bytes(len(data), name, limits.max_bytes)
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                _check(image, name, limits)
                factor = _reduction_factor(image.width * image.height)
                image.draft(None, (image.width // factor, image.height // factor))  # a JPEG is decoded at reduced size
                return _decode(image, name)
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(f"{name} cannot be read: it is not one of {', '.join(FORMATS)}.") from error
    except Exception as error:  # decoders raise errors of any kind for a damaged file
        reason = getattr(error, "strerror", None) or error or type(error).__name__
        raise ImageError(f"{name} cannot be read: {reason}") from error


def fit_to_model(image: Image.Image, image_processor: Any) -> Image.Image:
    """Reduce an image to the size that the model sees.

    The image processor makes the same `pixel_values` from the result as from `image`, so the result can replace
    `image`. There is one exception: if the processor pads to a square and that square has more than 4096 x 4096
    pixels, the image is reduced by a whole factor first.

    Args:
        image: an image in RGB.
        image_processor: image processor of the bundle. If it resizes differently from CLIP's and LLaVA's, the image is
            returned unchanged.
    """
    if getattr(image_processor, "do_pad", None) and hasattr(image_processor, "pad_to_square"):
        factor = _reduction_factor(max(image.size) ** 2)
        image = _pad_to_square(image.reduce(factor) if factor > 1 else image, image_processor.image_mean)
    if not image_processor.do_resize or hasattr(image_processor, "image_grid_pinpoints"):
        return image  # the number of tiles depends on the size
    size = image_processor.size
    if size.get("height") and size.get("width"):
        return image.resize((size.get("width"), size.get("height")), image_processor.resample)
    edge = size.get("shortest_edge")
    if not edge or size.get("longest_edge"):
        return image
    image = image.resize([int(edge * side / min(image.size)) for side in image.size], image_processor.resample)
    return _crop_center(image, image_processor.crop_size, edge) if image_processor.do_center_crop else image


def settings_of(image_processor: Any) -> SimpleNamespace:
    """Return what [`fit_to_model`] reads of an image processor, for a process that does not import transformers."""
    settings = {name: getattr(image_processor, name) for name in _SETTINGS if hasattr(image_processor, name)}
    for name in ("size", "crop_size"):
        if settings.get(name):
            settings[name] = {side: settings[name].get(side) for side in _SIDES}
    for name in ("pad_to_square", "image_grid_pinpoints"):  # that they are there is what counts
        if name in settings:
            settings[name] = True
    return SimpleNamespace(**settings)


def check_number_of_images(number: int, limits: ImageLimits = DEFAULT_LIMITS) -> None:
    """Check that a question does not have too many images.

    Raises:
        [`ImageError`]: `number` exceeds `limits`.
    """
    if number > limits.max_images:
        raise ImageError(
            f"The question has {number} images, but at most {limits.max_images} are accepted. Leave some out."
        )


def _read(path: Path, name: str, max_bytes: int) -> bytes:
    with open(path, "rb", opener=_open_without_waiting) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ImageError(f"{name} cannot be read: it is not a file.")
        _check_bytes(status.st_size, name, max_bytes)
        return file.read(max_bytes + 1)


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # opening a pipe would wait for a writer


def _check_bytes(size: int, name: str, max_bytes: int) -> None:
    if size > max_bytes:
        raise ImageError(f"{name} has {readable_size(size)}, but at most {readable_size(max_bytes)} are accepted.")


def _check(image: Image.Image, name: str, limits: ImageLimits) -> None:
    """Check an image before it is decoded."""
    if image.format not in (None, *FORMATS, *_JPEGS):
        raise ImageError(
            f"{name} cannot be read: its format is {image.format}, not one of {', '.join(FORMATS)}. Convert it first."
        )
    width, height = image.size
    found = f"{name} has {width} x {height} pixels"
    if min(image.size) < 1:
        raise ImageError(f"{found}, but at least 1 x 1 is expected.")
    if width * height > limits.max_pixels:
        raise ImageError(
            f"{found}, but at most {limits.max_pixels / 1e6:g} million are accepted. "
            "Make it smaller: the model sees only a few hundred pixels per side."
        )
    if max(image.size) > limits.max_aspect_ratio * min(image.size):
        raise ImageError(
            f"{found}: one side is {max(image.size) / min(image.size):.0f} times the other, but at most "
            f"{limits.max_aspect_ratio:g} times is accepted. Crop it to what the question is about."
        )
    scans = _count_scans(image) if image.format in _JPEGS else 1
    if scans > _MAX_SCANS:
        raise ImageError(f"{name} has {scans} scans, but at most {_MAX_SCANS} are accepted. Save it again as a JPEG.")
    needed, allowed = _decoding_bytes(image, scans), _BYTES_PER_PIXEL * limits.max_pixels
    if needed > allowed:
        raise ImageError(
            f"{found}. Decoding this kind of {image.format} needs {readable_size(needed)} of memory, but at most "
            f"{readable_size(allowed)} are accepted. Make it smaller, or save it as PNG."
        )


def _count_scans(image: Image.Image) -> int:
    """Count the scans of a JPEG. A progressive JPEG has several. The count may be too high, but not too low."""
    file = getattr(image, "fp", None)
    if file is None:  # decoded already
        return 1
    position = file.tell()  # after the start of the first scan
    scans = 1 + file.read().count(_START_OF_SCAN)
    file.seek(position)
    return scans


def _decoding_bytes(image: Image.Image, scans: int) -> int:
    """Return the peak memory that Pillow needs to decode an image, in bytes. Each factor was measured."""
    pixels = image.width * image.height
    if image.format == "WEBP":
        return 16 * pixels
    if isinstance(image, JpegImageFile) and scans > 1:  # libjpeg keeps the coefficients of all scans, in 16 bits
        samples = sum(across * down for _, across, down, _ in image.layer)
        most = max(across for _, across, *_ in image.layer) * max(down for _, _, down, _ in image.layer)
        return 2 * pixels * samples // most + 4 * pixels // _reduction_factor(pixels) ** 2
    if isinstance(image, TiffImageFile):  # libtiff holds a strip or tile, as large as the file says
        tags = image.tag_v2
        bits = max(tags.get(ExifTags.Base.BitsPerSample, (1,))) * tags.get(ExifTags.Base.SamplesPerPixel, 1)
        rows = min(tags.get(ExifTags.Base.RowsPerStrip, image.height), image.height)
        tile = tags.get(ExifTags.Base.TileWidth, image.width) * tags.get(ExifTags.Base.TileLength, rows)
        return 4 * pixels + tile * max(4, math.ceil(bits / 8))
    return 4 * pixels


def _reduction_factor(pixels: int) -> int:
    """Return the factor to divide both sides of an image with `pixels` pixels by; 1 if the image is not large."""
    return math.ceil(math.sqrt(pixels / _LARGE))


def _decode(image: Image.Image, name: str) -> Image.Image:
    """Decode an image to upright RGB without metadata. A large image is never in memory twice at full size."""
    image.load()
    orientation = image.getexif().get(ExifTags.Base.Orientation)
    scale = _scale_to_8_bits(image, name)
    factor = _reduction_factor(image.width * image.height)
    if factor == 1:
        rgb = _convert_to_rgb(image, scale)
    else:
        rgb = Image.new("RGB", (math.ceil(image.width / factor), math.ceil(image.height / factor)))
        rows = factor * max(1, _STRIP // (factor * image.width))
        for top in range(0, image.height, rows):
            strip = image.crop((0, top, image.width, min(top + rows, image.height)))
            rgb.paste(_convert_to_rgb(strip, scale).reduce(factor), (0, top // factor))
    rgb.info = {}
    if orientation is not None:
        rgb.getexif()[ExifTags.Base.Orientation] = orientation
        ImageOps.exif_transpose(rgb, in_place=True)
    return rgb


def _scale_to_8_bits(image: Image.Image, name: str) -> float | None:
    """Return the factor that scales the values of a deep image to 0 ... 255; `None` for an image with 8 bits.

    Values with 32 bits have no fixed range, so the largest value decides which value is white: 255 or 65535 for
    integers, 1, 255 or 65535 for floats. The smallest that is not exceeded is taken. If all are exceeded, the largest
    value is white.
    """
    if image.mode.startswith("I;16"):
        return 255 / 65535
    if image.mode not in ("I", "F"):
        return None
    lowest, highest = cast("tuple[float, float]", image.getextrema())  # not a pair per band: there is one band
    if not math.isfinite(highest - lowest):
        raise ImageError(f"{name} has values that are not finite numbers.")
    whites = (255, 65535) if image.mode == "I" else (1, 255, 65535)
    return 255 / next((white for white in whites if highest <= white), highest)


def _convert_to_rgb(image: Image.Image, scale: float | None) -> Image.Image:
    if scale is not None:
        image = image if image.mode in ("I;16", "F") else image.convert("I")
        image = image.point(lambda value: value * scale + 0.5).convert("L")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the direct conversion gives the same, with a warning from Pillow
    return image.convert("RGB")


def _pad_to_square(image: Image.Image, image_mean: list[float]) -> Image.Image:
    """Center an image on a square of the mean color, as `LlavaImageProcessor.pad_to_square` does."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), tuple(int(mean * 255) for mean in image_mean))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _crop_center(image: Image.Image, crop_size: Any, edge: int) -> Image.Image:
    """Crop an image to the part that the image processor's own crop needs.

    The same number of pixels is removed on opposite sides, so that the processor crops the same pixels as before.
    """
    left, top = (
        max(0, side - max(edge, crop_size.get(name))) // 2 for side, name in zip(image.size, ("width", "height"))
    )
    return image.crop((left, top, image.width - left, image.height - top))
