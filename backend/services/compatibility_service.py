"""Whether a fine-tune fits this machine, from the model's config alone."""

from dataclasses import dataclass
from typing import Any

from core.singleton import singleton
from domain.algorithms import Algorithm
from domain.architectures.registry import read_shape
from domain.memory_estimate import MemoryEstimate, Suggestion, Verdict, estimate, judge, suggest
from services.machine import Machine, get_machine
from services.model_facts import ModelFacts, get_model_facts
from services.peft_service import PeftService, get_peft_service


@dataclass(frozen=True)
class Compatibility:
    """A verdict with what led to it."""

    verdict: Verdict
    available_bytes: int | None
    estimate: MemoryEstimate | None
    reasons: list[str]
    suggestions: list[Suggestion]
    blockers: list[str]


class CompatibilityService:
    """Estimates and judges."""

    def __init__(self, machine: Machine, facts: ModelFacts, peft: PeftService) -> None:
        self._machine, self._facts, self._peft = machine, facts, peft

    def check(
        self,
        model_id: str,
        revision: str | None,
        algorithm: Algorithm,
        overrides: dict[str, Any],
        device_name: str | int,
        memory_bytes: int | None,
    ) -> Compatibility:
        """Judge a fine-tune against a device's free memory, or against `memory_bytes`.

        Raises:
            ModelNotFound, ModelGated, HubUnavailable: As the Hub says.
            SettingRejected: A setting cannot take effect.
        """
        device = self._machine.device(device_name)
        config_json = self._facts.config(model_id, revision)
        available = memory_bytes if memory_bytes is not None else device.available_bytes
        blockers = ["the repository asks to run its own Python"] if config_json.get("auto_map") else []
        shape = read_shape(config_json)
        config = self._peft.configure(
            algorithm, None, overrides, model_id=model_id, revision=revision, device=device
        ).config
        if shape is None:
            reason = f"the family {config_json.get('model_type')!r} is not one whose layers are known here"
            return Compatibility("unknown", available, None, [reason], [], blockers)
        needed = estimate(shape, config, on_gpu=device.on_gpu)
        tokens = config.batch_size * config.max_seq_length
        reasons = [f"{config.batch_size} rows of {config.max_seq_length} tokens, {tokens} a forward pass, are assumed"]
        if available is None:
            return Compatibility(
                "unknown", None, needed, [*reasons, "the device does not say what is free"], [], blockers
            )
        verdict = judge(needed.total_bytes, needed.high_bytes, available)
        reasons.append(f"{needed.total_bytes} bytes estimated, {available} free on {device.torch_name}")
        suggestions = [] if verdict == "fits" else suggest(shape, config, available, on_gpu=device.on_gpu)
        return Compatibility(verdict, available, needed, reasons, suggestions, blockers)


@singleton
def get_compatibility_service() -> CompatibilityService:
    """Return the process's compatibility service."""
    return CompatibilityService(get_machine(), get_model_facts(), get_peft_service())
