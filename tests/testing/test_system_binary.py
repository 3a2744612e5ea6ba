"""A server that only the system's packages have: `make test` does without it, .ci/run does not."""

from __future__ import annotations

import pytest
from system_binaries import find_system_binary


def test_it_is_found() -> None:
    assert find_system_binary("sh", required=False).endswith("/sh")


def test_without_it_a_test_is_skipped_with_the_packages_name() -> None:
    with pytest.raises(pytest.skip.Exception, match="install Debian's package no-such-server"):
        find_system_binary("no-such-server", required=False)


def test_with_the_option_it_fails() -> None:
    with pytest.raises(pytest.fail.Exception, match="install Debian's package no-such-server"):
        find_system_binary("no-such-server", required=True)
