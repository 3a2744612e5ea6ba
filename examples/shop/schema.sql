-- The shop's own tables. To run this again changes nothing.
CREATE TABLE IF NOT EXISTS customers (name text PRIMARY KEY, password text NOT NULL);

CREATE TABLE IF NOT EXISTS products (
    id int PRIMARY KEY,
    name text NOT NULL,
    cents int NOT NULL,
    stock int NOT NULL CHECK (stock >= 0)  -- the last word, whatever becomes of the lock
);
CREATE TABLE IF NOT EXISTS orders (
    id serial PRIMARY KEY,
    customer text NOT NULL REFERENCES customers,
    product int NOT NULL REFERENCES products,
    at timestamptz NOT NULL DEFAULT now()
);
CREATE TABLE IF NOT EXISTS payments (  -- the books of the payment provider, in truth elsewhere
    id serial PRIMARY KEY,
    customer text NOT NULL,
    cents int NOT NULL
);

INSERT INTO products VALUES (1, 'Tea', 250, 20), (2, 'Cake', 400, 5), (3, 'Teapot', 3500, 1) ON CONFLICT DO NOTHING;

-- Each change of a product, by any program, invalidates its cached value.
SELECT public.govredis_outbox_watch('public.products'::regclass, 'id'::text, 'product'::text);
