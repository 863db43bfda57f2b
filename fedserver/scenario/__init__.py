"""The tables of a scenario, one a file; ``fedserver.configuration`` is what others import."""
