"""Runs: processes in progress, what is observed of them, and how they are driven."""
