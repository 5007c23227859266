"""A configuration as a client asks for it, for the API and for the page."""

from api.peft_schemas import ConfigureRequest, ConfigureResponse
from api.peft_views import configuration_view
from services.peft_service import PeftService
from services.training.initial_adapters import InitialAdapters


def configured(body: ConfigureRequest, peft: PeftService, initial_adapters: InitialAdapters) -> ConfigureResponse:
    """Configure what is asked for. An adapter that is to be continued names the model, and the method if none is sent.

    Raises:
        SettingRejected: A setting cannot take effect.
        ModelNotFound, AdapterNotFound: What it names does not exist.
        AdapterDamaged, AdapterNotContinuable: No run can begin with the adapter.
    """
    initial = initial_adapters.get(body.initial_adapter_id) if body.initial_adapter_id is not None else None
    if initial is not None:
        model_id, revision = initial.base_for(body.model_id, body.revision)
        algorithm = body.algorithm if "algorithm" in body.model_fields_set else initial.algorithm
        body = body.model_copy(update={"model_id": model_id, "revision": revision, "algorithm": algorithm})
    where = peft.on_device(body.model_id, body.revision) if body.model_id is not None else None
    found = peft.configure(body.algorithm, body.use_case, body.overrides.sent(), where, initial)
    return configuration_view(body, found)
