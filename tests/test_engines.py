"""The same conversation gives the same tokens in every engine that can run the bundle.

GenAI and Model Server write the newline behind a picture themselves, so they get conversations in which a picture stands before the
text, as `apply_chat_template` puts it, and as messages rather than as a finished prompt.
"""

import json
import queue
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openvino
import openvino_genai
import pytest
import torch
from conftest import EXACT, EXAMPLES, Golden, run_stock
from PIL import Image
from transformers import AutoTokenizer


pytestmark = pytest.mark.genai


GOLDEN = Golden("linear_fp16_sharded")
MAX_NEW_TOKENS = 24
WIDE, TALL, SQUARE = "wide_300x200", "tall_56x420", "square_224x224"


def user(text, *pictures):
    return {"role": "user", "content": text, "pictures": list(pictures)}


def assistant(text):
    return {"role": "assistant", "content": text, "pictures": []}


CONVERSATIONS = {
    "no_picture": [user("Write a short poem about the sea.")],
    "one_picture": [user("What is in the picture?", SQUARE)],
    "wide_picture": [user("What is in the picture?", WIDE)],
    "tall_picture": [user("Count the boats.", TALL)],
    "two_pictures": [user("Which one is red?", WIDE, TALL)],
    "three_turns": [
        user("What is this?", SQUARE),
        assistant("A photo."),
        user("What colour is it?"),
        assistant("Red."),
        user("Are you sure?"),
    ],
    "picture_in_a_later_turn": [user("Hello there"), assistant("Hi!"), user("What is this?", WIDE)],
    "pictures_in_two_turns": [
        user("What is this?", SQUARE),
        assistant("A photo."),
        user("And this?", TALL),
    ],
}


def transformers_messages(conversation):
    return [
        {
            "role": turn["role"],
            "content": [{"type": "image"} for _ in turn["pictures"]] + [{"type": "text", "text": turn["content"]}],
        }
        for turn in conversation
    ]


# GenAI resamples in float, PIL rounds to grey levels between the two directions: a difference of one level in some pixels, which
# these random models amplify. The tall picture has its final width already and is only cropped.
PICTURES = {
    WIDE: GOLDEN.image("img0_300x200"),
    TALL: GOLDEN.image("img1_64x480").resize((56, 420)),
    SQUARE: GOLDEN.image("img2_224x224"),
}


def pictures_of(conversation):
    return [PICTURES[name] for turn in conversation for name in turn["pictures"]]


@pytest.fixture(scope="module")
def prompts(processors):
    processor = processors[GOLDEN.name]
    return {
        name: processor(
            text=processor.apply_chat_template(transformers_messages(conversation), add_generation_prompt=True),
            images=pictures_of(conversation) or None,
            return_tensors="pt",
        )
        for name, conversation in CONVERSATIONS.items()
    }


@pytest.fixture(scope="module")
def expected(prompts, models):
    """Tokens of OVModelForLlavaMPT, which the golden tests tie to the original."""
    model = models[GOLDEN.name]
    return {name: answer(model, inputs) for name, inputs in prompts.items()}


def answer(model, inputs):
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, eos_token_id=None)
    return output[0, inputs["input_ids"].shape[1] :].tolist()


def test_torch(prompts, expected, torch_models):
    assert {name: answer(torch_models[GOLDEN.name], inputs) for name, inputs in prompts.items()} == expected


STOCK = """
import json, sys
import torch
from PIL import Image
from optimum.intel import OVModelForVisualCausalLM
from transformers import AutoProcessor

bundle, folder, conversations, exact, max_new_tokens = sys.argv[1], sys.argv[2], *map(json.loads, sys.argv[3:])
model = OVModelForVisualCausalLM.from_pretrained(bundle, ov_config=exact)
processor = AutoProcessor.from_pretrained(bundle)
answers = {}
for name, conversation in conversations.items():
    messages = [{"role": turn["role"], "content": [{"type": "image"} for _ in turn["pictures"]] + [{"type": "text", "text": turn["content"]}]} for turn in conversation]
    images = [Image.open(f"{folder}/{picture}.png").convert("RGB") for turn in conversation for picture in turn["pictures"]]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(text=prompt, images=images or None, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=None)
    penalised = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=None, repetition_penalty=5.0)
    assert len(set(penalised[0, inputs["input_ids"].shape[1] :].tolist())) == max_new_tokens
    answers[name] = [inputs["input_ids"][0].tolist(), output[0, inputs["input_ids"].shape[1] :].tolist()]
assert not any(module.startswith("optimum_llava_ov") for module in sys.modules)
print(json.dumps([type(model).__name__, answers]))
"""


def test_stock_optimum_intel_without_this_package(bundles, prompts, expected, tmp_path):
    for name, picture in PICTURES.items():
        picture.save(tmp_path / f"{name}.png")
    output = run_stock(
        STOCK, bundles[GOLDEN.name], tmp_path, json.dumps(CONVERSATIONS), json.dumps(EXACT), str(MAX_NEW_TOKENS)
    )
    class_name, answers = json.loads(output.splitlines()[-1])
    assert class_name == "_OVLlavaForCausalLM"
    for name, (input_ids, tokens) in answers.items():
        assert input_ids == prompts[name]["input_ids"][0].tolist(), name
        assert tokens == expected[name], name


def genai_config():
    return openvino_genai.GenerationConfig(max_new_tokens=MAX_NEW_TOKENS, do_sample=False, ignore_eos=True)


def genai_prompt(conversation, processor):
    """The conversation as text with one `<image>` a picture; the newline behind it is GenAI's to write."""
    prompt = processor.apply_chat_template(transformers_messages(conversation), add_generation_prompt=True)
    return prompt.replace("<image>\n", "<image>")


def tensors(conversation):
    return [openvino.Tensor(np.array(image)[None]) for image in pictures_of(conversation)]


@pytest.fixture(scope="module", params=["SDPA", "PA"])
def pipeline(request, bundles):
    return openvino_genai.VLMPipeline(bundles[GOLDEN.name], "CPU", ATTENTION_BACKEND=request.param, **EXACT)


def decode(processor, tokens):
    return processor.tokenizer.decode(tokens, skip_special_tokens=True)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_genai(pipeline, processors, expected, name):
    processor, config = processors[GOLDEN.name], genai_config()
    config.apply_chat_template = False
    result = pipeline.generate(
        genai_prompt(CONVERSATIONS[name], processor), images=tensors(CONVERSATIONS[name]), generation_config=config
    )
    assert result.texts[0] == decode(processor, expected[name])


def test_genai_applies_the_chat_template(pipeline, processors, expected):
    conversation = CONVERSATIONS["one_picture"]
    result = pipeline.generate(
        conversation[0]["content"], images=tensors(conversation), generation_config=genai_config()
    )
    assert result.texts[0] == decode(processors[GOLDEN.name], expected["one_picture"])


def test_genai_penalties_with_an_image(pipeline, models, processors, prompts):
    """GenAI looks up the tokens of the prompt in the logits. The pipeline goes on to answer after it."""
    inputs, conversation = prompts["one_picture"], CONVERSATIONS["one_picture"]
    output = models[GOLDEN.name].generate(
        **inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, eos_token_id=None, repetition_penalty=1.5
    )
    config = genai_config()
    config.repetition_penalty = 1.5
    for _ in range(2):
        result = pipeline.generate(conversation[0]["content"], images=tensors(conversation), generation_config=config)
        assert result.texts[0] == decode(processors[GOLDEN.name], output[0, inputs["input_ids"].shape[1] :])


def test_genai_chat_keeps_the_picture(pipeline, models, processors):
    """Two turns of GenAI's chat mode equal two turns of ours with the history written out."""
    processor, model = processors[GOLDEN.name], models[GOLDEN.name]
    pictures = [PICTURES[WIDE]]
    pipeline.start_chat()
    first = pipeline.generate(
        "What is this?", images=[openvino.Tensor(np.array(pictures[0])[None])], generation_config=genai_config()
    ).texts[0]
    second = pipeline.generate("Which colour?", generation_config=genai_config()).texts[0]
    pipeline.finish_chat()

    history = [user("What is this?", WIDE)]
    for text, received in ((None, first), ("Which colour?", second)):
        history += [user(text)] if text else []
        inputs = processor(
            text=processor.apply_chat_template(transformers_messages(history), add_generation_prompt=True),
            images=pictures,
            return_tensors="pt",
        )
        tokens = answer(model, inputs)
        assert received == decode(processor, tokens)
        history.append(assistant(received))


@pytest.mark.parametrize("backend", ["SDPA", "PA"])
def test_a_model_in_memory_stops(shapes_bundle, backend):
    """GenAI then reads no `generation_config.json`: the tokenizer's end of text is the only one it knows."""

    def files(name):
        weights = np.fromfile(shapes_bundle / f"{name}.bin", dtype=np.uint8)
        return (shapes_bundle / f"{name}.xml").read_text(), openvino.Tensor(weights)

    tokenizer = openvino_genai.Tokenizer(*files("openvino_tokenizer"), *files("openvino_detokenizer"))
    parts = {name: files(f"openvino_{name}_model") for name in ("language", "text_embeddings", "vision_embeddings")}
    pipeline = openvino_genai.VLMPipeline(parts, tokenizer, shapes_bundle, "CPU", ATTENTION_BACKEND=backend, **EXACT)
    picture = openvino.Tensor(np.array(Image.open(EXAMPLES / "shapes" / "pictures" / "a.png").convert("RGB"))[None])
    config = openvino_genai.GenerationConfig(max_new_tokens=100)
    assert pipeline.generate("Where is the star?", images=[picture], generation_config=config).texts == [
        "The star is at the top right."
    ]


def test_every_file_names_the_end_of_the_turn(shapes_bundle):
    """Whatever a loader reads, the answer stops. Padding is another token, so that an end is never taken for it."""
    tokenizer = AutoTokenizer.from_pretrained(shapes_bundle)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    config, generation = (
        json.loads((shapes_bundle / f"{name}.json").read_text()) for name in ("config", "generation_config")
    )
    assert tokenizer.eos_token_id == end
    assert openvino_genai.Tokenizer(shapes_bundle).get_eos_token_id() == end
    assert config["text_config"]["eos_token_id"] == generation["eos_token_id"] == [end, 0]
    assert tokenizer.pad_token_id == tokenizer.bos_token_id == generation["pad_token_id"] == 0
    assert tokenizer.decode([end, 0], skip_special_tokens=True) == ""


def test_continuous_batching_serves_all_at_once(bundles, processors, expected):
    """What Model Server runs: several different requests in one batch, prefix caching on."""
    processor = processors[GOLDEN.name]
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size, scheduler.enable_prefix_caching = 1, True
    pipeline = openvino_genai.ContinuousBatchingPipeline(bundles[GOLDEN.name], scheduler, "CPU", EXACT)
    config = genai_config()
    config.apply_chat_template = False
    names = [*CONVERSATIONS, *CONVERSATIONS]  # the second half finds its prefixes in the cache
    handles = [
        pipeline.add_request(
            index,
            genai_prompt(CONVERSATIONS[name], processor),
            images=tensors(CONVERSATIONS[name]),
            generation_config=config,
        )
        for index, name in enumerate(names)
    ]
    while pipeline.has_non_finished_requests():
        pipeline.step()
    for name, handle in zip(names, handles):
        assert handle.read_all()[0].generated_ids == expected[name], name


def test_concurrent_clients(bundles, processors, expected):
    """Clients in threads of their own, joining while others are being answered, get what they would get alone."""
    processor, arrived = processors[GOLDEN.name], queue.Queue()
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size, scheduler.enable_prefix_caching = 1, True
    pipeline = openvino_genai.ContinuousBatchingPipeline(bundles[GOLDEN.name], scheduler, "CPU", EXACT)
    config = genai_config()
    config.apply_chat_template = False

    def serve(total):
        waiting, overlapping = {}, 0
        for number in range(total):
            name, answer = arrived.get(timeout=60)
            images = tensors(CONVERSATIONS[name])
            prompt = genai_prompt(CONVERSATIONS[name], processor)
            overlapping += pipeline.has_non_finished_requests()
            waiting[number] = pipeline.add_request(number, prompt, images=images, generation_config=config), answer
            pipeline.step()
        while pipeline.has_non_finished_requests():
            pipeline.step()
        for handle, answer in waiting.values():
            answer.put(handle.read_all()[0].generated_ids)
        return overlapping

    def ask(name):
        answer = queue.Queue()
        arrived.put((name, answer))
        return answer.get(timeout=60)

    names = [*CONVERSATIONS, *CONVERSATIONS]
    with ThreadPoolExecutor(len(names) + 1) as threads:
        server = threads.submit(serve, len(names))
        answers = list(threads.map(ask, names))
        assert server.result() > len(names) // 2
    assert answers == [expected[name] for name in names]
