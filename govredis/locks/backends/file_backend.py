"""FileLockBackend: the lock folder, where the lock files are. With the fallback "fail", locks can do without it."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import stat
import threading
from collections.abc import Callable
from typing import NamedTuple, TypeVar

from ..._counters import Counters
from ..._fork import renew_in_child
from ...errors import ConfigurationError, LockUnavailable
from ..host_lock.base import HostLock, HostProcess, unusable, why_unusable
from ..host_lock.exclusive import ExclusiveHostLock
from ..host_lock.liveness import liveness_at
from ..host_lock.optional import NoHostLock, OptionalHostLock
from ..host_lock.record import LockRecord
from ..host_lock.sweep import Sweep
from ..renewal import renewer

log: logging.Logger = logging.getLogger("govredis")

H = TypeVar("H", bound=HostLock)


def _boot_id() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id") as f:
            return f.read().strip()
    except OSError:
        return ""


class FolderFault(NamedTuple):
    """A lock folder that cannot be used.

    Attributes:
        why: the fault, the consequence and the remedy.
        stops_locks: whether locks raise for it.
    """

    why: str
    stops_locks: bool


class FileLockBackend:
    """The lock folder of this process.

    It is this user's own (and made for it, with mode 0700), or shared by a group: a directory of root's or this user's
    with mode 2770. In a shared folder all files are the group's too (0660), and its members trust each other.

    Args:
        folder: an absolute path, the same for all processes that exclude each other; None: /tmp/govredis-locks-{uid}.
        needed: whether locks need it. Otherwise they do without while it cannot be used, and say so in `counters` and
            once in the log.
    """

    def __init__(self, folder: str | None, *, needed: bool = True, counters: Counters | None = None) -> None:
        # By the user alone. Two processes of one user may differ in TMPDIR, HOME and XDG_RUNTIME_DIR, and in whether
        # somebody has logged in: they would not exclude each other.
        self.path: str = folder if folder is not None else f"/tmp/govredis-locks-{os.geteuid()}"
        self._process: HostProcess | None = None
        self._sweep: Sweep | None = None
        self._needed = needed
        self._counters = counters if counters is not None else Counters()
        self._has_warned = False
        self._file = functools.lru_cache(1000)(self._make_file)
        renew_in_child(self)

    def renew_after_fork(self) -> None:
        self._process = self._sweep = None  # the child's liveness is its own

    def host_lock(self, key: str, kind: Callable[[str, HostProcess], HostLock]) -> HostLock:
        """The host lock of a key, for a caller that will hold it. Raises as `open`.

        Where the folder is not needed, and cannot be used, the host lock keeps nobody out.
        """
        if self._needed:
            return self.open(key, kind)
        return OptionalHostLock(lambda: self.open(key, kind), self._do_without)

    def open_exclusive(self, key: str) -> ExclusiveHostLock:
        """Open the file of a key, for one holder at a time. Raises as `open`."""
        return self.open(key, ExclusiveHostLock)

    def open(self, key: str, kind: Callable[[str, HostProcess], H]) -> H:
        """Open the file of a key, or the files beside it: returns `kind(path, process)`.

        Raises ConfigurationError for a folder that another user controls, or that is no folder. Raises LockUnavailable
        where the folder cannot be used: it is read-only, full or not writable, or no descriptor is left.
        """
        path = self._file(key)
        try:
            process = self._process or self._begin()
            try:
                return kind(path, process)
            except FileNotFoundError:  # the folder was removed under us
                return kind(path, self._begin())
        except OSError as error:
            raise unusable(path, error, needed=self._needed) from error

    def look(self, key: str) -> LockRecord | None:
        """The record of the holder on this host, or None. Raises as `open`, and makes no file."""
        if not os.path.exists(self._file(key)):
            return None
        host_lock = self.open_exclusive(key)
        try:
            return host_lock.look()
        finally:
            host_lock.leave()

    def check(self) -> FolderFault | None:
        """Returns why lock files cannot be kept here, and the consequence; None where they can.

        Writes a file, and removes it.
        """
        try:
            shared = self._prepare()
            paths = [f"{self.path}/check-{os.getpid()}-{threading.get_ident()}{end}" for end in ("", "-link")]
            try:
                with open(paths[0], "wb", buffering=0) as file:  # an object: an exception that strikes closes it
                    file.write(bytes(4096))
                if shared:
                    os.link(*paths)
            finally:
                for path in paths:
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(path)
        except ConfigurationError as error:
            return FolderFault(f"{error}. Locks raise ConfigurationError", stops_locks=True)
        except OSError as error:
            consequence = (
                "locks raise LockUnavailable" if self._needed else "locks work by Redis alone, without lock files"
            )
            why = why_unusable(f"lock folder {self.path}", "it", error, needed=self._needed)
            return FolderFault(f"{why}. Until then {consequence}", stops_locks=self._needed)
        return None

    def _do_without(self, why: LockUnavailable) -> HostLock:
        self._counters.add("locks.unguarded")
        if not self._has_warned:
            self._has_warned = True
            log.warning("locks go without lock files, by Redis alone: %s", why)
        return NoHostLock()

    def _make_file(self, key: str) -> str:
        # A hash: keys may hold slashes and be longer than a file name.
        return f"{self.path}/{hashlib.sha256(key.encode()).hexdigest()[:40]}"

    def _begin(self) -> HostProcess:
        """Raises OSError, and ConfigurationError."""
        shared = self._prepare()
        boot = _boot_id()
        self._process = process = HostProcess(boot, liveness_at(f"{self.path}/living", shared), shared)
        self._sweep = Sweep(self.path, boot, shared, self._counters)
        renewer.keep_swept(self._sweep)
        return process

    def _prepare(self) -> bool:
        """Make it where there is none. Returns whether it is shared. Raises OSError, and ConfigurationError."""
        try:
            os.makedirs(self.path, mode=0o700)
        except FileExistsError:
            pass
        found = os.lstat(self.path)
        mode, uid = stat.S_IMODE(found.st_mode), os.geteuid()
        is_shared = mode & (stat.S_ISGID | 0o022) == stat.S_ISGID | 0o020
        remedy = "have it removed by its owner"
        if not stat.S_ISDIR(found.st_mode):
            is_wrong = "is a symbolic link" if stat.S_ISLNK(found.st_mode) else "is not a directory"
        elif found.st_uid != uid and not (is_shared and found.st_uid == 0):
            is_wrong = f"belongs to user {found.st_uid}, and this process runs as user {uid}"
        elif mode & 0o022 and not is_shared:
            is_wrong = f"can be written to by others: its mode is {mode:04o}"
            remedy = "chmod it to 0700"
        elif found.st_uid != uid and found.st_gid not in (os.getegid(), *os.getgroups()):
            is_wrong = f"is shared by group {found.st_gid}, and this process is not a member of it"
            remedy = "add its user to the group"
        else:
            return is_shared
        raise ConfigurationError(
            f"lock folder {self.path!r} {is_wrong}. It must be a directory that this user owns and nobody else can"
            f" write to: {remedy}, or set GOVREDIS_LOCK_FOLDER to another. For several users, make one that root owns"
            " and a group of theirs shares: `install -d -m 2770 -o root -g GROUP FOLDER`"
        )
