"""A server as a side: llama.cpp's, vLLM's, or any that speaks OpenAI's routes.

Servers offer different things, so the side asks once, when it is opened:

    llama.cpp   GET /props answers. /apply-template and /tokenize give its own prompt ids, /completion takes ids and
                gives the likeliest K tokens with their ids, but nothing of a token that is half a character: what is
                asked for one position is therefore made to go on with a letter
    vLLM        POST /tokenize answers. /v1/completions takes ids, and gives ids back where it is asked to
    others      /v1/completions or /v1/chat/completions as text: no ids, so answers are compared as text

Log-probabilities along a given answer are asked for position by position, `max_tokens: 1` behind the ids so far. Those
along the server's own answer come with it, so that nothing is asked twice: two sides that agree cost one request
per prompt. Where a server gives the likeliest K alone, the rest of the distribution is one bucket (alike.py).
"""

import urllib.parse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from deltaw.errors import InputError, RunError, listed
from deltaw.files.client import Client, Refused
from deltaw.shipping.verify.sides.llama import LlamaCpp, numbers_of_type
from deltaw.shipping.verify.sides.side import Answer, Asked, Logs, Numbers, Progress, Prompt, Row, Side

LIKELIEST = 1000  # of llama.cpp; its answers are JSON, 0.03 s for 1,000 and 0.4 s for a whole vocabulary
LIKELIEST_OPENAI = (20, 5)  # vLLM's limit unless it was started with another, and OpenAI's
UNKNOWN = Numbers("bfloat16", ("bfloat16",), "a server doesn't say; bfloat16 is assumed")
Top = dict[int, float]  # log-probability by token id
Completed = tuple[list[tuple[int | None, Top]], str, bool]  # tokens with the likeliest ones; text; whether it ended
GREEDY = {"temperature": 0, "top_p": 1, "stream": False}


class Server(Side):
    """`address` is http://host:port/v1, `model` one of its models. `process`: ends with the side, where it is ours."""

    def __init__(
        self, name: str, client: Client, prefix: str = "/v1", model: str = "", process: LlamaCpp | None = None
    ) -> None:
        self.name, self.notes = name, []
        self._client, self._prefix, self._process = client, prefix, process
        self._props = None if process is None else client.ask("/props")
        self._model = model
        self._letter: int | None = None
        self._likeliest: dict[tuple[int, ...], Top] = {}  # by all the ids in front of the position
        if process is not None:
            self.numbers, self.tells_ids, self.context = process.numbers, True, process.context
            return
        self._model = self._known(client.reach(f"{prefix}/models"), model)
        self._props = self._try("/props", None)
        if self._props is not None and "default_generation_settings" not in self._props:
            self._props = None
        self.tells_ids = self._props is not None or self._try("/tokenize", self._named(prompt="a")) is not None
        self.context = _number((self._props or {}).get("default_generation_settings", {}).get("n_ctx"))
        ftype = str((self._props or {}).get("model_ftype") or "")
        self.numbers = (
            numbers_of_type(ftype, f"llama.cpp says that it runs {ftype}", cache="float16") if ftype else UNKNOWN
        )
        if not self.tells_ids:
            self.notes.append(f"{name} gives no token ids, so prompts can't be compared")

    def ids(self, prompts: Sequence[Prompt]) -> list[tuple[int, ...] | None]:
        return [self._ids(prompt) if self.tells_ids else None for prompt in prompts]

    def answers(self, asked: Sequence[Asked], tokens: int, progress: Progress) -> list[Answer]:
        answers = []
        for number, one in enumerate(asked, 1):
            if one.ids is None:
                answers.append(self._said(one.prompt, tokens))
            else:
                answers.append(self._completed(one.ids, tokens))
            progress(number)
        return answers

    def logs(self, rows: Sequence[Row], progress: Progress) -> list[Logs] | None:
        if not self.tells_ids:
            return None
        logs = []
        for number, row in enumerate(rows, 1):
            tops = [self._top((*row.prompt, *row.answer[:at])) for at in range(len(row.answer))]
            if not all(tops):
                return None
            logs.append(_logs([top for top in tops if top]))
            progress(number)
        return logs

    def decode(self, ids: Sequence[int]) -> str | None:
        if not self.tells_ids:
            return None
        try:
            if self._props is not None:
                return str(self._client.ask("/detokenize", {"tokens": list(ids)})["content"])
            return str(self._client.ask("/detokenize", self._named(tokens=list(ids)))["prompt"])
        except (Refused, KeyError):
            return None

    @property
    def file(self) -> Path | None:
        """The GGUF that it runs, where that is ours."""
        return self._process.model if self._process is not None else None

    def close(self) -> None:
        if self._process is not None:
            self._process.close()

    def _named(self, **fields: Any) -> dict[str, Any]:
        return {"model": self._model, **fields}

    def _try(self, path: str, body: Any) -> dict[str, Any] | None:
        """A route's answer, None if the server doesn't have it."""
        try:
            answer = self._client.ask(path, body, seconds=30)
        except (Refused, RunError):
            return None
        return answer if isinstance(answer, dict) else None

    def _known(self, models: Any, model: str) -> str:
        """The model's name, checked against the server's list. Raises InputError."""
        try:
            known = [str(entry["id"]) for entry in models["data"]]
        except (TypeError, KeyError):
            raise InputError(
                f"{self.name}: {self._prefix}/models lists no models", fix="is the address right?"
            ) from None
        if model in known or (not model and len(known) == 1):
            return model or known[0]
        what = f"doesn't know the model {model!r:.80}" if model else f"has {len(known)} models"
        raise InputError(f"{self.name}: the server {what}; it has:\n{listed(known, 2)}", fix="write it after a #")

    def _ids(self, prompt: Prompt) -> tuple[int, ...] | None:
        """The server's own ids. A template that it can't apply is an error of the side, not of the prompt."""
        try:
            if self._props is not None:
                text = prompt.content
                if prompt.is_chat:
                    asked = {"messages": prompt.content, **({"tools": prompt.tools} if prompt.tools else {})}
                    text = self._client.ask("/apply-template", asked)["prompt"]
                body: Mapping[str, Any] = {"content": text, "add_special": True, "parse_special": True}
            elif prompt.is_chat:
                more = {"tools": prompt.tools} if prompt.tools else {}
                body = self._named(messages=prompt.content, add_generation_prompt=True, **more)
            else:
                body = self._named(prompt=prompt.content, add_special_tokens=True)
            return tuple(map(int, self._client.ask("/tokenize", body)["tokens"]))
        except (Refused, KeyError, TypeError, ValueError) as error:
            raise RunError(f"{self.name}: it doesn't accept the prompt {prompt.origin}: {error}") from None

    def _completed(self, ids: tuple[int, ...], tokens: int) -> Answer:
        """Its answer to ids; the likeliest tokens at each position are remembered."""
        steps, text, ended = self._complete(ids, tokens)
        answer: list[int] = []
        for token, top in steps:
            if top:
                self._likeliest[(*ids, *answer)] = top
            if token is None:
                return Answer(text, None, ended)
            answer.append(token)
        return Answer(text, tuple(answer), ended)

    def _top(self, ids: tuple[int, ...]) -> Top | None:
        if ids not in self._likeliest:
            steps, _, _ = self._complete(ids, 1, whole=True)
            if not steps or not steps[0][1]:
                return None
            self._likeliest[ids] = steps[0][1]
        return self._likeliest[ids]

    def _complete(self, ids: tuple[int, ...], tokens: int, whole: bool = False) -> Completed:
        """Its continuation. `whole`: forced to be a letter."""
        if self._props is not None:
            return self._complete_llama(ids, tokens, whole)
        for count in LIKELIEST_OPENAI:
            body = self._named(
                prompt=list(ids), max_tokens=tokens, logprobs=count, return_tokens_as_token_ids=True, **GREEDY
            )
            try:
                choice = self._asked(f"{self._prefix}/completions", body, retry=True)["choices"][0]
                break
            except Refused as refused:
                if count == LIKELIEST_OPENAI[-1]:
                    raise RunError(f"{self.name}: {refused}") from None
        return _steps_of_openai(choice), str(choice.get("text", "")), choice.get("finish_reason") != "length"

    def _complete_llama(self, ids: tuple[int, ...], tokens: int, whole: bool) -> Completed:
        body: dict[str, Any] = {"prompt": list(ids), "n_predict": tokens, "n_probs": LIKELIEST, **GREEDY}
        body |= {"cache_prompt": True, "return_tokens": True} | ({"model": self._model} if self._model else {})
        if whole:
            if self._letter is None:
                self._letter = int(self._client.ask("/tokenize", {"content": "a"})["tokens"][-1])
            body["logit_bias"] = [[self._letter, 1e6]]
        answer = self._asked("/completion", body)
        told = [(int(at["id"]), _top_of_llama(at)) for at in answer.get("completion_probabilities", [])]
        steps: list[tuple[int | None, Top]] = []
        for token in answer.get("tokens", []):  # all of them, and those that aren't half a character with their company
            steps.append(told.pop(0) if told and told[0][0] == token else (int(token), {}))
        return steps or list(told), str(answer.get("content", "")), answer.get("stop_type") != "limit"

    def _said(self, prompt: Prompt, tokens: int) -> Answer:
        """Its answer as text, through the route that a user would take."""
        if prompt.is_chat:
            more = {"tools": prompt.tools} if prompt.tools else {}
            body = self._named(messages=prompt.content, max_tokens=tokens, **more, **GREEDY)
            choice = self._asked(f"{self._prefix}/chat/completions", body)["choices"][0]
            text = choice.get("message", {}).get("content")
        else:
            body = self._named(prompt=prompt.content, max_tokens=tokens, **GREEDY)
            choice = self._asked(f"{self._prefix}/completions", body)["choices"][0]
            text = choice.get("text")
        return Answer(str(text or ""), None, choice.get("finish_reason") != "length")

    def _asked(self, path: str, body: Any, *, retry: bool = False) -> dict[str, Any]:
        try:
            answer = self._client.ask(path, body)
        except Refused as refused:
            if retry and refused.status in (400, 422):
                raise
            raise RunError(f"{self.name}: {path} answers {refused}") from None
        if not isinstance(answer, dict) or (path.endswith("completions") and not answer.get("choices")):
            raise RunError(f"{self.name}: {path} answers without a choice: {str(answer)[:120]}")
        return answer


def open_server(name: str) -> Server:
    """http://host:port/v1#model. Raises InputError: not reachable, no such model."""
    address, _, model = name.partition("#")
    parts = urllib.parse.urlsplit(address)
    root = f"{parts.scheme}://{parts.netloc}"
    return Server(name, Client(root), parts.path.rstrip("/") or "/v1", urllib.parse.unquote(model))


def _logs(tops: Sequence[Top]) -> Logs:
    """As many tokens per position as the position with the fewest has, the likeliest first."""
    count = min(map(len, tops))
    best = [sorted(top.items(), key=lambda item: -item[1])[:count] for top in tops]
    ids_PK = torch.tensor([[token for token, _ in row] for row in best])
    return Logs(torch.tensor([[value for _, value in row] for row in best]), ids_PK)


def _number(value: Any) -> int | None:
    return value if isinstance(value, int) and value > 0 else None


def _top_of_llama(at: Mapping[str, Any]) -> Top:
    return {int(entry["id"]): float(entry["logprob"]) for entry in at.get("top_logprobs", [])}


def _steps_of_openai(choice: Mapping[str, Any]) -> list[tuple[int | None, Top]]:
    """Tokens by id where the server writes them so ("token_id:17"); none of them where it doesn't."""
    logs = choice.get("logprobs") or {}
    tokens = [_token_id(token) for token in logs.get("tokens") or []]
    tops = logs.get("top_logprobs") or [{} for _ in tokens]
    if not tokens or None in tokens:
        return [(None, {})]
    return [
        (token, {id: float(v) for k, v in (top or {}).items() if (id := _token_id(k)) is not None})
        for token, top in zip(tokens, tops, strict=False)
    ]


def _token_id(token: Any) -> int | None:
    number = str(token).removeprefix("token_id:")
    return int(number) if number != str(token) and number.isdigit() else None
