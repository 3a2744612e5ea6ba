"""The app that gunicorn serves in tests. Its settings come from the environment as FLASK_REDIS_URL, and so on."""

from __future__ import annotations

import os

from flask import Flask, Response, request

from govredis.contrib.flask import FlaskGovRedis
from govredis.health import deadlines

deadlines.POSTGRES = deadlines.SPARE = 20  # a busy machine is no outage

app = Flask(__name__)
app.config.from_prefixed_env()
ext = FlaskGovRedis(app)

# With --preload this is before the fork: the workers come upon connections that are not theirs.
with app.app_context():
    ext.gov.limits.hit("nobody", "1/minute")


@app.get("/visit/<int:limit>")
@ext.rate_limited(lambda: f"{(request.view_args or {})['limit']}/minute", key=lambda: request.headers["X-Agent"])
def visit(limit: int) -> str:
    return "visited"


@app.after_request
def say_who(response: Response) -> Response:
    response.headers["X-Worker"] = str(os.getpid())
    return response
