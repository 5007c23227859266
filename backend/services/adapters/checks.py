"""Whether an adapter's folder is safe to load, read without loading it."""

import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import from_json

from core.errors import AdapterRejected
from core.logging import get_logger
from domain.adapter_files import CARD, CONFIG, WEIGHTS, AdapterFacts, read_facts
from domain.models.config_checks import check_asks_for_no_code
from domain.models.safetensors_header import LENGTH_BYTES, SafetensorsHeader, header_length, parse_header
from domain.peft.algorithms import Algorithm
from domain.peft.config import recorded

_MAX_CONFIG_BYTES = 2**20
_MAX_CARD_BYTES = 16 * 2**20
_MAX_TOKENIZER_BYTES = 64 * 2**20
_CODE_FREE = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_log = get_logger(__name__)


def check_adapter(folder: Path, where: str) -> AdapterFacts:
    """Check a folder of plain files.

    Args:
        folder: Has adapter_config.json and adapter_model.safetensors.
        where: Names the adapter in messages.

    Raises:
        AdapterRejected: A file is not what it should be, or asks for something that is not served.
        NeedsRemoteCode: A file asks for code from elsewhere.
    """
    check_small_files(folder, where)
    return read_facts(where, read_json(folder / CONFIG, where, _MAX_CONFIG_BYTES), read_header(folder / WEIGHTS, where))


def check_small_files(folder: Path, where: str) -> None:
    """Check the files that can be read before the weights are there. They must be JSON, and ask for no code.

    Raises:
        AdapterRejected, NeedsRemoteCode: As `check_adapter` says.
    """
    for name in (CONFIG, *_CODE_FREE):
        content = read_json(folder / name, where, _MAX_TOKENIZER_BYTES) if (folder / name).exists() else None
        if isinstance(content, dict):
            check_asks_for_no_code(where, name, content)


def read_json(path: Path, where: str, max_bytes: int) -> Any:
    """Parse a small file strictly.

    Raises:
        AdapterRejected: It is too large, or no JSON.
    """
    if path.stat().st_size > max_bytes:
        raise AdapterRejected(f"{where}: {path.name} is larger than {max_bytes} bytes.")
    try:
        return from_json(path.read_bytes(), allow_inf_nan=False)
    except ValueError as error:
        raise AdapterRejected(f"{where}: {path.name} is not JSON: {error}.") from error


def read_header(path: Path, where: str) -> SafetensorsHeader:
    """Read which tensors a file holds.

    Raises:
        AdapterRejected: Its header is broken, tensors overlap or leave gaps, or the file is cut off.
    """
    try:
        with path.open("rb") as file:
            length = header_length(file.read(LENGTH_BYTES))
            size = os.fstat(file.fileno()).st_size
            return parse_header(file.read(length), size - LENGTH_BYTES - length)
    except ValueError as error:
        raise AdapterRejected(f"{where}: {path.name} is damaged: {error}.") from error


@dataclass(frozen=True)
class Card:
    """The training of an adapter, as far as this version can read the adapter's card."""

    algorithm: str | None = None
    config: dict[str, Any] | None = None
    dataset_sha256: str | None = None
    metrics: dict[str, Any] = field(default_factory=dict)


def read_card(folder: Path, where: str) -> Card:
    """Read training.json.

    A card that cannot be read is deleted. The adapter is served without one, since nothing runs what a card says.
    """
    path = folder / CARD
    if not path.exists():
        return Card()
    try:
        said = read_json(path, where, _MAX_CARD_BYTES)
        if not isinstance(said, dict):
            raise AdapterRejected(f"{where}: {CARD} is not a JSON object.")
        config = recorded(said.get("config"))
    except (AdapterRejected, ValidationError) as error:
        _log.warning("adapter.card_not_read", where=where, reason=str(error)[:500])
        path.unlink()
        return Card()
    algorithm, sha256 = said.get("algorithm"), said.get("dataset_sha256")
    outcome = said.get("outcome")
    figures = outcome.items() if isinstance(outcome, dict) else ()
    return Card(
        algorithm=algorithm if algorithm in list(Algorithm) else None,
        config=config.model_dump(mode="json"),
        dataset_sha256=sha256 if isinstance(sha256, str) and _SHA256.fullmatch(sha256) else None,
        metrics={name: value for name, value in figures if _is_figure(value) and len(name) < 60},
    )


def _is_figure(value: object) -> bool:
    # JSON has no infinity, and PostgreSQL keeps none; 1e999 is read as one.
    return value is None or isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
