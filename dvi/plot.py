"""The public name of :mod:`dvi.plotting`."""

from dvi.plotting import Picture, plot_comparison, plot_solution, time_average

__all__ = ["Picture", "plot_comparison", "plot_solution", "time_average"]
