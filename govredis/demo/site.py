"""The Flask application of the demo: sessions, agents and discoveries over HTTP."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from celery import Celery, chain
from flask import Flask, Response, g, request
from werkzeug.serving import make_server

from ..api import GovRedis
from ..config import Config
from ..contrib.flask import FlaskGovRedis
from ..limits import Limit
from .background import make_app
from .processes import take_order

#: A header of each answer: how many calls of its features a fallback has served meanwhile.
DEGRADED = "X-Degraded"
#: And how many limits PostgreSQL has decided.
IN_POSTGRES = "X-Limited-In-Postgres"
#: The limit of each agent's requests to see who it is.
LIMIT = Limit(10, 1.0)
HELP = """govredis demo: a site, a Celery worker with beat, Redis, a broker and PostgreSQL.

  {url}govredis/dashboard

Try

  curl {url}govredis/health
  curl -X POST {url}login -H 'Content-Type: application/json' -d '{{"agent": "agent-1"}}'
  S=...    # the "session" of that answer
  curl {url}me -H "X-Session-Id: $S"
  curl {url}agents/agent-1
  curl -X POST {url}agents/agent-1 -H "X-Session-Id: $S" -H 'Content-Type: application/json' -d '{{"team": "search"}}'
  curl -iX POST {url}discoveries -H "X-Session-Id: $S" -H 'Content-Type: application/json' -d '{{"number": 1}}'
"""


def make_site(gov: GovRedis, background: Celery) -> Flask:
    site = Flask("govredis.demo")
    site.config["GOVREDIS_HEALTH_DETAILS"] = True  # it listens on this host only
    # A name of another site may lead here, and its page would read this one.
    site.config["GOVREDIS_DASHBOARD"] = lambda: request.host.rpartition(":")[0] in {"127.0.0.1", "localhost"}
    ext = FlaskGovRedis(site, gov)

    @site.before_request
    def look() -> None:
        g.degraded, g.in_postgres = _degraded(gov), gov.counters.get("limits.degraded.postgres")

    @site.after_request
    def tell(response: Response) -> Response:
        response.headers[DEGRADED] = str(_degraded(gov) - g.degraded)
        response.headers[IN_POSTGRES] = str(gov.counters.get("limits.degraded.postgres") - g.in_postgres)
        return response

    @site.errorhandler(ValueError)
    @site.errorhandler(LookupError)
    def bad(error: Exception) -> Any:
        return {"error": str(error)}, 400

    @site.errorhandler(500)
    def failed(error: Any) -> Any:
        return {"error": repr(error.original_exception or error)}, 500

    @site.get("/")
    def index() -> Response:
        return Response(HELP.format(url=request.host_url), mimetype="text/plain")

    @site.post("/login")
    def login() -> dict[str, str]:
        binding = gov.sessions.start(request.json["agent"], replacing=request.headers.get("X-Session-Id"))
        return {"agent_id": binding.agent_id, "session": binding.session_id}

    @site.get("/me")
    @ext.rate_limited(LIMIT, key=ext.current_agent, operation="demo_me")
    def me() -> Any:
        return {"agent_id": ext.current_agent()}

    @site.get("/agents/<agent_id>")
    def read(agent_id: str) -> Any:
        record = gov.metadata.get_or_load(agent_id, gov.agents.get)
        return record or ({"error": "no such agent"}, 404)

    @site.post("/agents/<agent_id>")
    @ext.rate_limited("500/second", key=ext.current_agent, operation="demo_http")
    def update(agent_id: str) -> Any:
        """Not by AgentStore, but by SQL of one's own: then the task invalidates."""
        from ..postgres import Json

        rows = gov.postgres.fetch(
            "UPDATE govredis_agents SET metadata = metadata || %s::jsonb WHERE agent_id = %s RETURNING version",
            (Json(request.json), agent_id),
        )
        if not rows:
            return {"error": "no such agent"}, 404
        invalidate = background.tasks["govredis.invalidate_metadata"].si(agent_id)
        told = background.tasks["demo.invalidated"].si(int(agent_id.removeprefix("agent-")), rows[0][0])
        chain(invalidate, told).apply_async()
        return {"version": rows[0][0]}, 202

    @site.post("/discoveries")
    @ext.rate_limited("500/second", key=ext.current_agent, operation="demo_http")
    def discover() -> Any:
        background.tasks["demo.store_discovery"].delay(ext.current_agent(), int(request.json["number"]))
        return {}, 202

    return site


def _degraded(gov: GovRedis) -> int:
    return sum(count for name, count in gov.counters.read().items() if ".degraded" in name)


def main() -> None:
    order: dict[str, Any] = take_order()
    folder = Path(order["folder"])
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    gov = GovRedis(Config(**order["config"]))
    site = make_site(gov, make_app(gov, order["broker"], folder))
    server = make_server("127.0.0.1", 0, site, threaded=True)
    (folder / "site.new").write_text(f"http://127.0.0.1:{server.server_port}/")
    os.rename(folder / "site.new", folder / "site")
    server.serve_forever()
