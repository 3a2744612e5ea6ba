-- The key of a row is the prefix (GOVREDIS_KEY_PREFIX), chr(31) and the id, neither of which can hold that character;
-- with the prefix "" it is the id alone. Before, nothing stood between: "app" with "2x" was "app2" with "x".

-- Is it the key of a row of that prefix?
CREATE FUNCTION @schema@.govredis_is_of(row_key text, prefix text) RETURNS boolean LANGUAGE sql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp AS $$
    SELECT CASE WHEN strpos(row_key, chr(31)) = 0 THEN prefix = '' ELSE split_part(row_key, chr(31), 1) = prefix END
$$;

-- Bring the rows of a prefix that the version before has written into the new form. Nobody can tell a row of "app" from
-- one of "app2", or of "": it takes those that begin with the prefix, and were written before this file was applied.
-- Where the new version has written a row of the same id already, that one stands.
CREATE FUNCTION @schema@.govredis_adopt(prefix text) RETURNS void LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    since timestamptz := (SELECT applied_at FROM @schema@.govredis_migrations WHERE name = '0012_prefixes.sql');
    rest integer := length(prefix) + 1;
    ours text := prefix || chr(31);
BEGIN
    -- Not a change of the agents: their versions and times stay.
    ALTER TABLE @schema@.govredis_agents DISABLE TRIGGER USER;
    UPDATE @schema@.govredis_agents a SET agent_id = ours || substr(agent_id, rest)
        WHERE starts_with(agent_id, prefix) AND strpos(agent_id, chr(31)) = 0 AND created_at < since
        AND NOT EXISTS (SELECT FROM @schema@.govredis_agents b WHERE b.agent_id = ours || substr(a.agent_id, rest));
    ALTER TABLE @schema@.govredis_agents ENABLE TRIGGER USER;

    UPDATE @schema@.govredis_sessions a SET session = ours || substr(session, rest),
        agent = CASE WHEN agent = '' THEN '' ELSE ours || substr(agent, rest) END
        WHERE starts_with(session, prefix) AND strpos(session, chr(31)) = 0 AND changed_at < since
        AND (agent = '' OR starts_with(agent, prefix))
        AND NOT EXISTS (SELECT FROM @schema@.govredis_sessions b WHERE b.session = ours || substr(a.session, rest));
    UPDATE @schema@.govredis_session_agents a SET agent = ours || substr(agent, rest)
        WHERE starts_with(agent, prefix) AND strpos(agent, chr(31)) = 0 AND revoked_at < since
        AND NOT EXISTS (SELECT FROM @schema@.govredis_session_agents b WHERE b.agent = ours || substr(a.agent, rest));

    UPDATE @schema@.govredis_limit_windows a SET key = ours || substr(key, rest)
        WHERE starts_with(key, prefix || 'rate_limit:')
        AND NOT EXISTS (SELECT FROM @schema@.govredis_limit_windows b WHERE b.key = ours || substr(a.key, rest));
    UPDATE @schema@.govredis_limit_counters a SET key = ours || substr(key, rest)
        WHERE starts_with(key, prefix || 'rate_limit:')
        AND NOT EXISTS (SELECT FROM @schema@.govredis_limit_counters b
            WHERE b.key = ours || substr(a.key, rest) AND b.window_us = a.window_us AND b.bucket = a.bucket);

    -- What the outbox has under old names is told of as a whole.
    PERFORM @schema@.govredis_outbox_add('agent_meta'::text, NULL::text, NULL::bigint), @schema@.govredis_outbox_add('session'::text, NULL::text, NULL::bigint);
END $$;

REVOKE ALL ON FUNCTION @schema@.govredis_is_of(text, text), @schema@.govredis_adopt(text) FROM PUBLIC;
