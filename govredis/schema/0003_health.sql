-- Health snapshots taken while Redis was away.
CREATE TABLE govredis_health_snapshots (
    key text NOT NULL,              -- that of the history in Redis
    at timestamptz NOT NULL,
    report jsonb NOT NULL,
    PRIMARY KEY (key, at)
);
