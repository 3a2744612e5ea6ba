"""The endpoints of health and of Prometheus, and `flask govredis`."""

from __future__ import annotations

import json
from http import HTTPStatus
from typing import Any

from flask import Blueprint, Response, current_app, request
from flask.cli import AppGroup, with_appcontext

from ..._commands import COMMANDS, CommandFailed, work_on
from ...errors import ConfigurationError
from ._routes import routes
from ._state import DETAILS, app_gov
from ._view_limits import exempt

endpoints = Blueprint("govredis", __name__)
_NO_STORE = {"Cache-Control": "no-store"}


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
    if _may_see_details():
        return _health(app_gov().health.check().as_dict())
    return ready()


@endpoints.get("/metrics")
@exempt
def metrics() -> Response:
    if not _may_see_details():
        said = f"{DETAILS} does not let this request see the metrics, which tell more than the status\n"
        return _text(said, HTTPStatus.FORBIDDEN)
    try:
        from prometheus_client import CollectorRegistry
        from prometheus_client.exposition import choose_encoder

        from ..prometheus import GovRedisCollector
    except ImportError:
        return _text(
            "the metrics need prometheus_client: pip install 'govredis[prometheus]'\n", HTTPStatus.NOT_IMPLEMENTED
        )
    registry = CollectorRegistry()
    registry.register(GovRedisCollector(app_gov()))
    encode, content_type = choose_encoder(request.headers.get("Accept", ""))
    return Response(encode(registry), headers=_NO_STORE, content_type=content_type)


def _may_see_details() -> bool:
    details = current_app.config[DETAILS]
    return bool(details() if callable(details) else details)


def _text(said: str, status: HTTPStatus) -> Response:
    return Response(said, status, _NO_STORE, content_type="text/plain; charset=utf-8")


def _health(body: dict[str, Any]) -> Response:
    status = HTTPStatus.SERVICE_UNAVAILABLE if body["status"] == "fail" else HTTPStatus.OK
    return Response(json.dumps(body), status, _NO_STORE, content_type="application/health+json")


@with_appcontext
def _on_the_apps() -> None:
    try:
        work_on(app_gov())
    except ConfigurationError as error:
        raise CommandFailed(str(error)) from error


commands = AppGroup(
    "govredis", callback=_on_the_apps, commands=(*COMMANDS, routes), help="govredis: the app's Redis and PostgreSQL."
)
