"""Methods and ``torch.optim``: an optimizer of torch read as a declaration, and a declaration used as an optimizer."""
