"""The exception tree: who is what, what each carries, and that all of it survives pickling."""

from __future__ import annotations

import json
import logging
import math
import pickle
import traceback
from datetime import datetime, timezone
from decimal import Decimal

import pytest
from celery import Celery
from support import redis_of

from govredis import GovRedis, Limit, RateLimitResult, SessionBinding, errors
from govredis.errors import (
    BackendError,
    BackendUnavailable,
    ConfigurationError,
    GovRedisError,
    LockError,
    LockLost,
    LockTimeout,
    LockUnavailable,
    RateLimitExceeded,
    SessionAlreadyBound,
    SessionChanged,
    SessionStoreUnavailable,
    check_timeout,
    check_ttl,
    printable,
    refuse,
)

PARENTS: dict[type[Exception], set[type[BaseException]]] = {
    GovRedisError: {Exception},
    ConfigurationError: {GovRedisError, ValueError},
    BackendError: {GovRedisError},
    BackendUnavailable: {BackendError},
    LockError: {GovRedisError},
    LockTimeout: {LockError, TimeoutError},
    LockLost: {LockError},
    LockUnavailable: {LockError, BackendUnavailable},
    RateLimitExceeded: {GovRedisError},
    SessionAlreadyBound: {GovRedisError},
    SessionChanged: {GovRedisError},
    SessionStoreUnavailable: {BackendUnavailable},
}
#: The errors that carry something else than their message.
CARRY = {RateLimitExceeded, SessionAlreadyBound, SessionChanged}
BINDING = SessionBinding("s1", "agent-1", datetime(2026, 1, 2, tzinfo=timezone.utc), None, 3, {"a": 1}, "redis")
RESULT = RateLimitResult(False, Limit(20, 3600), 0, 12.5, 3600.0, Limit(20, 3600), "redis", False)


def test_the_tree() -> None:
    assert {getattr(errors, name) for name in errors.__all__} == set(PARENTS)
    for error, parents in PARENTS.items():
        assert set(error.__bases__) == parents, error


def test_contention_is_not_unavailability_and_neither_is_the_other() -> None:
    for contention in (LockTimeout, LockLost, RateLimitExceeded, SessionAlreadyBound, SessionChanged):
        assert not issubclass(contention, BackendError)
    for away in (LockUnavailable, SessionStoreUnavailable):
        assert issubclass(away, BackendUnavailable)
        assert not issubclass(away, TimeoutError)


@pytest.mark.parametrize("kind", [k for k in PARENTS if k not in CARRY])
def test_errors_with_a_message_pickle(kind: type[Exception]) -> None:
    copy = pickle.loads(pickle.dumps(kind("what happened")))
    assert type(copy) is kind
    assert str(copy) == "what happened"


def test_rate_limit_exceeded_carries_its_result_through_pickle() -> None:
    copy = pickle.loads(pickle.dumps(RateLimitExceeded(RESULT)))
    assert type(copy) is RateLimitExceeded
    assert (copy.result.limit, copy.result.retry_after, copy.result.backend) == (Limit(20, 3600), 12.5, "redis")
    assert str(copy) == str(RateLimitExceeded(RESULT))
    assert "retry after 12.500 s" in str(copy)
    assert str(Limit(20, 3600)) in str(copy)


def test_rate_limit_exceeded_without_a_result() -> None:
    copy = pickle.loads(pickle.dumps(RateLimitExceeded()))
    assert copy.result is None
    assert str(copy) == "rate limit exceeded"


def test_session_already_bound_carries_the_existing_binding_through_pickle() -> None:
    copy = pickle.loads(pickle.dumps(SessionAlreadyBound(BINDING)))
    assert type(copy) is SessionAlreadyBound
    assert copy.existing == BINDING
    assert str(copy) == "session is already bound to agent 'agent-1'"


def test_session_changed_carries_what_stands_through_pickle() -> None:
    copy = pickle.loads(pickle.dumps(SessionChanged(BINDING)))
    assert type(copy) is SessionChanged
    assert copy.existing == BINDING
    assert str(copy) == "the session of agent 'agent-1' was bound anew or changed meanwhile"
    ended = pickle.loads(pickle.dumps(SessionChanged()))
    assert (ended.existing, str(ended)) == (None, "the session has ended, or was never bound")


def test_without_what_they_carry_they_keep_their_message_through_pickle() -> None:
    """As they come from a JSON result backend: a message, and nothing else."""
    for made, carried in (
        (RateLimitExceeded("too often"), "result"),
        (SessionAlreadyBound("is bound"), "existing"),
        (SessionChanged("has changed"), "existing"),
    ):
        copy = pickle.loads(pickle.dumps(made))
        assert (type(copy), str(copy), copy.args) == (type(made), str(made), made.args)
        assert getattr(copy, carried) is None


@pytest.mark.parametrize("kind", [k for k in PARENTS if k not in CARRY])
def test_errors_with_a_message_come_over_a_json_result_backend(kind: type[Exception]) -> None:
    copy = over_json(kind("what happened"))
    assert type(copy) is kind
    assert str(copy) == "what happened"


def test_errors_that_carry_something_keep_type_and_message_over_a_json_result_backend() -> None:
    for error, carried in (
        (RateLimitExceeded(RESULT), "result"),
        (RateLimitExceeded(), "result"),
        (SessionAlreadyBound(BINDING), "existing"),
        (SessionChanged(BINDING), "existing"),
        (SessionChanged(), "existing"),
    ):
        copy = over_json(error)
        assert (type(copy), str(copy)) == (type(error), str(error))
        assert getattr(copy, carried) is None
        assert str(over_json(copy)) == str(error), "and once more"


def over_json(error: Exception) -> BaseException:
    """As one that a Celery task raised reaches who asks for its result."""
    backend = Celery("errors", broker="memory://", set_as_current=False, result_serializer="json").backend
    backend.serializer = "json"
    stored = backend.prepare_exception(error)
    assert not isinstance(stored, Exception), "a dict, made of JSON"
    found = backend.exception_to_python(json.loads(json.dumps(stored)))
    assert isinstance(found, BaseException)
    return found


def test_refuse_says_what_was_wrong_and_what_is_right() -> None:
    assert str(refuse("cost", -1, "1 or more")) == "cost is -1; it must be 1 or more"
    long = str(refuse("id", "x" * 5000, "shorter"))
    assert len(long) < 120
    assert long.startswith("id is 'xxx") and long.endswith("...; it must be shorter")


@pytest.mark.parametrize("value", [0.001, 1, 30, 3600.0])
def test_check_ttl_and_check_timeout_take_seconds(value: float) -> None:
    assert check_ttl(value) == value
    assert check_timeout(value) == value


@pytest.mark.parametrize("value", [-1, -0.1, math.nan, math.inf, 1e9, None, "5", True, Decimal(5), [5]])
def test_check_ttl_and_check_timeout_refuse_what_is_no_time(value: object) -> None:
    with pytest.raises(ValueError, match=r"^ttl is .*; it must be seconds"):
        check_ttl(value)
    with pytest.raises(ValueError, match=r"^timeout is .*; it must be seconds"):
        check_timeout(value)


def test_nobody_may_wait_for_no_time_but_nothing_is_kept_for_none() -> None:
    assert check_timeout(0) == 0
    with pytest.raises(ValueError, match=r"^ttl is 0;"):
        check_ttl(0)
    with pytest.raises(ValueError, match=r"^ttl is 0.0009;"):
        check_ttl(0.0009)


#: ESC, C0, DEL, C1, what turns the direction of writing, line and paragraph separators, a lone surrogate, a tag.
UNPRINTABLE = "\x1b\x00\x07\r\x7f\x9b\u202e\u2066\u200f\u2028\u2029\ud800\U000e0041"


@pytest.mark.parametrize("bad", UNPRINTABLE, ids=ascii)
def test_a_character_that_does_not_print_is_spelled_out(bad: str) -> None:
    assert printable(f"a{bad}[31m b") == f"a{ascii(bad)[1:-1]}[31m b"
    assert printable(f"a{bad}\n", "\n") == f"a{ascii(bad)[1:-1]}\n"
    for kind in PARENTS:
        if kind not in CARRY:
            assert str(kind(f"it said {bad}\nand more")) == f"it said {ascii(bad)[1:-1]}\nand more"


def test_printable_text_stays() -> None:
    for text in ("", "agent-1", "Zoë 名前 🎉 \\x1b", "a'b\"c"):
        assert printable(text) == text
    assert printable("a\nb") == "a\\nb"


def test_a_servers_words_are_printable_in_errors_tracebacks_and_logs(
    gov: GovRedis, caplog: pytest.LogCaptureFixture
) -> None:
    """Both quote what they were sent, which may be what somebody else has put there."""
    planted = "PLANTED\x1b]0;\x07\u202e"
    for ask in (
        lambda: redis_of(gov).call(planted),
        lambda: gov.postgres.fetch("SELECT %s::int", (planted,)),
    ):
        with pytest.raises(BackendError, match="PLANTED") as refused:
            ask()
        told = "".join(traceback.format_exception(refused.value))
        assert r"PLANTED\x1b]0;\x07\u202e" in str(refused.value)
        try:
            raise refused.value
        except BackendError:
            logging.getLogger("govredis").exception("a test: %s", refused.value)
        for text in (told, str(refused.value), caplog.text):
            assert not set(text) & set(UNPRINTABLE)
