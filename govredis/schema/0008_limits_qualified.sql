-- The functions of limits again, unchanged but for this: nothing in them depends on the caller's search_path. Every name
-- of ours is qualified, every other one is a built-in, and no temporary table stands in for one of either.

-- The decision of window.lua over sorted entries, before anything is recorded. width_bucket is a binary search.
CREATE OR REPLACE FUNCTION @schema@.govredis_limit_look(
    entries bigint[], now_us bigint, cost bigint, mode text, counts bigint[], windows bigint[],
    OUT admitted boolean, OUT deciding integer, OUT remaining bigint, OUT retry_after bigint, OUT reset_after bigint
) LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp AS $$
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

CREATE OR REPLACE FUNCTION @schema@.govredis_limit_admit(
    k text, cost bigint, mode text, counts bigint[], windows bigint[],
    OUT admitted boolean, OUT deciding integer, OUT remaining bigint, OUT retry_after bigint, OUT reset_after bigint,
    OUT entry bigint
) LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    held bigint[];
    widest bigint := (SELECT max(w) FROM unnest(windows) w);
    now_us bigint;
BEGIN
    SELECT w.entries INTO held FROM @schema@.govredis_limit_windows w WHERE w.key = k;
    now_us := (extract(epoch FROM clock_timestamp()) * 1000000)::bigint;  -- no entry seen is younger
    SELECT * INTO admitted, deciding, remaining, retry_after, reset_after
        FROM @schema@.govredis_limit_look(coalesce(held, '{}'), now_us, cost, mode, counts, windows);
    IF mode = 'peek' OR NOT admitted THEN
        RETURN;
    END IF;

    LOOP
        SELECT w.entries, greatest(w.longest, widest) INTO held, widest
            FROM @schema@.govredis_limit_windows w WHERE w.key = k FOR UPDATE;
        EXIT WHEN FOUND;
        widest := (SELECT max(w) FROM unnest(windows) w);
        INSERT INTO @schema@.govredis_limit_windows VALUES (k, '{}', widest, 9223372036854775807)
            ON CONFLICT DO NOTHING;
    END LOOP;

    now_us := (extract(epoch FROM clock_timestamp()) * 1000000)::bigint;
    SELECT * INTO admitted, deciding, remaining, retry_after, reset_after
        FROM @schema@.govredis_limit_look(held, now_us, cost, mode, counts, windows);
    IF NOT admitted THEN
        RETURN;
    END IF;

    IF held <> '{}' THEN
        held := held[width_bucket(now_us - widest, held) + 1 :];
    END IF;
    -- A clock that was set back must not unsort the log: the entry stands at the newest time known, which is stricter.
    entry := greatest(now_us, held[cardinality(held)]);
    held := held || array_fill(entry, ARRAY[cost::integer]);
    UPDATE @schema@.govredis_limit_windows w
        SET entries = held, longest = widest, expires = (now_us + widest) / 600000000 + 1
        WHERE w.key = k;
    reset_after := entry + windows[deciding] - now_us;

    -- The table cleans itself, a little at a time.
    IF random() < 0.01 THEN
        DELETE FROM @schema@.govredis_limit_windows w WHERE w.key IN (
            SELECT o.key FROM @schema@.govredis_limit_windows o
            WHERE o.expires < now_us / 600000000 LIMIT 100 FOR UPDATE SKIP LOCKED);
    END IF;
END $$;

-- Processes of an earlier version go on while this one is rolled out.
CREATE OR REPLACE FUNCTION @schema@.govredis_limit_decide(
    k text, cost bigint, mode text, counts bigint[], windows bigint[],
    OUT admitted boolean, OUT deciding integer, OUT remaining bigint, OUT retry_after bigint, OUT reset_after bigint
) LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp AS $$
    SELECT a.admitted, a.deciding, a.remaining, a.retry_after, a.reset_after
        FROM @schema@.govredis_limit_admit(k, cost, mode, counts, windows) a;
$$;

CREATE OR REPLACE FUNCTION @schema@.govredis_counter_width(window_us bigint) RETURNS bigint LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pg_temp AS $$
    SELECT (window_us + 59) / 60
$$;

-- The oldest bucket that counts.
CREATE OR REPLACE FUNCTION @schema@.govredis_counter_first(window_us bigint, now_us bigint) RETURNS bigint
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pg_temp AS $$
    SELECT (now_us - window_us + 1) / @schema@.govredis_counter_width(window_us)
$$;

-- The decision of counter_window.lua, before anything is counted. STABLE: all it reads is of one moment, which lies
-- before the one that it reads off the clock, so nothing that it sees is younger.
CREATE OR REPLACE FUNCTION @schema@.govredis_counter_look(
    k text, cost bigint, mode text, counts bigint[], windows bigint[], OUT admitted boolean, OUT deciding integer,
    OUT remaining bigint, OUT retry_after bigint, OUT reset_after bigint, OUT now_us bigint
) LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp AS $$
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
        width := @schema@.govredis_counter_width(windows[i]);
        taken := (SELECT coalesce(sum(c.used), 0) FROM @schema@.govredis_limit_counters c
            WHERE c.key = k AND c.window_us = windows[i]
            AND c.bucket >= @schema@.govredis_counter_first(windows[i], now_us));
        free := counts[i] - taken - cost;
        IF free < 0 AND mode <> 'record' THEN
            SELECT s.bucket INTO freed FROM (
                SELECT c.bucket, sum(c.used) OVER (ORDER BY c.bucket) AS sum FROM @schema@.govredis_limit_counters c
                WHERE c.key = k AND c.window_us = windows[i]
                AND c.bucket >= @schema@.govredis_counter_first(windows[i], now_us)) s
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
        SELECT greatest(0, (max(c.bucket) + 1) * @schema@.govredis_counter_width(windows[deciding]) - 1
            + windows[deciding] - now_us)
        FROM @schema@.govredis_limit_counters c WHERE c.key = k AND c.window_us = windows[deciding] AND c.used > 0), 0);
END $$;

-- Decide and count: one call, one statement. A denial takes no lock and writes nothing; an admission is decided anew
-- under the key's lock. `at`: when it was counted; NULL where it was not.
CREATE OR REPLACE FUNCTION @schema@.govredis_counter_admit(
    k text, cost bigint, mode text, counts bigint[], windows bigint[],
    OUT admitted boolean, OUT deciding integer, OUT remaining bigint, OUT retry_after bigint, OUT reset_after bigint,
    OUT at bigint
) LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    now_us bigint;
    w bigint;
    width bigint;
    newest bigint;
BEGIN
    SELECT * INTO admitted, deciding, remaining, retry_after, reset_after, now_us
        FROM @schema@.govredis_counter_look(k, cost, mode, counts, windows);
    IF mode = 'peek' OR NOT admitted THEN
        RETURN;
    END IF;

    PERFORM pg_advisory_xact_lock(hashtextextended(k, 7013));
    SELECT * INTO admitted, deciding, remaining, retry_after, reset_after, now_us
        FROM @schema@.govredis_counter_look(k, cost, mode, counts, windows);
    IF NOT admitted THEN
        RETURN;
    END IF;

    at := now_us;
    FOR w IN SELECT DISTINCT unnest(windows) LOOP
        width := @schema@.govredis_counter_width(w);
        DELETE FROM @schema@.govredis_limit_counters c
            WHERE c.key = k AND c.window_us = w AND c.bucket < @schema@.govredis_counter_first(w, now_us);
        -- After a clock was set back, in the newest bucket, which is stricter.
        SELECT greatest(now_us / width, max(c.bucket)) INTO newest
            FROM @schema@.govredis_limit_counters c WHERE c.key = k AND c.window_us = w;
        INSERT INTO @schema@.govredis_limit_counters AS c
            VALUES (k, w, newest, cost, ((newest + 1) * width + w) / 600000000 + 1)
            ON CONFLICT ON CONSTRAINT govredis_limit_counters_pkey
            DO UPDATE SET used = c.used + cost;
        IF w = windows[deciding] THEN
            reset_after := (newest + 1) * width - 1 + w - now_us;
        END IF;
    END LOOP;

    -- The table cleans itself, a little at a time.
    IF random() < 0.01 THEN
        DELETE FROM @schema@.govredis_limit_counters c WHERE (c.key, c.window_us, c.bucket) IN (
            SELECT o.key, o.window_us, o.bucket FROM @schema@.govredis_limit_counters o
            WHERE o.expires < now_us / 600000000 LIMIT 100 FOR UPDATE SKIP LOCKED);
    END IF;
END $$;

-- Give back what was counted at a time, where its buckets are still there and have as much.
CREATE OR REPLACE FUNCTION @schema@.govredis_counter_refund(k text, cost bigint, windows bigint[], at bigint)
RETURNS boolean LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM pg_advisory_xact_lock(hashtextextended(k, 7013));
    UPDATE @schema@.govredis_limit_counters c SET used = c.used - cost
        WHERE c.key = k AND c.window_us = ANY (windows) AND c.bucket = at / @schema@.govredis_counter_width(c.window_us)
        AND c.used >= cost;
    RETURN FOUND;
END $$;
