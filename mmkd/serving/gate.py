"""The gate before the service: who may enter, how much a request may hold, how long it may take, what is logged.

The gate reads bodies itself, so that a body beyond the limit is refused when its first excess byte arrives and not
after it has been read. It cancels the work of a client that hangs up. Its log names the route and never the query
string, a file, or anything that a user sends.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from base64 import b64decode
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

ACCESS, LOG = logging.getLogger("mmkd.serving.access"), logging.getLogger("mmkd.serving")
OPEN_PATHS = ("/livez", "/readyz")  # answered without a key: they state nothing but health
INTERFACE = "/v1/"
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
SECURITY_HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' data: blob:; font-src 'self' data:; "
    "style-src 'self' 'unsafe-inline'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; worker-src 'self' blob:; "
    "connect-src 'self'; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}
CACHED = ("/assets/", "/static/")  # of the page: the same for everybody
MEBIBYTE = 1024**2


@dataclass(frozen=True)
class Limits:
    """What requests may take.

    Attributes:
        body_bytes: of one request.
        held_bytes: of the bodies of all requests that are in work.
        items: images and texts of one request.
        seconds: of one request, from its first byte to the answer.
        waiting: images and texts of all requests that wait for the model.
    """

    body_bytes: int = 32 * MEBIBYTE
    held_bytes: int = 512 * MEBIBYTE
    items: int = 64
    seconds: float = 30.0
    waiting: int = 512


class RequestError(Exception):
    """A request that cannot be answered, in the form of OpenAI's errors."""

    def __init__(
        self, status: int, message: str, code: str, param: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        """Describe the error.

        Args:
            status: of HTTP.
            message: what came, what is allowed, what to do.
            code: machine-readable name of the error.
            param: the place in the request.
            headers: of the answer.
        """
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.headers = status, message, code, param, headers

    def response(self) -> JSONResponse:
        """The answer."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        content = {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}
        return JSONResponse(content, self.status, self.headers)


def overloaded(message: str) -> RequestError:
    """A 503 response with ``Retry-After``."""
    return RequestError(503, f"{message}; try again later", "overloaded", headers={"Retry-After": "1"})


def internal_error() -> RequestError:
    """A 500 response without the cause, which may hold what other users sent."""
    return RequestError(500, "the request failed in the service; its log names the kind of error", "internal_error")


class Gate:
    """Middleware around the application."""

    def __init__(
        self,
        app: ASGIApp,
        limits: Limits,
        key: bytes | None,
        hosts: Sequence[str],
        routes: Sequence[str],
        page_paths: Sequence[str],
        observe: Callable[[str, int, float], object],
        frame_ancestors: Sequence[str] = (),
    ) -> None:
        """Wrap the application.

        Args:
            app: the application.
            limits: of requests.
            key: that clients must send; None for none.
            hosts: allowed names in the header ``Host``; empty for any.
            routes: paths of the interface.
            page_paths: paths of the page; those that end in a slash stand for all below them.
            observe: called with route, status and seconds of every request.
            frame_ancestors: web sites that may show the page in a frame.
        """
        self.app, self.limits, self.key, self.hosts = app, limits, key, frozenset(hosts)
        self.routes, self.page_paths, self.observe = frozenset(routes), tuple(page_paths), observe
        self.held = 0
        self.headers = dict(SECURITY_HEADERS)
        self.headers["content-security-policy"] += "".join(f" {site}" for site in frame_ancestors)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        began, route, status = time.monotonic(), self._route(scope["path"]), 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in self.headers.items():
                    if name != "cache-control" or not scope["path"].startswith(CACHED):
                        headers.setdefault(name, value)
            await send(message)

        try:
            self._admit(scope, route)
            await self._serve(scope, receive, answer, began)
        except RequestError as error:
            if not status:
                await error.response()(scope, receive, answer)
        except Exception as error:  # the last resort of a server: answer, and stay up
            LOG.error("%s %s failed: %s", scope["method"], route, type(error).__name__)
            LOG.debug("its cause", exc_info=error)
            if not status:
                await internal_error().response()(scope, receive, answer)
        finally:
            seconds = time.monotonic() - began
            self.observe(route, status or 499, seconds)  # 499: the client left before its answer
            level = logging.DEBUG if route == "page" and status < 400 else logging.INFO
            ACCESS.log(level, "%s %s %d %.0f ms", scope["method"], route, status or 499, 1000 * seconds)

    def _route(self, path: str) -> str:
        """The known path, or a word for it: paths of the page may hold names of files."""
        if path in self.routes:
            return path
        is_page = any(
            path == known or (known.endswith("/") and known != "/" and path.startswith(known))
            for known in self.page_paths
        )
        return "page" if is_page else "unknown"

    def _admit(self, scope: Scope, route: str) -> None:
        """Refuse strangers, foreign names and unknown paths.

        Raises:
            RequestError: 401, 404 or 421.
        """
        headers = Headers(scope=scope)
        if self.hosts and _host_name(headers.get("host", "")) not in self.hosts:
            message = "the header Host names another machine; `mmkd serve --names NAME` allows it"
            raise RequestError(421, message, "unknown_host")
        if self.key is not None and route not in OPEN_PATHS and not self._has_key(headers.get("authorization", "")):
            challenge = {"WWW-Authenticate": 'Basic realm="mmkd", charset="UTF-8"'}
            message = "send the key of this service in the header `Authorization: Bearer KEY`"
            raise RequestError(401, message, "invalid_api_key", headers=challenge)
        if route == "unknown":
            raise RequestError(404, f"no such path; allowed: {', '.join(sorted(self.routes))}", "not_found")

    def _has_key(self, authorization: str) -> bool:
        """Whether a header holds the key: as a bearer token, or as the password of a browser's dialog."""
        scheme, _, credentials = authorization.partition(" ")
        given = credentials.strip().encode()
        if scheme.lower() == "basic":
            try:
                given = b64decode(given, validate=True).partition(b":")[2]
            except ValueError:
                return False
        assert self.key is not None
        return scheme.lower() in ("basic", "bearer") and hmac.compare_digest(given, self.key)

    async def _serve(self, scope: Scope, receive: Receive, send: Send, began: float) -> None:
        """Read the body and run the application.

        Raises:
            RequestError: 408, 413, 503 or 504.
        """
        body = _Body(self, Headers(scope=scope).get("content-length"))
        try:
            try:
                content = await asyncio.wait_for(body.read(receive), self.limits.seconds)
            except asyncio.TimeoutError:
                late = f"the body did not arrive within {self.limits.seconds:g} s"
                raise RequestError(408, late, "timeout", headers={"Connection": "close"}) from None
            if content is None:
                return
            replay = _Replay(content, receive)
            if not scope["path"].startswith(INTERFACE):
                await self.app(scope, replay, send)
                return
            left = self.limits.seconds - (time.monotonic() - began)
            await _until_gone(self.app(scope, replay, send), receive, replay, left, self.limits.seconds)
        finally:
            self.held -= body.size


class _Body:
    """The body of one request, whose size counts as held by the gate until the request ends."""

    def __init__(self, gate: Gate, announced: str | None) -> None:
        self.gate, self.size = gate, 0
        if announced is not None and announced.isdecimal():
            self._check(int(announced))

    def _check(self, size: int) -> None:
        limits = self.gate.limits
        if size > limits.body_bytes:
            message = f"the body has more than {limits.body_bytes} bytes; send fewer or smaller images at a time"
            raise RequestError(413, message, "too_large", headers={"Connection": "close"})
        if self.gate.held + size - self.size > limits.held_bytes:
            raise overloaded("the bodies of other requests fill the memory")

    async def read(self, receive: Receive) -> bytes | None:
        """The whole body; None where the client hangs up before its end."""
        chunks: list[bytes] = []
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            chunk = message.get("body", b"")
            self._check(self.size + len(chunk))
            self.size += len(chunk)
            self.gate.held += len(chunk)
            chunks.append(chunk)
            if not message.get("more_body", False):
                return b"".join(chunks)


class _Replay:
    """The source of messages that the application reads: the body, then what the client does."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self.body: bytes | None = body
        self.receive = receive
        self.gone = asyncio.Event()
        self.is_watched = False

    async def __call__(self) -> Message:
        if self.body is not None:
            body, self.body = self.body, None
            return {"type": "http.request", "body": body, "more_body": False}
        if self.is_watched:
            await self.gone.wait()
            return {"type": "http.disconnect"}
        return await self.receive()


async def _until_gone(work: Awaitable[Any], receive: Receive, replay: _Replay, seconds: float, limit: float) -> None:
    """Run the application until it is done, the client hangs up, or time is over.

    Raises:
        RequestError: 504.
    """
    replay.is_watched = True

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        replay.gone.set()

    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(watch())
    try:
        done, _ = await asyncio.wait({working, watching}, timeout=max(0, seconds), return_when=asyncio.FIRST_COMPLETED)
        if working in done:
            await working
        elif watching not in done:
            raise RequestError(504, f"the request took longer than {limit:g} s; send fewer items at a time", "timeout")
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


def _host_name(header: str) -> str:
    """The name in a header ``Host``, without port and brackets."""
    if header.startswith("["):
        return header[1:].partition("]")[0].lower()
    return header.partition(":")[0].lower()
