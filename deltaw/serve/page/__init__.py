"""The page at `/`: a base and its adapters side by side on the same prompt.

Plain files, as they are written: no build, no library, nothing from another origin. What the page shows was written by
models, adapters and strangers, so a policy stands behind its code, which makes text nodes alone:

    script, style   from this origin's files; nothing inline runs, and no string becomes HTML (trusted types: none)
    connections     to this origin alone: an API key that is typed in can't be sent elsewhere
    frames, forms   none: no other site shows the page within its own

They are read once and have an ETag: a browser asks each time and is told "as before", so that a new version is never
mixed with old files. Where the server wants a key, the guard asks the browser for it before it gives the page, and the
browser sends it along from then on; the page has a field of its own for when the API answers 401 nevertheless.
"""

import hashlib
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Cache-Control": "no-cache",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
SCRIPTS = ("page", "dom", "figures", "remember", "server", "settings", "theme", "tokens")
FILES = {  # address -> file
    "/": "index.html",
    **{f"/page/{name}": name for name in ("page.css", "icon.svg")},
    **{f"/page/{name}.js": f"{name}.js" for name in SCRIPTS},
}


def routes() -> list[Route]:
    """The page's addresses, to stand before the API's."""
    return [_route(path, name) for path, name in FILES.items()]


def _route(path: str, name: str) -> Route:
    body = files(__package__).joinpath(name).read_bytes()
    tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
    headers = {**HEADERS, "ETag": tag}

    async def give(request: Request) -> Response:
        known = request.headers.get("If-None-Match", "")
        if tag in (one.strip().removeprefix("W/") for one in known.split(",")):
            return Response(status_code=304, headers=headers)
        return Response(body, headers=headers, media_type=TYPES[name.rpartition(".")[2]])

    return Route(path, give)
