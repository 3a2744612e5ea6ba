"""Sentinel and Cluster with TLS, and the user of govredis on them: it has no rights but those that it needs."""

from __future__ import annotations

from pathlib import Path

import trustme

from govredis import Config
from govredis._acl import rights
from govredis.testing.servers import RedisCluster, RedisSentinel

PASSWORD = "s/ecret"


def certificate(folder: Path) -> Path:
    """A server's private key and certificate, and its authority's, in one file."""
    authority, file = trustme.CA(), folder / "certificate.pem"
    of_server = authority.issue_cert("127.0.0.1")
    for blob in (of_server.private_key_and_cert_chain_pem, authority.cert_pem):
        blob.write_to_path(str(file), append=True)
    return file


def url_of_user(group: RedisCluster | RedisSentinel) -> str:
    """The URL by which a user `app` uses the group: it may send the commands of `govredis doctor --acl`, on any key."""
    everything = Config(
        redis_url=group.url, database_url="postgresql://nobody.invalid/x", local_cache=True, confirm=True
    )
    commands = [f"+{command}" for command in sorted(rights(everything).commands)]
    for node in group.nodes:
        node.command("ACL", "SETUSER", "app", "reset", "on", f">{PASSWORD}", "~*", *commands)
    return group.url.replace("://:", "://app:")
