"""The mixed run: random operations of both sides. Each result must be one that the promises allow that side."""

from __future__ import annotations

import random
import traceback
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest

from .limit_rules import LimitRules
from .lock_rules import LockRules
from .metadata_rules import MetadataRules
from .session_rules import SessionRules
from .world import Beside, World

#: The latter where nothing was raised.
_WRONG = (Exception, pytest.fail.Exception)
#: Operations of one example.
_STEPS = 50


class Mixed(SessionRules, LockRules, LimitRules, MetadataRules):
    """All features."""


MACHINES: dict[str, type[Beside]] = {
    "all": Mixed,
    "sessions": SessionRules,
    "locks": LockRules,
    "limits": LimitRules,
    "metadata": MetadataRules,
}


class Step(NamedTuple):
    operation: str
    drawn: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.operation}({', '.join(f'{name}={value!r}' for name, value in self.drawn.items())})"


class Failure(NamedTuple):
    """The place where an operation has found a result that no promise allows, and its message."""

    place: str
    text: str


class Disagreement(NamedTuple):
    failure: Failure
    #: The fewest operations that were found to lead there.
    steps: list[Step]

    def __str__(self) -> str:
        return "\n".join([f"at {self.failure.place}", *(f"    {step}" for step in self.steps), self.failure.text])


class Found(NamedTuple):
    operations: int
    disagreements: list[Disagreement]


def run(
    world: World, operations: int, seed: int, machine: type[Beside] = Mixed, *, shrink: bool = True, most: int = 20
) -> Found:
    """At least so many operations, from a seed; of each place that has failed, the shortest example.

    Args:
        most: ends after so many disagreements.
    """
    dice, done = random.Random(seed), 0
    found: dict[str, Disagreement] = {}
    while done < operations and len(found) < most:
        steps = _draw(machine, dice)
        failure = play(world, machine, steps)
        done += len(steps)
        if failure is not None and failure.place not in found:
            fewest = _shortest(world, machine, steps, failure) if shrink else (failure, steps)
            found[failure.place] = Disagreement(*fewest)
    return Found(done, list(found.values()))


def _draw(machine: type[Beside], dice: random.Random) -> list[Step]:
    """Draws some kinds of operations only: long sequences of few kinds find faults that short ones of many do not."""
    possible = machine.operations()
    some = dice.sample(sorted(possible), dice.randint(min(5, len(possible)), len(possible)))
    names = [dice.choice(some) for _ in range(_STEPS)]
    return [Step(name, {n: dice.choice(values) for n, values in possible[name].items()}) for name in names]


def play(world: World, machine: type[Beside], steps: Sequence[Step]) -> Failure | None:
    """Do it, with new ids. None: everything is as promised."""
    beside = machine(world)
    failure = None
    try:
        for step in steps:
            beside.do(*step)
    except _WRONG as error:  # an error that nobody expects is a disagreement, too
        failure = _failure(error)
    try:
        beside.end()
    except _WRONG as error:
        failure = failure or _failure(error)
    return failure


def _failure(error: BaseException) -> Failure:
    frames = [*traceback.walk_tb(error.__traceback__)]
    mine = [found for found in frames if found[0].f_code.co_filename.endswith(("_rules.py", "world.py"))]
    frame, number = mine[-1]
    summary = traceback.FrameSummary(frame.f_code.co_filename, number, frame.f_code.co_name)
    values = ", ".join(f"{name}={value!r}" for name, value in frame.f_locals.items() if name != "self")
    place = f"{summary.filename.rsplit('/', 1)[-1]}:{number} in {summary.name}, {type(error).__name__}"
    return Failure(place, f"{summary.line}\n{error}\nwith {values}")


def _shortest(world: World, machine: type[Beside], steps: list[Step], failure: Failure) -> tuple[Failure, list[Step]]:
    """Leave out what is not needed to fail at the same place."""
    size = len(steps)
    while size:
        start = 0
        while start < len(steps):
            fewer = steps[:start] + steps[start + size :]
            again = play(world, machine, fewer)
            if again is not None and again.place == failure.place:
                steps, failure = fewer, again
            else:
                start += size
        size //= 2
    return failure, steps
