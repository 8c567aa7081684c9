"""Where an optimizer of ``torch.optim`` and a problem meet: whose parameters are which weights."""
