"""PostgreSQL: statements and transactions with real deadlines. No other room imports psycopg2.

`postgres.py` has the statements, `connecting.py` the connections, `mapping.py` psycopg2's errors in our words.
"""

from ..errors import ConfigurationError

try:
    from psycopg2.extras import Json
except ImportError as _missing:
    raise ConfigurationError("GOVREDIS_DATABASE_URL needs psycopg2: pip install 'govredis[postgres]'") from _missing

from .postgres import Postgres, Row, Transaction

__all__ = ["Json", "Postgres", "Row", "Transaction"]
