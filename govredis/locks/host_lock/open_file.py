"""A file of the lock folder, kept open by a descriptor that the application may close under us."""

from __future__ import annotations

import contextlib
import logging
import os
import time

_OPEN_FLAGS = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW

#: Seconds after which a file that is in use is touched again.
_FRESH = 60.0

log: logging.Logger = logging.getLogger("govredis")


class OpenFile:
    """At most one descriptor, in a list: whenever an exception strikes, it is in the list or closed.

    Args:
        path: of the file.
        shared: whether the file is the folder's group's too, whatever this process's umask is.
    """

    __slots__ = ("_files", "_inode", "_path", "_shared")

    def __init__(self, path: str, shared: bool = False) -> None:
        self._path = path
        self._shared = shared
        self._files: list[int] = []
        #: The file's device and inode, once it matters that the descriptor is still this file's.
        self._inode: tuple[int, int] | None = None

    def _open(self) -> None:
        """Open the file, and make it if it is not there."""
        if not self._shared:
            self._open_as(_OPEN_FLAGS | os.O_CREAT)
            return
        while True:
            try:
                # Without O_CREAT, which the system may refuse for another user's file.
                self._open_as(_OPEN_FLAGS)
                return
            except FileNotFoundError:
                make_shared(self._path)

    def _open_as(self, flags: int) -> None:
        # Through map, so that the descriptor is in the list when the interpreter next looks for signals. Otherwise an
        # exception raised by a handler would lose it, open and perhaps locked, until this process ends.
        self._files.extend(map(os.open, (self._path,), (flags,), (0o600,)))

    def _stat(self) -> os.stat_result | None:
        """The file's status. None where the descriptor is another file's by now, or closed: then it is forgotten."""
        try:
            found = os.fstat(self._files[0])
        except (OSError, IndexError):  # IndexError: another thread is about to open it anew
            found = None
        if found is not None and self._inode in (None, (found.st_dev, found.st_ino)):
            self._inode = found.st_dev, found.st_ino
            return found
        self._files.clear()
        return None

    def _keep_from_cleaners(self, found: os.stat_result) -> None:
        """Touch the file where its mtime is over a minute off, so that cleaners of old files leave it alone."""
        if abs(time.time() - found.st_mtime) > _FRESH:
            os.utime(self._files[0])

    def _close(self) -> None:
        if self._files:
            fd = self._files[0]
            try:
                del self._files[0]  # not pop: no call, so no look for signals, between this and the closing
                os.close(fd)
            except OSError as error:
                log.warning("lock file %s was closed already: %s", self._path, error.strerror)

    def __del__(self) -> None:
        if hasattr(self, "_files"):
            self._close()


def make_shared(path: str) -> None:
    """Make a file that the folder's group may write to, unless another process has made it. Raises OSError."""
    # It gets its mode under another name: under its own, others might open it from the first instant.
    folder = os.path.dirname(path)
    made = f"{folder}/new-{os.getpid()}-{os.urandom(6).hex()}"
    try:
        with open(made, "xb", buffering=0) as file:  # an object: an exception that strikes closes it
            os.fchmod(file.fileno(), 0o660)
            try:
                os.link(made, path)
            except FileExistsError:
                pass
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(made)
