"""The users of the site: requests over HTTP, each timed, and its answer checked against the question."""

from __future__ import annotations

import json
from collections.abc import Callable
from http.client import HTTPConnection, HTTPException
from typing import Any
from urllib.parse import urlsplit

from .board import AGENTS
from .processes import take_order
from .site import DEGRADED, IN_POSTGRES
from .traffic import LIMITED, Worker

#: Answers of the site: no session, so no agent to be limited; and a limit met.
NOBODY, REFUSED = 400, 429
#: The sessions of a client.
SESSIONS = 20
#: Seconds that it waits for an answer: a machine that stalls for a while is no error of the site.
_TIMEOUT = 60.0


class Client(Worker):
    """Somebody who uses the site: logs in, is recognised, changes agents and stores discoveries, over HTTP."""

    def __init__(self, number: int, config: dict[str, Any], folder: str) -> None:
        super().__init__(number, config, folder)
        address = urlsplit((self.folder / "site").read_text()).netloc
        self.http: HTTPConnection = HTTPConnection(address, timeout=_TIMEOUT)
        self.fallbacks: int = 0
        #: Its logins: each the id of a session of its agent, `agent-{n % LIMITED}`.
        self.sessions: list[str] = [""] * SESSIONS
        #: The numbers of the discoveries that the site has accepted.
        self.published: list[int] = []
        #: The agents that it has changed, and their new versions.
        self.updates: list[tuple[int, int]] = []
        #: The requests that their limit has let through.
        self.admitted: list[tuple[str, str, float, float]] = []
        self.findings: dict[str, Any] = {
            "published": self.published,
            "updates": self.updates,
            "admitted": self.admitted,
        }
        self.mix: dict[Callable[[], None], int] = {self.resolve: 80, self.update: 2, self.discover: 4}

    def degraded(self, operation: str) -> int:
        return self.fallbacks

    def prepare(self) -> None:
        for n in range(SESSIONS):
            self.log_in(n)

    def ask(self, method: str, path: str, expected: tuple[int, ...], session: str = "", body: object = None) -> Any:
        """The answer's status and body, and whether PostgreSQL decided its limit. Counts what was not expected."""
        told: Any = {}
        headers = {"X-Session-Id": session, "Content-Type": "application/json"}
        status, found, text = 0, None, b""
        try:
            self.http.request(method, path, json.dumps(body), headers)
            answer = self.http.getresponse()
            status, text = answer.status, answer.read()
            found, told = json.loads(text), answer.headers
            error = f"{status} {text!r}"
        except (OSError, HTTPException, ValueError) as failed:
            self.http.close()
            error = f"{status} {text!r} {failed!r}"
            status, found = 0, None
        if status not in expected:
            self.tally["!HTTP errors"] += 1
            # The report shows it: a reader of a log has no other trace of it.
            self.errors.setdefault(f"{method} {path} {status}", f"{method} {path}: {error[:1000]}")
        elif told[DEGRADED] != "0":
            self.fallbacks += 1
        return status, found, told.get(IN_POSTGRES, "0") != "0"

    def log_in(self, n: int) -> None:
        status, found, _ = self.ask("POST", "/login", (200,), self.sessions[n], {"agent": _agent_of(n)})
        if status == 200:
            self.sessions[n] = found["session"]

    def resolve(self) -> None:
        """As often as the site's limit for it admits, and now and then more often."""
        n, epoch = self.random.randrange(SESSIONS), self.board.epoch
        (status, found, in_postgres), _ = self.timed(
            "resolve over HTTP", lambda: self.ask("GET", "/me", (200, NOBODY, REFUSED), self.sessions[n])
        )
        if status == 200:
            agent = _agent_of(n)
            self.tally["!sessions resolved wrongly"] += found["agent_id"] != agent
            store = "site postgres" if in_postgres else f"site redis {epoch}"
            self.admitted.append((agent, store, self.log[-3], self.log[-2]))
        elif status == REFUSED:
            self.tally["requests refused"] += 1
        elif status == NOBODY:
            self.tally["!sessions resolved wrongly"] += 1
            self.log_in(n)

    def update(self) -> None:
        """The site changes the row with SQL of its own, and publishes the invalidation, which promises the version."""
        agent = self.random.randrange(AGENTS)
        found = self.post("update over HTTP", f"/agents/agent-{agent}", {"clicked": self.random.random()})
        if found is not None:
            self.updates.append((agent, found["version"]))

    def discover(self) -> None:
        number = len(self.published)
        if self.post("publish over HTTP", "/discoveries", {"number": number}) is not None:
            self.published.append(number)

    def post(self, operation: str, path: str, body: object) -> Any:
        """The site's answer, if it has accepted the request."""
        n = self.random.randrange(SESSIONS)
        (status, found, _), _ = self.timed(
            operation, lambda: self.ask("POST", path, (202, NOBODY), self.sessions[n], body)
        )
        if status == NOBODY:
            self.tally["!sessions resolved wrongly"] += 1
            self.log_in(n)
        return found if status == 202 else None


def _agent_of(n: int) -> str:
    """Whose the n-th session is: of few agents, whose limits are met now and then."""
    return f"agent-{n % LIMITED}"


def main() -> None:
    Client(**take_order()).run()
