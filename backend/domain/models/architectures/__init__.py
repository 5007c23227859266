"""The model families whose layers are known: from a config.json to a ModelShape."""
