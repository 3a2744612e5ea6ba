"""Flask: a GovRedis for each app, limited views, logins, health endpoints and commands."""

from ._extension import FlaskGovRedis

__all__ = ["FlaskGovRedis"]
