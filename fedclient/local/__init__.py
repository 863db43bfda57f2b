"""Local training methods, one file each."""
