"""Routers: parse, delegate, return. Errors become problem documents in `problems.py` alone."""
