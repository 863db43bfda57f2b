"""Simulation runs on one machine, comparisons, reports, and the command line that joins the rooms."""
