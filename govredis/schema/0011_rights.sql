-- PUBLIC may call none of our functions. Roles that were granted to write to our tables go on calling those that do so.
DO $$ DECLARE
    ours regprocedure;
    is_trigger boolean;
    granted oid;
BEGIN
    FOR ours, is_trigger IN SELECT p.oid, p.prorettype = 'trigger'::regtype FROM pg_proc p
        WHERE p.pronamespace = '@schema@'::regnamespace AND p.proname LIKE 'govredis\_%' LOOP
        EXECUTE format('REVOKE ALL ON FUNCTION %s FROM PUBLIC', ours);
        FOR granted IN SELECT DISTINCT a.grantee FROM pg_class c, aclexplode(c.relacl) a
            WHERE NOT is_trigger AND c.relnamespace = '@schema@'::regnamespace AND c.relname LIKE 'govredis\_%'
            AND a.privilege_type IN ('INSERT', 'UPDATE', 'DELETE') AND a.grantee NOT IN (0, c.relowner) LOOP
            EXECUTE format('GRANT EXECUTE ON FUNCTION %s TO %s', ours, granted::regrole);
        END LOOP;
    END LOOP;
END $$;
