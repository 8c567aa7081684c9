"""Figures of results, with matplotlib."""

from dvi.plotting.figure import Picture, arrange, picture, plot_comparison, plot_solution
from dvi.plotting.panels import time_average

__all__ = ["Picture", "arrange", "picture", "plot_comparison", "plot_solution", "time_average"]
