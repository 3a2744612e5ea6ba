"""`make bench`: what the library costs over a raw socket that sends the same bytes, beside redis-py and the peers.

All contestants of an operation run in turns within one run, so that a noisy machine is noisy for all of them.
"""
