"""The model card: what it says, that it is true, and that what users write into it stays."""

import json
import logging
import re
import shlex
import shutil
import textwrap
from pathlib import Path

import pytest
import yaml
from conftest import EXACT, EXAMPLES, Golden, run
from optimum.intel import OVConfig, OVPipelineQuantizationConfig, OVWeightQuantizationConfig
from PIL import Image

from optimum_llava_ov import OVModelForLlavaMPT, main_export
from optimum_llava_ov.bundle.card import add_tags, card_text, is_untouched, update_card, with_metadata
from optimum_llava_ov.bundle.layout import check_bundle


pytestmark = pytest.mark.slow


GOLDEN, VICUNA = Golden("linear_fp16_sharded"), Golden("llava15_vicuna")
QUESTION = [{"type": "image"}, {"type": "text", "text": "What colour is the circle?"}]
# With an option of every kind
RECIPE = {"bits": 4, "sym": True, "group_size": 16, "ratio": 0.6, "group_size_fallback": "adjust", "all_layers": True}


class Messages(logging.Handler):
    def __init__(self):
        super().__init__()
        self.texts = []

    def emit(self, record):
        self.texts.append(record.getMessage())


@pytest.fixture(scope="module")
def compressed(tmp_path_factory):
    """A compressed bundle, and what NNCF said meanwhile."""
    bundle, messages, logger = tmp_path_factory.mktemp("card") / "int4", Messages(), logging.getLogger("nncf")
    logger.addHandler(messages)
    main_export(
        GOLDEN.checkpoint, bundle, ov_config=OVConfig(quantization_config=OVWeightQuantizationConfig(**RECIPE))
    )
    logger.removeHandler(messages)
    return bundle, messages.texts


@pytest.fixture
def bundle(compressed, tmp_path):
    return shutil.copytree(compressed[0], tmp_path / "int4")


def metadata_of(card: str) -> dict:
    return yaml.safe_load(card.split("---")[1])


def evaluate(bundle: Path) -> None:
    """What `optimum-cli llava-ov eval` leaves in a bundle."""
    values = {
        "kl_mean": 0.0123456,
        "kl_p95": 0.1,
        "top1_agreement": 0.97,
        "identical": 0.75,
        "first_divergence": 12.5,
        "size": {"total": 1},
    }
    values |= {"accuracy": 0.9, "reference_accuracy": 0.95, "num_samples": 64, "num_tokens": 1234}
    values["settings"] = {
        "reference": "checkpoint",
        "dataset": "coloured shapes (built in)",
        "versions": {"openvino": "2026.4.1"},
    }
    (bundle / "eval.json").write_text(json.dumps(values))
    (bundle / "eval.png").write_bytes(b"png")


class TestContent:
    def test_metadata(self, bundle):
        values = metadata_of((bundle / "README.md").read_text())
        assert values == {
            "library_name": "openvino",
            "license": "unknown",  # a folder, without a card
            "pipeline_tag": "image-text-to-text",
            "tags": ["openvino", "llava", "llava-mpt", "nncf", "int4"],
        }

    def test_license_of_the_export(self, tmp_path):
        """By an option, as the checkpoint names none. What is not an id is refused before the export begins."""
        with pytest.raises(ValueError, match="Expected an id of the Hub"):
            main_export(GOLDEN.checkpoint, tmp_path / "out", model_kwargs={"license": "MIT License"})
        main_export(GOLDEN.checkpoint, tmp_path / "out", model_kwargs={"license": "mit"})
        assert metadata_of((tmp_path / "out" / "README.md").read_text())["license"] == "mit"

    def test_base_model_of_the_user(self, bundle):
        card = (bundle / "README.md").read_text()
        values = metadata_of(card_text(bundle, previous=with_metadata(card, base_model="me/trained")))
        assert (values["base_model"], values["base_model_relation"]) == ("me/trained", "quantized")

    def test_relation_to_the_base_model(self, bundle):
        config = json.loads((bundle / "config.json").read_text())
        config["converted_from"] |= {"model": "liuhaotian/LLaVA-Lightning-MPT-7B-preview", "revision": "0" * 40}
        (bundle / "config.json").write_text(json.dumps(config))
        card = card_text(bundle, "cc-by-nc-sa-4.0")
        values = metadata_of(card)
        assert values["base_model"] == "liuhaotian/LLaVA-Lightning-MPT-7B-preview"
        assert values["base_model_relation"] == "quantized"
        assert "MPT-7B-Chat" in card
        assert "**no commercial use**" in card

    def test_table_is_nncfs(self, compressed):
        """Share and number of layers for each precision, as NNCF logs them while it compresses."""
        bundle, texts = compressed
        cell = r"\s*│\s*(int\S+, [\w\- ]+?)\s*│\s*(\d+)% \((\d+) / (\d+)\)"
        logged = [set(re.findall(cell, text)) for text in texts if "bitwidth distribution" in text]
        assert len(logged) == 3
        table = (bundle / "README.md").read_text().split("counted as NNCF counts them")[1].split("<!--")[0]
        rows = {
            (mode, share, layers, of)
            for mode, share, layers, of in re.findall(r"\| (int[^|]+) \| (\d+) % \((\d+) / (\d+)\)", table)
        }
        assert rows == set.union(*logged)

    def test_exact_parameters(self, bundle):
        card = (bundle / "README.md").read_text()
        for name, value in {
            "sym": True,
            "group_size": 16,
            "ratio": 0.6,
            "group_size_fallback": "adjust",
            "all_layers": True,
        }.items():
            assert f"{name}: **{value}**" in card

    def test_quality(self, bundle):
        assert "## Quality" not in (bundle / "README.md").read_text()
        evaluate(bundle)
        card = card_text(bundle, previous=(bundle / "README.md").read_text())
        assert "The model and its reference were asked 64 questions. 48 answers are the same, word for word." in card
        assert "90.0% of the model's answers are exactly right, and 95.0% of the reference's." in card
        assert "| same most likely token | 97.0% |" in card
        assert "![Quality against size](eval.png)" in card
        results = metadata_of(card)["model-index"][0]["results"][0]
        assert results["dataset"]["name"] == "coloured shapes (built in)"
        metrics = {metric["type"]: metric["value"] for metric in results["metrics"]}
        assert metrics == {
            "kl_divergence": 0.012346,
            "top1_agreement": 0.97,
            "identical_answers": 0.75,
            "accuracy": 0.9,
        }

    def test_order(self, bundle):
        """What it is and how to run it come before how it was made."""
        titles = re.findall(
            r"^##? (.+)$", re.sub(r"```.*?```", "", (bundle / "README.md").read_text(), flags=re.DOTALL), re.MULTILINE
        )
        assert titles == [
            "LLaVA-MPT, int4, for OpenVINO",
            "Run it",
            "Quantization",
            "Compatibility",
            "How it was made",
            "Limitations",
            "Legal",
        ]

    @pytest.mark.parametrize(
        ("source", "base_model", "title"),
        [
            ("llava-v1.5-7b", None, "llava-v1.5-7b, int4, for OpenVINO"),
            ("checkpoint", "me/LLaVA-mine", "LLaVA-mine, int4, for OpenVINO"),
            ("checkpoint", "me/mine", "mine, int4, for OpenVINO"),
        ],
    )
    def test_name(self, bundle, source, base_model, title):
        config = json.loads((bundle / "config.json").read_text())
        config["converted_from"]["model"] = source
        (bundle / "config.json").write_text(json.dumps(config))
        card = with_metadata((bundle / "README.md").read_text(), base_model=base_model)
        card = card_text(bundle, previous=card)
        assert f"\n# {title}\n" in card
        assert f"It is [{base_model}](https://huggingface.co/{base_model}) with" in card or base_model is None

    def test_only_what_was_tried_is_claimed(self, bundle):
        card = (bundle / "README.md").read_text()
        assert "GPUs\nand NPUs were not tried." in card
        assert "on CPUs and GPUs" not in card

    def test_example(self, bundle):
        """Few bytes, and the same in every bundle."""
        assert (bundle / "example.png").stat().st_size < 4000
        with Image.open(bundle / "example.png") as image:
            assert image.size == (224, 224)
            assert len(image.getcolors(1 << 16)) > 4

    def test_bundles_without_an_example_are_complete(self, bundle):
        (bundle / "example.png").unlink()
        check_bundle(bundle)

    def test_quality_is_saved_along(self, bundle, tmp_path):
        evaluate(bundle)
        update_card(bundle)
        OVModelForLlavaMPT.from_pretrained(bundle, compile=False).save_pretrained(tmp_path / "saved")
        assert {file.name: file.read_bytes() for file in (tmp_path / "saved").iterdir()} == {
            file.name: file.read_bytes() for file in bundle.iterdir()
        }

    def test_no_paths(self, bundle):
        assert str(EXAMPLES.parent) not in (bundle / "README.md").read_text()

    def test_compressing_what_was_loaded_writes_it_down(self, bundles, tmp_path):
        recipe = OVPipelineQuantizationConfig({"lm_model": OVWeightQuantizationConfig(bits=8, sym=True)})
        model = OVModelForLlavaMPT.from_pretrained(bundles[GOLDEN.name], quantization_config=recipe, compile=False)
        model.save_pretrained(tmp_path / "int8")
        card = (tmp_path / "int8" / "README.md").read_text()
        assert metadata_of(card)["tags"] == ["openvino", "llava", "llava-mpt", "nncf", "int8"]
        assert "int8_sym, per-channel" in card


class TestFamilies:
    """What the card says of a bundle is true of its family: by a LLaVA-1.5, whose images are padded."""

    @pytest.fixture
    def card(self, bundles):
        return (bundles[VICUNA.name] / "README.md").read_text()

    def test_words(self, card, bundles):
        assert "# LLaVA-LLaMA, fp16, for OpenVINO\n" in card  # the name of the folder says nothing
        assert "with\na LLaMA language model, converted" in card
        assert "with\nan MPT language model, converted" in (bundles[GOLDEN.name] / "README.md").read_text()
        assert "# LLaVA-MPT, fp16, for OpenVINO\n" in (bundles[GOLDEN.name] / "README.md").read_text()
        assert "mpt" not in card.lower().replace("prompt", "")
        assert metadata_of(card)["tags"] == ["openvino", "llava", "llava-llama", "fp16"]
        assert "--model_name llava-llama --model_path /models/llava-llama" in card
        assert "--local-dir models/llava-llama" in card
        assert "Find out which." in card  # of the licenses of LLaMA, for a checkpoint that is not known

    def test_the_command_names_the_conversation(self, card, bundles):
        """In a folder of another name, another one could be chosen."""
        assert """--model checkpoint --model-kwargs '{"conversation": "vicuna_v1"}' checkpoint-ov\n""" in card
        assert "--model-kwargs" not in (bundles[GOLDEN.name] / "README.md").read_text()

    def test_the_command_names_a_vision_tower_that_was_chosen(self, bundles, tmp_path):
        """Else the command does not find it, or finds another one."""
        golden = VICUNA.folder
        (tmp_path / "checkpoint").symlink_to(golden / "checkpoint")
        shutil.copytree(golden / "clip", tmp_path / "tower")
        main_export(tmp_path / "checkpoint", tmp_path / "ov", model_kwargs={"vision_tower": str(tmp_path / "tower")})
        card = (tmp_path / "ov" / "README.md").read_text()
        assert """--model-kwargs '{"vision_tower": "tower", "conversation": "vicuna_v1"}'""" in card

    def test_prompt(self, card, processors):
        assert "the conversation `vicuna_v1` of LLaVA" in card
        messages = [{"role": "user", "content": QUESTION}]
        prompt = processors[VICUNA.name].apply_chat_template(messages, add_generation_prompt=True)
        assert textwrap.indent(prompt, "    ") in card

    def test_a_tower_of_its_own(self, bundles, tmp_path):
        bundle = shutil.copytree(bundles[VICUNA.name], tmp_path / "own")
        config = json.loads((bundle / "config.json").read_text())
        assert config["converted_from"]["unfreeze_mm_vision_tower"] is False
        assert "trained further" not in (bundle / "README.md").read_text()
        config["converted_from"]["unfreeze_mm_vision_tower"] = True
        (bundle / "config.json").write_text(json.dumps(config))
        assert "| vision tower | `clip`, trained further with the model |" in card_text(bundle, "unknown")

    def test_padding_in_genai(self, card, bundles, models, processors, tmp_path, monkeypatch, capsys):
        """The snippet gives the tokens of our class for an image that is not square. It needs its padding."""
        model, processor = models[VICUNA.name], processors[VICUNA.name]
        question = [{"type": "image"}, {"type": "text", "text": "What is in this picture?"}]
        prompt = processor.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)
        inputs = processor(images=VICUNA.image("img0_300x200"), text=prompt, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=24)
        expected = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

        code = next(code for code in re.findall(r"```python\n(.*?)```", card, re.DOTALL) if "openvino_genai" in code)
        assert 'Image.new("RGB", (side, side), (122, 116, 104))' in code
        code = code.replace('snapshot_download("<this model>")', repr(str(bundles[VICUNA.name])))
        code = code.replace('folder, "CPU"', f'folder, "CPU", **{EXACT}')
        code = code.replace("max_new_tokens=200", "max_new_tokens=24")
        monkeypatch.chdir(tmp_path)
        code = code.replace('f"{folder}/example.png"', '"picture.png"').replace(
            QUESTION[1]["text"], question[1]["text"]
        )
        VICUNA.image("img0_300x200").save("picture.png")
        exec(code, {})
        padded = capsys.readouterr().out
        assert padded.strip() == expected.strip()
        exec(code.replace("pad_to_square(Image.open", "(Image.open"), {})
        assert capsys.readouterr().out != padded

    def test_nothing_about_padding_for_others(self, bundles):
        assert "pad_to_square" not in (bundles[GOLDEN.name] / "README.md").read_text()

    def test_stop_strings(self, card, bundles, tmp_path):
        """Optimum's class needs the tokenizer to find them."""
        assert "tokenizer=" not in card
        bundle = shutil.copytree(bundles[VICUNA.name], tmp_path / "stops")
        generation = json.loads((bundle / "generation_config.json").read_text())
        (bundle / "generation_config.json").write_text(json.dumps({**generation, "stop_strings": ["###"]}))
        stock = card_text(bundle, "unknown").split("With optimum-intel alone")[1].split("With [OpenVINO GenAI]")[0]
        assert "model.generate(**inputs, max_new_tokens=200, tokenizer=processor.tokenizer)" in stock


class TestReproduction:
    def test_command(self, bundle, tmp_path):
        command = re.search(r"```bash\n(optimum-cli export .*)\n```", (bundle / "README.md").read_text())[1]
        words = shlex.split(command)
        assert words[4:6] == ["checkpoint", "--weight-format"]
        words[4], words[-1] = GOLDEN.checkpoint, tmp_path / "again"
        run(*words)
        self.assert_same(bundle, tmp_path / "again")

    def test_python(self, tmp_path):
        """A recipe that no command line can say."""
        parts = {"lm_model": {"bits": 4, "group_size": 16}, "vision_embeddings_model": {"bits": 8, "sym": False}}
        recipe = OVPipelineQuantizationConfig(
            {part: OVWeightQuantizationConfig(**config) for part, config in parts.items()}
        )
        main_export(GOLDEN.checkpoint, tmp_path / "mixed", ov_config=OVConfig(quantization_config=recipe))
        card = (tmp_path / "mixed" / "README.md").read_text()
        code = next(code for code in re.findall(r"```python\n(.*?)\n```", card, re.DOTALL) if "main_export" in code)
        code = code.replace('"checkpoint"', repr(str(GOLDEN.checkpoint))).replace(
            '"checkpoint-ov"', repr(str(tmp_path / "again"))
        )
        exec(code, {})
        self.assert_same(tmp_path / "mixed", tmp_path / "again")

    def assert_same(self, bundle, again):
        for file in bundle.glob("*.bin"):
            assert file.read_bytes() == (again / file.name).read_bytes(), file.name


class TestEdits:
    """Whatever the user changed stays, whatever the user did not change is kept up to date."""

    def again(self, bundle: Path, model_id: str | None = None) -> str:
        return card_text(bundle, "unknown", (bundle / "README.md").read_text(), model_id)

    def edit(self, bundle: Path, old: str, new: str) -> None:
        card = (bundle / "README.md").read_text()
        assert card.count(old) == 1
        (bundle / "README.md").write_text(card.replace(old, new))

    def test_unchanged(self, bundle):
        card = (bundle / "README.md").read_text()
        assert self.again(bundle) == card
        assert is_untouched(bundle, card)

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            ("## Legal\n", "## My own words\n\nHello.\n\n## Legal\n"),
            ("Do not let\n  it decide about people.", "Be kind."),
            ("## How it was made", "## How I made it"),
            ("tags:\n", "thumbnail: https://example.com/a.png\ntags:\n"),
            ("- llava-mpt\n", "- llava-mpt\n- shapes\n"),
            ("library_name: openvino\n", ""),
        ],
    )
    def test_stays(self, bundle, old, new):
        self.edit(bundle, old, new)
        edited = (bundle / "README.md").read_text()
        assert not is_untouched(bundle, edited)
        again = self.again(bundle)
        assert metadata_of(again) == metadata_of(edited) or sorted(metadata_of(again)["tags"]) == sorted(
            metadata_of(edited)["tags"]
        )
        assert again.split("---", 2)[2] == edited.split("---", 2)[2]

    def test_license(self, bundle):
        """Also in the section about it."""
        self.edit(bundle, "license: unknown", "license: mit")
        assert not is_untouched(bundle, (bundle / "README.md").read_text())
        for _ in range(2):
            (bundle / "README.md").write_text(self.again(bundle))
            assert metadata_of((bundle / "README.md").read_text())["license"] == "mit"
            assert "License: **mit**" in (bundle / "README.md").read_text()

    def test_text_between_sections_and_removed_sections(self, bundle):
        card = (bundle / "README.md").read_text()
        card = re.sub(
            r"<!-- optimum-llava-ov: limitations.*?/optimum-llava-ov: limitations -->\n",
            "My limits.\n",
            card,
            flags=re.DOTALL,
        )
        (bundle / "README.md").write_text(card)
        evaluate(bundle)
        again = self.again(bundle)
        assert "My limits." in again
        assert "## Limitations" not in again
        assert "## Quality" in again  # what was not touched is up to date

    def test_users_own_card(self, bundle):
        (bundle / "README.md").write_text(
            "---\nlicense: mit\nmodel-index: []\n---\n# Mine\n\nAll of it. `<this model>`\n"
        )
        again = self.again(bundle, "me/mine")
        assert "# Mine\n\nAll of it. `me/mine`\n" in again
        assert metadata_of(again)["license"] == "mit"
        assert metadata_of(again)["library_name"] == "openvino"
        assert "## Legal" not in again

    def test_name(self, bundle):
        self.edit(bundle, "## Run it\n", "## Run it yourself\n")
        once = self.again(bundle, "me/once")
        assert "<this model>" not in once
        assert 'from_pretrained("me/once")' in once
        assert card_text(bundle, None, once) == once

    def test_moving_to_another_name(self, bundle):
        once = self.again(bundle, "me/once")
        assert card_text(bundle, None, once, "me/twice") == self.again(bundle, "me/twice")

    def test_real_export(self, bundle):
        """Re-exported with another precision: the user's text stays, precision and tables are new."""
        self.edit(bundle, "## Legal\n", "## My own words\n\nHello.\n\n## Legal\n")
        self.edit(bundle, "- llava-mpt\n", "- llava-mpt\n- shapes\n")
        main_export(GOLDEN.checkpoint, bundle)
        card = (bundle / "README.md").read_text()
        assert "## My own words\n\nHello." in card
        assert metadata_of(card)["tags"] == ["openvino", "llava", "llava-mpt", "fp16", "shapes"]
        assert "int4" not in card

    def test_metadata_that_is_no_yaml(self, bundle):
        from optimum_llava_ov import BundleError

        (bundle / "README.md").write_text("---\n: [\n---\n# Hello\n")
        with pytest.raises(BundleError, match="is not YAML. Correct it, or delete the file"):
            main_export(GOLDEN.checkpoint, bundle)
        assert "# Hello" in (bundle / "README.md").read_text()

    def test_tags(self, bundle):
        card = add_tags((bundle / "README.md").read_text(), ["demo"])
        assert metadata_of(card)["tags"][-1] == "demo"
