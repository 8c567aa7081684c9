"""Connects an optimizer of ``torch.optim`` with a problem: which parameter is which part of w."""
