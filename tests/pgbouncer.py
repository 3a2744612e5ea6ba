"""PgBouncer before a PostgreSQL, in transaction mode, with one connection to it that all its clients share."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from pathlib import Path
from urllib.parse import urlsplit

from govredis.testing._base_server import free_port

_SETTINGS = """
[databases]
{database} = host=127.0.0.1 port={server.port} user={server.username} password={server.password}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = trust
auth_file = {users}
pool_mode = {mode}
default_pool_size = 1
server_connect_timeout = 20
server_login_retry = 0.05
"""


class PgBouncer:
    """A running one. `url` is PostgreSQL's, through it.

    Args:
        binary: the path of pgbouncer.
        server: the url of the PostgreSQL.
        folder: for its files.
        mode: how long a client keeps the connection.
    """

    def __init__(self, binary: str, server: str, folder: Path, mode: str = "transaction") -> None:
        port = free_port()
        parts = urlsplit(server)
        settings = folder / "pgbouncer.ini"
        users = folder / "users.txt"
        users.write_text('"anybody" ""\n')
        settings.write_text(_SETTINGS.format(database=parts.path[1:], server=parts, port=port, users=users, mode=mode))
        self.url = f"postgresql://anybody@127.0.0.1:{port}{parts.path}"
        self._log = folder / "pgbouncer.log"
        other_user = ["-u", "nobody"] if os.getuid() == 0 else []
        with self._log.open("wb") as log:
            self._process = subprocess.Popen([binary, *other_user, settings], stdout=log, stderr=log)
        deadline = time.monotonic() + 30
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                return
            except OSError:
                assert self._process.poll() is None, self._log.read_text()
                assert time.monotonic() < deadline, self._log.read_text()
                time.sleep(0.01)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
