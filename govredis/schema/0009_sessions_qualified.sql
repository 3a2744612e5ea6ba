-- The functions of sessions again, unchanged but for their search_path: see 0008_limits_qualified.sql.

-- A bind holds its agent's lock shared, unbind_agent alone: either it sees the bind's row, or the bind its generation.
CREATE OR REPLACE FUNCTION @schema@.govredis_session_agent_lock(a text) RETURNS bigint LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pg_temp AS $$ SELECT hashtextextended('govredis_session_agents ' || a, 0) $$;

-- Bind, unless revoked since it began: `started` is a version taken then; NULL for a bind made without us, which is
-- older than a revocation made after `bound`, and gives way to whoever else has the session.
-- `counted`: how often somebody without a row has bound it. Returns the row as it now is; `outcome` is 'bound', 'held'
-- (somebody has it, or it arrived twice: the row says who) or 'overtaken' (revoked since).
CREATE OR REPLACE FUNCTION @schema@.govredis_session_bind(
    s text, a text, bound timestamptz, ttl interval, d text, if_absent boolean, started bigint, counted integer,
    OUT outcome text, OUT held @schema@.govredis_sessions
) LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    at timestamptz;
    alive boolean;
    cached boolean;
BEGIN
    PERFORM pg_advisory_xact_lock_shared(@schema@.govredis_session_agent_lock(a));
    LOOP
        SELECT * INTO held FROM @schema@.govredis_sessions WHERE session = s FOR UPDATE;
        EXIT WHEN FOUND;
        INSERT INTO @schema@.govredis_sessions VALUES (s, a, bound, 'epoch', 'epoch', 0, NULL, false, 0)
            ON CONFLICT DO NOTHING;
    END LOOP;
    at := clock_timestamp();
    alive := NOT held.revoked AND held.expires_at > at;
    IF alive AND held.agent = a AND held.bound_at = bound OR alive AND if_absent THEN
        outcome := 'held';
        RETURN;
    END IF;
    IF held.revoked AND (CASE WHEN started IS NULL THEN held.changed_at >= bound ELSE held.version > started END)
        OR EXISTS (SELECT FROM @schema@.govredis_session_agents g WHERE g.agent = a
            AND (CASE WHEN started IS NULL THEN g.revoked_at >= bound ELSE g.version > started END))
    THEN
        outcome := 'overtaken';
        IF held.version = 0 THEN
            DELETE FROM @schema@.govredis_sessions WHERE session = s;
        END IF;
        RETURN;
    END IF;
    outcome := 'bound';
    cached := held.version > 0 AND NOT held.revoked;  -- perhaps, also where it has ended here: see SessionRows.touch
    UPDATE @schema@.govredis_sessions SET agent = a, bound_at = bound, changed_at = at, expires_at = at + ttl,
        bind_count = greatest(CASE WHEN alive THEN bind_count ELSE 0 END, counted) + 1,
        data = d, revoked = false, version = nextval('@schema@.govredis_versions')
        WHERE session = s RETURNING * INTO held;
    IF cached THEN
        PERFORM @schema@.govredis_outbox_add('session'::text, s, held.version);
    END IF;
END $$;

-- Revoke a session, known or not. `at`: when it was revoked without us. Returns whether it was alive, and the version.
CREATE OR REPLACE FUNCTION @schema@.govredis_session_unbind(
    s text, ttl interval, at timestamptz, OUT alive boolean, OUT revoked_version bigint
) LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    held @schema@.govredis_sessions;
    now_at timestamptz;
BEGIN
    LOOP
        SELECT * INTO held FROM @schema@.govredis_sessions WHERE session = s FOR UPDATE;
        EXIT WHEN FOUND;
        INSERT INTO @schema@.govredis_sessions VALUES (s, '', 'epoch', 'epoch', 'epoch', 0, NULL, true, 0)
            ON CONFLICT DO NOTHING;
    END LOOP;
    now_at := clock_timestamp();
    alive := NOT held.revoked AND held.expires_at > now_at;
    UPDATE @schema@.govredis_sessions SET revoked = true, data = NULL,
        changed_at = greatest(changed_at, coalesce(at, now_at)), expires_at = greatest(expires_at, now_at + ttl), version = nextval('@schema@.govredis_versions')
        WHERE session = s RETURNING version INTO revoked_version;
    PERFORM @schema@.govredis_outbox_add('session'::text, s, revoked_version);
END $$;

-- Revoke sessions of an agent, as many as given at most, and raise its generation. Returns which, and were they alive.
CREATE OR REPLACE FUNCTION @schema@.govredis_session_unbind_agent(a text, at timestamptz, at_most integer)
    RETURNS TABLE (ended text, revoked_version bigint, alive boolean) LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM pg_advisory_xact_lock(@schema@.govredis_session_agent_lock(a));
    at := coalesce(at, clock_timestamp());
    INSERT INTO @schema@.govredis_session_agents AS g VALUES (a, nextval('@schema@.govredis_versions'), at)
        ON CONFLICT (agent) DO UPDATE
        SET version = excluded.version, revoked_at = greatest(g.revoked_at, excluded.revoked_at);
    FOR ended, revoked_version, alive IN
        UPDATE @schema@.govredis_sessions SET revoked = true, data = NULL, changed_at = greatest(changed_at, at),
            version = nextval('@schema@.govredis_versions')
            WHERE session IN (
                SELECT s.session FROM @schema@.govredis_sessions s
                WHERE s.agent = a AND NOT s.revoked LIMIT at_most FOR UPDATE)
            RETURNING session, version, expires_at > clock_timestamp()
    LOOP
        PERFORM @schema@.govredis_outbox_add('session'::text, ended, revoked_version);
        RETURN NEXT;
    END LOOP;
END $$;
