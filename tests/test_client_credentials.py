"""The client's account in Redis: URLs with timeouts, and credentials that change."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import redis
from support import eventually

from govredis import BackendError, Config, GovRedis
from govredis.client import RedisNode
from govredis.testing.servers import RedisServer


class Tokens:
    """As an IAM provider: the token of the hour."""

    def __init__(self, token: str) -> None:
        self.token = token
        self.asked = 0
        self.fails_with: Exception | None = None

    def get_credentials(self) -> tuple[str, str]:
        self.asked += 1
        if self.fails_with is not None:
            raise self.fails_with
        return "app", self.token


def set_token(server: RedisServer, token: str) -> None:
    with redis.Redis.from_url(server.url) as admin:
        admin.execute_command("ACL", "SETUSER", "app", "reset", "on", f">{token}", "~*", "+@all")
        admin.client_kill_filter(user="app")  # as a managed service does when a token ends


def test_each_connect_asks_the_provider_for_the_token_of_the_hour(mortal_redis: RedisServer) -> None:
    set_token(mortal_redis, "token-of-one-o-clock")
    tokens = Tokens("token-of-one-o-clock")
    config = Config(redis_url=mortal_redis.url, socket_timeout=10, connect_timeout=10, credential_provider=tokens)
    client = RedisNode(config)
    assert client.call("ACL", "WHOAMI") == b"app"
    assert client.call("ACL", "WHOAMI") == b"app"
    assert tokens.asked == 1

    set_token(mortal_redis, "token-of-two-o-clock")
    with pytest.raises(BackendError, match="rejected our credentials") as caught:
        client.call("ACL", "WHOAMI")
    assert "o-clock" not in str(caught.value)
    tokens.token = "token-of-two-o-clock"
    assert client.call("ACL", "WHOAMI") == b"app"
    client.close()


@pytest.mark.parametrize("error", [OSError(111, "no token service"), LookupError("no token service")], ids=type)
def test_a_provider_that_fails_is_an_outage(
    mortal_redis: RedisServer, error: Exception, make_gov: Callable[..., GovRedis]
) -> None:
    set_token(mortal_redis, "token")
    tokens = Tokens("token")
    tokens.fails_with = error
    gov = make_gov(redis_url=mortal_redis.url, credential_provider=tokens)
    for _ in range(3):
        assert gov.limits.hit("agent", "5/minute").backend == "local"
    assert gov.health.check().status == "fail"
    tokens.fails_with = None
    eventually(lambda: gov.limits.hit("agent", "50/minute").backend == "redis")


def test_the_timeout_in_the_url_is_that_of_the_calls(redis_server: RedisServer) -> None:
    """An answer after half a second: the setting's default is a fifth."""
    client = RedisNode(Config(redis_url=f"{redis_server.url}?socket_timeout=60", connect_timeout=10))
    assert client.call("BLPOP", "nothing", "0.5") is None
    client.close()


def test_it_says_which_credentials_are_wrong(redis_binary: str) -> None:
    """Also to a command of more than ten arguments without a password, which Redis calls a protocol error."""
    with RedisServer(binary=redis_binary, config=["requirepass right"]) as server:
        long = ("DEL", *map(str, range(12)))
        for url, command, said in (
            (server.url, ("GET", "k"), "rejected our credentials: Authentication required."),
            (server.url, long, "rejected our credentials: Authentication required."),
            (server.url.replace("//", "//:wrong@"), long, "invalid username-password pair or user is disabled"),
        ):
            client = RedisNode(Config(redis_url=url, socket_timeout=10, connect_timeout=10))
            with pytest.raises(BackendError) as caught:
                client.call(*command)
            client.close()
            assert said in str(caught.value)


def test_it_says_that_redis_has_no_password(redis_server: RedisServer) -> None:
    client = RedisNode(Config(redis_url=redis_server.url.replace("//", "//:any@"), connect_timeout=10))
    with pytest.raises(BackendError, match="without any password configured for the default user, in answer to AUTH"):
        client.call("PING")
    client.close()
