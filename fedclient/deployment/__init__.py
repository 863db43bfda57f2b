"""A device that joins a server, and keeps its SuperNode running."""
