-- The newest binding of a session wins, whoever made it: what the async service writes to Redis, which knows of no rows,
-- is adopted into the row.

ALTER TABLE @schema@.govredis_sessions
    -- JSON: what a record of the async service has besides what we know.
    ADD COLUMN members text,
    -- The version with which it was bound, or first revoked; null: `version`.
    ADD COLUMN since_version bigint,
    -- How it was revoked: 'session' (`unbind`), 'agent' (`unbind_agent`), or 'late', by a process that had been cut off,
    -- by whose clock changed_at is then; null: not at all, or before there was this column.
    ADD COLUMN ended text,
    -- It was revoked while Redis was away, in that epoch; null: Redis was told at once.
    ADD COLUMN untold_in bigint;

-- The version that told of the newest revocation of the agent's sessions by a process that had been cut off.
ALTER TABLE @schema@.govredis_session_agents ADD COLUMN late bigint NOT NULL DEFAULT 0;

-- Bind, unless revoked since it began: `started` is a version taken then; NULL for a bind made without us, which is
-- older than a revocation made after `bound`, and gives way to whoever else has the session.
-- ttl: NULL for no end. `keeps_ttl`: it ends no sooner than what there is.
-- Of the record in Redis: `counted`, how often somebody without a row has bound it, 0 for a copy of a row; `copied`, of
-- which version it is a copy, or NULL; `left_ms`, what it has left, -1 for no end, or NULL; `others`, its other members.
-- `origin`: the session whose other members the new one gets; NULL: its own, if they are the same agent's.
-- Returns the row as it now is; `outcome` is 'bound', 'held' (somebody has it, or it arrived twice: the row says who) or
-- 'overtaken' (revoked since).
CREATE FUNCTION @schema@.govredis_session_bind(
    s text, a text, bound timestamptz, ttl interval, d text, if_absent boolean, started bigint, keeps_ttl boolean,
    counted integer, copied bigint, left_ms bigint, others text, origin text,
    OUT outcome text, OUT held @schema@.govredis_sessions
) LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    at timestamptz;
    alive boolean;
    goes_on boolean;
    cached boolean;
    new_version bigint;
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
    IF held.revoked AND (CASE
            WHEN held.ended = 'agent' AND held.agent <> a THEN false
            WHEN started IS NULL THEN held.changed_at >= bound
            WHEN held.ended = 'agent' THEN false  -- the agent's own entry says it
            WHEN held.ended = 'late' THEN held.version > started AND held.changed_at >= bound
            ELSE held.version > started END)
        OR EXISTS (SELECT FROM @schema@.govredis_session_agents g WHERE g.agent = a AND (CASE
            WHEN started IS NULL THEN g.revoked_at >= bound
            ELSE g.version > started OR g.late > started AND g.revoked_at >= bound END))
    THEN
        outcome := 'overtaken';
        IF held.version = 0 THEN
            DELETE FROM @schema@.govredis_sessions WHERE session = s;
        END IF;
        RETURN;
    END IF;
    outcome := 'bound';
    cached := held.version > 0 AND NOT held.revoked;  -- perhaps, also where it has ended here: see SessionRows.touch
    -- Its copy may live longer: the async service extends that alone.
    goes_on := alive OR NOT held.revoked AND held.version = copied;
    new_version := nextval('@schema@.govredis_versions');
    UPDATE @schema@.govredis_sessions SET agent = a, bound_at = bound, changed_at = at,
        expires_at = greatest(
            CASE WHEN ttl IS NULL THEN 'infinity' ELSE at + ttl END,
            CASE WHEN keeps_ttl AND goes_on THEN expires_at END,
            CASE WHEN keeps_ttl AND (NOT held.revoked AND held.version = copied OR counted > 0) THEN
                CASE left_ms WHEN -1 THEN 'infinity' ELSE at + left_ms * interval '1 millisecond' END END),
        bind_count = CASE WHEN counted > 0 THEN counted WHEN goes_on THEN bind_count ELSE 0 END + 1,
        data = d, revoked = false, version = new_version, since_version = new_version, ended = NULL, untold_in = NULL,
        members = CASE
            WHEN origin IS NOT NULL THEN (SELECT o.members FROM @schema@.govredis_sessions o WHERE o.session = origin)
            WHEN counted > 0 THEN others
            WHEN goes_on AND held.agent = a THEN members END
        WHERE session = s RETURNING * INTO held;
    IF cached THEN
        PERFORM @schema@.govredis_outbox_add('session'::text, s, held.version);
    END IF;
END $$;

-- Take what the async service has bound for the row, if the row is still of version `was`; NULL: if there is none.
-- left_ms: -1 for no end. `held` is the row then; NULL if it is another by now.
CREATE FUNCTION @schema@.govredis_session_adopt(
    s text, a text, bound timestamptz, left_ms bigint, d text, others text, counted integer, was bigint,
    OUT held @schema@.govredis_sessions
) LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    at timestamptz;
    cached boolean;
    new_version bigint;
BEGIN
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
    UPDATE @schema@.govredis_sessions SET agent = a, bound_at = bound, changed_at = at,
        expires_at = CASE left_ms WHEN -1 THEN 'infinity' ELSE at + left_ms * interval '1 millisecond' END,
        bind_count = counted, data = d, members = others, revoked = false, ended = NULL, untold_in = NULL,
        version = new_version, since_version = new_version
        WHERE session = s RETURNING * INTO held;
    IF cached THEN
        PERFORM @schema@.govredis_outbox_add('session'::text, s, held.version);
    END IF;
END $$;

-- Revoke a session, known or not. Returns whether it was alive, and the version; NULL for the latter if it was bound
-- after that. A session without end is remembered for 30 days.
-- `at`: when it was revoked by a process that had been cut off from us, by its clock; else NULL. Then it knew that
-- agents[n] had it since bounds[n]. `seen`: one of these bindings was here then, so any other is newer; else the clocks
-- say whether it is.
CREATE FUNCTION @schema@.govredis_session_unbind(
    s text, ttl interval, at timestamptz, agents text[], bounds timestamptz[], seen boolean,
    OUT alive boolean, OUT revoked_version bigint
) LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    held @schema@.govredis_sessions;
    now_at timestamptz;
    is_known boolean;
BEGIN
    LOOP
        SELECT * INTO held FROM @schema@.govredis_sessions WHERE session = s FOR UPDATE;
        EXIT WHEN FOUND;
        INSERT INTO @schema@.govredis_sessions VALUES (s, '', 'epoch', 'epoch', 'epoch', 0, NULL, true, 0)
            ON CONFLICT DO NOTHING;
    END LOOP;
    now_at := clock_timestamp();
    alive := NOT held.revoked AND held.expires_at > now_at;
    is_known := EXISTS (SELECT FROM unnest(agents, bounds) k (agent, bound)
                        WHERE k.agent = held.agent AND k.bound = held.bound_at);
    IF at IS NOT NULL AND NOT held.revoked AND NOT is_known AND (seen OR held.changed_at > at) THEN
        alive := false;
        RETURN;
    END IF;
    revoked_version := nextval('@schema@.govredis_versions');
    UPDATE @schema@.govredis_sessions SET revoked = true, data = NULL, members = NULL,
        changed_at = greatest(changed_at, coalesce(at, now_at)),
        expires_at = CASE expires_at WHEN 'infinity' THEN now_at + greatest(ttl, interval '30 days')
            ELSE greatest(expires_at, now_at + ttl) END,
        since_version = CASE WHEN version > 0 AND (at IS NULL OR revoked OR is_known)
            THEN coalesce(since_version, version) ELSE revoked_version END,
        ended = CASE WHEN at IS NULL THEN 'session' ELSE 'late' END, untold_in = NULL, version = revoked_version
        WHERE session = s;
    PERFORM @schema@.govredis_outbox_add('session'::text, s, revoked_version);
END $$;

-- Revoke sessions of an agent, as many as given at most, and raise its generation. Returns which, and were they alive.
-- `at`: when it was done by a process that had been cut off from us, by its clock; else NULL. Then sessions bound after
-- that stay, and those that are `told` of one by one.
CREATE FUNCTION @schema@.govredis_session_unbind_agent(a text, at timestamptz, told text[], at_most integer)
    RETURNS TABLE (ended_session text, revoked_version bigint, alive boolean) LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    is_late boolean := at IS NOT NULL;
    raised bigint := nextval('@schema@.govredis_versions');
BEGIN
    PERFORM pg_advisory_xact_lock(@schema@.govredis_session_agent_lock(a));
    at := coalesce(at, clock_timestamp());
    INSERT INTO @schema@.govredis_session_agents AS g
        VALUES (a, CASE WHEN is_late THEN 0 ELSE raised END, at, CASE WHEN is_late THEN raised ELSE 0 END)
        ON CONFLICT (agent) DO UPDATE SET version = greatest(g.version, excluded.version),
            late = greatest(g.late, excluded.late), revoked_at = greatest(g.revoked_at, excluded.revoked_at);
    FOR ended_session, revoked_version, alive IN
        UPDATE @schema@.govredis_sessions SET revoked = true, data = NULL, members = NULL,
            changed_at = greatest(changed_at, at), since_version = coalesce(since_version, version),
            ended = 'agent', untold_in = NULL,
            expires_at = CASE expires_at WHEN 'infinity' THEN clock_timestamp() + interval '30 days'
                ELSE expires_at END,
            version = nextval('@schema@.govredis_versions')
            WHERE session IN (
                SELECT s.session FROM @schema@.govredis_sessions s
                WHERE s.agent = a AND NOT s.revoked AND (NOT is_late OR s.changed_at <= at AND s.session <> ALL (told))
                LIMIT at_most FOR UPDATE)
            RETURNING session, version, expires_at > clock_timestamp()
    LOOP
        PERFORM @schema@.govredis_outbox_add('session'::text, ended_session, revoked_version);
        RETURN NEXT;
    END LOOP;
END $$;

-- As processes of the version before call them, until they are replaced.
CREATE OR REPLACE FUNCTION @schema@.govredis_session_bind(
    s text, a text, bound timestamptz, ttl interval, d text, if_absent boolean, started bigint, counted integer,
    OUT outcome text, OUT held @schema@.govredis_sessions
) LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp AS $$
    SELECT * FROM @schema@.govredis_session_bind(
        s, a, bound, ttl, d, if_absent, started, false, counted, NULL::bigint, NULL::bigint, NULL::text, NULL::text)
$$;

CREATE OR REPLACE FUNCTION @schema@.govredis_session_unbind(
    s text, ttl interval, at timestamptz, OUT alive boolean, OUT revoked_version bigint
) LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp AS $$
    SELECT found.alive, coalesce(found.revoked_version, 0) FROM @schema@.govredis_session_unbind(
        s, ttl, at, '{}'::text[], '{}'::timestamptz[], false) found
$$;

CREATE OR REPLACE FUNCTION @schema@.govredis_session_unbind_agent(a text, at timestamptz, at_most integer)
    RETURNS TABLE (ended text, revoked_version bigint, alive boolean) LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp AS $$
    SELECT * FROM @schema@.govredis_session_unbind_agent(a, at, '{}'::text[], at_most)
$$;

-- As 0011_rights.sql: who may write to our tables may call what is new here, and PUBLIC may not.
DO $$ DECLARE
    ours regprocedure;
    granted oid;
BEGIN
    FOR ours IN SELECT p.oid FROM pg_proc p WHERE p.pronamespace = '@schema@'::regnamespace
        AND p.proname IN ('govredis_session_bind', 'govredis_session_adopt', 'govredis_session_unbind',
                          'govredis_session_unbind_agent') LOOP
        EXECUTE format('REVOKE ALL ON FUNCTION %s FROM PUBLIC', ours);
        FOR granted IN SELECT DISTINCT a.grantee FROM pg_class c, aclexplode(c.relacl) a
            WHERE c.relnamespace = '@schema@'::regnamespace AND c.relname = 'govredis_sessions'
            AND a.privilege_type IN ('INSERT', 'UPDATE', 'DELETE') AND a.grantee NOT IN (0, c.relowner) LOOP
            EXECUTE format('GRANT EXECUTE ON FUNCTION %s TO %s', ours, granted::regrole);
        END LOOP;
    END LOOP;
END $$;
