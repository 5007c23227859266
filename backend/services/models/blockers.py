"""What prevents a load of a model, apart from memory."""

from collections.abc import Mapping
from typing import Any

from core.errors import AccessDenied, ModelGated, ModelRejected, NeedsRemoteCode
from domain.models.config_checks import check_asks_for_no_code, check_dimensions
from domain.models.records import ModelDetails, ModelSummary, needs_remote_code, weight_files
from services.models.local import LocalModel
from services.models.safety import check_snapshot, no_safe_weights


def blockers_of(details: ModelDetails, *, has_token: bool) -> list[str]:
    """Return the reasons to refuse a load, as far as the Hub's listing and config.json tell.

    Args:
        details: The model as the Hub describes it.
        has_token: Whether the Hub was asked with somebody's token.

    Returns:
        A sentence for each reason; empty if none is known.
    """
    model_id, paths = details.summary.model_id, [file.path for file in details.files]
    if details.disabled:
        return [disabled(model_id).detail]
    blockers = []
    if details.config is None:
        blockers.append(no_config(details, has_token=has_token).detail)
    else:
        blockers += _config_blockers(model_id, details.config)
    if details.requires_remote_code and not needs_remote_code(details.config):  # its tokenizer does
        blockers.append(f"{model_id} asks to run its own Python; it is never run here.")
    if not weight_files(paths):
        blockers.append(no_safe_weights(model_id, paths).detail)
    return blockers


def is_loadable(summary: ModelSummary, config: Mapping[str, Any]) -> bool:
    """Tell whether the Hub's list shows no reason to refuse a load. Of the files, only config.json is known there.

    Parameters are what the Hub counted in the headers of the weights that a load reads. The tag `safetensors` does for
    any file of that kind, in whatever folder.
    """
    counted = summary.parameters is not None
    return counted and "custom_code" not in summary.tags and not _config_blockers(summary.model_id, config)


def _config_blockers(model_id: str, config: Mapping[str, Any]) -> list[str]:
    try:
        check_asks_for_no_code(model_id, "config.json", config)
        check_dimensions(model_id, config)
    except (NeedsRemoteCode, ModelRejected) as error:
        return [error.detail]
    return []


def local_blockers(model: LocalModel) -> list[str]:
    """Return the reasons to refuse a load of a model on this machine. Its weights are known to be readable.

    Returns:
        A sentence; empty if no reason is known.
    """
    if model.path is None:
        return []
    try:
        check_snapshot(model.path, model.model_id)
    except (NeedsRemoteCode, ModelRejected) as error:
        return [error.detail]
    except OSError as error:  # it was deleted a moment ago
        return [f"{model.model_id} cannot be read: {error.strerror}."]
    return []


def disabled(model_id: str) -> AccessDenied:
    """Make the error of a repository that the Hub has closed. No licence and no token gives access."""
    return AccessDenied(f"{model_id} has been disabled by the Hub, which hands out none of its files.")


def no_config(details: ModelDetails, *, has_token: bool) -> AccessDenied | ModelRejected:
    """Make the error of a model whose config.json cannot be read. It says why."""
    model_id = details.summary.model_id
    if details.disabled:
        return disabled(model_id)
    if all(file.path != "config.json" for file in details.files):
        return ModelRejected(f"{model_id} has no config.json: it is not a transformers model.")
    if details.summary.gated:
        whose = "that is the token's" if has_token else "and set HF_TOKEN, or send X-HF-Token, with a token of it"
        return ModelGated(f"{model_id} is gated: accept its licence with an account {whose}.", model_id=model_id)
    return ModelRejected(f"{model_id}: config.json is not a JSON object, or the Hub does not hand it out.")
