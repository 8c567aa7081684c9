"""Integrators to compare with: Euler (the paper's scheme), Runge–Kutta with located breakpoints, torchdiffeq."""
