"""ExclusiveHostLock: a file per resource, with flock for the holder inside and records for those that live.

Within one lock folder (normally: one user on one host) it keeps holders apart whatever Redis does. The kernel frees a
dead holder's flock at once. A record (fencing token, owner, the instant until which its writer vouches for itself) is
for the living. The file has room for two:

- the holder's, which only the owner of the flock writes;
- a passer's. A Redis grantee that finds the flock taken by a holder whose record has run out (stopped, starved) passes
  it, and writes here. Passers take turns by a lock of their own on these bytes of the file: an open file description's,
  which the kernel frees as it does a flock. Everybody honours a passer's fresh record, the flock's next owner included.

Nothing here counts on speed: each process may stand still between any two steps, for as long as it likes.

- A process that goes in by the flock writes, and then looks whether a passer has written since its first look. A passer
  writes, and then looks whether the holder's record is still the same that had run out. So when two meet, at least one
  sees the other, and backs out.
- A process that vouches for itself anew writes, and then looks whether its record had run out by then: only then was it
  passed.

A lock on an unlinked inode excludes nobody. A file is removed when its fence has ended (see sweep.py), under its flock
and the passers' turn: nobody is inside then, and nobody gets in meanwhile.

- A process that goes in by the flock looks, once it has the flock, whether the file is still there. A passer looks in
  its turn.
- If it is gone, the process opens the new file, which knows of no tokens, and goes in with a token that was granted
  after that. Such a token is higher than all that the removed file knew, for these are an hour old.

If somebody else removes a file, the holder notices at its next refresh, and has lost the lock.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import time

from ..._boottime import clock
from ..._fork import renew_in_child
from . import liveness as liveness_module
from .base import HostProcess, raises_unusable, unusable
from .liveness import lock_range
from .open_file import OpenFile
from .record import HOLDERS, PASSERS, RECORD_BYTES, LockRecord, format_record, reaches, read_records, token_of

#: A process that looks has the flock for an instant: others ask for it so many times, a millisecond apart.
_LOOKS = 5

log: logging.Logger = logging.getLogger("govredis")


class ExclusiveHostLock(OpenFile):
    """The HostLock of a resource that one holder has at a time. Raises OSError where its file cannot be opened.

    Args:
        path: of the lock file.
        process: this process.
    """

    __slots__ = (
        "__weakref__",
        "_expired",
        "_flocked",
        "_owner",
        "_process",
        "_refused",
        "_replaced",
        "_vouched_until",
        "inside",
    )

    _how = fcntl.LOCK_EX

    def __init__(self, path: str, process: HostProcess) -> None:
        super().__init__(path, process.shared)
        self._process = process
        self._open()
        self._flocked = False
        self._owner = ""
        self._vouched_until = 0.0
        self._expired: tuple[LockRecord, float] | None = None
        #: Whether the file was found removed, and no token was refused for that yet.
        self._replaced = False
        #: The highest token that was refused for it.
        self._refused = 0
        self.inside: bool = False
        renew_in_child(self)

    @raises_unusable
    def last_token(self) -> int:
        pair = read_records(self._files[0])
        return max(self._refused, *(record.token for record in (pair.holder, pair.passer) if record is not None), 0)

    @raises_unusable
    def look(self) -> LockRecord | None:
        """The record of the holder inside, or None. For an instant nobody can go in."""
        pair = read_records(self._files[0])
        if self._is_fresh(pair.passer):
            return pair.passer
        if not self._try_flock(fcntl.LOCK_SH):
            return pair.holder
        self._unlock()
        return None

    @raises_unusable
    def dead_holder(self) -> LockRecord | None:
        # A free flock alone proves no death: the holder may have closed the descriptor, or may be leaving just now.
        pair = read_records(self._files[0])
        if (
            pair.holder is None
            or not pair.holder.boot
            or pair.holder.boot != self._process.boot
            or (pair.passer is not None and pair.passer.token > pair.holder.token)
            or not self._process.liveness.has_ended(pair.holder.liveness)
            or not self._try_flock()
        ):
            return None
        try:
            return pair.holder if read_records(self._files[0]) == pair else None
        finally:
            self._unlock()

    def enter(self, token: int, owner: str, deadline: float, *, may_pass: bool) -> bool:
        self._owner = owner
        mine = LockRecord(token, owner, deadline, self._process.boot, self._process.liveness.name)
        try:
            if self._try_flock() or (may_pass and self._try_flock_again()):
                self.inside = self._was_granted_since(token) and self._go_in(mine)
                if not self.inside:
                    self._unlock()
            else:
                self.inside = may_pass and self._pass(mine)
        except OSError as error:
            raise unusable(self._path, error) from error
        if self.inside:
            self._vouched_until = deadline
        return self.inside

    def _was_granted_since(self, token: int) -> bool:
        """Whether the token was granted since this file was opened; False too where nobody can know."""
        if self._replaced:
            self._refused, self._replaced = max(self._refused, token), False
        return token > self._refused

    def _go_in(self, mine: LockRecord) -> bool:
        holders, passers = os.pread(self._files[0], 2 * RECORD_BYTES, 0), b""
        token = token_of(holders)  # enough where nobody has ever passed, as almost always
        if token is None:
            pair = read_records(self._files[0])
            holders, passers = pair.holders, pair.passers
            if reaches(pair.holder, mine) or reaches(pair.passer, mine) or self._is_fresh(pair.passer):
                return False
        elif token >= mine.token:
            return False
        self._write(HOLDERS, format_record(mine))
        if os.pread(self._files[0], RECORD_BYTES, PASSERS) == passers:
            return True
        self._write(HOLDERS, holders.ljust(RECORD_BYTES, b"\0"))
        return False

    def _pass(self, mine: LockRecord) -> bool:
        """Pass the flock's owner, if its record has been out of date, and the same, for a tenth of a second.

        Not at first sight: a holder that has just gone in may not have written yet, and need not be disturbed.
        """
        if not self._lock_passers():
            return False
        try:
            pair = read_records(self._files[0])
            if (
                pair.holder is None
                or reaches(pair.holder, mine)
                or reaches(pair.passer, mine)
                or self._is_fresh(pair.holder)
                or self._is_fresh(pair.passer)
                or self._in_place() is None
            ):
                self._expired = None
                return False
            now = clock()
            if self._expired is None or self._expired[0] != pair.holder:
                self._expired = (pair.holder, now)
            if now - self._expired[1] < 0.1:
                return False
            self._write(PASSERS, format_record(mine))
            if os.pread(self._files[0], RECORD_BYTES, HOLDERS) == pair.holders:
                return True
            self._write(PASSERS, pair.passers.ljust(RECORD_BYTES, b"\0"))
            return False
        finally:
            self._unlock_passers()

    def refresh(self, token: int, deadline: float) -> float:
        if not self.inside:
            return 0.0
        try:
            if self._in_place() is None:
                return 0.0
            self._process.liveness.keep()
            until = max(deadline, self._vouched_until)
            mine = LockRecord(token, self._owner, until, self._process.boot, self._process.liveness.name)
            if self._flocked:
                return self._vouch(HOLDERS, mine)
            # Passers keep their turn for an instant only, unless they stand still.
            for _ in range(_LOOKS):
                if self._lock_passers():
                    try:
                        return self._vouch(PASSERS, mine)
                    finally:
                        self._unlock_passers()
                time.sleep(0.001)
        except OSError as error:
            log.warning("lock file %s cannot be kept fresh: %s", self._path, error.strerror)
        return self._vouched_until if clock() < self._vouched_until else 0.0

    def _refresh_without_record(self, deadline: float) -> float:
        """`refresh` by the flock alone."""
        if not self.inside:
            return 0.0
        try:
            found = self._in_place()
            if found is None:
                return 0.0
            self._keep_from_cleaners(found)
        except OSError as error:
            log.warning("lock file %s cannot be kept fresh: %s", self._path, error.strerror)
        return deadline

    def _vouch(self, place: int, mine: LockRecord) -> float:
        before = self._vouched_until
        if clock() >= before:
            return 0.0
        self._write(place, format_record(mine))
        if clock() >= before:
            # It stood still, and may have been passed. Its record must keep nobody out.
            self._write(place, format_record(mine._replace(deadline=before)))
            return 0.0
        self._vouched_until = mine.deadline
        return mine.deadline

    def leave(self) -> None:
        if not self._files:
            return
        try:
            if self._flocked:
                self._unlock()
            elif self._owner:
                self._end_passing()
        except OSError as error:
            log.warning("lock file %s could not be left in order: %s", self._path, error.strerror)
        finally:
            self.inside = self._flocked = False
            self._close()

    def _end_passing(self) -> None:
        """End this passer's record, if it was written: nobody could get in before it ran out."""
        for _ in range(_LOOKS):
            passer = read_records(self._files[0]).passer
            if passer is None or passer.owner != self._owner:
                return
            if self._lock_passers():
                try:
                    passer = read_records(self._files[0]).passer
                    if passer is not None and passer.owner == self._owner:
                        self._write(PASSERS, format_record(passer._replace(deadline=0.0)))
                    return
                finally:
                    self._unlock_passers()
            time.sleep(0.001)

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
            found = os.fstat(self._files[0])
            if found.st_nlink:
                self._inode = found.st_dev, found.st_ino
                self._flocked = True
                return True
            # The file was removed: others lock the new one.
            self._replaced = True
            self._close()
            self._open()

    def _try_flock_again(self) -> bool:
        for _ in range(_LOOKS - 1):
            time.sleep(0.001)
            if self._try_flock():
                return True
        return False

    def _unlock(self) -> None:
        # Not by closing alone: a child that was forked in C may have the descriptor too.
        fcntl.flock(self._files[0], fcntl.LOCK_UN)
        self._flocked = False

    def _lock_passers(self) -> bool:
        if liveness_module.SETLK is None:
            return False
        try:
            lock_range(self._files[0], fcntl.F_WRLCK, PASSERS, RECORD_BYTES)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return False
            raise
        return True

    def _unlock_passers(self) -> None:
        lock_range(self._files[0], fcntl.F_UNLCK, PASSERS, RECORD_BYTES)

    def _is_fresh(self, record: LockRecord | None) -> bool:
        return record is not None and record.boot == self._process.boot and clock() < record.deadline

    def _in_place(self) -> os.stat_result | None:
        """The file's status, if this has the same file open as others; otherwise None."""
        if not self._files or self._stat() is None:
            return None
        try:
            found = os.stat(self._path, follow_symlinks=False)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE):
                return None
            raise
        return found if (found.st_dev, found.st_ino) == self._inode else None

    def _write(self, place: int, raw: bytes) -> None:
        os.pwrite(self._files[0], raw, place)
