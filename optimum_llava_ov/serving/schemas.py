"""The requests of the API. Names and meanings are those of OpenAI."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError


MAX_CHOICES = 8
# What clients send for OpenAI's own service, and what changes no answer
_IGNORED = ("metadata", "prompt_cache_key", "safety_identifier", "service_tier", "store", "user")


def _no_other_tokens(number: int) -> int:
    if number:
        raise PydanticCustomError(
            "other_tokens",
            "GenAI gives the probability of each token of the answer, and not those of other likely tokens. Use 0.",
        )
    return number


Text = Annotated[str, Field(min_length=1)]
NoOtherTokens = Annotated[int, Field(ge=0, json_schema_extra={"maximum": 0}), AfterValidator(_no_other_tokens)]
Role = Literal["system", "developer", "user", "assistant"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class ImageUrl(_Strict):
    url: str = Field(description="A data URL, or an address on a host that the server allows.")
    detail: Literal["auto", "low", "high"] = "auto"


class ImagePart(_Strict):
    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class ChatMessage(_Strict):
    role: Role
    content: str | list[Part]
    name: str | None = None


class StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: bool = False


class JsonSchema(_Strict):
    name: str = Field(min_length=1, max_length=64)
    json_schema: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


class TextFormat(_Strict):
    type: Literal["text"]


class JsonObjectFormat(_Strict):
    type: Literal["json_object"]


class JsonSchemaFormat(_Strict):
    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class _Request(_Strict):
    """What requests for an answer share."""

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2, description="0 for greedy decoding.")
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int | None = Field(None, ge=1, le=1_000_000, description="Not in OpenAI's API. Default: 50.")
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    stop: Text | Annotated[list[Text], Field(max_length=4)] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stream: bool = False
    stream_options: StreamOptions | None = None
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, gt=0, le=10, description="Not in OpenAI's API.")
    ignore_eos: bool = Field(False, description="Not in OpenAI's API. Go on to max_tokens, for measurements.")

    @model_validator(mode="before")
    @classmethod
    def _drop(cls, values: Any) -> Any:
        """Drop what changes no answer, and null, which means the default."""
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if name not in _IGNORED and value is not None}

    @model_validator(mode="after")
    def _check(self) -> _Request:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only for requests with stream.")
        return self

    @property
    def stops(self) -> list[str]:
        return [] if self.stop is None else [self.stop] if isinstance(self.stop, str) else self.stop


class ChatRequest(_Request):
    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = Field(False, description="Return the probabilities of the tokens of the answer.")
    top_logprobs: NoOtherTokens = Field(0, description="Other likely tokens are not supported.")
    response_format: ResponseFormat | None = None


class CompletionRequest(_Request):
    prompt: str | list[str] = Field(description="Texts, without the conversation's template. Images are not possible.")
    logprobs: NoOtherTokens | None = Field(None, description="0 returns the probabilities of the answer's tokens.")
    echo: Literal[False] = False
    best_of: int | None = Field(None, ge=1, le=1)


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TokenLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[Any] = []


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]


class AssistantMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(BaseModel):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[Any] | None = None
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "optimum-llava-ov"
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(BaseModel):
    status: Literal["ok", "starting", "stopping", "failed"]


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    error: ErrorDetail
