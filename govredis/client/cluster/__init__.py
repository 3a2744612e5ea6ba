"""A Redis Cluster, as one client.

- `cluster_client.py`: ClusterClient: each command to its node, redirections, pipelines.
- `cluster_node.py`: ClusterNode: the RedisNode of one primary.
- `topology.py`: which node has which slot.
- `part.py`: the commands of a pipeline that go to one node.
"""
