"""A worker whose broker is killed, disconnects, hangs or is full goes on by itself; nothing is lost or run twice."""

from __future__ import annotations

import re
from uuid import uuid4

from stalls import undisturbed
from support import eventually
from tasks_worker import Worker, stored

from govredis import GovRedis

STORE = "tasks.agents.store_discovery"

#: Seconds. The worker's sockets have a timeout of a second: a longer stall is an outage of its broker, too.
LONGEST_STALL = 0.5


class Batch:
    """Messages published by a test: each must run once, each discovery must be stored."""

    def __init__(self, worker: Worker, gov: GovRedis) -> None:
        self.worker, self.gov = worker, gov
        self.pid = worker.pid
        self.ids: list[str] = []
        self.once: list[str] = []
        self.stored: dict[str, list[int]] = {}

    def slow(self, count: int, seconds: float, **options: float) -> list[str]:
        ids = [self.worker.send("slow", seconds, **options) for _ in range(count)]
        self.ids += ids
        self.once += ids
        return ids

    def discoveries(self, count: int, once: bool = True) -> list[str]:
        agent = uuid4().hex
        self.stored[agent] = [*range(count)]
        ids = [self.worker.send(STORE, agent, number) for number in range(count)]
        self.ids += ids
        self.once += ids * once
        return ids

    def check(self) -> None:
        """All have run, once, in the worker that was there from the beginning; and beat goes on in it."""
        self.worker.wait_ended(*self.ids)
        self.worker.wait_gone(*self.ids)
        beats = self.worker.runs("govredis.heartbeat")
        eventually(lambda: self.worker.runs("govredis.heartbeat") >= beats + 2, what="beat goes on")
        runs = self.worker.noted("began")
        assert {i: runs[i] for i in self.once if runs[i] != 1} == {}
        for agent, numbers in self.stored.items():
            assert sorted(stored(self.gov, agent)) == numbers
        assert self.worker.running
        assert self.worker.pid == self.pid


def test_broker_killed_while_tasks_run_and_a_process_is_free(worker: Worker, gov: GovRedis) -> None:
    batch = Batch(worker, gov)
    short, long = batch.slow(1, 1.0), batch.slow(1, 3.0)
    batch.slow(1, 0, countdown=2)  # waits in the worker
    worker.wait_began(*short, *long)
    worker.servers.broker.kill()
    worker.wait_ended(*short)  # while there is nobody to be told
    worker.servers.broker.restart()
    batch.discoveries(10)
    batch.check()


def test_broker_killed_while_all_processes_work_and_tasks_are_queued(worker: Worker, gov: GovRedis) -> None:
    batch = Batch(worker, gov)
    running = batch.slow(4, 1.5)
    batch.discoveries(15)
    worker.wait_began(*running)
    worker.servers.broker.kill()
    worker.servers.broker.restart()
    batch.check()


def test_an_outage_is_logged_once(worker: Worker, gov: GovRedis) -> None:
    def attempt() -> None:
        def logged(text: str) -> int:
            return worker.log.read_text()[seen:].count(text)

        if not worker.servers.broker.running:
            worker.servers.broker.restart()
        worker.wait_ended(worker.send("slow", 0))  # it is connected, also after a stall
        # One that has never connected waits until it can.
        eventually(lambda: worker.runs("govredis.drain_outbox"), what="beat has begun")
        seen = len(worker.log.read_text())
        worker.servers.broker.kill()
        # Each is due a second after the one before, and so is each try to connect.
        eventually(lambda: logged("Sending due task govredis.drain_outbox") > 5, what="beat goes on")
        worker.servers.broker.restart()
        eventually(lambda: logged("The broker is back, at try "), what="it is back")
        (tries,) = re.findall(r"The broker is back, at try (\d+)", worker.log.read_text()[seen:])
        assert int(tries) > 2, "each but the first would have been another line"
        assert logged("consumer: Cannot connect to ") == 1
        assert logged("beat cannot publish our tasks until the broker is back") == 1
        assert not logged("Message Error")
        batch = Batch(worker, gov)
        batch.discoveries(3)
        batch.check()

    undisturbed(attempt, LONGEST_STALL)


def test_connections_break(worker: Worker, gov: GovRedis) -> None:
    batch = Batch(worker, gov)
    running = batch.slow(3, 1.5)
    batch.slow(1, 0, countdown=2)
    worker.wait_began(*running)
    batch.discoveries(15, once=False)  # the fourth process is beginning one, or ending one, as they break
    for kind in ("normal", "pubsub"):
        worker.servers.broker.command("CLIENT", "KILL", "TYPE", kind)
    batch.check()


def test_broker_hangs(worker: Worker, gov: GovRedis) -> None:
    batch = Batch(worker, gov)
    running = batch.slow(4, 1.0)
    worker.wait_began(*running)
    batch.discoveries(15)
    seen = len(worker.log.read_text())
    worker.servers.broker.pause()
    worker.wait_ended(*running)  # their acknowledgements fail
    eventually(lambda: "will be told later" in worker.log.read_text()[seen:], what="an acknowledgement has failed")
    worker.servers.broker.resume()
    batch.check()


def test_broker_is_full(worker: Worker, gov: GovRedis) -> None:
    def attempt() -> None:
        worker.servers.broker.command("CONFIG", "SET", "maxmemory", "0")
        worker.wait_ended(worker.send("slow", 0))  # it is connected, also after a stall
        batch = Batch(worker, gov)
        running = batch.slow(4, 1.0)
        worker.wait_began(*running)
        batch.discoveries(10)
        seen = len(worker.log.read_text())
        worker.servers.broker.command("CONFIG", "SET", "maxmemory", "1mb")
        worker.servers.broker.command("CONFIG", "SET", "maxmemory-policy", "noeviction")
        eventually(lambda: "will be told later" in worker.log.read_text()[seen:], what="an acknowledgement has failed")
        worker.wait_ended(*running)
        worker.servers.broker.command("CONFIG", "SET", "maxmemory", "0")
        batch.check()
        assert worker.log.read_text()[seen:].count("will be told later") == 1, "of the four that failed"

    undisturbed(attempt, LONGEST_STALL)
