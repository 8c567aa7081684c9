"""The paper's experiments: a table of them, the files of their runs, and the figures that are drawn from the runs."""
