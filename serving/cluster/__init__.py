"""The life of a request in a cluster, live or simulated: a Coordinator over instances, without a clock (floor 4)."""
