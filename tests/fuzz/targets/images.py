"""Damaged image files of all formats that are read."""

from pathlib import Path
from random import Random

from hostile_images import REFUSED, SEEN, noise, saved, turned
from PIL import Image
from test_images import CLIP, PAD, SIDE

from fuzz.damage import damaged
from fuzz.rule import BrokenRuleError, attempt
from optimum_llava_ov.images import see_image


BATCH = 100
SMALL = 200_000  # bytes; damage of larger files costs more to make than to see


def ordinary() -> dict[str, bytes]:
    """A file of each kind that decoders treat in their own way."""
    grey16 = Image.new("I;16", (90, 60), 30_000)
    return {
        "jpeg": saved(noise(), "JPEG", exif=turned(6)),
        "progressive jpeg": saved(noise(), "JPEG", progressive=True),
        "cmyk jpeg": saved(noise(mode="CMYK"), "JPEG"),
        "png": saved(noise(90, 60), "PNG"),
        "png, palette": saved(noise(mode="P"), "PNG", transparency=bytes(range(256))),
        "png, 16 bits": saved(grey16, "PNG"),
        "webp": saved(noise(), "WEBP"),
        "lossless webp": saved(noise(mode="RGBA"), "WEBP", lossless=True),
        "animated webp": saved(noise(), "WEBP", save_all=True, append_images=[noise()] * 2),
        "gif": saved(noise(mode="P"), "GIF", save_all=True, append_images=[noise(64, 64, "P")] * 2),
        "bmp": saved(noise(90, 60), "BMP"),
        "bmp, palette": saved(noise(90, 60, "P"), "BMP"),
        "tiff": saved(noise(90, 60), "TIFF"),
        "tiff, deflate": saved(noise(90, 60), "TIFF", compression="tiff_adobe_deflate"),
        "tiff, lzw": saved(noise(90, 60, "L"), "TIFF", compression="tiff_lzw"),
        "tiff, jpeg": saved(noise(96, 64), "TIFF", compression="jpeg"),
        "tiff, group 4": saved(noise(90, 60, "1"), "TIFF", compression="group4"),
        "tiff, 32 bits": saved(noise(90, 60, "L").convert("F"), "TIFF"),
    }


class Images:
    def __init__(self, folder: Path):
        folder.mkdir(parents=True)
        self.folder = folder
        hostile = {name: make() for name, make in SEEN.items()} | {name: make() for name, (make, _) in REFUSED.items()}
        self.files = ordinary() | {name: data for name, data in hostile.items() if len(data) < SMALL}

    def run(self, number, seed, note, counts):
        draw = Random(f"{seed} images {number}")
        for index in range(BATCH):
            name = list(self.files)[(number * BATCH + index) % len(self.files)]
            file = self.folder / "image"
            file.write_bytes(damaged(self.files[name], draw))
            source, processor = draw.choice((file, file.read_bytes())), draw.choice((CLIP, PAD))
            note(f"{name}, the {index}th of its batch")
            outcome = attempt(lambda source=source, processor=processor: see_image(source, processor), self.folder)
            if isinstance(outcome, Exception):
                counts["refused"] += 1
            elif (outcome.mode, max(outcome.size) <= SIDE + 1) == ("RGB", True):
                counts["right"] += 1
            else:
                raise BrokenRuleError(f"What the model sees is {outcome!r}.")
