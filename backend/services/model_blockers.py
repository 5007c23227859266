"""What keeps a model of the Hub from being loaded here, however much memory there is."""

from collections.abc import Sequence

from core.errors import ModelRejected, NeedsRemoteCode
from domain.config_checks import check_asks_for_no_code, check_dimensions
from domain.model_records import ModelDetails, weight_files
from services.model_safety import no_safe_weights


def blockers_of(details: ModelDetails, *, has_token: bool) -> list[str]:
    """Say what a load would be refused for, from what the Hub lists and from config.json.

    Args:
        details: The model as the Hub describes it.
        has_token: Whether the Hub was asked with somebody's token.

    Returns:
        A sentence each; empty where nothing is known to be in the way.
    """
    model_id, paths = details.summary.model_id, [file.path for file in details.files]
    found = [*_config_blockers(details, paths, has_token=has_token)]
    if details.requires_remote_code and not any("never run here" in reason for reason in found):
        found.append(f"{model_id} asks to run its own Python; it is never run here.")
    if not weight_files(paths):
        found.append(no_safe_weights(model_id, paths).detail)
    return found


def _config_blockers(details: ModelDetails, paths: Sequence[str], *, has_token: bool) -> list[str]:
    model_id = details.summary.model_id
    if details.config is not None:
        try:
            check_asks_for_no_code(model_id, "config.json", details.config)
            check_dimensions(model_id, details.config)
        except (NeedsRemoteCode, ModelRejected) as error:
            return [error.detail]
        return []
    if "config.json" not in paths:
        return [f"{model_id} has no config.json: it is not a transformers model."]
    if details.summary.gated:
        whose = "that is the token's" if has_token else "and set HF_TOKEN, or send X-HF-Token, with a token of it"
        return [f"{model_id} is gated: accept its licence with an account {whose}."]
    return [f"{model_id}: config.json is not a JSON object, or the Hub does not hand it out."]
