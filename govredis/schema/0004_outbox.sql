-- The outbox: what was changed, written by triggers in the writer's own transaction, and how far each Redis was told.

CREATE TABLE govredis_outbox (
    entry bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    namespace text NOT NULL,
    id text,                        -- null: all of the namespace
    version bigint NOT NULL,
    at timestamptz NOT NULL DEFAULT clock_timestamp(),
    xid xid8 NOT NULL DEFAULT pg_current_xact_id()  -- of the writer: it says which snapshots see the entry
);

CREATE INDEX govredis_outbox_xid ON govredis_outbox (xid);

-- One row for each Redis (and each key prefix in it) that is told: its data is an epoch, which ends when data is lost.
CREATE TABLE govredis_epochs (
    epoch bigint PRIMARY KEY,
    tick bigint NOT NULL,           -- what was last written to it
    seen pg_snapshot NOT NULL,      -- it has been told of everything that this snapshot sees
    at timestamptz NOT NULL
);

-- Of the oldest entries, as many as given, delete those that every epoch has been told of, or all if there is no epoch;
-- but never what is not committed yet: an epoch that begins now has not seen it.
CREATE FUNCTION govredis_outbox_clean(oldest integer) RETURNS void LANGUAGE sql AS $$
    DELETE FROM govredis_outbox WHERE entry IN (
        SELECT o.entry FROM (SELECT entry, xid FROM govredis_outbox ORDER BY entry LIMIT oldest FOR UPDATE SKIP LOCKED) o
        WHERE pg_visible_in_snapshot(o.xid, pg_current_snapshot())
        AND NOT EXISTS (SELECT FROM govredis_epochs e WHERE NOT pg_visible_in_snapshot(o.xid, e.seen)))
$$;

-- An epoch was told of everything that `told` sees. Those that have ended are forgotten, and what was kept for them; so
-- are those that were not told of anything for so many seconds: if one returns, it is not known, and a new one begins.
CREATE FUNCTION govredis_outbox_told(
    the_epoch bigint, the_tick bigint, told pg_snapshot, ended bigint[], forgotten_after double precision, clean integer
) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO govredis_epochs VALUES (the_epoch, the_tick, told, clock_timestamp())
        ON CONFLICT (epoch) DO UPDATE SET tick = excluded.tick, seen = excluded.seen, at = excluded.at;
    DELETE FROM govredis_epochs e WHERE e.epoch <> the_epoch
        AND (e.epoch = ANY (ended) OR e.at < clock_timestamp() - forgotten_after * interval '1 second');
    PERFORM govredis_outbox_clean(clean);
END $$;

-- Note a change. Null for the id: all of the namespace; null for the version: the next one.
CREATE FUNCTION govredis_outbox_add(namespace text, id text, version bigint) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN
    INSERT INTO govredis_outbox (namespace, id, version)
        VALUES (namespace, id, coalesce(version, nextval('govredis_versions')));
    -- Where nobody ticks, because no Redis is in use, the table cleans itself.
    IF random() < 0.01 AND NOT EXISTS (SELECT FROM govredis_epochs) THEN
        PERFORM govredis_outbox_clean(1000);
    END IF;
END $$;

-- Arguments of the trigger: namespace, the column that has the id, and the one that has the version, if there is one.
CREATE FUNCTION govredis_outbox_changed() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
DECLARE
    old_id text;
    new_id text;
    version bigint;
BEGIN
    IF TG_OP = 'TRUNCATE' THEN
        PERFORM govredis_outbox_add(TG_ARGV[0], NULL, NULL);
        RETURN NULL;
    END IF;
    IF TG_OP <> 'INSERT' THEN
        EXECUTE format('SELECT ($1).%I::text', TG_ARGV[1]) INTO old_id USING OLD;
    END IF;
    IF TG_OP <> 'DELETE' THEN
        EXECUTE format('SELECT ($1).%I::text', TG_ARGV[1]) INTO new_id USING NEW;
        IF TG_NARGS > 2 THEN
            EXECUTE format('SELECT ($1).%I', TG_ARGV[2]) INTO version USING NEW;
        END IF;
    END IF;
    IF new_id IS NOT NULL THEN
        PERFORM govredis_outbox_add(TG_ARGV[0], new_id, version);
    END IF;
    IF old_id IS DISTINCT FROM new_id AND old_id IS NOT NULL THEN
        PERFORM govredis_outbox_add(TG_ARGV[0], old_id, version);
    END IF;
    RETURN NULL;
END $$;

-- Have every change of a table noted. What was read before may be cached, and old: so all of the namespace is too.
CREATE FUNCTION govredis_outbox_watch(watched regclass, id_column text, namespace text) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_attribute
                   WHERE attrelid = watched AND attname = id_column AND attnum > 0 AND NOT attisdropped) THEN
        RAISE invalid_parameter_value USING MESSAGE = format('%s has no column %s', watched, id_column);
    END IF;
    EXECUTE format('DROP TRIGGER IF EXISTS %I ON %s', 'govredis_rows_' || namespace, watched);
    EXECUTE format('DROP TRIGGER IF EXISTS %I ON %s', 'govredis_truncate_' || namespace, watched);
    EXECUTE format('CREATE TRIGGER %I AFTER INSERT OR UPDATE OR DELETE ON %s'
                   ' FOR EACH ROW EXECUTE FUNCTION govredis_outbox_changed(%L, %L)',
                   'govredis_rows_' || namespace, watched, namespace, id_column);
    EXECUTE format('CREATE TRIGGER %I AFTER TRUNCATE ON %s'
                   ' FOR EACH STATEMENT EXECUTE FUNCTION govredis_outbox_changed(%L, %L)',
                   'govredis_truncate_' || namespace, watched, namespace, id_column);
    PERFORM govredis_outbox_add(namespace, NULL, NULL);
END $$;

-- What is watched: a table by its name, for which namespace, by which column.
CREATE VIEW govredis_outbox_watched AS
    SELECT t.tgrelid::regclass AS watched,
           convert_from(split_part(encode(t.tgargs, 'escape'), '\000', 1)::bytea, getdatabaseencoding()) AS namespace,
           convert_from(split_part(encode(t.tgargs, 'escape'), '\000', 2)::bytea, getdatabaseencoding()) AS id_column,
           t.tgname AS trigger
    FROM pg_trigger t
    WHERE t.tgfoid = 'govredis_outbox_changed'::regproc AND NOT t.tgisinternal;

-- Watch a table no more. How many triggers it had of ours.
CREATE FUNCTION govredis_outbox_unwatch(unwatched regclass) RETURNS integer LANGUAGE plpgsql AS $$
DECLARE
    found record;
    n integer := 0;
BEGIN
    FOR found IN SELECT * FROM govredis_outbox_watched w WHERE w.watched = unwatched LOOP
        EXECUTE format('DROP TRIGGER %I ON %s', found.trigger, unwatched);
        PERFORM govredis_outbox_add(found.namespace, NULL, NULL);
        n := n + 1;
    END LOOP;
    RETURN n;
END $$;

CREATE TRIGGER govredis_rows_agent_meta AFTER INSERT OR UPDATE OR DELETE ON govredis_agents
    FOR EACH ROW EXECUTE FUNCTION govredis_outbox_changed('agent_meta', 'agent_id', 'version');
CREATE TRIGGER govredis_truncate_agent_meta AFTER TRUNCATE ON govredis_agents
    FOR EACH STATEMENT EXECUTE FUNCTION govredis_outbox_changed('agent_meta', 'agent_id', 'version');

-- They run in the sessions of writers who know nothing of us: whose search_path is their own, and whose role may not
-- write to our tables. So they have our search_path and our rights; no temporary table stands in for one of ours.
DO $$ DECLARE
    f text;
BEGIN
    FOREACH f IN ARRAY ARRAY['govredis_outbox_clean(integer)', 'govredis_outbox_add(text, text, bigint)',
                             'govredis_outbox_changed()', 'govredis_agents_version()'] LOOP
        EXECUTE format('ALTER FUNCTION %s SET search_path = %I, pg_temp', f, current_schema());
    END LOOP;
END $$;
