-- govredis_limit_decide, which says too where it recorded: `entry`, the time of its entries, so that they can be refunded.
-- NULL where it recorded nothing.

CREATE FUNCTION govredis_limit_admit(
    k text, cost bigint, mode text, counts bigint[], windows bigint[],
    OUT admitted boolean, OUT deciding integer, OUT remaining bigint, OUT retry_after bigint, OUT reset_after bigint,
    OUT entry bigint
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
    entry := greatest(now_us, held[cardinality(held)]);
    held := held || array_fill(entry, ARRAY[cost::integer]);
    UPDATE govredis_limit_windows w
        SET entries = held, longest = widest, expires = (now_us + widest) / 600000000 + 1
        WHERE w.key = k;
    reset_after := entry + windows[deciding] - now_us;

    -- The table cleans itself, a little at a time.
    IF random() < 0.01 THEN
        DELETE FROM govredis_limit_windows w WHERE w.key IN (
            SELECT o.key FROM govredis_limit_windows o
            WHERE o.expires < now_us / 600000000 LIMIT 100 FOR UPDATE SKIP LOCKED);
    END IF;
END $$;

-- Processes of an earlier version go on while this one is rolled out.
CREATE OR REPLACE FUNCTION govredis_limit_decide(
    k text, cost bigint, mode text, counts bigint[], windows bigint[],
    OUT admitted boolean, OUT deciding integer, OUT remaining bigint, OUT retry_after bigint, OUT reset_after bigint
) LANGUAGE sql VOLATILE AS $$
    SELECT a.admitted, a.deciding, a.remaining, a.retry_after, a.reset_after
        FROM govredis_limit_admit(k, cost, mode, counts, windows) a;
$$;
