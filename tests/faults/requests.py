"""What a hostile client asks a server for: names that are paths (55), numbers that are none or too large (56), bodies
that are no plain object (57), a wrong key (62), templates, patterns and paths to be used (63).

Each is refused in OpenAI's form, soon, without memory, and an honest request is answered as before.
"""

import gzip
import hmac
import json
import math
import random
import re
from base64 import b64encode
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

import deltaw
from deltaw.serve import guard
from tests.faults.common import changed
from tests.faults.fault import expect, fault
from tests.faults.fuzz import mutated
from tests.faults.served import ADAPTERS, CHAT, HELLO, KEY, SECRET, TEXT, Answer, Served, opens_only, served, soon

T = TypeVar("T")
SERVED = {"one", "two", "broken"}  # names that are adapters

NAME_PIECES = (
    *"./\\%~$*?:;& \0\n\t'\"<>|#", "..", "../", "/..", "one", "two", "broken", "outside", "link", "loop", "etc/passwd",
    "%2e%2e", "%2f", "%252e", "%00", "\u2025", "\u2215", "\uff0e", "\ud800", "C:", "file://", "adapter", "secret.txt",
    "/proc/self/environ", "{0.__class__}", "{{7*7}}", "$HOME", "~root", "a" * 300, "a" * 10_000, "é",
)  # fmt: skip


def watched(work: Callable[[], T]) -> T:
    """It opens nothing but what is served and deltaw's own files."""
    with opens_only(served().folder, Path(deltaw.__file__).parent):
        return work()


def name_of(n: int) -> str:
    """A name that leads somewhere else, of one to six pieces."""
    chance = random.Random(n)
    return "".join(chance.choice(NAME_PIECES) for _ in range(chance.choice((1, 2, 2, 3, 4, 6))))


def ask_for(server: Served, name: str, n: int) -> tuple[Answer, set[int]]:
    """A request for this name by one of the ways that there are, and how a name that isn't one is refused."""
    way = n % 6
    if way == 0:
        return server.post(TEXT, model=name, prompt="a", max_tokens=1), {404}
    if way == 1:
        return server.post(CHAT, model=name, messages=HELLO, max_tokens=1), {404}
    if way == 2:
        return server.post(ADAPTERS, name=name), {404}
    address = quote(name.encode("utf-8", "surrogatepass"), safe="/" if n % 7 == 0 else "")
    path = (f"/v1/models/{address}", f"{ADAPTERS}/{address}", f"{ADAPTERS}/{address}/report")[way - 3]
    return server.send("DELETE" if way == 4 else "GET", path), {404, 405}


@fault(
    55,
    "a model's name that is a path, an encoded one, a link or 10 kB long, by six routes: 404, within 50 ms; no file "
    "outside of the folder is opened",
    tries=10_000,
    sample=120,
    at_once=2_500,
)
def name_is_path(n: int, scratch: Path) -> None:
    server, name = served(), name_of(n)
    answer, refusals = soon(scratch, lambda: watched(lambda: ask_for(server, name, n)))
    expect(SECRET.encode() not in answer.body, "it shows what lies outside")
    if name in SERVED or (not name and n % 6 == 3):  # /v1/models/ is no name at all
        if name in SERVED and n % 6 == 4 and answer.status == 200:
            expect(server.post(ADAPTERS, name=name).status in (200, 400), "it doesn't come back")
        return
    # An address of two names is the route of the first one's report, or a list's with an empty name.
    known = n % 7 == 0 and n % 6 > 2 and any(part in SERVED for part in re.split("[/?#]", name))
    if answer.status == 307:  # to the same address without its last slash
        expect(urlsplit(answer.headers["location"]).netloc == "localhost", answer.headers)
    elif not known:
        answer.refused(*refusals)


# 56


HUGE: tuple[Any, ...] = (-1, 2**31, 2**63, 2**64, 10**400, 1e308, -1e308, math.nan, math.inf, -math.inf)
OTHERS: tuple[Any, ...] = ("1", "", True, False, [], {}, [1], {"a": 1}, [[]], "NaN", "0x10", "١")
FRACTIONS: tuple[Any, ...] = (0.5, -0.5, 1.5, 1e-320)


def _whole(low: float, high: float) -> Any:
    return lambda value: type(value) is int and low <= value <= high


def _number(low: float, high: float) -> Any:
    return lambda value: type(value) in (int, float) and low <= value <= high


def _rule(server: Served, route: str) -> dict[str, Any]:
    """What each field may be, by the documentation and not by the code."""
    limits = server.limits
    count = {"n": _whole(1, 16), "seed": _whole(-(2**63), 2**63 - 1), "top_k": _whole(0, 2**31 - 1)}
    number = {
        "temperature": _number(0, 2),
        "top_p": _number(0, 1),
        "scale": lambda v: type(v) in (int, float) and v == 1,
    }
    penalties = {
        name: lambda v: type(v) in (int, float) and v == 0 for name in ("presence_penalty", "frequency_penalty")
    }
    text = {"max_tokens": _whole(1, limits.context), "logprobs": _whole(0, 20)}
    text |= {"best_of": lambda v: type(v) in (int, float) and v == 1}
    chat = {"max_completion_tokens": _whole(1, limits.context), "top_logprobs": _whole(0, 20)}
    return {**count, **number, **penalties, **(text if route == TEXT else chat)}


LARGE: tuple[tuple[str, Any], ...] = (
    ("stop", ["a"] * 17), ("stop", "a" * 201), ("stop", [""]), ("stop", [1]), ("stop", ["a"] * 50_000), ("stop", {}),
    ("prompt", ["a"] * 65), ("prompt", []), ("prompt", ""), ("prompt", [[]]), ("prompt", [1, "a"]), ("prompt", [True]),
    ("prompt", [10**6]), ("prompt", [-1]), ("prompt", [2**63]), ("prompt", [5] * 256), ("prompt", [[5] * 300] * 64),
    ("prompt", "ab" * 200), ("prompt", "ab" * 100_000), ("prompt", {"a": 1}), ("prompt", [1.5]), ("prompt", None),
    ("prompt", ["a", *[1] * 50_000]), ("prompt", "\ud800"),
    ("logit_bias", {"1": 101}), ("logit_bias", {"-1": 1}), ("logit_bias", {"1e3": 1}), ("logit_bias", {"999999": 1}),
    ("logit_bias", {"1": True}), ("logit_bias", {str(i): 1 for i in range(2_000)}), ("logit_bias", [1]),
    ("logit_bias", {"1": "1"}), ("logit_bias", {"": 1}),
)  # fmt: skip


def odd(n: int, rules: Sequence[str]) -> dict[str, Any]:
    """One to three fields with a value of the list, or a number of any size."""
    chance = random.Random(n)
    values: list[Any] = [*HUGE, *OTHERS, *FRACTIONS, 0]
    fields = {}
    for name in chance.sample(list(rules), chance.choice((1, 1, 1, 2, 3))):
        sized = chance.choice((-1, 1)) * int(2 ** chance.uniform(5, 200))
        fields[name] = chance.choice([*values, sized, float(sized)])
    return fields


@fault(
    56,
    "n, best_of, max_tokens, logprobs and the like at 0, -1, 2^31, 2^63, 1e308, NaN, as a text or as true; too many "
    "stop texts, prompts, biases: 400 that names one of them, within 50 ms, memory flat",
    tries=10_000,
    sample=150,
    at_once=2_500,
)
def odd_numbers(n: int, scratch: Path) -> None:
    server, route = served(), TEXT if n % 3 else CHAT
    rules = _rule(server, route)
    if n % 10 == 0:
        name, value = LARGE[n // 10 % len(LARGE)]
        route, fields, wrong = TEXT, {name: value}, {name}
    else:
        fields = odd(n, list(rules))
        wrong = {name for name, value in fields.items() if not rules[name](value)}
    small = {"model": server.base, "prompt": "a", "max_tokens": 1}
    if route == CHAT:
        small = {"model": server.base, "messages": HELLO, "logprobs": True}
        small |= {} if "max_completion_tokens" in fields else {"max_completion_tokens": 1}
    if wrong:
        body = json.dumps({**small, **fields}).encode()
        error = soon(scratch, lambda: server.send("POST", route, body)).refused(400)
        unreadable = any(value != value or value in (math.inf, -math.inf, 10**400) for value in fields.values())
        named = error["param"] is None if error["param"] is None else error["param"].split(".")[0] in wrong
        expect(named and (error["param"] or unreadable or "prompt" in wrong), (fields, error))
    elif not {"max_tokens", "max_completion_tokens"} & set(fields):
        expect(server.post(route, **{**small, **fields}).status == 200, fields)


# 57, what is in a request; how it comes is in clients.py

BODY_PIECES = (
    b"", b"\x00", b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b'"', b"{", b"}", b"[", b"]", b",", b":", b"\\u0000",
    b"\\ud800",
    b"1e999", b"-0", b"NaN", b"Infinity", b"null", b"true", b'"n":', b'"prompt":', b'"model":"two",', b'"stop":["a"],',
    b"[" * 500, b'{"a":' * 500, b"9" * 5_000, b" " * 5_000, b"\xef\xbb\xbf", b"//", b"/*",
)  # fmt: skip
HONEST = json.dumps(
    {
        "model": "one",
        "prompt": "say 3",
        "max_tokens": 2,
        "stop": ["x"],
        "seed": 1,
        "logit_bias": {"5": 1.5},
        "user": "u",
    }
).encode()


@fault(
    57,
    "a request's JSON with one to four mutations (depth, keys twice, invalid UTF-8, NaN, cut off): an answer or a 400, "
    "and no error of the server's own",
    tries=10_000,
    sample=150,
    at_once=2_500,
)
def mutated_body(n: int, scratch: Path) -> None:
    server = served()
    body = mutated(HONEST, n, len(HONEST), BODY_PIECES)
    answer = server.send("POST", TEXT, body)
    if answer.status == 200:
        fields = json.loads(body)  # whoever takes it has read what everybody reads
        expect(type(fields) is dict and answer.value["model"] == fields["model"], body)
    else:
        answer.refused(400, 404)


def nested(depth: int, kind: int) -> bytes:
    """JSON of this depth in a field that is ignored."""
    left, right = ((b"[", b"]"), (b'{"a":', b"}"))[kind]
    return b'{"model":"one","prompt":"a","max_tokens":1,"metadata":' + left * depth + b"1" + right * depth + b"}"


def body_of(n: int) -> tuple[bytes, list[tuple[str, str]], int]:
    """A body, its headers, and the status that it must have."""
    chance, kind = random.Random(n), n % 6
    if kind == 0:
        size = chance.randrange(10**6, 10**7)
        how = chance.choice(("gzip", "deflate", "br", "zstd", "gzip, gzip", "GZIP", "x-gzip"))
        return gzip.compress(b" " * size, 1), [("content-encoding", how)], 415
    if kind == 1:
        return b'{"model":"one","prompt":"' + b"a" * chance.randrange(2**20, 2**22) + b'"}', [], 413
    if kind == 2:
        return HONEST, [("content-length", str(chance.choice((2**20 + 1, 10**12, 10**400))))], 413
    if kind == 3:
        depth = chance.choice((60, 62, 63, 64, 65, 200, 5_000, 100_000))
        return nested(depth, n // 6 % 2), [], 200 if depth < 64 else 400
    if kind == 4:
        name = chance.choice(("model", "prompt", "max_tokens", "seed"))
        return HONEST[:-1] + f',"{name}":1}}'.encode(), [], 400
    at = chance.randrange(len(HONEST))
    return HONEST[:at] + chance.choice((b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf8")) + HONEST[at:], [], 400


@fault(
    57,
    "a bomb in gzip, a body over the limit or said to be, JSON nested up to 100,000 deep, keys twice, invalid UTF-8: "
    "415, 413 or 400",
    tries=1_200,
    sample=24,
    at_once=300,
)
def hostile_body(n: int, scratch: Path) -> None:
    server = served()
    body, headers, status = body_of(n)
    answer = server.send("POST", TEXT, body, headers=headers)
    if status == 200:
        expect(answer.status == 200, answer.body[:200])
    else:
        answer.refused(status)


# 62

KEYS = (
    "",
    " ",
    KEY[:-1],
    KEY[1:],
    KEY + "x",
    KEY.upper(),
    KEY * 2,
    "é",
    "\xff" * 40,
    "null",
    "Bearer",
    "\t",
    "x" * 12_000,
)


def routes(server: Served) -> list[tuple[str, str]]:
    """Every route that the router lists, with every method, and some that it doesn't."""
    paths = [(method, route.path) for route in server.app.routes for method in route.methods or ("GET", "POST")]
    paths += [("GET", "/no/such"), ("OPTIONS", TEXT), ("TRACE", TEXT), ("GET", "/health/"), ("GET", "//health")]
    paths += [("GET", "/HEALTH"), ("GET", "/v1/../health"), ("PUT", "/x"), ("GET", "/%68ealth/x"), ("POST", "/docs")]
    return [(method, re.sub(r"{.*?}", "one", path)) for method, path in paths]


def authorization(chance: random.Random) -> list[tuple[str, str]]:
    """A header that doesn't hold the key, or none."""
    key = chance.choice([*KEYS, "".join(chance.choice(KEY) for _ in range(chance.randrange(40)))])
    basic = b64encode(f"any:{key}".encode()).decode()
    ways = (f"Bearer {key}", key, f"Basic {basic}", f"Basic {key}", f"Token {KEY}", f"Bearer\t{KEY}", KEY)
    value = chance.choice(ways)
    others = [("x-api-key", KEY), ("api-key", KEY), ("cookie", f"key={KEY}"), ("proxy-authorization", f"Bearer {KEY}")]
    more = [("x-forwarded-for", "127.0.0.1"), ("x-original-url", "/health"), ("x-http-method-override", "GET")]
    return [*([("authorization", value)] if chance.random() < 0.9 else []), *chance.sample(others + more, 2)]


@fault(
    62,
    "a missing, wrong, cut or oddly sent key on every route that the router lists, by every method: 401 for all but "
    "/health; two hashes of one length are compared in constant time",
    tries=5_000,
    sample=150,
    at_once=1_250,
)
def wrong_key(n: int, scratch: Path) -> None:
    server, chance = served(), random.Random(n)
    paths = routes(server)
    method, path = paths[n % len(paths)]
    headers, compared = authorization(chance), list[tuple[int, int]]()

    def spy(one: bytes, other: bytes) -> bool:
        compared.append((len(one), len(other)))
        return hmac.compare_digest(one, other)

    spying = type("hmac", (), {"compare_digest": staticmethod(spy)})
    with changed(guard, "hmac", spying):
        query = chance.choice(("", f"?key={KEY}", f"?api_key={KEY}"))
        answer = server.send(method, path + query, HONEST, headers=headers, key=None)
    if path == "/health" and method in ("GET", "HEAD"):
        expect(answer.status == 200, answer.status)
        return
    expect(answer.status == (405 if path == "/health" else 401), f"{method} {path}: {answer.status}")
    if path != "/health":
        expect(compared == [(32, 32)] and "www-authenticate" in answer.headers, compared)
        expect(answer.refused(401)["code"] == "invalid_api_key", "another error")


# 63

FIELDS = (
    "chat_template", "chat_template_kwargs", "guided_regex", "guided_json", "guided_grammar", "guided_choice",
    "guided_decoding_backend", "structured_outputs", "regex", "grammar", "json_schema", "lora_path", "lora_request",
    "adapter", "adapter_path", "path", "file", "template", "logits_processors", "tokenizer", "mm_processor_kwargs",
    "documents", "add_generation_prompt", "continue_final_message", "skip_special_tokens", "extra_body", "cache_salt",
    "__class__", "__init__", "model_config", "model_fields", "self", "cls",
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    "{{ cycler.__init__.__globals__.os.popen('touch CANARY').read() }}", "{{ 'a' * 10**9 }}", "(a+)+$" * 50,
    "(" * 5_000,
    "/etc/passwd", "../outside", {"template": "{{ 7*7 }}"}, {"enable_thinking": True}, ["os.system", "touch CANARY"],
    {"type": "object"}, True, 1, 'root ::= "a" root', "__import__('os').system('touch CANARY')",
)  # fmt: skip


@fault(
    63,
    "templates, patterns, grammars, paths and code under every name that servers know them by, by three routes: 400 "
    "that names the field, within 50 ms; nothing is rendered, matched, opened or run",
    tries=1_500,
    sample=60,
    at_once=500,
)
def template_in_request(n: int, scratch: Path) -> None:
    server, field = served(), FIELDS[n % len(FIELDS)]
    canary = scratch / f"canary-{n}"
    value = json.loads(json.dumps(VALUES[n // len(FIELDS) % len(VALUES)]).replace("CANARY", str(canary)))
    path, asked = (
        (CHAT, {"model": "one", "messages": HELLO, "max_tokens": 1}),
        (TEXT, {"model": "one", "prompt": "a", "max_tokens": 1}),
        ("/tokenize", {"prompt": "a"}),
    )[n % 3]
    error = soon(
        scratch, lambda: watched(lambda: server.send("POST", path, json.dumps({**asked, field: value}).encode()))
    ).refused(400)
    expect(error["param"] == field and not canary.exists(), error)


@fault(
    63,
    "the same inside what a template is given (messages, tools, a user's name): text like any other, and no code",
    tries=len(VALUES) * 4,
    sample=8,
    at_once=100,
)
def template_in_message(n: int, scratch: Path) -> None:
    server, value = served(), VALUES[n % len(VALUES)]
    canary = scratch / f"canary-{n}"
    text = (value if isinstance(value, str) else json.dumps(value)).replace("CANARY", str(canary))[:100]
    tool = {"type": "function", "function": {"name": "f", "description": text, "parameters": {}}}
    messages, more = (
        ([{"role": "user", "content": text}], {}),
        ([{"role": "system", "content": text}, *HELLO], {}),
        (HELLO, {"tools": [tool]}),
        ([{"role": "user", "content": "hello", "name": text}], {}),
    )[n // len(VALUES)]
    answer = server.post("/tokenize", messages=messages, **more)
    if answer.status == 200:
        shown = server.post("/detokenize", tokens=answer.value["tokens"]).value["prompt"]
        expect(n // len(VALUES) > 1 or text in shown, f"{text!r} became {shown!r}")
    else:
        answer.refused(400)
    expect(not canary.exists(), "it was run")
