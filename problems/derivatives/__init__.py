"""Derivatives of a loss: backends, layers that are made safe, and the check."""
