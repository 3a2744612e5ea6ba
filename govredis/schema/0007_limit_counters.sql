-- Sliding window counters for when Redis is away; see limits/counter.lua. UNLOGGED, as the logs are.

CREATE UNLOGGED TABLE govredis_limit_counters (
    key text NOT NULL,
    window_us bigint NOT NULL,
    bucket bigint NOT NULL,         -- its number since 1970: microseconds, divided by its width
    used bigint NOT NULL,
    expires bigint NOT NULL,        -- in units of ten minutes
    PRIMARY KEY (key, window_us, bucket)
) WITH (fillfactor = 50);

CREATE INDEX govredis_limit_counters_expires ON govredis_limit_counters (expires);

CREATE FUNCTION govredis_counter_width(window_us bigint) RETURNS bigint LANGUAGE sql IMMUTABLE AS $$
    SELECT (window_us + 59) / 60
$$;

-- The oldest bucket that counts.
CREATE FUNCTION govredis_counter_first(window_us bigint, now_us bigint) RETURNS bigint LANGUAGE sql IMMUTABLE AS $$
    SELECT (now_us - window_us + 1) / govredis_counter_width(window_us)
$$;

-- The decision of counter_window.lua, before anything is counted. STABLE: all it reads is of one moment, which lies before
-- the one that it reads off the clock, so nothing that it sees is younger.
CREATE FUNCTION govredis_counter_look(
    k text, cost bigint, mode text, counts bigint[], windows bigint[], OUT admitted boolean, OUT deciding integer,
    OUT remaining bigint, OUT retry_after bigint, OUT reset_after bigint, OUT now_us bigint
) LANGUAGE plpgsql STABLE AS $$
DECLARE
    width bigint;
    taken bigint;
    free bigint;
    freed bigint;
BEGIN
    now_us := (extract(epoch FROM clock_timestamp()) * 1000000)::bigint;
    admitted := true;
    deciding := 1;
    retry_after := 0;
    FOR i IN 1 .. cardinality(windows) LOOP
        width := govredis_counter_width(windows[i]);
        taken := (SELECT coalesce(sum(c.used), 0) FROM govredis_limit_counters c
            WHERE c.key = k AND c.window_us = windows[i]
            AND c.bucket >= govredis_counter_first(windows[i], now_us));
        free := counts[i] - taken - cost;
        IF free < 0 AND mode <> 'record' THEN
            SELECT s.bucket INTO freed FROM (
                SELECT c.bucket, sum(c.used) OVER (ORDER BY c.bucket) AS sum FROM govredis_limit_counters c
                WHERE c.key = k AND c.window_us = windows[i]
                AND c.bucket >= govredis_counter_first(windows[i], now_us)) s
                WHERE s.sum >= -free ORDER BY s.bucket LIMIT 1;
            freed := (freed + 1) * width - 1 + windows[i] - now_us;
            IF admitted OR freed > retry_after THEN
                admitted := false;
                deciding := i;
                remaining := counts[i] - taken;
                retry_after := freed;
            END IF;
        ELSIF admitted AND (remaining IS NULL OR free < remaining) THEN
            deciding := i;
            remaining := free;
        END IF;
    END LOOP;
    remaining := greatest(0, remaining);
    reset_after := coalesce((
        SELECT greatest(0, (max(c.bucket) + 1) * govredis_counter_width(windows[deciding]) - 1 + windows[deciding] - now_us)
        FROM govredis_limit_counters c WHERE c.key = k AND c.window_us = windows[deciding] AND c.used > 0), 0);
END $$;

-- Decide and count: one call, one statement. A denial takes no lock and writes nothing; an admission is decided anew
-- under the key's lock. `at`: when it was counted; NULL where it was not.
CREATE FUNCTION govredis_counter_admit(
    k text, cost bigint, mode text, counts bigint[], windows bigint[],
    OUT admitted boolean, OUT deciding integer, OUT remaining bigint, OUT retry_after bigint, OUT reset_after bigint,
    OUT at bigint
) LANGUAGE plpgsql VOLATILE AS $$
DECLARE
    now_us bigint;
    w bigint;
    width bigint;
    newest bigint;
BEGIN
    SELECT * INTO admitted, deciding, remaining, retry_after, reset_after, now_us
        FROM govredis_counter_look(k, cost, mode, counts, windows);
    IF mode = 'peek' OR NOT admitted THEN
        RETURN;
    END IF;

    PERFORM pg_advisory_xact_lock(hashtextextended(k, 7013));
    SELECT * INTO admitted, deciding, remaining, retry_after, reset_after, now_us
        FROM govredis_counter_look(k, cost, mode, counts, windows);
    IF NOT admitted THEN
        RETURN;
    END IF;

    at := now_us;
    FOR w IN SELECT DISTINCT unnest(windows) LOOP
        width := govredis_counter_width(w);
        DELETE FROM govredis_limit_counters c
            WHERE c.key = k AND c.window_us = w AND c.bucket < govredis_counter_first(w, now_us);
        -- After a clock was set back, in the newest bucket, which is stricter.
        SELECT greatest(now_us / width, max(c.bucket)) INTO newest
            FROM govredis_limit_counters c WHERE c.key = k AND c.window_us = w;
        INSERT INTO govredis_limit_counters VALUES (k, w, newest, cost, ((newest + 1) * width + w) / 600000000 + 1)
            ON CONFLICT ON CONSTRAINT govredis_limit_counters_pkey
            DO UPDATE SET used = govredis_limit_counters.used + cost;
        IF w = windows[deciding] THEN
            reset_after := (newest + 1) * width - 1 + w - now_us;
        END IF;
    END LOOP;

    -- The table cleans itself, a little at a time.
    IF random() < 0.01 THEN
        DELETE FROM govredis_limit_counters c WHERE (c.key, c.window_us, c.bucket) IN (
            SELECT o.key, o.window_us, o.bucket FROM govredis_limit_counters o
            WHERE o.expires < now_us / 600000000 LIMIT 100 FOR UPDATE SKIP LOCKED);
    END IF;
END $$;

-- Give back what was counted at a time, where its buckets are still there and have as much.
CREATE FUNCTION govredis_counter_refund(k text, cost bigint, windows bigint[], at bigint) RETURNS boolean
LANGUAGE plpgsql VOLATILE AS $$
BEGIN
    PERFORM pg_advisory_xact_lock(hashtextextended(k, 7013));
    UPDATE govredis_limit_counters c SET used = c.used - cost
        WHERE c.key = k AND c.window_us = ANY (windows) AND c.bucket = at / govredis_counter_width(c.window_us)
        AND c.used >= cost;
    RETURN FOUND;
END $$;
