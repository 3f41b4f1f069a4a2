"""Licenses and notes of known checkpoints."""

import pytest
from conftest import Golden, fill_hub_cache

from optimum_llava_ov.bundle.card import source_license
from optimum_llava_ov.bundle.terms import known_license, notes_about
from optimum_llava_ov.checkpoint.reader import OriginalCheckpoint


@pytest.mark.parametrize(
    ("model_id", "license_id"),
    [
        ("liuhaotian/LLaVA-Lightning-MPT-7B-preview", "cc-by-nc-sa-4.0"),
        ("liuhaotian/llava-v1.5-13b", "llama2"),
        ("liuhaotian/llava-v1.5-7b-lora", "llama2"),
        ("liuhaotian/llava-v1.6-vicuna-7b", "llama2"),
        ("liuhaotian/llava-llama-2-13b-chat-lightning-preview", "llama2"),
        ("Lin-Chen/ShareGPT4V-7B", "llama2"),
        ("liuhaotian/llava-v1-0719-336px-lora-merge-vicuna-13b-v1.3", "other"),
        ("microsoft/llava-med-v1.5-mistral-7b", "apache-2.0"),
        # What others made of it, and folders, may have other terms
        ("somebody/llava-v1.5-7b", None),
        ("llava-v1.5-7b", None),
        ("/home/me/liuhaotian/llava-v1.5-7b", None),
    ],
)
def test_licenses(model_id, license_id):
    assert known_license(model_id) == license_id


@pytest.mark.parametrize(
    ("name", "text_model_type", "found"),
    [
        ("liuhaotian/LLaVA-Lightning-MPT-7B-preview", "mpt", ["MPT-7B-Chat", "OpenAI"]),
        ("liuhaotian/llava-v1.5-7b", "llama", ["Copyright (c) Meta Platforms, Inc.", "OpenAI"]),
        ("llava-v1.5-13b-lora", "llama", ["LLAMA 2 Community License", "OpenAI"]),
        ("sft-vicuna-7b-v1.5", "llama", ["LLAMA 2 Community License", "OpenAI"]),
        ("liuhaotian/llava-llama-2-7b-chat-lightning-lora-preview", "llama", ["LLAMA 2 Community License", "OpenAI"]),
        ("liuhaotian/LLaVA-13b-delta-v1-1", "llama", ["non-commercial", "OpenAI"]),
        ("LLaVA-7B-v0", "llama", ["non-commercial", "OpenAI"]),
        ("liuhaotian/llava-v1-0719-336px-lora-merge-vicuna-13b-v1.3", "llama", ["non-commercial", "OpenAI"]),
        ("liuhaotian/llava-v1.6-34b", "llama", ["Nous-Hermes-2-Yi-34B", "OpenAI"]),
        ("my-model", "llama", ["Find out which"]),
        ("microsoft/llava-med-v1.5-mistral-7b", "mistral", ["not for clinical care", "Apache-2.0", "OpenAI"]),
        ("SkunkworksAI/BakLLaVA-1", "mistral", ["Apache-2.0", "OpenAI"]),
        ("my-model", "mistral", []),
        ("my-model", "mpt", []),
    ],
)
def test_notes(name, text_model_type, found):
    notes = notes_about(name, text_model_type)
    assert len(notes) == len(found)
    for note, words in zip(notes, found):
        assert words in note


@pytest.mark.parametrize(
    ("card", "license_id"),
    [(None, "llama2"), ("---\ninference: false\n---\n# LLaVA\n", "llama2"), ("---\nlicense: mit\n---\n", "mit")],
)
def test_the_checkpoints_own_card_comes_first(tmp_path, card, license_id):
    golden, name = Golden("llava15_vicuna"), "liuhaotian/llava-v1.5-7b"
    fill_hub_cache(tmp_path, {name: golden.checkpoint, "openai/clip-vit-large-patch14-336": golden.folder / "clip"})
    if card is not None:
        (next(tmp_path.glob("*llava-v1.5-7b/snapshots/*")) / "README.md").write_text(card)
    checkpoint = OriginalCheckpoint.open(name, cache_dir=tmp_path, local_files_only=True)
    assert source_license(checkpoint) == license_id
