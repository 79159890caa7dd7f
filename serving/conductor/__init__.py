"""Global scheduling: placement, admission, replication, estimators. Pure Python (floor 3)."""
