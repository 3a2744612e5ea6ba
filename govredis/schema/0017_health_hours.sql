-- Health by the hour: each snapshot is added to its hour's row, also while Redis keeps the snapshots. So a Redis that
-- loses its data takes no more than the details with it.
CREATE TABLE @schema@.govredis_health_hours (
    key text NOT NULL,              -- that of the history in Redis
    hour timestamptz NOT NULL,      -- its beginning
    last timestamptz NOT NULL,      -- the time of its last snapshot
    worst integer NOT NULL,         -- the worst status: 0 is pass, 1 is warn, 2 is fail
    sums jsonb NOT NULL,            -- by the name of a value: in how many snapshots it was, and the sum
    PRIMARY KEY (key, hour)
);
