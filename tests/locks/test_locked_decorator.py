"""@gov.locks.locked: a function that is called while the lock of its arguments is held."""

from __future__ import annotations

import functools
import inspect
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from support import PATIENCE

from govredis import GovRedis, HeldLock, LockLost, LockTimeout, LockUnavailable
from govredis.keys import sibling
from govredis.locks import DistributedLock
from govredis.locks.renewal import renewer
from govredis.testing.servers import RedisServer

pytestmark = pytest.mark.one_redis


@pytest.fixture
def locks(make_gov: Callable[..., GovRedis], redis_server: RedisServer) -> DistributedLock:
    return make_gov(redis_url=redis_server.url, socket_timeout=5).locks


@pytest.fixture
def held_now(plain_redis: Any) -> Callable[[], list[str]]:
    """The names of the locks that are held in Redis."""
    return lambda: sorted(key[5:] for key in plain_redis.keys("lock:*") if "{" not in key)


async def coroutine_key(user: str) -> str:
    return user


def generator_key(user: str) -> Iterator[str]:
    yield user


class Agent:
    def __init__(self, name: Any) -> None:
        self.name = name


# -- names -----------------------------------------------------------------------------------------------------------


def test_the_name_is_filled_from_the_arguments_however_they_are_passed(
    locks: DistributedLock, held_now: Callable[[], list[str]]
) -> None:
    @locks.locked("user:{user_id}:{region}:{mode}")
    def work(user_id: int, region: str = "eu", *rest: Any, mode: str = "rw", **more: Any) -> list[str]:
        return held_now()

    assert work(7) == ["user:int=7:eu:rw"]
    assert work(user_id=7) == ["user:int=7:eu:rw"]
    assert work(7, "us", "rest", mode="r", more=1) == ["user:int=7:us:r"]
    assert work(region="us", user_id="a b") == ["user:a%20b:us:rw"]
    assert held_now() == []


def test_attributes_items_and_formats_may_be_named(locks: DistributedLock, held_now: Callable[[], list[str]]) -> None:
    class Machine:
        def __init__(self, name: str) -> None:
            self.name = name

        @locks.locked("machine:{self.name}:{part[id]}:{n:03d}:{n!r}")
        def start(self, part: dict[str, str], n: int = 7) -> list[str]:
            return held_now()

    assert Machine("a").start({"id": "wheel"}) == ["machine:a:wheel:007:7"]
    assert Machine("b").start(part={"id": "wheel"}, n=8) == ["machine:b:wheel:008:8"]


def test_class_and_static_methods(locks: DistributedLock, held_now: Callable[[], list[str]]) -> None:
    class Machine:
        @classmethod
        @locks.locked("{cls.__name__}:{n}")
        def of_class(cls, n: int) -> list[str]:
            return held_now()

        @staticmethod
        @locks.locked("below:{n}")
        def below(n: int) -> list[str]:
            return held_now()

        @locks.locked("above:{n}")
        @staticmethod
        def above(n: int) -> list[str]:
            return held_now()

    assert Machine.of_class(1) == ["Machine:int=1"]
    assert Machine().below(1) == ["below:1"]
    assert Machine.above(1) == ["above:1"]


def test_a_plain_name_is_shared_by_all_calls(locks: DistributedLock, held_now: Callable[[], list[str]]) -> None:
    @locks.locked("nightly")
    def work(*args: Any) -> list[str]:
        return held_now()

    assert work() == work(1, 2) == ["nightly"]


@pytest.mark.parametrize(
    "call",
    [
        lambda work: work(None),
        lambda work: work(agent=None),
        lambda work: work(Agent(None)),
    ],
)
def test_an_argument_of_none_identifies_nobody(
    locks: DistributedLock, redis_server: RedisServer, call: Callable[[Any], Any]
) -> None:
    called: list[Any] = []

    @locks.locked("agent:{agent.name}")
    def of_agent(agent: Any = None) -> None:
        called.append(agent)

    @locks.locked("agent:{agent}")
    def of_id(agent: Any = None) -> None:
        called.append(agent)

    redis_server.command("CONFIG", "RESETSTAT")
    with pytest.raises((ValueError, AttributeError), match="None"):
        call(of_agent)
    with pytest.raises(ValueError, match="agent is None, which identifies nobody"):
        of_id()
    assert not called
    assert "cmdstat_evalsha" not in redis_server.command("INFO", "commandstats")


@pytest.mark.parametrize("value", ["a{b", "a}b", "a\nb", "a" * 600, "\ud800"])
def test_an_argument_that_makes_a_bad_name_is_refused(
    locks: DistributedLock, redis_server: RedisServer, value: str
) -> None:
    called: list[str] = []
    redis_server.command("CONFIG", "RESETSTAT")
    with pytest.raises(ValueError, match="lock name"):
        locks.locked("user:{user}")(lambda user: called.append(user))(value)
    assert not called
    assert "cmdstat_evalsha" not in redis_server.command("INFO", "commandstats")


def test_a_call_that_does_not_fit_the_function_is_a_typeerror(
    locks: DistributedLock, held_now: Callable[[], list[str]]
) -> None:
    @locks.locked("user:{user}")
    def work(user: str, *, how: str) -> None: ...

    for call in (lambda: work(), lambda: work("a"), lambda: work("a", how="b", what="c"), lambda: work("a", "b")):
        with pytest.raises(TypeError):
            call()
    assert held_now() == []


# -- decoration ------------------------------------------------------------------------------------------------------


def plain(user: str, *rest: Any, how: str = "", **more: Any) -> str:
    """It has a docstring."""
    return user


@pytest.mark.parametrize(
    "name",
    [
        *(
            "{nobody}",
            "{user} {nobody}",
            "{rest}",
            "{more}",
            "{}",
            "{0}",
            "{user",
            "user}",
            "{user:{nobody}}",
            "{.user}",
        ),
        *("", "a\nb", "a" * 600, "{{x}}", "\ud800", None, 7, b"user", ("user",)),
    ],
    ids=lambda name: repr(name)[:20],
)
def test_a_bad_name_is_refused_at_decoration(locks: DistributedLock, name: Any) -> None:
    with pytest.raises(ValueError, match=r"name|key"):
        locks.locked(name)(plain)


@pytest.mark.parametrize(
    ("what", "value"),
    [("ttl", v) for v in (0, -1, 1e9, float("nan"), "5", True)]
    + [("timeout", v) for v in (-1, float("nan"), "5", True)]
    + [("max_hold", v) for v in (0, -1, "5")],
)
def test_bad_times_are_refused_at_decoration(locks: DistributedLock, what: str, value: Any) -> None:
    with pytest.raises(ValueError, match=what):
        locks.locked("user:{user}", **{what: value})


async def coroutine(user: str) -> None: ...


def generator(user: str) -> Iterator[str]:
    yield user


async def async_generator(user: str) -> AsyncIterator[str]:
    yield user


@pytest.mark.parametrize("function", [coroutine, generator, async_generator], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    "wrap",
    [lambda f: f, functools.partial, staticmethod, lambda f: functools.partial(functools.partial(f), "a")],
    ids=["plain", "partial", "staticmethod", "partial of partial"],
)
def test_a_function_that_only_begins_when_called_is_refused_at_decoration(
    locks: DistributedLock, function: Any, wrap: Callable[[Any], Any]
) -> None:
    with pytest.raises(ValueError, match=f"{function.__name__}.*@locked is for plain functions"):
        locks.locked("nightly")(wrap(function))


def test_signature_name_and_docstring_are_kept(locks: DistributedLock) -> None:
    wrapped = locks.locked("user:{user}")(plain)
    assert inspect.signature(wrapped) == inspect.signature(plain)
    assert (wrapped.__name__, wrapped.__qualname__, wrapped.__module__) == ("plain", "plain", __name__)
    assert wrapped.__doc__ == "It has a docstring."
    assert wrapped.__wrapped__ is plain  # type: ignore[attr-defined]
    assert wrapped("a", 1, how="b", more=2) == "a"


# -- calls -----------------------------------------------------------------------------------------------------------


def test_a_callable_names_the_lock_from_the_arguments(
    locks: DistributedLock, held_now: Callable[[], list[str]]
) -> None:
    def name(user: Any, how: str = "r") -> Any:
        return user if how == "r" else f"{user}-{how}"

    number = uuid.UUID(int=7)
    for key in (name, functools.partial(name)):
        work = locks.locked(key=key)(lambda user, how="r": held_now())
        assert work("a") == ["a"]
        assert work("a", how="w") == ["a-w"]
        assert work(7) == ["7"]
        assert work(number) == [str(number)]
        with pytest.raises(TypeError):
            work("a", kind="x")  # type: ignore[call-arg]
    assert held_now() == []


@pytest.mark.parametrize("name", [None, "", "a{b", True, 7.5, ["a"], "x" * 600])
def test_a_callable_that_gives_no_name_is_an_error_of_the_call(
    locks: DistributedLock, held_now: Callable[[], list[str]], name: Any
) -> None:
    called: list[str] = []

    def work(user: str) -> None:
        called.append(user)

    with pytest.raises(ValueError, match=r"the lock name that `key` gave for .*work is .*; it must be a non-empty str"):
        locks.locked(lambda user: name)(work)("a")
    assert called == held_now() == []


@pytest.mark.parametrize("key", [None, 5, b"x", coroutine_key, generator_key])
def test_a_key_of_another_kind_is_refused_at_decoration(locks: DistributedLock, key: Any) -> None:
    with pytest.raises(ValueError, match=r"key is .*; it must be a template .*, a plain name, or a plain callable"):
        locks.locked(key)


def test_the_functions_result_and_exception_pass_through(
    locks: DistributedLock, held_now: Callable[[], list[str]]
) -> None:
    @locks.locked("user:{user}")
    def work(user: str) -> float:
        assert held_now() == ["user:" + user]
        return 1 / int(user)

    assert work("2") == 0.5
    assert held_now() == []
    with pytest.raises(ZeroDivisionError) as caught:
        work("0")
    assert caught.value.__context__ is None
    assert held_now() == []
    with pytest.raises(KeyboardInterrupt):
        locks.locked("x")(lambda: signal_of_the_user())()
    assert held_now() == []
    assert not renewer._leases
    assert locks.acquire("user:0", timeout=0).release()


def signal_of_the_user() -> None:
    raise KeyboardInterrupt


def test_a_function_whose_lock_is_held_is_not_called(locks: DistributedLock) -> None:
    called: list[str] = []
    work = locks.locked("user:{user}", timeout=0.05)(lambda user: called.append(user))
    with locks.acquire("user:a"):
        with pytest.raises(LockTimeout, match="lock:user:a"):
            work("a")
        work("b")
    work("a")
    assert called == ["b", "a"]


def test_the_options_are_acquires(locks: DistributedLock, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    acquire = locks.acquire

    def seen(name: str, **options: Any) -> HeldLock:
        asked.append((name, options))
        return acquire(name, **options)

    monkeypatch.setattr(locks, "acquire", seen)
    locks.locked("x", timeout=3, ttl=70, renew=False, max_hold=50)(lambda: None)()
    locks.locked("x")(lambda: None)()
    assert asked == [
        ("x", {"timeout": 3, "ttl": 70, "renew": False, "max_hold": 50}),
        ("x", {"timeout": 5.0, "ttl": None, "renew": True, "max_hold": None}),
    ]


def test_a_call_waits_for_the_lock(locks: DistributedLock, plain_redis: Any, eventually: Callable[..., Any]) -> None:
    work = locks.locked("user:{user}", timeout=60)(lambda user: user)
    with ThreadPoolExecutor(1) as pool:
        with locks.acquire("user:a"):
            waiting = pool.submit(work, "a")
            eventually(lambda: plain_redis.zcard(sibling("lock:user:a", "queue")) == 1)
        assert waiting.result(PATIENCE) == "a"


def test_each_call_has_a_lock_of_its_own(locks: DistributedLock) -> None:
    """A call of itself on the same key waits for itself; on another it does not."""
    depths: list[str] = []

    @locks.locked("{key}", timeout=0.05)
    def descend(key: str, then: str = "") -> None:
        depths.append(key)
        if then:
            descend(then)

    descend("a", "b")
    assert depths == ["a", "b"]
    with pytest.raises(LockTimeout, match="lock:a"):
        descend("a", "a")
    assert depths == ["a", "b", "a"]
    descend("a")


def test_calls_with_two_keys_run_at_once_and_with_one_key_one_at_a_time(locks: DistributedLock) -> None:
    both = threading.Barrier(2)

    @locks.locked("{key}", timeout=60)
    def meet(key: str) -> None:
        both.wait(30)

    inside: list[int] = []
    most: list[int] = []

    @locks.locked("one", timeout=60)
    def work(n: int) -> None:
        inside.append(n)
        most.append(len(inside))
        inside.remove(n)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(meet, ["a", "b"]))
        list(pool.map(work, range(60)))
    assert most == [1] * 60


def test_a_lock_that_was_lost_is_said_to_be_where_the_function_succeeded(
    locks: DistributedLock, plain_redis: Any
) -> None:
    @locks.locked("{key}")
    def work(key: str, fail: bool = False) -> None:
        plain_redis.set(f"lock:{key}", "somebody else", px=60_000)
        if fail:
            raise ZeroDivisionError

    with pytest.raises(LockLost):
        work("a")
    with pytest.raises(ZeroDivisionError):
        work("b", fail=True)


def test_without_redis_as_acquire(make_gov: Callable[..., GovRedis]) -> None:
    held = make_gov(redis_enabled=False).locks
    assert held.locked("x", timeout=0)(lambda: held.is_locked("x"))() is True
    with pytest.raises(LockUnavailable):
        make_gov(redis_enabled=False, lock_fallback="fail").locks.locked("x")(lambda: None)()
