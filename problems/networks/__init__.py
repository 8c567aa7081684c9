"""The paper's networks: one architecture a file, each available by name and size."""
