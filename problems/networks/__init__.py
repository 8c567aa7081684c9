"""The paper's networks: one architecture a file, each by a name and a size."""
