"""The short form of `make chaos`; and the library with faults of its own, which a run must find."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from .mutants import MUTANTS

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[2]
#: Seconds after which a run is killed, as it hangs; a run says itself which call took too long.
HUNG = 900
#: The runs of a mutant, at most, each with another seed.
RUNS = 10


def run(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.chaos", "run", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HUNG, check=False)


@pytest.mark.parametrize(("topology", "seconds"), [("server", "20"), ("cluster", "15"), ("sentinel", "15")])
def test_a_storm_of_everything(topology: str, seconds: str) -> None:
    ended = run("--seconds", seconds, "--topology", topology)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "0 violations" in ended.stdout


FLUSHED = "redis flushed"
#: Those that show in one run, and what makes them show.
TOGETHER = [
    (["locks_without_flock", "one_more_admitted", "invalidations_lost", "revocations_forgotten"], FLUSHED),
    (["fences_of_their_own", "refused_for_nothing", "values_mixed_up", "any_session"], FLUSHED),
    (["unknown_is_logged_out", "other_exceptions", "tasks_not_exclusive"], "redis flushed,postgres stopped"),
    (["ticks_that_tell_nothing", "parked_and_forgotten"], "scripts flushed"),
    (["losses_unnoticed"], "redis set back"),
]


@pytest.mark.parametrize(("mutants", "faults"), TOGETHER, ids=[mutants[0] for mutants, _ in TOGETHER])
def test_mutants_are_found(mutants: list[str], faults: str) -> None:
    """By chance: the faults of one seed may not come where they show."""
    quick = ("--seconds", "12", "--patience", "5", "--forks", "")
    broken, found = {MUTANTS[name].promise for name in mutants}, set[str]()
    for _ in range(RUNS):
        ended = run(*quick, "--faults", faults, "--mutant", ",".join(mutants))
        said = re.findall(r"^  \d+ violations of: (.+)$", ended.stdout, re.MULTILINE)
        assert ended.returncode == (1 if said else 0), ended.stdout + ended.stderr
        found.update(said)
        if found >= broken:
            break
    assert found >= broken, ended.stdout


def test_each_mutant_is_tried() -> None:
    assert sorted(name for mutants, _ in TOGETHER for name in mutants) == sorted(MUTANTS)
