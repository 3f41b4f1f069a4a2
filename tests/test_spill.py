"""Weights that waited on disk: what is written is what OpenVINO would have written, however it writes graphs, or it is an error."""

import re
from pathlib import Path

import numpy as np
import openvino
import pytest
from openvino import opset13

from optimum_llava_ov import BundleError
from optimum_llava_ov.export import spill
from optimum_llava_ov.export.spill import Spill


SAVE = openvino.save_model  # what is patched below


@pytest.fixture(autouse=True)
def all_constants_wait(monkeypatch):
    monkeypatch.setattr(spill, "MIN_BYTES", 64)


def model(keep=lambda constant: constant) -> openvino.Model:
    """Four layers; the first and the third have the same weights, and names have what XML must escape."""
    parameter = node = opset13.parameter([1, 64], np.float32, name="input")
    for index, seed in enumerate((0, 1, 0, 2)):
        weight = np.random.default_rng(seed).random((64, 64), np.float32)
        constant = keep(opset13.constant(weight, name=f'weight & "{index}" <ä'))
        node = opset13.matmul(node, constant, False, False, name=f"layer {index}")
    return openvino.Model([node], [parameter], "model")


def save(folder: Path) -> Path:
    waiting = Spill(folder / ".weights")
    waiting.save(model(waiting.constant), folder / "model.xml")
    return folder / "model.xml"


def test_the_same_bytes(tmp_path):
    openvino.save_model(model(), tmp_path / "expected.xml", compress_to_fp16=False)
    save(tmp_path)
    assert (tmp_path / "model.bin").read_bytes() == (tmp_path / "expected.bin").read_bytes()
    # but for names that OpenVINO counts up in a process
    graphs = [
        re.sub(r"Result_\d+", "Result", (tmp_path / f"{name}.xml").read_text()) for name in ("model", "expected")
    ]
    assert graphs[0] == graphs[1]
    assert {file.name for file in tmp_path.iterdir()} == {"expected.xml", "expected.bin", "model.xml", "model.bin"}


def written_as(monkeypatch, change):
    """Let OpenVINO write graphs in another way: `change` gives a graph's text."""

    def save_model(model, path, compress_to_fp16=True):
        SAVE(model, path, compress_to_fp16)
        Path(path).write_text(change(Path(path).read_text()))

    monkeypatch.setattr(openvino, "save_model", save_model)


def test_attributes_in_another_order(tmp_path, monkeypatch):
    def change(text):
        text = re.sub(r'<layer (id="\d+") (name="[^"]*") (type="\w+")', r"<layer \3 \2 \1", text)
        return re.sub(r'(offset="\d+") (size="\d+")', r"\2\n\t\1", text)

    written_as(monkeypatch, change)
    path = save(tmp_path)
    x = np.random.default_rng(3).random((1, 64), np.float32)
    expected, found = (openvino.compile_model(graph, "CPU")(x)[0] for graph in (model(), path))
    assert np.array_equal(expected, found)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("weight &amp; &quot;2", "weight &amp; &quot;1"),
        lambda text: text.replace('size="16384"', 'size="16380"', 1),
        lambda text: re.sub(r'type="Const"', 'type="Constant"', text, count=1),
    ],
    ids=["two of one name", "another size", "another type"],
)
def test_graph_that_is_not_understood(tmp_path, monkeypatch, change):
    written_as(monkeypatch, change)
    with pytest.raises(BundleError, match="constants are not those of the model"):
        save(tmp_path)


def test_weights_that_went_elsewhere(tmp_path, monkeypatch):
    """What was written is looked at once more."""
    original = spill.ET.tostring

    def tostring(*args, **kwargs):
        return original(*args, **kwargs).replace('offset="16384"', 'offset="0"')

    monkeypatch.setattr(spill.ET, "tostring", tostring)
    with pytest.raises(BundleError, match=r'model.xml does not hold the weights that were written \(weight & "1"'):
        save(tmp_path)
