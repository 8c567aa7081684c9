"""Central flows of optimizers."""
