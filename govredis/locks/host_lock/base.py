"""HostLock: keeps the holders on one host apart, as an acquisition and a lease use it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Concatenate, NamedTuple, ParamSpec, Protocol, TypeVar

from ...errors import LockUnavailable
from .liveness import Liveness
from .record import LockRecord

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S", bound=Any)


class HostProcess(NamedTuple):
    """This process, as the lock files of one folder know it.

    Attributes:
        boot: the host's boot; empty where nobody knows it.
        liveness: this process's.
        shared: whether the folder is shared by a group.
    """

    boot: str
    liveness: Liveness
    shared: bool = False


class HostLock(Protocol):
    """One opening of a resource's lock file, for one claim. Not inside until `enter` says so; `leave` closes it.

    The methods before entering raise LockUnavailable where the file cannot be used; those after raise nothing.
    """

    def last_token(self) -> int:
        """The last fencing token that was let in on this host; 0 for none."""

    def enter(self, token: int, owner: str, deadline: float, *, may_pass: bool) -> bool:
        """Go in if nobody else is inside, and nobody with a higher token has been. Never waits, but for 4 ms if it may
        pass.

        Args:
            token, owner, deadline: for the record to write; `deadline` is on the host's clock.
            may_pass: go in past a holder whose record has run out. Only for a claim that Redis has granted.
        """

    def refresh(self, token: int, deadline: float) -> float:
        """Vouch for this process until `deadline`, or longer if it has before.

        Returns the end of the time that it vouches for: the former, where the file cannot be written just now. 0.0 once
        another holder may have gone in: the record has run out, or others open another file.
        """

    def leave(self) -> None:
        """Go out and close. Harmless a second time: a caller that an exception struck in here calls it again."""

    def dead_holder(self) -> LockRecord | None:
        """The holder's record, if its process has certainly died inside and nobody has been in since."""


def unusable(path: str, error: OSError, *, needed: bool = False) -> LockUnavailable:
    """The error for a lock file that cannot be opened, read or written. `needed`: it says how locks do without."""
    return LockUnavailable(why_unusable(f"lock file {path}", "its folder", error, needed=needed))


def why_unusable(what: str, folder: str, error: OSError, *, needed: bool) -> str:
    """The words of `unusable`, for a file or for a folder. `folder` is the folder's word in them."""
    without = "; with GOVREDIS_LOCK_FALLBACK=fail, locks do without lock files" if needed else ""
    return (
        f"{what} cannot be used: {error.strerror}; {folder} must be this user's to write to, and have room,"
        f" or GOVREDIS_LOCK_FOLDER must name another{without}"
    )


def raises_unusable(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """For a method of an OpenFile: its OSErrors become LockUnavailable."""

    @functools.wraps(method)
    def raising(host_lock: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return method(host_lock, *args, **kwargs)
        except OSError as error:
            raise unusable(host_lock._path, error) from error

    return raising
