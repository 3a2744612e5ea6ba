CREATE SEQUENCE govredis_versions;

CREATE TABLE govredis_agents (
    agent_id text PRIMARY KEY,      -- after GOVREDIS_KEY_PREFIX
    metadata jsonb NOT NULL,
    status text NOT NULL DEFAULT 'active' CHECK (status IN ('active', 'archived')),
    version bigint NOT NULL DEFAULT nextval('govredis_versions'),
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now()
);

-- Every write, psql's too, gets a version above all earlier ones, a deleted and re-created agent's included.
CREATE FUNCTION govredis_agents_version() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.version := nextval('govredis_versions');
    NEW.updated_at := now();
    RETURN NEW;
END $$;

CREATE TRIGGER govredis_agents_version BEFORE INSERT OR UPDATE ON govredis_agents
    FOR EACH ROW EXECUTE FUNCTION govredis_agents_version();
