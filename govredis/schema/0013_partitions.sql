-- What triggers do not see of a watched table: TRUNCATE of one of its partitions, ATTACH and DETACH, a table that was
-- rewritten, and what was written while its triggers were switched off. Each tick compares what there was with what
-- there is; where a namespace differs, all of it is noted.

CREATE TABLE @schema@.govredis_outbox_shapes (
    namespace text PRIMARY KEY,
    shape text NOT NULL             -- a digest of its triggers, partitions' included, and of the files of their tables
);

-- Returns how many namespaces had changed.
CREATE FUNCTION @schema@.govredis_outbox_reshaped() RETURNS bigint LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp AS $$
    WITH now AS MATERIALIZED (
        SELECT t.namespace, encode(sha256(convert_to(
            string_agg(format('%s in %s', t.shape, c.relfilenode), ', ' ORDER BY t.shape), 'UTF8')), 'hex') AS shape
        FROM @schema@.govredis_outbox_triggers t JOIN pg_class c ON c.oid = t.relation
        GROUP BY t.namespace
    ), changed AS (
        INSERT INTO @schema@.govredis_outbox_shapes AS known
        SELECT n.namespace, n.shape FROM now n
        WHERE NOT EXISTS (SELECT FROM @schema@.govredis_outbox_shapes s
                          WHERE s.namespace = n.namespace AND s.shape = n.shape)
        ORDER BY n.namespace
        ON CONFLICT (namespace) DO UPDATE SET shape = excluded.shape
        RETURNING known.namespace
    ), gone AS (
        DELETE FROM @schema@.govredis_outbox_shapes s
        WHERE NOT EXISTS (SELECT FROM now n WHERE n.namespace = s.namespace)
        RETURNING s.namespace
    ), noted AS MATERIALIZED (
        SELECT @schema@.govredis_outbox_add(c.namespace, NULL::text, NULL::bigint) FROM (
            SELECT namespace FROM changed UNION ALL SELECT namespace FROM gone) c
    )
    SELECT count(*) FROM noted
$$;

REVOKE ALL ON FUNCTION @schema@.govredis_outbox_reshaped() FROM PUBLIC;
