"""`optimum-cli llava-ov bench`: speed and memory of a user's own bundle."""

import json
import re
import shutil
from importlib.metadata import version

import numpy as np
import openvino_genai
import pytest
from conftest import EXAMPLES, fill_hub_cache, run
from transformers import AutoConfig, AutoProcessor

from optimum_llava_ov.benchmark.prompt import PromptMaker
from optimum_llava_ov.benchmark.result import Run
from optimum_llava_ov.benchmark.run import arrivals, benchmark, settings_of
from optimum_llava_ov.bundle.card import update_card
from optimum_llava_ov.chat.genai_engine import image_tensor
from optimum_llava_ov.chat.messages import images_of, text_of
from optimum_llava_ov.loading import GENAI, OPENVINO, load_engine
from optimum_llava_ov.system.peak_memory import AnonymousPeak, anonymous_memory, peak_rss
from optimum_llava_ov.units import readable_rate


pytestmark = pytest.mark.slow


CHECKPOINT = EXAMPLES / "shapes" / "checkpoint"
SHORT = ["--prompt-tokens", "60", "200", "--new-tokens", "5"]
NUMBERS = {"time_to_first_token", "ms_per_token", "tokens_per_second"}


@pytest.fixture(scope="module")
def hub(shapes_bundle, tmp_path_factory):
    """The bundle as one of the Hub's, downloaded before."""
    cache = tmp_path_factory.mktemp("hub")
    fill_hub_cache(cache, {"me/shapes-ov": shapes_bundle})
    return {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache)}


def test_table(shapes_bundle):
    """What a person sees, with GenAI because it is installed."""
    picture = EXAMPLES / "shapes" / "pictures" / "a.png"
    result = run(
        "optimum-cli", "llava-ov", "bench", shapes_bundle, *SHORT, "--rounds", "1", "--image", picture, fresh=True
    )
    number, gigabytes = r"\d+\.\d+", r"(?:\d\.\d\d GB|\d\d\d MB)"
    head, machine, _, names, *rows, _, loading, memory = result.stdout.splitlines()
    assert re.fullmatch(r"shapes-ov in genai on CPU: computes in (bf16|f16|f32), cache in \w+", head)
    assert machine.endswith(f"openvino {version('openvino')}, openvino-genai {version('openvino-genai')}")
    assert re.split(" {2,}", names.strip()) == ["prompt", "first token", "per token", "tokens/s"]
    assert [re.fullmatch(rf" *(\d+) tokens +{number} s +{number} ms +[\d,.]+", row)[1] for row in rows] == [
        "60",
        "200",
    ]
    assert re.fullmatch(
        rf"Loading took {number} s\. The first token after loading took {number} s \(prompt of 60 tokens\)\.", loading
    )
    assert re.fullmatch(rf"Peak memory: {gigabytes}, {gigabytes} without mapped files\.", memory)
    assert "4/4" in result.stderr, "a progress bar"


def test_card(shapes_bundle, tmp_path):
    """Written into the card if asked for, and read again when the card is updated."""
    bundle = shutil.copytree(shapes_bundle, tmp_path / "shapes-ov")
    options = ("--engine", "openvino", "--rounds", "1", "--card", "--json")
    values = json.loads(run("optimum-cli", "llava-ov", "bench", bundle, *SHORT, *options).stdout)
    update_card(bundle)
    card = (bundle / "README.md").read_text()
    assert card.index("## Run it") < card.index("## Speed and memory") < card.index("## Weights")
    speeds = values["speeds"]
    for speed in speeds:
        first, rate = speed["time_to_first_token"], speed["tokens_per_second"]
        assert f"| {speed['prompt_tokens']} tokens | {first:.2f} s | {readable_rate(rate)} |\n" in card
    assert f"with optimum-llava-ov (openvino {version('openvino')}, " in card
    assert values["cpu"]["name"] in card


def test_card_of_the_hub(optimum_cli):
    status, _, errors = optimum_cli("llava-ov", "bench", "me/shapes-ov", "--card")
    assert status == 1
    assert (
        "error: me/shapes-ov is not a folder, so it has no card to write into (--card). Download it first." in errors
    )


def test_json(hub):
    """Nothing else on stdout; by model id, with `generate`, and several rows."""
    options = ["--engine", "openvino", "--rounds", "3", "--batch-size", "2", "--json"]
    values = json.loads(run("optimum-cli", "llava-ov", "bench", "me/shapes-ov", *SHORT, *options, env=hub).stdout)
    told = {
        "bundle": "me/shapes-ov",
        "engine": "openvino",
        "device": "CPU",
        "batch_size": 2,
        "new_tokens": 5,
        "rounds": 3,
    }
    measured = {"load_seconds", "first_time_to_first_token", "peak_rss", "peak_anonymous"}
    assert {name: values[name] for name in told} == told
    assert values.keys() == told.keys() | measured | {"speeds", "settings", "cpu", "versions"}
    assert all(values[name] > 0 for name in measured)
    assert values["peak_anonymous"] < values["peak_rss"]

    assert [speed["prompt_tokens"] for speed in values["speeds"]] == [60, 200]
    for speed in values["speeds"]:
        assert speed.keys() == NUMBERS | {"prompt_tokens", "runs"}
        assert [run.keys() for run in speed["runs"]] == [NUMBERS] * 3
        for name in NUMBERS:
            assert speed[name] == sorted(run[name] for run in speed["runs"])[1] > 0
        assert speed["tokens_per_second"] == pytest.approx(2 * 1000 / speed["ms_per_token"])

    assert values["settings"].keys() == {
        "inference_precision",
        "kv_cache_precision",
        "dynamic_quantization_group_size",
        "matmul_kernel",
        "threads",
    }
    assert values["settings"]["threads"] >= 1
    assert values["cpu"].keys() == {"name", "features", "cores", "system"}
    packages = ("optimum-llava-ov", "openvino", "openvino-genai", "optimum-intel", "transformers", "torch")
    assert {name: values["versions"][name] for name in packages} == {name: version(name) for name in packages}


@pytest.fixture(scope="module", params=[OPENVINO, GENAI])
def engine(request, shapes_bundle):
    return load_engine(shapes_bundle, engine=request.param, prefix_caching=False)


def test_answers_do_not_end_early(engine, shapes_bundle):
    """Left to itself, the model says what it sees in a few words."""
    prompts = PromptMaker(engine.processor, engine.config)
    times = arrivals(engine, [prompts.make(60) for _ in range(3)], 40)
    assert [len(row) for row in times] == [40] * 3
    assert all(row[0] > 0 and row == sorted(row) for row in times)


def test_settings_are_those_of_the_bundle(engine):
    """The file of the language model asks for an uncompressed cache, as it has no compressed weights."""
    settings = settings_of(engine)
    assert settings["kv_cache_precision"] == "f16"
    assert settings["inference_precision"] in ("bf16", "f16", "f32")


def test_prompts_are_as_long_as_asked_for(shapes_bundle):
    """By the count of the processor, and by that of GenAI, which puts the prompt together itself."""
    processor, config = AutoProcessor.from_pretrained(shapes_bundle), AutoConfig.from_pretrained(shapes_bundle)
    genai = openvino_genai.VLMPipeline(shapes_bundle, "CPU")
    prompts = PromptMaker(processor, config)
    options = openvino_genai.GenerationConfig(max_new_tokens=1)
    for length in (prompts.shortest(), prompts.shortest() + 1, 100, 1000):
        prompt = prompts.make(length)
        pictures = images_of(prompt.messages)
        inputs = processor(text=prompt.text, images=pictures, return_tensors="pt")
        tensors = [image_tensor(picture, processor) for picture in pictures]
        answer = genai.generate(text_of(prompt.messages[-1]), images=tensors, generation_config=options)
        assert inputs["input_ids"].shape[1] == answer.perf_metrics.get_num_input_tokens() == length


def test_usual_lengths(shapes_bundle):
    processor, config = AutoProcessor.from_pretrained(shapes_bundle), AutoConfig.from_pretrained(shapes_bundle)
    prompts = PromptMaker(processor, config)
    assert prompts.lengths(None) == [300, 1000]
    assert prompts.lengths([200, 100, 200]) == [200, 100]
    around = prompts.shortest() - config.image_seq_length
    config.image_seq_length = 578  # as with a vision tower for pictures of 336 pixels
    assert prompts.shortest() == 578 + around
    assert prompts.lengths(None) == [700, 1000]


def test_numbers_of_a_run():
    assert Run.from_arrivals([[1.0, 2.0, 3.0]]) == Run(1.0, 1000.0, 1.0)
    # two rows, of which one begins later: what came until then is no part of the pace
    assert Run.from_arrivals([[1.0, 2.0, 3.0], [1.5, 2.5, 3.5]]) == Run(1.5, 1000.0, 2.0)


def test_memory():
    before = anonymous_memory()
    with AnonymousPeak() as peak:
        values = np.ones(50_000_000, np.uint8)
    assert before + values.nbytes * 0.9 < peak.bytes < before + values.nbytes * 1.5
    del values
    assert peak_rss() >= peak.bytes > anonymous_memory()


def test_too_short_for_a_picture(optimum_cli, shapes_bundle):
    status, output, errors = optimum_cli("llava-ov", "bench", shapes_bundle, "--prompt-tokens", "30", "--json")
    assert (status, output) == (1, "")
    shortest = PromptMaker(
        AutoProcessor.from_pretrained(shapes_bundle), config := AutoConfig.from_pretrained(shapes_bundle)
    ).shortest()
    expected = (
        f"error: A prompt of 30 tokens is too short. With this model, an image ({config.image_seq_length} tokens) and the chat template "
        f"take {shortest} tokens. Use --prompt-tokens {shortest} or more."
    )
    assert errors.splitlines()[-1] == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"new_tokens": 1}, "new_tokens is 1. Expected 2 or more."),
        ({"rounds": 0}, "rounds is 0. Expected 1 or more."),
        ({"batch_size": 0}, "batch_size is 0. Expected 1 or more."),
        ({"engine": "vllm"}, "engine is 'vllm'. Expected one of auto, openvino, genai."),
        ({"device": "NPU7"}, "OpenVINO does not find the device 'NPU7'."),
    ],
)
def test_bad_options(shapes_bundle, options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        benchmark(shapes_bundle, **options)


@pytest.mark.parametrize("engine", ["auto", "openvino", "genai"])
def test_what_is_no_bundle(engine, shapes_bundle, tmp_path):
    partial = shutil.copytree(shapes_bundle, tmp_path / "partial", ignore=shutil.ignore_patterns("openvino_language*"))
    for folder in (CHECKPOINT, partial):
        with pytest.raises(
            ValueError, match=r"is not a bundle, because it has no openvino_language_model.xml\. .* Convert it first: "
        ):
            benchmark(folder, engine=engine)
