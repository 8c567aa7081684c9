"""Mini-batches: the stochastic optimizer, the covariance of its oscillations, and the central flow that they drive."""
