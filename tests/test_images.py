"""Images from outside: which are opened, how, and what that may cost."""

import io
import os
import random
import sys
import warnings

import numpy as np
import pytest
from conftest import EXAMPLES, Golden
from hostile_images import REFUSED, SEEN, noise, png, saved, turned
from memory import peak_above_idle
from PIL import Image, ImageOps
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from optimum_llava_ov import ImageError
from optimum_llava_ov.images import fit_to_model, open_image, see_image, settings_of
from optimum_llava_ov.samples.files import Sample


SIDE = 56
CLIP = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SIDE)
PAD = LlavaImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SIDE, do_pad=True)
PROCESSORS = {
    "CLIP": CLIP,
    "pad": PAD,
    "as in CLIP-L/336": CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size=336),
    "crop below size": CLIPImageProcessorPil(size={"shortest_edge": 61}, crop_size=SIDE),
    "crop above size": CLIPImageProcessorPil(size={"shortest_edge": 49}, crop_size=SIDE),
    "to a square": CLIPImageProcessorPil(size={"height": SIDE, "width": SIDE}, crop_size=SIDE),
    "no resizing": CLIPImageProcessorPil(do_resize=False, crop_size=SIDE),
    "bilinear": CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SIDE, resample=2),
}


def pixel_values(image, processor):
    return processor(image, return_tensors="np")["pixel_values"]


class TestFit:
    """What the model sees of an image is what the original's processor makes of it, bit for bit."""

    @pytest.mark.parametrize("name", PROCESSORS)
    def test_random_sizes(self, name):
        processor, draw = PROCESSORS[name], random.Random(name)
        for number in range(60):
            longest = (64, 300, 600)[number % 3]
            image = noise(draw.randint(1, longest), draw.randint(1, longest), draw.choice(["RGB", "L"])).convert("RGB")
            fitted = fit_to_model(image, processor)
            assert np.array_equal(pixel_values(fitted, processor), pixel_values(image, processor)), image.size
            assert np.array_equal(fit_to_model(fitted, processor), fitted)
            assert np.array_equal(fit_to_model(image, settings_of(processor)), fitted)

    @pytest.mark.parametrize("name", ["CLIP", "pad"])
    @pytest.mark.parametrize("size", [(4032, 3024), (50, 5000), (5000, 50), (1, 100)])
    def test_large_and_long(self, name, size):
        image = noise(*size)
        fitted = fit_to_model(image, PROCESSORS[name])
        assert max(fitted.size) <= SIDE + 1
        if max(size) < 4096:
            assert np.array_equal(pixel_values(fitted, PROCESSORS[name]), pixel_values(image, PROCESSORS[name]))

    @pytest.mark.parametrize("name", ["img0_300x200", "img1_64x480", "img2_224x224"])
    def test_goldens(self, name):
        for golden, processor in (
            (Golden("linear_fp16_sharded"), CLIP),
            (Golden("mlp2x_fp32_pad"), LlavaImageProcessorPil(size={"shortest_edge": 42}, crop_size=42, do_pad=True)),
        ):
            seen = pixel_values(see_image(golden.folder / "images" / f"{name}.png", processor), processor)
            assert np.array_equal(seen, pixel_values(golden.image(name), processor))
            if "64x480" not in name:  # see test_golden.py
                assert np.abs(seen - golden.pixel_values(name)).max() < 1e-5

    def test_what_is_reduced_first_looks_the_same(self):
        """Above 4096 x 4096 pixels: within two grey levels, on average."""
        image = (
            Image.open(EXAMPLES / "shapes" / "pictures" / "a.png")
            .convert("RGB")
            .resize((4600, 4000), Image.Resampling.BICUBIC)
        )
        expected = np.asarray(fit_to_model(image, CLIP), dtype=float)
        for source in (image, image.convert("RGBA"), saved(image, "JPEG", quality=95)):
            seen = see_image(source, CLIP)
            assert seen.size == expected.shape[1::-1]
            assert np.abs(seen - expected).mean() < 2


class TestOpen:
    def test_a_file_that_is_not_there(self, tmp_path):
        with pytest.raises(ImageError, match=r"missing\.png cannot be read: No such file or directory$"):
            open_image(tmp_path / "missing.png")

    @pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
    def test_formats(self, file_format, tmp_path):
        data = saved(noise(mode="P") if file_format == "GIF" else noise(), file_format)
        (tmp_path / "image").write_bytes(data)
        expected = Image.open(io.BytesIO(data)).convert("RGB")
        for source in (data, tmp_path / "image", str(tmp_path / "image"), Image.open(tmp_path / "image")):
            image = open_image(source)
            assert (image.mode, image.size, image.info) == ("RGB", (300, 200), {})
            assert np.array_equal(image, expected)

    def test_no_program_is_started(self, tmp_path, monkeypatch):
        """Ghostscript is a program like any other: this one leaves a mark."""
        ghostscript = tmp_path / "gs"
        ghostscript.write_text(f"#!{sys.executable}\nopen({str(tmp_path / 'started')!r}, 'w')\n")
        ghostscript.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        (tmp_path / "a.eps").write_bytes(saved(noise(), "EPS"))
        with Image.open(tmp_path / "a.eps") as opened:
            for source in (tmp_path / "a.eps", (tmp_path / "a.eps").read_bytes(), opened):
                with pytest.raises(ImageError, match="not one of JPEG"):
                    open_image(source)
        assert not (tmp_path / "started").exists()

    def test_what_is_no_file(self, tmp_path):
        os.mkfifo(tmp_path / "pipe")
        for source in (tmp_path, tmp_path / "missing", tmp_path / "pipe", "/dev/zero", "a\0b"):
            with pytest.raises(ImageError, match="cannot be read"):
                open_image(source)
        for source in (None, 7, np.zeros((8, 8, 3))):
            with pytest.raises(ImageError, match="not as "):
                open_image(source)
        with pytest.raises(ImageError, match="0 x 3 pixels, but at least 1 x 1"):
            open_image(Image.new("RGB", (0, 3)))

    def test_16_bits_are_scaled(self):
        ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(4, axis=0)
        for image in (
            Image.fromarray(ramp),
            Image.fromarray(ramp.astype(">u2")),
            Image.fromarray(ramp.astype(np.int32)),
        ):
            for source in (image, saved(image, "TIFF")):
                assert np.array_equal(
                    np.asarray(open_image(source))[..., 1], np.arange(256)[None].repeat(4, axis=0)
                ), image.mode
        assert np.array_equal(np.asarray(open_image(saved(Image.fromarray(ramp), "PNG")))[0, :, 0], np.arange(256))

    def test_values_of_32_bits(self):
        ramp = np.arange(256)[None].repeat(4, axis=0)
        for values in (
            ramp.astype(np.int32),
            ramp.astype(np.float32),
            (ramp / 255).astype(np.float32),
            (ramp * 1e6).astype(np.float32),
        ):
            image = open_image(saved(Image.fromarray(values), "TIFF"))
            assert np.array_equal(np.asarray(image)[..., 0], ramp), values.dtype
        for value in (np.nan, np.inf):
            with pytest.raises(ImageError, match="not finite"):
                open_image(Image.fromarray(np.full((4, 4), value, dtype=np.float32)))

    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_turned_everywhere(self, orientation, tmp_path, processors):
        """As the camera was held: opened, in a session, in calibration and evaluation."""
        upright = noise()
        data = saved(upright, "PNG", exif=turned(orientation))
        expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        assert np.array_equal(open_image(data), expected)
        (tmp_path / "a.png").write_bytes(data)
        processor = processors["linear_fp16_sharded"]
        inputs = Sample("What is this?", (tmp_path / "a.png",)).inputs(processor)
        assert np.array_equal(inputs["pixel_values"], pixel_values(expected, processor.image_processor))

    def test_transparency_is_left_out(self):
        image = Image.new("RGBA", (8, 8), (200, 100, 50, 0))
        assert open_image(saved(image, "PNG")).getpixel((0, 0)) == (200, 100, 50)
        palette = noise().convert("P")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            opened = open_image(saved(palette, "PNG", transparency=bytes(range(256))))
        assert np.array_equal(opened, palette.convert("RGB"))

    def test_the_image_of_a_caller_stays_as_it_is(self, tmp_path):
        (tmp_path / "a.jpg").write_bytes(saved(Image.new("RGB", (5000, 4000)), "JPEG", exif=turned(6)))
        image = Image.open(tmp_path / "a.jpg")
        assert max(open_image(image).size) < 4096
        assert (image.size, image.mode, image.getexif()[0x0112]) == ((5000, 4000), "RGB", 6)


class TestCost:
    """In memory, of whatever comes in: at most 300 MB above what was there."""

    @pytest.mark.parametrize("name", SEEN)
    def test_seen(self, name, tmp_path):
        (tmp_path / name).write_bytes(SEEN[name]())

        def see():
            image = open_image(tmp_path / name)
            assert {max(fit_to_model(image, processor).size) for processor in (CLIP, PAD)} <= {SIDE, SIDE + 1}

        assert peak_above_idle(see) < 300

    @pytest.mark.parametrize("name", REFUSED)
    def test_refused(self, name, tmp_path):
        make, message = REFUSED[name]
        (tmp_path / name).write_bytes(make())

        def see():
            with pytest.raises(ImageError, match=message) as error:
                see_image(tmp_path / name, CLIP)
            assert str(error.value).startswith(f"The image {tmp_path / name} ")

        assert peak_above_idle(see) < 300

    def test_in_a_session(self, models, processors):
        """Sixteen times the same upload costs what one costs, and the session keeps what the model sees."""
        golden = "linear_fp16_sharded"
        chat = models[golden].chat(processors[golden], max_new_tokens=1, context_window=10**6)
        upload = png(4096, 4096, channels=1)
        assert peak_above_idle(lambda: chat.send("What is this?", [upload] * 16).result()) < 300
        kept = [item["image"].size for item in chat.messages[0]["content"] if item["type"] == "image"]
        assert kept == [(SIDE, SIDE)] * 16
        with pytest.raises(ImageError, match="has 17 images, but at most 16 are accepted"):
            chat.send("And these?", [upload] * 17)
        with pytest.raises(ImageError, match="one side is 10000 times the other"):
            chat.send("And this?", png(1, 10_000))
        assert len(chat.messages) == 2
