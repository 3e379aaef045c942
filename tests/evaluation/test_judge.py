"""A judge: what counts as a score, what is tried again, and where the key goes."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from deltaw.config.tasks import JudgeConfig
from deltaw.errors import InputError, RunError
from deltaw.evaluation import judge as judging
from deltaw.evaluation.judge import Judge, score_in
from deltaw.evaluation.metrics import Answer

ROW = Answer("2 + 2? {answer}", "four", "4 {prompt}", "rows:1")


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("7", 7), ("**7/10**", 7), ("Score: 7 out of 10.", 7), ("2 faults, so\n\nScore: 8\n", 8), ("0", 0),
        ("7.5", 7.5), ("", None), ("good", None), ("11", None), ("-1", None), ("between 6 and 7", None), ("10/10", 10), 
        ("7/5", None),
    ],
)  # fmt: skip
def test_what_counts_as_a_score(reply: str, score: float | None) -> None:
    assert score_in(reply, 10) == score


class Endpoint:
    """A server that gives one answer after the other: a reply, or (status, words, headers)."""

    def __init__(self) -> None:
        self.script: list[Any] = []
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                endpoint.keys.append(self.headers.get("Authorization"))
                endpoint.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                answer = endpoint.script.pop(0) if endpoint.script else "5"
                status, words, headers = answer if isinstance(answer, tuple) else (200, answer, {})
                body = (
                    {"choices": [{"message": {"content": words}}]} if status == 200 else {"error": {"message": words}}
                )
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(json.dumps(body).encode())

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    monkeypatch.setenv("A_KEY", "secret")
    monkeypatch.setattr(judging.time, "sleep", lambda seconds: waits.append(seconds))
    waits.clear()
    endpoint = Endpoint()
    yield endpoint
    endpoint.server.shutdown()
    endpoint.server.server_close()


waits: list[float] = []


def test_it_is_asked_again_where_that_may_help(endpoint: Endpoint) -> None:
    judge = Judge(JudgeConfig(url=endpoint.url, model="m", key="A_KEY"))
    endpoint.script = [(429, "busy", {"Retry-After": "3"}), (503, "busy", {}), "8/10"]
    judged = judge.score(ROW)
    assert judged.score == 0.8 and waits == [3, 2] and set(endpoint.keys) == {"Bearer secret"}
    text = endpoint.asked[0]["messages"][0]["content"]
    assert "2 + 2? {answer}" in text and "4 {prompt}" in text and "four" in text  # nothing is filled in twice
    endpoint.script = [(429, "busy", {"Retry-After": "99999"})] * 9
    with pytest.raises(RunError):
        judge.score(ROW)
    assert len(endpoint.asked) == 3 + judging.TRIES and max(waits) <= judging.LONGEST_WAIT


def test_what_it_refuses_ends_it(endpoint: Endpoint) -> None:
    judge = Judge(JudgeConfig(url=endpoint.url, model="m", key="A_KEY"))
    endpoint.script = [(401, "no", {})]
    with pytest.raises(RunError, match="A_KEY") as refused:
        judge.score(ROW)
    assert "secret" not in str(refused.value) and len(endpoint.asked) == 1


def test_newer_models_limits_have_another_name(endpoint: Endpoint) -> None:
    judge = Judge(JudgeConfig(url=endpoint.url, model="m", key="A_KEY", max_new_tokens=9))
    endpoint.script = [(400, "use max_completion_tokens instead of max_tokens", {}), (400, "no temperature", {}), "3"]
    assert judge.score(ROW).score == 0.3
    assert endpoint.asked[-1].keys() == {"model", "messages", "max_completion_tokens"}


def test_no_score_is_none_and_not_a_zero(endpoint: Endpoint) -> None:
    judge = Judge(JudgeConfig(url=endpoint.url, model="m", key="A_KEY"))
    endpoint.script = ["well", "3 or 4"]
    judged = judge.score(ROW)
    assert judged.score is None and judged.reply == "3 or 4"
    rows = {str(n): ROW for n in range(7)}
    assert {name: one.score for name, one in judge.score_all(rows)} == dict.fromkeys(rows, 0.5)


def test_a_key_that_is_named_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DELTAW_API_KEY", raising=False)
    Judge(JudgeConfig(url="http://127.0.0.1:1/v1", model="m"))  # a server of one's own wants none
    with pytest.raises(InputError, match="NO_SUCH_KEY"):
        Judge(JudgeConfig(url="http://127.0.0.1:1/v1", model="m", key="NO_SUCH_KEY"))
    for wrong in ({"key": "sk-12"}, {"prompt": "how good?"}, {"url": "http://u:p@host/v1"}, {"url": "host"}):
        with pytest.raises(InputError):
            JudgeConfig(**{"url": "http://h/v1", "model": "m", **wrong})


def test_a_judge_that_is_not_there_is_known_before_a_model_answers(endpoint: Endpoint) -> None:
    there = Judge(JudgeConfig(url=endpoint.url, model="m"))
    assert there.check() == "" and not endpoint.asked  # it lists no models, and needn't
    endpoint.server.server_close()
    endpoint.server.shutdown()
    with pytest.raises(InputError):
        there.check()
