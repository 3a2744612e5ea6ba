"""The pytest plugin of govredis: its fixtures. See docs/testing.md.

It stands beside the package, not in it: pytest imports it in every run, and must not import govredis with it. That
would cost each run the import, and would come before the application's own gevent.monkey.patch_all().
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from govredis import GovRedis
    from govredis.testing.fixtures import GovServers, HandClock


@pytest.fixture
def gov_clock() -> Iterator[HandClock]:
    """The clock of `gov`: it stands still until the test calls `gov_clock.tick(seconds)`."""
    from govredis.testing.fixtures import HandClock

    with HandClock() as clock:
        yield clock


@pytest.fixture
def gov(gov_clock: HandClock) -> Iterator[GovRedis]:
    """An empty GovRedis in memory, by `gov_clock`; get_rate_limiter() and its like belong to it during the test."""
    from govredis import ConfigurationError, GovRedis
    from govredis.testing.fixtures import process_wide

    try:
        made = GovRedis.in_memory(clock=gov_clock)
    except ConfigurationError as error:
        pytest.fail(str(error), pytrace=False)  # the extra is not installed: no traceback says more
    with made, process_wide(made):
        yield made


@pytest.fixture
def redis_away(gov: GovRedis, gov_clock: HandClock) -> Callable[[], AbstractContextManager[None]]:
    """`with redis_away(): ...`: the Redis of `gov` refuses connections, and is back afterwards, with its data."""
    from govredis.testing.fixtures import outage

    return lambda: outage(gov, gov_clock)


@pytest.fixture
def gov_servers(request: pytest.FixtureRequest) -> Iterator[GovServers]:
    """Real servers of one test, started when they are first used: `gov_servers.redis`, `.postgres`, `.connect()`."""
    if "gov_clock" in request.fixturenames:
        pytest.fail("gov_servers keeps real time, gov_clock does not: a test takes gov or gov_servers", pytrace=False)
    from govredis.testing.fixtures import GovServers

    with GovServers() as servers:
        yield servers
