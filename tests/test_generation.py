"""`generate` as transformers users expect it."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import EXACT, Golden
from optimum.intel import OVModelForVisualCausalLM
from transformers import TextIteratorStreamer, TextStreamer, pipeline

from optimum_llava_ov import BundleError, OVModelForLlavaMPT


GOLDEN = Golden("linear_fp16_sharded")
GREEDY = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 16}
ROWS = {
    "two_images": ["img0_300x200", "img2_224x224"],
    "text_only": [],
    "image_start": ["img1_64x480"],
    "short": [],
}


def prompt_of(row):
    if row == "short":
        return "<|im_start|>user\nHi<|im_end|><|im_start|>assistant\n"
    return GOLDEN.cases[row]["prompt"].replace("<im_start><image><im_end>", "<image>")


@pytest.fixture(scope="module")
def model(models):
    return models[GOLDEN.name]


@pytest.fixture(scope="module")
def processor(processors):
    return processors[GOLDEN.name]


@pytest.fixture(scope="module")
def inputs_of(processor):
    def prepare(*rows, **kwargs):
        images = [GOLDEN.image(name) for row in rows for name in ROWS[row]]
        return processor(
            text=[prompt_of(row) for row in rows], images=images or None, return_tensors="pt", padding=True, **kwargs
        )

    return prepare


def new_tokens(model, inputs, **kwargs):
    output = model.generate(**inputs, **{**GREEDY, **kwargs})
    return output[:, inputs["input_ids"].shape[1] :].tolist()


def test_batch_of_mixed_rows_equals_the_rows_alone(model, inputs_of):
    alone = [new_tokens(model, inputs_of(row))[0] for row in ROWS]
    assert len({tuple(tokens) for tokens in alone}) == len(ROWS)
    assert new_tokens(model, inputs_of(*ROWS)) == alone


def test_right_padding_gives_the_same_answers(model, inputs_of):
    assert new_tokens(model, inputs_of(*ROWS, padding_side="right")) == new_tokens(model, inputs_of(*ROWS))


def test_torch_model_in_batches(model, torch_models, inputs_of):
    assert new_tokens(torch_models[GOLDEN.name], inputs_of(*ROWS)) == new_tokens(model, inputs_of(*ROWS))


@pytest.mark.parametrize("num_beams", [2, 4])
def test_beam_search_equals_torch(model, torch_models, inputs_of, num_beams):
    inputs = inputs_of("two_images", "text_only")
    expected = new_tokens(torch_models[GOLDEN.name], inputs_of("two_images"), num_beams=num_beams)[0]
    tokens = new_tokens(model, inputs, num_beams=num_beams, num_return_sequences=2)
    assert tokens[0] == expected
    assert tokens[2] == new_tokens(torch_models[GOLDEN.name], inputs_of("text_only"), num_beams=num_beams)[0]


def test_sampling_is_reproducible_and_varied(model, inputs_of):
    inputs, options = (
        inputs_of("image_start"),
        {"do_sample": True, "temperature": 1.0, "top_p": 0.9, "num_return_sequences": 3},
    )
    torch.manual_seed(0)
    first = new_tokens(model, inputs, **options)
    torch.manual_seed(0)
    assert new_tokens(model, inputs, **options) == first
    assert len({tuple(tokens) for tokens in first}) == 3


def test_several_answers_see_several_images(model, inputs_of):
    """Each copy of a row must get the images of the row, in order."""
    inputs = inputs_of("two_images", "image_start")
    alone = new_tokens(model, inputs)
    torch.manual_seed(0)
    sampled = new_tokens(model, inputs, do_sample=True, top_k=1, num_return_sequences=2)
    assert sampled == [alone[0], alone[0], alone[1], alone[1]]


IMAGE_TOKEN = 462
PROCESSORS = {
    "repetition_penalty": {"repetition_penalty": 5.0},
    "a negative penalty": {"repetition_penalty": 0.2},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 2.0},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1},
    "bad_words_ids": {"bad_words_ids": [[IMAGE_TOKEN], [373], [26, 271]]},
    "suppress_tokens": {"suppress_tokens": [373, IMAGE_TOKEN]},
    "sequence_bias": {"sequence_bias": [[[IMAGE_TOKEN], 1000.0], [[9], 5.0]]},
    "guidance_scale": {"guidance_scale": 1.5},
    "negative prompt": {"guidance_scale": 1.5, "negative_prompt_ids": torch.tensor([[5, 6, 7, 8]])},
    "beams": {"num_beams": 3, "repetition_penalty": 1.3},
    "renormalize_logits": {"renormalize_logits": True, "repetition_penalty": 1.3},
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_logits_processors_with_images(model, torch_models, inputs_of, name):
    """They look up the tokens of the prompt in the logits, `<image>` among them."""
    inputs, options = inputs_of("image_start"), PROCESSORS[name]
    tokens = new_tokens(model, inputs, **options)
    assert tokens == new_tokens(torch_models[GOLDEN.name], inputs, **options)
    assert IMAGE_TOKEN not in tokens[0]
    if name in ("repetition_penalty", "no_repeat_ngram_size"):
        assert len(set(tokens[0])) == len(tokens[0])


def test_penalties_of_prompts_of_the_original_code(model, inputs_of):
    """-200 for an image is no index into the logits either."""
    case = GOLDEN.cases["image_start"]
    prompt = torch.tensor([case["input_ids"]])
    pixel_values = inputs_of("image_start")["pixel_values"]
    output = model.generate(prompt, images=pixel_values, **GREEDY, repetition_penalty=5.0)
    assert (
        output[0, prompt.shape[1] :].tolist() == new_tokens(model, inputs_of("image_start"), repetition_penalty=5.0)[0]
    )


@pytest.mark.parametrize(
    "options", [{"top_k": 0}, {"top_k": 0, "typical_p": 0.9}, {"top_k": 0, "top_p": 0.99999}], ids=str
)
def test_sampling_never_chooses_the_image(model, inputs_of, options):
    torch.manual_seed(0)
    options = {"do_sample": True, "temperature": 100.0, "num_return_sequences": 20, "max_new_tokens": 40, **options}
    assert IMAGE_TOKEN not in {
        token for row in new_tokens(model, inputs_of("image_start"), **options) for token in row
    }


class TestPastKeyValues:
    """Of a first call of `generate`, handed to a second one."""

    QUESTION = "<|im_end|><|im_start|>user\nWhy?<|im_end|><|im_start|>assistant\n"

    @pytest.fixture
    def first(self, model, processor, inputs_of):
        """Answer to a question about an image, and the prompt of the next question."""
        inputs = inputs_of("image_start")
        output = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
        question = processor.tokenizer(self.QUESTION, return_tensors="pt")["input_ids"]
        input_ids = torch.cat([output.sequences, question], dim=1)
        return output.past_key_values, {**inputs, "input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}

    def test_only_new_tokens_are_processed(self, model, inputs_of, first, monkeypatch):
        past, inputs = first
        lengths, forward = [], model.language_model.forward
        monkeypatch.setattr(
            model.language_model, "forward", lambda *args: lengths.append(args[0].shape[1]) or forward(*args)
        )
        tokens = new_tokens(model, inputs, past_key_values=past)
        assert lengths[0] == inputs["input_ids"].shape[1] - (inputs_of("image_start")["input_ids"].shape[1] + 15)
        assert tokens == new_tokens(model, inputs)

    def test_a_cache_of_its_own_with_a_new_image(self, model, processor, inputs_of):
        """All images of the conversation may be given, or the new one alone. Calls without the cache do not disturb it."""
        images = [GOLDEN.image("img1_64x480"), GOLDEN.image("img0_300x200")]
        text = GOLDEN.cases["image_start"]["prompt"]
        cache = model.new_cache()
        first = model.generate(**inputs_of("image_start"), **GREEDY, past_key_values=cache)
        question = f"{self.QUESTION[:29]}<image>{self.QUESTION[29:]}"
        second = processor(text=question, images=images[1:], return_tensors="pt")
        inputs = {"input_ids": torch.cat([first, second["input_ids"]], dim=1)}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        all_images = processor(text=text + question, images=images, return_tensors="pt")["pixel_values"]
        expected = model.generate(**inputs, pixel_values=all_images, **GREEDY)
        length = first.shape[1] - 1
        for pixel_values in (all_images, second["pixel_values"]):
            cache.crop(length)
            assert torch.equal(
                model.generate(**inputs, pixel_values=pixel_values, **GREEDY, past_key_values=cache), expected
            )

    def test_of_an_earlier_call(self, model, first):
        past, inputs = first
        model.generate(torch.tensor([[5, 6]]), **GREEDY)
        with pytest.raises(
            ValueError,
            match=r"belong to an earlier prompt, and the model has begun another prompt since.*model\.chat\(\)",
        ):
            model.generate(**inputs, **GREEDY, past_key_values=past)

    def test_of_other_rows(self, model, first):
        past, inputs = first
        with pytest.raises(ValueError, match=r"The cache has 1 sequence\(s\), but new tokens of 3 sequence\(s\)"):
            model.generate(**inputs, **{**GREEDY, "num_beams": 3}, past_key_values=past)

    def test_without_new_tokens(self, model, first):
        past, _ = first
        with pytest.raises(ValueError, match=r"has \d+ tokens, and no new tokens follow: attention_mask has 3"):
            model.generate(torch.tensor([[5, 6, 7]]), **GREEDY, past_key_values=past)


class TestAssistant:
    OPTIONS = {**GREEDY, "eos_token_id": 0}

    def test_of_either_kind(self, bundles, model, torch_models, inputs_of):
        assistant = OVModelForLlavaMPT.from_pretrained(bundles[GOLDEN.name], ov_config=EXACT)
        inputs, reference = inputs_of("image_start"), torch_models[GOLDEN.name]
        expected = new_tokens(model, inputs, **self.OPTIONS)
        for main, other in ((model, assistant), (model, reference), (reference, assistant)):
            assert new_tokens(main, inputs, **self.OPTIONS, assistant_model=other) == expected

    def test_the_model_itself(self, model, inputs_of):
        with pytest.raises(ValueError, match="assistant_model is the model itself, which has one cache"):
            model.generate(**inputs_of("image_start"), **self.OPTIONS, assistant_model=model)


def test_streamers(model, processor, inputs_of, capsys):
    inputs = inputs_of("image_start")
    expected = processor.decode(new_tokens(model, inputs)[0])
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True)
    thread = threading.Thread(target=model.generate, kwargs={**inputs, **GREEDY, "streamer": streamer})
    thread.start()
    assert "".join(streamer) == expected
    thread.join()
    model.generate(**inputs, **GREEDY, streamer=TextStreamer(processor.tokenizer, skip_prompt=True))
    assert capsys.readouterr().out.strip() == expected.strip()


def test_stops_at_the_end_of_the_turn(model, inputs_of):
    assert set(model.generation_config.eos_token_id) == {0, 458}
    inputs = inputs_of("text_only")
    output = model.generate(**inputs, sequence_bias=[[[458], 100.0]], max_new_tokens=4)
    assert output[0, inputs["input_ids"].shape[1] :].tolist() == [458]


def test_scores_and_full_logits(model, inputs_of):
    inputs = inputs_of("image_start")
    output = model.generate(**inputs, **GREEDY, return_dict_in_generate=True, output_scores=True)
    assert len(output.scores) == 16
    logits = model(**inputs).logits
    assert logits.shape[1] == inputs["input_ids"].shape[1]
    assert torch.allclose(output.scores[0][0], logits[0, -1], atol=1e-4)


def test_embeddings_instead_of_ids(model):
    """As training code has them: in bf16, or with gradients."""
    input_ids = torch.tensor([[5, 6, 7, 8]])
    embeds = torch.from_numpy(model.get_text_embeddings(input_ids)).bfloat16().float()
    expected = model(inputs_embeds=embeds).logits
    assert torch.equal(model(inputs_embeds=embeds.bfloat16()).logits, expected)
    assert torch.equal(model(inputs_embeds=embeds.clone().requires_grad_()).logits, expected)
    tokens = model.generate(inputs_embeds=embeds.requires_grad_(), **GREEDY)
    assert torch.equal(tokens, model.generate(inputs_embeds=embeds.detach(), **GREEDY))


def test_threads_take_turns(model, inputs_of):
    rows = ["two_images", "text_only", "image_start", "short"]
    prepared = {row: inputs_of(row) for row in rows}
    expected = {row: new_tokens(model, prepared[row]) for row in rows}
    results = {}

    def work(row):
        results[row] = [new_tokens(model, prepared[row]) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(row,)) for row in rows]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert results == {row: [expected[row]] * 3 for row in rows}


def number_of_torch_threads():
    """That of a thread which begins now."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(torch.get_num_threads).result()


def test_calls_that_overlap_give_torch_its_threads_back(model, processor):
    """Two sessions of one model: the first answer begins first, and ends first."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        events = [(threading.Event(), threading.Event()) for _ in range(2)]

        def wait_in(began, may_end):
            def criterion(input_ids, scores, **kwargs):
                began.set()
                may_end.wait(30)
                return torch.ones(len(input_ids), dtype=torch.bool)

            return criterion

        answers = []
        for began, may_end in events:
            answers.append(model.chat(processor, **GREEDY).send("Hi", stopping_criteria=[wait_in(began, may_end)]))
            assert began.wait(30)
        assert number_of_torch_threads() == 1
        for answer, (_, may_end) in zip(answers, events):
            may_end.set()
            answer.result()
        assert torch.get_num_threads() == number_of_torch_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_a_call_that_fails_gives_torch_its_threads_back(model):
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with pytest.raises(ValueError, match="nonsense"):
            model.generate(torch.tensor([[1]]), nonsense=1)
        assert torch.get_num_threads() == number_of_torch_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_device_config_and_late_compilation(bundles, model, inputs_of):
    inputs = inputs_of("image_start")
    late = OVModelForLlavaMPT.from_pretrained(bundles[GOLDEN.name], device="cpu", ov_config=EXACT, compile=False)
    assert late.language_model.request is None
    expected = new_tokens(model, inputs)
    assert new_tokens(late, inputs) == expected
    late.to("AUTO")
    assert late._device == "AUTO"
    assert new_tokens(late, inputs) == expected


def test_optimum_finds_this_class(bundles):
    model = OVModelForVisualCausalLM.from_pretrained(bundles[GOLDEN.name], compile=False)
    assert type(model) is OVModelForLlavaMPT


def test_transformers_pipeline(model, processor, inputs_of):
    chat = pipeline("image-text-to-text", model=model, processor=processor)
    messages = [
        {
            "role": "user",
            "content": [{"type": "image", "image": GOLDEN.image("img0_300x200")}, {"type": "text", "text": "Hi"}],
        }
    ]
    result = chat(text=messages, generate_kwargs={"max_new_tokens": 8, "do_sample": False}, return_full_text=False)
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(text=prompt, images=[GOLDEN.image("img0_300x200")], return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert result[0]["generated_text"] == processor.decode(
        output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )


@pytest.mark.parametrize(
    ("images", "placeholders"), [(1, 2), (2, 1), (1, 0)], ids=["fewer images", "more images", "no place for the image"]
)
@pytest.mark.parametrize("num_beams", [1, 2])
def test_number_of_images(model, processor, images, placeholders, num_beams):
    inputs = processor(
        text="<image>" * placeholders + "Hi", images=[GOLDEN.image("img0_300x200")] * images, return_tensors="pt"
    )
    with pytest.raises(ValueError, match=rf"places for {placeholders} image\(s\), but {images} image\(s\) were given"):
        model.generate(**inputs, **GREEDY, num_beams=num_beams)


def test_placeholder_without_image(model, processor):
    inputs = processor(text="<image>\nHi", images=None, return_tensors="pt")
    with pytest.raises(ValueError, match=r"places for 1 image\(s\), but 0 image\(s\) were given"):
        model.generate(**inputs, **GREEDY)


@pytest.mark.parametrize("wrong", [-1, -100, -201, -(2**62), "one too many", 2**62])
def test_ids_that_are_not_in_the_table(model, torch_models, wrong):
    """Named with their place and the range, before an image is encoded."""
    rows = model.config.image_token_index + 1
    wrong = rows if wrong == "one too many" else wrong
    ids = torch.tensor([[1, rows - 2, 0], [2, wrong, 3]])
    sentence = rf"input_ids has {wrong} at position 1 of row 1\. Expected ids from 0 to {rows - 1}"
    torch_model = torch_models[GOLDEN.name]
    with pytest.raises(ValueError, match=f"{sentence}, or -200 for an image"):
        model.generate(ids, pixel_values="never looked at", **GREEDY)
    for call in (lambda: model(ids), lambda: torch_model(ids), lambda: torch_model.generate(ids, **GREEDY)):
        with pytest.raises(ValueError, match=rf"{sentence}\. "):
            call()
    past = model(ids[:1]).past_key_values
    with pytest.raises(ValueError, match=rf"input_ids has {wrong} at position 0 of row 0"):
        model(ids[1:, 1:2], past_key_values=past)


def test_the_original_id_of_an_image_is_for_generate(model, torch_models):
    """`forward` would have to change the prompt's length."""
    for call in (model, torch_models[GOLDEN.name]):
        with pytest.raises(ValueError, match="input_ids has -200 at position 0 of row 0"):
            call(torch.tensor([[-200, 1]]))


def test_other_models_are_refused(tmp_path, bundles):
    import json
    import shutil

    folder = shutil.copytree(bundles[GOLDEN.name], tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] = {
        "model_type": "llama",
        "hidden_size": 256,
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
    }
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BundleError, match="OVModelForLlava"):
        OVModelForLlavaMPT.from_pretrained(folder)
