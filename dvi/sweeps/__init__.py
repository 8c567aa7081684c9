"""Many runs at once: named tasks, worker processes or jobs of a cluster, and a record of each run."""
