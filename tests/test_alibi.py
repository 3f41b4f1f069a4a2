"""ALiBi where it is at risk: PagedAttention, bf16, and prompts longer than the training context."""

import numpy as np
import openvino
import pytest
import torch
from conftest import Golden
from openvino._offline_transformations import paged_attention_transformation

from optimum_llava_ov.models.alibi import alibi_slopes, attention_bias


GOLDEN = Golden("linear_fp16_sharded")


def test_slopes_of_eight_heads():
    assert alibi_slopes(8).tolist() == [2**-i for i in range(1, 9)]


def test_slopes_of_other_head_counts_interleave():
    """As `gen_slopes` of MosaicML: of the next power of two, every second first."""
    assert alibi_slopes(6).tolist() == pytest.approx([2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3])
    assert alibi_slopes(4, bias_max=4).tolist() == pytest.approx([2**-1, 2**-2, 2**-3, 2**-4])


def test_bias_of_a_continued_left_padded_row():
    bias = attention_bias(torch.tensor([[0, 1, 1, 1]]), query_length=2, slopes=torch.tensor([0.5]))
    low = torch.finfo(torch.float16).min
    expected = [[low - 1.0, -0.5, 0.0, low - 0.5], [low - 1.5, -1.0, -0.5, 0.0]]
    assert bias.shape == (1, 1, 2, 4)
    assert torch.allclose(bias[0, 0], torch.tensor(expected))


def test_paged_attention_keeps_alibi(bundles):
    """After the transformation that GenAI applies, every layer has its slopes and no other mask."""
    model = openvino.Core().read_model(bundles[GOLDEN.name] / "openvino_language_model.xml")
    paged_attention_transformation(model)
    paged = [op for op in model.get_ops() if op.get_type_name() == "PagedAttentionExtension"]
    assert len(paged) == 3
    for op in paged:
        slopes = [
            value for value in map(_constant, (source.get_node() for source in op.input_values())) if value is not None
        ]
        assert any(value.shape == (4,) and np.allclose(value, [2**-2, 2**-4, 2**-6, 2**-8]) for value in slopes)


def test_nothing_as_large_as_the_scores_but_the_bias(bundles):
    """What must be there for PagedAttention costs nothing in other attention."""
    model = openvino.Core().read_model(bundles[GOLDEN.name] / "openvino_language_model.xml")
    attention = next(op for op in model.get_ops() if op.get_type_name() == "ScaledDotProductAttention")
    broadcast = attention.input_value(3).get_node().input_value(1).get_node().input_value(0).get_node()
    assert broadcast.get_type_name() == "Broadcast"
    assert broadcast.input_value(1).get_node().data.tolist() == [4, 1, 1]


def _constant(node):
    """Value of a node that only depends on constants, or `None`."""
    if not _is_constant(node):
        return None
    model = openvino.Model([node.output(0)], [], "folded")
    return next(iter(openvino.compile_model(model, "CPU")({}).values()))


def _is_constant(node):
    sources = node.input_values()
    return node.get_type_name() == "Constant" or (
        bool(sources) and all(_is_constant(source.get_node()) for source in sources)
    )


@pytest.fixture(scope="module")
def long_prompt(processors):
    """4,224 tokens, more than twice `max_seq_len`, with a picture at the beginning."""
    processor = processors[GOLDEN.name]
    inputs = processor(text="<image>\n", images=[GOLDEN.image("img0_300x200")], return_tensors="pt")
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(2, 450, (1, 4224 - inputs["input_ids"].shape[1]), generator=generator)
    input_ids = torch.cat([inputs["input_ids"], words], dim=1)
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "pixel_values": inputs["pixel_values"],
    }


def test_no_wall_at_max_seq_len(long_prompt, models, torch_models):
    """Twice the training context: no error, and what torch computes with ALiBi continued."""
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    answered = models[GOLDEN.name].generate(**long_prompt, **options)
    inputs = {**long_prompt, "input_ids": answered, "attention_mask": torch.ones_like(answered)}
    with torch.no_grad():
        expected = torch_models[GOLDEN.name](**inputs, logits_to_keep=64).logits
    logits = models[GOLDEN.name](**inputs, logits_to_keep=64).logits
    assert (logits - expected).abs().max() < 1e-3
    # Each token is the one that torch would have chosen
    assert torch.equal(answered[0, -8:], expected[0, -9:-1].argmax(-1))
