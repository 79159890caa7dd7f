"""Which devices to rent for a model, a workload and latency targets: candidates, their rates, and the search."""
