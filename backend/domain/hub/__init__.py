"""Repositories of the Hub: what they list, and the values of its answers."""
