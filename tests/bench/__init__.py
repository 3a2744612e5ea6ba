"""`make bench`: what a capacity planner needs, beside a raw socket that sends the same bytes, redis-py and the peers.

Each file measures one thing, and all contestants take turns, so that a noisy machine is noisy for all of them. Ratios
are of rounds. The report is one JSON; `pages` makes of it the charts and tables that docs/ shows.
"""
