"""Fixtures of the examples' tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import pytest
from checkout import Checkout


@pytest.fixture(scope="module")
def check_out(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Mapping[str, str]], Checkout]]:
    """Makes a checkout, with settings for the environment of its terminals."""
    made: list[Checkout] = []

    def make(settings: Mapping[str, str]) -> Checkout:
        made.append(Checkout(tmp_path_factory.mktemp("examples"), settings))
        return made[-1]

    yield make
    for each in made:
        each.close()
