"""`govredis migrate`, `govredis health` and `govredis doctor`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from urllib.parse import unquote, urlsplit

import click

from .._acl import FEATURES, rights
from ..client import RedisClient
from ..config import Config
from ..errors import BackendError, BackendUnavailable, ConfigurationError
from ..outbox import FreshnessLease
from ._invocation import invoked_gov, say
from ._remedies import remedy


@click.command()
def migrate() -> None:
    """Make or update our tables in PostgreSQL.

    The database is that of GOVREDIS_DATABASE_URL.
    """
    with invoked_gov() as gov:
        applied = gov.postgres.migrate()
    for name in applied:
        say(f"applied {name}")
    if not applied:
        say("up to date")


@click.command()
def health() -> None:
    """Print the health report as JSON. Exits with 1 if it says fail."""
    with invoked_gov() as gov:
        report = gov.health.check()
    click.echo(json.dumps(report.as_dict(), indent=2))
    if report.status == "fail":
        sys.exit(1)


@click.command()
@click.option("--acl", is_flag=True, help="Print the rights that our user of Redis needs, without connecting.")
@click.option(
    "--feature",
    "features",
    multiple=True,
    type=click.Choice(FEATURES),
    help="With --acl: for this feature; may be repeated.",
)
@click.option("--namespace", "namespaces", multiple=True, help="With --acl: another cache of yours; may be repeated.")
def doctor(acl: bool, features: tuple[str, ...], namespaces: tuple[str, ...]) -> None:
    """Name the faults of this deployment, and the remedies. Exits with 1 if there are any.

    Prints a line for each check of the health report that does not pass, or cannot tell.

    With --acl: prints the rules of ACL SETUSER, for Redis 6.2 or newer, that allow all commands of the features under
    these settings, and nothing else. Celery's own keys, as a broker, are not among them.
    """
    if (features or namespaces) and not acl:
        raise click.UsageError("--feature and --namespace go with --acl")
    if acl:
        with invoked_gov() as gov:
            _print_acl(gov.config, features or FEATURES, ("agent_meta", *namespaces))
        return
    with invoked_gov() as gov:
        redis = gov.internal.context.redis
        if redis is not None:
            _measure_where_it_is_away(redis)
        not_told = _tell_of_changes(gov.internal.freshness)
        found = [check for check in gov.health.check().checks if check.status != "pass" or "unknown" in check.output]
        url = gov.config.redis_url
    for check in found:
        more = not_told if check.name == "outbox" else remedy(check, url)
        say(f"{check.name}: {check.output}{more}")
    if found:
        sys.exit(1)
    say("nothing is wrong")


def _measure_where_it_is_away(redis: RedisClient) -> None:
    """Measure the distance of a Redis that is away, for the report. A process that lives on does so by and by."""
    try:
        redis.call("PING")
    except BackendUnavailable:
        redis.distance.ask()
    except BackendError:
        pass  # it answers


def _tell_of_changes(freshness: FreshnessLease | None) -> str:
    """Tell Redis of the outbox, as the next reader would: where nobody reads, nobody has told it. Returns the words for
    why it was not told; "" where it was, or there was nothing to tell."""
    if freshness is None:
        return ""
    try:
        lag = freshness.state().lag
        told = lag is None or not lag.entries or freshness.drain() is not None
    except (BackendError, ConfigurationError) as error:
        return f"; telling it now has failed: {error}"
    return "" if told else "; telling it now has failed: a server is away, or another process does so"


def _print_acl(config: Config, features: Sequence[str], namespaces: Sequence[str]) -> None:
    parked = [feature for feature in features if feature == "celery"] if config.parking_url is not None else []
    here = [feature for feature in features if feature not in parked]
    for of, where, url in (here, "REDIS_URL", config.redis_url), (parked, "GOVREDIS_PARKING_URL", config.parking_url):
        if of and url is not None:
            user = unquote(urlsplit(url).username or "") or "govredis"
            if config.parking_url is not None:
                say(f"# at {where}")
            there = replace(config, redis_url=url, credential_provider=None)
            say(f"ACL SETUSER {user} on {rights(there, of, namespaces).rules()}")
