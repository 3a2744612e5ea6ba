"""Every order of steps among three processes that want one lock file, in a model of ExclusiveHostLock.

Each may stand still between any two of its system calls, its record may run out, and it may die. A second model has two
such processes, and others that remove the file (sweep.py).

Redis has granted it to all (it has lost its data, more than once). Checked in every state that can be reached: of those
whose records have not run out one at most is inside, tokens rise, and a process that has left keeps nobody out. Each
rule is taken away in turn, and the check fails.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

#: It has no time in it, and much to compute.
pytestmark = pytest.mark.once

RULES = [
    "one process has the flock",
    "tokens rise",
    "only a holder whose record has run out is passed",
    "a fresh passer is honoured by the flock's owner",
    "a fresh passer is not passed",
    "a holder that has gone in looks for a passer again",
    "a passer looks at the holder again",
    "passers take turns",
    "a passer vouches for itself in its turn",
    "a process that vouches too late takes its lock for lost",
    "a passer that leaves ends its record",
    "a passer ends its record in its turn",
]

#: Those of a removal, and how many remove at once where it is missed.
REMOVAL_RULES = {
    "a process that goes in looks whether the file is still there": 1,
    "a passer looks whether the file is still there": 1,
    "a process that finds the file removed goes in with a later token": 1,
    "a remover has the flock": 1,
    "a remover has the passers' turn": 1,
    "a remover looks whether the file is still there": 2,
    "only a file whose fence has ended is removed": 1,
    "only a file whose records have run out is removed": 1,
}

#: The token, and which of its writer's deadlines it has: 0, then 1 once it was refreshed; -1: none any more. Nobody's:
#: of a holder that was there before.
Record = tuple[int, int]
NOBODYS = (-1, -1)
#: In a file that is new.
EMPTY = (-2, -1)


class Broken(Exception):
    pass


class Process(NamedTuple):
    #: Its next step.
    at: str = "asks"
    token: int = -1
    #: Which one it has open.
    file: int = 0
    #: The deadline until which it is inside, as far as it knows; None: it is not.
    inside: int | None = None
    #: The records that it has read.
    holder: Record = NOBODYS
    passer: Record = NOBODYS


class File(NamedTuple):
    holder: Record = EMPTY
    passer: Record = EMPTY
    flock: int | None = None
    turn: int | None = None


class State(NamedTuple):
    #: The last deadline of each token that has run out.
    ended: tuple[int, ...]
    processes: tuple[Process, ...]
    #: Those that there were; the last is the one that is opened by its name.
    files: tuple[File, ...] = (File(NOBODYS, NOBODYS),)
    #: The highest token that was let in.
    token: int = -1
    #: The highest that is an hour old: who is granted it from now on, gets a higher one.
    old: int = -1

    @property
    def in_place(self) -> int:
        return len(self.files) - 1


class Model:
    """Args: without: a rule. processes: how many want the lock. removers: how many remove its file; beside two, nobody
    passes, for the number of states."""

    def __init__(self, without: str = "", *, processes: int = 3, removers: int = 0) -> None:
        assert without in ("", *RULES, *REMOVAL_RULES)
        self._without = without
        self._processes = processes
        self._removers = removers

    def start(self) -> State:
        if not self._removers:
            processes = [Process(token=me) for me in range(self._processes)]
        else:
            removes = Process("removes: opens" if self._removers == 1 else "removes: locks")
            processes = [Process("opens")] * self._processes + [removes] * self._removers
        return State((-1,) * self._processes * (2 + 2 * self._removers), tuple(processes))

    def _rule(self, name: str) -> bool:
        return name != self._without

    def _granted(self, s: State, me: int, above: int) -> int:
        """The token that it gets now."""
        token = me
        while token <= max(s.old, above):
            token += self._processes
        return token

    def _fresh(self, record: Record, ended: tuple[int, ...]) -> bool:
        return record[0] >= 0 and record[1] > ended[record[0]]

    def after(self, s: State) -> Iterator[State]:
        if self._removers and s.old < s.token:
            yield s._replace(old=s.token)
        for me, p in enumerate(s.processes):
            if p.at in ("gone", "dead"):
                continue
            for then, process in self._steps(s, me, p):
                yield _with(then, me, process)
            if me in (s.files[p.file].flock, s.files[p.file].turn):
                yield _with(_gone(s, me, p)[0], me, _seen_nothing(p, "dead"))
            if p.token >= 0 and p.at != "asks" and s.ended[p.token] < 1:
                yield s._replace(ended=tuple(e + (token == p.token) for token, e in enumerate(s.ended)))

    def _steps(self, s: State, me: int, p: Process) -> Iterator[tuple[State, Process]]:
        """Its possible next steps: the states after them, of all and of itself."""
        if me >= self._processes:
            yield from self._steps_of_remover(s, me, p)
            return
        f = s.files[p.file]
        free = f.turn is None or not self._rule("passers take turns")
        refreshes = me < 2 and not self._removers
        at = p.at
        if at == "opens":
            yield s, p._replace(at="is granted", file=s.in_place)
        elif at == "is granted":
            yield s, p._replace(at="asks", token=self._granted(s, me, -1))
        elif at == "asks":
            if f.flock is None or not self._rule("one process has the flock"):
                looks = "goes in: looks for the file" if self._removers else "goes in: reads"
                yield _file(s, p, flock=me), p._replace(at=looks)
            elif free and self._removers < 2:
                yield _file(s, p, turn=me), p._replace(at="passes: reads")
        elif at == "goes in: looks for the file":
            if p.file == s.in_place or not self._rule("a process that goes in looks whether the file is still there"):
                yield s, p._replace(at="goes in: reads")
            else:
                token = p.token
                if self._rule("a process that finds the file removed goes in with a later token"):
                    token = self._granted(s, me, token)
                yield _file(s, p, flock=None), p._replace(at="asks", file=s.in_place, token=token)
        elif at.endswith(": reads"):
            yield s, p._replace(at=at.replace("reads", "judges"), holder=f.holder, passer=f.passer)
        elif at.endswith(": judges"):
            yield (s, p._replace(at=at.replace("judges", "writes"))) if self._may(s, p) else _gone(s, me, p)
        # The owner of the flock.
        elif at == "goes in: writes":
            yield _file(s, p, holder=(p.token, 0)), p._replace(at="goes in: looks")
        elif at == "goes in: looks":
            if f.passer == p.passer or not self._rule("a holder that has gone in looks for a passer again"):
                yield self._enter(s, p), _seen_nothing(p, "holds", 0)
            else:
                yield s, p._replace(at="goes in: backs out")
        elif at == "goes in: backs out":
            yield _gone(_file(s, p, holder=p.holder), me, p)
        elif at == "holds":
            yield _gone(s, me, p)
            if p.inside == 0 and s.ended[p.token] < 0 and refreshes:
                yield s, p._replace(at="holds: writes")
        elif at == "holds: writes":
            yield _file(s, p, holder=(p.token, 1)), p._replace(at="holds: looks")
        elif at == "holds: looks":
            late = s.ended[p.token] >= 0 and self._rule("a process that vouches too late takes its lock for lost")
            yield s, (_seen_nothing(p, "holds: takes back") if late else _seen_nothing(p, "holds", 1))
        elif at == "holds: takes back":
            yield _gone(_file(s, p, holder=(p.token, 0)), me, p)
        # A passer.
        elif at == "passes: writes":
            yield _file(s, p, passer=(p.token, 0)), p._replace(at="passes: looks")
        elif at == "passes: looks":
            if f.holder == p.holder or not self._rule("a passer looks at the holder again"):
                yield self._enter(s, p), _seen_nothing(p, "has passed: ends its turn", 0)
            else:
                yield s, p._replace(at="passes: backs out")
        elif at == "passes: backs out":
            yield _gone(_file(s, p, passer=p.passer), me, p)
        elif at == "has passed: ends its turn":
            yield _end_turn(s, me, p), p._replace(at="has passed")
        elif at == "has passed":
            yield s, _seen_nothing(p, "leaves" if self._rule("a passer that leaves ends its record") else "gone")
            if p.inside == 0 and refreshes:
                if not self._rule("a passer vouches for itself in its turn"):
                    yield s, p._replace(at="has passed: begins")
                elif free:
                    yield _file(s, p, turn=me), p._replace(at="has passed: begins")
        elif at == "has passed: begins":
            if s.ended[p.token] >= 0:
                yield _end_turn(s, me, p), _seen_nothing(p, "leaves")
            else:
                yield s, p._replace(at="has passed: writes")
        elif at == "has passed: writes":
            yield _file(s, p, passer=(p.token, 1)), p._replace(at="has passed: looks")
        elif at == "has passed: looks":
            late = s.ended[p.token] >= 0 and self._rule("a process that vouches too late takes its lock for lost")
            yield (
                s,
                _seen_nothing(p, "has passed: takes back")
                if late
                else _seen_nothing(p, "has passed: ends its turn", 1),
            )
        elif at == "has passed: takes back":
            yield _end_turn(_file(s, p, passer=(p.token, 0)), me, p), _seen_nothing(p, "leaves")
        elif at == "leaves":
            if f.passer[0] != p.token:
                yield _gone(s, me, p)
            elif not self._rule("a passer ends its record in its turn"):
                yield s, _seen_nothing(p, "says so")
            elif free:
                yield _file(s, p, turn=me), _seen_nothing(p, "leaves in its turn")
        elif at == "leaves in its turn":
            if f.passer[0] == p.token:
                yield s, _seen_nothing(p, "says so")
            else:
                yield _gone(s, me, p)
        else:
            assert at == "says so"
            yield _gone(_file(s, p, passer=(p.token, -1)), me, p)

    def _steps_of_remover(self, s: State, me: int, p: Process) -> Iterator[tuple[State, Process]]:
        f = s.files[p.file]
        does = p.at.removeprefix("removes: ")
        if does == "opens":
            yield s, p._replace(at="removes: locks", file=s.in_place)
        elif does == "locks":
            if not self._rule("a remover has the flock"):
                yield s, p._replace(at="removes: takes its turn")
            elif f.flock is None:
                yield _file(s, p, flock=me), p._replace(at="removes: takes its turn")
            else:
                yield _gone(s, me, p)
        elif does == "takes its turn":
            if not self._rule("a remover has the passers' turn"):
                yield s, p._replace(at="removes: looks for the file")
            elif f.turn is None:
                yield _file(s, p, turn=me), p._replace(at="removes: looks for the file")
            else:
                yield _gone(s, me, p)
        elif does == "looks for the file":
            if p.file == s.in_place or not self._rule("a remover looks whether the file is still there"):
                yield s, p._replace(at="removes: looks")
            else:
                yield _gone(s, me, p)
        elif does == "looks":
            records = f.holder, f.passer
            runs = any(self._fresh(record, s.ended) for record in records)
            stands = any(record[0] > s.old for record in records)
            if (runs and self._rule("only a file whose records have run out is removed")) or (
                stands and self._rule("only a file whose fence has ended is removed")
            ):
                yield _gone(s, me, p)
            else:
                yield s, p._replace(at="removes: removes")
        else:
            assert does == "removes"
            yield _gone(s._replace(files=(*s.files, File())), me, p)

    def _may(self, s: State, p: Process) -> bool:
        """Whether it goes on, after what it has seen."""
        if max(p.holder[0], p.passer[0]) >= p.token and self._rule("tokens rise"):
            return False
        passed = self._fresh(p.passer, s.ended)
        if p.at == "goes in: judges":
            return not (passed and self._rule("a fresh passer is honoured by the flock's owner"))
        if p.holder == EMPTY:
            return False
        if p.file != s.in_place and self._rule("a passer looks whether the file is still there"):
            return False
        if self._fresh(p.holder, s.ended) and self._rule("only a holder whose record has run out is passed"):
            return False
        return not (passed and self._rule("a fresh passer is not passed"))

    def _enter(self, s: State, p: Process) -> State:
        if p.token <= s.token:
            raise Broken(f"{p.token} is let in after {s.token}")
        return s._replace(token=p.token)

    def check(self, s: State) -> None:
        inside = [p.token for p in s.processes if p.inside is not None and p.inside > s.ended[p.token]]
        if len(inside) > 1:
            raise Broken(f"{inside} are inside")
        for me, p in enumerate(s.processes):
            f = s.files[p.file]
            stays = p.token >= 0 and f.passer[0] == p.token and self._fresh(f.passer, s.ended)
            if p.at == "gone" and (f.flock == me or f.turn == me or stays):
                raise Broken(f"{me} has left, and keeps others out")


def _with(s: State, me: int, process: Process) -> State:
    ended, f = s.ended, s.files[process.file]
    if process.at in ("gone", "dead") and process.token >= 0 and process.token not in (f.holder[0], f.passer[0]):
        # It makes no difference any more.
        ended = tuple(1 if token == process.token else e for token, e in enumerate(ended))
    others = s.processes
    return State(ended, (*others[:me], process, *others[me + 1 :]), s.files, s.token, s.old)


def _seen_nothing(p: Process, at: str, inside: int | None = None) -> Process:
    return Process(at, p.token, p.file, inside)


def _file(s: State, p: Process, **changed: Any) -> State:
    """With that changed in the file that it has open."""
    n, files = p.file, s.files
    return State(s.ended, s.processes, (*files[:n], files[n]._replace(**changed), *files[n + 1 :]), s.token, s.old)


def _gone(s: State, me: int, p: Process) -> tuple[State, Process]:
    if s.files[p.file].flock == me:
        s = _file(s, p, flock=None)
    return _end_turn(s, me, p), _seen_nothing(p, "gone")


def _end_turn(s: State, me: int, p: Process) -> State:
    return _file(s, p, turn=None) if s.files[p.file].turn == me else s


def explore(model: Model) -> int:
    start = model.start()
    seen, new = {start}, [start]
    while new:
        for then in model.after(new.pop()):
            if then not in seen:
                model.check(then)
                seen.add(then)
                new.append(then)
    return len(seen)


def test_the_host_lock_keeps_its_promises_in_every_state() -> None:
    assert explore(Model()) > 10_000


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_is_missed(rule: str) -> None:
    with pytest.raises(Broken):
        explore(Model(rule))


@pytest.mark.parametrize("removers", [1, 2])
def test_the_host_lock_keeps_its_promises_while_the_file_is_removed(removers: int) -> None:
    assert explore(Model(processes=2, removers=removers)) > 10_000


@pytest.mark.parametrize("rule", REMOVAL_RULES)
def test_each_rule_of_a_removal_is_missed(rule: str) -> None:
    with pytest.raises(Broken):
        explore(Model(rule, processes=2, removers=REMOVAL_RULES[rule]))
