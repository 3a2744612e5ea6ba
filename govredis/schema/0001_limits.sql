-- Sliding window logs for when Redis is away. UNLOGGED: a crash of PostgreSQL empties it, as a restart empties Redis.

CREATE UNLOGGED TABLE govredis_limit_windows (
    key text PRIMARY KEY,
    entries bigint[] NOT NULL,      -- microseconds since 1970, ascending
    longest bigint NOT NULL,        -- the longest window ever used on the key, in microseconds
    expires bigint NOT NULL         -- in units of ten minutes: an indexed column that hardly changes keeps updates HOT
) WITH (fillfactor = 50);

CREATE INDEX govredis_limit_windows_expires ON govredis_limit_windows (expires);

-- The decision of window.lua over sorted entries, before anything is recorded. width_bucket is a binary search.
CREATE FUNCTION govredis_limit_look(
    entries bigint[], now_us bigint, cost bigint, mode text, counts bigint[], windows bigint[],
    OUT admitted boolean, OUT deciding integer, OUT remaining bigint, OUT retry_after bigint, OUT reset_after bigint
) LANGUAGE plpgsql STABLE AS $$
DECLARE
    aged bigint;
    used bigint;
    free bigint;
    wait bigint;
BEGIN
    admitted := true;
    deciding := 1;
    retry_after := 0;
    FOR i IN 1 .. cardinality(windows) LOOP
        aged := CASE WHEN entries = '{}' THEN 0 ELSE width_bucket(now_us - windows[i], entries) END;
        used := cardinality(entries) - aged;
        free := counts[i] - used - cost;
        IF free < 0 AND mode <> 'record' THEN
            wait := entries[aged - free] + windows[i] - now_us;
            IF admitted OR wait > retry_after THEN
                admitted := false;
                deciding := i;
                remaining := counts[i] - used;
                retry_after := wait;
            END IF;
        ELSIF admitted AND (remaining IS NULL OR free < remaining) THEN
            deciding := i;
            remaining := free;
        END IF;
    END LOOP;
    remaining := greatest(0, remaining);
    reset_after := greatest(0, coalesce(entries[cardinality(entries)], 0) + windows[deciding] - now_us);
END $$;

-- Decide and record: one call, one statement. A denial takes no lock and writes nothing; an admission is decided anew
-- under the row's lock, at a time read after the lock was had.
CREATE FUNCTION govredis_limit_decide(
    k text, cost bigint, mode text, counts bigint[], windows bigint[],
    OUT admitted boolean, OUT deciding integer, OUT remaining bigint, OUT retry_after bigint, OUT reset_after bigint
) LANGUAGE plpgsql VOLATILE AS $$
DECLARE
    held bigint[];
    widest bigint := (SELECT max(w) FROM unnest(windows) w);
    now_us bigint;
BEGIN
    SELECT w.entries INTO held FROM govredis_limit_windows w WHERE w.key = k;
    now_us := (extract(epoch FROM clock_timestamp()) * 1000000)::bigint;  -- no entry seen is younger
    SELECT * INTO admitted, deciding, remaining, retry_after, reset_after
        FROM govredis_limit_look(coalesce(held, '{}'), now_us, cost, mode, counts, windows);
    IF mode = 'peek' OR NOT admitted THEN
        RETURN;
    END IF;

    LOOP
        SELECT w.entries, greatest(w.longest, widest) INTO held, widest
            FROM govredis_limit_windows w WHERE w.key = k FOR UPDATE;
        EXIT WHEN FOUND;
        widest := (SELECT max(w) FROM unnest(windows) w);
        INSERT INTO govredis_limit_windows VALUES (k, '{}', widest, 9223372036854775807) ON CONFLICT DO NOTHING;
    END LOOP;

    now_us := (extract(epoch FROM clock_timestamp()) * 1000000)::bigint;
    SELECT * INTO admitted, deciding, remaining, retry_after, reset_after
        FROM govredis_limit_look(held, now_us, cost, mode, counts, windows);
    IF NOT admitted THEN
        RETURN;
    END IF;

    IF held <> '{}' THEN
        held := held[width_bucket(now_us - widest, held) + 1 :];
    END IF;
    -- A clock that was set back must not unsort the log: the entry stands at the newest time known, which is stricter.
    held := held || array_fill(greatest(now_us, held[cardinality(held)]), ARRAY[cost::integer]);
    UPDATE govredis_limit_windows w
        SET entries = held, longest = widest, expires = (now_us + widest) / 600000000 + 1
        WHERE w.key = k;
    reset_after := held[cardinality(held)] + windows[deciding] - now_us;

    -- The table cleans itself, a little at a time.
    IF random() < 0.01 THEN
        DELETE FROM govredis_limit_windows w WHERE w.key IN (
            SELECT o.key FROM govredis_limit_windows o
            WHERE o.expires < now_us / 600000000 LIMIT 100 FOR UPDATE SKIP LOCKED);
    END IF;
END $$;
