"""What to rent for a workload: cost-model plans and like clusters, put to the test by simulation."""
