-- Health snapshots taken while Redis was away.
CREATE TABLE govredis_health_snapshots (
    at timestamptz PRIMARY KEY,
    report jsonb NOT NULL
);
