"""Every order of events around one key of a Cluster, in a model of two nodes' freshness leases; and on one server.

The model, freshness_model.c, has these parts:

- Writes of PostgreSQL's row, and for each epoch the last run, with the writes that it was told of.
- The key's slot, with its value and fill lease, moves between the nodes.
- The slot of the one node's freshness lease moves, too. The node then uses another key, the other one perhaps this.
- A node fails over: what takes over is any earlier state of it.
- Two relays at once, of the same node or of both. Each may stop after any step, for good or for a while. The lock by
  which PostgreSQL lets one relay of a lease run at a time is left out: a stopped relay may lose it, and the promise
  holds without.
- A filler. And readers, who look at both leases all the time.

Checked in every state that can be reached: no hit under a lease is older than the writes which were committed when the
lease's run began. Each rule is taken away in turn, and is missed.

Larger forms are run by hand, and take 24 bytes of memory a state. This one held in 496 million states, after ten
minutes of CPU; without the last two bounds it has 42 million:

    gcc -O2 -o /tmp/freshness_model tests/outbox/freshness_model.c
    /tmp/freshness_model moves=2 rovings=1 adopts=1 runs=3 writes=2 fills=2
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.once

ONE_SERVER = "cluster=0 relays=1 runs=4 writes=2"

#: The bounds: the most that there is of each part, see freshness_model.c. All of it at once would be very many states.
SCOPES = [
    "moves=2 runs=3",
    "moves=3 runs=3 fails=0",
    "rovings=2 runs=3 relays=1",
    "moves=1 rovings=2",
    "moves=1 rovings=1 adopts=1",
    ONE_SERVER,
]

#: Each with bounds in which a stale hit is found without it.
RULES = {
    "a value is used only where the lease covers its slot": "moves=2",
    "a value is stored only where the lease covers its slot": "moves=3 runs=3 fails=0",
    "a slot that comes back begins a new epoch": "moves=3 runs=3 fails=0",
    "a redirected invalidation ends the run": "moves=2",
    "a lease is valid only on the data that it is of": "rovings=2",
    "data must be as long as when Redis was told": "rovings=2",
    "a length that is not known is no proof": "rovings=2 runs=3 relays=1",
    "a run goes on only on the data that the lease is of": "rovings=2 runs=3 relays=1",
    "a run goes on only where PostgreSQL knows the lease's number": ONE_SERVER,
    "the last number is written after the invalidations": "moves=2",
    "a run that has connected anew acknowledges nothing": ONE_SERVER,
    "a run begins only if the lease is as it was read": ONE_SERVER,
    "a run is acknowledged only if the lease has its first number": ONE_SERVER,
    "a lease becomes valid only if it has the last number": ONE_SERVER,
    "a lease's time is from before PostgreSQL was read": "moves=2",
}

#: `model("moves=2", rule)`: the status, and what it printed.
Model = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def model(system_binary: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> Model:
    built = tmp_path_factory.mktemp("model") / "freshness_model"
    source = Path(__file__).with_name("freshness_model.c")
    subprocess.run([system_binary("gcc"), "-O2", "-Wall", "-Werror", "-o", built, source], check=True)

    def explore(scope: str, *without: str) -> tuple[int, str]:
        done = subprocess.run([built, *scope.split(), *without], stdout=subprocess.PIPE, text=True, check=False)
        return done.returncode, done.stdout

    return explore


@pytest.mark.parametrize("scope", SCOPES)
def test_the_leases_keep_their_promise_in_every_state(model: Model, scope: str) -> None:
    status, told = model(scope)
    assert status == 0, told
    assert int(told.split()[0]) > 100_000


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_is_missed(model: Model, rule: str) -> None:
    status, told = model(RULES[rule], rule)
    assert status == 1, told
    assert "a stale hit" in told
