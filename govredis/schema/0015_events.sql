-- Events of transactions: a row is written in the writer's transaction, and goes once it is in its stream in Redis.

CREATE TABLE @schema@.govredis_events (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    number bigint NOT NULL GENERATED ALWAYS AS IDENTITY,
    stream text NOT NULL,           -- the key of a row, with the topic's first word as its id
    topic text NOT NULL,
    entity text NOT NULL,           -- '': none
    at timestamptz NOT NULL DEFAULT clock_timestamp(),
    payload text NOT NULL           -- JSON
);
CREATE INDEX govredis_events_by_stream ON @schema@.govredis_events (stream, number);

-- Of the oldest events, as many as given, delete those that are more than a week old or a million behind the newest.
CREATE FUNCTION @schema@.govredis_events_clean(oldest integer) RETURNS bigint LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp AS $$
    WITH gone AS (
        DELETE FROM @schema@.govredis_events WHERE id IN (
            SELECT id FROM @schema@.govredis_events
            WHERE at < clock_timestamp() - interval '7 days'
            OR number < (SELECT max(number) FROM @schema@.govredis_events) - 1000000
            LIMIT oldest FOR UPDATE SKIP LOCKED)
        RETURNING 1)
    SELECT count(*) FROM gone
$$;

-- Publish an event. `prefix`: GOVREDIS_KEY_PREFIX with chr(31) behind it, or ''. Returns the event's id.
-- It has its owner's rights, as 0010_outbox_qualified.sql says of others.
CREATE FUNCTION @schema@.govredis_event_add(prefix text, topic text, entity text, payload text) RETURNS text
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    added uuid;
BEGIN
    IF topic !~ '^[A-Za-z0-9_-]+([.][A-Za-z0-9_-]+)*$' OR octet_length(topic) > 200
        OR octet_length(payload) > 65536 OR octet_length(entity) > 1025 OR octet_length(prefix) > 513 THEN
        RAISE invalid_parameter_value USING MESSAGE =
            'a topic is words of letters, digits, _ and - joined by dots; a payload has 65536 bytes at most';
    END IF;
    INSERT INTO @schema@.govredis_events (stream, topic, entity, payload)
        VALUES (prefix || split_part(topic, '.', 1), topic, entity, payload) RETURNING id INTO added;
    -- Where nobody takes them to Redis, the table cleans itself.
    IF random() < 0.001 THEN
        PERFORM @schema@.govredis_events_clean(10000);
    END IF;
    RETURN added::text;
END $$;

-- Each change of an agent, by any client, is an event.
CREATE FUNCTION @schema@.govredis_agents_event() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    agent @schema@.govredis_agents;
    what text;
    rest integer;
BEGIN
    IF TG_OP = 'DELETE' THEN
        agent := OLD;
        agent.version := nextval('@schema@.govredis_versions');
        what := 'deleted';
    ELSE
        agent := NEW;
        what := CASE WHEN TG_OP = 'INSERT' THEN 'created'
            WHEN NEW.status = 'archived' AND OLD.status <> 'archived' THEN 'archived' ELSE 'updated' END;
    END IF;
    IF octet_length(agent.agent_id) <= 1025 THEN
        rest := strpos(agent.agent_id, chr(31)) + 1;
        PERFORM @schema@.govredis_event_add(
            left(agent.agent_id, rest - 1), 'agent.' || what, substr(agent.agent_id, rest),
            json_build_object('agent_id', substr(agent.agent_id, rest), 'status', agent.status,
                              'version', agent.version)::text);
    END IF;
    RETURN NULL;
END $$;

CREATE TRIGGER govredis_event AFTER INSERT OR UPDATE OR DELETE ON @schema@.govredis_agents
    FOR EACH ROW EXECUTE FUNCTION @schema@.govredis_agents_event();

REVOKE ALL ON FUNCTION @schema@.govredis_events_clean(integer),
    @schema@.govredis_event_add(text, text, text, text), @schema@.govredis_agents_event() FROM PUBLIC;
