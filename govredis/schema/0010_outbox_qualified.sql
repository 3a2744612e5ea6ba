-- The functions of the outbox and of agents again: see 0008_limits_qualified.sql.
--
-- Where another role may create functions in our schema, its own could fit a call better than ours does. So each call of
-- one of ours, here and in Python, gives it exactly its types: a bare NULL or literal has none.
--
-- Three of them are SECURITY DEFINER, since they run in transactions of roles that have no rights on our tables. They
-- take text and numbers, write to our tables only, and evaluate nothing that a user has made: no cast, no operator, no
-- function. Nobody but our owner, and roles that were granted it, may call them or put them on a table; PostgreSQL asks
-- for that right when a trigger is created, and never when it fires. So the writers of a watched table, whatever their
-- roles, have what they write noted, and can do nothing else with it.

-- Every write, psql's too, gets a version above all earlier ones, a deleted and re-created agent's included.
CREATE OR REPLACE FUNCTION @schema@.govredis_agents_version() RETURNS trigger LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    NEW.version := nextval('@schema@.govredis_versions');
    NEW.updated_at := now();
    RETURN NEW;
END $$;

-- Of the oldest entries, as many as given, delete those that every epoch has been told of, or all if there is no epoch;
-- but never what is not committed yet: an epoch that begins now has not seen it.
CREATE OR REPLACE FUNCTION @schema@.govredis_outbox_clean(oldest integer) RETURNS void LANGUAGE sql
SET search_path = pg_catalog, pg_temp AS $$
    DELETE FROM @schema@.govredis_outbox WHERE entry IN (
        SELECT o.entry FROM (
            SELECT entry, xid FROM @schema@.govredis_outbox ORDER BY entry LIMIT oldest FOR UPDATE SKIP LOCKED) o
        WHERE pg_visible_in_snapshot(o.xid, pg_current_snapshot())
        AND NOT EXISTS (SELECT FROM @schema@.govredis_epochs e WHERE NOT pg_visible_in_snapshot(o.xid, e.seen)))
$$;

-- An epoch was told of everything that `told` sees. Those that have ended are forgotten, and what was kept for them; so
-- are those that were not told of anything for so many seconds: if one returns, it is not known, and a new one begins.
CREATE OR REPLACE FUNCTION @schema@.govredis_outbox_told(
    the_epoch bigint, the_tick bigint, told pg_snapshot, ended bigint[], forgotten_after double precision, clean integer
) RETURNS void LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    INSERT INTO @schema@.govredis_epochs VALUES (the_epoch, the_tick, told, clock_timestamp())
        ON CONFLICT (epoch) DO UPDATE SET tick = excluded.tick, seen = excluded.seen, at = excluded.at;
    DELETE FROM @schema@.govredis_epochs e WHERE e.epoch <> the_epoch
        AND (e.epoch = ANY (ended) OR e.at < clock_timestamp() - forgotten_after * interval '1 second');
    PERFORM @schema@.govredis_outbox_clean(clean);
END $$;

-- Note a change. Null for the id: all of the namespace; null for the version: the next one. No value is cached under an
-- id of more than 512 bytes, or 1025 with its prefix: nothing is noted then.
CREATE OR REPLACE FUNCTION @schema@.govredis_outbox_add(namespace text, id text, version bigint) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF octet_length(id) > 1025 THEN
        RETURN;
    END IF;
    INSERT INTO @schema@.govredis_outbox (namespace, id, version)
        VALUES (namespace, id, coalesce(version, nextval('@schema@.govredis_versions')));
    -- Where nobody ticks, because no Redis is in use, the table cleans itself.
    IF random() < 0.01 AND NOT EXISTS (SELECT FROM @schema@.govredis_epochs) THEN
        PERFORM @schema@.govredis_outbox_clean(1000);
    END IF;
END $$;

-- Arguments of the trigger: namespace, and the column that has the id.
--
-- A built-in type is made text by its own cast, which only a superuser could have replaced. Any other type may have one
-- of its user's, which would run with our rights: there it is what SELECT shows, which its output function makes, and
-- that of an enum, an array or a composite type is a built-in. Such a function of its own has a type that a superuser
-- has made. (A type may be changed at any time, so it is looked up at each row.)
CREATE OR REPLACE FUNCTION @schema@.govredis_outbox_changed() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    kind oid := (SELECT atttypid FROM pg_attribute WHERE attrelid = TG_RELID AND attname = TG_ARGV[1]);
    base oid;
    is_built_in boolean;
    take text;
    old_id text;
    new_id text;
BEGIN
    -- Without the column, ($1).name would call a function of that name: to_json, say, which runs casts of users.
    IF TG_OP = 'TRUNCATE' OR kind IS NULL THEN
        PERFORM @schema@.govredis_outbox_add(TG_ARGV[0], NULL::text, NULL::bigint);
        RETURN NULL;
    END IF;
    LOOP
        SELECT nullif(t.typbasetype, 0), t.typnamespace = 'pg_catalog'::regnamespace INTO base, is_built_in
            FROM pg_type t WHERE t.oid = kind;
        EXIT WHEN base IS NULL;
        kind := base;  -- of a domain
    END LOOP;
    take := format(CASE WHEN is_built_in THEN 'SELECT ($1).%I::text' ELSE 'SELECT nullif(concat(($1).%1$I), '''')' END,
                   TG_ARGV[1]);
    IF TG_OP <> 'INSERT' THEN
        EXECUTE take INTO old_id USING OLD;
    END IF;
    IF TG_OP <> 'DELETE' THEN
        EXECUTE take INTO new_id USING NEW;
    END IF;
    IF new_id IS NOT NULL THEN
        PERFORM @schema@.govredis_outbox_add(TG_ARGV[0], new_id, NULL::bigint);
    END IF;
    IF old_id IS DISTINCT FROM new_id AND old_id IS NOT NULL THEN
        PERFORM @schema@.govredis_outbox_add(TG_ARGV[0], old_id, NULL::bigint);
    END IF;
    RETURN NULL;
END $$;

-- The same of our own table, whose rows have versions. Its arguments are for govredis_outbox_watched.
CREATE FUNCTION @schema@.govredis_agents_changed() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF TG_OP = 'TRUNCATE' THEN
        PERFORM @schema@.govredis_outbox_add('agent_meta'::text, NULL::text, NULL::bigint);
    ELSIF TG_OP = 'DELETE' THEN
        PERFORM @schema@.govredis_outbox_add('agent_meta'::text, OLD.agent_id, NULL::bigint);
    ELSE
        PERFORM @schema@.govredis_outbox_add('agent_meta'::text, NEW.agent_id, NEW.version);
        IF TG_OP = 'UPDATE' AND OLD.agent_id <> NEW.agent_id THEN
            PERFORM @schema@.govredis_outbox_add('agent_meta'::text, OLD.agent_id, NEW.version);
        END IF;
    END IF;
    RETURN NULL;
END $$;

DROP TRIGGER govredis_rows_agent_meta ON @schema@.govredis_agents;
DROP TRIGGER govredis_truncate_agent_meta ON @schema@.govredis_agents;
CREATE TRIGGER govredis_rows_agent_meta AFTER INSERT OR UPDATE OR DELETE ON @schema@.govredis_agents
    FOR EACH ROW EXECUTE FUNCTION @schema@.govredis_agents_changed('agent_meta', 'agent_id');
CREATE TRIGGER govredis_truncate_agent_meta AFTER TRUNCATE ON @schema@.govredis_agents
    FOR EACH STATEMENT EXECUTE FUNCTION @schema@.govredis_agents_changed('agent_meta', 'agent_id');

-- The triggers of ours: on a table, for which namespace, by which column. `shape` is another one when the trigger was
-- made anew, switched off or on. Their arguments are kept one after the other, each with a NUL behind it.
CREATE VIEW @schema@.govredis_outbox_triggers AS
    SELECT t.tgrelid AS relation,
           convert_from(decode(found.args[1], 'hex'), getdatabaseencoding()) AS namespace,
           convert_from(decode(found.args[2], 'hex'), getdatabaseencoding()) AS id_column,
           t.tgname AS name,
           t.tgparentid = 0 AS is_root,    -- partitions have theirs from it
           format('%s.%s', t.oid, t.xmin) AS shape
    FROM pg_trigger t
    CROSS JOIN regexp_match(encode(t.tgargs, 'hex'), '^((?:(?!00)..)*)00((?:(?!00)..)*)00') found (args)
    WHERE t.tgfoid IN ('@schema@.govredis_outbox_changed()'::regprocedure,
                       '@schema@.govredis_agents_changed()'::regprocedure)
    AND NOT t.tgisinternal AND t.tgnargs >= 2;

-- What is watched: a table by its name, for which namespace, by which column.
CREATE OR REPLACE VIEW @schema@.govredis_outbox_watched AS
    SELECT t.relation::regclass AS watched, t.namespace, t.id_column, t.name AS trigger
    FROM @schema@.govredis_outbox_triggers t
    WHERE t.is_root;

-- Have every change of a table noted. What was read before may be cached, and old: so all of the namespace is too.
CREATE OR REPLACE FUNCTION @schema@.govredis_outbox_watch(watched regclass, id_column text, namespace text) RETURNS void
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    former name;
    -- Two namespaces must not have one trigger, nor two schemas; PostgreSQL cuts a name off after 63 bytes.
    short text := CASE WHEN '@schema@' = '"public"' AND octet_length(namespace) <= 45 THEN namespace
        ELSE left(encode(sha256(convert_to('@schema@ ' || namespace, 'UTF8')), 'hex'), 40) END;
BEGIN
    IF NOT EXISTS (SELECT FROM pg_attribute
                   WHERE attrelid = watched AND attname = id_column AND attnum > 0 AND NOT attisdropped) THEN
        RAISE invalid_parameter_value USING MESSAGE = format('%s has no column %s', watched, id_column);
    END IF;
    FOR former IN SELECT w.trigger FROM @schema@.govredis_outbox_watched w
                  WHERE w.watched = $1 AND w.namespace = $3 LOOP
        EXECUTE format('DROP TRIGGER %I ON %s', former, watched);
    END LOOP;
    EXECUTE format('CREATE TRIGGER %I AFTER INSERT OR UPDATE OR DELETE ON %s'
                   ' FOR EACH ROW EXECUTE FUNCTION @schema@.govredis_outbox_changed(%L, %L)',
                   'govredis_rows_' || short, watched, namespace, id_column);
    EXECUTE format('CREATE TRIGGER %I AFTER TRUNCATE ON %s'
                   ' FOR EACH STATEMENT EXECUTE FUNCTION @schema@.govredis_outbox_changed(%L, %L)',
                   'govredis_truncate_' || short, watched, namespace, id_column);
    PERFORM @schema@.govredis_outbox_add(namespace, NULL::text, NULL::bigint);
END $$;

-- Watch a table no more. How many triggers it had of ours.
CREATE OR REPLACE FUNCTION @schema@.govredis_outbox_unwatch(unwatched regclass) RETURNS integer LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    found record;
    n integer := 0;
BEGIN
    FOR found IN SELECT * FROM @schema@.govredis_outbox_watched w WHERE w.watched = unwatched LOOP
        EXECUTE format('DROP TRIGGER %I ON %s', found.trigger, unwatched);
        PERFORM @schema@.govredis_outbox_add(found.namespace, NULL::text, NULL::bigint);
        n := n + 1;
    END LOOP;
    RETURN n;
END $$;
