"""Passwords are taken out of a text by their form. (`_secrets.py` does it by value.)"""

from __future__ import annotations

import re

from . import _dsn

# user:PASSWORD@host; PASSWORD@host, where the colon was forgotten; user:PASSWORD, where the host was.
_PASSWORD_IN_URL = re.compile(
    r"(//[^:@]*:).*(@)|(//)[^:@/?#]*(@)|(//[^:@/?#\[]*:)(?!\d*(?:,[^,:/?#]*:?\d*)*(?:[/?#]|$)).*$", re.DOTALL
)
# The same in a text that is no URL, for want of its //. Redis ends the errors of scripts with " @user_script:67".
_PASSWORD_WITHOUT_SCHEME = re.compile(r"(?:\A|(?<=\s))([^\s:/@]+:)(?!//|\s).*((?<!\s)@|@(?!user_script:\d))", re.DOTALL)
_PASSWORD_BY_NAME = re.compile(r"""(pass\w*['"]?\s*[=:]\s*)('(?:[^'\\]|\\.)*'|[^&\s'"]*)""", re.IGNORECASE | re.DOTALL)


def redact(text: str) -> str:
    """`text` with every password of a URL or of a libpq string replaced by ***."""
    shown = _PASSWORD_IN_URL.sub(lambda m: f"{m[1] or m[3] or m[5]}***{m[2] or m[4] or ''}", text)
    shown = _PASSWORD_WITHOUT_SCHEME.sub(r"\1***\2", shown)
    return _PASSWORD_BY_NAME.sub(r"\1***", shown)


def shown_dsn(held: str) -> str:
    """The value of a setting that may be a DSN, without its passwords."""
    return redact(_dsn.hidden(held) if _dsn.is_url(held) or _dsn.is_pairs(held) else held)
