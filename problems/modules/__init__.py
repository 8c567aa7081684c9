"""Problems made of a torch module and its data."""
