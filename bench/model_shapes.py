"""Shapes of models for the benchmarks, described in this process as an engine describes them."""

import json
from functools import cache
from typing import Any

from domain.models.shape import ModelShape
from domain.models.storage import as_published


def read_shape(config: dict[str, Any]) -> ModelShape | None:
    """Read a model's shape from its config.json; None where transformers has no class for it."""
    shape = _described(json.dumps(config, sort_keys=True))
    return as_published(shape, config) if shape is not None else None


@cache
def _described(config: str) -> ModelShape | None:
    from engine.guards import hide_broken_torchvision

    hide_broken_torchvision()
    from engine.outline import describe

    return describe(json.loads(config)).shape
