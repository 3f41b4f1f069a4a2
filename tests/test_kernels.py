"""The kernel for compressed weights: equal to the product in float where rounding is exact, and near it elsewhere."""

from __future__ import annotations

import subprocess
import sys

import nncf
import numpy as np
import openvino
import pytest
import torch
from conftest import EXACT, EXAMPLES
from openvino import opset8 as ops
from PIL import Image
from transformers import AutoProcessor

from optimum_llava_ov import OVModelForLlava
from optimum_llava_ov.benchmark.result import report
from optimum_llava_ov.benchmark.run import benchmark
from optimum_llava_ov.kernels.extension import is_faster, why_not, with_compressed_matmuls
from optimum_llava_ov.loading import choose_engine, located


pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not torch.cpu.get_capabilities().get("avx2"), reason="the kernel is for AVX2 on Linux"
)

MODES = [
    (nncf.CompressWeightsMode.INT4_ASYM, 128),
    (nncf.CompressWeightsMode.INT4_SYM, 128),
    (nncf.CompressWeightsMode.INT4_ASYM, 64),
    (nncf.CompressWeightsMode.INT4_ASYM, 32),
    (nncf.CompressWeightsMode.INT4_SYM, 32),
    (nncf.CompressWeightsMode.INT4_SYM, -1),
    (nncf.CompressWeightsMode.INT8_ASYM, -1),
    (nncf.CompressWeightsMode.INT8_SYM, -1),
]
TOKENS = [1, 2, 7, 8, 9, 40, 270]  # of each of two sequences


def compressed(mode, group_size: int, rows: int = 150, columns: int = 384, weights=None) -> openvino.Model:
    """Return `x (batch, tokens, columns) @ weights (rows, columns).T`, compressed. The weights are random by default."""
    if weights is None:
        weights = np.random.default_rng(0).standard_normal((rows, columns)).astype(np.float32)
    x = ops.parameter([-1, -1, columns], np.float32, name="x")
    model = openvino.Model([ops.matmul(x, ops.constant(weights), False, True)], [x])
    options = {} if "INT8" in mode.name else {"group_size": group_size, "ratio": 1.0, "all_layers": True}
    return nncf.compress_weights(model, mode=mode, **options)


def kinds(model: openvino.Model) -> list[str]:
    return [node.get_type_name() for node in model.get_ops()]


def run(model: openvino.Model, x: np.ndarray) -> np.ndarray:
    return openvino.Core().compile_model(model, "CPU", EXACT)([x])[0]


def test_the_library_was_built():
    assert why_not() is None


@pytest.mark.parametrize(("mode", "group_size"), MODES, ids=lambda value: getattr(value, "name", value))
class TestProduct:
    @pytest.mark.parametrize("is_large", [False, True])
    def test_integers_are_exact(self, mode, group_size, is_large):
        """Whole numbers up to 127 are not rounded. So the result is that of OpenVINO's kernel, in float.

        The kernel takes 1,024 columns at once. The larger matrices have one group more. With many tokens and 8 bits,
        two columns have 126 together. With many tokens and 4 bits, half of the columns are small.
        """
        columns = 1024 + (group_size if group_size > 0 else 32) if is_large else 384
        model = compressed(mode, group_size, columns=columns)
        kernel = with_compressed_matmuls(model)
        assert kinds(kernel).count("CompressedMatMul") == 1
        assert "MatMul" not in kinds(kernel)
        ours, theirs = (openvino.Core().compile_model(one, "CPU", EXACT) for one in (kernel, model))
        generator = np.random.default_rng(1)
        for tokens in TOKENS:
            x = generator.integers(-127, 128, (2, tokens, columns)).astype(np.float32)
            x[..., ::32] = 127
            if tokens >= 16 and "INT8" in mode.name:
                x = x.clip(-126, 126)
                x[..., 1::2] = np.trunc(x[..., 1::2] / 126 * (126 - np.abs(x[..., ::2])))
            elif tokens >= 16:
                x[..., 1::2] = np.trunc(x[..., 1::2] / 8)
            expected = theirs([x])[0]
            np.testing.assert_allclose(ours([x])[0], expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())

    def test_largest_sums(self, mode, group_size):
        """Each weight and each activation is the largest there is, and all products of a row with itself have one sign.

        So sums in 16 bits are as large as they get.
        """
        signs = np.sign(np.random.default_rng(3).standard_normal((64, 384))).astype(np.float32)
        model = compressed(mode, group_size, weights=signs)
        x = np.stack([signs, -signs])
        ours, expected = run(with_compressed_matmuls(model), x), run(model, x)
        assert (np.abs(expected[0].diagonal()) > 350).all()
        np.testing.assert_allclose(ours, expected, atol=384 * 0.01)

    @pytest.mark.parametrize("tokens", [1, 13, 40])
    def test_others_are_rounded(self, mode, group_size, tokens):
        model = compressed(mode, group_size)
        kernel = with_compressed_matmuls(model)
        x = np.random.default_rng(2).standard_normal((3, tokens, 384)).astype(np.float32)
        ours, expected = run(kernel, x), run(model, x)
        assert 0 < np.sqrt(np.square(ours - expected).mean() / np.square(expected).mean()) < 0.01


class TestGraph:
    def test_weights_are_shared(self, tmp_path):
        """The kernel reads the mapped file."""
        rows = columns = 4096
        openvino.save_model(compressed(*MODES[0], rows, columns), tmp_path / "model.xml", compress_to_fp16=False)
        program = (
            "import psutil, openvino, numpy as np, sys\n"
            "from optimum_llava_ov.kernels.extension import with_compressed_matmuls, why_not\n"
            "assert why_not() is None\n"
            "model = openvino.Core().read_model(sys.argv[1])\n"
            f"x = np.ones((1, 1, {columns}), dtype=np.float32)\n"
            "compiled = openvino.Core().compile_model(with_compressed_matmuls(model), 'CPU')\n"
            "before = psutil.Process().memory_full_info().uss - psutil.Process().memory_info().shared\n"
            "del model\n"
            "compiled([x])\n"
            "after = psutil.Process().memory_full_info().uss - psutil.Process().memory_info().shared\n"
            "print(after - before)\n"
        )
        output = subprocess.run(
            [sys.executable, "-c", program, tmp_path / "model.xml"], capture_output=True, text=True, check=True
        )
        assert int(output.stdout) < rows * columns / 2 / 4

    def test_other_graphs_stay(self):
        """48 columns are no multiple of 32, and weights in float are not compressed."""
        model = compressed(nncf.CompressWeightsMode.INT4_ASYM, 48)
        assert with_compressed_matmuls(model) is model
        x = ops.parameter([-1, 32], np.float32)
        model = openvino.Model([ops.matmul(x, ops.constant(np.ones((8, 32), np.float32)), False, True)], [x])
        assert with_compressed_matmuls(model) is model

    def test_not_a_number_stays_one(self):
        model = with_compressed_matmuls(compressed(*MODES[0]))
        for value in (np.nan, np.inf):
            x = np.ones((1, 2, 384), dtype=np.float32)
            x[0, 1, 7] = value
            result = run(model, x)
            assert np.isfinite(result[0, 0]).all()
            assert np.isnan(result[0, 1]).all()

    def test_zeros(self):
        model = with_compressed_matmuls(compressed(*MODES[0]))
        assert (run(model, np.zeros((1, 3, 384), np.float32)) == 0).all()
        assert run(model, np.zeros((1, 0, 384), np.float32)).shape == (1, 0, 150)


@pytest.fixture(scope="module")
def shapes_int4(export_once):
    return export_once("shapes-int4", EXAMPLES / "shapes" / "checkpoint", "--weight-format", "int4")


@pytest.fixture(scope="module")
def answers(shapes_int4):
    """Return answers of both kernels to a question about an image, and their logits."""
    processor = AutoProcessor.from_pretrained(shapes_int4)
    image = Image.new("RGB", (64, 64), "white")
    image.paste("red", (8, 8, 24, 24))
    content = [{"type": "image"}, {"type": "text", "text": "What is in the picture?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=image, text=prompt, return_tensors="pt")
    result = {}
    for kernel in ("openvino", "avx2"):
        model = OVModelForLlava.from_pretrained(shapes_int4, ov_config={"MATMUL_KERNEL": kernel})
        result[kernel] = model.generate(**inputs, max_new_tokens=16, do_sample=False), model(**inputs).logits
    return result


class TestModel:
    def test_answers_are_equal(self, answers):
        (tokens, logits), (expected, exact) = answers["avx2"], answers["openvino"]
        assert torch.equal(tokens, expected)
        assert not torch.equal(logits, exact)
        log_p, log_q = exact.log_softmax(-1), logits.log_softmax(-1)
        assert (log_p.exp() * (log_p - log_q)).sum(-1).mean() < 1e-2

    def test_engine(self, shapes_int4):
        """The commands take the engine that is faster."""
        assert choose_engine(located(shapes_int4)) == ("openvino" if is_faster() else "genai")

    @pytest.mark.parametrize("kernel", ["avx2", "openvino"])
    def test_bench_tells(self, shapes_int4, kernel):
        result = benchmark(shapes_int4, [60], 4, 1, engine="openvino", ov_config={"MATMUL_KERNEL": kernel})
        assert result.settings["matmul_kernel"] == kernel
        head = report(result).splitlines()[0]
        assert head.endswith("compressed weights with the avx2 kernel") == (kernel == "avx2")

    def test_unknown_kernel(self, shapes_int4):
        with pytest.raises(ValueError, match="MATMUL_KERNEL is 'fast'. Expected one of 'auto', 'openvino', 'avx2'"):
            OVModelForLlava.from_pretrained(shapes_int4, ov_config={"MATMUL_KERNEL": "fast"})

    @pytest.mark.parametrize("device", ["GPU", "AUTO"])
    def test_other_device(self, shapes_int4, device):
        """AUTO may take a GPU, which does not have the operation."""
        with pytest.raises(ValueError, match=f"it runs on CPU, and the device is {device}. Use 'openvino' or 'auto'"):
            OVModelForLlava.from_pretrained(
                shapes_int4, device=device, compile=False, ov_config={"MATMUL_KERNEL": "avx2"}
            )

    def test_default(self, shapes_int4):
        """The kernel runs where OpenVINO has none for bytes, unless exact activations are asked for."""

        def uses_kernel(**ov_config) -> bool:
            model = OVModelForLlava.from_pretrained(shapes_int4, ov_config=ov_config)
            of_part = [
                any(
                    "MatMul" in node.get_friendly_name() and node.get_rt_info()["layerType"].value == "Reference"
                    for node in compiled.get_runtime_model().get_ops()
                )
                for compiled in (model.language_model.request.get_compiled_model(), model.vision_embeddings.request)
            ]
            assert len(set(of_part)) == 1
            return of_part[0]

        assert uses_kernel() == is_faster()
        assert uses_kernel(MATMUL_KERNEL="avx2")
        assert not uses_kernel(DYNAMIC_QUANTIZATION_GROUP_SIZE=0)
        assert not uses_kernel(EXECUTION_MODE_HINT="ACCURACY")
