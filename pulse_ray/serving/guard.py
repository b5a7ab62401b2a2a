"""What stands before the API: bearer tokens, and a limit on bodies that holds however they arrive."""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Sequence
from pathlib import Path

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pulse_ray.config import ServeConfig
from pulse_ray.errors import ConfigError

GUARDED = "/v1/"
"""Paths below it need a token. Probes, metrics, the schema and the page itself hold nothing of users."""

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def token_digests(config: ServeConfig) -> tuple[str, ...]:
    """SHA-256 of each token in the configured file and environment variable; none leaves the API open.

    Only digests leave the process that reads the tokens.

    Raises:
        ConfigError: the file cannot be read, or holds no token, or a token is not ASCII.
    """
    found = os.environ.get(config.tokens_env, "").split()
    if config.tokens_file is not None:
        try:
            lines = Path(config.tokens_file).expanduser().read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"cannot read serve.tokens_file {config.tokens_file}: {error}", remedy="One token a line, in UTF-8"
            ) from error
        listed = [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
        if not listed:
            raise ConfigError(
                f"serve.tokens_file {config.tokens_file} holds no token",
                remedy="Write one token a line, or unset serve.tokens_file",
            )
        found += listed
    if not all(token.isascii() for token in found):
        raise ConfigError("a token holds other characters than ASCII, which no header brings", remedy="Change it")
    return tuple(sorted({_digest(token) for token in found}))


def check_host(host: str, digests: Sequence[str]) -> None:
    """Without tokens, nobody but this machine may reach the API.

    Raises:
        ConfigError: the host is another one and there are no tokens.
    """
    if not digests and host not in LOOPBACK:
        raise ConfigError(
            f"serve.host is {host}, but there are no tokens: anybody could ask",
            remedy="Set serve.tokens_file or the variable in serve.tokens_env, or serve on 127.0.0.1",
        )


class Guard:
    """ASGI middleware: 401 without a token, 413 for a body above the limit, headers that close every answer.

    A body is read here, before anything parses it, and no further than the limit: its length need not be declared.

    Args:
        digests: of the tokens, as from `token_digests`; none lets everybody in.
        limit: bytes of a body.
    """

    def __init__(self, app: ASGIApp, digests: Sequence[str], limit: int) -> None:
        self.app, self.digests, self.limit = app, tuple(digests), limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        send = _closed(scope["path"], send)
        headers = Headers(scope=scope)
        if scope["path"].startswith(GUARDED) and not self._known(headers.get("authorization", "")):
            refusal = _refusal(401, "a bearer token is needed: Authorization: Bearer …")
            refusal.headers["WWW-Authenticate"] = "Bearer"
            await refusal(scope, receive, send)
            return
        body = await self._body(headers, receive)
        if body is None:
            await _refusal(413, f"the body is larger than {self.limit} bytes")(scope, receive, send)
            return
        sent = False

        async def replay() -> Message:
            nonlocal sent
            if sent:
                return await receive()
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, replay, send)

    def _known(self, header: str) -> bool:
        if not self.digests:
            return True
        scheme, _, token = header.partition(" ")
        given = _digest(token.strip())
        # Every digest is compared, so that the time taken tells nothing.
        found = [hmac.compare_digest(given, digest) for digest in self.digests]
        return scheme.lower() == "bearer" and any(found)

    async def _body(self, headers: Headers, receive: Receive) -> bytes | None:
        """The whole body, or None where it is too large."""
        declared = headers.get("content-length", "")
        if declared.isascii() and declared.isdecimal() and len(declared) < 20 and int(declared) > self.limit:
            return None
        body = bytearray()
        more = True
        while more:
            message = await receive()
            body += message.get("body", b"")
            if len(body) > self.limit:
                return None
            more = message["type"] == "http.request" and message.get("more_body", False)
        return bytes(body)


def _closed(path: str, send: Send) -> Send:
    """Sends answers that no browser takes for something else, and of users none that a cache keeps."""

    async def send_closed(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers["X-Content-Type-Options"] = "nosniff"
            if path.startswith(GUARDED):
                headers["Cache-Control"] = "no-store"
        await send(message)

    return send_closed


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def _refusal(status: int, message: str) -> JSONResponse:
    return JSONResponse({"message": message, "fields": []}, status_code=status)
