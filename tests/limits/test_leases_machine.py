"""Processes that lease admissions, in any order of calls: never more than N, and no more under-use than is said."""

from __future__ import annotations

import uuid
from typing import Any, NamedTuple

import pytest
from conftest import ClockedRedis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from govredis import Config, Limit
from govredis._context import Context
from govredis.limits import RateLimiter
from govredis.limits.leases import Leases

pytestmark = pytest.mark.once

START = 1_750_000_000_123_457
MS, SECOND = 1000, 1_000_000
LEASE = 0.1


def rates(algorithm: Any) -> list[Limit | list[Limit]]:
    return [
        Limit(40, 1, algorithm, lease=LEASE),
        Limit(7, 2, algorithm, lease=LEASE),
        [Limit(20, 1, algorithm, lease=LEASE), Limit(50, 4, algorithm)],
    ]


class Admitted(NamedTuple):
    at: int
    cost: int


class LeasesMachine(RuleBasedStateMachine):
    """Three processes and one identity. All know the same time; a script may arrive later than it was sent."""

    clocked: ClockedRedis
    algorithm: str
    hits: Bundle[Any] = Bundle("hits")

    def __init__(self) -> None:
        super().__init__()
        self.clocked.now = START
        self.identity = uuid.uuid4().hex
        self.processes = [self.process() for _ in range(3)]
        self.rate: Any = None
        self.admitted: list[Admitted] = []
        #: Units that nobody can spend or give back any more, and when they were last able to.
        self.lost: list[Admitted] = []
        self.late = 0

    def process(self) -> RateLimiter:
        config = Config(redis_enabled=False, limit_fallback="deny", limit_deny_cache=False)
        limiter = RateLimiter(Context.of(config), clock=lambda: self.clocked.now / SECOND)
        limiter._decider.backends.servers.append(_Late(self))
        return limiter

    def unspent(self, since: float = -1) -> int:
        """Units of leases that end after a time."""
        batches = [batch for limiter in self.processes for batch in limiter._decider._leases._ending]
        return sum(_left(batch) for batch in batches if round(batch.end * SECOND) > since)

    @property
    def limits(self) -> list[Limit]:
        return self.rate if isinstance(self.rate, list) else [self.rate]

    # -- calls -------------------------------------------------------------------------------------------------------

    @rule(target=hits, n=st.integers(0, 2), which=st.integers(0, 2), cost=st.integers(1, 3), late=st.integers(0, 60))
    def hit(self, n: int, which: int, cost: int, late: int) -> Any:
        self.rate = self.rate or rates(self.algorithm)[which]
        self.late = late * MS
        began = self.clocked.now
        result = self.processes[n].hit(self.identity, self.rate, cost=cost)
        if not result.allowed:
            assert any(self.used(limit, began) + cost > limit.count for limit in self.limits)
            return multiple()
        # It was admitted from memory when it began, or by a script that may have arrived late.
        admitted = Admitted(self.clocked.now, cost)
        self.admitted.append(admitted)
        return result, admitted

    def used(self, limit: Limit, now: int) -> int:
        """As the docstring of Leases has it: what a denial may count."""
        lease, window = int(LEASE * SECOND), limit.window_us
        window += -(-window // 60) if limit.counted else 0
        counted = [a for a in self.admitted if a.at > now - window - lease]
        counted += [a for a in self.lost if a.at > now - window - lease]
        return sum(a.cost for a in counted) + self.unspent(now - window - lease)

    @rule(n=st.integers(0, 2), times=st.integers(1, 30))
    def many_hits(self, n: int, times: int) -> None:
        for _ in range(times):
            self.hit(n, 0, 1, 0)

    @rule(after=st.sampled_from([0, 1, 2, 20 * MS, 99 * MS, 101 * MS]), data=st.data())
    def an_admission_ages_out_and_all_come(self, after: int, data: st.DataObject) -> None:
        """Just when it does, or soon after."""
        if self.admitted:
            ages_out = data.draw(st.sampled_from(self.admitted)).at + data.draw(st.sampled_from(self.limits)).window_us
            self.clocked.now = max(self.clocked.now, ages_out + after - 1)
            for n in range(3):
                self.many_hits(n, 20)

    @rule(hit=hits)
    def refund(self, hit: Any) -> None:
        result, admitted = hit
        if result.refund():
            self.admitted.remove(admitted)

    @rule(n=st.integers(0, 2))
    def the_thread_comes_by(self, n: int) -> None:
        leases = self.processes[n]._decider._leases
        now = leases._clock()
        leases._give_back([batch for batch in list(leases._ending) if now >= batch.end])

    @rule(n=st.integers(0, 2))
    def close(self, n: int) -> None:
        self.processes[n].close()
        assert not self.processes[n]._decider._leases.has_pending()

    @rule(n=st.integers(0, 2))
    def killed(self, n: int) -> None:
        for batch in self.processes[n]._decider._leases._ending:
            self.lost.append(Admitted(round(batch.end * SECOND), _left(batch)))
        self.processes[n] = self.process()

    @rule()
    def all_reset(self) -> None:
        for process in self.processes:
            process.reset(self.identity)
        self.admitted.clear()
        self.lost.clear()

    @rule(ms=st.sampled_from([1, 20, 80, 99, 100, 500, 1000]))
    def time_passes(self, ms: int) -> None:
        self.clocked.now += ms * MS

    # -- always ------------------------------------------------------------------------------------------------------

    @invariant()
    def never_more_than_n(self) -> None:
        if self.rate is not None and self.admitted:
            at = self.admitted[-1].at
            for limit in self.limits:
                assert sum(a.cost for a in self.admitted if a.at > at - limit.window_us) <= limit.count

    @invariant()
    def all_that_is_admitted_or_unspent_is_recorded(self) -> None:
        if self.rate is not None:
            for limit in self.limits:
                since = self.clocked.now - limit.window_us
                recent = sum(a.cost for a in self.admitted if a.at > since)
                count = self.clocked.backend.count(f"rate_limit:default:{self.identity}", limit.window_us)
                assert count >= recent + self.unspent(since)


def _left(batch: Any) -> int:
    return batch._left.__length_hint__() + sum(batch._spare)


class _Late:
    """The backend, whose scripts arrive late, and whose replies do."""

    name, on_server = "redis", True

    def __init__(self, machine: LeasesMachine) -> None:
        self._machine = machine

    def lease(self, *args: Any) -> Any:
        self._machine.clocked.now += self._machine.late
        return self._machine.clocked.backend.lease(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._machine.clocked.backend, name)


@pytest.mark.parametrize("algorithm", ["sliding_window_log", "sliding_window_counter"])
def test_never_more_than_n_and_no_more_under_use_than_said(
    clocked_redis: ClockedRedis, algorithm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Leases, "_start", lambda leases: None)
    machine = type("Machine", (LeasesMachine,), {"clocked": clocked_redis, "algorithm": algorithm})
    run_state_machine_as_test(
        machine, settings=settings(max_examples=60, stateful_step_count=30, suppress_health_check=list(HealthCheck))
    )
