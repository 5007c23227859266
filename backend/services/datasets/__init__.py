"""Datasets: their files, where they come from, and the reading of them in a process of its own."""
