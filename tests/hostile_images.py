"""Files that somebody may send as an image, made when they are asked for."""

import io
import struct
import zipfile
import zlib

import numpy as np
from PIL import Image, PngImagePlugin


def png(width, height, channels=3, depth=8, text=()):
    """Of one value everywhere, without the memory that its pixels would take."""
    colour_type = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    row = bytes(1 + -(-width * channels * depth // 8))
    packer = zlib.compressobj(1)
    packed = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    chunks = [
        (b"IHDR", struct.pack(">2I5B", width, height, depth, colour_type, 0, 0, 0)),
        *text,
        (b"IDAT", packed),
        (b"IEND", b""),
    ]
    body = (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def saved(image, file_format, **options):
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def noise(width=300, height=200, mode="RGB"):
    """The same each time."""
    values = 128 + 80 * np.random.default_rng(0).standard_normal((height, width), dtype=np.float32)
    return Image.fromarray(values.clip(0, 255).astype(np.uint8)).convert(mode)


def jpeg_of_many_scans(scans):
    data = saved(noise(), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * scans + b"\xff\xd9"


def patched(data, mark, offset, form, *values):
    """A header that says something else."""
    place = data.index(mark) + offset
    return data[:place] + struct.pack(form, *values) + data[place + struct.calcsize(form) :]


def progressive_jpeg(width, height):
    return patched(saved(noise(), "JPEG", progressive=True, subsampling=0), b"\xff\xc2", 5, ">2H", height, width)


def lossless_webp(width, height):
    return patched(saved(noise(), "WEBP", lossless=True), b"VP8L", 9, "<I", (width - 1) | (height - 1) << 14)


def tiff(**tags):
    """The header of a TIFF in grey, compressed with deflate."""
    values = {"258": 8, "259": 8, "262": 1, "277": 1, **tags}
    entries = sorted((int(tag), value) for tag, value in values.items())
    directory = b"".join(struct.pack("<2H2I", tag, 4, 1, value) for tag, value in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + directory + bytes(4)


def zip_file():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.txt", "a" * 1000)
    return buffer.getvalue()


def text_png(size):
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "a" * size, zip=True)
    return saved(noise(), "PNG", pnginfo=info)


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


# Within the limits, however they look
SEEN = {
    "100 times as wide.png": lambda: png(5000, 50),
    "100 times as high.png": lambda: png(50, 5000),
    "1 x 100.png": lambda: png(1, 100),
    "49 million in RGB.png": lambda: png(7000, 7000),
    "49 million in 16 bits.png": lambda: png(7000, 7000, channels=1, depth=16),
    "49 million with transparency, 98 times as wide.png": lambda: png(69_300, 707, channels=4),
    "49 million, turned.jpg": lambda: saved(Image.new("RGB", (7000, 7000)), "JPEG", exif=turned(6)),
    "16 million, turned.png": lambda: saved(Image.new("RGB", (4096, 4000)), "PNG", exif=turned(5), compress_level=1),
    "12 million.webp": lambda: saved(Image.new("RGBA", (4000, 3000), (1, 2, 3, 4)), "WEBP", lossless=True, method=0),
    "16 million, progressive.jpg": lambda: saved(Image.new("CMYK", (4000, 4000)), "JPEG", progressive=True),
    "300 frames.gif": lambda: saved(noise(mode="P"), "GIF", save_all=True, append_images=[noise(64, 64, "P")] * 299),
    "50 pages.tiff": lambda: saved(noise(), "TIFF", save_all=True, append_images=[noise()] * 49),
    "4 images.jpg": lambda: saved(noise(), "MPO", save_all=True, append_images=[noise()] * 3),
    "CMYK.jpg": lambda: saved(noise(mode="CMYK"), "JPEG"),
    "palette with transparency.png": lambda: saved(noise(mode="P"), "PNG", transparency=bytes(range(256))),
    "orientation 65535.jpg": lambda: saved(noise(), "JPEG", exif=turned(65_535)),
}

# With what is said of them
REFUSED = {
    "1 x 10000.png": (
        lambda: png(1, 10_000),
        "1 x 10000 pixels: one side is 10000 times the other, but at most 100 times",
    ),
    "10000 x 1.png": (lambda: png(10_000, 1), "10000 x 1 pixels: one side is 10000 times the other"),
    "1 x 65000.png": (lambda: png(1, 65_000), "one side is 65000 times the other"),
    "64 million.png": (
        lambda: png(8000, 8000, channels=1, depth=1),
        "8000 x 8000 pixels, but at most 50 million are accepted",
    ),
    "bomb.png": (lambda: patched(png(1, 1), b"IHDR", 4, ">2I", 60_000, 60_000), "cannot be read"),
    "49 million, progressive.jpg": (
        lambda: progressive_jpeg(7000, 7000),
        "kind of JPEG needs 343 MB of memory, but at most 250 MB",
    ),
    "huge.jpg": (lambda: progressive_jpeg(65_000, 65_000), "cannot be read: Image size .* exceeds limit"),
    "49 million.webp": (lambda: lossless_webp(7000, 7000), "this kind of WEBP needs 784 MB of memory"),
    "49 million in one strip.tiff": (
        lambda: tiff(**{"256": 7000, "257": 7000, "278": 7000}),
        "kind of TIFF needs 392 MB of memory",
    ),
    "large tile.tiff": (
        lambda: tiff(**{"256": 64, "257": 64, "322": 60_000, "323": 60_000}),
        "TIFF needs 14.4 GB of memory",
    ),
    "many scans.jpg": (lambda: jpeg_of_many_scans(1000), "has 1009 scans, but at most 100 are accepted"),
    "cut.png": (lambda: saved(noise(), "PNG")[:-2000], "cannot be read: .*truncated"),
    "cut.jpg": (lambda: saved(noise(), "JPEG")[:-2000], "cannot be read: .*truncated"),
    "long text.png": (lambda: text_png(5_000_000), "cannot be read: .*too large"),
    "drawing.eps": (lambda: saved(noise(), "EPS"), "it is not one of JPEG, PNG, WEBP, GIF, BMP, TIFF"),
    "drawing.svg": (lambda: b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', "it is not one of"),
    "drawing.pdf": (lambda: saved(noise(), "PDF"), "it is not one of"),
    "old.ppm": (lambda: saved(noise(), "PPM"), "it is not one of"),
    "archive.png": (zip_file, "it is not one of"),
    "empty.png": (lambda: b"", "it is not one of"),
    "21 MB.png": (lambda: bytes(21_000_000), "has 21.0 MB, but at most 20.0 MB are accepted"),
}
