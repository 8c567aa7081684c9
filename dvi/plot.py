"""The public name of :mod:`dvi.plotting`."""

from dvi.plotting import Picture, picture, plot_comparison, plot_solution, time_average

__all__ = ["Picture", "picture", "plot_comparison", "plot_solution", "time_average"]
