"""The report of a task: data, plots, page."""
