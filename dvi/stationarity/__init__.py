"""The stationary ν of a method, and the flow that keeps to it (paper, eqs. 12 and 13)."""
