"""Write a conversation as one prompt: each style as data, its chat template, and the rule that chooses the style.

The styles and their texts are those of the original (`llava/conversation.py`). They do not contain BOS: the tokenizer
writes it (see `checkpoint/sentencepiece.py`). Only `llava_llama_2` spells it, between two rounds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

from transformers import PreTrainedTokenizerFast

from optimum_llava_ov.checkpoint.tokenizer import TURN_END_TOKEN, TURN_START_TOKEN


@dataclass(frozen=True)
class Conversation:
    """
    Attributes:
        name (`str`): the key in the original's `conv_templates`.
        system (`str`): system text if the caller does not give one.
        around_system, around_user, around_assistant (`tuple[str, str]`): texts before and after the text of a message.
        generation_prompt (`str`): text after the last message, which the model continues.
        stop_strings (`tuple[str, ...]`): an answer ends before any of these.
        system_in_user (`bool`): whether a system text is written into the user's message that follows, before its
            text. An empty system text is then left out.
        between_rounds (`str`): text before each message of the user except the first.
    """

    name: str
    system: str
    around_system: tuple[str, str]
    around_user: tuple[str, str]
    around_assistant: tuple[str, str]
    generation_prompt: str
    stop_strings: tuple[str, ...]
    system_in_user: bool = False
    between_rounds: str = ""

    @property
    def chat_template(self) -> str:
        """The style as a Jinja template, in the part of the language that transformers and GenAI have in common.

        Within a message all images come before all texts, as in GenAI. A newline separates them. A system message of
        the caller replaces the default.
        """
        style = {name: value for name, value in asdict(self).items() if name != "stop_strings"}
        # Strings, lists, true and false are the same in JSON and in Jinja
        return f"{{%- set style = {json.dumps(style)} -%}}{_CHAT_TEMPLATE}"

    def stops(self, tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[str]]:
        """Return what ends an answer.

        Returns:
            Ids of tokens (`eos_token_id` of a generation configuration), and the `stop_strings` that are not tokens.
        """
        tokens = [text for text in self.stop_strings if text in tokenizer.get_vocab()]
        ids = [*tokenizer.convert_tokens_to_ids(tokens), tokenizer.eos_token_id]
        return list(dict.fromkeys(ids)), [text for text in self.stop_strings if text not in tokens]


_HUMAN = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
_USER = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def _vicuna(name: str, system: str) -> Conversation:
    return Conversation(name, system, ("", " "), ("USER: ", " "), ("ASSISTANT: ", "</s>"), "ASSISTANT:", ("</s>",))


def _llama_2(name: str, system: str, between_rounds: str) -> Conversation:
    return Conversation(
        name,
        system,
        around_system=("<<SYS>>\n", "\n<</SYS>>\n\n"),
        around_user=("[INST] ", " [/INST]"),
        around_assistant=(" ", " </s>"),
        generation_prompt="",
        stop_strings=("</s>",),
        system_in_user=True,
        between_rounds=between_rounds,
    )


def _chatml(name: str, system: str) -> Conversation:
    # No newline after <|im_end|>
    around_system, around_user, around_assistant = (
        (f"{TURN_START_TOKEN}{role}\n", TURN_END_TOKEN) for role in ("system", "user", "assistant")
    )
    return Conversation(
        name,
        system,
        around_system,
        around_user,
        around_assistant,
        generation_prompt=f"{TURN_START_TOKEN}assistant\n",
        stop_strings=(TURN_END_TOKEN,),
    )


VICUNA_V1 = _vicuna("vicuna_v1", _USER)
LLAVA_V1 = _vicuna("llava_v1", _HUMAN)
LLAVA_V0 = Conversation(
    "llava_v0", _HUMAN, ("", "###"), ("Human: ", "###"), ("Assistant: ", "###"), "Assistant:", stop_strings=("###",)
)
LLAVA_LLAMA_2 = _llama_2(
    "llava_llama_2",
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language.",
    between_rounds="<s>",
)
MISTRAL_INSTRUCT = _llama_2("mistral_instruct", "", between_rounds="")
CHATML_DIRECT = _chatml("chatml_direct", "Answer the questions.")
MPT = _chatml(
    "mpt",
    "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers.",
)

CONVERSATIONS = {
    conversation.name: conversation
    for conversation in (VICUNA_V1, LLAVA_V1, LLAVA_V0, LLAVA_LLAMA_2, MISTRAL_INSTRUCT, CHATML_DIRECT, MPT)
}


def conversation_named(name: str) -> Conversation:
    """Return the style of this name.

    Raises:
        `ValueError`: there is no such style.
    """
    if name not in CONVERSATIONS:
        raise ValueError(f"The conversation {name!r} does not exist. Expected one of: {', '.join(CONVERSATIONS)}.")
    return CONVERSATIONS[name]


class Choice(NamedTuple):
    """
    Attributes:
        conversation ([`Conversation`]): the style.
        reason (`str`): why this style was chosen, as a sentence for the user.
    """

    conversation: Conversation
    reason: str


# A pattern to find in the name in lower case, the style, and what such a name stands for
_NAMES = (
    (r"llama-?2.*chat", LLAVA_LLAMA_2, "Llama 2 Chat"),
    (r"(?<![a-z0-9])v0(?![0-9])", LLAVA_V0, "version 0 of LLaVA or Vicuna"),
    (r"vicuna|sharegpt4v|(?<![a-z0-9])v1(?![0-9])", VICUNA_V1, "Vicuna, or version 1 of LLaVA"),
)


def choose_conversation(
    architecture: str | None,
    tokenizer: PreTrainedTokenizerFast,
    base_models: Sequence[str] = (),
    name: str | None = None,
) -> Choice:
    """Choose the style that a checkpoint was trained with, as far as the checkpoint says it. The first match wins:

    1. An MPT model: `mpt`.
    2. A tokenizer with `<|im_start|>` and `<|im_end|>`: `chatml_direct`.
    3. A Mistral model: `vicuna_v1` if one of its names contains BakLLaVA, else `mistral_instruct`.
    4. The name of the base model, then the checkpoint's own: `llava_llama_2` for Llama 2 Chat, `llava_v0` for
       version 0, `vicuna_v1` for Vicuna and versions 1, 1.5 and 1.6.
    5. `vicuna_v1`.

    The original's command line looks only at the name of the folder. It takes `llava_v0` for names that it does not
    know, and `llava_v1` where training and evaluation take `vicuna_v1`.

    Args:
        architecture: the first of `architectures` in `config.json`.
        tokenizer: the tokenizer of the checkpoint.
        base_models: folders or model ids that it was trained from: `base_model_name_or_path` of an adapter, or
            `_name_or_path` of `config.json`.
        name: folder or model id of the checkpoint.
    """
    architecture = architecture or ""
    names = [("base model", base_model.rstrip("/")) for base_model in base_models]
    names += [("name", name.rstrip("/"))] if name else []
    if "mpt" in architecture.lower():
        return Choice(MPT, f"The checkpoint is a {architecture}.")
    if {TURN_START_TOKEN, TURN_END_TOKEN} <= tokenizer.get_vocab().keys():
        return Choice(CHATML_DIRECT, f"Its tokenizer has {TURN_START_TOKEN} and {TURN_END_TOKEN}.")
    if "mistral" in architecture.lower():
        for what, text in names:
            if "bakllava" in text.lower():
                return Choice(VICUNA_V1, f"The {what} {text!r} says that it is BakLLaVA.")
        return Choice(MISTRAL_INSTRUCT, f"The checkpoint is a {architecture}.")
    for what, text in names:
        for pattern, conversation, meaning in _NAMES:
            if re.search(pattern, text.lower()):
                return Choice(conversation, f"The {what} {text!r} stands for {meaning}.")
    return Choice(
        VICUNA_V1,
        "Neither the architecture, the tokenizer nor a name says otherwise, and the original's training scripts "
        "take it.",
    )


# In the subset of Jinja that GenAI understands: without `replace`. `state.text` becomes the text of one message.
_CHAT_TEMPLATE = """
{%- set state = namespace(system=style['system'], text='', newline='', before_user='') -%}
{%- if messages[0]['role'] == 'system' -%}
{%- set state.system = '' -%}
{%- elif not style['system_in_user'] -%}
{{- style['around_system'][0] + style['system'] + style['around_system'][1] -}}
{%- endif -%}
{%- for message in messages -%}
{%- if message['content'] is string -%}
{%- set state.text = message['content'] -%}
{%- else -%}
{%- set state.text = '' -%}
{%- set state.newline = '' -%}
{%- for item in message['content'] -%}
{%- if item['type'] != 'text' -%}
{%- set state.text = state.text + state.newline + '<image>' -%}
{%- set state.newline = '\n' -%}
{%- endif -%}
{%- endfor -%}
{%- for item in message['content'] -%}
{%- if item['type'] == 'text' -%}
{%- set state.text = state.text + state.newline + item['text'] -%}
{%- set state.newline = '\n' -%}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- set state.text = state.text.split('<im_start><image><im_end>') | join('<image>') -%}
{%- if message['role'] == 'user' -%}
{%- if style['system_in_user'] and state.system -%}
{%- set state.text = style['around_system'][0] + state.system + style['around_system'][1] + state.text -%}
{%- set state.system = '' -%}
{%- endif -%}
{{- state.before_user + style['around_user'][0] + state.text + style['around_user'][1] -}}
{%- set state.before_user = style['between_rounds'] -%}
{%- elif message['role'] == 'assistant' -%}
{{- style['around_assistant'][0] + state.text + style['around_assistant'][1] -}}
{%- elif message['role'] != 'system' -%}
{{- raise_exception('Expected the roles system, user and assistant, found ' + message['role']) -}}
{%- elif style['system_in_user'] -%}
{%- set state.system = state.text -%}
{%- else -%}
{{- style['around_system'][0] + state.text + style['around_system'][1] -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- style['generation_prompt'] -}}{%- endif -%}
"""
