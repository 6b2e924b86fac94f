"""Pages, plots and numbers of a run, and the machine it ran on."""
