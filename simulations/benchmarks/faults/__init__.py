"""What faults of network, clock, disk and processes do to a joined deployment."""
