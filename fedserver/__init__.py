"""The server: configuration, planner, round loop, ledger, evaluation and export.

Import the modules that you need (``fedserver.events``, ``fedserver.ledger``, ...): this file
imports nothing, so that the command line starts quickly.
"""
