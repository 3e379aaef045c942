"""JSON over HTTP for asking a server: the standard library's client, with a time limit and errors that people can read.

A redirect is refused, not followed: it would take the key to another host. The key comes from $DELTAW_API_KEY, or from
the variable that a task file names for its judge, and goes nowhere else than to the address that was typed;
$OPENAI_API_KEY isn't looked at by itself, since it would be sent to whatever server is being checked. Answers are read
up to MAX_BYTES. A proxy of the environment is used as every other tool does, but for this machine's own addresses.
"""

import json
import os
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from deltaw.errors import DeltawError, InputError, RunError

KEY = "DELTAW_API_KEY"
MAX_BYTES = 2**28
SECONDS = 120.0  # for one answer; a model that is being loaded takes long
FIRST_SECONDS = 20.0  # for the first, which no model is needed for
LOCAL = ("localhost", "127.0.0.1", "::1")


class Refused(Exception):
    """The server answered with an error: its status, what it says of it, and after how many seconds it may be asked
    again, if it says so."""

    def __init__(self, status: int, words: str, again_in: float | None = None) -> None:
        self.status, self.words, self.again_in = status, words, again_in
        super().__init__(f"{status}: {words}")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


class Client:
    """Asks one server. `root` is http://host:port; paths are given whole."""

    def __init__(self, root: str, *, key: str | None = None, seconds: float = SECONDS) -> None:
        parts = urllib.parse.urlsplit(root)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(f"{root}: not the address of a server", fix="write http://host:port/v1, or …/v1#model")
        self.root, self.seconds = root.rstrip("/"), seconds
        key = key if key is not None else os.environ.get(KEY)
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        handlers: list[urllib.request.BaseHandler] = [_NoRedirect()]
        if parts.hostname in LOCAL:
            handlers.append(urllib.request.ProxyHandler({}))
        self._opener = urllib.request.build_opener(*handlers)

    def reach(self, path: str) -> Any:
        """A first answer. Raises InputError where there is none: the address was typed."""
        try:
            return self.ask(path, seconds=min(self.seconds, FIRST_SECONDS))
        except Refused as refused:
            if refused.status in (401, 403):
                raise InputError(
                    f"{self.root}: the server wants a key ({refused})", fix=f"set it in the environment: {KEY}"
                ) from None
            raise InputError(f"{self.root}{path}: {refused}", fix="is it an OpenAI-compatible server?") from None
        except DeltawError as error:
            raise InputError(error.what, fix="start the server, or check host and port") from None

    def ask(self, path: str, body: Any = None, *, seconds: float | None = None) -> Any:
        """The answer's JSON: GET without a body, else POST. Raises Refused, or RunError for no answer."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.root + path, data, self._headers)
        limit = seconds or self.seconds
        try:
            with self._opener.open(request, timeout=limit) as answer:
                return self._parsed(answer.read(MAX_BYTES + 1), path)
        except urllib.error.HTTPError as error:
            with error:
                wait = error.headers.get("Retry-After", "")
                words = _words(error.read(65_536)) or error.reason
                raise Refused(error.code, words, float(wait) if wait.isdigit() else None) from None
        except TimeoutError:
            raise RunError(f"{self.root}{path}: no answer within {limit:g} s", fix="is the server busy?") from None
        except urllib.error.URLError as error:
            if isinstance(error.reason, TimeoutError):
                raise RunError(f"{self.root}{path}: no answer within {limit:g} s", fix="is it busy?") from None
            raise RunError(f"{self.root}: can't be reached: {error.reason}") from None
        except (OSError, ValueError) as error:  # a connection that breaks off, an answer that is no HTTP
            raise RunError(f"{self.root}{path}: {type(error).__name__}: {error}") from None

    def _parsed(self, data: bytes, path: str) -> Any:
        if len(data) > MAX_BYTES:
            raise RunError(f"{self.root}{path}: the answer has more than {MAX_BYTES:,} bytes")
        try:
            return json.loads(data)
        except (ValueError, RecursionError):
            raise RunError(f"{self.root}{path}: its answer isn't JSON: {data[:80]!r}") from None


def _words(data: bytes) -> str:
    """What an error says, in OpenAI's form or another."""
    try:
        error = json.loads(data)
        error = error.get("error", error)
        words = error.get("message", error) if isinstance(error, dict) else error
    except (ValueError, AttributeError, RecursionError):
        words = data.decode("utf-8", "replace")
    return " ".join(str(words).split())[:300]
