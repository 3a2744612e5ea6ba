"""Prometheus: totals over all processes, by its conventions; the dashboard and the rules ask for what there is."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from flask import Flask, request
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from support import PATIENT, REDIS_AWAY, in_child, redis_of

import govredis
from govredis import BackendUnavailable, GovRedis
from govredis.contrib.flask import FlaskGovRedis
from govredis.contrib.prometheus import GovRedisCollector
from govredis.health.counter_names import COUNTERS, describe
from govredis.testing.servers import PostgresServer, RedisServer

pytestmark = pytest.mark.one_redis

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "metrics.md").read_text()
MakeGov = Callable[..., GovRedis]


def scrape(gov: GovRedis) -> str:
    registry = CollectorRegistry()
    registry.register(GovRedisCollector(gov))
    return generate_latest(registry).decode()


def samples(gov: GovRedis) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    families = text_string_to_metric_families(scrape(gov))
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def value(gov: GovRedis, name: str, **labels: str) -> float | None:
    return samples(gov).get((name, tuple(sorted(labels.items()))))


def tell(gov: GovRedis, **counts: int) -> None:
    for name, n in counts.items():
        gov.counters.add(name.replace("__", "."), n)
    gov.internal.account.flush()


@pytest.fixture
def promtool(system_binary: Callable[[str], str]) -> str:
    return str(Path(system_binary("prometheus")).with_name("promtool"))


class TestTotals:
    def test_are_over_all_processes_whichever_is_scraped(self, gov: GovRedis, make_gov: MakeGov) -> None:
        other = make_gov(redis_url=gov.config.redis_url)
        gov.limits.hit("a", "9/hour")
        gov.internal.account.flush()
        in_child(lambda: tell(gov, limits__allowed=1))
        tell(
            other, locks__waited_ms=2500, report__hits=3, limits__degraded__memory=2, celery__limited__retry=1, app__x=4
        )
        for scraped in gov, other:
            assert value(scraped, "govredis_limits_allowed_total") == 2
            assert value(scraped, "govredis_limits_denied_total") == 0, "Prometheus must see the first denial"
            assert value(scraped, "govredis_locks_waited_seconds_total") == 2.5
            assert value(scraped, "govredis_cache_hits_total", cache="report") == 3
            assert value(scraped, "govredis_fallbacks_total", feature="limits", kind="memory") == 2
            assert value(scraped, "govredis_celery_limited_total", outcome="retry") == 1
            assert value(scraped, "govredis_other_total", counter="app_x") == 4
            assert value(scraped, "govredis_account_source", backend="redis") == 1

    def test_histograms_are_cumulative(self, gov: GovRedis) -> None:
        tell(gov, limits__allowed=1)
        tell(gov, limits__allowed=1)
        found = samples(gov)
        buckets = {
            dict(labels)["le"]: n for (name, labels), n in found.items() if name == "govredis_redis_seconds_bucket"
        }
        assert list(buckets.values()) == sorted(buckets.values())
        assert buckets["+Inf"] == found["govredis_redis_seconds_count", ()] > 0
        assert found["govredis_redis_seconds_sum", ()] > 0

    def test_never_decrease_while_redis_is_away_and_when_it_is_back(
        self, make_gov: MakeGov, mortal_redis: RedisServer, postgres_server: PostgresServer
    ) -> None:
        """From any process, also when another was killed in the outage."""
        settings = {"redis_url": mortal_redis.url, "database_url": postgres_server.url, **PATIENT}
        one, two, dead = make_gov(**settings), make_gov(**settings), make_gov(**settings)
        for gov in one, two, dead:
            tell(gov, limits__denied=10)
        seen = [value(two, "govredis_limits_denied_total")]
        tell(one, limits__denied=5)
        assert value(one, "govredis_limits_denied_total") == 35
        with away(one, two, dead):
            for gov in two, one, dead, two:
                tell(gov, limits__denied=1)
                seen.append(value(gov, "govredis_limits_denied_total"))
            assert seen[1:] == [36, 37, 38, 39], "each knows of what any had read last"
            assert value(two, "govredis_account_source", backend="postgres") == 1
        dead.internal.account.renew_after_fork()  # it tells nothing of that any more
        dead.internal.context.counters.renew_after_fork()
        assert value(two, "govredis_limits_denied_total") == 39
        tell(one, limits__denied=1)
        assert value(two, "govredis_limits_denied_total") == 40
        assert two.postgres.fetch("SELECT FROM govredis_account WHERE process <> '' AND minute >= 0") == []

    def test_without_postgresql_they_are_left_out_until_redis_is_back(self, make_gov: MakeGov) -> None:
        gov = make_gov(redis_url=REDIS_AWAY)
        tell(gov, limits__denied=1)
        found = samples(gov)
        assert ("govredis_limits_denied_total", ()) not in found
        assert ("govredis_redis_seconds_count", ()) not in found
        assert found["govredis_breaker_open", (("server", "redis"),)] == 1
        assert found["govredis_away_seconds", (("server", "redis"),)] > 0
        assert found["govredis_health_status", ()] == 2
        assert found["govredis_last_outage_timestamp_seconds", (("kind", "refused"), ("server", "redis"))] > 0

    def test_an_outage_is_counted_once_for_all(self, gov: GovRedis, make_gov: MakeGov) -> None:
        other = make_gov(redis_url=gov.config.redis_url)
        for each in gov, other:
            breaker = redis_of(each).breaker
            breaker.failed(breaker.period, "gone", timed_out=True)
            breaker.note_slow(0.2)
            breaker.probe_now()
        for each in gov, other, gov:
            each.internal.account.flush()
        assert value(gov, "govredis_outages_total", server="redis") == 1
        assert value(gov, "govredis_outages_total", server="postgres") == 0
        of = {"server": "redis", "kind": "hung"}
        assert value(gov, "govredis_last_outage_slowest_seconds", **of) == 0.2

    def test_the_numbers_of_the_report_have_their_dotted_names(self, gov: GovRedis) -> None:
        tell(gov, limits__denied=3)
        found = samples(gov)
        names = {dict(labels)["name"]: n for (name, labels), n in found.items() if name == "govredis_health_value"}
        assert names["counters.denials.hour"] == 3
        assert names["redis.used_memory"] > 0
        assert not any(name.startswith("counters.counts") for name in names), "these are this process's alone"

    def test_a_redis_in_memory_has_one_process(self) -> None:
        with GovRedis.in_memory() as gov:
            gov.limits.hit("a", "9/hour")
            gov.internal.account.flush()
            assert value(gov, "govredis_limits_allowed_total") == 1


class away:
    """No call of these reaches Redis."""

    def __init__(self, *govs: GovRedis) -> None:
        self._clients = [redis_of(gov) for gov in govs]

    def __enter__(self) -> None:
        def refuse(*_: Any, **__: Any) -> None:
            raise BackendUnavailable("away")

        for client in self._clients:
            client._round_trip = refuse  # type: ignore[method-assign]

    def __exit__(self, *_: Any) -> None:
        for client in self._clients:
            del client._round_trip  # type: ignore[method-assign]


class TestFlask:
    def test_the_endpoint_is_for_those_who_may_see_the_report(self, gov: GovRedis, promtool: str) -> None:
        app = Flask("shop")
        app.config["GOVREDIS_HEALTH_DETAILS"] = lambda: request.headers.get("X-Ops") == "yes"
        app.config["GOVREDIS_URL_PREFIX"] = "/ops"
        FlaskGovRedis(app, gov)
        client = app.test_client()
        gov.limits.hit("a", "9/hour")
        gov.internal.account.flush()
        refused = client.get("/ops/metrics")
        assert (refused.status_code, "limits" in refused.text) == (403, False)
        shown = client.get("/ops/metrics", headers={"X-Ops": "yes"})
        assert shown.status_code == 200
        assert shown.headers["Cache-Control"] == "no-store"
        assert shown.headers["Content-Type"].startswith("text/plain; version=")
        assert "govredis_limits_allowed_total 1.0" in shown.text
        checked = subprocess.run([promtool, "check", "metrics"], input=shown.text, capture_output=True, text=True)
        assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")

    def test_without_the_extra_it_says_so(self, gov: GovRedis, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "prometheus_client", None)
        app = Flask("shop")
        app.config["GOVREDIS_HEALTH_DETAILS"] = True
        FlaskGovRedis(app, gov)
        answer = app.test_client().get("/govredis/metrics")
        assert answer.status_code == 501
        assert "pip install 'govredis[prometheus]'" in answer.text


# -- docs/metrics.md, alerts.yml and grafana.json --------------------------------------------------------------------


def counted() -> Iterator[tuple[str, str]]:
    """The literal names in the sources, with braces for what varies, and the file of each."""
    for path in sorted(Path(govredis.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            method, owner = node.func.attr, ast.unparse(node.func.value)
            if method in {"add", "add_each"} and owner.endswith("counters"):
                prefix, named = "", node.args if method == "add_each" else node.args[:1]
            elif method == "count" and owner in {"self", "backend", "self._backend"}:
                prefix, named = "{}.", node.args[:1]
            elif method == "_count":
                prefix, named = "", node.args[1:]
            else:
                continue
            for argument in named:
                for literal in literals(argument):
                    yield prefix + literal, path.name


def literals(node: ast.expr) -> list[str]:
    if isinstance(node, ast.IfExp):
        return [*literals(node.body), *literals(node.orelse)]
    if isinstance(node, ast.JoinedStr):
        return ["".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)]
    return [node.value] if isinstance(node, ast.Constant) and isinstance(node.value, str) else []


def test_every_counter_in_the_sources_has_its_meaning() -> None:
    known = {re.sub(r"{\w+}", "{}", name) for name in COUNTERS}
    found = {name: path for name, path in counted() if name != "{}.{}" and re.fullmatch(r"[\w{}]+(\.[\w{}]+)+", name)}
    assert len(found) > 60
    assert {name: path for name, path in found.items() if name not in known and not is_of(name, known)} == {}


def is_of(name: str, known: set[str]) -> bool:
    """Is it one of a kind that is known by its varying part, as guard.degraded.redis is?"""
    return any(
        re.fullmatch(re.escape(each).replace(r"\{\}", r"\w+"), name) for each in known if not each.startswith("{}")
    )


def test_the_page_lists_every_counter_and_its_metric() -> None:
    rows = dict(re.findall(r"^\| `([\w.{}]+)` \| `(govredis_\w+)_total`", PAGE, re.M))
    assert rows == {name: describe(name).metric for name in COUNTERS}


def exposed() -> set[str]:
    """The names of all metrics that there can be, as the page has them."""
    assert set(re.findall(r"`(govredis_[a-z_]+)`", PAGE)) >= {"govredis_redis_seconds", "govredis_health_value"}
    names = set(re.findall(r"`(govredis_[a-z_]+)`", PAGE)) | {f"{describe(name).metric}_total" for name in COUNTERS}
    return names | {
        f"govredis_{s}_seconds_{part}" for s in ("redis", "postgres") for part in ("bucket", "sum", "count")
    }


def asked_for(*expressions: str) -> set[str]:
    return {name for each in expressions for name in re.findall(r"\bgovredis_\w+", each)}


RULES = yaml.safe_load((ROOT / "docs" / "alerts.yml").read_text())["groups"][0]["rules"]
BOARD = json.loads((ROOT / "docs" / "grafana.json").read_text())


def expressions_of_board() -> list[str]:
    of_panels = [target["expr"] for panel in BOARD["panels"] for target in panel["targets"]]
    return of_panels + [each["expr"] for each in BOARD["annotations"]["list"]]


def test_the_page_lists_every_metric_and_no_other(gov: GovRedis) -> None:
    gov.health.check()
    found = {re.sub(r"_(bucket|sum|count)$", "", name) for name, _ in samples(gov)}
    known = exposed()
    assert found - known == set()
    on_page = set(re.findall(r"^\| `(govredis_[a-z_]+)` \|", PAGE, re.M))
    last = {name for name in on_page if name.startswith("govredis_last_outage")}
    assert on_page - last - {"govredis_other_total"} <= found


def test_the_dashboard_and_the_rules_ask_for_what_is_exposed() -> None:
    rules = [rule["expr"] for rule in RULES]
    assert len(asked_for(*rules)) > 8
    assert asked_for(*rules, *expressions_of_board()) - exposed() == set()


def test_promtool_takes_the_rules_and_the_dashboards_expressions(promtool: str, tmp_path: Path) -> None:
    spelled = [re.sub(r"\$__(rate_interval|range)", "5m", each) for each in expressions_of_board()]
    records = [{"record": f"board:{n}", "expr": each} for n, each in enumerate(spelled)]
    (tmp_path / "board.yml").write_text(yaml.safe_dump({"groups": [{"name": "board", "rules": records}]}))
    for path in tmp_path / "board.yml", ROOT / "docs" / "alerts.yml":
        checked = subprocess.run([promtool, "check", "rules", str(path)], capture_output=True, text=True)
        assert checked.returncode == 0, checked.stdout + checked.stderr


def test_each_rule_fires_and_not_before(promtool: str) -> None:
    path = ROOT / "tests" / "data" / "alerts_test.yml"
    tested = {
        case["alertname"] for group in yaml.safe_load(path.read_text())["tests"] for case in group["alert_rule_test"]
    }
    assert tested == {rule["alert"] for rule in RULES}
    done = subprocess.run([promtool, "test", "rules", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
