"""Measurements that back the numbers in the documentation; each is a module to run."""
