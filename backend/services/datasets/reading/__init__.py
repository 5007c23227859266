"""Rows of a client's file, with the line each came from. Runs in a process of its own: `services.datasets.intake`."""
