"""What goes wrong, in OpenAI's form, as Starlette has it handled."""

from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from mlx_hmem.server.asked import RefusedError


def refusal(error: RefusedError) -> Response:
    return JSONResponse(error.to_dict(), error.status, headers=error.headers)


async def _of_http(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    known = {404: "no such address", 405: "this address takes another method"}
    message = known.get(error.status_code, str(error.detail))
    return refusal(RefusedError(error.status_code, message, headers=dict(error.headers or {})))


async def _of_refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, RefusedError)
    return refusal(error)


async def _of_gone(_: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody is there to read it


async def _of_other(_: Request, error: Exception) -> Response:
    return refusal(RefusedError(500, "this request failed"))


HANDLERS: dict[type[Exception], Any] = {
    HTTPException: _of_http,
    RefusedError: _of_refused,
    ClientDisconnect: _of_gone,
    Exception: _of_other,
}
