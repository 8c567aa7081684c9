"""Runs: the processes in progress, their observations, and the functions that drive them."""
