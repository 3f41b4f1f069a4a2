"""Checkpoints of every family: which are taken, which are refused by name, and what is true of one family only."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import EXACT, FAMILIES, GOLDEN, Golden, files, fill_hub_cache, run
from safetensors.torch import save_file
from transformers import AutoConfig, AutoProcessor, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from optimum_llava_ov import OriginalLlavaForConditionalGeneration, OVModelForLlava, OVModelForLlavaMPT
from optimum_llava_ov.checkpoint.families import family_of, is_original, read_config
from optimum_llava_ov.checkpoint.reader import OriginalCheckpoint
from optimum_llava_ov.errors import BundleError, InvalidCheckpointError, UnsupportedCheckpointError


VICUNA, LLAMA_2, MISTRAL = Golden("llava15_vicuna"), Golden("llava1_llama2chat"), Golden("llava16_mistral_anyres")
GREEDY = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None}
by_new_family = pytest.mark.parametrize("golden", [VICUNA, LLAMA_2], ids=lambda golden: golden.name)
TOWER = {"mm_vision_tower": "openai/clip-vit-large-patch14-336"}


class TestDetection:
    @pytest.mark.parametrize(
        ("values", "model_type"),
        [
            ({"architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava", **TOWER}, "llava_llama"),
            ({"architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava_llama", **TOWER}, "llava_llama"),
            ({"architectures": ["LlavaLlamaForCausalLM"], "model_type": "whatever"}, "llava_llama"),
            ({"architectures": ["Share4VLlamaForCausalLM"], "model_type": "share4v", **TOWER}, "llava_llama"),
            ({"architectures": ["LlavaMistralForCausalLM"], "model_type": "llava_mistral", **TOWER}, "llava_mistral"),
            ({"architectures": ["LlavaMistralForCausalLM"], "model_type": "mistral", **TOWER}, "llava_mistral"),
            ({"architectures": ["LlavaMPTForCausalLM"], "model_type": "llava_mpt"}, "llava_mpt"),
            ({"model_type": "llava_mistral", **TOWER}, "llava_mistral"),
        ],
    )
    def test_families(self, values, model_type):
        assert is_original(values)
        assert family_of(values).model_type == model_type

    @pytest.mark.parametrize(
        "values",
        [
            {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava"},
            {"architectures": ["LlavaNextForConditionalGeneration"], "model_type": "llava_next"},
            {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
            {"architectures": ["LlavaQwenForCausalLM"], "model_type": "llava-qwen2", "auto_map": {}, **TOWER},
            {"model_type": "llava"},
            {},
        ],
        ids=str,
    )
    def test_others_go_where_they_always_went(self, values):
        assert not is_original(values)

    @pytest.mark.parametrize(
        ("architecture", "model_type", "name"),
        [
            ("MoELLaVAStablelmForCausalLM", "moe_llava_stablelm", "mixture of experts"),
            ("BunnyPhiForCausalLM", "bunny-phi", "Bunny"),
            ("TinyLlavaPhiForCausalLM", "tiny_llava_phi", "TinyLLaVA"),
            ("LlavaQwenForCausalLM", "llava_qwen", "Qwen"),
            ("LISAForCausalLM", "llava", "decoder of masks"),
            ("GLaMMForCausalLM", "llava", "decoder of masks"),
            ("VideoLlavaForCausalLM", "llava", "videos"),
            ("SomethingForCausalLM", "llava", "another model"),
        ],
    )
    def test_relatives_are_refused_by_name(self, tmp_path, architecture, model_type, name):
        values = {"architectures": [architecture], "model_type": model_type, **TOWER}
        assert is_original(values)
        (tmp_path / "config.json").write_text(json.dumps(values))
        with pytest.raises(UnsupportedCheckpointError, match=f"{name}.*{architecture}.*Expected an original LLaVA"):
            read_config(tmp_path / "config.json")

    @pytest.mark.parametrize(
        ("golden", "change", "message"),
        [
            (VICUNA, {"s2": True}, "s2=True"),
            (VICUNA, {"mm_resampler_type": "perceiver"}, "mm_resampler_type='perceiver'"),
            (VICUNA, {"mm_projector_type": "sim_mlp"}, "mm_projector_type='sim_mlp'"),
            (VICUNA, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling="),
            (VICUNA, {"rope_scaling": {"type": "linear", "factor": 0}}, "rope_scaling="),
            (VICUNA, {"hidden_act": "gelu"}, "hidden_act='gelu'"),
            (VICUNA, {"head_dim": 24}, "head_dim=24"),
            (VICUNA, {"num_key_value_heads": 3}, "not a multiple of num_key_value_heads=3"),
            (VICUNA, {"num_attention_heads": 3}, "hidden_size=64 is not an even multiple"),
            (VICUNA, {"intermediate_size": None}, "intermediate_size is missing"),
            (VICUNA, {"image_aspect_ratio": "highres"}, "image_aspect_ratio='highres'"),
            (MISTRAL, {"image_aspect_ratio": "pad", "sliding_window": 2048}, "sliding_window=2048 is in use"),
            (MISTRAL, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling="),
        ],
        ids=lambda value: str(value)[:60],
    )
    def test_what_is_not_computed_is_refused_by_name(self, tmp_path, golden, change, message):
        values = json.loads((golden.checkpoint / "config.json").read_text()) | {"mm_patch_merge_type": "flat"} | change
        (tmp_path / "config.json").write_text(json.dumps(values))
        with pytest.raises(UnsupportedCheckpointError, match=message):
            read_config(tmp_path / "config.json")

    def test_towers_other_than_clip_are_refused(self, tmp_path):
        folder = shutil.copytree(VICUNA.folder, tmp_path / "copy")
        tower = folder / "clip" / "config.json"
        tower.write_text(json.dumps({**json.loads(tower.read_text()), "model_type": "siglip_vision_model"}))
        with pytest.raises(UnsupportedCheckpointError, match="'siglip_vision_model' model; only CLIP"):
            OriginalCheckpoint.open(folder / "checkpoint")

    @pytest.mark.parametrize(("window", "longest", "context"), [(4096, 2048, 4096), (None, 2048, 32768)])
    def test_a_window_that_is_not_in_use_limits_the_context(self, tmp_path, window, longest, context):
        values = json.loads((MISTRAL.checkpoint / "config.json").read_text()) | {
            "image_aspect_ratio": "pad",
            "mm_patch_merge_type": "flat",
            "sliding_window": window,
            "tokenizer_model_max_length": longest,
        }
        (tmp_path / "config.json").write_text(json.dumps(values))
        config = read_config(tmp_path / "config.json")
        config.vocab_size = 601
        assert config.text_config.max_position_embeddings == context
        assert config.text_config.sliding_window is None

    def test_transformers_knows_the_types(self):
        for model_type in ("llava_mpt", "llava_llama", "llava_mistral"):
            assert AutoConfig.for_model(model_type).model_type == model_type


@pytest.mark.slow
class TestMistral:
    """The decoder against the original, by the case without an image: how images are cut does not matter there."""

    @pytest.fixture(scope="class")
    @classmethod
    def checkpoint(cls, tmp_path_factory):
        folder = shutil.copytree(MISTRAL.folder, tmp_path_factory.mktemp("mistral") / "copy")
        config = folder / "checkpoint" / "config.json"
        change = {"image_aspect_ratio": "pad", "mm_patch_merge_type": "flat", "image_grid_pinpoints": None}
        config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
        return folder / "checkpoint"

    @pytest.fixture(scope="class")
    @classmethod
    def bundle(cls, checkpoint, tmp_path_factory):
        output = tmp_path_factory.mktemp("bundle") / "mistral-ov"
        command = ["optimum-cli", "export", "openvino", "--model", checkpoint, output, "--weight-format", "fp32"]
        result = run(*command)
        assert "Conversation: mistral_instruct. The checkpoint is a LlavaMistralForCausalLM." in result.stderr
        return output

    @pytest.mark.parametrize("kind", ["torch", "PA", "SDPA"])
    def test_equals_the_original(self, checkpoint, bundle, kind):
        if kind == "torch":
            model = OriginalLlavaForConditionalGeneration.from_pretrained(checkpoint, dtype="float32")
        else:
            model = OVModelForLlava.from_pretrained(bundle, ov_config={**EXACT, "ATTENTION_BACKEND": kind})
            assert model.attention_backend == kind
        case = MISTRAL.cases["text_only"]
        inputs = AutoProcessor.from_pretrained(bundle)(text=case["prompt"], return_tensors="pt")
        assert inputs["input_ids"][0].tolist() == case["input_ids"]
        with torch.no_grad():
            logits = model(**inputs).logits[0, :, :-1].numpy()
        assert np.abs(logits - MISTRAL.arrays["text_only/logits"]).max() < 5e-4
        output = model.generate(**inputs, **{**GREEDY, "max_new_tokens": 32})
        assert output[0, inputs["input_ids"].shape[1] :].tolist() == case["greedy"]

    def test_the_tower_is_that_of_the_checkpoint(self, checkpoint, tmp_path):
        """`unfreeze_mm_vision_tower`: its weights are in the checkpoint, and differ from those of the repository."""
        pixel_values = torch.from_numpy(VICUNA.pixel_values("img2_224x224"))
        inside = OriginalLlavaForConditionalGeneration.from_pretrained(checkpoint, dtype="float32")
        folder = shutil.copytree(checkpoint.parent, tmp_path / "copy")
        config = folder / "checkpoint" / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "unfreeze_mm_vision_tower": False}))
        outside = OriginalLlavaForConditionalGeneration.from_pretrained(folder / "checkpoint", dtype="float32")
        difference = inside.get_image_features(pixel_values) - outside.get_image_features(pixel_values)
        assert difference.abs().max() > 0.1

    def test_a_tower_that_is_missing(self, checkpoint, tmp_path):
        folder = shutil.copytree(checkpoint.parent, tmp_path / "copy") / "checkpoint"
        index = folder / "model.safetensors.index.json"
        values = json.loads(index.read_text())
        values["weight_map"] = {
            name: file for name, file in values["weight_map"].items() if "vision_tower" not in name
        }
        index.write_text(json.dumps(values))
        for shard in folder.glob("*.safetensors"):  # found before weights are read
            shard.unlink()
        with pytest.raises(InvalidCheckpointError, match="the trained vision tower is missing"):
            OriginalCheckpoint.open(folder)


class TestTables:
    """Embedding tables and heads that have more or fewer rows than the tokenizer."""

    def tensors(self, **changes):
        checkpoint = OriginalCheckpoint.open(VICUNA.checkpoint)
        tensors = {name: tensor.clone() for name, tensor in checkpoint.tensors().items()}
        return {**tensors, **changes}

    def write(self, folder, tensors, **options):
        folder = shutil.copytree(VICUNA.folder, folder)
        for file in folder.glob("checkpoint/*.bin*"):
            file.unlink()
        save_file(tensors, folder / "checkpoint" / "model.safetensors")
        config = folder / "checkpoint" / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), **options}))
        return folder / "checkpoint"

    def logits(self, checkpoint):
        model = OriginalLlavaForConditionalGeneration.from_pretrained(checkpoint, dtype="float32")
        with torch.no_grad():
            return model(torch.tensor([VICUNA.cases["text_only"]["input_ids"]])).logits[0].numpy()

    def test_padding_is_cut(self, tmp_path):
        tensors = self.tensors()
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = torch.cat([tensors[name], torch.full((8, 64), 9.0, dtype=tensors[name].dtype)])
        logits = self.logits(self.write(tmp_path / "padded", tensors, vocab_size=608))
        assert logits.shape[-1] == 601  # with <image>
        assert np.abs(logits[:, :-1] - VICUNA.arrays["text_only/logits"]).max() < 5e-4

    def test_im_patch_without_an_embedding_is_never_chosen(self, tmp_path):
        """The original adds it by default, with a random embedding that no prompt uses."""
        logits = self.logits(self.write(tmp_path / "patch", self.tensors(), mm_use_im_patch_token=None))
        assert logits.shape[-1] == 602
        assert np.abs(logits[:, :-2] - VICUNA.arrays["text_only/logits"]).max() < 5e-4
        assert (logits[:, -2:] < -30_000).all()

    def test_borders_without_an_embedding_are_refused(self, tmp_path):
        folder = self.write(tmp_path / "borders", self.tensors(), mm_use_im_start_end=True)
        with pytest.raises(InvalidCheckpointError, match="has 602 tokens, the model only 600"):
            OriginalCheckpoint.open(folder)

    def test_a_tied_head(self, tmp_path):
        tensors = self.tensors()
        tensors["model.embed_tokens.weight"] = tensors["lm_head.weight"].clone()
        untied = self.logits(self.write(tmp_path / "untied", tensors))
        del tensors["lm_head.weight"]
        tied = self.logits(self.write(tmp_path / "tied", tensors, tie_word_embeddings=True))
        assert np.array_equal(tied, untied)

    def test_a_missing_head_is_named(self, tmp_path):
        tensors = self.tensors()
        del tensors["lm_head.weight"]
        with pytest.raises(InvalidCheckpointError, match=r"missing: language_model\.lm_head\.weight"):
            self.logits(self.write(tmp_path / "headless", tensors))

    def test_a_missing_table_is_named(self, tmp_path):
        """Also if the head is tied to it."""
        tensors = self.tensors()
        del tensors["model.embed_tokens.weight"]
        folder = self.write(tmp_path / "tied", tensors, tie_word_embeddings=True)
        with pytest.raises(InvalidCheckpointError, match=r"missing: embed_tokens\.weight"):
            self.logits(folder)

    def test_linear_scaling_of_positions(self, tmp_path):
        """Positions are divided by the factor: those of every second token are then the old ones."""
        from optimum_llava_ov.checkpoint.families.llama import LlavaLlamaConfig
        from optimum_llava_ov.models.language import build_language_model

        values = json.loads((VICUNA.checkpoint / "config.json").read_text())
        torch.manual_seed(0)
        plain, scaled = (
            build_language_model(LlavaLlamaConfig.from_dict({**values, "rope_scaling": scaling}).text_config).eval()
            for scaling in (None, {"type": "linear", "factor": 2.0})
        )
        scaled.load_state_dict(plain.state_dict())
        embeds, mask = torch.randn(1, 9, 64), torch.ones(1, 9, dtype=torch.long)
        with torch.no_grad():
            expected = plain(embeds, mask, position_ids=torch.arange(9)[None]).logits
            found = scaled(embeds, mask, position_ids=2 * torch.arange(9)[None]).logits
        assert torch.allclose(found, expected, atol=1e-5)


@by_new_family
class TestGenerate:
    def inputs(self, golden, processors, case):
        prompt = golden.cases[case]["prompt"].replace("<im_start><image><im_end>", "<image>")
        return processors[golden.name](text=prompt, images=golden.images(case), return_tensors="pt")

    def answer(self, model, inputs, **options):
        output = model.generate(**inputs, **{**GREEDY, **options})
        return output[:, inputs["input_ids"].shape[1] :].tolist()

    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("backend", ["PA", "SDPA"])
    def test_batches_of_different_prompts(self, golden, bundles, models, processors, side, backend):
        model = models[golden.name]
        if backend == "SDPA":
            options = {**EXACT, "ATTENTION_BACKEND": backend}
            model = OVModelForLlava.from_pretrained(bundles[golden.name], ov_config=options)
        cases = ["image_start", "text_only", "multi_turn_two_images", "image_end"]
        rows = [self.inputs(golden, processors, case) for case in cases]
        length = max(row["input_ids"].shape[1] for row in rows)
        ids, mask = torch.zeros(4, length, dtype=torch.long), torch.zeros(4, length, dtype=torch.long)
        for index, row in enumerate(rows):
            count = row["input_ids"].shape[1]
            place = slice(length - count, None) if side == "left" else slice(count)
            ids[index, place], mask[index, place] = row["input_ids"][0], 1
        pixel_values = torch.cat([row["pixel_values"] for row in rows if "pixel_values" in row])
        output = model.generate(input_ids=ids, attention_mask=mask, pixel_values=pixel_values, **GREEDY)
        expected = [self.answer(model, row)[0] for row in rows]
        assert output[:, length:].tolist() == expected

    def test_beams_and_prompt_lookup(self, golden, models, torch_models, processors):
        inputs = self.inputs(golden, processors, "image_start")
        for options in ({"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}):
            ours, reference = (
                self.answer(model[golden.name], inputs, eos_token_id=2, **options) for model in (models, torch_models)
            )
            assert ours == reference
        plain = self.answer(models[golden.name], inputs, eos_token_id=2)
        assert self.answer(models[golden.name], inputs, eos_token_id=2, prompt_lookup_num_tokens=3) == plain

    def test_a_session_continues_its_cache(self, golden, models, processors):
        model, processor = models[golden.name], processors[golden.name]
        image = golden.image("img2_224x224")
        chat = model.chat(processor, max_new_tokens=8)
        first = chat.send("What is this?", images=[image]).result()
        second = chat.send("And what else?").result()
        messages = [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]},
            {"role": "assistant", "content": first},
            {"role": "user", "content": "And what else?"},
        ]
        prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
        inputs = processor(text=prompt, images=[image], return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=8)
        text = processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert second == text.strip() or second == text

    def test_bos_exactly_once(self, golden, bundles, processors):
        import openvino_genai

        processor = processors[golden.name]
        prompt = processor.apply_chat_template([{"role": "user", "content": "Hello"}], add_generation_prompt=True)
        ids = processor(text=prompt)["input_ids"][0]
        assert ids.count(1) == 1
        encoded = openvino_genai.Tokenizer(bundles[golden.name]).encode(prompt, add_special_tokens=False)
        assert encoded.input_ids.data[0].tolist() == ids

    def test_which_class(self, golden, bundles):
        from optimum.intel import OVModelForVisualCausalLM

        assert type(OVModelForVisualCausalLM.from_pretrained(bundles[golden.name], compile=False)) is OVModelForLlava
        with pytest.raises(BundleError, match=r"'llama' language model, expected 'mpt'.*OVModelForLlava"):
            OVModelForLlavaMPT.from_pretrained(bundles[golden.name])

    def test_the_auto_classes_take_checkpoints_with_a_type_of_their_own(self, golden):
        config = json.loads((golden.checkpoint / "config.json").read_text())
        if config["model_type"] == "llava":  # transformers takes it for its own
            assert isinstance(AutoConfig.from_pretrained(golden.checkpoint), LlavaConfig)
        else:
            assert isinstance(AutoProcessor.from_pretrained(golden.checkpoint), LlavaProcessor)


@pytest.mark.slow
class TestConversation:
    def export(self, tmp_path, *options):
        output = tmp_path / "bundle"
        result = run("optimum-cli", "export", "openvino", "--model", VICUNA.checkpoint, output, *options, check=False)
        return output, result

    def test_chosen_by_name_with_a_stop_string(self, tmp_path):
        output, result = self.export(tmp_path, "--model-kwargs", '{"conversation": "llava_v0"}')
        assert "Conversation: llava_v0. It was chosen by name." in result.stderr
        generation = json.loads((output / "generation_config.json").read_text())
        assert (generation["eos_token_id"], generation["stop_strings"]) == ([2], ["###"])
        processor = AutoProcessor.from_pretrained(output)
        prompt = processor.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True)
        assert prompt.endswith("###Human: Hi###Assistant:")
        model = OVModelForLlava.from_pretrained(output, ov_config=EXACT)
        inputs = processor(text=prompt, return_tensors="pt")
        assert len(model.generate(**inputs, max_new_tokens=4)[0]) <= inputs["input_ids"].shape[1] + 4
        assert "###" not in model.chat(processor, max_new_tokens=4).send("Hi").result()

    def test_a_name_that_does_not_exist(self, tmp_path):
        output, result = self.export(tmp_path, "--model-kwargs", '{"conversation": "vicuna"}')
        assert result.returncode == 1
        assert "The conversation 'vicuna' does not exist. Expected one of: vicuna_v1," in result.stderr
        assert "Traceback" not in result.stderr
        assert not output.exists()


@pytest.mark.slow
class TestBundlesOfOthers:
    """A LLaVA in transformers' format, exported by Optimum alone, runs in our class with the same tokens."""

    @pytest.fixture(scope="class")
    @classmethod
    def model(cls):
        checkpoint = OriginalCheckpoint.open(VICUNA.checkpoint)
        text_config = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2}
        text_config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 640}
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(
            LlavaConfig(
                text_config=text_config,
                vision_config=checkpoint.config.vision_config.to_dict(),
                image_token_index=checkpoint.config.image_token_id,
                image_seq_length=16,
            )
        ).eval()
        for weight in model.parameters():
            if weight.ndim > 1:
                torch.nn.init.normal_(weight, 0, 0.1)
        return model

    @pytest.fixture(scope="class")
    @classmethod
    def bundle(cls, model, tmp_path_factory):
        folder = tmp_path_factory.mktemp("others")
        checkpoint = OriginalCheckpoint.open(VICUNA.checkpoint)
        model.save_pretrained(folder / "model")
        LlavaProcessor(
            image_processor=CLIPImageProcessorPil(**checkpoint.image_processor),
            tokenizer=checkpoint.tokenizer,
            patch_size=checkpoint.config.vision_config.patch_size,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=checkpoint.choice.conversation.chat_template,
        ).save_pretrained(folder / "model")
        command = ["optimum-cli", "export", "openvino", "--model", folder / "model", "--task", "image-text-to-text"]
        run(*command, "--weight-format", "fp32", folder / "bundle")
        assert "special_tokens_map.json" not in files(folder / "bundle")
        return folder / "bundle"

    @pytest.mark.parametrize("backend", ["PA", "SDPA"])
    def test_same_tokens(self, model, bundle, backend):
        ours = OVModelForLlava.from_pretrained(bundle, ov_config={**EXACT, "ATTENTION_BACKEND": backend})
        processor = AutoProcessor.from_pretrained(bundle)
        image = VICUNA.image("img0_300x200")
        for count in (0, 1, 2):
            prompt = f"USER: {count * '<image>'}What is it? ASSISTANT:"
            inputs = processor(text=prompt, images=[image] * count or None, return_tensors="pt")
            expected, found = (each.generate(**inputs, **GREEDY)[0].tolist() for each in (model, ours))
            assert found == expected

    def test_the_hosts_class_stays_the_hosts(self, bundle):
        from optimum.intel import OVModelForVisualCausalLM

        model = OVModelForVisualCausalLM.from_pretrained(bundle, compile=False)
        assert type(model).__module__.startswith("optimum.intel")

    def test_chat(self, bundle):
        model = OVModelForLlava.from_pretrained(bundle, ov_config=EXACT)
        chat = model.chat(AutoProcessor.from_pretrained(bundle), max_new_tokens=4)
        assert isinstance(chat.send("What is this?", images=[VICUNA.image("img0_300x200")]).result(), str)


def test_goldens_of_all_families_are_there():
    assert {golden.name for golden in FAMILIES} <= {folder.name for folder in GOLDEN.iterdir()}


def test_the_hosts_class_takes_a_checkpoint_on_the_hub_whose_type_transformers_has(tmp_path):
    """Its type is "llava", which the host takes for transformers' own format."""
    fill_hub_cache(tmp_path, {"me/llava": LLAMA_2.checkpoint, "me/clip": LLAMA_2.folder / "clip"})
    code = (
        "import optimum_llava_ov; from optimum.intel import OVModelForVisualCausalLM\n"
        "model = OVModelForVisualCausalLM.from_pretrained('me/llava', compile=False)\n"
        "print(type(model).__name__, model.config.converted_from['model'])"
    )
    environment = {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    assert run(sys.executable, "-c", code, env=environment).stdout.split() == ["OVModelForLlava", "me/llava"]
