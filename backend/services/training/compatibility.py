"""Whether a fine-tune fits this machine, from the model's config alone."""

from dataclasses import replace
from typing import Any

from core.errors import AccessDenied, ModelRejected
from core.singleton import singleton
from domain.configure import configure
from domain.memory.verdict import Assessment, assess
from domain.peft.algorithms import Algorithm
from services.model_registry_service import get_model_facts
from services.models.facts import ModelFacts
from services.peft_service import PeftService, get_peft_service


class CompatibilityService:
    """Estimates and judges."""

    def __init__(self, facts: ModelFacts, peft: PeftService) -> None:
        self._facts, self._peft = facts, peft

    def check(
        self,
        model_id: str,
        revision: str | None,
        algorithm: Algorithm,
        overrides: dict[str, Any],
        device_name: str | int,
        memory_bytes: int | None,
    ) -> Assessment:
        """Judge a fine-tune against a device's free memory, or against `memory_bytes`.

        A reason for which a load would refuse the model is a blocker. The verdict is then `unknown`.

        Raises:
            ModelNotFound, HubUnavailable: As the Hub says.
            SettingRejected: A setting cannot take effect.
        """
        device = self._peft.device(device_name)
        if memory_bytes is not None:
            device = replace(device, available_bytes=memory_bytes)
        blockers = self._facts.blockers(model_id, revision)
        try:
            described = self._facts.described(model_id, revision)
        except (AccessDenied, ModelRejected):
            if not blockers:
                raise
            configure(algorithm, use_case=None, overrides=overrides, machine=device.facts)
            return Assessment("unknown", device.available_bytes, None, ["config.json is not to be had"], [], blockers)
        shape = described.shape
        if not described.loadable and not blockers:
            blockers = [f"an engine cannot load it: {described.problem}"]
        config = configure(
            algorithm,
            use_case=None,
            overrides=overrides,
            machine=device.facts,
            shape=shape,
            available_bytes=device.available_bytes,
        ).config
        assessment = assess(
            shape,
            config,
            device.available_bytes,
            on_gpu=device.on_gpu,
            unsloth=device.facts.unsloth,
            siblings=self._facts.siblings,
        )
        if shape is None:
            unknown = f"what it is made of is not known: {described.problem}"
            assessment = replace(assessment, reasons=[unknown])
        if blockers:
            return replace(assessment, verdict="unknown", suggestions=[], blockers=[*blockers, *assessment.blockers])
        return assessment


@singleton
def get_compatibility_service() -> CompatibilityService:
    """Return the process's compatibility service."""
    return CompatibilityService(get_model_facts(), get_peft_service())
