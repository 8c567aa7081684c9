"""Many runs at once: named tasks, worker processes or a cluster, and a record of each run."""
