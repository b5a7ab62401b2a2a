"""The HTTP interface: routes, limits, status codes and metrics, over any `Backend`.

Every refusal is a `Problem`; 422 names the field. What the backend refuses keeps its status (`serving.backend`).
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from pulse_ray import __version__
from pulse_ray.config import LimitsConfig, ServeConfig
from pulse_ray.serving import messages
from pulse_ray.serving.backend import Backend, BusyError, InvalidError, RefusedError, UnavailableError
from pulse_ray.serving.guard import Guard
from pulse_ray.serving.messages import Fault, Problem, RankRequest
from pulse_ray.serving.meters import Measured, Meters

SEARCH_LIMIT = 50
"""Most users or items in the answer to a search."""

REFUSALS: dict[int | str, dict[str, Any]] = {
    401: {"model": Problem, "description": "no bearer token, or an unknown one"},
    404: {"model": Problem, "description": "no such user or item"},
    413: {"model": Problem, "description": "the body is too large"},
    422: {"model": Problem, "description": "a field is wrong"},
    429: {"model": Problem, "description": "too busy; Retry-After says when to try again"},
    503: {"model": Problem, "description": "a part of the system does not answer"},
}

CONTENT_SECURITY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'self'"
)
"""The page loads nothing from elsewhere, and runs no script but its own."""

Text = Annotated[str, Query(max_length=256)]
Domain = Annotated[str | None, Query(max_length=256)]
Limit = Annotated[int, Query(ge=1, le=SEARCH_LIMIT)]


def create(backend: Backend, config: ServeConfig, digests: Sequence[str] = (), replica: str = "0") -> FastAPI:
    """The application.

    Args:
        backend: what answers.
        config: limits and `retry_after_s`.
        digests: of the bearer tokens, as from `guard.token_digests`.
        replica: names this replica in the metrics.
    """
    # The interactive documentation of FastAPI would load its assets from elsewhere.
    app = FastAPI(title="pulse_ray", version=__version__, docs_url=None, redoc_url=None)
    meters = Meters(replica)

    app.add_middleware(Guard, digests=digests, limit=config.limits.request_bytes)
    app.add_middleware(Measured, meters=meters)  # Added last, so outermost.
    _handle_refusals(app, config.retry_after_s)
    _add_rankings(app, backend, config.limits, meters)
    _add_look_ups(app, backend)
    _add_operations(app, backend, meters)
    _add_page(app)
    return app


def _add_rankings(app: FastAPI, backend: Backend, limits: LimitsConfig, meters: Meters) -> None:
    @app.post("/v1/rank", responses=REFUSALS)
    async def rank(request: RankRequest) -> messages.RankAnswer:
        """Ranks candidates for a user or a history."""
        try:
            _check(request, limits)
            (answer,) = await backend.rank([request])
        except RefusedError as refusal:
            refusal.field = refusal.field and f"body.{refusal.field}"
            raise
        meters.count_reason(answer.reason.source)
        return answer

    @app.post("/v1/rank:batch", responses=REFUSALS)
    async def rank_batch(batch: messages.BatchRequest) -> messages.BatchAnswer:
        """Ranks for several users or histories at once."""
        if len(batch.requests) > limits.batch:
            raise InvalidError(f"holds {len(batch.requests)} requests, more than {limits.batch}", field="body.requests")
        try:
            for place, request in enumerate(batch.requests):
                _check(request, limits, place)
            answers = await backend.rank(batch.requests)
        except RefusedError as refusal:
            refusal.field = refusal.field and f"body.requests.{refusal.place}.{refusal.field}"
            raise
        for answer in answers:
            meters.count_reason(answer.reason.source)
        return messages.BatchAnswer(results=answers)


def _check(request: RankRequest, limits: LimitsConfig, place: int = 0) -> None:
    """Raises `InvalidError` for what is too long or repeats."""
    for name, found, limit in (
        ("history", request.history, limits.history),
        ("candidates", request.candidates, limits.candidates),
    ):
        if len(found or ()) > limit:
            raise InvalidError(f"holds {len(found or ())} entries, more than {limit}", field=name, place=place)
    first: dict[str, int] = {}
    for index, item in enumerate(request.candidates or ()):
        if first.setdefault(item, index) != index:
            raise InvalidError(f"repeats candidate {first[item]}", field=f"candidates.{index}", place=place)


def _add_look_ups(app: FastAPI, backend: Backend) -> None:
    @app.get("/v1/users", responses=REFUSALS)
    async def users(query: Text = "", domain: Domain = None, limit: Limit = 20) -> messages.UsersAnswer:
        """Users whose id begins with `query`."""
        return await backend.users(query, domain, limit)

    @app.get("/v1/users/{user_id:path}", responses=REFUSALS)
    async def user(user_id: str, domain: Domain = None) -> messages.UserAnswer:
        """A user's history, reason and tree."""
        return await backend.user(user_id, domain)

    @app.get("/v1/items", responses=REFUSALS)
    async def items(query: Text = "", domain: Domain = None, limit: Limit = 20) -> messages.ItemsAnswer:
        """Items by the beginnings of words of their titles, the most popular first."""
        return await backend.search(query, domain, limit)

    @app.get("/v1/items/{item_id:path}", responses=REFUSALS)
    async def item(item_id: str, domain: Domain = None) -> messages.ItemAnswer:
        """An item."""
        return await backend.item(item_id, domain)


def _add_operations(app: FastAPI, backend: Backend, meters: Meters) -> None:
    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """The process answers."""
        return {"status": "ok"}

    @app.get("/readyz", responses={503: {"model": messages.Readiness}})
    async def readyz(response: Response) -> messages.Readiness:
        """Rankings are possible."""
        found = await backend.ready()
        response.status_code = 200 if found.ready else 503
        return found

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Prometheus metrics of the ingress replica that answers."""
        return Response(meters.text(), media_type=CONTENT_TYPE_LATEST)


def _add_page(app: FastAPI) -> None:
    folder = files("pulse_ray.serving").joinpath("page")
    script = folder.joinpath("page.js").read_text("utf-8")
    html = folder.joinpath("index.html").read_text("utf-8")

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(html, headers={"Content-Security-Policy": CONTENT_SECURITY})

    @app.get("/page.js", include_in_schema=False)
    async def page_script() -> Response:
        return Response(script, media_type="text/javascript")


def _handle_refusals(app: FastAPI, retry_after_s: int) -> None:
    def problem(status: int, message: str, faults: Sequence[Fault] = ()) -> JSONResponse:
        busy = status in (BusyError.status, UnavailableError.status)
        return JSONResponse(
            Problem(message=message, fields=list(faults)).model_dump(),
            status_code=status,
            headers={"Retry-After": str(retry_after_s)} if busy else None,
        )

    @app.exception_handler(RefusedError)
    async def refused(_: Request, refusal: RefusedError) -> JSONResponse:
        faults = [Fault(field=refusal.field, message=refusal.message)] if refusal.field else []
        return problem(refusal.status, refusal.message, faults)

    @app.exception_handler(RequestValidationError)
    async def unfit(_: Request, error: RequestValidationError) -> JSONResponse:
        # The input itself is left out: it may be large, and need not be text that can be written.
        faults = [Fault(field=_path(entry["loc"]), message=str(entry["msg"])) for entry in error.errors()]
        return problem(422, f"{faults[0].field}: {faults[0].message}", faults)

    @app.exception_handler(HTTPException)
    async def unroutable(_: Request, error: HTTPException) -> JSONResponse:
        if error.status_code == 400:  # FastAPI could not read the body as text.
            return problem(422, "body: it is no JSON", [Fault(field="body", message="it is no JSON")])
        answer = problem(error.status_code, str(error.detail))
        answer.headers.update(error.headers or {})
        return answer


def _path(location: Sequence[str | int]) -> str:
    """A place in the request as a path; names that are not text lose what cannot be written.

    >>> _path(("body", "candidates", 3))
    'body.candidates.3'
    """
    return ".".join(str(part) for part in location).encode("utf-8", "replace").decode()[:500]
