"""Faults that a benchmark can switch on: a lossy, slow or cut link to a host, a wrong clock."""
