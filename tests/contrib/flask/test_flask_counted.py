"""ext.rate_limited where rate, cost and exemption depend on the request, and whether it counts on the response."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from flask import Flask, Response, abort, request
from flask.testing import FlaskClient

from govredis import GovRedis
from govredis.contrib.flask import FlaskGovRedis
from govredis.testing.servers import RedisServer

AGENT = {"X-Agent": "agent-1"}


def by_header() -> str:
    return request.headers["X-Agent"]


def failed(response: Response) -> bool:
    return response.status_code >= 400


@pytest.fixture
def login(app: Flask, ext: FlaskGovRedis, client: FlaskClient) -> Callable[[str], Any]:
    """Logs in with a password; of those that fail two a minute are let through."""

    @app.post("/login/<password>")
    @ext.rate_limited("2/minute;9/hour", key=by_header, operation="login", count_when=failed)
    def view(password: str) -> str:
        if password == "crash":
            raise ZeroDivisionError
        if password != "right":
            abort(403)
        return "in"

    return lambda password: client.post(f"/login/{password}", headers=AGENT)


class TestRequests:
    def test_a_cost_by_the_request(self, app: Flask, ext: FlaskGovRedis, client: FlaskClient) -> None:
        @app.get("/")
        @ext.rate_limited("5/hour", key=by_header, cost=lambda: int(request.args["n"]))
        def view() -> str:
            return ""

        assert '"default: 5 per 3600 s";r=2;' in client.get("/?n=3", headers=AGENT).headers["RateLimit"]
        assert client.get("/?n=3", headers=AGENT).status_code == 429
        assert client.get("/?n=2", headers=AGENT).status_code == 200
        assert client.get("/?n=0", headers=AGENT).status_code == 500, "a mistake of the server's"

    def test_a_plain_cost(self, app: Flask, ext: FlaskGovRedis, client: FlaskClient, gov: GovRedis) -> None:
        @app.get("/")
        @ext.rate_limited("5/hour", key=by_header, cost=4)
        def view() -> str:
            return ""

        assert client.get("/", headers=AGENT).status_code == 200
        assert gov.limits.get_count("agent-1", 3600) == 4

    def test_an_exempt_request_is_not_asked_for_anything(
        self, app: Flask, ext: FlaskGovRedis, client: FlaskClient, gov: GovRedis
    ) -> None:
        @app.get("/")
        @ext.rate_limited("1/hour", key=by_header, exempt=lambda: "X-Internal" in request.headers)
        def view() -> str:
            return "seen"

        for _ in range(3):
            response = client.get("/", headers={"X-Internal": "1"})
            assert (response.status_code, response.text) == (200, "seen")
            assert "RateLimit" not in response.headers
        assert gov.limits.get_count("agent-1", 3600) == 0
        assert [client.get("/", headers=AGENT).status_code for _ in range(2)] == [200, 429]
        assert client.get("/").status_code == 400

    def test_a_rate_by_plan_holds_from_the_next_request_on(
        self, app: Flask, ext: FlaskGovRedis, client: FlaskClient
    ) -> None:
        plans = {"agent-1": "1/hour"}

        @app.get("/")
        @ext.rate_limited(lambda: plans[by_header()], key=by_header)
        def view() -> str:
            return ""

        codes = [client.get("/", headers=AGENT).status_code for _ in range(2)]
        plans["agent-1"] = "3/hour"
        codes += [client.get("/", headers=AGENT).status_code for _ in range(3)]
        assert codes == [200, 429, 200, 200, 429]


class TestCountWhen:
    def test_only_those_count_whose_response_says_so(self, login: Callable[[str], Any], gov: GovRedis) -> None:
        assert [login("right").status_code for _ in range(5)] == [200] * 5
        assert gov.limits.get_count("agent-1", 60, operation="login") == 0
        assert [login(password).status_code for password in ("a", "right", "b", "c", "right")] == [
            403, 200, 403, 429, 429,
        ]  # fmt: skip
        assert gov.limits.get_count("agent-1", 60, operation="login") == 2

    def test_the_fields_say_what_is_left(self, login: Callable[[str], Any]) -> None:
        assert login("right").headers["RateLimit"] == '"login: 2 per 60 s";r=2;t=0'
        assert login("wrong").headers["RateLimit"] == '"login: 2 per 60 s";r=1;t=60'
        left = login("right").headers["RateLimit"]
        assert left in {f'"login: 2 per 60 s";r=1;t={t}' for t in (59, 60)}
        assert login("wrong").headers["RateLimit"] == '"login: 2 per 60 s";r=0;t=60'
        assert login("right").headers["RateLimit"].startswith('"login: 2 per 60 s";r=0;')

    def test_hits_of_others_meanwhile_are_reported_too(
        self, app: Flask, ext: FlaskGovRedis, client: FlaskClient, gov: GovRedis
    ) -> None:
        @app.get("/<int:others>")
        @ext.rate_limited("3/minute", key=by_header, cost=2, count_when=lambda response: False)
        def view(others: int) -> str:
            gov.limits.record("agent-1", 60, cost=others)
            return ""

        assert client.get("/1", headers=AGENT).headers["RateLimit"].startswith('"default: 3 per 60 s";r=2;')
        gov.limits.reset("agent-1")
        assert client.get("/2", headers=AGENT).headers["RateLimit"].startswith('"default: 3 per 60 s";r=1;')

    def test_a_refusal_is_not_asked_about(self, app: Flask, ext: FlaskGovRedis, client: FlaskClient) -> None:
        asked = []

        def counts(response: Response) -> bool:
            asked.append(response.status_code)
            return True

        @app.get("/")
        @ext.rate_limited("1/minute", key=by_header, count_when=counts)
        def view() -> str:
            return ""

        assert [client.get("/", headers=AGENT).status_code for _ in range(2)] == [200, 429]
        assert asked == [200]

    def test_it_counts_until_the_response_is_there(
        self, app: Flask, ext: FlaskGovRedis, client: FlaskClient, gov: GovRedis
    ) -> None:
        counts = []

        @app.get("/")
        @ext.rate_limited("3/minute", key=by_header, count_when=lambda response: False)
        def view() -> str:
            counts.append(gov.limits.get_count("agent-1", 60))
            return ""

        client.get("/", headers=AGENT)
        assert (counts, gov.limits.get_count("agent-1", 60)) == ([1], 0)

    def test_a_crash_is_a_response_too(self, login: Callable[[str], Any], gov: GovRedis) -> None:
        assert login("crash").status_code == 500
        assert gov.limits.get_count("agent-1", 60, operation="login") == 1

    def test_an_outer_limit_sees_the_refusal_of_an_inner_one(
        self, app: Flask, ext: FlaskGovRedis, client: FlaskClient, gov: GovRedis
    ) -> None:
        @app.get("/")
        @ext.rate_limited("9/hour", key=by_header, operation="outer", count_when=lambda r: r.status_code != 429)
        @ext.rate_limited("1/hour", key=by_header, operation="inner")
        def view() -> str:
            return ""

        assert [client.get("/", headers=AGENT).status_code for _ in range(3)] == [200, 429, 429]
        assert gov.limits.get_count("agent-1", 3600, operation="outer") == 1

    def test_a_mistake_in_it_is_a_500_and_the_request_counts(
        self, app: Flask, ext: FlaskGovRedis, client: FlaskClient, gov: GovRedis
    ) -> None:
        @app.get("/")
        @ext.rate_limited("9/hour", key=by_header, count_when=lambda response: response.nonsense)
        def view() -> str:
            return ""

        assert client.get("/", headers=AGENT).status_code == 500
        assert gov.limits.get_count("agent-1", 3600) == 1

    def test_with_redis_gone_meanwhile_the_response_goes_out_and_it_stays_counted(
        self, app: Flask, client: FlaskClient, make_gov: Callable[..., GovRedis], mortal_redis: RedisServer
    ) -> None:
        ext = FlaskGovRedis(app, make_gov(redis_url=mortal_redis.url))

        @app.get("/<word>")
        @ext.rate_limited("9/hour", key=by_header, count_when=lambda response: False)
        def view(word: str) -> str:
            if word == "kill":
                mortal_redis.kill()
            return word

        response = client.get("/kill", headers=AGENT)
        assert (response.text, response.headers["RateLimit"]) == ("kill", '"default: 9 per 3600 s";r=8;t=3600')
        # The window of this process counts now, and gives back too.
        for _ in range(2):
            assert client.get("/on", headers=AGENT).headers["RateLimit"] == '"default: 9 per 3600 s";r=9;t=0'


async def always() -> bool:
    return True


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"cost": 0}, "cost is 0"),
        ({"cost": 6}, "cost is 6; it must be at most 5"),
        ({"cost": "1"}, "cost is '1'"),
        ({"cost": lambda n: n}, "cost is .* a plain callable without arguments"),
        ({"exempt": True}, "exempt is True"),
        ({"exempt": lambda request: True}, "exempt is .* a plain callable without arguments"),
        ({"exempt": always}, "exempt is .* a plain callable"),
        ({"count_when": True}, "count_when is True; it must be a callable of one argument, the response"),
        ({"count_when": lambda: True}, "count_when is .* a callable of one argument"),
    ],
)
def test_a_bad_argument_is_refused_at_decoration(ext: FlaskGovRedis, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ext.rate_limited("5/hour", key=by_header, **arguments)
