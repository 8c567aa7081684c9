"""Derivatives of a loss: backends, safe replacements of layers, and the check."""
