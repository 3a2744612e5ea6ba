"""The app of the worker subprocesses. Its tasks note what they saw and did, in a Redis that is only for that.

GOVREDIS_TEST_APP, a JSON object: `name` of the process, `broker`, `backend` and `evidence` (URLs), `queue`, `conf` (the
app's settings), `warm`: use everything here, in the parent, before there are workers, and `silent`: a process tells
its denials only when it ends.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import signal
import time
from typing import Any

import redis
from celery import Celery, Task, current_task
from celery.exceptions import SoftTimeLimitExceeded
from celery.signals import task_retry, worker_process_init, worker_ready

from govredis import Config, GovRedis, _teller
from govredis.contrib.celery import exclusive, init_celery, rate_limited
from govredis.contrib.celery._gov import gov_of
from govredis.contrib.celery._parking import HEADER

SETTINGS: dict[str, Any] = json.loads(os.environ["GOVREDIS_TEST_APP"])


def die_with_parent(**_: Any) -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1: PR_SET_PDEATHSIG


die_with_parent()
worker_process_init.connect(die_with_parent)

evidence = redis.Redis.from_url(SETTINGS["evidence"], decode_responses=True)

app: Celery = Celery("celery_app", broker=SETTINGS["broker"], backend=SETTINGS["backend"])
app.conf.update(
    task_default_queue=SETTINGS["queue"], broker_connection_retry_on_startup=True, **SETTINGS.get("conf", {})
)


def note(what: str, **seen: Any) -> None:
    line = {"at": time.monotonic(), "pid": os.getpid(), "node": SETTINGS["name"], **seen}
    evidence.rpush(what, json.dumps(line, default=str))


@worker_ready.connect
def ready(**_: Any) -> None:
    note(f"ready:{SETTINGS['name']}")


@task_retry.connect
def retried(sender: Task, request: Any, reason: Any, **_: Any) -> None:
    result = getattr(reason.exc, "result", None)
    note(
        f"retry:{request.id}",
        task=sender.name,
        why=type(reason.exc).__name__,
        when=reason.when,
        retry_after=getattr(result, "retry_after", None),
        degraded=getattr(result, "degraded", None),
    )


# -- limits ----------------------------------------------------------------------------------------------------------


def deliveries() -> int:
    """How often the running task's message has come, this time included."""
    return int(evidence.incr(f"deliveries:{current_task.request.id}"))


#: Parts of a request that describe a delivery: when it may run, and how it came.
CHANGES = {"eta", "delivery_info", "properties", "hostname", "_children", "argsrepr", "kwargsrepr", HEADER}


def used_up_at_first(rate: str) -> Any:
    """A key callable: on a message's first delivery the limit is used up just before it is asked."""

    def key(self: Task, identity: str, *args: Any, **kwargs: Any) -> str:
        request = self.request
        seen = {what: value for what, value in vars(request).items() if what not in CHANGES}
        info = request.delivery_info
        seen["where"] = [info["exchange"], info["routing_key"], info["priority"]]
        note(f"seen:{request.id}", message=seen, eta=request.eta)
        if deliveries() == 1:
            gov_of(app).limits.hit(identity, rate, operation=self.name)
        return identity

    return key


@app.task(bind=True, name="flood", max_retries=0, autoretry_for=(Exception,))
@rate_limited("20/2 seconds", key="{agent}", operation="flood")
def flood(self: Task, agent: str, n: int) -> int:
    note(
        "flood",
        n=n,
        retries=self.request.retries,
        max_retries=self.max_retries,
        override=getattr(self, "override_max_retries", None),
    )
    return n


def counted(self: Task, agent: str, n: int, rate: str) -> str:
    deliveries()
    return agent


@app.task(bind=True, name="queued", max_retries=0, acks_late=True)
@rate_limited(lambda self, agent, n, rate: rate, key=counted, operation="queued")
def queued(self: Task, agent: str, n: int, rate: str) -> int:
    note("queued", n=n)
    return n


@app.task(bind=True, name="traced")
@rate_limited("1/2 seconds", key=used_up_at_first("1/2 seconds"), operation="traced")
def traced(self: Task, identity: str, number: int = 0) -> int:
    note(f"ran:{self.request.id}", retries=self.request.retries)
    return number


@app.task(name="add")
def add(*numbers: Any) -> int:
    flat = numbers[0] if isinstance(numbers[0], list) else numbers
    note("added", numbers=flat)
    return sum(flat)


@app.task(bind=True, name="hourly")
@rate_limited("1/hour", key=used_up_at_first("1/hour"), operation="hourly")
def hourly(self: Task, identity: str) -> None:
    note(f"ran:{self.request.id}")


@app.task(bind=True, name="failing", autoretry_for=(ValueError,), retry_kwargs={"max_retries": 1, "countdown": 0})
@rate_limited("1/3 seconds", key=lambda self, identity: failing_key(self, identity), operation="failing")
def failing(self: Task, identity: str) -> int:
    note(f"ran:{self.request.id}", retries=self.request.retries)
    if self.request.retries == 0:
        raise ValueError("for the first time")
    return int(self.request.retries)


def failing_key(self: Task, identity: str) -> str:
    # Refused on the first delivery, and again on the one that follows the failure.
    if deliveries() in {1, 3}:
        gov_of(app).limits.hit(identity, "1/3 seconds", operation="failing")
    return identity


@app.task(name="late", acks_late=True)
def late(n: int) -> None:
    time.sleep(0.5)
    note("late", n=n)


@app.task(name="late_limited", acks_late=True)
@rate_limited("10/hour", key="{agent}", operation="late")
def late_limited(agent: str, n: int) -> None:
    note("late_limited", n=n)


@app.task(name="strict")
@rate_limited("1/hour", key="{agent}", operation="strict", on_limit="raise")
def strict(agent: str) -> str:
    return agent


@app.task(name="skipping")
@rate_limited("1/hour", key="{agent}", operation="skipping", on_limit="skip")
def skipping(agent: str) -> str:
    return agent


def gated(function: Any) -> Any:
    """It waits for the test, on its first delivery, before it is asked whether it may run."""

    @functools.wraps(function)
    def waits(self: Task, key: str) -> None:
        if deliveries() == 1:
            note(f"gate:{self.request.id}")
            wait_for("gate-open")
        function(self, key)

    return waits


def wait_for(key: str) -> None:
    deadline = time.monotonic() + 180
    while not evidence.exists(key):
        assert time.monotonic() < deadline, f"{key} was never set"
        time.sleep(0.02)


@app.task(bind=True, name="gated_late", acks_late=True)
@gated
@exclusive("gated:{key}")
def gated_late(self: Task, key: str) -> None:
    note(f"ran:{self.request.id}")


@app.task(bind=True, name="gated_early")
@gated
@exclusive("gated:{key}")
def gated_early(self: Task, key: str) -> None:
    note(f"ran:{self.request.id}")


# -- locks -----------------------------------------------------------------------------------------------------------


@app.task(bind=True, name="alone", max_retries=0)
@exclusive("alone:{key}", ttl=60)
def alone(self: Task, key: str, n: int, seconds: float = 0.0) -> int:
    began = time.monotonic()
    time.sleep(seconds)
    note(
        "alone",
        key=key,
        n=n,
        began=began,
        ended=time.monotonic(),
        retries=self.request.retries,
        headers=self.request.headers,
    )
    return n


@app.task(name="alone_or_error")
@exclusive("hold:{key}", on_conflict="raise")
def alone_or_error(key: str) -> str:
    return key


@app.task(name="alone_or_not")
@exclusive("hold:{key}", on_conflict="skip")
def alone_or_not(key: str) -> str:
    return key


@app.task(name="meet")
@exclusive("meet:{mine}", ttl=60)
def meet(mine: str, others: str) -> None:
    """Is done only if the other one runs at the same time."""
    evidence.set(f"met:{mine}", 1)
    wait_for(f"met:{others}")


def _hold(self: Task, key: str) -> str:
    note(f"holding:{key}")
    try:
        time.sleep(1000)
    except SoftTimeLimitExceeded:
        return "ended softly"
    return "was not ended"


# Nobody waits for the end of the lease of `hold`, or of itself. A renewal that a stall of 5 s holds up is in time.
HELD_SHORTLY = 10
app.task(exclusive("hold:{key}", ttl=1000)(_hold), name="hold", bind=True)
app.task(exclusive("hold:{key}", ttl=HELD_SHORTLY)(_hold), name="hold_shortly", bind=True)


@app.task(name="follow")
@exclusive("hold:{key}", ttl=60)
def follow(key: str) -> None:
    note(f"followed:{key}")


@app.task(name="hold_late", acks_late=True, reject_on_worker_lost=True)
@exclusive("hold:{key}", ttl=1000)
def hold_late(key: str) -> int:
    """Until the test lets it end."""
    lock = gov_of(app).locks.holder(f"hold:{key}")
    note(f"holding:{key}", id=current_task.request.id, token=lock and lock.token)
    wait_for(f"end:{key}")
    note(f"held:{key}")
    return os.getpid()


# -- forks -----------------------------------------------------------------------------------------------------------


def use_everything(gov: GovRedis, name: str) -> dict[str, Any]:
    """The results, and the sockets that this process has to the Redis of `gov`."""
    with gov.locks.acquire(f"lock-{name}", timeout=10) as held:
        token = held.token
    return {
        "token": token,
        "allowed": gov.limits.hit(f"limit-{name}", "1000/hour").allowed,
        "bound": gov.sessions.bind(f"session-{name}", "agent").agent_id,
        "session": gov.sessions.get_agent_id(f"session-{name}"),
        "loaded": gov.metadata.get_or_load("agent", lambda _: {"a": 1}),
        "away": gov.counters.get("limits.degraded.local"),
        "clients": [gov.internal.context.redis.call("CLIENT", "ID") for _ in range(3)],  # type: ignore[union-attr]
        "sockets": sorted(sockets_to(gov.config.redis_url)),
    }


def sockets_to(url: str) -> set[str]:
    """The inodes of this process's own TCP sockets to a server on 127.0.0.1."""
    port = f"0100007F:{int(url.split(':')[2].split('/')[0]):04X}"
    with open("/proc/self/net/tcp") as file:
        connected = {line.split()[9] for line in file if line.split()[2] == port}
    mine = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            mine.add(os.readlink(f"/proc/self/fd/{fd}").removeprefix("socket:[").removesuffix("]"))
        except FileNotFoundError:  # the descriptor that listed them
            pass
    return connected & mine


@app.task(name="use")
def use(n: int) -> dict[str, Any]:
    return {"pid": os.getpid(), **use_everything(gov_of(app), f"{n % 5}")}


if SETTINGS.get("silent"):
    _teller.INTERVAL = 3600

if SETTINGS.get("warm"):
    warm = GovRedis(Config(**SETTINGS["warm"]))
    note("warm", **use_everything(warm, "parent"))
    kept = warm.locks.acquire(f"kept-by-{os.getpid()}", timeout=1, ttl=15)
    init_celery(app, warm)
else:
    init_celery(app)
