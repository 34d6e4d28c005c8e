"""The addresses that the server answers to, in the thread of HTTP: no MLX here."""

import asyncio
import contextlib
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from mlx_hmem.reading import FieldError, strict_json
from mlx_hmem.server.asked import Begun, Piece, RefusedError, wrong
from mlx_hmem.server.engine import Engine, Event
from mlx_hmem.server.served import Served, Ticket, cause_of
from mlx_hmem.server.web.answers import Answers
from mlx_hmem.server.web.fields import asked_of, check_rest, given, memory_asked, text_of
from mlx_hmem.server.web.guard import Guard, view_for
from mlx_hmem.server.web.keys import Key
from mlx_hmem.server.web.metrics import metrics
from mlx_hmem.server.web.page import page
from mlx_hmem.server.web.refusals import HANDLERS, refusal
from mlx_hmem.server.web.sending import Streamed, events_of, hand_out, watch

MOST_BYTES = 1 << 20  # of a body
BODY_SECONDS = 30.0  # in which it must be here


class App:
    """``name``: of the model; ``log`` takes a line, with all that is asked where ``detailed``."""

    def __init__(
        self,
        engine: Engine,
        guard: Guard,
        name: str,
        log: Callable[[str], None],
        detailed: bool = False,
    ):
        self._engine, self._guard, self._name = engine, guard, name
        self._log, self._detailed = log, detailed
        self._loop: asyncio.AbstractEventLoop | None = None
        self._counts: Counter[tuple[str, int]] = Counter()  # of requests, by path and status
        self._first: list[float] = [0.0, 0.0]  # first tokens, and the seconds to them
        self._created = int(time.time())
        chat_page = page()
        routes = [
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/completions", self._complete, methods=["POST"]),
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._model),
            Route("/v1/memory/route", self._route, methods=["POST"]),
            Route("/v1/memory/documents", self._documents),
            Route("/v1/memory/reload", self._reload, methods=["POST"]),
            Route("/health", self._health),
            Route("/metrics", self._metrics),
            Route("/", lambda _: chat_page),
        ]
        self._paths = {route.path for route in routes}
        self._app = Starlette(routes=routes, lifespan=self._lifespan)
        # A slash too many would lead to http:// and take the key along, in front of a proxy's TLS.
        self._app.router.redirect_slashes = False
        for kind, handler in HANDLERS.items():
            self._app.add_exception_handler(kind, handler)
        engine.deliver = self._deliver

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Every request passes the guard; whatever goes wrong is an error in OpenAI's form."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.perf_counter(), 0

        async def sent(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-content-type-options", b"nosniff")]
            await send(message)

        request, path = Request(scope, receive), scope["path"]  # a URL would have the Host in it
        try:
            scope["state"]["key"] = self._guard.check(path, request.headers)
            await self._app(scope, receive, sent)
        except RefusedError as error:  # by the guard
            await refusal(error)(scope, receive, sent)
        except Exception as error:  # it has been answered, see HANDLERS
            self._log(f"a request failed: {cause_of(error)}")
        self._counts[path if path in self._paths else "other", status] += 1
        if self._detailed:
            spent = (time.perf_counter() - start) * 1e3
            self._log(f"{request.method} {path} {status} {spent:.0f} ms")

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        self._loop = asyncio.get_running_loop()
        yield

    # What the engine says, in its thread.

    def _deliver(self, events: list[tuple[Ticket, Event]]) -> None:
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop has ended: nobody listens
            self._loop.call_soon_threadsafe(hand_out, events)

    # Answers.

    async def _chat(self, request: Request) -> Response:
        return await self._answer(request, chat=True)

    async def _complete(self, request: Request) -> Response:
        return await self._answer(request, chat=False)

    async def _answer(self, request: Request, chat: bool) -> Response:
        body = await self._body(request)
        asked = asked_of(body, request.headers, chat)
        self._check_model(body)
        self._set_view(request, asked.memory)
        key: Key | None = request.state.key
        asked.who = "" if key is None else key.sha256
        ticket, start = Ticket(asked, sink=asyncio.Queue()), time.perf_counter()
        self._engine.submit(ticket)
        gone = asyncio.create_task(watch(request, ticket))

        def begun() -> None:
            self._first[0] += 1
            self._first[1] += time.perf_counter() - start

        def over() -> None:
            gone.cancel()
            self._engine.cancel(ticket)  # nothing is left to do if it is answered

        try:
            events = events_of(ticket)
            first = await anext(events)
            assert isinstance(first, Begun)
            answers = Answers(asked, self._name, first.prompt_tokens)
            if asked.stream:
                return Streamed(ticket, events, answers, begun, over)
            last = [piece async for piece in events if isinstance(piece, Piece)]
        except BaseException:
            over()
            raise
        over()
        return JSONResponse(answers.whole(last))

    # What there is, and how it is.

    async def _models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._own()]})

    async def _model(self, request: Request) -> Response:
        if request.path_params["name"] != self._name:
            raise RefusedError(404, "no such model", "model", "model_not_found")
        return JSONResponse(self._own())

    def _own(self) -> dict[str, Any]:
        return {
            "id": self._name, "object": "model", "created": self._created, "owned_by": "mlx_hmem",
        }  # fmt: skip

    async def _health(self, _: Request) -> Response:
        draining = self._engine.draining
        status = {"status": "draining" if draining else "ok"}
        return JSONResponse(status, 503 if draining else 200)

    async def _metrics(self, _: Request) -> Response:
        text = metrics(self._engine, self._counts, self._first)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    # Memory.

    async def _route(self, request: Request) -> Response:
        values = given(await self._body(request))
        memory = memory_asked(values, request.headers)
        text = text_of(values.pop("text", None), "text")
        check_rest(values)
        if not text.strip():
            raise wrong("text", "is empty")
        self._set_view(request, memory)

        def work(served: Served) -> dict[str, Any]:
            user = served.preparing.user(memory)
            found = served.preparing.memory(memory, user, (text, None), "text", False)
            return found.to_dict()

        return JSONResponse({"memory": await _done(self._engine.call(work))})

    async def _documents(self, request: Request) -> Response:
        values: dict[str, Any] = dict(request.query_params)
        for name in values:
            if len(request.query_params.getlist(name)) > 1:  # of two views one would be passed over
                raise wrong(name[:80], "is given twice")
        memory = memory_asked(values, request.headers)
        check_rest(values)
        self._set_view(request, memory)
        key: Key | None = request.state.key

        def work(served: Served) -> dict[str, Any]:
            user, bank = served.preparing.user(memory), served.model.bank
            banks = [] if bank is None else [*user.require_banks().parts]
            views = [] if bank is None else [*user.require_banks().views]
            own = views if key is None or key.view is None else [key.view]
            documents = served.preparing.documents(memory)
            return {"object": "list", "data": documents, "banks": banks, "views": own}

        return JSONResponse(await _done(self._engine.call(work)))

    async def _reload(self, request: Request) -> Response:
        key: Key | None = request.state.key
        if key is not None and key.view is not None:
            raise RefusedError(403, "a key with a view may not reload", code="reload_not_allowed")
        await _done(self._engine.call(partial(self._engine.reload, time.monotonic())))
        return JSONResponse({"status": "ok", "model": self._name})

    # What is asked.

    async def _body(self, request: Request) -> Any:
        """The JSON value of a body."""
        too_large = RefusedError(
            413, f"the body has more than {MOST_BYTES} bytes", code="body_too_large"
        )
        if int(request.headers.get("content-length", 0)) > MOST_BYTES:  # h11 has checked it
            raise too_large
        found = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for part in request.stream():
                    found += part
                    if len(found) > MOST_BYTES:
                        raise too_large
        except TimeoutError:
            raise RefusedError(408, "the body did not come in time") from None
        if self._detailed:
            self._log(json.dumps(found.decode(errors="replace"), ensure_ascii=False))
        try:
            return strict_json(bytes(found))
        except UnicodeDecodeError:
            raise RefusedError(400, "the body is not UTF-8") from None
        except FieldError as error:
            raise RefusedError(400, str(error), error.place or None) from None
        except ValueError as error:
            raise RefusedError(400, f"the body is not JSON: {error}") from None

    def _check_model(self, body: dict[str, Any]) -> None:
        model = body.get("model")
        if model is not None and not isinstance(model, str):
            raise wrong("model", "is no text")
        if model not in (None, "default", self._name):
            message = f"no such model; this is {self._name}"
            raise RefusedError(404, message, "model", "model_not_found")

    def _set_view(self, request: Request, memory: Any) -> None:
        memory.view = view_for(request.state.key, memory.view, memory.params.get("view"))


async def _done(future: "Future[Any]") -> Any:
    return await asyncio.wrap_future(future)
