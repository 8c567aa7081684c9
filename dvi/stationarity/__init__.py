"""The stationary ν of a method, and the flow with ν at its stationary value (paper, eqs. 12 and 13)."""
