"""The key patterns, which are a wire contract, and the ids that would break one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from redis.cluster import key_slot

from govredis.health.counter_names import COUNTERS
from govredis.keys import Keys, check_id, check_name, check_namespace, sibling

BAD_IDS = {
    "empty": "",
    "open brace": "a{b",
    "close brace": "a}b",
    "600 bytes": "x" * 600,
    "513 bytes": "x" * 513,
    "600 bytes of 300 characters": "é" * 300,
    "516 bytes of 129 characters": "😀" * 129,
    "bytes": b"agent-1",
    "None": None,
    "bool": True,
    "float": 1.5,
    "newline": "a\nb",
    "NUL": "a\x00b",
    "escape": "a\x1b[31m",
    "delete": "a\x7f",
    "C1 control": "a\x9b",
    "lone surrogate": "a\ud800",
    "last surrogate": "a\udfff",
}
GOOD_IDS = ["a", "agent-123", "user:1:2", "é", "x" * 512, "😀" * 128, "with space", "a/b", "'\"%s*?[]", "\u2028"]

METHODS: dict[str, Callable[[Keys, str], str]] = {
    "session": Keys.session,
    "agent_sessions": Keys.agent_sessions,
    "lock": Keys.lock,
    "rate_limit": lambda keys, i: keys.rate_limit("kg_store", i),
    "agent_meta": lambda keys, i: keys.cached("agent_meta", i),
}


def test_the_patterns() -> None:
    keys = Keys()
    assert keys.session("s1") == "session:s1"
    assert keys.agent_sessions("a1") == "agent_sessions:a1"
    assert keys.lock("user:1") == "lock:user:1"
    assert keys.rate_limit("kg_store", "agent-1") == "rate_limit:kg_store:agent-1"
    assert keys.cached("agent_meta", "a1") == "agent_meta:a1"
    assert keys.health_history() == "govredis:health"
    assert keys.events("agent.updated") == keys.events("agent") == "events:agent"
    assert keys.held_locks() == "govredis:locks"


def test_a_tag_puts_a_key_of_ours_into_its_slot() -> None:
    keys = Keys("app*:")
    assert keys.held_locks("7") == "app*:govredis:locks:{7}"
    assert key_slot(keys.held_locks("7").encode()) == key_slot(b"7")
    assert keys.pattern(keys.held_locks("7")) == "app\\*:govredis:locks:{*}"
    assert keys.pattern(keys.held_locks()) == "app\\*:govredis:locks"


def test_the_prefix_comes_before_every_key() -> None:
    plain, prefixed = Keys(), Keys("app:")
    for pattern in METHODS.values():
        assert pattern(prefixed, "i") == "app:" + pattern(plain, "i")
    assert prefixed.health_history() == "app:govredis:health"


@pytest.mark.parametrize("identity", GOOD_IDS)
@pytest.mark.parametrize("pattern", METHODS.values(), ids=METHODS)
def test_siblings_share_the_cluster_slot_of_the_plain_key(pattern: Callable[[Keys, str], str], identity: str) -> None:
    key = pattern(Keys("app:"), identity)
    for name in ("fence", "queue", "lease", "tombstone"):
        beside = sibling(key, name)
        assert beside != key
        assert key_slot(beside.encode()) == key_slot(key.encode())
    assert sibling("lock:a", "fence") == "{lock:a}:fence"


@pytest.mark.parametrize("identity", BAD_IDS.values(), ids=BAD_IDS)
@pytest.mark.parametrize("pattern", METHODS.values(), ids=METHODS)
def test_an_id_that_would_break_a_key_is_refused(pattern: Callable[[Keys, object], str], identity: object) -> None:
    with pytest.raises(ValueError, match=r"; it must be a non-empty str of at most 512 bytes of UTF-8, without"):
        pattern(Keys(), identity)


@pytest.mark.parametrize("identity", GOOD_IDS)
def test_other_ids_are_returned_as_they_are(identity: str) -> None:
    assert check_id(identity) is identity


def test_the_refusal_names_what_was_refused() -> None:
    for message, call in {
        "^session_id is ''": lambda: Keys().session(""),
        "^agent_id is ''": lambda: Keys().agent_sessions(""),
        "^lock name is ''": lambda: Keys().lock(""),
        "^operation is ''": lambda: Keys().rate_limit("", "a"),
        "^id is ''": lambda: Keys().rate_limit("op", ""),
        "^agent_id is None": lambda: check_id(None, "agent_id"),  # type: ignore[arg-type]
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("bad", [*BAD_IDS.values(), "a:b", ":"], ids=[*BAD_IDS, "colon", "only colon"])
def test_operations_and_namespaces_also_refuse_a_colon(bad: str) -> None:
    with pytest.raises(ValueError, match=r"^operation is .*; it must be "):
        Keys().rate_limit(bad, "agent-1")
    with pytest.raises(ValueError, match=r"^namespace is .*; it must be "):
        check_namespace(bad)
    with pytest.raises(ValueError, match=r"^what is .*; it must be "):
        check_name(bad, "what")


@pytest.mark.parametrize(
    "reserved",
    ["session", "agent_sessions", "lock", "rate_limit", "events", "govredis", "sessions", "limits", "health"],
)
def test_a_namespace_that_is_another_key_kind_or_a_feature_is_refused(reserved: str) -> None:
    with pytest.raises(ValueError, match=f"^namespace is '{reserved}'; it must be none of .*session"):
        check_namespace(reserved)


def test_no_counters_of_a_cache_are_a_features() -> None:
    for names in COUNTERS:
        word = names.partition(".")[0]
        if word != "{cache}":
            with pytest.raises(ValueError, match=r"^namespace is"):
                check_namespace(word)


def test_no_reserved_namespace_was_forgotten() -> None:
    """Every key kind but the cache's own starts with a word that no cache may take."""
    keys = Keys()
    for key in (keys.session("i"), keys.agent_sessions("i"), keys.lock("i"), keys.rate_limit("o", "i")):
        with pytest.raises(ValueError, match=r"^namespace is"):
            check_namespace(key.split(":")[0])
    assert check_namespace("agent_meta") == "agent_meta"
    assert check_namespace("report") == "report"
