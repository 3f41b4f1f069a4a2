"""Reading original checkpoints: every form they come in, and a clear word for those that cannot be read."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import GOLDENS, Golden
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionModel, MptConfig, MptForCausalLM

from optimum_llava_ov import InvalidCheckpointError, LlavaMptForConditionalGeneration, UnsupportedCheckpointError
from optimum_llava_ov.checkpoint.families.mpt import LlavaMptConfig
from optimum_llava_ov.checkpoint.reader import OriginalCheckpoint
from optimum_llava_ov.checkpoint.tensors import map_tensors
from optimum_llava_ov.models.mpt import MptLanguageModel


SHARDED, SINGLE = Golden("linear_fp16_sharded"), Golden("mlp2x_fp32_pad")


@pytest.fixture
def copy(tmp_path):
    """A copy of a golden checkpoint that a test may change."""

    def make(golden=SHARDED, **options):
        folder = shutil.copytree(golden.folder, tmp_path / "copy", ignore=shutil.ignore_patterns("arrays.npz"))
        change(folder / "checkpoint" / "config.json", **options)
        return folder / "checkpoint"

    return make


def change(file: Path, **options):
    file.write_text(json.dumps({**json.loads(file.read_text()), **options}))


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(checkpoint.glob("*.bin")) for name, tensor in torch.load(file).items()}


def replace_weights(checkpoint: Path, tensors: dict[str, torch.Tensor]):
    for file in [*checkpoint.glob("*.bin"), *checkpoint.glob("*.index.json")]:
        file.unlink()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, checkpoint / "model.safetensors")


def state_of(checkpoint, **kwargs) -> dict[str, torch.Tensor]:
    return LlavaMptForConditionalGeneration.from_pretrained(checkpoint, **kwargs).state_dict()


def assert_same(state, other):
    assert state.keys() == other.keys()
    assert all(torch.equal(state[name], other[name]) for name in state)


class TestFormats:
    @pytest.mark.parametrize("golden", GOLDENS, ids=lambda golden: golden.name)
    def test_safetensors_equal_pickles(self, copy, golden):
        checkpoint = copy(golden)
        replace_weights(checkpoint, tensors_of(checkpoint))
        assert_same(state_of(checkpoint), state_of(golden.checkpoint))

    def test_sharded_safetensors(self, copy):
        checkpoint = copy()
        tensors = tensors_of(checkpoint)
        for file in [*checkpoint.glob("*.bin"), *checkpoint.glob("*.index.json")]:
            file.unlink()
        names = sorted(tensors)
        files = {name: f"model-0000{1 + index % 2}-of-00002.safetensors" for index, name in enumerate(names)}
        for file in set(files.values()):
            save_file({name: tensors[name].contiguous() for name in names if files[name] == file}, checkpoint / file)
        (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
        assert_same(state_of(checkpoint), state_of(SHARDED.checkpoint))

    def test_pickles_from_before_zip_files(self, copy):
        checkpoint = copy(SINGLE)
        torch.save(tensors_of(checkpoint), checkpoint / "pytorch_model.bin", _use_new_zipfile_serialization=False)
        assert_same(state_of(checkpoint), state_of(SINGLE.checkpoint))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_precision_is_kept(self, copy, dtype):
        checkpoint = copy(SINGLE)
        replace_weights(checkpoint, {name: tensor.to(dtype) for name, tensor in tensors_of(checkpoint).items()})
        state = state_of(checkpoint)
        assert state["language_model.transformer.blocks.0.attn.Wqkv.weight"].dtype == dtype
        assert state["image_encoder.features.pre_layrnorm.weight"].dtype == torch.float32

    def test_weights_are_mapped_not_copied(self):
        """Two loads share the pages of the file; the embedding table, which gets a row more, is the one copy. The head shares it."""
        mapped = {str(SHARDED.checkpoint / f"pytorch_model-0000{i}-of-00003.bin") for i in (1, 2, 3)}
        state = state_of(SHARDED.checkpoint)
        regions = [
            line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.split()[-1] in mapped
        ]
        ranges = [tuple(int(end, 16) for end in region[0].split("-")) for region in regions]
        copies = [
            name
            for name, tensor in state.items()
            if name.startswith("language_model") and not any(low <= tensor.data_ptr() < high for low, high in ranges)
        ]
        assert set(copies) == {"language_model.lm_head.weight", "language_model.lm_head.bias"}
        assert state["language_model.lm_head.weight"].data_ptr() == state["embed_tokens.weight"].data_ptr()

    def test_padded_vocabulary_is_cut_to_the_tokenizer(self):
        state = state_of(SINGLE.checkpoint)
        assert state["language_model.lm_head.weight"].shape[0] == 463
        assert state["embed_tokens.weight"].shape[0] == 463


class TestVisionTower:
    def test_absolute_path(self, copy, tmp_path):
        checkpoint = copy(mm_vision_tower=str(shutil.copytree(SHARDED.folder / "clip", tmp_path / "elsewhere")))
        shutil.rmtree(checkpoint.parent / "clip")
        assert_same(state_of(checkpoint), state_of(SHARDED.checkpoint))

    def test_override(self, copy, tmp_path):
        checkpoint = copy(mm_vision_tower="openai/clip-vit-large-patch14")
        tower = shutil.copytree(SHARDED.folder / "clip", tmp_path / "elsewhere")
        assert_same(state_of(checkpoint, vision_tower=str(tower)), state_of(SHARDED.checkpoint))

    def test_tower_inside_the_checkpoint_is_ignored(self, copy):
        checkpoint = copy()
        tower = load_file(SHARDED.folder / "clip" / "model.safetensors")
        inside = {f"transformer.vision_tower.vision_tower.{name}": tensor + 1 for name, tensor in tower.items()}
        replace_weights(checkpoint, {**tensors_of(checkpoint), **inside})
        assert_same(state_of(checkpoint), state_of(SHARDED.checkpoint))

    @pytest.mark.parametrize("tower", ["../nowhere", "/no/such/folder", None])
    def test_not_found_says_how_to_override(self, copy, tower):
        with pytest.raises(InvalidCheckpointError, match=r"--model-kwargs '\{\"vision_tower\""):
            OriginalCheckpoint.open(copy(mm_vision_tower=tower))

    def test_not_in_the_offline_cache(self, copy, tmp_path):
        checkpoint = copy(mm_vision_tower="openai/clip-vit-large-patch14")
        with pytest.raises(InvalidCheckpointError, match="in the cache.*vision_tower"):
            OriginalCheckpoint.open(checkpoint, local_files_only=True, cache_dir=tmp_path / "cache")

    def test_of_another_size(self, copy):
        with pytest.raises(UnsupportedCheckpointError, match="takes 96 features.*gives 64"):
            OriginalCheckpoint.open(copy(mm_hidden_size=96))

    def test_of_another_kind(self, copy):
        checkpoint = copy()
        change(checkpoint.parent / "clip" / "config.json", model_type="siglip")
        with pytest.raises(UnsupportedCheckpointError, match="'siglip'"):
            OriginalCheckpoint.open(checkpoint)


class TestOptions:
    """Each option against transformers, or against what the option means."""

    @staticmethod
    def language_model(attn_config=None, **options):
        config = json.loads((SINGLE.checkpoint / "config.json").read_text())
        config["attn_config"].update(attn_config or {})
        torch.manual_seed(0)
        return MptLanguageModel(LlavaMptConfig.from_dict({**config, **options}).text_config).eval()

    @pytest.mark.parametrize("attn_config", [{}, {"clip_qkv": 0.02}, {"softmax_scale": 0.7}], ids=str)
    def test_attention_options_equal_transformers(self, attn_config):
        model = self.language_model(attn_config)
        reference = MptForCausalLM(
            MptConfig(**{**model.config.to_dict(), "attn_config": {**attn_config, "alibi": True}})
        ).eval()
        reference.transformer.load_state_dict({**model.transformer.state_dict(), "wte.weight": model.lm_head.weight})
        reference.tie_weights()
        embeds = torch.randn(2, 20, model.config.d_model)
        with torch.no_grad():
            logits = model(embeds, torch.ones(2, 20, dtype=torch.long)).logits
            expected = reference(inputs_embeds=embeds, attention_mask=torch.ones(2, 20, dtype=torch.long)).logits
        assert (logits - expected)[..., :-1].abs().max() < 1e-4  # the last token is `<image>`

    @pytest.mark.parametrize(("logit_scale", "factor"), [(0.5, 0.5), ("inv_sqrt_d_model", 120**-0.5)])
    def test_logit_scale(self, logit_scale, factor):
        embeds, mask = torch.randn(1, 5, 120), torch.ones(1, 5, dtype=torch.long)
        with torch.no_grad():
            plain, scaled = (
                self.language_model(logit_scale=scale)(embeds, mask).logits for scale in (None, logit_scale)
            )
        assert torch.allclose(scaled[..., :-1], plain[..., :-1] * factor, atol=1e-6)

    def test_alibi_bias_max(self):
        embeds, mask = torch.randn(1, 30, 120), torch.ones(1, 30, dtype=torch.long)
        with torch.no_grad():
            eight, two = (self.language_model({"alibi_bias_max": value})(embeds, mask).logits for value in (8, 2))
        assert (eight - two).abs().max() > 1e-3

    @pytest.mark.parametrize(("feature", "first"), [("patch", 1), ("cls_patch", 0)])
    @pytest.mark.parametrize("layer", [-2, -1, 1])
    def test_vision_features_equal_transformers(self, copy, feature, first, layer):
        checkpoint = copy(mm_vision_select_feature=feature, mm_vision_select_layer=layer)
        model = LlavaMptForConditionalGeneration.from_pretrained(checkpoint)
        tower = CLIPVisionModel.from_pretrained(SHARDED.folder / "clip").eval()
        pixel_values = torch.randn(2, 3, 56, 56)
        with torch.no_grad():
            features = model.image_encoder.features(pixel_values)
            expected = tower(pixel_values, output_hidden_states=True).hidden_states[layer][:, first:]
        assert (features - expected).abs().max() < 1e-5

    def test_projectors(self, copy):
        checkpoint = copy(SINGLE, mm_projector_type="mlp3x_gelu")
        tensors = tensors_of(checkpoint)
        tensors["transformer.mm_projector.4.weight"], tensors["transformer.mm_projector.4.bias"] = (
            torch.randn(120, 120),
            torch.randn(120),
        )
        replace_weights(checkpoint, tensors)
        model = LlavaMptForConditionalGeneration.from_pretrained(checkpoint)
        assert [type(layer).__name__ for layer in model.image_encoder.projector] == [
            "Linear",
            "GELU",
            "Linear",
            "GELU",
            "Linear",
        ]

    def test_identity_projector_needs_equal_widths(self, copy):
        with pytest.raises(UnsupportedCheckpointError, match="identity"):
            OriginalCheckpoint.open(copy(mm_projector_type="identity"))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"no_bias": False}, "no_bias=False"),
        ({"norm_type": "rmsnorm"}, "norm_type='rmsnorm'"),
        ({"attn_config": {"alibi": False}}, "attn_config.alibi=False"),
        ({"attn_config": {"alibi": True, "qk_ln": True}}, "attn_config.qk_ln=True"),
        ({"attn_config": {"alibi": True, "prefix_lm": True}}, "attn_config.prefix_lm=True"),
        ({"attn_config": {"alibi": True, "attn_type": "multiquery_attention"}}, "attn_type='multiquery_attention'"),
        ({"attn_config": {"alibi": True, "attn_uses_sequence_id": True}}, "attn_uses_sequence_id=True"),
        ({"mm_projector_type": "resampler"}, "mm_projector_type='resampler'"),
        ({"mm_vision_select_feature": "cls"}, "mm_vision_select_feature='cls'"),
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio='anyres'"),
        ({"sep_image_conv_front": True}, "sep_image_conv_front=True"),
        ({"use_mm_proj": False}, "use_mm_proj=False"),
        ({"logit_scale": "other"}, "logit_scale='other'"),
        ({"mm_vision_select_layer": -9}, "mm_vision_select_layer=-9"),
        ({"d_model": None}, "d_model is missing"),
        ({"architectures": ["LlavaQwenForCausalLM"]}, "LlavaQwenForCausalLM"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_we_do_not_compute_is_refused_by_name(copy, options, named):
    checkpoint = copy(**options)
    for file in checkpoint.glob("*.bin"):
        file.unlink()  # before any weights are read
    with pytest.raises(UnsupportedCheckpointError) as error:
        OriginalCheckpoint.open(checkpoint)
    assert named in str(error.value)


class TestDamage:
    def test_missing_shard(self, copy):
        checkpoint = copy()
        (checkpoint / "pytorch_model-00002-of-00003.bin").unlink()
        with pytest.raises(InvalidCheckpointError, match="no pytorch_model-00002-of-00003.bin"):
            state_of(checkpoint)

    def test_truncated_shard(self, copy):
        checkpoint = copy()
        file = checkpoint / "pytorch_model-00002-of-00003.bin"
        os.truncate(file, file.stat().st_size // 2)
        with pytest.raises(InvalidCheckpointError, match=r"pytorch_model-00002-of-00003.bin.*truncated or damaged"):
            state_of(checkpoint)

    def test_truncated_safetensors(self, copy):
        checkpoint = copy()
        replace_weights(checkpoint, tensors_of(checkpoint))
        os.truncate(checkpoint / "model.safetensors", 100_000)
        with pytest.raises(InvalidCheckpointError, match=r"model.safetensors.*truncated or damaged"):
            state_of(checkpoint)

    def test_damaged_index(self, copy):
        checkpoint = copy()
        (checkpoint / "pytorch_model.bin.index.json").write_text('{"weight_map": []}')
        with pytest.raises(InvalidCheckpointError, match="is not an index of weights"):
            state_of(checkpoint)

    def test_no_weights(self, copy):
        checkpoint = copy(SINGLE)
        (checkpoint / "pytorch_model.bin").unlink()
        with pytest.raises(InvalidCheckpointError, match="has none of model.safetensors"):
            state_of(checkpoint)

    def test_wrong_shape_missing_and_unexpected_tensors(self, copy):
        checkpoint = copy()
        tensors = tensors_of(checkpoint)
        tensors["transformer.blocks.0.attn.Wqkv.weight"] = torch.zeros(8, 8)
        tensors["transformer.blocks.0.attn.Wqkv.bias"] = torch.zeros(8)
        del tensors["transformer.norm_f.weight"]
        replace_weights(checkpoint, tensors)
        with pytest.raises(InvalidCheckpointError) as error:
            state_of(checkpoint)
        assert "language_model.transformer.blocks.0.attn.Wqkv.weight is (8, 8), expected (768, 256)" in str(
            error.value
        )
        assert "not expected: language_model.transformer.blocks.0.attn.Wqkv.bias" in str(error.value)
        assert "missing: language_model.transformer.norm_f.weight" in str(error.value)

    def test_code_in_a_pickle_is_not_run(self, copy, tmp_path):
        checkpoint = copy(SINGLE)
        proof = tmp_path / "ran"

        class Evil:
            def __reduce__(self):
                return os.system, (f"touch {proof}",)

        torch.save({"transformer.wte.weight": Evil()}, checkpoint / "pytorch_model.bin")
        with pytest.raises(InvalidCheckpointError, match="holds other objects than tensors and was not loaded"):
            state_of(checkpoint)
        assert not proof.exists()

    def test_pickle_of_something_else(self, tmp_path):
        torch.save([1, 2], tmp_path / "pytorch_model.bin")
        with pytest.raises(InvalidCheckpointError, match="is not a dictionary of tensors"):
            map_tensors(tmp_path / "pytorch_model.bin")

    def test_config_that_is_no_json(self, copy):
        checkpoint = copy()
        (checkpoint / "config.json").write_text("<html>")
        with pytest.raises(InvalidCheckpointError, match="is not valid JSON"):
            OriginalCheckpoint.open(checkpoint)

    def test_tokenizer_of_another_model(self, copy):
        checkpoint = copy()
        tokenizer = json.loads((checkpoint / "tokenizer.json").read_text())
        tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token["content"] != "<im_start>"]
        (checkpoint / "tokenizer.json").write_text(json.dumps(tokenizer))
        with pytest.raises(InvalidCheckpointError, match="'<im_start>' is not a token"):
            OriginalCheckpoint.open(checkpoint)

    def test_vocabulary_smaller_than_the_tokenizer(self, copy):
        with pytest.raises(InvalidCheckpointError, match="tokenizer .* has 462 tokens, the model only 400"):
            OriginalCheckpoint.open(copy(vocab_size=400))

    def test_no_such_folder(self):
        with pytest.raises(InvalidCheckpointError, match="There is no folder './no/such/folder'"):
            OriginalCheckpoint.open("./no/such/folder")
