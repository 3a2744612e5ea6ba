-- `unbind_agent` by a process that could not reach Redis: it ends the agent's rows, and misses a session that Redis alone
-- has, whose bind PostgreSQL was never told of. So the row that would adopt that session says that it is over.

-- When Redis was last not told of the end of the agent's sessions; null: it was told each time.
ALTER TABLE @schema@.govredis_session_agents ADD COLUMN untold timestamptz;

-- Take what the async service has bound for the row, if the row is still of version `was`; NULL: if there is none.
-- left_ms: -1 for no end. `held` is the row then; NULL if it is another by now, or if the session is over: where there
-- was no row, and Redis was not told that the agent's sessions were ended, the clocks say whether that was later.
CREATE OR REPLACE FUNCTION @schema@.govredis_session_adopt(
    s text, a text, bound timestamptz, left_ms bigint, d text, others text, counted integer, was bigint,
    OUT held @schema@.govredis_sessions
) LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    at timestamptz;
    ended_at timestamptz;
    cached boolean;
    new_version bigint;
BEGIN
    -- Either `unbind_agent` sees the row, or this sees `untold`.
    PERFORM pg_advisory_xact_lock_shared(@schema@.govredis_session_agent_lock(a));
    IF was IS NULL THEN
        INSERT INTO @schema@.govredis_sessions VALUES (s, a, bound, 'epoch', 'epoch', 0, NULL, false, 0)
            ON CONFLICT DO NOTHING;
    END IF;
    SELECT * INTO held FROM @schema@.govredis_sessions WHERE session = s AND version = coalesce(was, 0) FOR UPDATE;
    IF NOT FOUND THEN
        RETURN;
    END IF;
    at := clock_timestamp();
    cached := held.version > 0 AND NOT held.revoked;
    new_version := nextval('@schema@.govredis_versions');
    -- A record that says no time of its own is of 1970 here.
    IF was IS NULL THEN
        SELECT untold INTO ended_at FROM @schema@.govredis_session_agents WHERE agent = a AND untold >= bound AND bound > 'epoch';
    END IF;
    IF ended_at IS NOT NULL THEN
        UPDATE @schema@.govredis_sessions SET changed_at = ended_at, revoked = true, ended = 'agent',
            expires_at = at + CASE left_ms WHEN -1 THEN interval '30 days' ELSE left_ms * interval '1 millisecond' END,
            version = new_version, since_version = new_version
            WHERE session = s;
        held := NULL;
        RETURN;
    END IF;
    UPDATE @schema@.govredis_sessions SET agent = a, bound_at = bound, changed_at = at,
        expires_at = CASE left_ms WHEN -1 THEN 'infinity' ELSE at + left_ms * interval '1 millisecond' END,
        bind_count = counted, data = d, members = others, revoked = false, ended = NULL, untold_in = NULL,
        version = new_version, since_version = new_version
        WHERE session = s RETURNING * INTO held;
    IF cached THEN
        PERFORM @schema@.govredis_outbox_add('session'::text, s, held.version);
    END IF;
END $$;
