"""Models: their records, dimensions and files."""
