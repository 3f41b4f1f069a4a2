"""`optimum-cli llava-ov eval`: what a conversion costs."""

import json
import shutil

import numpy as np
import pytest
from conftest import Golden, run

from optimum_llava_ov import BundleError
from optimum_llava_ov.evaluation.evaluate import evaluate
from optimum_llava_ov.evaluation.metrics import first_difference
from optimum_llava_ov.samples.shapes import built_in_samples


pytestmark = pytest.mark.slow


GOLDEN = Golden("linear_fp16_sharded")


@pytest.fixture(scope="module")
def int8(tmp_path_factory):
    from optimum.intel import OVConfig

    from optimum_llava_ov import main_export

    output = tmp_path_factory.mktemp("int8") / "int8"
    main_export(GOLDEN.checkpoint, output, ov_config=OVConfig(quantization_config={"bits": 8}))
    return output


def test_command(int8, bundles, tmp_path):
    fp16 = shutil.copytree(bundles[GOLDEN.name], tmp_path / GOLDEN.name)
    command = ["optimum-cli", "llava-ov", "eval", fp16, int8, "--reference", GOLDEN.checkpoint]
    options = [
        "--num-samples",
        "4",
        "--max-new-tokens",
        "8",
        "--work-dir",
        tmp_path / "work",
        "--plot",
        tmp_path / "plot.png",
    ]
    first = run(*command, *options)
    assert "linear_fp16_sharded" in first.stdout
    assert "exact answers" in first.stdout
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")

    values = json.loads((int8 / "eval.json").read_text())
    assert values["num_samples"] == 4
    assert 0 < values["kl_mean"] <= values["kl_p95"] < 1
    assert values["size"]["total"] == sum(size for part, size in values["size"].items() if part != "total")
    assert values["settings"]["reference"] == "checkpoint"  # a name, not somebody's path

    # deterministic, and resumed: nothing is run again
    (tmp_path / "work" / "int8" / "00002.npz").unlink()
    assert run(*command, *options).stdout == first.stdout


def test_a_model_equals_itself(int8, tmp_path):
    quality = evaluate([int8], int8, num_samples=3, max_new_tokens=8, work_dir=tmp_path)["int8"]
    assert quality.identical == quality.top1_agreement == 1
    assert quality.first_divergence is None
    assert quality.kl_mean < 1e-5


def test_data_of_the_users(int8, tmp_path):
    GOLDEN.image("img2_224x224").save(tmp_path / "a.png")
    (tmp_path / "data.jsonl").write_text(
        json.dumps({"image": "a.png", "question": "What is this?", "answer": "A boat."})
        + "\n"
        + json.dumps({"prompt": "Hello"})
    )
    quality = evaluate(
        [int8], GOLDEN.checkpoint, tmp_path / "data.jsonl", max_new_tokens=6, work_dir=tmp_path / "work"
    )["int8"]
    assert quality.num_samples == 2
    assert quality.accuracy == 0


def test_settings_that_change_start_anew(int8, tmp_path):
    evaluate([int8], int8, num_samples=2, max_new_tokens=4, work_dir=tmp_path)
    before = np.load(tmp_path / "reference" / "00000.npz")["tokens"]
    evaluate([int8], int8, num_samples=2, max_new_tokens=6, work_dir=tmp_path)
    after = np.load(tmp_path / "reference" / "00000.npz")["tokens"]
    assert len(before) == 4
    assert len(after) == 6


def test_a_device_that_there_is_not_is_told_before_anything_is_recorded(int8, tmp_path):
    with pytest.raises(ValueError, match="^OpenVINO does not find the device 'NPU7'"):
        evaluate([int8], GOLDEN.checkpoint, num_samples=1, work_dir=tmp_path / "work", device="NPU7")
    assert not (tmp_path / "work").exists()


def test_what_is_no_bundle(tmp_path):
    with pytest.raises(BundleError, match="is not a complete bundle: it lacks openvino_language_model.xml"):
        evaluate([tmp_path], GOLDEN.checkpoint)


@pytest.mark.parametrize(
    ("expected", "found", "index"),
    [([1, 2], [1, 2], None), ([1, 2], [1, 3], 1), ([1], [1, 2], 1), ([], [], None)],
    ids=str,
)
def test_first_difference(expected, found, index):
    assert first_difference(expected, found) == index


def test_built_in_samples_are_always_the_same():
    samples = built_in_samples(5)
    assert [(sample.prompt, sample.answer) for sample in samples] == [
        (s.prompt, s.answer) for s in built_in_samples(5)
    ]
    assert np.array_equal(np.array(samples[0].images[0]), np.array(built_in_samples(1)[0].images[0]))
