"""The features inside other frameworks: `govredis.contrib.celery`, `govredis.contrib.flask`."""
