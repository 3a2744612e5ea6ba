"""Secrets: the passwords of one Config, and their removal from texts of servers.

A server, or a proxy before it, may say anything, our password included. It may be as sent, percent-encoded, with the
escapes of Python or JSON, or cut short: Redis cuts its echoes near 128 bytes. So texts of others pass through here
where they enter, in client/ and postgres/, and health reports once more before they are serialised.

A password may be a plain word. To hide it everywhere would garble every message, and give the password away. So a
password is hidden everywhere only if it is long: 12 characters, or 6 that are not all letters or all digits. It must
also be no part of texts printed on purpose: the scheme, host, port, user and database of a URL. Any other password is
hidden where it stands alone between quotes. In a URL or a libpq string `redact` hides every password, by its form.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import takewhile
from typing import Any
from urllib.parse import SplitResult, quote, quote_plus, unquote, unquote_plus, urlsplit

from ._dsn import hidden, is_pairs, is_secret, is_url, parameters
from ._redact import redact
from .config import Config
from .errors import printable

_HIDDEN = "***"
#: So much of the beginning of a longer password counts as the password.
_BEGINNING = 16
_PASSWORD_PARAMETER = re.compile(r"[?&][^=&]*pass[^=&]*=([^&#]*)", re.IGNORECASE)


class Secrets:
    """Knows the passwords of some URLs, and hides them.

    Args:
        urls: their passwords are secret, and the rest is printed on purpose; None for a URL that is not set.
        passwords: further secrets, from outside the URLs.
    """

    def __init__(self, urls: Iterable[str | None] = (), passwords: Iterable[str | None] = ()) -> None:
        found, shown = {password for password in passwords if password}, set()
        for url in urls:
            if url:
                found.update(_passwords(url))
                shown.update(_shown(url))
        strong = {p for p in found if _is_long_enough(p) and not any(p in text for text in shown)}
        forms = {form for password in strong for form in _forms(password)}
        #: The longest first, so that no rest is left of a form that contains another.
        self._anywhere = sorted(forms, key=len, reverse=True)
        beginnings = ((form[:_BEGINNING], form) for form in self._anywhere if len(form) > _BEGINNING)
        self._beginnings = [each for each in beginnings if not any(each[0] in text for text in shown)]
        weak = "|".join(re.escape(form) for password in found - strong for form in sorted(_forms(password)))
        self._quoted = re.compile(rf"""(['"`])(?:{weak})\1""") if weak else None

    @classmethod
    def of(cls, config: Config) -> Secrets:
        """The secrets of a Config, and of PGPASSWORD, which libpq reads."""
        of_libpq = os.environ.get("PGPASSWORD") if config.database_url is not None else None
        urls = config.redis_url, config.parking_url, config.database_url
        return cls(urls, (of_libpq, config.sentinel_password))

    def hide(self, text: str) -> str:
        """`text` with *** in place of each password."""
        for form in self._anywhere:
            text = text.replace(form, _HIDDEN)
        for beginning, form in self._beginnings:
            at = text.find(beginning)
            while at >= 0:
                same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(text[at:], form, strict=False)))
                text = text[:at] + _HIDDEN + text[at + same :]
                at = text.find(beginning, at)
        if self._quoted is not None:
            text = self._quoted.sub(rf"\1{_HIDDEN}\1", text)
        return redact(text)

    def text_of(self, error: BaseException, of: type[BaseException]) -> str:
        """The text of `error`, printable and without passwords; `error` and its causes say no more in tracebacks.

        Args:
            of: the driver's own exceptions: others in the chain are the caller's business.
        """
        for each in chain(error, of):
            each.args = tuple(printable(self.hide(arg), "\n") if isinstance(arg, str) else arg for arg in each.args)
        return str(error)

    def hide_in(self, value: Any) -> Any:
        """A JSON value whose texts are printable, with *** in place of each password."""
        if isinstance(value, str):
            return printable(self.hide(value))
        if isinstance(value, dict):
            return {name: self.hide_in(member) for name, member in value.items()}
        if isinstance(value, list | tuple):
            return [self.hide_in(member) for member in value]
        return value


def chain(error: BaseException, of: type[BaseException]) -> Iterator[BaseException]:
    """`error` and its causes, for as long as these are a driver's own."""
    found: BaseException | None = error
    while isinstance(found, of):
        yield found
        found = found.__cause__ or found.__context__


def passwords_in(options: Mapping[str, Any]) -> Iterator[str]:
    """The passwords of a driver's options, and of options in them: Celery's sentinel_kwargs, say."""
    for name, held in options.items():
        if isinstance(held, Mapping):
            yield from passwords_in(held)
        elif isinstance(held, str) and "pass" in name:
            yield held


def _split(url: str) -> SplitResult:
    try:
        return urlsplit(url)
    except ValueError:  # an application's own, which may be anything
        return urlsplit("")


def _passwords(url: str) -> set[str]:
    """The passwords of a URL, as they are written and as they are meant."""
    if is_url(url) or is_pairs(url):
        found = [(url[begin:end], value) for name, begin, end, value in parameters(url) if is_secret(name)]
        return {text for each in found for text in each if text}
    parts = _split(url)
    user, colon, password = parts.netloc.rpartition("@")[0].partition(":")
    written = {password, *_PASSWORD_PARAMETER.findall(url)}
    if not colon:
        written.add(user)  # the colon was forgotten
    return {text for each in written for text in (each, unquote(each), unquote_plus(each)) if text}


def _shown(url: str) -> set[str]:
    if is_url(url) or is_pairs(url):
        return {text for each in hidden(url).split("***") for text in (each, unquote(each))}
    parts = _split(url)
    userinfo, _, address = parts.netloc.rpartition("@")
    user, colon, _ = userinfo.partition(":")
    return {parts.scheme, address, parts.path, *((user, unquote(user)) if colon else ())}


def _is_long_enough(password: str) -> bool:
    return len(password) >= (12 if password.isalpha() or password.isdigit() else 6)


def _forms(password: str) -> set[str]:
    """The forms in which a text may have it. The text around it decides which quotes are escaped: both ways."""
    raw = password.encode(errors="surrogateescape")
    encoded = {quote(raw, safe=""), quote(raw), quote_plus(raw)}
    return {
        password,
        password.replace("\r", " ").replace("\n", " "),  # in the single line of Redis's errors
        password.replace("\\", "\\\\").replace("'", "\\'"),  # as libpq takes it
        password.replace("'", "''"),  # as SQL has it
        *encoded,
        *(re.sub("%[0-9A-F]{2}", lambda found: found[0].lower(), each) for each in encoded),
        repr(password)[1:-1],
        repr('"' + password)[2:-1],
        repr(raw)[2:-1],
        repr(b'"' + raw)[3:-1],
        json.dumps(password)[1:-1],
        json.dumps(password, ensure_ascii=False)[1:-1],
    }
