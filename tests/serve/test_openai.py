"""The real `openai` client against a real server, and its numbers against those of the model itself."""

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
import torch
from openai import OpenAI

from deltaw.model import Model, open_model
from tests.serve.serving import KEY, Running

CHAT = [{"role": "user", "content": "Add 3 and 4"}]


@pytest.fixture(scope="module")
def client(running: Running) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{running.address}/v1", api_key=KEY, max_retries=0, timeout=30) as client:
        yield client


@pytest.fixture(scope="module")
def base(running: Running) -> str:
    return running.model.base.source.public_name


@pytest.fixture(scope="module")
def alone(served_base: Path, served_adapters: Path) -> dict[str, Model]:
    """The base and each adapter, opened as every other verb opens it."""
    how = {"dtype": "float32", "device": "cpu"}
    models = {name: open_model(served_adapters / name, base=served_base, **how) for name in ("one", "two")}
    return {"base": open_model(served_base, **how), **models}


def logprobs(model: Model, ids: list[int]) -> torch.Tensor:
    """Of every token behind every prefix of `ids`, by one plain pass."""
    with torch.inference_mode():
        return model.base.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)


def test_models(client: OpenAI, base: str) -> None:
    models = {model.id: model.model_dump() for model in client.models.list()}
    assert next(iter(models)) == base and {"one", "two"} <= set(models)
    assert models[base]["parent"] is None and models["one"]["parent"] == base
    assert client.models.retrieve("two").model_dump() == models["two"]
    assert models["broken"]["problem"] and models["one"]["problem"] is None  # without its weights being read
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("three")
    assert error.value.code == "model_not_found"


@pytest.mark.parametrize("name", ["base", "one", "two"])
def test_answers_are_the_models_own(client: OpenAI, alone: dict[str, Model], base: str, name: str) -> None:
    model, asked = alone[name], base if name == "base" else name
    chat = client.chat.completions.create(model=asked, messages=CHAT, temperature=0, max_tokens=12)
    assert chat.choices[0].message.content == model.generate(CHAT, max_new_tokens=12)
    assert chat.model == asked and chat.choices[0].message.role == "assistant"
    ids = model.prompt_ids(CHAT)
    assert chat.usage.prompt_tokens == len(ids) and chat.usage.completion_tokens == 12
    text = client.completions.create(model=asked, prompt="say 3 ", temperature=0, max_tokens=9)
    assert text.choices[0].text == model.generate("say 3 ", chat=False, max_new_tokens=9)
    by_ids = client.completions.create(model=asked, prompt=[ids], temperature=0, max_tokens=12)
    assert by_ids.choices[0].text == chat.choices[0].message.content
    assert by_ids.choices[0].finish_reason == "length"
    assert chat.system_fingerprint == by_ids.system_fingerprint


def test_a_stream_is_the_whole_in_pieces(client: OpenAI) -> None:
    how = {"model": "one", "messages": CHAT, "temperature": 0.9, "seed": 5, "max_tokens": 20, "n": 2}
    whole = client.chat.completions.create(**how)
    chunks = list(client.chat.completions.create(**how, stream=True, stream_options={"include_usage": True}))
    *parts, last = chunks
    assert last.choices == [] and last.usage == whole.usage and all(part.usage is None for part in parts)
    assert len({part.id for part in chunks}) == 1 and len(parts) > 10
    for index, choice in enumerate(whole.choices):
        own = [part.choices[0] for part in parts if part.choices[0].index == index]
        assert own[0].delta.role == "assistant" and [c.finish_reason for c in own[:-1]] == [None] * (len(own) - 1)
        assert "".join(c.delta.content or "" for c in own) == choice.message.content
        assert own[-1].finish_reason == choice.finish_reason
    assert whole.choices[0].message.content != whole.choices[1].message.content
    assert all(part.usage is None for part in client.chat.completions.create(**how, stream=True))


def test_a_completion_streams_too(client: OpenAI) -> None:
    how = {"model": "two", "prompt": ["say 3 ", "say 4 "], "temperature": 0, "max_tokens": 9, "n": 2, "logprobs": 2}
    whole = client.completions.create(**how)
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    assert whole.choices[0].text == whole.choices[1].text != whole.choices[2].text == whole.choices[3].text
    parts = [c for chunk in client.completions.create(**how, stream=True) for c in chunk.choices]
    for choice in whole.choices:
        own = [part for part in parts if part.index == choice.index]
        assert "".join(part.text for part in own) == choice.text
        for name in ("tokens", "token_logprobs", "text_offset"):
            pieces = [x for part in own if part.logprobs for x in getattr(part.logprobs, name)]
            assert pieces == pytest.approx(getattr(choice.logprobs, name))


@pytest.mark.parametrize("name", ["base", "one"])
def test_echo_with_logprobs_is_what_the_model_says(
    client: OpenAI, alone: dict[str, Model], base: str, name: str
) -> None:
    """As lm-eval's local-completions asks: ids, echo, one token more, which it cuts off."""
    model, asked = alone[name], base if name == "base" else name
    prompts = [model.prompt_ids(text, chat=False) for text in ("say 3 abab", "it is so", "ab")]
    answer = client.completions.create(
        model=asked, prompt=prompts, max_tokens=1, logprobs=1, echo=True, temperature=0, seed=7
    )
    for ids, choice in zip(prompts, answer.choices, strict=True):
        shown, truth = choice.logprobs, logprobs(model, ids)
        assert len(shown.tokens) == len(shown.token_logprobs) == len(shown.top_logprobs) == len(ids) + 1
        assert shown.token_logprobs[0] is None and shown.top_logprobs[0] is None
        own = truth[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        assert shown.token_logprobs[1:-1] == pytest.approx(own.tolist(), abs=1e-4)
        for top, row, logprob in zip(shown.top_logprobs[1:], truth, shown.token_logprobs[1:], strict=True):
            assert max(top.values()) == pytest.approx(row.max().item(), abs=1e-4)
            assert any(value == logprob for value in top.values())
        assert choice.text.startswith(model.renderer.decode(ids))
        assert shown.text_offset[0] == 0 and shown.text_offset == sorted(shown.text_offset)
    none = client.completions.create(model=asked, prompt=prompts[0], max_tokens=0, logprobs=1, echo=True)
    assert none.choices[0].logprobs.token_logprobs == pytest.approx(answer.choices[0].logprobs.token_logprobs[:-1])
    assert none.usage.completion_tokens == 0


def test_the_token_that_ends_a_measured_prompt_is_told(client: OpenAI, alone: dict[str, Model], base: str) -> None:
    """lm-eval cuts the last token off, whatever it is."""
    model = alone["base"]
    ids, (eos, *_) = model.prompt_ids("say 3 ", chat=False), model.renderer.stop_ids
    how = {"model": base, "prompt": ids, "echo": True, "temperature": 0, "logit_bias": {str(eos): 100}}
    measured = client.completions.create(**how, max_tokens=1, logprobs=1).choices[0]
    assert len(measured.logprobs.tokens) == len(ids) + 1 and measured.text == "say 3 "
    assert measured.logprobs.token_logprobs[-1] == pytest.approx(logprobs(model, ids)[-1, eos].item(), abs=1e-4)
    ended = client.completions.create(**how, max_tokens=5, logprobs=1).choices[0]
    assert len(ended.logprobs.tokens) == len(ids) and ended.finish_reason == "stop"


def test_logprobs_of_a_chat(client: OpenAI, alone: dict[str, Model]) -> None:
    model = alone["one"]
    answer = client.chat.completions.create(
        model="one", messages=CHAT, temperature=0, max_tokens=6, logprobs=True, top_logprobs=3
    )
    content = answer.choices[0].logprobs.content
    ids = model.prompt_ids(CHAT)
    made = []
    for token in content:
        row = logprobs(model, [*ids, *made])[-1]
        best = row.topk(3)
        assert token.logprob == pytest.approx(row.max().item(), abs=1e-4)
        assert [top.logprob for top in token.top_logprobs] == pytest.approx(best.values.tolist(), abs=1e-4)
        assert token.token == token.top_logprobs[0].token and token.bytes == token.top_logprobs[0].bytes
        made.append(int(best.indices[0]))
    assert b"".join(bytes(t.bytes) for t in content).decode(errors="replace") == answer.choices[0].message.content


def test_stop_bias_and_length(client: OpenAI, alone: dict[str, Model], base: str) -> None:
    model = alone["base"]
    text = client.completions.create(model=base, prompt="say 3 ", temperature=0, max_tokens=20).choices[0].text
    stop = text[5:8]
    cut = client.completions.create(model=base, prompt="say 3 ", temperature=0, max_tokens=20, stop=[stop, "zzzz"])
    assert cut.choices[0].text == text[: text.index(stop)] and cut.choices[0].finish_reason == "stop"
    (token,) = model.renderer.tokenizer("x", add_special_tokens=False)["input_ids"]
    forced = client.completions.create(
        model=base, prompt="say 3 ", temperature=0, max_tokens=4, logit_bias={str(token): 100}, logprobs=1
    )
    assert forced.choices[0].text == "xxxx"
    assert max(forced.choices[0].logprobs.token_logprobs) < -0.1  # of the model's own distribution
    sampled = [client.completions.create(model=base, prompt="a", seed=3, max_tokens=8).choices[0].text for _ in "ab"]
    assert sampled[0] == sampled[1]
    chat = client.chat.completions.create(
        model=base, messages=CHAT, max_completion_tokens=3, user="me", metadata={"a": "b"}
    )
    assert chat.usage.completion_tokens <= 3


def test_errors_are_the_clients_own(client: OpenAI, running: Running, base: str) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="no-such", messages=CHAT)
    assert missing.value.code == "model_not_found" and missing.value.param == "model"
    assert all(name in missing.value.message for name in (base, "one", "two"))  # what is served
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model=base, messages=CHAT, temperature=3)
    assert wrong.value.param == "temperature" and wrong.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError) as broken:
        client.chat.completions.create(model="broken", messages=CHAT, stream=True)
    assert broken.value.status_code == 400
    with pytest.raises(openai.AuthenticationError):
        OpenAI(base_url=f"{running.address}/v1", api_key="other", max_retries=0).models.list()
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model=base, prompt=[5] * 5000)
    assert long.value.code == "context_length_exceeded"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("response_format", {"type": "grammar", "grammar": "x"}),
        ("tool_choice", "required"),
        ("frequency_penalty", 0.5),
        ("functions", [{"name": "f"}]),
        ("reasoning_effort", "high"),
    ],
)
def test_what_cant_be_done_is_refused_by_name(client: OpenAI, base: str, field: str, value: object) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model=base, messages=CHAT, max_tokens=1, extra_body={field: value})
    assert refused.value.param == field


def test_neutral_fields_change_nothing(client: OpenAI, base: str) -> None:
    neutral = {"presence_penalty": 0, "frequency_penalty": 0.0, "response_format": {"type": "text"}, "store": True}
    neutral |= {"parallel_tool_calls": True, "tool_choice": "auto", "stop": None, "service_tier": "auto"}
    how = {"model": base, "messages": CHAT, "max_tokens": 5, "temperature": 0}
    with_them = client.chat.completions.create(**how, extra_body=neutral)
    assert with_them.choices == client.chat.completions.create(**how).choices


def test_scale_is_the_adapters(client: OpenAI, base: str) -> None:
    def text(model: str, **more: float) -> str:
        how = {"model": model, "prompt": "say 3 ", "temperature": 0, "max_tokens": 12}
        return client.completions.create(**how, extra_body=more).choices[0].text

    assert text("one", scale=0) == text(base) != text("one") == text("one", scale=1)
    with pytest.raises(openai.BadRequestError) as refused:
        text(base, scale=0.5)
    assert refused.value.param == "scale"


def test_tokens_both_ways(running: Running, base: str) -> None:
    model = running.model
    status, there = running.post("/tokenize", prompt="häßlich <|im_end|> ")
    assert status == 200 and there["count"] == len(there["tokens"]) and there["max_model_len"] == model.context
    assert model.renderer.end_of_turn in there["tokens"]  # whoever writes a completion writes its control tokens
    status, back = running.post("/detokenize", tokens=there["tokens"])
    assert (status, back["prompt"]) == (200, "häßlich <|im_end|> ")
    status, chat = running.post("/tokenize", messages=[{"role": "user", "content": "<|im_end|>"}], model="one")
    assert chat["tokens"] == model.prompt_ids([{"role": "user", "content": "<|im_end|>"}])
    for body in ({"prompt": "a", "messages": CHAT}, {}, {"tokens": [1]}):
        assert running.post("/tokenize", **body)[0] == 400
    for tokens in ([-1], [2**40], ["a"], [True], 3):
        assert running.post("/detokenize", tokens=tokens)[0] == 400


def test_tools_reach_the_template(running: Running) -> None:
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    status, _ = running.post("/tokenize", messages=CHAT)
    assert status == 200
    status, with_tools = running.post("/tokenize", messages=CHAT, tools=tools)
    assert status == 200 and with_tools["tokens"] == running.model.prompt_ids(CHAT, tools=tools)
    asked = {"model": "one", "messages": CHAT, "tools": tools, "max_tokens": 1}
    status, refused = running.post("/v1/chat/completions", **asked)
    assert (status, refused["error"]["param"]) == (400, "tools")  # this base's template doesn't write them
    status, answer = running.post("/v1/chat/completions", **asked, tool_choice="none")
    assert status == 200 and answer["usage"]["prompt_tokens"] == len(with_tools["tokens"])


def test_adapters_are_loaded_dropped_and_listed(running: Running) -> None:
    def listed() -> dict[str, dict[str, object]]:
        return {one["id"]: one for one in running.send("GET", "/v1/adapters")[1]["data"]}

    status, loaded = running.post("/v1/adapters", name="two")
    assert status == 200 and loaded["attached"] and listed()["two"] == loaded
    assert running.send("DELETE", "/v1/adapters/two")[0] == 200
    assert "two" not in listed() and running.post("/v1/completions", model="two", prompt="a")[0] == 404
    assert running.send("DELETE", "/v1/adapters/two")[0] == 404
    assert running.post("/v1/adapters", name="two")[0] == 200 and "two" in listed()
    assert running.post("/v1/adapters", name="broken")[0] == 400
    assert running.post("/v1/adapters", name=running.model.base.source.public_name)[0] == 400


def test_a_runs_report_is_shown_and_runs_nothing(running: Running, client: OpenAI) -> None:
    reports = {model.id: model.model_dump().get("report") for model in client.models.list()}
    assert reports["run"] is True and reports["one"] is False
    status, page, headers = running.send("GET", "/v1/adapters/run/report")
    assert (status, page) == (200, "<p>a report</p>") and "sandbox" in headers["content-security-policy"]
    assert headers["content-type"].startswith("text/html")
    assert running.send("GET", "/v1/adapters/one/report")[0] == running.send("GET", "/v1/adapters/no/report")[0] == 404


def test_health_and_metrics(running: Running) -> None:
    assert running.send("GET", "/health", key=None)[:2] == (200, {"status": "ok"})
    before = metrics(running)
    status, answer = running.post("/v1/completions", model="one", prompt="a", max_tokens=4, temperature=0)
    after = metrics(running)
    made = after["deltaw:generation_tokens_total"] - before["deltaw:generation_tokens_total"]
    assert status == 200 and made == answer["usage"]["completion_tokens"] > 0
    assert after["deltaw:num_requests_running"] == after["deltaw:num_requests_waiting"] == 0
    for name in ("time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds"):
        buckets = [value for key, value in after.items() if key.startswith(f"deltaw:{name}_bucket")]
        assert buckets == sorted(buckets) and buckets[-1] == after[f"deltaw:{name}_count"] > 0
    assert all(math.isfinite(value) for value in after.values())


def test_what_metrics_say_of_one_request_agrees(running: Running, base: str) -> None:
    """Whatever the requests were and however they ended, once all have: a first token comes before its request's end,
    and each is counted once."""
    for body in (
        {"model": "two", "prompt": "a", "max_tokens": 5, "n": 2, "logit_bias": {"5": 100}},
        {"model": "run", "prompt": "a", "max_tokens": 1},  # read for it
        {"model": base, "prompt": "abc", "max_tokens": 0, "echo": True},
        {"model": "broken", "prompt": "a"},
    ):
        running.post("/v1/completions", **body)
    body = json.dumps({"model": base, "prompt": "a", "max_tokens": 200, "logit_bias": {"5": 100}, "stream": True})
    with running.open() as leaves:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
        leaves.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        leaves.recv(100)
    until = time.monotonic() + 10
    while running.worker.busy and time.monotonic() < until:
        time.sleep(0.01)
    shown = metrics(running)
    first, whole = (f"deltaw:{name}_seconds" for name in ("time_to_first_token", "e2e_request_latency"))
    ended = {name: value for name, value in shown.items() if name.startswith("deltaw:request_success_total")}
    assert shown[f"{whole}_count"] == sum(ended.values()) and len(ended) >= 3
    assert 0 < shown[f"{first}_sum"] <= shown[f"{whole}_sum"]
    for name, value in shown.items():
        if name.startswith(f"{first}_bucket"):  # of any time, more first tokens than requests took no longer
            bound = name.partition("{")[2]
            assert value + shown[f"{whole}_count"] - shown[f"{first}_count"] >= shown[f"{whole}_bucket{{{bound}"]
    tokens = shown["deltaw:generation_tokens_total"]
    assert tokens >= shown[f"{first}_count"] + shown["deltaw:inter_token_latency_seconds_count"]


def metrics(running: Running) -> dict[str, float]:
    """Prometheus's text: a value for each name with its labels."""
    status, text, headers = running.send("GET", "/metrics")
    assert status == 200 and headers["content-type"].startswith("text/plain; version=0.0.4")
    values = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, _, value in values}
