"""The health endpoints, and `flask govredis`."""

from __future__ import annotations

import json
from http import HTTPStatus
from typing import Any

import click
from flask import Blueprint, Response, current_app
from flask.cli import AppGroup, with_appcontext

from ..._commands import COMMANDS, work_on
from ...errors import ConfigurationError
from ._routes import routes
from ._state import DETAILS, app_gov
from ._view_limits import exempt

endpoints = Blueprint("govredis", __name__)


@endpoints.get("/live")
@exempt
def live() -> Response:
    return _health({"status": "pass"})


@endpoints.get("/ready")
@exempt
def ready() -> Response:
    return _health({"status": app_gov().health.check().status})


@endpoints.get("/health")
@exempt
def health() -> Response:
    details = current_app.config[DETAILS]
    if details() if callable(details) else details:
        return _health(app_gov().health.check().as_dict())
    return ready()


def _health(body: dict[str, Any]) -> Response:
    status = HTTPStatus.SERVICE_UNAVAILABLE if body["status"] == "fail" else HTTPStatus.OK
    headers = {"Cache-Control": "no-store"}
    return Response(json.dumps(body), status, headers, content_type="application/health+json")


@with_appcontext
def _on_the_apps() -> None:
    try:
        work_on(app_gov())
    except ConfigurationError as error:
        raise click.ClickException(str(error)) from error


commands = AppGroup(
    "govredis", callback=_on_the_apps, commands=(*COMMANDS, routes), help="govredis: the app's Redis and PostgreSQL."
)
