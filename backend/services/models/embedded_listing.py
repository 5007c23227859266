"""The embedded model as the registry shows it, before it is prepared."""

from domain.models.records import ModelSummary
from services.models.embedded import CONFIG, MODEL_ID, PARAMETERS, SIZE_BYTES, get_embedded_model
from services.models.local import LocalModel


def embedded_local_model() -> LocalModel:
    """Describe the model by what is known of its package. Once it is prepared, its folder is read instead."""
    summary = ModelSummary(
        model_id=MODEL_ID,
        author=MODEL_ID.split("/")[0],
        task="text-generation",
        library="transformers",
        license="apache-2.0",
        gated=False,
        parameters=PARAMETERS,
        size_bytes=SIZE_BYTES,
        architecture="LlamaForCausalLM",
        local=True,
    )
    return LocalModel(MODEL_ID, get_embedded_model().path, summary, None, dict(CONFIG))
