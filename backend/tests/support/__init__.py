"""Helpers of the tests: doubles of what is outside, tiny models, a real server."""
