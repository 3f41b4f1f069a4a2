"""`optimum-cli llava-ov caption` and `Captioner`: all sources, the same captions as `generate`, each image once."""

import csv
import io
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import EXACT, run
from PIL import Image

from optimum_llava_ov.captions.captioner import Captioner, Question
from optimum_llava_ov.captions.decoding import Decoder
from optimum_llava_ov.captions.items import Item
from optimum_llava_ov.captions.job import Job, run_job
from optimum_llava_ov.captions.output import read_rows
from optimum_llava_ov.captions.places import Places
from optimum_llava_ov.captions.sources import Source
from optimum_llava_ov.images import ImageLimits
from optimum_llava_ov.samples.files import question_inputs
from optimum_llava_ov.samples.shapes import random_scene, render


# Clients and programs on a busy machine may take longer than a test waits
pytestmark = [pytest.mark.slow, pytest.mark.genai, pytest.mark.flaky(reruns=1)]

PROMPT = "What is in the image?"
NUMBER = 12


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Drawn scenes in two folders, and a file that is not an image."""
    folder = tmp_path_factory.mktemp("images")
    for index in range(NUMBER):
        file = folder / ("more" if index % 3 else "") / f"{index:02}.png"
        file.parent.mkdir(exist_ok=True)
        render(random_scene(random.Random(index))).save(file)
    (folder / "broken.png").write_bytes(b"not an image")
    return folder


@pytest.fixture(scope="module")
def captioner(shapes_bundle):
    captioner = Captioner(shapes_bundle, prompt=PROMPT, max_new_tokens=12, ov_config=EXACT, running=4)
    yield captioner
    captioner.close()


@pytest.fixture(scope="module")
def expected(images, shapes_bundle):
    """What `generate` answers, by file name."""
    from transformers import AutoProcessor

    from optimum_llava_ov import OVModelForLlava

    model = OVModelForLlava.from_pretrained(shapes_bundle, ov_config=EXACT)
    processor = AutoProcessor.from_pretrained(shapes_bundle)
    answers = {}
    for file in sorted(images.rglob("[0-9]*.png")):
        inputs = question_inputs(processor, PROMPT, [file])
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=12)
        answers[file.name] = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert len(set(answers.values())) > NUMBER / 2
    return answers


def write_source(kind, images, folder):
    """Describe the images in one of the ways that the command reads. Returns its name and options."""
    files = sorted(images.rglob("*.png"))
    relative = [str(file.relative_to(images)) for file in files]
    if kind == "folder":
        return str(images), {}
    if kind == "pattern":
        return f"{images}/**/*.png", {}
    source = folder / {"list": "list.txt", "archive": "images.tar"}.get(kind, f"table.{kind}")
    rows = [{"name": name, "file": str(file)} for name, file in zip(relative, files)]
    if kind == "list":
        source.write_text("\n".join(map(str, files)) + "\n")
    elif kind == "jsonl":
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "csv":
        with source.open("w", newline="") as output:
            writer = csv.DictWriter(output, ["name", "file"])
            writer.writeheader()
            writer.writerows(rows)
    elif kind == "parquet":
        cells = [{"bytes": file.read_bytes(), "path": file.name} for file in files]
        pq.write_table(pa.table({"key": relative, "image": cells}), source, row_group_size=5)
    else:
        with tarfile.open(source, "w") as archive:
            for file in files:
                archive.add(file, f"{file.stem}.png")
                text = b"{}"
                member = tarfile.TarInfo(f"{file.stem}.json")
                member.size = len(text)
                archive.addfile(member, io.BytesIO(text))
    return str(source), {"image_column": "file", "key_column": "name"} if kind in ("jsonl", "csv") else {}


def name_of(row):
    return f"{Path(row['key']).stem}.png"


class TestSources:
    @pytest.mark.parametrize("kind", ["folder", "pattern", "list", "jsonl", "csv", "parquet", "archive"])
    def test_captions_are_those_of_generate(self, kind, images, captioner, expected, tmp_path):
        name, options = write_source(kind, images, tmp_path)
        suffix = ".parquet" if kind in ("folder", "parquet") else ".jsonl"
        job = Job(Source(name, **options), tmp_path / f"out{suffix}", captioner, rows_per_part=5, workers=0)
        summary = run_job(job)
        rows = list(read_rows(job.output))
        assert (summary.images, summary.errors) == (NUMBER + 1, 1)
        assert [row["key"] for row in rows] == [item.key for item in job.source.items()]  # order and names
        broken = [row for row in rows if row["error"]]
        assert [name_of(row) for row in broken] == ["broken.png"]
        assert broken[0]["caption"] is None
        assert {name_of(row): row["caption"] for row in rows if not row["error"]} == expected
        assert all(row["prompt"] == PROMPT and row["tokens"] > 0 for row in rows if not row["error"])
        assert {row["finish_reason"] for row in rows} <= {"stop", "length", None}

    def test_prompts_of_a_column(self, images, captioner, tmp_path):
        file = sorted(images.rglob("[0-9]*.png"))[0]
        prompts = ["How many shapes are there?", "What colour is it?"]
        table = tmp_path / "table.jsonl"
        table.write_text("".join(json.dumps({"image": str(file), "ask": prompt}) + "\n" for prompt in prompts))
        job = Job(Source(str(table), prompt_column="ask"), tmp_path / "out.jsonl", captioner, workers=0)
        run_job(job)
        assert [row["prompt"] for row in read_rows(job.output)] == prompts

    def test_images_are_decoded_in_other_processes(self, images, captioner, expected, tmp_path):
        job = Job(Source(str(images)), tmp_path / "out.jsonl", captioner, workers=1)
        run_job(job)
        assert {name_of(row): row["caption"] for row in read_rows(job.output) if not row["error"]} == expected

    @pytest.mark.parametrize(
        ("name", "message"),
        [("missing/a/b", "does not exist"), ("*.nothing", "does not exist"), ("{}/docs", "types")],
    )
    def test_wrong_source(self, name, message, captioner, tmp_path):
        (tmp_path / "a.pdf").touch()
        name = name.replace("{}/docs", str(tmp_path / "*"))
        with pytest.raises(ValueError, match=message):
            run_job(Job(Source(name), tmp_path / "out.jsonl", captioner))

    def test_wrong_column(self, images, captioner, tmp_path):
        name, _ = write_source("jsonl", images, tmp_path)
        with pytest.raises(ValueError, match="--image-column"):
            run_job(Job(Source(name), tmp_path / "out.jsonl", captioner))


class TestResume:
    def test_killed_at_any_time(self, images, shapes_bundle, expected, tmp_path):
        """Each image is there once, whenever the command is killed."""
        output = tmp_path / "captions.parquet"
        program = str(Path(sys.executable).parent / "optimum-cli")
        command = [program, "llava-ov", "caption", str(images), "--model", str(shapes_bundle), "--prompt", PROMPT]
        command += ["--max-new-tokens", "12", "--output", str(output), "--rows-per-part", "3", "--running", "2"]
        command += ["--ov-config", json.dumps(EXACT), "--workers", "0"]

        def rows_so_far():
            begun = [len(file.read_text().splitlines()) for file in output.glob("*.incomplete")]
            return sum(begun) + sum(pq.read_metadata(file).num_rows for file in output.glob("*.parquet"))

        for rows in (1, 6):
            process = subprocess.Popen(command, stderr=subprocess.DEVNULL)  # itself, so that it ends when it is killed
            while rows_so_far() < rows and process.poll() is None:
                time.sleep(0.002)
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert rows_so_far() >= 6
        result = run(*command)
        assert "images/s" in result.stderr
        rows = pq.read_table(output, columns=["key", "caption", "error"]).to_pylist()
        assert len(rows) == NUMBER + 1
        assert {name_of(row): row["caption"] for row in rows if not row["error"]} == expected
        assert not list(output.glob("*.incomplete"))
        assert run(*command).stderr.rstrip().splitlines()[-1].startswith("0 images")

    def test_killed_with_the_processes_that_decode(self, images, shapes_bundle, tmp_path):
        file = sorted(images.rglob("[0-9]*.png"))[0]
        (tmp_path / "list.txt").write_text(f"{file}\n" * 5000)
        output = tmp_path / "captions.jsonl"
        program = str(Path(sys.executable).parent / "optimum-cli")
        command = [program, "llava-ov", "caption", str(tmp_path / "list.txt"), "--model", str(shapes_bundle)]
        process = subprocess.Popen([*command, "--output", str(output), "--workers", "2"], stderr=subprocess.DEVNULL)
        while not (begun := list(output.glob("*.incomplete"))) or not begun[0].stat().st_size:
            assert process.poll() is None
            time.sleep(0.05)
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) >= 2
        process.kill()
        process.wait()
        assert psutil.wait_procs(children, timeout=30)[1] == []

    def test_torn_line(self, images, captioner, expected, tmp_path):
        job = Job(Source(str(images)), tmp_path / "out.jsonl", captioner, workers=0)
        run_job(job)
        rows = list(read_rows(job.output))
        part = job.output / "part-000000.jsonl"
        lines = [json.dumps({"index": index, **row}) for index, row in enumerate(rows)]
        part.unlink()
        part.with_name("_part-000000.jsonl.incomplete").write_text("\n".join(lines[:4]) + "\n" + lines[4][:20])
        assert run_job(job).images == NUMBER + 1 - 4
        again = list(read_rows(job.output))
        assert [(row["key"], row["caption"]) for row in again] == [(row["key"], row["caption"]) for row in rows]

    def test_stopped_before_a_part_is_in_its_place(self, images, captioner, expected, tmp_path):
        """All rows of the part are written, and the part is not."""
        job = Job(Source(str(images)), tmp_path / "out.jsonl", captioner, workers=0)
        run_job(job)
        rows = list(read_rows(job.output))
        part = job.output / "part-000000.jsonl"
        lines = [json.dumps({"index": index, **row}) + "\n" for index, row in enumerate(rows)]
        part.unlink()
        part.with_name("_part-000000.jsonl.incomplete").write_text("".join(lines))
        assert run_job(job).images == 0
        assert list(read_rows(job.output)) == rows

    def test_other_options(self, images, captioner, shapes_bundle, tmp_path):
        job = Job(Source(str(images)), tmp_path / "out.jsonl", captioner, workers=0)
        run_job(job)
        with pytest.raises(ValueError, match="rows_per_part"):
            run_job(replace(job, rows_per_part=7))
        (tmp_path / "other.jsonl").mkdir()
        (tmp_path / "other.jsonl" / "thesis.txt").touch()
        with pytest.raises(ValueError, match="files that are not captions"):
            run_job(replace(job, output=tmp_path / "other.jsonl"))

    def test_shards_by_hand(self, images, captioner, expected, tmp_path):
        job = Job(Source(str(images)), tmp_path / "out.jsonl", captioner, rows_per_part=2, workers=0)
        counts = [run_job(replace(job, num_shards=3, shard=shard)).images for shard in range(3)]
        assert sum(counts) == NUMBER + 1
        assert min(counts) > 0
        rows = list(read_rows(job.output))
        assert [row["key"] for row in rows] == [item.key for item in job.source.items()]
        with pytest.raises(ValueError, match="--shard is 3"):
            replace(job, num_shards=3, shard=3)


class TestCaptioner:
    def test_batch_in_batch_out(self, images, captioner, expected):
        files = sorted(images.rglob("*.png"))
        batch = {"image": [Image.open(files[0]), str(files[1]), files[2].read_bytes()], "other": [1, 2, 3]}
        result = captioner(batch)
        assert result["caption"] == [expected[file.name] for file in files[:3]]
        assert result["other"] == [1, 2, 3]

    def test_in_another_process(self, images, captioner, expected, tmp_path):
        file = sorted(images.rglob("[0-9]*.png"))[0]
        (tmp_path / "captioner").write_bytes(pickle.dumps(pickle.loads(pickle.dumps(captioner))))
        code = "import pickle, sys; print(pickle.load(open(sys.argv[1], 'rb'))({'image': sys.argv[2:]})['caption'][0])"
        assert run(sys.executable, "-c", code, tmp_path / "captioner", file).stdout.strip() == expected[file.name]

    def test_map_of_datasets(self, images, captioner, expected):
        from datasets import Dataset
        from datasets import Image as ImageFeature

        files = sorted(images.rglob("[0-9]*.png"))[:5]
        data = Dataset.from_dict({"image": [str(file) for file in files]}).cast_column("image", ImageFeature())
        mapped = data.map(captioner, batched=True, batch_size=2, load_from_cache_file=False)
        assert mapped["caption"] == [expected[file.name] for file in files]

    def test_schema(self, captioner, images, shapes_bundle):
        labels = {"enum": ["circle", "square"]}
        strict = Captioner(shapes_bundle, prompt=PROMPT, schema=labels, ov_config=EXACT)
        file = sorted(images.rglob("[0-9]*.png"))[0]
        assert json.loads(strict({"image": [str(file)]})["caption"][0]) in labels["enum"]
        strict.close()
        with pytest.raises(ValueError, match="schema"):
            Captioner(shapes_bundle, schema={"type": "nonsense"})({"image": [str(file)]})

    def test_key_is_the_seed(self, captioner, images):
        sampling = pickle.loads(pickle.dumps(captioner))
        sampling.temperature = 3.0
        image = captioner.see(str(sorted(images.rglob("[0-9]*.png"))[0]))

        def texts(keys):
            questions = [Question(key, PROMPT, image) for key in keys]
            return {question.key: caption.text for question, caption in sampling.captions(questions)}

        assert texts("abcdef") == texts("fedcba")
        assert len(set(texts("abcdef").values())) > 1
        sampling.close()

    def test_streams_of_several_threads(self, captioner, images, expected):
        """Each stream gets its own captions, in their order, and the batch holds no more than its places."""
        files = sorted(images.rglob("[0-9]*.png"))
        most = 0

        def caption(order):
            nonlocal most
            questions = (Question(file.name, PROMPT, captioner.see(str(file))) for file in order)
            texts = []
            for question, answer in captioner.captions(questions):
                most = max(most, captioner.engine.usage().requests)
                texts.append((question.key, answer.text))
            return texts

        orders = [files, files[::-1], files[:1], []]
        with ThreadPoolExecutor(len(orders)) as threads:
            results = list(threads.map(caption, orders))
        assert results == [[(file.name, expected[file.name]) for file in order] for order in orders]
        assert 0 < most <= captioner.running

    def test_memory_of_a_long_source_is_bounded(self, captioner, images):
        """Images are taken only as they are needed."""
        image = captioner.see(str(sorted(images.rglob("[0-9]*.png"))[0]))
        taken = 0

        def endless():
            nonlocal taken
            while True:
                taken += 1
                yield Question(str(taken), PROMPT, image)

        captions = captioner.captions(endless())
        for _ in range(20):
            next(captions)
        assert taken <= 20 + 4 * captioner.running
        captions.close()


class Waits(dict):
    """An image of the library `datasets` that cannot be read before a file exists."""

    def get(self, name):
        while not self["until"].exists():
            time.sleep(0.01)
        return self[name]


class TestDecoder:
    def test_a_process_is_killed(self, images, captioner, tmp_path):
        """The images that it had to decode are decoded again, and other streams go on.

        It is killed while it waits for the second image of the second stream.
        """
        files = sorted(images.rglob("[0-9]*.png"))
        items, until = [Item(file.name, file) for file in files], tmp_path / "until"
        with closing(Decoder(captioner.engine.processor.image_processor, ImageLimits(), 1)) as decoder:
            second = Waits(bytes=None, path=str(files[1]), until=until)
            waits = [items[0], Item(files[1].name, second), *items[2:]]
            streams = [decoder.ahead(iter(each), 4) for each in (items, waits)]
            before = [next(stream) for stream in streams]
            for child in psutil.Process().children():
                if "spawn_main" in " ".join(child.cmdline()):
                    child.kill()
                    child.wait()
            until.touch()
            seen = [[first, *stream] for first, stream in zip(before, streams)]
        assert [[item.key for item, _ in pairs] for pairs in seen] == [[file.name for file in files]] * 2
        assert all(isinstance(image, Image.Image) for pairs in seen for _, image in pairs)


def test_places_of_a_batch():
    places, woken = Places(8), []
    first, second = (places.stream(partial(woken.append, name)) for name in ("first", "second"))
    assert second.take(8) == 0  # an earlier stream wants some
    assert first.take(7) == 7
    assert first.take(8) == 0  # a quarter is given at once
    first.give_back(1)
    assert first.take(8) == 2
    first.end()
    assert woken == []  # nothing is free
    first.give_back(1)
    first.give_back(2)
    assert woken == ["second"]
    assert second.take(1) == 1
    assert second.take(8) == 2
    second.close()
    first.close()
    assert places.stream(list).take(100) == 8
    assert woken == ["second"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "captions.txt"], ".parquet or .jsonl"),
        (["--output", "a.jsonl", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["--output", "a.jsonl", "--num-shards", "2", "--shard", "2"], "--shard is 2"),
    ],
)
def test_wrong_arguments(optimum_cli, shapes_bundle, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    status, _, err = optimum_cli("llava-ov", "caption", str(tmp_path), "--model", shapes_bundle, *arguments)
    assert status == 1
    assert err.startswith("error: ")
    assert message in err
    assert os.listdir(tmp_path) == []
