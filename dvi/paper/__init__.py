"""The paper's experiments: a table of them, their runs as files, and the figures that are drawn from these."""
