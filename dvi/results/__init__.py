"""The results of runs: solutions, comparisons, their status, and averages."""
