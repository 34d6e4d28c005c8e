"""From the engine's events to what a client is sent."""

from collections.abc import AsyncIterator, Callable

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mlx_hmem.server.asked import Piece, RefusedError
from mlx_hmem.server.engine import Event
from mlx_hmem.server.served import Ticket
from mlx_hmem.server.web.answers import Answers, event


def hand_out(events: list[tuple[Ticket, Event]]) -> None:
    """Gives each request what the engine says of it; in the loop's thread."""
    for ticket, each in events:
        ticket.sink.put_nowait(each)


async def watch(request: Request, ticket: Ticket) -> None:
    """Waits until the client goes away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    ticket.sink.put_nowait(None)


async def events_of(ticket: Ticket) -> AsyncIterator[Event]:
    """What the engine says of a request, to the end; raises RefusedError, or ClientDisconnect."""
    left = ticket.asked.num_rows
    while left:
        found: Event | None = await ticket.sink.get()
        if found is None:
            raise ClientDisconnect
        if isinstance(found, RefusedError):
            raise found
        left -= isinstance(found, Piece) and found.finish_reason is not None
        yield found


class Streamed(Response):
    """An answer that is sent as it comes."""

    def __init__(
        self,
        ticket: Ticket,
        events: AsyncIterator[Event],
        answers: Answers,
        begun: Callable[[], None],
        over: Callable[[], None],
    ):
        """``begun`` is called at the first piece, ``over`` when no more is sent."""
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        del self.headers["content-length"]
        self._ticket, self._events, self._answers = ticket, events, answers
        self._begun, self._over = begun, over

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        try:
            await send(start)
            try:
                first = True
                async for piece in self._events:
                    assert isinstance(piece, Piece)
                    if first:
                        self._begun()
                    first = False
                    if body := b"".join(self._answers.chunks(piece)):
                        await send({"type": "http.response.body", "body": body, "more_body": True})
                body = b"".join(self._answers.end())
            except RefusedError as error:
                body = event(error.to_dict())
            await send({"type": "http.response.body", "body": body})
        except ClientDisconnect:
            pass
        finally:
            self._over()
