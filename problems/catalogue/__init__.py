"""Ready-made problems: data, networks, and tasks by name."""
