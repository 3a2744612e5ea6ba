"""FlaskSession: the object behind flask.session, whose content is the data of a session of ours."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from flask.json.tag import TaggedJSONSerializer
from flask.sessions import SessionMixin

from ...errors import refuse
from ...sessions import SessionBinding

log: logging.Logger = logging.getLogger("govredis")

#: `session.permanent`, and Flask-Login's user, as they stand in the content.
PERMANENT, _USER = "_permanent", "_user_id"


class Changes(NamedTuple):
    """The work of a request on the content: keys with their new values, as JSON, and the keys that are gone."""

    changed: dict[str, Any]
    removed: frozenset[str]

    def __bool__(self) -> bool:
        return bool(self.changed or self.removed)

    def merged(self, data: Any) -> dict[str, Any] | None:
        """The session's data with these changes; other requests have changed other keys meanwhile."""
        kept = {key: value for key, value in (data or {}).items() if key not in self.removed}
        return {**kept, **self.changed} or None


class FlaskSession(SessionMixin):
    """A mapping that is read at its first use.

    Changes are found by comparing the JSON of each key, so that also a change within a value is saved.

    Args:
        read: returns the binding of the request's session, or None; called at most once.
        serializer: Flask's, which keeps tuples, bytes, datetimes, UUIDs and Markup.

    Attributes:
        is_saved: the response has been made, so that a change is too late.
        is_moved: the session is to get another id.
    """

    modified = False
    accessed = False  # Flask before 3.1.3 has True

    def __init__(self, read: Callable[[], SessionBinding | None], serializer: TaggedJSONSerializer) -> None:
        self._read = read
        self._serializer = serializer
        self._content: dict[str, Any] | None = None
        self._before: dict[str, str] = {}
        self._new = True
        self.is_saved: bool = False
        self.is_moved: bool = False

    # -- as a mapping --------------------------------------------------------------------------------------------

    def __getitem__(self, key: str) -> Any:
        return self._opened()[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._opened()[key] = value
        self._note()

    def __delitem__(self, key: str) -> None:
        del self._opened()[key]
        self._note()

    def __iter__(self) -> Iterator[str]:
        return iter(self._opened())

    def __len__(self) -> int:
        return len(self._opened())

    def __repr__(self) -> str:  # which is no use of it
        return f"<{type(self).__name__} {'not read yet' if self._content is None else self._content}>"

    def copy(self) -> dict[str, Any]:
        return dict(self._opened())

    @property
    def new(self) -> bool:  # type: ignore[override]
        """No session was found for the request."""
        self._opened()
        return self._new

    # -- for the interface and the logins ------------------------------------------------------------------------

    @property
    def is_open(self) -> bool:
        return self._content is not None

    @property
    def is_empty(self) -> bool:
        """Is there nothing to keep? Apps mark every session as permanent, also those of strangers."""
        return not self._opened().keys() - {PERMANENT}

    def changes(self) -> Changes:
        """Raises ValueError for a value that is no JSON."""
        now = self._texts(self._opened())
        changed = {key: json.loads(text) for key, text in now.items() if self._before.get(key) != text}
        return Changes(changed, frozenset(self._before.keys() - now.keys()))

    def needs_new_id(self, changes: Changes) -> bool:
        """Has somebody logged in by Flask-Login, or did the app ask for it?"""
        return self.is_moved or _USER in changes.changed

    def data(self, more: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
        """The content as JSON, with more. Raises ValueError for a value that is no JSON."""
        texts = self._texts({**self._opened(), **(more or {})})
        return {key: json.loads(text) for key, text in texts.items()} or None

    def settle(self, more: Mapping[str, Any] | None = None) -> None:
        """The content, with more, is what the session has now."""
        content = self._opened()
        content.update(more or {})
        self._before = self._texts(content)
        self.is_moved = False

    def forget(self) -> None:
        """The session has ended: a change from now on begins another."""
        self._content, self._before, self.is_moved = {}, {}, False

    # -- inside --------------------------------------------------------------------------------------------------

    def _opened(self) -> dict[str, Any]:
        if self._content is None:
            self.accessed = True
            binding = self._read()
            data = None if binding is None else binding.data
            if data is not None and not isinstance(data, dict):
                raise refuse("the data of the session", type(data).__name__, "a dict, as it is flask.session")
            content = {key: self._plain(value) for key, value in (data or {}).items()}
            self._before = self._texts(content)
            self._content, self._new = content, binding is None
        return self._content

    def _note(self) -> None:
        self.modified = True
        if self.is_saved:
            log.warning("flask.session was changed after the response was made, and that is not saved")

    def _texts(self, content: Mapping[str, Any]) -> dict[str, str]:
        return {key: self._text(key, value) for key, value in content.items()}

    def _text(self, key: Any, value: Any) -> str:
        if not isinstance(key, str):
            raise refuse("a key of flask.session", key, "a str")
        try:
            return json.dumps(self._serializer.tag(value), allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"flask.session[{key!r}] cannot be stored as JSON: {error}") from None

    def _plain(self, value: Any) -> Any:
        """A value, as `_text` was given it."""
        if isinstance(value, list):
            return [self._plain(each) for each in value]
        if not isinstance(value, dict):
            return value
        within = {key: self._plain(each) for key, each in value.items()}
        try:
            return self._serializer.untag(within)
        except (TypeError, ValueError, AttributeError, KeyError):  # another client's, which looks like a tag
            return within
