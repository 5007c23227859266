"""The formats of datasets, and the parts of a row."""
