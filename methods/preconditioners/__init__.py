"""Preconditioners: what P(ν) may be, one structure a file."""
