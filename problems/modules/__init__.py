"""Problems made from a torch module and its data."""
