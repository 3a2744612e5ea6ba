"""One worker, with beat, for all tests of this folder, on servers of its own.

Not for each redis-server found: what is asked here is what Celery and its broker do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tasks_worker import Servers, Worker

from govredis import Config, GovRedis
from govredis.testing.servers import RedisServer


@pytest.fixture(scope="session")
def servers() -> Iterator[Servers]:
    servers = Servers()
    try:
        for server in (servers.cache, servers.broker, servers.postgres):
            server.start()
        with GovRedis(Config(redis_enabled=False, database_url=servers.postgres.url)) as gov:
            gov.postgres.migrate()
        yield servers
    finally:
        servers.close()


@pytest.fixture(scope="session")
def one_worker(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    worker = Worker(servers, tmp_path_factory.mktemp("worker"))
    try:
        yield worker
    finally:
        worker.close()


@pytest.fixture
def worker(one_worker: Worker) -> Worker:
    """The worker, at work; started anew if a failed test has left it ended."""
    if not one_worker.running:
        one_worker.start()
    one_worker.wait_ended(one_worker.send("slow", 0))
    return one_worker


@pytest.fixture
def gov(make_gov: Callable[..., GovRedis], servers: Servers) -> GovRedis:
    """A GovRedis of another process than the worker's, on its servers."""
    return make_gov(redis_url=servers.cache.url, database_url=servers.postgres.url)


@pytest.fixture
def broker() -> Iterator[RedisServer]:
    """A broker of the test's own, to hang, kill and restart with its data."""
    with RedisServer(persistent=True) as server:
        yield server


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = yield
    worker = getattr(item, "funcargs", {}).get("one_worker") or getattr(item, "funcargs", {}).get("worker")
    if report.failed and worker is not None:
        last = worker.log.read_text(errors="replace").splitlines()[-80:]
        report.sections.append(("log of the worker", "\n".join(last)))
    return report
