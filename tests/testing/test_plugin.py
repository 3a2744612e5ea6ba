"""The pytest plugin, from the wheel, in a run of pytest on a small project of a user's."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import govredis

pytestmark = pytest.mark.one_redis

ROOT = Path(govredis.__file__).parents[1]
WARNINGS = "[pytest]\nfilterwarnings = error\n"

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the wheel installs, its entry points too."""
    folder = tmp_path_factory.mktemp("installed")
    ignored = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "tests", "docs")
    shutil.copytree(ROOT, folder / "source", ignore=ignored)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder]
    subprocess.run([*build, folder / "source"], check=True)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


@pytest.fixture
def run(installed: Path, tmp_path: Path) -> Run:
    """`run(test_file, without=["fakeredis"])` runs pytest there, with a plugin that was installed and nothing else."""

    def run(
        source: str, *options: str, without: tuple[str, ...] = (), **files: str
    ) -> subprocess.CompletedProcess[str]:
        project, missing = tmp_path / "project", tmp_path / "missing"
        project.mkdir(exist_ok=True)
        missing.mkdir(exist_ok=True)
        for name in without:
            (missing / f"{name}.py").write_text(f"raise ImportError({f'no {name} here'!r})")
        (project / "pytest.ini").write_text(WARNINGS)
        for name, text in {"test_app": source, **files}.items():
            (project / f"{name}.py").write_text(textwrap.dedent(text))
        ours = ("REDIS_", "GOVREDIS_", "PYTEST_")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        environment["PYTHONPATH"] = os.pathsep.join(map(str, (missing, installed)))
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *options]
        return subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)

    return run


def passed(ended: subprocess.CompletedProcess[str]) -> int:
    """How many tests have passed; all must have."""
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = re.search(r"^(\d+) passed(?:, \d+ deselected)? in", ended.stdout, re.MULTILINE)
    assert found, ended.stdout
    return int(found[1])


def test_a_run_that_uses_no_fixture_imports_nothing_of_ours_but_the_plugin(run: Run) -> None:
    source = """
        import sys

        def test_what_is_loaded():
            assert "_govredis_pytest" in sys.modules
            for name in ("govredis", "redis", "fakeredis", "hiredis", "ssl"):
                assert name not in sys.modules
    """
    others = [part for name in ("hypothesispytest", "anyio", "valkey") for part in ("-p", f"no:{name}")]
    assert passed(run(source, *others)) == 1


def test_without_the_extra_a_run_is_as_before_and_the_fixtures_say_what_to_install(run: Run) -> None:
    source = """
        def test_of_the_app():
            pass

        def test_of_limits(gov):
            pass
    """
    ended = run(source, without=("fakeredis",))
    assert "1 passed, 1 error" in ended.stdout
    assert "pip install 'govredis[testing]'" in ended.stdout
    assert "Traceback" not in ended.stdout and "in_memory.py" not in ended.stdout
    assert passed(run(source, "-k", "of_the_app")) == 1


def test_without_lua_the_fixtures_say_what_to_install(run: Run) -> None:
    ended = run("def test_of_limits(gov): pass", without=("lupa",))
    assert "1 error" in ended.stdout
    assert "pip install 'govredis[testing]'" in ended.stdout


def test_each_test_begins_empty_and_the_functions_of_the_package_belong_to_its_gov(run: Run) -> None:
    source = """
        import os

        import pytest
        from govredis import get_distributed_lock, get_metadata_cache, get_rate_limiter, get_session_cache, api

        folders = []

        @pytest.mark.parametrize("time", [1, 2])
        def test_of_the_app(gov, time):
            assert get_rate_limiter() is gov.limits
            assert get_rate_limiter().hit("ada", "1/hour").backend == "redis"
            assert not get_rate_limiter().hit("ada", "1/hour")
            assert get_session_cache().for_agent("ada") == []
            get_session_cache().start("ada")
            assert get_metadata_cache().get("ada") is None
            get_metadata_cache().set("ada", {"name": "Ada"})
            with get_distributed_lock().acquire("ada", timeout=0) as held:
                assert not held.degraded
            assert gov.health.check().status == "pass"
            folders.append(gov.config.lock_folder)
            assert os.path.isdir(folders[-1])

        def test_afterwards():
            assert api._process_wide == {}
            assert len(set(folders)) == 2
            assert not any(map(os.path.exists, folders))
    """
    assert passed(run(source)) == 3


def test_windows_ttls_and_leases_follow_the_clock(run: Run) -> None:
    source = """
        import time

        import pytest
        from govredis import LockLost, LockTimeout

        def test_a_window(gov, gov_clock):
            assert [bool(gov.limits.hit("ada", "2/hour")) for _ in range(3)] == [True, True, False]
            gov_clock.tick(3599)
            assert gov.limits.hit("ada", "2/hour").retry_after == 1
            gov_clock.tick(1)
            assert gov.limits.hit("ada", "2/hour")

        def test_waiting_for_a_limit_takes_no_time(gov, gov_clock):
            gov.limits.hit("ada", "1/hour")
            began, real = gov_clock.time(), time.monotonic()
            assert gov.limits.wait("ada", "1/hour", timeout=4000)
            assert gov_clock.time() - began == pytest.approx(3600)
            assert time.monotonic() - real < 3600

        def test_a_session(gov, gov_clock):
            binding = gov.sessions.start("ada")
            assert binding.bound_at.timestamp() == gov_clock.time()
            gov_clock.tick(3599)
            assert gov.sessions.get_agent_id(binding.session_id) == "ada"
            gov_clock.tick(1)
            assert gov.sessions.get(binding.session_id) is None

        @pytest.mark.parametrize("options", [{}, {"stale": 100}])
        def test_a_cached_value(gov, gov_clock, options):
            cache, loads = gov.cache("report", ttl=60, **options), []

            def load(name):
                loads.append(name)
                return {"n": len(loads)}

            assert cache.get_or_load("a", load) == {"n": 1}
            gov_clock.tick(59)
            assert cache.get_or_load("a", load) == {"n": 1}
            gov_clock.tick(1)
            assert cache.get_or_load("a", load) == {"n": 2}

        def test_a_lease_that_nobody_renews(gov, gov_clock):
            lost = []
            held = gov.locks.acquire("report", timeout=0, ttl=30, renew=False)
            held.on_lost(lambda: lost.append(True))
            gov_clock.tick(29)
            assert held.remaining() == pytest.approx(1)
            assert gov.locks.is_locked("report") and not lost
            gov_clock.tick(1)
            assert lost == [True] and held.remaining() == 0
            with pytest.raises(LockLost):
                held.raise_if_lost()
            assert not held.release()
            gov.locks.acquire("report", timeout=0).release()

        def test_a_lease_is_renewed_for_as_long_as_it_is_held(gov, gov_clock):
            with gov.locks.acquire("report", timeout=0, ttl=30) as held:
                gov_clock.tick(3600)
                assert 0 < held.remaining() <= 30
                began = gov_clock.time()
                with pytest.raises(LockTimeout):
                    gov.locks.acquire("report", timeout=60)
                assert gov_clock.time() - began == pytest.approx(60)
                held.raise_if_lost()
                assert [found.name for found in gov.locks.held()] == ["report"]
            assert not gov.locks.is_locked("report")

        def test_a_lock_that_ends_while_another_waits(gov, gov_clock):
            held = gov.locks.acquire("report", timeout=0, ttl=30, max_hold=40)
            with gov.locks.acquire("report", timeout=120) as mine:
                assert mine.token > held.token
            assert not held.release()

        def test_the_clock_refuses_to_go_back(gov_clock):
            before = gov_clock.time()
            with pytest.raises(ValueError, match="must be a number from 0 on"):
                gov_clock.tick(-1)
            assert gov_clock.time() == before <= time.time()
    """
    assert passed(run(source)) == 9


def test_an_outage(run: Run) -> None:
    source = """
        import pytest
        from govredis import BackendUnavailable

        def test_what_holds_without_redis(gov, gov_clock, redis_away):
            assert gov.limits.hit("ada", "1/hour")
            gov_clock.tick(1000)
            known = gov.sessions.start("ada").session_id
            assert gov.health.check().status == "pass"
            with redis_away():
                assert gov.health.check().status == "fail"
                result = gov.limits.hit("ada", "1/hour")
                assert (result.allowed, result.backend, result.degraded) == (True, "local", True)
                assert gov.sessions.start("eve").backend == "local"
                gov.sessions.unbind(known)
                with gov.locks.acquire("report", timeout=0) as held:
                    assert held.degraded
                    assert held.token / 1e6 == pytest.approx(gov_clock.time(), abs=0.01)
                    gov_clock.tick(600)
                    held.raise_if_lost()
                assert gov.metadata.get_or_load("ada", lambda agent: {"name": "Ada"}) == {"name": "Ada"}
                with pytest.raises(BackendUnavailable):
                    gov.limits.most_denied()
                assert gov.health.check().status == "fail"
            assert gov.health.check().status == "pass"
            result = gov.limits.hit("ada", "1/hour")
            assert (result.allowed, result.backend) == (False, "redis")
            assert gov.sessions.get(known) is None  # the revocation was told
            assert gov.sessions.for_agent("eve") != []

        def test_a_window_of_the_outage_follows_the_clock(gov, gov_clock, redis_away):
            with redis_away():
                assert [bool(gov.limits.hit("ada", "1/minute")) for _ in "12"] == [True, False]
                gov_clock.tick(60)
                assert gov.limits.hit("ada", "1/minute")

        def test_it_is_back_after_an_error_too(gov, redis_away):
            with pytest.raises(ZeroDivisionError), redis_away():
                1 / 0
            assert gov.limits.hit("ada", "1/minute").backend == "redis"

        def test_a_lock_held_from_before(gov, gov_clock, redis_away):
            held = gov.locks.acquire("report", timeout=0, ttl=30)
            with redis_away():
                gov_clock.tick(30)
                assert held.remaining() == 0
            assert not held.release()
    """
    ended = run(source)
    assert passed(ended) == 4


def test_a_gov_of_the_projects_own_stands_in_the_place_of_the_plugins(run: Run) -> None:
    conftest = """
        import pytest
        from govredis import Config, GovRedis, configure

        @pytest.fixture
        def gov(gov_clock):
            with GovRedis.in_memory(Config(limit_fallback="deny", lock_ttl=7), clock=gov_clock) as gov:
                yield gov
    """
    source = """
        def test_its_settings(gov, redis_away):
            assert gov.locks.acquire("report", timeout=0).remaining() <= 7
            with redis_away():
                assert not gov.limits.hit("ada", "1/hour")
    """
    source = source.replace('assert gov.locks.acquire("report", timeout=0).remaining()', "assert gov.config.lock_ttl")
    assert passed(run(source, conftest=conftest)) == 1


def test_redis_away_refuses_a_gov_that_is_not_in_memory(run: Run) -> None:
    conftest = """
        import pytest
        from govredis import GovRedis

        @pytest.fixture
        def gov():
            with GovRedis() as gov:
                yield gov
    """
    source = """
        import pytest

        def test_it(redis_away):
            with pytest.raises(TypeError, match="gov_servers.redis.kill"), redis_away():
                pass
    """
    assert passed(run(source, conftest=conftest)) == 1


def test_a_flask_app_under_the_clock(run: Run) -> None:
    app = """
        from flask import Flask, request
        from govredis.contrib.flask import FlaskGovRedis

        def create_app(gov=None):
            app = Flask("app")
            ext = FlaskGovRedis(app, gov)

            @app.get("/")
            @ext.rate_limited("1/minute", key=lambda: request.headers["X-Agent"], operation="index")
            def index():
                return "hello"

            return app
    """
    source = """
        import pytest
        from app import create_app

        @pytest.fixture
        def client(gov):
            return create_app(gov).test_client()

        def ask(client):
            return client.get("/", headers={"X-Agent": "ada"})

        def test_the_limit(client, gov_clock):
            assert [ask(client).status_code for _ in "12"] == [200, 429]
            assert ask(client).headers["Retry-After"] == "60"
            gov_clock.tick(60)
            assert ask(client).status_code == 200

        def test_the_outage(client, redis_away):
            assert client.get("/govredis/ready").status_code == 200
            with redis_away():
                assert client.get("/govredis/ready").status_code == 503
                assert ask(client).status_code == 200
            assert client.get("/govredis/ready").status_code == 200
    """
    assert passed(run(source, app=app)) == 2


def test_real_servers(run: Run) -> None:
    source = """
        import os

        import pytest
        from govredis import api, get_rate_limiter, get_session_cache

        folders = []

        def test_redis(gov_servers):
            gov = gov_servers.connect(socket_timeout=10, connect_timeout=10)
            folders.append(gov.config.lock_folder)
            assert get_rate_limiter() is gov.limits
            assert gov.limits.hit("ada", "1/hour").backend == "redis"
            assert gov_servers._postgres is None
            gov_servers.redis.kill()
            assert gov.limits.hit("ada", "1/hour").backend == "local"

        def test_both_and_empty(gov_servers):
            gov = gov_servers.connect(postgres=True, socket_timeout=10, connect_timeout=10)
            assert gov.config.redis_url == gov_servers.redis.url
            assert gov.limits.hit("ada", "1/hour").backend == "redis"
            gov.agents.create("ada", {"name": "Ada"})
            assert gov.agents.get("ada")["metadata"] == {"name": "Ada"}

        def test_afterwards():
            assert api._process_wide == {}
            assert not os.path.exists(folders[0])

        @pytest.mark.xfail(strict=True, reason="a test takes one or the other")
        def test_not_beside_the_clock(gov_servers, gov):
            pass
    """
    ended = run(source)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "3 passed, 1 xfailed" in ended.stdout


def test_the_page_about_the_plugin_is_a_file_of_tests_that_pass(run: Run) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/testing.md").read_text(), re.DOTALL)
    tests = re.findall(r"^ *def test_", "".join(blocks), re.MULTILINE)
    assert passed(run("\n".join(blocks))) == len(tests) > 8
