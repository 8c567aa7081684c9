"""The integrator of flows with momentum as a state, and of the central map."""
