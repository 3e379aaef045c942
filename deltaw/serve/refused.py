"""Why a request isn't answered, in OpenAI's form: a status, and `{"error": {message, type, param, code}}`.

One exception for the whole server. What a client asked wrongly is 400 (never 422), an unknown model 404, a full server
503 and a client that takes too much of it 429, both with Retry-After, which OpenAI's clients obey. Errors of the
library (errors.py) become one of these at a single place, `of_error`, which keeps the server's own paths to itself: it
says of a file what it is called and not where it lies.
"""

import re
from collections.abc import Sequence
from typing import Any

from deltaw.errors import DeltawError, InputError
from deltaw.serve.ask import Busy, Unknown

NAMED = 8  # models, in the answer to who asks for one that isn't served
PATH = re.compile(
    r"(?<![\w./])(?!/v1/)(?:/[^/\s'\":;,]+)+/(?=[^/\s'\":;,])"
)  # an absolute path (not a route), up to its last name
KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class Refused(Exception):
    """`param`: the field that is wrong, `code`: what programs tell it by. `close`: the connection can't be used again,
    since not all of the request was read."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
        headers: dict[str, str] | None = None,
        close: bool = False,
    ) -> None:
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})
        if retry_after is not None:
            self.headers["retry-after"] = str(retry_after)
        if close:
            self.headers["connection"] = "close"
        super().__init__(message)

    def to_json(self) -> dict[str, Any]:
        """The answer's body."""
        kind = KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def wrong(message: str, param: str | None = None, code: str | None = None) -> Refused:
    """A 400."""
    return Refused(400, message, param=param, code=code)


def no_model(name: object, served: Sequence[str] = ()) -> Refused:
    """A 404 for a model that isn't served, whatever its name looks like. `served`: some of those that are."""
    shown = str(name).encode("utf-8", "replace").decode()
    shown = shown if len(shown) <= 80 else shown[:79] + "…"
    some = ", ".join(served[:NAMED]) + (", …" if served[NAMED:] else "")
    return Refused(
        404,
        f"the model {shown!r} isn't served"
        + (
            f"; those that are: {some}; all of them: GET /v1/models"
            if served
            else "; GET /v1/models lists those that are"
        ),
        param="model",
        code="model_not_found",
    )


def of_error(error: DeltawError, name: object = "", served: Sequence[str] = ()) -> Refused:
    """What is answered where the library refused. `name`: the model that was asked for, and `served` as for
    `no_model`."""
    if isinstance(error, Unknown):
        return no_model(name, served)
    if isinstance(error, Busy):
        return Refused(503, str(error), code="server_busy", retry_after=error.retry_after)
    message = without_paths("; ".join(filter(None, (error.what, error.fix))))
    return wrong(message) if isinstance(error, InputError) else Refused(500, message)


def without_paths(text: str) -> str:
    """The text with no more of an absolute path than its last name."""
    return PATH.sub("", text)
