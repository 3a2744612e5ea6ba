"""The mailer of examples/: two workers together keep to the mail server's rate, and lose no mail."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import redis as redis_py
from celery import Celery
from checkout import Checkout
from support import PATIENCE, PATIENT, eventually

from govredis import Config, GovRedis
from govredis.testing.servers import PostgresServer, RedisServer

pytestmark = pytest.mark.once

COUNT, RATE = 40, "30/hour"  # a window that no stall outlasts


def received(folder: Path) -> Counter[str]:
    """How often each mail came: its receiver and subject."""
    mails = [file.read_text() for file in folder.glob("*.eml")]
    return Counter(" ".join(re.findall(r"(?m)^(?:To|Subject): (.*)", mail)) for mail in mails)


def test_mails_keep_to_the_rate_over_workers_and_none_is_lost(
    check_out: Callable[[Mapping[str, str]], Checkout],
    tmp_path: Path,
    one_redis_binary: str,
    postgres_server: PostgresServer,
) -> None:
    folder = tmp_path / "mails"
    folder.mkdir()
    with RedisServer(binary=one_redis_binary) as server, redis_py.Redis.from_url(server.url) as broker:
        servers = {"REDIS_URL": server.url, "CELERY_BROKER_URL": server.url, "GOVREDIS_PARKING_URL": server.url}
        servers["GOVREDIS_DATABASE_URL"] = postgres_server.url
        rate = {"MAIL_RATE": RATE, "MAIL_COUNT": str(COUNT), "MAIL_FOLDER": str(folder)}
        checkout = check_out({**servers, **rate})
        # A machine that stalls is no broker that hangs.
        checkout.change("mailer/mailer.py", 'timeout": 1', 'timeout": 30')
        checkout.follow("mailer/README.md")

        def at_rest() -> bool:
            """Every message was worked on, or waits for its limit."""
            return not broker.llen("celery") and not broker.hlen("unacked")

        with GovRedis(Config(redis_url=server.url, **PATIENT)) as gov:
            eventually(lambda: received(folder).total() == 30, what="the mail server has them")
            eventually(at_rest)
            assert received(folder).total() == 30
            gov.limits.reset("mail", operation="mail")
            flush = [sys.executable, "-m", "govredis", "limits", "parked", "--flush"]
            flushed = subprocess.run(flush, env=checkout.environment, capture_output=True, text=True, timeout=PATIENCE)
            assert flushed.returncode == 0, flushed.stderr
            eventually(lambda: received(folder).total() == COUNT, what="the mail server has all")

            tasks = Celery("tests", broker=server.url)
            for _ in range(2):
                tasks.send_task("mailer.send_digest")
            eventually(lambda: received(folder).total() == COUNT + 3, what="the mail server has the digests")
            eventually(at_rest)
        tasks.close()
        customers = {f"customer-{number}@example.org News": 1 for number in range(COUNT)}
        readers = {f"reader-{number}@example.org Your digest": 1 for number in range(3)}
        assert received(folder) == customers | readers
        checkout.close()
