"""The host guard: a file per resource, with flock for who is in and a record for who is alive.

Within one lock folder (normally: one user on one host) it keeps holders apart whatever Redis does. The kernel frees a
dead holder's flock at once. The record (fencing token, owner, the instant until which its writer vouches for itself)
is for the living: a Redis grantee that finds the flock taken by somebody whose record has run out (stopped, starved)
passes it, and then writes a record of its own, marked as a passer's, which everybody honours, the flock's next owner
included.

Files are never unlinked: a lock on an unlinked inode excludes nobody. A folder holds one of 128 bytes for each resource
ever locked.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import hashlib
import os
import stat
import struct
import time
import zlib
from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeVar

from .._fork import renew_in_child
from ..errors import ConfigurationError, LockUnavailable

#: Token, deadline, passer, owner, boot; then a CRC, by which a half-written one is told.
_RECORD = struct.Struct("<Qd?70p37p")
_RECORD_BYTES = _RECORD.size + 4
_OPEN_FLAGS = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW

#: Seconds on a clock that all processes of the host share, that is never set, and runs on in suspend.
clock: Callable[[], float] = (
    functools.partial(time.clock_gettime, time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic
)


def _boot_id() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id") as f:
            return f.read().strip()
    except OSError:
        return "-"


class Record(NamedTuple):
    """What a lock file says. `deadline` is of `clock` since the boot `boot`."""

    token: int
    owner: str
    deadline: float
    passer: bool
    boot: str


class Guard(Protocol):
    """What keeps holders apart on this host, as an attempt and a lease use it. See HostGuard, and shared_guard.py."""

    def last_token(self) -> int: ...

    def enter(self, token: int, owner: str, deadline: float, *, may_pass: bool) -> bool: ...

    def refresh(self, token: int, deadline: float) -> bool: ...

    def leave(self) -> None: ...


G = TypeVar("G", bound=Guard)


class LockFolder:
    """Where the lock files are.

    Args:
        folder: an absolute path, shared by all who shall exclude each other; None: /tmp/govredis-locks-{uid}.
    """

    def __init__(self, folder: str | None) -> None:
        # Not tempfile.gettempdir(): two processes of one user with different TMPDIR would not exclude each other.
        self.path = folder if folder is not None else f"/tmp/govredis-locks-{os.geteuid()}"
        self.boot = ""
        self._file = functools.lru_cache(1000)(self._make_file)

    def guard(self, key: str) -> HostGuard:
        """Open the file of a key, for one holder at a time. Raises as `open`."""
        return self.open(key, HostGuard)

    def look(self, key: str) -> Record | None:
        """The record of whoever is inside on this host, or None. Raises as `open`, and makes no file."""
        if not os.path.exists(self._file(key)):
            return None
        guard = self.open(key, HostGuard)
        try:
            return guard.look()
        finally:
            guard.leave()

    def open(self, key: str, kind: Callable[[str, str], G]) -> G:
        """Open the file of a key, or those beside it: returns `kind(path, boot id)`.

        Raises ConfigurationError for a folder that another user controls, or no folder; LockUnavailable where the
        system has no descriptor or no space left.
        """
        if not self.boot:
            self._prepare()
        path = self._file(key)
        try:
            try:
                return kind(path, self.boot)
            except FileNotFoundError:  # the folder was removed under us
                self._prepare()
                return kind(path, self.boot)
        except OSError as error:  # no descriptor left, no space left
            raise LockUnavailable(f"lock file {path} cannot be opened: {error.strerror}") from error

    def _make_file(self, key: str) -> str:
        # A hash: keys may hold slashes and be longer than a file name.
        return f"{self.path}/{hashlib.sha256(key.encode()).hexdigest()[:40]}"

    def _prepare(self) -> None:
        try:
            os.makedirs(self.path, mode=0o700, exist_ok=True)
            found = os.lstat(self.path)
        except OSError as error:
            raise ConfigurationError(f"lock folder {self.path!r} cannot be used: {error.strerror}") from error
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
            raise ConfigurationError(
                f"lock folder {self.path!r} must be a directory that this user owns and nobody else can write to;"
                " set GOVREDIS_LOCK_FOLDER to another"
            )
        self.boot = _boot_id()


class HostGuard:
    """One opening of a resource's lock file. Not inside until `enter` says so; `leave` closes it for good."""

    __slots__ = (
        "__weakref__",
        "_boot",
        "_expired",
        "_files",
        "_flocked",
        "_owner",
        "_path",
        "_record_deadline",
        "inside",
    )

    _how = fcntl.LOCK_EX

    def __init__(self, path: str, boot: str) -> None:
        self._path = path
        self._boot = boot
        self._files: list[int] = []
        self._open()
        self._flocked = False
        self._owner = ""
        self._record_deadline = 0.0
        self._expired: tuple[Record, float] | None = None
        self.inside = False
        renew_in_child(self)

    def last_token(self) -> int:
        """The last fencing token that was let in on this host; 0 for none."""
        record = self._read()
        return record.token if record is not None else 0

    def look(self) -> Record | None:
        """The record of whoever is inside, or None. For an instant nobody can go in."""
        record = self._read()
        if record is None or (record.passer and self._is_fresh(record)):
            return record
        if not self._try_flock(fcntl.LOCK_SH):
            return record
        self._unlock()
        return None

    def claim(self, suffix: str) -> str | None:
        """The owner of the last record if it ends with `suffix` and is gone for good. Nobody else goes in then."""
        record = self._read()
        if record is None or not record.owner.endswith(suffix) or not self._try_flock():
            return None
        record = self._read()
        if record is not None and record.owner.endswith(suffix) and not (record.passer and self._is_fresh(record)):
            return record.owner
        self._unlock()
        return None

    def enter(self, token: int, owner: str, deadline: float, *, may_pass: bool) -> bool:
        """Go in if nobody else is, and nobody with a higher token has been. Never waits, but for 20 ms where it passes.

        Args:
            token, owner, deadline: of the record to write; `deadline` is of `clock`.
            may_pass: go in past somebody whose record has run out. Only for whom Redis has granted the lock.
        """
        self._owner = owner
        if self._try_flock():
            record = self._read()
            if record is not None and (record.token >= token or (record.passer and self._is_fresh(record))):
                self._unlock()
                return False
            self._write(Record(token, owner, deadline, False, self._boot))
        elif not may_pass or not self._pass(Record(token, owner, deadline, True, self._boot)):
            return False
        self._record_deadline = deadline
        self.inside = True
        return True

    def _pass(self, mine: Record) -> bool:
        """Pass whoever has the flock, if the same record of theirs has been out of date for a tenth of a second.

        Not at first sight: who has just taken the flock has not written yet. Two who pass at once (data loss in Redis
        can grant two) are told apart as in Fischer's algorithm (Lamport, "A Fast Mutual Exclusion Algorithm", 1987):
        the last to write stays.
        """
        record = self._read()
        if record is None or self._is_fresh(record) or record.token >= mine.token:
            self._expired = None
            return False
        now = clock()
        if self._expired is None or self._expired[0] != record:
            self._expired = (record, now)
            return False
        if now - self._expired[1] < 0.1:
            return False
        self._write(mine)
        time.sleep(0.02)
        last = self._read()
        return last is not None and last.owner == mine.owner

    def refresh(self, token: int, deadline: float) -> bool:
        """Vouch for this process until `deadline`, or longer if it has before.

        False once that would come too late: the record ran out, and somebody may have passed, or has.
        """
        vouched_until = self._record_deadline
        if not self.inside or clock() >= vouched_until:
            return False
        record = self._read()
        if record is not None and record.token > token and self._is_fresh(record):
            return False
        # Over a lower token's: one who was passed, and stopped just before his own writing, has written since.
        deadline = max(deadline, vouched_until)
        self._write(Record(token, self._owner, deadline, not self._flocked, self._boot))
        if clock() >= vouched_until:
            return False
        self._record_deadline = deadline
        return True

    def leave(self) -> None:
        """Go out and close. Harmless a second time, and that is what one does whom an exception struck in it."""
        if not self._files:
            return
        try:
            if self._flocked:
                self._unlock()
            elif self._owner:
                # A passer's, or a would-be one's: nobody could get in before it ran out.
                record = self._read()
                if record is not None and record.owner == self._owner:
                    self._write(record._replace(deadline=0.0))
        finally:
            self.inside = False
            self._close()

    def renew_after_fork(self) -> None:
        # Close, never unlock: unlocking a shared description would let others in past the parent.
        self.inside = self._flocked = False
        self._close()

    def _try_flock(self, how: int | None = None) -> bool:
        while True:
            try:
                fcntl.flock(self._files[0], (how or self._how) | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    return False
                raise
            if os.fstat(self._files[0]).st_nlink:
                self._flocked = True
                return True
            # Somebody's clean-up of the folder removed the file: others lock the new one.
            self._close()
            self._open()

    def _unlock(self) -> None:
        # Not by closing alone: a child forked outside of Python's sight may hold the descriptor too.
        fcntl.flock(self._files[0], fcntl.LOCK_UN)
        self._flocked = False

    def _is_fresh(self, record: Record) -> bool:
        return record.boot == self._boot and clock() < record.deadline

    def _read(self) -> Record | None:
        raw = os.pread(self._files[0], _RECORD_BYTES, 0)
        # Once more where it was being written.
        return _parse(raw) or (_parse(os.pread(self._files[0], _RECORD_BYTES, 0)) if raw else None)

    def _write(self, record: Record) -> None:
        os.pwrite(self._files[0], _format(record), 0)

    def _open(self) -> None:
        # Through map, that the descriptor is in the list when the interpreter next looks for signals: an exception
        # raised by a handler would else lose it, open, and perhaps locked, until this process ends.
        self._files.extend(map(os.open, (self._path,), (_OPEN_FLAGS,), (0o600,)))

    def _close(self) -> None:
        if self._files:
            fd = self._files[0]
            del self._files[0]  # not pop: no call, so no look for signals, between this and the closing
            os.close(fd)

    def __del__(self) -> None:
        if hasattr(self, "_files"):
            self._close()


def _format(record: Record) -> bytes:
    owner, boot = record.owner.encode(), record.boot.encode()
    packed = _RECORD.pack(record.token, record.deadline, record.passer, owner, boot)
    return packed + zlib.crc32(packed).to_bytes(4, "little")


def _parse(raw: bytes) -> Record | None:
    """The record, or None for an empty or half-written one."""
    packed = raw[:-4]
    if len(raw) != _RECORD_BYTES or zlib.crc32(packed) != int.from_bytes(raw[-4:], "little"):
        return None
    token, deadline, passer, owner, boot = _RECORD.unpack(packed)
    return Record(token, owner.decode(), deadline, passer, boot.decode())
