-- The account of all processes while Redis is away: what each process has counted, by minutes, for Redis's return. A row has
-- for each name its count that Redis had been told, and its count at the end of the minute, since the process began. The row
-- of process '' has the totals that any process read in Redis last, and the time since when these are counted.
-- A row of minute -1 has counts of a process that others have told Redis: it may not know, and write them again.
CREATE TABLE @schema@.govredis_account (
    key text NOT NULL,
    process text NOT NULL,
    minute bigint NOT NULL,
    counts jsonb NOT NULL,
    changed_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (key, process, minute)
);

-- Outages, as each process saw them. One that did not end, and was not changed for a while, ended when it was changed last.
CREATE TABLE @schema@.govredis_outages (
    key text NOT NULL,
    process text NOT NULL,
    server text NOT NULL,
    began timestamptz NOT NULL,
    ended timestamptz,
    kind text NOT NULL,
    noticed_by text NOT NULL,
    served bigint NOT NULL,
    slowest double precision NOT NULL,
    changed_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (key, process, server, began)
);
CREATE INDEX govredis_outages_began ON @schema@.govredis_outages (key, began);
