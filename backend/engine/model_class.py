"""Which class of transformers loads a model for text, and through which attention it computes."""

import inspect
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.auto_factory import _get_model_class
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from engine.errors import BadModel

# Keys of a config.json that would bring code of the repository, or stored weights that are not built here.
_LEFT_OUT = frozenset({"auto_map", "quantization_config", "trust_remote_code", "transformers_version", "model_type"})


def read_config(values: dict[str, Any]) -> PreTrainedConfig:
    """Make a configuration object from a config.json. No code of the repository is run.

    Raises:
        BadModel: transformers has no such family, or its class refuses the values.
    """
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        if values.get("auto_map"):
            raise BadModel(f"{model_type} needs Python of its own, which is never run here")
        raise BadModel(f"transformers has no model type {str(model_type)[:100]!r}")
    kept = {key: value for key, value in values.items() if key not in _LEFT_OUT}
    try:
        config: PreTrainedConfig = CONFIG_MAPPING[model_type].from_dict(PreTrainedConfig._decode_special_floats(kept))
    except Exception as error:  # a class may raise anything about values that it did not expect
        raise BadModel(f"transformers does not take this config.json: {type(error).__name__}: {error}") from error
    return config


def model_class(config: PreTrainedConfig) -> tuple[Any, PreTrainedConfig]:
    """Return the class that holds the model's text part, and the configuration that it takes.

    A model of pictures and text is loaded whole, by the class that puts text out of both, where transformers has no
    class for its text part alone.

    Raises:
        BadModel: There is none that predicts the next token from text alone.
    """
    kind = config.model_type
    if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        raise BadModel(f"{kind} is an encoder: it is made to fill in masked words, not to predict the next token")
    if kind in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES:
        raise BadModel(f"{kind} is made to sort pictures, not to predict the next token")
    _keep_weights(config)
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        chosen = _get_model_class(config, MODEL_FOR_CAUSAL_LM_MAPPING)
        if chosen.config_class is config.sub_configs.get("text_config"):  # as AutoModelForCausalLM does
            return chosen, config.get_text_config()
        return chosen, config
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and not config.is_encoder_decoder:
        chosen = _get_model_class(config, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)
        if chosen.main_input_name != "input_ids":
            raise BadModel(f"{chosen.__name__} takes no text alone: it needs {chosen.main_input_name}")
        if "decoder_input_ids" in inspect.signature(chosen.forward).parameters:
            raise BadModel(f"{chosen.__name__} fills in a canvas beside the text, and does not predict the next token")
        return chosen, config
    raise BadModel(f"transformers has no class that predicts the next token with a {kind}")


def _keep_weights(config: Any) -> None:
    """Let no class change its weights as it answers.

    RWKV halves some of them after every `rescale_every` layers, against overflow in fp16, and doubles them to train: an
    adapter on them would answer otherwise than it was trained, and a merge would write halved weights. Without it the
    class gives the same logits.
    """
    for part in (config, config.get_text_config(decoder=True)):
        if hasattr(part, "rescale_every"):
            part.rescale_every = 0


def attention_of(chosen: Any) -> str:
    """Return the attention that a class computes with: PyTorch's fused one where it has it, else its own."""
    return "sdpa" if chosen._supports_sdpa else "eager"


def longest_of(config: Any) -> int | None:
    """Return how many tokens a configuration's text part takes at a time; None where it names no limit, as -1 does."""
    positions = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None
