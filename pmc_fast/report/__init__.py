"""Reports, plots, gates, and the environment of a result."""
