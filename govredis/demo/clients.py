"""Who uses the site: requests over HTTP, each timed, with what came back held against what was asked for."""

from __future__ import annotations

import json
from collections.abc import Callable
from http.client import HTTPConnection, HTTPException
from typing import Any
from urllib.parse import urlsplit

from .board import AGENTS
from .processes import take_order
from .site import DEGRADED
from .traffic import LIMITED, Worker


class Client(Worker):
    """Somebody who uses the site: logs in, is recognised, changes agents and stores discoveries, over HTTP."""

    def __init__(self, number: int, config: dict[str, Any], folder: str) -> None:
        super().__init__(number, config, folder)
        self.http = HTTPConnection(urlsplit((self.folder / "site").read_text()).netloc, timeout=5)
        self.fallbacks = 0
        #: Of each session, the epoch in which it was last bound.
        self.sessions: dict[str, int] = {}
        self.lost: list[str] = []
        #: The numbers of the discoveries that the site has accepted.
        self.published: list[int] = []
        self.findings = {"lost": self.lost, "published": self.published}
        mix: dict[Callable[[], None], int] = {self.resolve: 80, self.update: 2, self.discover: 4}
        self.calls, self.weights = list(mix), list(mix.values())

    def degraded(self, operation: str) -> int:
        return self.fallbacks

    def prepare(self) -> None:
        for session in range(20):
            self.log_in(f"s-{self.number}-{session}")

    def step(self) -> None:
        self.random.choices(self.calls, self.weights)[0]()

    def ask(self, method: str, path: str, session: str = "", body: object = None) -> tuple[int, Any]:
        headers = {"X-Session-Id": session, "Content-Type": "application/json"}
        try:
            self.http.request(method, path, json.dumps(body), headers)
            answer = self.http.getresponse()
            status, found = answer.status, json.loads(answer.read())
        except (OSError, HTTPException, ValueError):
            self.http.close()
            status, found = 0, None
        if status == 0 or status >= 500:
            self.tally["!HTTP errors"] += 1
        elif answer.headers[DEGRADED] != "0":
            self.fallbacks += 1
        return status, found

    def log_in(self, session: str) -> None:
        epoch = self.board.epoch
        self.ask("POST", "/login", body={"session": session, "agent": _agent_of_session(session)})
        self.sessions[session] = epoch

    def resolve(self) -> None:
        session, epoch = self.random.choice(list(self.sessions)), self.board.epoch
        (status, found), _ = self.timed("resolve over HTTP", lambda: self.ask("GET", "/me", session))
        if status == 200:
            self.tally["!sessions resolved wrongly"] += found["agent_id"] != _agent_of_session(session)
        elif status == 401:
            if self.sessions[session] < self.board.epoch:
                self.lost.append(session)
            elif epoch == self.board.epoch:
                self.tally["!sessions resolved wrongly"] += 1
            self.log_in(session)

    def update(self) -> None:
        """The site changes the row with SQL of its own, and publishes the invalidation, which promises the version."""
        self.post(
            "update over HTTP", f"/agents/agent-{self.random.randrange(AGENTS)}", {"clicked": self.random.random()}
        )

    def discover(self) -> None:
        number = len(self.published)
        if self.post("publish over HTTP", "/discoveries", {"number": number}) == 202:
            self.published.append(number)

    def post(self, operation: str, path: str, body: object) -> int:
        session = self.random.choice(list(self.sessions))
        (status, _), _ = self.timed(operation, lambda: self.ask("POST", path, session, body))
        if status == 400:  # the limit is of no agent: the session was lost with Redis's data
            self.log_in(session)
        return status


def _agent_of_session(session: str) -> str:
    """As the session's name, which is s-OWNER-NUMBER, has it: of few agents, whose limits are met now and then."""
    return f"agent-{int(session.rpartition('-')[2]) % LIMITED}"


def main() -> None:
    Client(**take_order()).run()
