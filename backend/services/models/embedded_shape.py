"""The embedded model's shape, known before any engine runs: embedded_shape.json, as an engine describes its CONFIG."""

from pathlib import Path

from domain.results import Described

# Written by `python -m engine.outline`. tests/engine/test_outline.py holds it to what transformers builds.
EMBEDDED_SHAPE = Described.model_validate_json(Path(__file__).with_suffix(".json").read_bytes())
