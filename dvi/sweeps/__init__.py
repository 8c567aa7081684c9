"""Many runs at once: tasks with names, worker processes or a cluster, and files that say how each run ended."""
