"""Errors a client sees: an HTTP status and OpenAI's error object."""

import dataclasses
import math
import reprlib
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from serving.conductor.types import Rejection


class ApiError(Exception):
    """An error that answers a request.

    Attributes:
        status: HTTP status.
        param: name of the field at fault, where there is one.
        code: machine-readable reason; OpenAI's where OpenAI has one (`model_not_found`, `context_length_exceeded`).
        retry_after_s: seconds after which a retry may succeed; sent as `Retry-After`, rounded up.
        rejection: admission control's prediction, where that is why.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
        rejection: Rejection | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s
        self.rejection = rejection

    @property
    def body(self) -> dict[str, Any]:
        """`{"error": {"message", "type", "param", "code"}}`, as OpenAI sends it; with a `rejection`, its fields too."""
        error = {"message": self.message, "type": self._type, "param": self.param, "code": self.code}
        return {"error": error | ({} if self.rejection is None else dataclasses.asdict(self.rejection))}

    @property
    def _type(self) -> str:
        if self.status == 429:
            return "rate_limit_error"
        return "server_error" if self.status >= 500 else "invalid_request_error"

    def response(self) -> JSONResponse:
        """Returns the HTTP response."""
        headers = {} if self.retry_after_s is None else {"Retry-After": str(max(1, math.ceil(self.retry_after_s)))}
        return JSONResponse(self.body, self.status, headers)


def invalid(message: str, param: str | None = None) -> ApiError:
    """Returns the 400 for a request that can never be served as it is."""
    return ApiError(400, message, param=param)


def rejected(message: str, rejection: Rejection) -> ApiError:
    """Returns the 429 for a request that admission control rejected, and that may be sent again."""
    return ApiError(429, message, code="rejected", retry_after_s=rejection.retry_after_s, rejection=rejection)


def install_error_handlers(app: FastAPI) -> None:
    """Answers every error of `app` in OpenAI's shape."""
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _unexpected_error)


async def _api_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return error.response()


# Of a body with hundreds of wrong fields the first few are enough to find what is wrong with it.
_MAX_PROBLEMS = 8


async def _validation_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    problems = [_problem(item) for item in error.errors()[:_MAX_PROBLEMS]]
    params = [param for param, _ in problems if param]
    message = "; ".join(dict.fromkeys(text for _, text in problems))
    content_type = request.headers.get("content-type", "")
    if not params and "json" not in content_type:
        message += f". The body must be JSON, sent with `Content-Type: application/json`, not {content_type!r}"
    return invalid(message + ".", params[0] if params else None).response()


def _problem(item: Mapping[str, Any]) -> tuple[str | None, str]:
    """Returns the field at fault and what is wrong with it."""
    if item["type"] == "json_invalid":
        return None, f"The body is not JSON: {item['ctx']['error']} at character {item['loc'][-1]}"
    # pydantic adds the tag of a union's member ("a text") to the path: no field has such a name.
    path = [str(part) for part in item["loc"][1:] if isinstance(part, int) or part.isidentifier()]
    if not path:
        return None, f"The body: {item['msg']}"
    name = path[0]
    value = item.get("input")
    shown = "" if item["type"] == "missing" else f", not {reprlib.repr(value)}"
    return name, f"`{'.'.join(path)}`: {item['msg']}{shown}"


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        message = f"There is no {request.method} {request.url.path} here; the routes are listed under /docs."
    else:
        message = f"{request.method} {request.url.path}: {error.detail}."
    response = ApiError(error.status_code, message).response()
    response.headers.update(error.headers or {})
    return response


async def _unexpected_error(request: Request, error: Exception) -> JSONResponse:
    # Starlette re-raises the error after this response, so that the server logs its traceback.
    return ApiError(500, f"The server failed on this request: {type(error).__name__}: {error}").response()
