"""Pictures of results, with matplotlib."""

from dvi.plotting.figure import Picture, plot_comparison, plot_solution, time_average

__all__ = ["Picture", "plot_comparison", "plot_solution", "time_average"]
