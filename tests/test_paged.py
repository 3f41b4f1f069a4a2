"""Paged attention inside `generate`: the same answers as the bundle's own attention gives, and nothing computed twice."""

import gc
import logging
import weakref

import numpy as np
import openvino
import pytest
import torch
from conftest import EXACT, Golden
from openvino import opset8 as ops

from optimum_llava_ov import OVModelForLlavaMPT
from optimum_llava_ov.runtime import language_model as language_model_module
from optimum_llava_ov.runtime.graph import LOGIT_POSITIONS, paged, with_logit_positions
from optimum_llava_ov.runtime.paged import TOKENS_PER_CALL
from optimum_llava_ov.runtime.paged_cache import BLOCK, PagedCache


GOLDEN = Golden("linear_fp16_sharded")
GREEDY = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 40}


@pytest.fixture(scope="module")
def model(models):
    return models[GOLDEN.name]


@pytest.fixture(scope="module")
def stateful(bundles):
    return OVModelForLlavaMPT.from_pretrained(bundles[GOLDEN.name], ov_config={**EXACT, "ATTENTION_BACKEND": "SDPA"})


@pytest.fixture(scope="module")
def graph(bundles):
    return openvino.Core().read_model(bundles[GOLDEN.name] / "openvino_language_model.xml")


@pytest.fixture
def calls(model, monkeypatch):
    """Tokens of each call of the language model."""
    calls = []
    request = model.language_model.cache.decoder.request
    infer = request.infer

    def counted(inputs, **kwargs):
        calls.append(len(inputs["inputs_embeds"]))
        return infer(inputs, **kwargs)

    monkeypatch.setattr(request, "infer", counted)
    return calls


def embeddings(model, *shape, seed=0):
    return torch.randn(*shape, model.config.text_config.d_model, generator=torch.Generator().manual_seed(seed))


class TestGraph:
    def test_inputs(self, graph):
        model = with_logit_positions(paged(graph), axis=0)
        names = {port.get_any_name() for port in model.inputs}
        caches = {f"{kind}_cache.{layer}" for kind in ("key", "value") for layer in range(3)}
        sequences = {"past_lens", "subsequence_begins", "block_indices", "block_indices_begins", "max_context_len"}
        assert names == {"inputs_embeds", LOGIT_POSITIONS, *sequences, *caches}

    def test_without_alibi_it_is_refused(self, graph):
        """OpenVINO knows few ways to write ALiBi, and leaves out any other."""
        other = graph.clone()
        (distance,) = (node for node in other.get_ops() if node.get_type_name() == "Abs")
        value = distance.input_value(0)
        distance.output(0).replace(ops.maximum(value, ops.negative(value)).output(0))  # the same number
        other.validate_nodes_and_infer_types()
        assert paged(graph) is not None
        assert paged(other) is None

    def test_another_graph_is_refused(self, bundles):
        assert paged(openvino.Core().read_model(bundles[GOLDEN.name] / "openvino_text_embeddings_model.xml")) is None


class TestCache:
    @pytest.fixture
    def request_of_graph(self, graph):
        compiled = openvino.Core().compile_model(with_logit_positions(paged(graph), axis=0), "CPU", EXACT)
        return compiled.create_infer_request()

    @pytest.fixture
    def cache(self, request_of_graph):
        cache = PagedCache(request_of_graph)
        cache.begin(1)
        return cache

    @pytest.fixture
    def tensors(self, request_of_graph):
        """What the graph reads, `(blocks, ...)` of keys and values in each layer."""
        names = [f"{kind}_cache.{layer}" for kind in ("key", "value") for layer in range(3)]
        return lambda: [request_of_graph.get_tensor(name).data for name in names]

    def test_rows_share_blocks_until_they_write(self, cache, tensors):
        cache.extend(0, 2 * BLOCK + 3)
        cache.reorder(np.array([0, 0, 0]))
        assert [cache.blocks([row])[0].tolist() for row in range(3)] == [[0, 1, 2]] * 3
        for tensor in tensors():
            tensor[2] = 7
        for row in range(3):
            cache.extend(row, 1)
        tables = [cache.blocks([row])[0].tolist() for row in range(3)]
        assert [table[:2] for table in tables] == [[0, 1]] * 3
        assert len({table[2] for table in tables}) == 3  # the last one has the original
        assert all((tensor[table[2]] == 7).all() for tensor in tensors() for table in tables)
        cache.reorder(np.array([1]))
        assert cache.ref_counts.sum() == 3

    def test_whole_blocks_are_never_copied(self, cache):
        cache.extend(0, BLOCK)
        cache.reorder(np.array([0, 0]))
        cache.extend(0, 1)
        cache.extend(1, BLOCK + 1)
        indices, begins = cache.blocks([0, 1])
        assert indices.tolist() == [0, 1, 0, 2, 3]
        assert begins.tolist() == [0, 2, 5]

    def test_grows_and_keeps(self, cache, tensors):
        for step in range(1, 6):
            cache.extend(0, 3 * BLOCK)
            blocks, _ = cache.blocks([0])
            for tensor in tensors():
                tensor[blocks[-3:]] = step
        for tensor in tensors():
            assert [block.flat[0] for block in tensor[cache.blocks([0])[0]]] == [
                step for step in range(1, 6) for _ in range(3)
            ]
            assert tensor.ctypes.data % 64 == 0
        assert cache.block_bytes == sum(tensor[0].nbytes for tensor in tensors())

    def test_taking_back_gives_blocks_back(self, cache):
        cache.extend(0, 10 * BLOCK)
        cache.crop(9 * BLOCK - 1)
        assert cache.lengths.tolist() == [BLOCK + 1]
        assert cache.ref_counts.sum() == 2
        size = len(cache.ref_counts)
        cache.extend(0, 8 * BLOCK)
        assert len(cache.ref_counts) == size
        cache.free()
        assert len(cache.ref_counts) == 1

    def test_interrupted_while_it_grows(self, cache, tensors, request_of_graph, monkeypatch):
        """Half of the tensors are new, and the request holds none of the old ones: all are made anew."""
        cache.extend(0, BLOCK)
        set_tensor, calls = request_of_graph.set_tensor, []

        def interrupted(*args):
            if len(calls) == 3:
                raise KeyboardInterrupt
            calls.append(args)
            set_tensor(*args)

        with monkeypatch.context() as patch:
            patch.setattr(request_of_graph, "set_tensor", interrupted)
            with pytest.raises(KeyboardInterrupt):
                cache.extend(0, BLOCK)
        assert len(calls) == 3
        cache.begin(1)
        cache.extend(0, 1)
        assert {len(tensor) for tensor in tensors()} == {len(cache.ref_counts)}
        cache.begin(1)
        self.test_rows_share_blocks_until_they_write(cache, tensors)


class TestAnswers:
    """Of both kinds of attention, and of torch."""

    def test_backends(self, model, stateful):
        assert model.attention_backend == "PA"
        assert stateful.attention_backend == "SDPA"

    @pytest.mark.parametrize(
        "options",
        [{}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5}],
        ids=["greedy", "beams", "several"],
    )
    def test_rows_of_different_lengths(self, model, stateful, processors, options):
        inputs = processors[GOLDEN.name](
            text=["<image>\nWhat is this?", "Hi", "<image> and <image>"],
            images=[GOLDEN.image("img0_300x200"), GOLDEN.image("img1_64x480"), GOLDEN.image("img0_300x200")],
            return_tensors="pt",
            padding=True,
        )
        expected = stateful.generate(**inputs, **GREEDY, **options)
        assert torch.equal(model.generate(**inputs, **GREEDY, **options), expected)

    def test_sampling(self, model, stateful):
        tokens = []
        for each in (model, stateful):
            torch.manual_seed(0)
            tokens.append(
                each.generate(torch.tensor([[5, 6, 7]]), do_sample=True, num_return_sequences=3, max_new_tokens=20)
            )
        assert torch.equal(*tokens)

    def test_right_padding_of_a_forward_call(self, model, torch_models):
        embeds = embeddings(model, 2, 50)
        mask = torch.ones(2, 50, dtype=torch.long)
        mask[1, 30:] = 0
        with torch.no_grad():
            expected = torch_models[GOLDEN.name](inputs_embeds=embeds, attention_mask=mask).logits
        logits = model(inputs_embeds=embeds, attention_mask=mask).logits
        assert (logits - expected)[mask.bool()].abs().max() < 1e-3

    @pytest.mark.parametrize("backend", ["PA", "SDPA"])
    def test_embeddings_that_are_not_in_one_piece_of_memory(self, model, stateful, backend):
        each = model if backend == "PA" else stateful
        embeds = embeddings(model, 20, 2).transpose(0, 1)
        expected = each(inputs_embeds=embeds.contiguous(), logits_to_keep=1).logits
        assert torch.equal(each(inputs_embeds=embeds, logits_to_keep=1).logits, expected)
        expected = each(inputs_embeds=embeds[:1].repeat(3, 1, 1)).logits
        assert torch.equal(each(inputs_embeds=embeds[:1].expand(3, -1, -1)).logits, expected)

    @pytest.mark.parametrize("pieces", [[1, 1, 1], [TOKENS_PER_CALL, 1, TOKENS_PER_CALL + 3], [BLOCK - 1, 2, BLOCK]])
    def test_calls_that_go_on(self, model, stateful, pieces):
        embeds = embeddings(model, 2, sum(pieces))
        for each in (model, stateful):
            past, parts = None, []
            for part in embeds.split(pieces, dim=1):
                output = each(inputs_embeds=part, past_key_values=past)
                past = output.past_key_values
                parts.append(output.logits)
            logits = torch.cat(parts, dim=1)
            whole = each(inputs_embeds=embeds).logits
            assert (logits - whole).abs().max() < 1e-3

    @pytest.mark.parametrize("backend", ["PA", "SDPA"])
    def test_a_mask_that_is_about_other_tokens(self, model, stateful, backend):
        each = model if backend == "PA" else stateful
        past = each(inputs_embeds=embeddings(each, 1, 4)).past_key_values
        with pytest.raises(ValueError, match=r"attention_mask has shape \(1, 3\)\. Expected .*: \(1, 5\)"):
            each(inputs_embeds=embeddings(each, 1, 1), attention_mask=torch.ones(1, 3), past_key_values=past)

    def test_a_mask_that_changes_its_mind(self, model):
        past = model(inputs_embeds=embeddings(model, 1, 4)).past_key_values
        with pytest.raises(ValueError, match=r"shows \[3\] earlier tokens, but the cache holds \[4\]"):
            model(
                inputs_embeds=embeddings(model, 1, 1),
                attention_mask=torch.tensor([[0, 1, 1, 1, 1]]),
                past_key_values=past,
            )

    def test_a_mask_that_was_wrong_can_be_put_right(self, model):
        embeds, new = embeddings(model, 2, 4), embeddings(model, 2, 1)
        past = model(inputs_embeds=embeds).past_key_values
        past.reorder_cache(torch.tensor([1, 0]))
        with pytest.raises(ValueError):
            model(inputs_embeds=new, attention_mask=torch.zeros(2, 5), past_key_values=past)
        logits = model(inputs_embeds=new, past_key_values=past).logits
        expected = model(inputs_embeds=torch.cat([embeds[[1, 0]], new], dim=1), logits_to_keep=1).logits
        assert (logits - expected).abs().max() < 1e-4

    def test_equal_rows_padded_on_either_side(self, model):
        embeds = embeddings(model, 1, 4).repeat(2, 1, 1)
        embeds[1, 1:] = embeds[1, :3].clone()
        logits = model(
            inputs_embeds=embeds, attention_mask=torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]]), logits_to_keep=1
        ).logits
        assert (logits[1] - model(inputs_embeds=embeds[:1, :3], logits_to_keep=1).logits[0]).abs().max() < 1e-4

    @pytest.mark.parametrize("precision", ["u8", "f16", "u4"])
    def test_caches_of_fewer_bits(self, bundles, precision):
        """The default has fewer bits than these tests: beams copy blocks of them, long answers make them grow. Rows stay themselves."""
        model = OVModelForLlavaMPT.from_pretrained(
            bundles[GOLDEN.name], ov_config={**EXACT, "KV_CACHE_PRECISION": precision}
        )
        compiled = model.language_model.request.get_compiled_model()
        assert compiled.input("key_cache.0").get_element_type().get_type_name() == precision
        rows = torch.arange(5, 85).view(2, 40)
        options = {**GREEDY, "num_beams": 3}
        tokens = model.generate(rows, **options)
        assert torch.equal(model.generate(rows.flip(0), **options).flip(0), tokens)

        def logits_after(prompts, reordered):
            past = model(input_ids=tokens[prompts, :-1], logits_to_keep=1).past_key_values
            past.reorder_cache(torch.tensor(reordered))
            return model(input_ids=tokens[:, -1:], past_key_values=past).logits

        expected = logits_after([1, 1], [0, 1])
        # Two prompts go through larger matrices than one, which are summed in another order: 5e-4 on a processor without AVX-512.
        assert (logits_after([0, 1], [1, 1]) - expected).abs().max() < 1e-2
        # Far less than what a wrong block does: one that is replaced by another of the same row moves them by at least 5.
        assert (logits_after([0, 1], [0, 1])[0] - expected[0]).abs().max() > 1

    @pytest.mark.parametrize("backend", ["PA", "SDPA"])
    def test_prompt_lookup(self, model, stateful, processors, backend, monkeypatch):
        """Assisted generation: several tokens in one step where they are foreseen, and the same tokens."""
        each = model if backend == "PA" else stateful
        text = "<image>\nWhat is this? What is this? <image> What is"
        images = [GOLDEN.image("img0_300x200"), GOLDEN.image("img1_64x480")]
        inputs = processors[GOLDEN.name](text=text, images=images, return_tensors="pt")
        options = {**GREEDY, "eos_token_id": 0}
        expected = each.generate(**inputs, **options)
        steps, forward = [], each.language_model.forward
        monkeypatch.setattr(
            each.language_model, "forward", lambda *args: steps.append(len(args[0][0])) or forward(*args)
        )
        assert torch.equal(each.generate(**inputs, **options, prompt_lookup_num_tokens=5), expected)
        assert 1 < len(steps) < 40
        assert max(steps[1:]) > 1

    def test_a_session_on_either(self, model, stateful, processors):
        """The second turn cuts the cache, whose tokens are no text."""
        texts = []
        for each in (model, stateful):
            chat = each.chat(processors[GOLDEN.name], **GREEDY)
            chat.send("What is this?", GOLDEN.image("img0_300x200")).result()
            texts.append([chat.send("word " * 200).result(), chat.send("And this?").result(), chat.retry().result()])
            assert chat.last_answer.stats.reused_tokens > 200
        assert texts[0] == texts[1]


class TestNothingTwice:
    def test_beams(self, model, calls):
        model.generate(torch.arange(5, 105)[None], **{**GREEDY, "max_new_tokens": 4}, num_beams=5)
        assert calls == [100, 5, 5, 5]

    def test_rows_that_begin_alike(self, model, calls):
        beginning = torch.arange(5, 105)
        rows = torch.stack([torch.cat([beginning, torch.arange(200, 210) + 20 * row]) for row in range(4)])
        tokens = model.generate(rows, **{**GREEDY, "max_new_tokens": 2})
        shared = 100 // BLOCK * BLOCK
        assert calls == [shared, 4 * (110 - shared), 4]
        alone = [model.generate(row[None], **{**GREEDY, "max_new_tokens": 2})[0] for row in rows]
        assert torch.equal(tokens, torch.stack(alone))

    def test_logits_of_all_positions(self, model, stateful, calls):
        """What rows share is computed once, but what is asked for is there for each."""
        embeds = embeddings(model, 1, 70).repeat(3, 1, 1)
        embeds[2, 40:] = 0
        assert (model(inputs_embeds=embeds).logits - stateful(inputs_embeds=embeds).logits).abs().max() < 1e-3
        assert calls == [140]

    def test_padding_is_not_computed(self, model, calls):
        mask = torch.ones(2, 50, dtype=torch.long)
        mask[0, :40] = 0
        model(inputs_embeds=embeddings(model, 2, 50), attention_mask=mask)
        assert calls == [60]

    def test_long_prompts_in_pieces(self, model, calls):
        model(inputs_embeds=embeddings(model, 2, 600), logits_to_keep=1)
        assert calls == [TOKENS_PER_CALL, 1200 - TOKENS_PER_CALL]


class TestAfterAnInterruption:
    @pytest.mark.parametrize("number", [1, 2, 5])
    def test_the_next_answer_is_right(self, model, monkeypatch, number):
        rows = torch.stack([torch.arange(5, 75), torch.arange(5, 75)])
        rows[1, 60:] = 9
        expected = model.generate(rows, **GREEDY)
        request, calls = model.language_model.cache.decoder.request, []
        infer = request.infer

        def interrupted(*args, **kwargs):
            calls.append(1)
            if len(calls) == number:
                raise KeyboardInterrupt
            return infer(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(request, "infer", interrupted)
            with pytest.raises(KeyboardInterrupt):
                model.generate(rows, **GREEDY)
        assert torch.equal(model.generate(rows, **GREEDY), expected)

    def test_to_clear_requests_gives_their_memory_back(self, bundles):
        model = OVModelForLlavaMPT.from_pretrained(bundles[GOLDEN.name], ov_config=EXACT)
        expected = model.generate(torch.tensor([[5, 6, 7]]), **GREEDY)
        decoder = weakref.ref(model.language_model.cache.decoder)
        model.clear_requests()
        gc.collect()
        assert decoder() is None
        assert torch.equal(model.generate(torch.tensor([[5, 6, 7]]), **GREEDY), expected)


def test_compressed_and_halved_graphs_have_it(bundles):
    """Whatever was done to the weights, the attention is still known."""
    for options in ({"load_in_8bit": True}, {"quantization_config": {"bits": 4, "group_size": 64}}, {}):
        model = OVModelForLlavaMPT.from_pretrained(bundles[GOLDEN.name], compile=False, **options)
        if not options:
            model.half()
        model.compile()
        assert model.attention_backend == "PA"


class TestWhereItIsNot:
    def test_a_processor_it_was_not_written_for(self, bundles, monkeypatch, caplog):
        def fail(*args):
            raise RuntimeError("not supported on this platform")

        monkeypatch.setattr(language_model_module, "PagedDecoder", fail)
        with caplog.at_level(logging.WARNING):
            model = OVModelForLlavaMPT.from_pretrained(bundles[GOLDEN.name], ov_config=EXACT)
        assert "not supported on this platform" in caplog.text
        assert model.attention_backend == "SDPA"

    def test_a_backend_that_there_is_not(self, bundles):
        with pytest.raises(ValueError, match="ATTENTION_BACKEND is 'flash'. Expected 'PA' or 'SDPA'"):
            OVModelForLlavaMPT.from_pretrained(bundles[GOLDEN.name], ov_config={"ATTENTION_BACKEND": "flash"})

    @pytest.mark.parametrize("backend", ["PA", "SDPA"])
    def test_compile_only_has_the_backends_too(self, bundles, backend):
        options = {"compile_only": True, "ov_config": {**EXACT, "ATTENTION_BACKEND": backend}}
        model = OVModelForLlavaMPT.from_pretrained(bundles[GOLDEN.name], **options)
        assert model.attention_backend == backend
