"""`make chaos`: every feature under random faults, and a checker that reads what happened.

    make chaos SECONDS=300 SEED=7             # one run; without SEED each run draws another and prints it
    make chaos TOPOLOGY=cluster               # or sentinel; without, Redis is one server
    python -m tests.chaos run --seconds 60 --seeds 1,2,3 --faults "redis flushed,worker stopped"
    python -m tests.chaos run --seconds 20 --mutant locks_without_flock    # the library with a fault: must be found
    python -m tests.chaos check FOLDER        # the checker again, over the history that a run has left

Eight processes (worker.py) and a Celery worker (jobs.py) use a Redis and a PostgreSQL. The Redis is one server, which
half of the processes reach through a proxy (one_server.py), a Cluster (cluster.py), or the primary of three Sentinels
(sentinel.py). The faults (faults.py) are drawn from the seed: storms alternate with calms, each fault has an end, and
all are healed before the run ends. Then every process must be back on Redis with every feature, which is awaited.

Each process appends one JSON line for each operation to a file of its own; instants are of CLOCK_MONOTONIC, which all
processes of a host share. The checker (checks.py) is a pure function of these files. It knows nothing of the seed, so
a run need not be repeatable: the history is the evidence.

How to read a violation: it names the promise, says in words what was seen, and gives the instant. `faults` in the
history's folder has the faults with their instants; `grep` the session, lock or identity over all files to see who did
what before. A promise that does not hold while something is away is documented in docs/guarantees.md, and
the checks leave out just that: an operation that was degraded says so in `flags`. A failover may lose the last moments
of its primary's slots (docs/cluster.md, docs/sentinel.md): replicated.py notes each as a fault of its own.
"""
