"""What makes it fast and small, each seen to do what it is for. How much it brings is measured in `benchmarks/`."""

import mmap
import os
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import openvino
import pytest
import torch
from conftest import EXACT, Golden, run
from optimum.intel import OVConfig, OVWeightQuantizationConfig

from optimum_llava_ov import OVModelForLlavaMPT, main_export
from optimum_llava_ov.export.compression import compress
from optimum_llava_ov.runtime.embedding_table import EmbeddingTable
from optimum_llava_ov.runtime.graph import LOGIT_POSITIONS, with_logit_positions
from optimum_llava_ov.system.mapped import read_once, release_pages


GOLDEN = Golden("linear_fp16_sharded")


@pytest.fixture(scope="module")
def model(models):
    return models[GOLDEN.name]


@pytest.fixture(scope="module")
def embeds(model):
    return torch.randn(2, 70, model.config.text_config.d_model, generator=torch.Generator().manual_seed(0))


class TestLogits:
    @pytest.mark.parametrize("kept", [1, 3, 70, 100])
    def test_of_the_last_positions(self, model, embeds, kept):
        expected = model(inputs_embeds=embeds).logits
        assert expected.shape == (2, 70, model.config.text_config.vocab_size)
        torch.testing.assert_close(
            model(inputs_embeds=embeds, logits_to_keep=kept).logits, expected[:, -kept:], atol=1e-5, rtol=0
        )

    def test_generate_asks_for_one_row(self, model, monkeypatch):
        asked = []
        forward = model.language_model.forward
        monkeypatch.setattr(model.language_model, "forward", lambda *args: asked.append(args[3]) or forward(*args))
        model.generate(torch.tensor([[5, 6, 7, 8]]), max_new_tokens=3, eos_token_id=None, do_sample=False)
        assert asked == [1, 1, 1]
        request = model.language_model.request
        assert list(request.get_tensor("logits").shape) == [1, 1, model.config.text_config.vocab_size]

    def test_the_graph_that_was_loaded_stays_as_it_is(self, bundles):
        model = openvino.Core().read_model(bundles[GOLDEN.name] / "openvino_language_model.xml")
        inputs = {"inputs_embeds", "attention_mask", "beam_idx"}
        changed = with_logit_positions(model, axis=1)
        assert {port.get_any_name() for port in changed.inputs} == {*inputs, LOGIT_POSITIONS}
        assert {port.get_any_name() for port in model.inputs} == {*inputs, "position_ids"}
        assert len(changed.get_variables()) == len(model.get_variables()) == 2 * 3

    def test_the_last_block_computes_nothing_else(self, bundles):
        """Its feed-forward network, the product after its attention, and the head have one position where one is asked for."""
        model = openvino.Core().read_model(bundles[GOLDEN.name] / "openvino_language_model.xml")
        model = with_logit_positions(model, axis=1)
        cuts = [
            node
            for node in model.get_ops()
            if node.get_type_name() == "Gather" and LOGIT_POSITIONS in node.input_value(1).get_names()
        ]
        assert sorted(node.input_value(0).get_node().get_friendly_name() for node in cuts) == [
            "__module.language_model.transformer.blocks.1/aten::add/Add_1",
            "__module.language_model.transformer.blocks.2.attn/aten::reshape/Reshape",
        ]

    @pytest.mark.parametrize("options", [{}, {"ATTENTION_BACKEND": "SDPA"}])
    def test_compile_only_gives_the_same(self, bundles, embeds, options):
        """With the defaults, whose cache has 16 bits, too."""
        logits = [
            OVModelForLlavaMPT.from_pretrained(bundles[GOLDEN.name], compile_only=compile_only, ov_config=options)(
                inputs_embeds=embeds, logits_to_keep=2
            ).logits
            for compile_only in (False, True)
        ]
        assert torch.equal(*logits)


def test_torch_does_not_compete(model, monkeypatch):
    before, during = torch.get_num_threads(), []
    forward = model.language_model.forward
    torch.set_num_threads(2)
    monkeypatch.setattr(
        model.language_model, "forward", lambda *args: during.append(torch.get_num_threads()) or forward(*args)
    )
    try:
        with pytest.raises(ValueError, match="max_new_tokens"):
            model.generate(torch.tensor([[5, 6, 7, 8]]), max_new_tokens=-1)
        model.generate(torch.tensor([[5, 6, 7, 8]]), max_new_tokens=2, eos_token_id=None, do_sample=False)
        assert during == [1, 1]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_rows_that_share_a_picture_encode_it_once(model, monkeypatch):
    a, b = torch.rand(2, 3, model.config.vision_config.image_size, model.config.vision_config.image_size)
    expected = torch.cat([model.get_image_features(image[None]) for image in (a, b)])
    encoded = []
    encode = model.vision_embeddings.forward
    monkeypatch.setattr(
        model.vision_embeddings, "forward", lambda images: encoded.append(len(images)) or encode(images)
    )
    features = model.get_image_features(torch.stack([a, b, a, a, b]))
    assert encoded == [2]
    torch.testing.assert_close(features, expected[[0, 1, 0, 0, 1]], atol=1e-5, rtol=0)


class TestEmbeddingTable:
    @pytest.mark.parametrize("bits", [None, "sym", "asym", 4])
    def test_gives_what_the_graph_gives(self, bundles, bits):
        """Floats, and 8 bits with and without a zero point; in 4 bits, OpenVINO is asked."""
        model = openvino.Core().read_model(bundles[GOLDEN.name] / "openvino_text_embeddings_model.xml")
        if bits is not None:
            options = (
                {"bits": 4, "group_size": 64, "all_layers": True} if bits == 4 else {"bits": 8, "sym": bits == "sym"}
            )
            model = compress(model, OVWeightQuantizationConfig(**options))
        compiled = openvino.compile_model(model, "CPU")
        table = EmbeddingTable.of(model, lambda ids: compiled(ids)[0])
        assert (table is None) == (bits == 4)
        if table is not None:
            every = np.arange(len(table.weights))[:, None]
            assert np.array_equal(table(every), compiled(every)[0])

    def test_another_computation_than_the_graphs(self, bundles):
        model = openvino.Core().read_model(bundles[GOLDEN.name] / "openvino_text_embeddings_model.xml")
        compiled = openvino.compile_model(model, "CPU")
        assert EmbeddingTable.of(model, lambda ids: compiled(ids)[0] + 1e-6) is None

    def test_goes_with_the_compiled_graph(self, bundles):
        """Compressing changes the graph, and clears what was compiled of it."""
        model = OVModelForLlavaMPT.from_pretrained(bundles[GOLDEN.name], ov_config=EXACT)
        token = torch.tensor([[5]])
        assert model.language_model.look_up(token) is not None
        model.clear_requests()
        assert model.language_model.look_up(token) is None
        model.compile()
        assert model.language_model.look_up(token) is not None

    def test_generate_calls_openvino_for_the_prompt_only(self, model, monkeypatch):
        lengths = []
        embed = model.get_text_embeddings
        monkeypatch.setattr(model, "get_text_embeddings", lambda ids: lengths.append(ids.shape[1]) or embed(ids))
        options = {"max_new_tokens": 6, "eos_token_id": None, "do_sample": False}
        tokens = model.generate(torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]]), **options)
        assert lengths == [4]
        monkeypatch.setattr(model.language_model, "look_up", lambda ids: None)
        assert torch.equal(model.generate(torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]]), **options), tokens)
        assert lengths == [4, 4, 1, 1, 1, 1, 1]


class TestMappedFiles:
    @pytest.fixture
    def mapped(self, tmp_path):
        if not Path("/proc/self/smaps").exists():
            pytest.skip("only Linux tells what is resident")
        file = tmp_path / "weights.bin"
        file.write_bytes(os.urandom(1 << 22))
        with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapping:
            yield file, mapping

    @staticmethod
    def resident(file):
        sections = Path("/proc/self/smaps").read_text().split("VmFlags")
        lines = next(section for section in sections if str(file) in section).splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("Rss:"))

    def test_release(self, mapped):
        file, mapping = mapped
        content = mapping[:]
        assert self.resident(file) == 4096
        release_pages(file)
        assert self.resident(file) == 0
        assert mapping[:] == content == file.read_bytes()

    def test_read_once(self, mapped):
        file, mapping = mapped
        with read_once(file):
            content = mapping[:]
        assert self.resident(file) == 0
        assert content == file.read_bytes()

    @pytest.mark.slow
    def test_weights_are_not_resident_twice(self, bundles):
        """A fresh process has packed its weights when it is loaded, and holds no pages of their files.

        OpenVINO uses small constants in float where they are mapped, and binds them to a memory node. Each then has a section of its own.
        """
        code = (
            "import sys; from pathlib import Path; from optimum_llava_ov import OVModelForLlavaMPT\n"
            "model = OVModelForLlavaMPT.from_pretrained(sys.argv[1])\n"
            "for section in Path('/proc/self/smaps').read_text().split('VmFlags'):\n"
            "    for part in ('language', 'vision_embeddings'):\n"
            "        if f'openvino_{part}_model.bin' in section: print(part, section.split('\\nRss:')[1].split()[0])\n"
        )
        resident = Counter()
        for line in run(sys.executable, "-c", code, bundles[GOLDEN.name], fresh=True).stdout.splitlines():
            part, kilobytes = line.split()
            resident[part] += int(kilobytes)
        assert dict(resident) == {"language": 0, "vision_embeddings": 0}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"bits": 4}, "128"),
        ({"bits": 8}, "128"),
        ({"bits": 4, "group_size": 64}, "64"),
        ({"bits": 4, "group_size": 32}, None),
        ({"bits": 4, "dq_group_size": 32}, "32"),
    ],
)
def test_groups_of_activations(tmp_path, options, expected):
    """As large as those of the weights, written into the graph, where every engine finds it."""
    config = options if len(options) == 1 else OVWeightQuantizationConfig(**options)
    main_export(GOLDEN.checkpoint, tmp_path, ov_config=OVConfig(quantization_config=config))
    key = ["runtime_options", "DYNAMIC_QUANTIZATION_GROUP_SIZE"]
    model = openvino.Core().read_model(tmp_path / "openvino_language_model.xml")
    assert (model.get_rt_info(key).value if model.has_rt_info(key) else None) == expected
    if expected:
        compiled = openvino.Core().compile_model(model, "CPU")
        assert compiled.get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE") == int(expected)


@pytest.mark.slow
@pytest.mark.parametrize("compressed", [False, True])
def test_precision_of_the_cache(tmp_path, bundles, compressed):
    """Optimum's rule: that of the weights if they are not compressed; else the engine's own choice. The same in every way to a bundle."""
    folders = [bundles[GOLDEN.name]]
    if compressed:
        recipe = OVConfig(quantization_config={"bits": 4})
        main_export(GOLDEN.checkpoint, tmp_path / "exported", ov_config=recipe)
        model = OVModelForLlavaMPT.from_pretrained(folders[0], quantization_config={"bits": 4}, compile=False)
        model.save_pretrained(tmp_path / "compressed_later")
        folders = [tmp_path / "exported", tmp_path / "compressed_later"]
    for folder in folders:
        options = (
            openvino.Core().read_model(folder / "openvino_language_model.xml").get_rt_info(["runtime_options"]).value
        )
        assert options.get("KV_CACHE_PRECISION") == (None if compressed else "f16"), folder
        assert options["ACTIVATIONS_SCALE_FACTOR"] == "8.0", folder
