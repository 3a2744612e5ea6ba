"""The operations that a planner counts with, and how govredis, redis-py, the peers and a raw socket do each."""

from __future__ import annotations

import importlib.util
import itertools
import json
from collections.abc import Callable
from typing import Any

from govredis import Config, GovRedis, Limit
from govredis.limits.backends.redis_backend import RedisLimitBackend

from .sites import PATIENT, Call, Site

Maker = Callable[[Site], Call]

RAW = "raw socket, same bytes"
OURS = "govredis"
REDIS_PY = "redis-py"
LIMITS = "limits"
THROTTLED = "throttled-py"
PYRATE = "pyrate-limiter"
REDIS_LOCK = "python-redis-lock"
#: Not a contestant: the part of the call that parses the value.
JSON = "json.loads of the value, alone"

#: The packages of the peers, by the name of a contestant.
PACKAGES = {LIMITS: "limits", THROTTLED: "throttled", PYRATE: "pyrate_limiter", REDIS_LOCK: "redis_lock"}

#: So much an hour that no hit is refused.
PLENTY = 1_000_000
VALUE = {"team": "search", "tags": ["a", "b"], "n": 1}


# -- GET: the base of the ratios ---------------------------------------------------------------------------------------


def get_raw(site: Site) -> Call:
    get_ours(site)
    return site.replay(site.sent_by(lambda: site.client.call("GET", f"{site.who}:plain"), [b"v"]))


def get_ours(site: Site) -> Call:
    key, call = f"{site.who}:plain", site.client.call
    call("SET", key, "v" * 60)
    return lambda: call("GET", key)


def get_redis_py(site: Site) -> Call:
    key, get = f"{site.who}:plain", site.plain.get
    get_ours(site)
    return lambda: get(key)


# -- limits.hit --------------------------------------------------------------------------------------------------------


def hit_ours(site: Site) -> Call:
    name, hit, rate = site.in_turn(), site.gov.limits.hit, f"{PLENTY}/hour"
    return lambda: hit(name(), rate, operation="op")


def hit_raw(site: Site) -> Call:
    hit = hit_ours(site)
    hit()  # Redis knows the script then
    return site.replay_anew([site.sent_by(hit, [[1, 1, 1, 0, 0]])[0] for _ in site.names], 7)


def hit_redis_py(site: Site) -> Call:
    """The same script, by redis-py."""
    backend = RedisLimitBackend(site.client)
    script, name, members = backend._script.sha, site.in_turn(), itertools.count()
    site.plain.script_load(backend._script.source)

    def call() -> object:
        key = f"rate_limit:r:{name()}"
        keys = key, f"{{{key}}}:window"
        return site.plain.evalsha(script, 2, *keys, "hit", 1, f"m{next(members)}", "", PLENTY, 3_600_000_000)

    return call


def hit_limits(site: Site) -> Call:
    import limits

    storage = limits.storage.storage_from_string(site.url)
    moving, rate, name = (
        limits.strategies.MovingWindowRateLimiter(storage),
        limits.parse(f"{PLENTY}/hour"),
        site.in_turn(),
    )
    return lambda: moving.hit(rate, name())


def hit_throttled(site: Site) -> Call:
    import throttled

    quota, store = throttled.per_hour(PLENTY), throttled.RedisStore(server=site.url)
    limiter, name = throttled.Throttled(using="sliding_window", quota=quota, store=store), site.in_turn()
    return lambda: limiter.limit(name())


def busy_ours(site: Site) -> Call:
    hit, rate = site.gov.limits.hit, f"{PLENTY}/hour"
    return lambda: hit(f"{site.who}-busy", rate, operation="op")


def busy_raw(site: Site) -> Call:
    hit = busy_ours(site)
    hit()
    return site.replay_anew(site.sent_by(hit, [[1, 1, 1, 0, 0]]), 7)


def busy_limits(site: Site) -> Call:
    import limits

    moving = limits.strategies.MovingWindowRateLimiter(limits.storage.storage_from_string(site.url))
    rate = limits.parse(f"{PLENTY}/hour")
    return lambda: moving.hit(rate, f"{site.who}-busy")


def busy_throttled(site: Site) -> Call:
    import throttled

    quota, store = throttled.per_hour(PLENTY), throttled.RedisStore(server=site.url)
    limiter = throttled.Throttled(using="sliding_window", quota=quota, store=store)
    return lambda: limiter.limit(f"{site.who}-busy")


def pyrate_of(site: Site, key: str, count: int) -> Call:
    import pyrate_limiter

    rates = [pyrate_limiter.Rate(count, pyrate_limiter.Duration.HOUR)]
    limiter = pyrate_limiter.Limiter(pyrate_limiter.RedisBucket.init(rates, site.plain, key))
    return lambda: limiter.try_acquire("bench", blocking=False)


def busy_pyrate(site: Site) -> Call:
    """A bucket is an identity, so this peer is only here."""
    return pyrate_of(site, f"pyrate:{site.who}", PLENTY)


# -- limits.hit, a counter ---------------------------------------------------------------------------------------------


def counter_ours(site: Site) -> Call:
    name, hit, many = site.in_turn(), site.gov.limits.hit, Limit(10**12, 3600, algorithm="sliding_window_counter")
    return lambda: hit(name(), many, operation="op")


def counter_raw(site: Site) -> Call:
    count = counter_ours(site)
    count()
    return site.replay_anew([site.sent_by(count, [[1, 1, 1, 0, 0, 0]])[0] for _ in site.names], 6)


def counter_limits(site: Site) -> Call:
    import limits

    storage = limits.storage.storage_from_string(site.url)
    counter, name = limits.strategies.SlidingWindowCounterRateLimiter(storage), site.in_turn()
    rate = limits.parse(f"{PLENTY}/hour")
    return lambda: counter.hit(rate, name())


# -- limits.hit, denied again ------------------------------------------------------------------------------------------


def denied_ours(site: Site) -> Call:
    site.gov.limits.hit(f"{site.who}-denied", "1/hour", operation="op")
    return lambda: site.gov.limits.hit(f"{site.who}-denied", "1/hour", operation="op")


def asking(site: Site) -> tuple[GovRedis, Call]:
    gov = GovRedis(Config(redis_url=site.url, lock_folder=site.folder, limit_deny_cache=False, **PATIENT))
    gov.limits.hit(f"{site.who}-asked", "1/hour", operation="op")
    return gov, lambda: gov.limits.hit(f"{site.who}-asked", "1/hour", operation="op")


def denied_asking(site: Site) -> Call:
    return asking(site)[1]


def denied_raw(site: Site) -> Call:
    gov, ask = asking(site)
    return site.replay(site.sent_by(ask, [[0, 1, 0, 1, 1]], gov))


def denied_limits(site: Site) -> Call:
    import limits

    moving = limits.strategies.MovingWindowRateLimiter(limits.storage.storage_from_string(site.url))
    once = limits.parse("1/hour")
    return lambda: moving.hit(once, f"{site.who}-denied")


def denied_throttled(site: Site) -> Call:
    import throttled

    store = throttled.RedisStore(server=site.url)
    limiter = throttled.Throttled(using="sliding_window", quota=throttled.per_hour(1), store=store)
    return lambda: limiter.limit(f"{site.who}-denied")


def denied_pyrate(site: Site) -> Call:
    return pyrate_of(site, f"pyrate-denied:{site.who}", 1)


# -- sessions.get ------------------------------------------------------------------------------------------------------


def session_ours(site: Site) -> Call:
    site.gov.sessions.bind(f"{site.who}-session", "agent-1")
    return lambda: site.gov.sessions.get(f"{site.who}-session")


def session_raw(site: Site) -> Call:
    get = session_ours(site)
    stored = site.plain.get(f"session:{site.who}-session")
    return site.replay(site.sent_by(get, [[[stored], 3_000_000]]))


def session_redis_py(site: Site) -> Call:
    """GET and PTTL in a pipeline, and JSON parsed."""
    session_ours(site)
    pipe, key = site.plain.pipeline(transaction=False), f"session:{site.who}-session"

    def call() -> object:
        value, ttl = pipe.get(key).pttl(key).execute()
        return json.loads(value), ttl

    return call


def session_json(site: Site) -> Call:
    session_ours(site)
    stored: Any = site.plain.get(f"session:{site.who}-session")
    return lambda: json.loads(stored)


# -- metadata.get ------------------------------------------------------------------------------------------------------


def metadata_ours(site: Site) -> Call:
    site.gov.metadata.set(f"{site.who}-agent", VALUE)
    return lambda: site.gov.metadata.get(f"{site.who}-agent")


def metadata_raw(site: Site) -> Call:
    get, key = metadata_ours(site), f"agent_meta:{site.who}-agent"
    return site.replay(site.sent_by(get, [[site.plain.get(key), site.plain.get(f"{{{key}}}:stamp"), None]]))


def metadata_redis_py(site: Site) -> Call:
    """GET, and JSON parsed."""
    metadata_ours(site)
    key: Any = f"agent_meta:{site.who}-agent"
    return lambda: json.loads(site.plain.get(key))  # type: ignore[arg-type]


def metadata_json(site: Site) -> Call:
    metadata_ours(site)
    stored: Any = site.plain.get(f"agent_meta:{site.who}-agent")
    return lambda: json.loads(stored)


# -- locks.acquire and release -----------------------------------------------------------------------------------------


def lock_ours(site: Site) -> Call:
    acquire, name = site.gov.locks.acquire, f"{site.who}-lock"
    return lambda: acquire(name).release()


def lock_raw(site: Site) -> Call:
    cycle = lock_ours(site)
    cycle()
    # A grant's token must be above the last, which the lock file remembers.
    seconds, microseconds = site.plain.time()  # type: ignore[misc]
    packed = site.sent_by(cycle, [[1, seconds * 1_000_000 + microseconds], 1])
    one = site.replay(packed)

    def call() -> None:
        one()
        one()

    return call


def lock_redis_py(site: Site) -> Call:
    name = f"redis-py-{site.who}-lock"

    def call() -> None:
        lock = site.plain.lock(name, timeout=30)
        lock.acquire()
        lock.release()

    return call


def lock_redis_lock(site: Site) -> Call:
    import redis_lock

    def call() -> None:
        lock = redis_lock.Lock(site.plain, f"{site.who}-lock", expire=30)
        lock.acquire()
        lock.release()

    return call


#: By operation, who does it, and how a process makes ready for it.
OPERATIONS: dict[str, dict[str, Maker]] = {
    "GET": {RAW: get_raw, OURS: get_ours, REDIS_PY: get_redis_py},
    "limits.hit": {
        RAW: hit_raw,
        OURS: hit_ours,
        REDIS_PY: hit_redis_py,
        LIMITS: hit_limits,
        THROTTLED: hit_throttled,
    },
    "limits.hit, one busy identity": {
        RAW: busy_raw,
        OURS: busy_ours,
        LIMITS: busy_limits,
        THROTTLED: busy_throttled,
        PYRATE: busy_pyrate,
    },
    "limits.hit, a counter": {RAW: counter_raw, OURS: counter_ours, LIMITS: counter_limits},
    "limits.hit, denied again": {
        RAW: denied_raw,
        OURS: denied_ours,
        "govredis, asking each time": denied_asking,
        LIMITS: denied_limits,
        THROTTLED: denied_throttled,
        PYRATE: denied_pyrate,
    },
    "sessions.get": {RAW: session_raw, OURS: session_ours, REDIS_PY: session_redis_py, JSON: session_json},
    "metadata.get": {RAW: metadata_raw, OURS: metadata_ours, REDIS_PY: metadata_redis_py, JSON: metadata_json},
    "locks.acquire + release": {
        RAW: lock_raw,
        OURS: lock_ours,
        REDIS_PY: lock_redis_py,
        REDIS_LOCK: lock_redis_lock,
    },
}


def missing() -> list[str]:
    """The peers that are not installed: the run is without them, and the report says so."""
    return [name for name, package in PACKAGES.items() if importlib.util.find_spec(package) is None]


def contestants(operation: str) -> dict[str, Maker]:
    """Those of an operation that are installed."""
    absent = missing()
    return {name: make for name, make in OPERATIONS[operation].items() if name not in absent}
