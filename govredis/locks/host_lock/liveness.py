"""Liveness: in one file of the lock folder, each process keeps a byte locked while it lives.

The kernel frees the byte when the process dies. A free byte alone proves no death, for a process may have closed all
its descriptors. So its process id must be gone too, unless it is in another container: there only descriptors tell.
"""

from __future__ import annotations

import fcntl
import os
import struct
from weakref import WeakValueDictionary

from ..._boottime import clock
from ..._fork import renew_in_child
from .open_file import OpenFile

#: Locks of open file descriptions: they do not end when this process closes another descriptor of the file, as a POSIX
#: lock would. None where the system has no such locks: nobody is passed there, and nobody's death is known.
SETLK: int | None = getattr(fcntl, "F_OFD_SETLK", None)
_GETLK: int | None = getattr(fcntl, "F_OFD_GETLK", None)
#: A struct flock.
_FLOCK = struct.Struct("hhqqi")


def lock_range(fd: int, kind: int, start: int, length: int) -> None:
    """Lock or unlock bytes for the open file description. Raises OSError; BlockingIOError where others have them."""
    assert SETLK is not None
    fcntl.fcntl(fd, SETLK, _FLOCK.pack(kind, os.SEEK_SET, start, length, 0))


class Liveness(OpenFile):
    """The byte that this process keeps locked. Its `name` is empty where nobody could know of its death.

    Args:
        path: of the file that all processes share.
        shared: as in OpenFile.
    """

    def __init__(self, path: str, shared: bool = False) -> None:
        super().__init__(path, shared)
        self._byte = int.from_bytes(os.urandom(6), "big")
        self._namespace = _pid_namespace()
        pid = os.getpid()
        state = _state_of(pid)
        self.name: str = ""
        if SETLK is not None and state is not None and self._namespace:
            self.name = f"{self._namespace:x}.{pid:x}.{state[1]:x}.{self._byte:x}"
        self._next_look = 0.0
        self.keep()
        renew_in_child(self)

    def keep(self) -> None:
        """Keep the file from cleaners of old files; open it anew if one removed it. Raises OSError.

        Looks once a second at most: all locks of this process call it at each renewal.
        """
        now = clock()
        if not self.name or now < self._next_look:
            return
        self._next_look = now + 1.0
        found = self._stat()
        if found is not None and found.st_nlink > 0:
            self._keep_from_cleaners(found)
        else:
            self._close()
            self._inode = None
            self._open()
            self._stat()
        # Every time: an exception may have struck before the first.
        lock_range(self._files[0], fcntl.F_WRLCK, self._byte, 1)

    def has_ended(self, name: str) -> bool:
        """Whether the process of that liveness is certainly dead. Raises OSError."""
        if not name or not self._files or name == self.name:
            return False
        namespace, pid, started, byte = (int(part, 16) for part in name.split("."))
        assert _GETLK is not None
        asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
        answer = fcntl.fcntl(self._files[0], _GETLK, asked)
        if _FLOCK.unpack(answer[: _FLOCK.size])[0] != fcntl.F_UNLCK:
            return False
        if namespace == self._namespace and _lives(pid, started):
            return False
        # No death is certain by the bytes of a file that others do not see.
        status = self._stat()
        return status is not None and status.st_nlink > 0

    def renew_after_fork(self) -> None:
        # Close, never unlock: the parent lives.
        self.name = ""
        self._close()


#: By process and path: however many GovRedis of a process use one folder, one descriptor is open.
_kept: WeakValueDictionary[tuple[int, str], Liveness] = WeakValueDictionary()


def liveness_at(path: str, shared: bool = False) -> Liveness:
    """This process's, in that file. Raises OSError."""
    key = os.getpid(), path
    liveness = _kept.get(key)
    if liveness is None:
        _kept[key] = liveness = Liveness(path, shared)
    else:
        liveness.keep()
    return liveness


def _pid_namespace() -> int:
    """The namespace of this process's id; 0 where nobody knows it."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0


def _state_of(pid: int) -> tuple[str, int] | None:
    """A process's state ("Z": it is dead, and its parent has not waited for it), and when it began, in clock ticks."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
        return fields[0].decode(), int(fields[19])
    except (OSError, IndexError, ValueError):
        return None


def _lives(pid: int, started: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    state = _state_of(pid)
    return state is None or (state[1] == started and state[0] not in "ZX")
