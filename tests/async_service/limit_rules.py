"""Limits: each side counts all entries of both, and nothing of ours takes away what somebody still counts.

The entries in Redis are the model's, read back after each operation: an operation may add its own, and take away only
what its promise allows.
"""

from __future__ import annotations

import time

from govredis import RateLimitResult

from .world import WHO, Beside, World, operation

IDENTITIES = ("i", "j")
#: Seconds. The service's clock is behind, or ahead, by times that are no edge of any of them.
WINDOWS = (60, 3600, 86_400)
COUNTS = (1, 2, 3, 4)
OPERATION = "beside"
#: Seconds between the edge of a window and the nearest entry.
_MARGIN = 20


class LimitRules(Beside):
    def __init__(self, world: World) -> None:
        super().__init__(world)
        #: By which of ours.
        self.admitted: list[list[tuple[str, RateLimitResult, int]]] = [[], []]

    # -- what stands in Redis ------------------------------------------------------------------------------------

    def key(self, identity: str) -> str:
        return f"rate_limit:{OPERATION}:{self.name(identity)}"

    def entries(self, identity: str) -> dict[str, float]:
        return dict(self.redis.zrange(self.key(identity), 0, -1, withscores=True))

    def left(self, identity: str) -> float:
        """Seconds until the key ends; 0 where there is none."""
        return max(0.0, self.redis.pttl(self.key(identity)) / 1000)

    @staticmethod
    def within(entries: dict[str, float], window: float, now: float) -> int:
        assert all(abs(now - score - window) > _MARGIN for score in entries.values())
        return sum(score > now - window for score in entries.values())

    class Before:
        """The entries before an operation of ours, and the changes that it may have made."""

        def __init__(self, rules: LimitRules, identity: str) -> None:
            self._rules, self._identity = rules, identity
            self.at = time.time()  # first: this machine may sleep at any moment
            self.entries, self.left = rules.entries(identity), rules.left(identity)

        def assert_kept(self, *, added: int, window: int = 0) -> None:
            """All that is counted is still there, for as long, with so many new entries of this window."""
            entries, left = self._rules.entries(self._identity), self._rules.left(self._identity)
            # By the key's TTL somebody counts over so long a window; and we do by what we have just been asked.
            counted = max(self.left - 60, window)
            now = time.time()
            lost = {member: score for member, score in self.entries.items() if member not in entries}
            assert all(score <= now - counted for score in lost.values()), (lost, counted)
            assert len(entries) == len(self.entries) - len(lost) + added
            passed = now - self.at + 0.01
            assert left >= self.left - passed
            # A minute, but for the second within which a busy key is not kept anew.
            assert not added or left >= window + 59 - passed

        def assert_unchanged(self) -> None:
            assert self._rules.entries(self._identity) == self.entries
            assert self.left >= self._rules.left(self._identity) >= self.left - (time.time() - self.at) - 0.01

    # -- ours ----------------------------------------------------------------------------------------------------

    @operation(who=WHO, identity=IDENTITIES, count=COUNTS, window=WINDOWS, cost=(1, 2))
    def we_hit(self, who: int, identity: str, count: int, window: int, cost: int) -> None:
        before = self.Before(self, identity)
        cost = min(cost, count)
        rate = f"{count}/{window} seconds"
        result = self.govs[who].limits.hit(self.name(identity), rate, operation=OPERATION, cost=cost)
        used = self.within(before.entries, window, time.time())
        assert (result.backend, result.allowed) == ("redis", used + cost <= count)
        if result.allowed:
            before.assert_kept(added=cost, window=window)
            self.admitted[who].append((identity, result, cost))
        else:
            before.assert_unchanged()

    @operation(who=WHO, identity=IDENTITIES, few=COUNTS, many=COUNTS)
    def we_hit_two_limits(self, who: int, identity: str, few: int, many: int) -> None:
        before = self.Before(self, identity)
        rate = f"{few}/60 seconds;{many}/3600 seconds"
        result = self.govs[who].limits.hit(self.name(identity), rate, operation=OPERATION)
        now = time.time()
        room = self.within(before.entries, 60, now) < few and self.within(before.entries, 3600, now) < many
        assert result.allowed is room
        if room:
            before.assert_kept(added=1, window=3600)
            self.admitted[who].append((identity, result, 1))
        else:
            before.assert_unchanged()

    @operation(who=WHO, identity=IDENTITIES, window=WINDOWS)
    def we_record(self, who: int, identity: str, window: int) -> None:
        before = self.Before(self, identity)
        self.govs[who].limits.record(self.name(identity), window, operation=OPERATION)
        before.assert_kept(added=1, window=window)

    @operation(who=WHO, identity=IDENTITIES, count=COUNTS, window=WINDOWS)
    def we_look(self, who: int, identity: str, count: int, window: int) -> None:
        before, limits, name = self.Before(self, identity), self.govs[who].limits, self.name(identity)
        used = self.within(before.entries, window, time.time())
        assert limits.get_count(name, window, operation=OPERATION) == used
        assert limits.check(name, count, window, operation=OPERATION).allowed is (used < count)
        assert limits.peek(name, f"{count}/{window} seconds", operation=OPERATION).allowed is (used < count)
        before.assert_unchanged()

    @operation(who=WHO)
    def we_refund_the_last(self, who: int) -> None:
        if not self.admitted[who]:
            return
        identity, result, cost = self.admitted[who].pop()
        before = self.Before(self, identity)
        given_back = result.refund()
        gone = len(before.entries) - len(self.entries(identity))
        assert gone == (cost if given_back else 0)

    @operation(who=WHO, identity=IDENTITIES)
    def we_reset(self, who: int, identity: str) -> None:
        self.govs[who].limits.reset(self.name(identity), operation=OPERATION)
        assert self.entries(identity) == {}

    # -- theirs --------------------------------------------------------------------------------------------------

    @operation(identity=IDENTITIES, window=WINDOWS)
    def they_record(self, identity: str, window: int) -> None:
        before = self.entries(identity)
        self.service.limits.record(OPERATION, self.name(identity), window)
        assert self.entries(identity).items() > before.items()

    @operation(identity=IDENTITIES, count=COUNTS, window=WINDOWS)
    def they_check(self, identity: str, count: int, window: int) -> None:
        """Their check, which prunes by their window and clock."""
        before = self.entries(identity)
        used = self.within(before, window, time.time() + self.service.skew)
        assert self.service.limits.check(OPERATION, self.name(identity), count, window) is (used < count)
