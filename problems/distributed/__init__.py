"""A problem over several processes, each with some of the examples."""
