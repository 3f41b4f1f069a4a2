"""Merging adapters, projectors and deltas: the bits of the original code, in fp16 and in float32, and a clear word for what does not fit."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import Golden
from safetensors.torch import save_file

from optimum_llava_ov import InvalidCheckpointError, UnsupportedCheckpointError
from optimum_llava_ov.checkpoint.lora import AdapterConfig, adapter_file, read_adapter
from optimum_llava_ov.checkpoint.merge import MIN_BYTES, Difference, LowRank, Overlay, Replacement, check_fit, merge
from optimum_llava_ov.checkpoint.repository import Repository
from optimum_llava_ov.checkpoint.tensors import map_tensors


LORA = Golden("lora")
BASE = {
    name: tensor
    for file in sorted((LORA.folder / "base").glob("*.bin"))
    for name, tensor in map_tensors(file).items()
    if "inv_freq" not in name
}
ADAPTER = map_tensors(LORA.checkpoint / "adapter_model.bin")
SETTINGS = json.loads((LORA.checkpoint / "adapter_config.json").read_text())
TARGETS = sorted(name for name in BASE if "_proj." in name)
PREFIX = "base_model.model."


def matrices(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    module = name.removesuffix(".weight")
    return ADAPTER[f"{PREFIX}{module}.lora_A.weight"], ADAPTER[f"{PREFIX}{module}.lora_B.weight"]


def expected(name: str, scale: float, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """The formula of the original, word for word."""
    a, b = matrices(name)
    return (BASE[name].float() + scale * (b.float() @ a.float())).to(dtype)


@pytest.fixture
def folder(tmp_path):
    """Writes an adapter with other settings and tensors."""

    def write(tensors=ADAPTER, suffix="safetensors", **settings):
        values = {name: value for name, value in {**SETTINGS, **settings}.items() if value != "absent"}
        (tmp_path / "adapter_config.json").write_text(json.dumps(values))
        file = tmp_path / f"adapter_model.{suffix}"
        if suffix == "bin":
            torch.save(dict(tensors), file)
        else:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
        return tmp_path

    return write


def overlays_of(folder):
    return read_adapter(adapter_file(Repository(str(folder))), AdapterConfig.read(folder / "adapter_config.json"))


def merged(folder, base=BASE, **kwargs):
    return merge(base, overlays_of(folder), **kwargs)


def assert_scaled(tensors, scale):
    assert all(torch.equal(tensors[name], expected(name, scale)) for name in TARGETS)


class TestLora:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
    def test_golden_has_the_bits_of_the_formula(self, dtype):
        tensors = merged(LORA.checkpoint, dtype=dtype)
        assert len(TARGETS) == 21
        for name in TARGETS:
            assert tensors[name].dtype == dtype
            assert torch.equal(tensors[name], expected(name, 2.0, dtype)), name
            assert not torch.equal(tensors[name].half(), BASE[name])
        assert tensors.keys() == BASE.keys()
        assert all(tensors[name] is BASE[name] for name in BASE if name not in TARGETS)

    @pytest.mark.parametrize(("stored", "result"), [("float16", "float16"), ("bfloat16", "float16"), ("float32",) * 2])
    def test_precision_follows_the_base(self, stored, result):
        base = {name: tensor.to(getattr(torch, stored)) for name, tensor in BASE.items()}
        tensors = merged(LORA.checkpoint, base)
        assert {tensor.dtype for tensor in tensors.values()} == {getattr(torch, result)}

    def test_fp16_of_a_float32_base_rounds_as_the_original_does(self):
        """It loads the base in fp16 first."""
        base = {name: tensor.float() + 1e-5 for name, tensor in BASE.items()}
        tensors = merged(LORA.checkpoint, base, dtype=torch.float16)
        for name in TARGETS:
            a, b = matrices(name)
            assert torch.equal(tensors[name], (base[name].half().float() + 2.0 * (b.float() @ a.float())).half())

    @pytest.mark.parametrize("suffix", ["bin", "safetensors"])
    def test_both_formats(self, folder, suffix):
        assert_scaled(merged(folder(suffix=suffix)), 2.0)

    @pytest.mark.parametrize(
        ("settings", "scale"),
        [
            ({"lora_alpha": 3}, 3 / 8),
            ({"lora_alpha": 0.3}, 0.3 / 8),
            ({"use_rslora": True}, 16 / math.sqrt(8)),
            ({"target_modules": r".*(q|k|v|o|gate|up|down)_proj"}, 2.0),
            ({"target_modules": None}, 2.0),
            ({"bias": "lora_only"}, 2.0),
            ({"init_lora_weights": "gaussian", "peft_version": "0.17.0", "layer_replication": None}, 2.0),
        ],
        ids=str,
    )
    def test_scale(self, folder, settings, scale):
        assert_scaled(merged(folder(**settings)), scale)

    @pytest.mark.parametrize(
        ("pattern", "changed"),
        [
            ("q_proj", "self_attn.q_proj"),
            ("model.layers.1.mlp.down_proj", "layers.1.mlp.down_proj"),
            ("^model.layers.0.self_attn.k_proj", "layers.0.self_attn.k_proj"),
            (r"layers\.[12]\.mlp\.(up|gate)_proj", ("1.mlp.up", "1.mlp.gate", "2.mlp.up", "2.mlp.gate")),
        ],
        ids=str,
    )
    def test_alpha_of_some_modules(self, folder, pattern, changed):
        tensors = merged(folder(alpha_pattern={pattern: 4}))
        changed = (changed,) if isinstance(changed, str) else changed
        for name in TARGETS:
            scale = 0.5 if any(part in name for part in changed) else 2.0
            assert torch.equal(tensors[name], expected(name, scale)), name

    def test_rank_of_some_modules(self, folder):
        """The rank changes the scale, too."""
        cut = {
            name: (tensor[:4] if "lora_A" in name else tensor[:, :4]) if "q_proj" in name else tensor
            for name, tensor in ADAPTER.items()
        }
        tensors = merged(folder(cut, rank_pattern={"q_proj": 4}))
        for name in TARGETS:
            a, b = matrices(name)
            if "q_proj" in name:
                wanted = (BASE[name].float() + 4.0 * (b[:, :4].float() @ a[:4].float())).half()
                assert torch.equal(tensors[name], wanted)
            else:
                assert torch.equal(tensors[name], expected(name, 2.0))

    @pytest.mark.parametrize(
        "rename",
        [
            lambda name: name.replace(".weight", ".default.weight"),
            lambda name: name.replace(PREFIX, ""),
            lambda name: name.replace(f"{PREFIX}model.", f"{PREFIX}language_model.model."),
            lambda name: name.replace(f"{PREFIX}model.", f"{PREFIX}model.language_model."),
        ],
        ids=["with the adapter's name", "without PEFT's prefix", "transformers", "transformers 5"],
    )
    def test_names(self, folder, rename):
        assert_scaled(merged(folder({rename(name): tensor for name, tensor in ADAPTER.items()})), 2.0)

    def test_embeddings(self, folder):
        a, b = torch.randn(8, 600), torch.randn(64, 8)
        name = "model.embed_tokens"
        tensors = {f"{PREFIX}{name}.lora_embedding_A": a, f"{PREFIX}{name}.lora_embedding_B": b}
        table = merged(folder(tensors))[f"{name}.weight"]
        assert torch.equal(table, (BASE[f"{name}.weight"].float() + 2.0 * (b @ a).T).half())
        # PEFT saves the table beside, if it was resized: the matrices are added to this one
        tensors[f"{PREFIX}{name}.base_layer.weight"] = other = torch.randn(600, 64)
        table = merged(folder(tensors))[f"{name}.weight"]
        assert torch.equal(table, (other.half().float() + 2.0 * (b @ a).T).half())

    @pytest.mark.parametrize("wrapper", ["", ".modules_to_save", ".modules_to_save.default"])
    def test_modules_that_were_trained_as_a_whole(self, folder, wrapper):
        head, original = torch.randn(600, 64).half(), torch.zeros(600, 64).half()
        tensors = {f"{PREFIX}lm_head{wrapper}.weight": head, f"{PREFIX}lm_head.original_module.weight": original}
        result = merged(folder({**ADAPTER, **tensors}, modules_to_save=["lm_head"]))
        assert torch.equal(result["lm_head.weight"], head)
        assert_scaled(result, 2.0)

    def test_chain_is_merged_in_order(self, folder):
        """Each step as if it had been saved in fp16 before the next."""
        second = overlays_of(folder({name: tensor * 2 for name, tensor in ADAPTER.items()}, lora_alpha=8))
        tensors = merge(BASE, [*overlays_of(LORA.checkpoint), *second])
        for name in TARGETS:
            a, b = (2 * matrix.float() for matrix in matrices(name))
            assert torch.equal(tensors[name], (expected(name, 2.0).float() + 1.0 * (b @ a)).half())


class TestReplacement:
    def test_projector_is_new(self):
        weights = torch.randn(64, 32).bfloat16()
        tensors = merge(BASE, [Overlay("mm_projector.bin", {"model.mm_projector.0.weight": Replacement(weights)})])
        assert torch.equal(tensors["model.mm_projector.0.weight"], weights.half())

    @pytest.mark.parametrize(
        ("rows", "wanted"),
        [
            (602, lambda base, table: table),
            (2, lambda base, table: torch.cat([base, table])),
            (599, lambda base, table: table),
        ],
        ids=["more", "only the new ones", "fewer"],
    )
    def test_rows_of_tables(self, rows, wanted):
        name, table = "model.embed_tokens.weight", torch.randn(rows, 64).half()
        tensors = merge(BASE, [Overlay("mm_projector.bin", {name: Replacement(table)})])
        assert torch.equal(tensors[name], wanted(BASE[name], table))


class TestDelta:
    def test_sum(self):
        """In fp16, as `apply_delta.py` of the original does: the sum of two fp16 numbers, rounded once."""
        deltas = {name: (torch.randn_like(tensor.float()) / 50).half() for name, tensor in BASE.items()}
        projector = torch.randn(64, 32).half()
        updates = {
            name: Difference(tensor) for name, tensor in {**deltas, "model.mm_projector.weight": projector}.items()
        }
        tensors = merge(BASE, [Overlay("delta", updates)])
        for name, delta in deltas.items():
            assert torch.equal(tensors[name], delta + BASE[name])
        assert torch.equal(tensors["model.mm_projector.weight"], projector)

    def test_rows_of_added_tokens(self):
        name, delta = "model.embed_tokens.weight", torch.randn(603, 64).half()
        table = merge(BASE, [Overlay("delta", {name: Difference(delta)})])[name]
        assert torch.equal(table[:600], delta[:600] + BASE[name])
        assert torch.equal(table[600:], delta[600:])


class TestMemory:
    def test_large_results_are_mapped_from_the_workspace(self, tmp_path):
        weight = torch.randn(1024, 1024).half()
        a, b = torch.randn(4, 1024), torch.randn(1024, 4)
        overlay = Overlay("adapter", {"w": LowRank(a, b, 0.5), "model.mm_projector.bias": Replacement(torch.ones(8))})
        result = merge({"w": weight}, [overlay], workspace=tmp_path)
        assert weight.nbytes >= MIN_BYTES
        assert torch.equal(result["w"], (weight.float() + 0.5 * (b @ a)).half())
        assert list(tmp_path.iterdir()) == []  # the file has no name
        maps = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
        ranges = [(tuple(int(end, 16) for end in line[0].split("-")), line[5]) for line in maps if len(line) == 6]
        within = {
            name: [path for (low, high), path in ranges if low <= tensor.data_ptr() < high]
            for name, tensor in result.items()
        }
        assert within["w"] == [f"{tmp_path}/.tensor (deleted)"]
        assert not any(str(tmp_path) in path for path in within["model.mm_projector.bias"])


class TestRefused:
    @pytest.mark.parametrize(
        ("settings", "named"),
        [
            ({"peft_type": "IA3"}, "peft_type='IA3'"),
            ({"peft_type": "LOHA"}, "peft_type='LOHA'"),
            ({"use_dora": True}, "use_dora=True"),
            ({"lora_bias": True}, "lora_bias=True"),
            ({"bias": "some"}, "bias='some'"),
            ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
            ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication="),
            ({"trainable_token_indices": [1, 2]}, "trainable_token_indices="),
            ({"r": 0}, "r=0"),
            ({"lora_alpha": "16"}, "lora_alpha='16'"),
            ({"rank_pattern": {"q_proj": -1}}, "rank_pattern="),
            ({"alpha_pattern": {"(": 2}}, "alpha_pattern="),
        ],
        ids=str,
    )
    def test_option(self, folder, settings, named):
        with pytest.raises(UnsupportedCheckpointError) as error:
            AdapterConfig.read(folder(**settings) / "adapter_config.json")
        assert named in str(error.value)

    @pytest.mark.parametrize("name", ["r", "lora_alpha"])
    def test_no_scale(self, folder, name):
        with pytest.raises(InvalidCheckpointError, match=f"has no {name}, so the scale"):
            AdapterConfig.read(folder(**{name: "absent"}) / "adapter_config.json")

    def test_no_weights(self, tmp_path):
        shutil.copy(LORA.checkpoint / "adapter_config.json", tmp_path)
        with pytest.raises(InvalidCheckpointError, match="none of adapter_model.safetensors, adapter_model.bin"):
            overlays_of(tmp_path)

    def test_rank_of_another_adapter(self, folder):
        with pytest.raises(
            InvalidCheckpointError, match="with 8 rows, but adapter_config.json says that its rank is 4"
        ):
            overlays_of(folder(r=4))

    @pytest.mark.parametrize(
        ("tensors", "error", "message"),
        [
            ({"model.norm.lora_A.weight": torch.ones(8, 64)}, InvalidCheckpointError, "only lora_A of model.norm"),
            ({"m.lora_magnitude_vector": torch.ones(8)}, UnsupportedCheckpointError, "'m.lora_magnitude_vector'"),
            (
                {"m.lora_A.weight": torch.ones(8, 4), "m.lora_A.other.weight": torch.ones(8, 4)},
                UnsupportedCheckpointError,
                "lora_A of m twice",
            ),
            (
                {"m.lora_A.weight": torch.ones(8, 4, 1, 1), "m.lora_B.weight": torch.ones(4, 8)},
                UnsupportedCheckpointError,
                "expected two matrices",
            ),
            (
                {"m.lora_A.weight": torch.ones(0, 0), "m.lora_B.weight": torch.ones(0, 0)},
                InvalidCheckpointError,
                "empty lora_A of m.*ZeRO-3",
            ),
            ({}, InvalidCheckpointError, "has no tensors"),
        ],
        ids=["half", "dora", "two adapters", "convolution", "zero-3", "empty"],
    )
    def test_tensors(self, folder, tensors, error, message):
        with pytest.raises(error, match=message):
            overlays_of(folder(tensors))

    def test_all_that_does_not_fit_is_listed(self, folder):
        shapes = {name: tensor.shape for name, tensor in BASE.items()}
        shapes["model.layers.0.self_attn.q_proj.weight"] = torch.Size([64, 32])
        del shapes["model.layers.2.mlp.up_proj.weight"]
        with pytest.raises(InvalidCheckpointError) as error:
            check_fit(overlays_of(LORA.checkpoint), shapes)
        assert "q_proj.weight is changed by (64, 64), and is (64, 32) in the base" in str(error.value)
        assert "model.layers.2.mlp.up_proj.weight is not in the base" in str(error.value)
        assert '--model-kwargs \'{"base_model"' in str(error.value)

    @pytest.mark.parametrize(
        ("name", "update", "message"),
        [
            ("model.norm.weight", Replacement(torch.ones(32)), r"is \(32,\), and \(64,\) in the base"),
            ("model.embed_tokens.weight", Replacement(torch.ones(600, 32)), r"\(600, 32\), and \(600, 64\)"),
            ("model.embed_tokens.weight", Difference(torch.ones(599, 64)), r"\(599, 64\), and \(600, 64\)"),
            ("model.layers.0.self_attn.q_proj.bias", Replacement(torch.ones(64)), "q_proj.bias is not in the base"),
            ("model.mm_projector.0.weight", LowRank(torch.ones(1, 2), torch.ones(2, 1), 1.0), "is not in the base"),
            ("model.norm.weight", Replacement(torch.ones(64, dtype=torch.int8)), "torch.int8, expected fp16"),
        ],
    )
    def test_update(self, name, update, message):
        with pytest.raises(InvalidCheckpointError, match=message):
            merge(BASE, [Overlay("file", {name: update})])
