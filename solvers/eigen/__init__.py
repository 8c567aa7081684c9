"""Eigenpairs of the effective Hessian, followed along a run."""
