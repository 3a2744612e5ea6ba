"""The dashboard, for the readers that the app allows."""

from __future__ import annotations

from http import HTTPStatus

from flask import Blueprint, Response, abort, current_app, request

from ...health.dashboard.page import HEADERS, PageResource
from ._problems import problem
from ._state import DASHBOARD, app_gov
from ._view_limits import exempt

dashboard = Blueprint("govredis_dashboard", __name__)


@dashboard.before_request
def refuse_strangers() -> Response | None:
    may = current_app.config[DASHBOARD]()
    if may is True:
        return None
    if may not in (False, None):
        # A user of Flask-Login is true, even where nobody is logged in.
        raise TypeError(f"{DASHBOARD} returned {type(may).__name__}; it must return True or False")
    return _guarded(problem(HTTPStatus.FORBIDDEN, "this request may not see the dashboard"))


@dashboard.get("")
@exempt
def page() -> Response:
    return _response(app_gov().internal.dashboard.page(request.args.get("span")))


@dashboard.get("/<name>")
@exempt
def part(name: str) -> Response:
    found = app_gov().internal.dashboard.asset(name)
    return abort(HTTPStatus.NOT_FOUND) if found is None else _response(found)


def _response(found: PageResource) -> Response:
    return _guarded(Response(found.body, found.status, content_type=found.content_type))


def _guarded(response: Response) -> Response:
    response.headers.update(HEADERS)
    return response
