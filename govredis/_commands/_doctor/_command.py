"""`govredis doctor`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from urllib.parse import unquote, urlsplit

import click

from ..._acl import FEATURES, rights
from ...api import GovRedis
from ...client import RedisClient, RedisNode
from ...config import Config, address_of, config_at
from ...errors import BackendError, ConfigurationError
from ...health.nodes import address_in
from .._invocation import CommandFailed, answer_no, invoked_gov
from .._output import json_option, print_json, print_table, say
from . import _celery, _cluster, _rights, _servers
from ._diagnosis import Diagnosis, Fact
from ._health import faults_of_health


@click.command()
@click.option("--acl", is_flag=True, help="Print the rights that our user of Redis needs, without connecting.")
@click.option(
    "--feature", "features", multiple=True, type=click.Choice(FEATURES), help="For this feature; may be repeated."
)
@click.option("--namespace", "namespaces", multiple=True, help="For another cache of yours, too; may be repeated.")
@click.option("-A", "--app", "app_name", metavar="MODULE:APP", help="Look at this Celery app, its broker and queues.")
@json_option
def doctor(
    acl: bool, features: tuple[str, ...], namespaces: tuple[str, ...], app_name: str | None, as_json: bool
) -> None:
    """Name the faults of this deployment, and the remedies. Exits with 1 if there are any.

    Looks at the settings, versions, both servers, their clocks, the timeouts, our rights there, and the lock folder.
    With --app also at the broker, and at queues that no worker reads. For each fault it says why that matters, and the
    change that mends it. Notes are no faults: choices that may be on purpose, and things that it could not look at.

    --feature names the features in use: rights that only others need are not missed.

    With --acl: prints the rules of ACL SETUSER, for Redis 6.2 or newer, that allow all commands of the features under
    these settings, and nothing else. Celery's own keys, as a broker, are not among them.
    """
    chosen, names = features or FEATURES, ("agent_meta", *namespaces)
    if acl:
        if app_name is not None:
            raise click.UsageError("--app does not go with --acl")
        with invoked_gov() as gov:
            _print_acl(gov.config, chosen, names, as_json)
        return
    app = None if app_name is None else _celery.find_celery_app(app_name)
    found = [*_servers.of_process()]
    try:
        with invoked_gov() as gov:
            found += _examine(gov, chosen, names)
    except CommandFailed as failed:
        if not isinstance(failed.__cause__, ConfigurationError):
            raise
        found.append(Diagnosis("settings", failed.message, "govredis does not start with it", "docs/configuration.md"))
    if app is not None:
        found += _celery.of_celery(app)
    _report(found, as_json)


def _examine(gov: GovRedis, features: Sequence[str], namespaces: Sequence[str]) -> Iterator[Fact | Diagnosis]:
    faults = [*faults_of_health(gov)]
    yield from faults
    yield from _servers.of_settings(gov)
    # A fault of a server is said once.
    ill = {fault.about for fault in faults if fault.is_fault}
    context = gov.internal.context
    redis, postgres = context.redis, context.postgres
    address = address_of(gov.config)
    if redis is not None and ("redis" not in ill or address.nodes):
        yield from _tried("redis", lambda: _of_nodes(redis, partial(_servers.of_redis, gov)))
        if address.nodes:
            yield from _tried("cluster", lambda: _cluster.of_cluster(redis, gov.config.connect_timeout))
        if address.nodes or address.sentinels is not None:
            yield from _tried("replication", lambda: _cluster.of_failovers(redis, _there(redis)))
        examine = partial(_rights.of_redis_user, gov, features=features, namespaces=namespaces)
        yield from _tried("acl", lambda: _of_nodes(redis, examine))
    if postgres is not None and "postgres" not in ill:
        yield from _tried("postgres", lambda: _servers.of_postgres(gov, postgres))
        yield from _tried("grants", lambda: _rights.of_postgres_role(gov, postgres))


def _there(redis: RedisClient) -> list[RedisNode]:
    """The nodes that are not away. Raises BackendError."""
    return [node for node in redis.nodes() if node.breaker.closed]


def _of_nodes(
    redis: RedisClient, examine: Callable[[RedisNode], Iterator[Fact | Diagnosis]]
) -> Iterator[Fact | Diagnosis]:
    """The findings at all nodes that are not away: those that all have once, and the others with their node."""
    found = {address_in(redis, node): [*examine(node)] for node in _there(redis)}
    all_have = [each for each in next(iter(found.values()), []) if all(each in mine for mine in found.values())]
    yield from all_have
    for address, mine in found.items():
        for each in mine:
            if each not in all_have:
                yield _named(each, address)


def _named(each: Fact | Diagnosis, address: str) -> Fact | Diagnosis:
    if isinstance(each, Fact):
        return each if address in each.seen else Fact(each.about, f"{address}: {each.seen}")
    return each if address in each.what else replace(each, what=f"{address}: {each.what}")


def _tried(about: str, examine: Callable[[], Iterator[Fact | Diagnosis]]) -> Iterator[Fact | Diagnosis]:
    try:
        yield from examine()
    except BackendError as error:
        yield Diagnosis(about, f"it could not be looked at: {error}", "a fault there is not found", is_fault=False)


def _report(found: Sequence[Fact | Diagnosis], as_json: bool) -> None:
    facts = [each for each in found if isinstance(each, Fact)]
    diagnoses = [each for each in found if isinstance(each, Diagnosis)]
    faults = [each for each in diagnoses if each.is_fault]
    notes = [each for each in diagnoses if not each.is_fault]
    if as_json:
        shown = {"faults": faults, "notes": notes}
        listed = {name: [_data(each) for each in of_kind] for name, of_kind in shown.items()}
        print_json({**listed, "facts": [fact._asdict() for fact in facts]})
    else:
        print_table(("LOOKED AT", "SEEN"), facts)
        for title, of_kind in ("note", notes), ("fault", faults):
            if of_kind:
                say("")
                say(f"{len(of_kind)} {title}{'s' if len(of_kind) > 1 else ''}:")
                for each in of_kind:
                    _print_diagnosis(each)
        if not faults:
            say("")
            say("nothing is wrong")
    if faults:
        answer_no()


def _print_diagnosis(diagnosis: Diagnosis) -> None:
    say(f"{diagnosis.about}: {diagnosis.what}")
    for name, text in ("why", diagnosis.why), ("change", diagnosis.change):
        if text:
            say(f"  {name}: {text}")


def _data(diagnosis: Diagnosis) -> dict[str, str]:
    data = asdict(diagnosis)
    del data["is_fault"]
    return data


def _print_acl(config: Config, features: Sequence[str], namespaces: Sequence[str], as_json: bool) -> None:
    parked = [feature for feature in features if feature == "celery"] if config.parking_url is not None else []
    here = [feature for feature in features if feature not in parked]
    listed = []
    for of, where, url in (here, "REDIS_URL", config.redis_url), (parked, "GOVREDIS_PARKING_URL", config.parking_url):
        if of and url is not None:
            user = unquote(urlsplit(url).username or "") or "govredis"
            there = config if of is here else config_at(config, url)
            listed.append({"at": where, "user": user, "rules": rights(there, of, namespaces).rules()})
    if as_json:
        print_json(listed)
        return
    for each in listed:
        if config.parking_url is not None:
            say(f"# at {each['at']}")
        say(f"ACL SETUSER {each['user']} on {each['rules']}")
