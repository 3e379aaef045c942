"""What a client may send: OpenAI's requests, read strictly -> an `Ask`.

A field is one of five things, and nothing is dropped in silence that would change an answer:

    known       checked by type and range; no text stands for a number, and true isn't 1
    neutral     known to OpenAI's API but not to us, and given its default (`presence_penalty: 0`): as if left out
    harmless    says nothing about the answer (`user`, `metadata`, …): ignored
    refused     known to OpenAI's API, and something would be missing (`suffix`, penalties, …)
    unknown     refused by name. `chat_template` and patterns of any kind (`guided_regex`) are among these: no template,
                regex or path from a request is ever used (schema.py: nor a schema's `pattern`)

`null` is a field that wasn't sent. Two fields are ours: `top_k`, and `scale`, which multiplies an adapter's update.
"""

import abc
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from pydantic import Field

from deltaw.config import Strict
from deltaw.generate.sampling import Sampling
from deltaw.serve.ask import MOST_SCALE, Ask
from deltaw.serve.fields import Biases, Ids, Objects, Prompts, Request, Texts, short
from deltaw.serve.limits import Limits
from deltaw.serve.refused import wrong
from deltaw.show.text import counted

HARMLESS = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prediction",
        "moderation",
        "prompt_cache_key",
        "prompt_cache_retention",
    }
)
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "best_of": (1,),
    "suffix": ("",),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True,),
    "functions": ([],),
    "function_call": ("none",),
    "audio": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "web_search_options": (),
}
LOWEST_P = 1e-9  # OpenAI's top_p 0: the likeliest token alone


class StreamOptions(Strict):
    """`include_usage`: whether a last chunk counts the tokens."""

    include_usage: bool = False
    include_obfuscation: bool = False  # OpenAI's padding against eavesdroppers; nothing to us


class Asked(Request):
    """What both ways of asking share."""

    ignored: ClassVar[frozenset[str]] = HARMLESS
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = NEUTRAL

    model: str
    temperature: float = Field(default=1.0, ge=0, le=2, allow_inf_nan=False)
    top_p: float = Field(default=1.0, ge=0, le=1, allow_inf_nan=False)
    top_k: int = Field(default=0, ge=0, lt=2**31)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    n: int = Field(default=1, ge=1)
    stop: Texts = ()
    logit_bias: Biases = Field(default_factory=dict)
    max_tokens: int | None = Field(default=None, ge=0)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    scale: float = Field(default=1.0, ge=0, le=MOST_SCALE, allow_inf_nan=False)

    def check(self, limits: Limits, prompts: int = 1) -> None:
        """Raises Refused for what is more than one request may ask."""
        for value, most, name, what in (
            (self.n, limits.n, "n", "{} answers to a prompt"),
            (prompts * self.n, limits.rows, "n" if prompts == 1 else "prompt", "{} answers in one request"),
            (len(self.stop), limits.stops, "stop", "{} stop texts"),
            (max(map(len, self.stop), default=0), limits.stop_length, "stop", "a stop text of {} characters"),
            (len(self.logit_bias), limits.biases, "logit_bias", "{} biases"),
            (max(self.logit_bias, default=0), limits.vocabulary - 1, "logit_bias", "the token id {}"),
            (self.max_tokens or 0, limits.context, "max_tokens", "{} tokens"),
        ):
            if value > most:
                raise wrong(f"{name}: {what.format(short(value))}; at most {most:,}", name, "too_large")
        if "stream_options" in self.model_fields_set and not self.stream:
            raise wrong("stream_options is for streams: send stream: true with it", "stream_options")

    def ask(self, prompt: tuple[int, ...], limits: Limits, client: str, adapter: str | None) -> Ask:
        """For one prompt. Raises Refused for one that doesn't fit."""
        if not prompt:
            raise wrong("the prompt is empty", "prompt")
        if min(prompt) < 0 or max(prompt) >= limits.vocabulary:
            raise wrong(f"prompt: ids are from 0 to {limits.vocabulary - 1:,}", "prompt")
        if len(prompt) >= limits.context:
            size = counted(len(prompt), "token")
            raise wrong(
                f"the prompt has {size}, and the context holds {limits.context:,}, answer included",
                code="context_length_exceeded",
            )
        if adapter is None and self.scale != 1:
            raise wrong("scale multiplies an adapter's update, and the base has none", "scale")
        most = min(self.most(limits), limits.context - len(prompt))
        sampling = Sampling(
            max_new_tokens=max(most, 1),
            temperature=float(self.temperature),
            top_p=max(float(self.top_p), LOWEST_P),
            top_k=self.top_k,
            seed=None if self.seed is None else self.seed % 2**62,
        )
        return Ask(
            prompt,
            sampling,
            self.stop,
            adapter,
            float(self.scale),
            self.likely,
            self.logit_bias,
            self.n,
            client=client,
        )

    @abc.abstractmethod
    def most(self, limits: Limits) -> int:
        """The most tokens of an answer."""

    @property
    @abc.abstractmethod
    def likely(self) -> int | None:
        """For how many tokens of each place logprobs are wanted, besides its own; None for none."""


class ChatRequest(Asked):
    """`POST /v1/chat/completions`."""

    messages: Objects
    tools: Objects = Field(default_factory=list)
    tool_choice: str | dict[str, Any] = "auto"
    parallel_tool_calls: bool = True
    max_completion_tokens: int | None = Field(default=None, ge=1)
    max_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0)
    response_format: dict[str, Any] = Field(default_factory=lambda: {"type": "text"})

    def check(self, limits: Limits, prompts: int = 1) -> None:
        super().check(limits)
        if None not in (self.max_tokens, self.max_completion_tokens):
            raise wrong("max_tokens and max_completion_tokens are the same: send one of them", "max_tokens")
        if (self.max_completion_tokens or 0) > limits.context:
            raise wrong(f"max_completion_tokens: at most {limits.context:,}", "max_completion_tokens", "too_large")
        if self.top_logprobs is not None and not self.logprobs:
            raise wrong("top_logprobs needs logprobs: true", "top_logprobs")
        if (self.top_logprobs or 0) > limits.top_logprobs:
            raise wrong(f"top_logprobs: at most {limits.top_logprobs}", "top_logprobs", "too_large")

    def most(self, limits: Limits) -> int:
        return self.max_tokens or self.max_completion_tokens or limits.answer

    @property
    def likely(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(Asked):
    """`POST /v1/completions`."""

    prompt: Prompts
    echo: bool = False
    logprobs: int | None = Field(default=None, ge=0)

    def check(self, limits: Limits, prompts: int = 1) -> None:
        super().check(limits, len(self.prompt))
        if (self.logprobs or 0) > limits.top_logprobs:
            raise wrong(f"logprobs: at most {limits.top_logprobs}", "logprobs", "too_large")
        if self.max_tokens == 0 and not self.echo:
            raise wrong("max_tokens 0 leaves nothing to answer, unless the prompt is wanted back: echo", "max_tokens")

    def most(self, limits: Limits) -> int:
        return 16 if self.max_tokens is None else self.max_tokens

    def ask(self, prompt: tuple[int, ...], limits: Limits, client: str, adapter: str | None) -> Ask:
        """A prompt of which every token is asked for, and one more, is being measured (lm-eval): that one is told, too,
        where it would end the answer, or the programs that cut it off would cut off the prompt's last."""
        measured = self.echo and self.logprobs is not None and self.max_tokens == 1
        ask = super().ask(prompt, limits, client, adapter)
        stop_ids = frozenset[int]() if measured else None
        return replace(ask, echo=self.echo, answer=self.max_tokens != 0, stop_ids=stop_ids)

    @property
    def likely(self) -> int | None:
        return self.logprobs


class AdapterRequest(Request):
    """`POST /v1/adapters`."""

    name: str


class TokenizeRequest(Request):
    """`POST /tokenize`: a text as completions take it, or a chat."""

    ignored: ClassVar[frozenset[str]] = frozenset({"model"})  # all adapters share the base's tokenizer

    prompt: str | None = None
    messages: Objects | None = None
    tools: Objects = Field(default_factory=list)


class DetokenizeRequest(Request):
    """`POST /detokenize`."""

    ignored: ClassVar[frozenset[str]] = frozenset({"model"})

    tokens: Ids
