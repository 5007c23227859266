"""Bases in memory: who gets one, where it is put, and who gives way."""
