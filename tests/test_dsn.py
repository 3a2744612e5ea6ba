"""The parts of a DSN are the same for govredis as for libpq; and nothing of a secret in a DSN is left."""

from __future__ import annotations

import psycopg2
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from psycopg2.extensions import make_dsn, parse_dsn

from govredis._dsn import hidden, is_secret, is_url, parameters, seems_mangled
from govredis._secrets import Secrets

TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8)
#: Pieces that a DSN is made of, and others that may be mistaken for them.
PIECES = [
    "password",
    "user",
    "host",
    "=",
    " = ",
    "'",
    "\\",
    " ",
    "\n",
    "&",
    "?",
    "@",
    ":",
    "/",
    "//",
    "%41",
    "%",
    "a",
    "é",
]
MESS = st.lists(st.sampled_from(PIECES), max_size=12).map("".join)


def by_libpq(dsn: str) -> dict[str, str] | None:
    try:
        return dict(parse_dsn(dsn))
    except psycopg2.Error:
        return None


def secrets_of(dsn: str) -> set[str]:
    return {value for name, _, _, value in parameters(dsn) if is_secret(name) and value}


@given(MESS)
@example("password='a\\' b' host=h")
@example("host=h password = a\\ b")
@example("password=\\")
def test_pairs_are_libpqs(text: str) -> None:
    taken = by_libpq(text)
    if taken is not None and "=" in text and not is_url(text):
        assert {name: value for name, _, _, value in parameters(text)} == taken


@given(MESS.map("postgresql://".__add__))
@example("postgresql://u:a?b#c@h/d?x=1")
@example("postgresql://h/d?p%61ssword=a%26b")
def test_secrets_of_urls_are_libpqs(url: str) -> None:
    taken = by_libpq(url)
    if taken is not None and not seems_mangled(url):
        theirs = {value for name, value in taken.items() if is_secret(name)}
        assert theirs - {""} <= secrets_of(url)


@given(TEXTS)
def test_a_password_by_keyword(password: str) -> None:
    dsn = make_dsn(host="h", password=f"{password}hunter2", user="u")
    assert secrets_of(dsn) == {f"{password}hunter2"}
    assert hidden(dsn) == make_dsn(host="h", password="***", user="u")
    assert "hunter2" not in Secrets([dsn]).hide(f"it says {password}hunter2")


@pytest.mark.parametrize("dsn", ["postgresql://u:a@h1:1,h2:2/d", "host=a@b port=1,2", "postgresql://h/d?user=a@b"])
def test_a_sound_dsn_does_not_seem_mangled(dsn: str) -> None:
    assert not seems_mangled(dsn)
