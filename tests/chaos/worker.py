"""One of the eight processes: `python -m tests.chaos.worker SPEC`, SPEC a JSON object, until the file `end` is there.

Three threads make calls of all features, chosen at random. SIGUSR1 strikes the main thread in any call of the library,
and its handler raises, as that of a soft time limit does. The main thread also forks while the others are in the midst
of their calls: each child uses everything, and ends. A single process forks in C, as uWSGI does, and does little else.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import json
import logging
import mmap
import os
import random
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg2

from govredis import Config, GovRedis, errors
from tests.locks.lock_set import RegisterClient

from .history import Recorder, now
from .mutants import mutate
from .parts import AGENTS, RATES, SLOTS, die_with_parent

#: How long a process may take to be back with a feature; only what is broken takes so long.
BACK = 120.0


DOCUMENTED = {getattr(errors, name) for name in errors.__all__}


class Unknown(Exception):
    """Whether it was carried out, nobody knows."""


class Struck(Unknown):
    """The exception that the handler of SIGUSR1 raises."""


#: The result of a call that raised.
FAILED = object()


#: How long a forked child may live.
HUNG_CHILD = 90.0


class Worker:
    def __init__(self, spec: dict[str, Any], who: str) -> None:
        self.spec, self.who = spec, who
        self.recorder = Recorder(spec["folder"], who)
        self.gov = GovRedis(Config(**spec["settings"]))
        self.exposed = 0  # the thread whose call may be struck now
        self.mine: list[tuple[str, str]] = []
        self.features = [self.session, self.session, self.metadata, self.metadata, self.limit, self.lock]
        fd = os.open(Path(spec["folder"]) / "sids", os.O_RDWR)
        self.sids = mmap.mmap(fd, SLOTS * 64)
        os.close(fd)
        self.local = threading.local()
        self.end = Path(spec["folder"]) / "end"
        self.children: dict[int, float] = {}

    # -- calls ---------------------------------------------------------------------------------------------------

    def call(
        self, what: str, do: Callable[[], Any], show: Callable[[Any], Any] = lambda value: value, **args: Any
    ) -> Any:
        """Returns the result of `do`, noted as `show` has it; FAILED if it raised. Announced, in case it never ends."""
        n, flags = self.recorder.number(), self.flags()
        line: dict[str, Any] = {"began": now(), "args": args}
        if what != "session.get" and what != "read":
            self.recorder.write(n, what, **line)
        value: Any = FAILED
        try:
            value = self.expose(do)
            line.update(outcome="ok", value=show(value))
        except Unknown:
            line.update(outcome="unknown")
        except Exception as error:  # noqa: BLE001 - the checker judges
            if isinstance(error, KeyError) and isinstance(error.__context__, Struck):
                line.update(outcome="unknown")  # threading.Thread.start answers so where an exception strikes it
            else:
                documented = next((kind.__name__ for kind in type(error).__mro__ if kind in DOCUMENTED), None)
                line.update(outcome="failed", value=documented or f"{type(error).__name__}: {error}")
        line.update(ended=now(), flags=[name for name, n in self.flags().items() if n > flags.get(name, 0)])
        if line["outcome"] == "unknown":
            del line["ended"]  # what was sent may be carried out later
        self.recorder.write(n, what, **line)
        return value

    def expose(self, do: Callable[[], Any]) -> Any:
        if threading.current_thread() is not threading.main_thread():
            return do()
        try:
            self.exposed = 1
            return do()
        finally:
            self.exposed = 0

    def strike(self, *_: Any) -> None:
        if self.exposed:
            self.exposed = 0
            raise Struck

    def flags(self) -> dict[str, int]:
        return {n: count for n, count in self.gov.counters.read().items() if ".degraded." in n or n.endswith("_owed")}

    # -- features ------------------------------------------------------------------------------------------------

    def session(self) -> None:
        sessions, chance = self.gov.sessions, random.random()
        if chance < 0.2 or not self.mine:
            agent, sid = random.choice(AGENTS), f"{self.who}.{self.recorder.number()}"
            self.call(
                "session.bind", lambda: sessions.bind(sid, agent, data={"of": agent}), lambda b: b.backend,
                sid=sid, agent=agent,
            )  # fmt: skip
            self.know(sid, agent)
        elif chance < 0.75:
            sid, _ = self.some_session()
            self.get_session(sid)
        elif chance < 0.85:
            sid, _ = self.some_session()
            if self.call("session.unbind", lambda: sessions.unbind(sid), sid=sid) is not FAILED:
                for _ in range(3):
                    self.get_session(sid)
        elif chance < 0.87:
            agent, (old, _) = random.choice(AGENTS), self.some_session()
            begun = self.call(
                "session.start", lambda: sessions.start(agent, replacing=old, data={"of": agent}),
                lambda b: b.session_id, sid=old, agent=agent,
            )  # fmt: skip
            if begun is not FAILED:
                self.know(begun.session_id, agent)
        elif chance < 0.9:
            sid, agent = self.mine.pop(random.randrange(len(self.mine)))
            new = self.call("session.rotate", lambda: sessions.rotate(sid), sid=sid, agent=agent)
            if isinstance(new, str):
                self.know(new, agent)
        elif chance < 0.98:
            agent = random.choice(AGENTS)
            self.call("session.for_agent", lambda: sessions.for_agent(agent), agent=agent)
        else:
            agent = random.choice(AGENTS)
            self.call("session.unbind_agent", lambda: sessions.unbind_agent(agent), agent=agent)

    def get_session(self, sid: str) -> Any:
        touch = random.random() < 0.2
        return self.call(
            "session.get", lambda: self.gov.sessions.get(sid, touch=touch),
            lambda b: b and [b.agent_id, b.backend, (b.data or {}).get("of")], sid=sid,
        )  # fmt: skip

    def know(self, sid: str, agent: str) -> None:
        """Tell the others of a session, too; who reads a half-written one asks for one that nobody has bound."""
        self.mine = [*self.mine[-30:], (sid, agent)]
        start = random.randrange(SLOTS) * 64
        self.sids[start : start + 64] = f"{sid} {agent}".encode().ljust(64, b"\0")

    def some_session(self) -> tuple[str, str]:
        start = random.randrange(SLOTS) * 64
        sid, _, agent = self.sids[start : start + 64].rstrip(b"\0").decode(errors="replace").partition(" ")
        return (sid, agent) if sid else random.choice(self.mine)

    def metadata(self) -> None:
        gov, agent, chance = self.gov, random.choice(AGENTS), random.random()
        if chance < 0.06:
            self.write_agent(agent)
        elif chance < 0.08:
            of = self.recorder.number()
            self.call("write", lambda: self.by_psql(agent, of), agent=agent, of=of, psql=True)
        elif chance < 0.1:
            self.call("invalidate", lambda: gov.metadata.invalidate(agent))
        else:
            self.read_agent(agent)

    def write_agent(self, agent: str) -> None:
        of, gov = self.recorder.number(), self.gov
        written = self.call(
            "write", lambda: gov.agents.update_metadata(agent, by=self.who, of=of), lambda record: record["version"],
            agent=agent, of=of,
        )  # fmt: skip
        if written is not FAILED:
            self.read_agent(agent)

    def read_agent(self, agent: str) -> None:
        self.call(
            "read", lambda: self.gov.metadata.get_or_load(agent, self.gov.agents.get),
            lambda r: r and [r["version"], r["metadata"].get("by"), r["metadata"].get("of"), r["agent_id"]],
            agent=agent, local=self.gov.config.local_cache,
        )  # fmt: skip

    def by_psql(self, agent: str, of: int) -> int:
        """As another service writes, which knows nothing of us."""
        try:
            connection = psycopg2.connect(self.spec["settings"]["database_url"], connect_timeout=10)
        except psycopg2.Error as error:
            raise Unknown from error
        with contextlib.closing(connection):
            try:
                with connection, connection.cursor() as cursor:
                    sql = "UPDATE govredis_agents SET metadata = %s WHERE agent_id = %s RETURNING version"
                    cursor.execute(sql, (json.dumps({"by": self.who, "of": of}), agent))
                    version = cursor.fetchone()[0]
            except psycopg2.Error as error:
                raise Unknown from error
        return int(version)

    def limit(self) -> None:
        identity = random.choice([*RATES])
        rate, cost, chance = RATES[identity], random.choice([1, 1, 2]), random.random()
        args: dict[str, Any] = {"id": identity, "rate": rate, "cost": cost}
        words = ";".join(f"{count}/{window} seconds" for count, window in rate)
        limits = self.gov.limits

        def show(r: Any) -> list[Any]:
            return [r.allowed, r.backend, r.violated.window if r.violated else 0, r.retry_after]

        if identity == "patient":
            waits = lambda: limits.wait(identity, words, timeout=1, cost=cost)  # noqa: E731
            self.call("hit", waits, show, **args, waited=True)
        elif chance < 0.2:
            many = lambda: limits.hit_many([(identity, words, "default", cost)])[0]  # noqa: E731
            self.call("hit", many, show, **args)
        elif chance < 0.3:
            self.call("peek", lambda: limits.peek(identity, words), show)
        elif chance < 0.4:
            # Said before: whether it was given back is not known where this ends in between.
            result = self.call("hit", lambda: limits.hit(identity, words, cost=cost), show, **args, refund=True)
            if result is not FAILED and result.allowed:
                self.call("refund", result.refund)
        else:
            self.call("hit", lambda: limits.hit(identity, words, cost=cost), show, **args)

    def lock(self) -> None:
        locks, name, ttl = self.gov.locks, random.choice("ab"), random.choice([0.3, 1.5, 10.0])
        kind, timeout = random.choice(["lock", "lock", "read", "write", "slot", "many"]), random.choice([0, 1, 4])
        take: dict[str, Callable[[], Any]] = {
            "lock": lambda: locks.acquire(name, timeout=timeout, ttl=ttl),
            "read": lambda: locks.rwlock(name).read(timeout=timeout, ttl=ttl),
            "write": lambda: locks.rwlock(name).write(timeout=timeout, ttl=ttl),
            "slot": lambda: locks.semaphore(name, slots=2).acquire(timeout=timeout, ttl=ttl),
            "many": lambda: locks.acquire_many(["b", "a"], timeout=timeout, ttl=ttl),
        }
        held = self.call("acquire", take[kind], lambda _: None, kind=kind, name=name)
        if held is not FAILED:
            with contextlib.ExitStack() as stack:
                each = [held] if kind != "many" else [held[one] for one in held]
                for one in each:
                    stack.enter_context(self.inside(one, "lock" if kind == "many" else kind))
                with contextlib.suppress(Struck):
                    self.expose(lambda: time.sleep(random.choice([0, 0.002, 0.01, 0.1])))
                if random.random() < 0.2:
                    self.call("extend", lambda: each[0].extend(ttl))

    @contextlib.contextmanager
    def inside(self, held: Any, kind: str) -> Any:
        """The time from just after the acquire until just before the release, as far as the lease reaches."""
        entered, n = now(), self.recorder.number()
        until = entered + held.remaining()
        args = {"kind": kind, "name": held.name, "entered": entered, "until": until}
        args["slots"] = 2 if kind == "slot" else 1
        line = {"began": entered, "value": held.token, "args": args}
        self.recorder.write(n, "hold", **line)
        seen = self.register(held.name).read(held.token) if kind == "lock" else None
        try:
            yield
            if seen is not None:
                self.register(held.name).write(held.token, seen + 1)
        finally:
            left, remains = now(), held.remaining()
            args.update(left=left, until=left + remains if remains else until)
            self.recorder.write(n, "hold", **line, outcome="ok", ended=left)
            self.call("release", held.release)

    def register(self, name: str) -> RegisterClient:
        """The client of a register; each thread has its own."""
        found: dict[str, RegisterClient] = self.local.__dict__
        if name not in found:
            found[name] = RegisterClient(self.spec["registers"][name])
        return found[name]

    # -- the threads ---------------------------------------------------------------------------------------------

    def run(self) -> None:
        others = [threading.Thread(target=self.make_calls, args=(self.is_over,), daemon=True) for _ in range(2)]
        for thread in others:
            thread.start()
        forked = now()
        while not self.is_over():
            self.make_call()
            if self.spec["forks"] and now() - forked > 2:
                forked = now()
                self.fork(os.fork)
            self.reap()
        self.come_back()
        for thread in others:
            thread.join(BACK)
        while self.children:
            self.reap()
            time.sleep(0.01)

    def make_calls(self, are_enough: Callable[[], bool]) -> None:
        while not are_enough():
            self.make_call()

    def make_call(self) -> None:
        random.choice(self.features)()
        time.sleep(random.random() * self.spec["pause"])

    def is_over(self) -> bool:
        return self.end.exists()

    def come_back(self) -> None:
        """Each feature on Redis again."""
        gov, identity = self.gov, f"back-{self.who}"

        def hold() -> bool:
            held = gov.locks.acquire(identity, timeout=5, ttl=1.5)
            time.sleep(2)  # which takes a renewal
            return held.release() and not held.degraded

        def cached() -> bool:
            before = gov.metadata.stats()
            for agent in AGENTS:
                gov.metadata.get_or_load(agent, gov.agents.get)
            after = gov.metadata.stats()
            return any(after.get(hits, 0) > before.get(hits, 0) for hits in ("hits", "local_hits"))

        def session() -> bool:
            gov.sessions.bind(identity, "nobody")
            found = gov.sessions.get(identity)
            return found is not None and (found.agent_id, found.backend) == ("nobody", "redis")

        features = {
            "limits": lambda: gov.limits.hit(identity, "1000/second").backend == "redis",
            "locks": hold, "metadata": cached, "sessions": session,
        }  # fmt: skip
        for feature, is_back in features.items():
            n, began, seen = self.recorder.number(), now(), ""
            while now() - began < BACK and seen != "back":
                try:
                    seen = "back" if is_back() else f"{feature} still without Redis"
                except Exception as error:  # noqa: BLE001
                    seen = f"{feature}: {type(error).__name__}: {error}"
            outcome = "ok" if seen == "back" else "failed"
            self.recorder.write(n, "back", began=began, ended=now(), outcome=outcome, value=seen)

    # -- forks ---------------------------------------------------------------------------------------------------

    def nurse(self) -> None:
        """As a server that forks its workers in C, from a process that has used everything."""
        while not self.is_over():
            for feature in self.features:
                feature()
            # CPython does not bear a fork in C while a thread waits for its turn: of 300 children without any of ours,
            # beside two threads that slept and woke, 12 hung. The library's threads end when they have been idle.
            while threading.active_count() > 1:
                time.sleep(0.02)
            for _ in range(4):
                # PyDLL, which keeps the interpreter's lock: without, the child would not get it.
                self.fork(ctypes.PyDLL(None).fork)
            while self.children:
                self.reap()
                time.sleep(0.01)
        self.come_back()

    def fork(self, how: Callable[[], int]) -> None:
        """A child that uses everything for a moment, from several threads."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # 3.12+: there are other threads
            pid = how()
        if pid:
            self.children[pid] = now()
            return
        try:
            die_with_parent()
            random.seed()
            self.who = f"{self.who}-{os.getpid()}"
            self.recorder, self.local = Recorder(self.spec["folder"], self.who), threading.local()
            ends = now() + 1
            other = threading.Thread(target=self.make_calls, args=(lambda: now() > ends,), daemon=True)
            other.start()
            for feature in self.features:
                feature()
            other.join()
        except BaseException as error:  # noqa: BLE001
            line = {"began": now(), "ended": now(), "outcome": "failed", "value": f"Child: {error!r}"}
            self.recorder.write(self.recorder.number(), "fork", **line)
        finally:
            os._exit(0)

    def reap(self) -> None:
        for pid, began in list(self.children.items()):
            if os.waitpid(pid, os.WNOHANG)[0]:
                del self.children[pid]
            elif now() - began > HUNG_CHILD:
                line = {"began": began, "ended": now(), "outcome": "failed", "value": f"Hung: forked child {pid}"}
                self.recorder.write(self.recorder.number(), "fork", **line)
                os.kill(pid, signal.SIGABRT)  # which has faulthandler say where it hangs
                os.waitpid(pid, 0)
                del self.children[pid]


def main() -> None:
    die_with_parent()
    faulthandler.enable()
    warnings.simplefilter("ignore", ResourceWarning)  # of a lock whose acquire was struck
    logging.getLogger("govredis").disabled = True
    spec = json.loads(sys.argv[1])
    random.seed(spec["seed"])
    mutate(spec["mutants"])
    worker = Worker(spec, spec["who"])
    signal.signal(signal.SIGUSR1, worker.strike)
    if spec["nurse"]:
        worker.nurse()
    else:
        worker.run()
    os._exit(0)  # what a thread that hangs was told about has been said


if __name__ == "__main__":
    main()
