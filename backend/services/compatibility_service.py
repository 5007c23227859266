"""Whether a fine-tune fits this machine, from the model's config alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from core.singleton import singleton
from domain.algorithms import Algorithm
from domain.configure import configure
from domain.memory_estimate import MemoryEstimate, Suggestion, Verdict, estimate, judge, suggest
from domain.model_records import ModelSummary
from domain.model_shape import read_shape
from services.embedded_model import CONFIG, MODEL_ID
from services.machine import Machine, get_machine
from services.model_facts import ModelFacts, get_model_facts
from services.peft_service import PeftService, get_peft_service


@dataclass(frozen=True)
class Fit:
    """A verdict in short."""

    verdict: Verdict
    estimate_bytes: int | None


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

    def fits(self, config_json: Mapping[str, Any]) -> dict[Algorithm, Fit] | None:
        """Judge every algorithm with its defaults, or return None where the family is not known."""
        shape = read_shape(config_json)
        if shape is None:
            return None
        device = self._machine.device("auto")
        found = {}
        for algorithm in Algorithm:
            config = configure(
                algorithm, use_case=None, overrides={}, machine=device.facts, max_positions=shape.max_positions
            ).config
            needed = estimate(shape, config, on_gpu=device.on_gpu)
            verdict = self._judge(needed, device.available_bytes)
            found[algorithm] = Fit(verdict, needed.total_bytes)
        return found

    def quick_fit(self, model: ModelSummary, algorithm: Algorithm) -> Fit | None:
        """Judge a search result whose config is on this machine; None where it would have to be fetched."""
        if model.model_id != MODEL_ID:
            return None
        fits = self.fits(CONFIG)
        return fits[algorithm] if fits is not None else None

    @staticmethod
    def _judge(needed: MemoryEstimate, available: int | None) -> Verdict:
        if available is None:
            return "unknown"
        return judge(needed.total_bytes, needed.high_bytes, available)


@singleton
def get_compatibility_service() -> CompatibilityService:
    """Return the process's compatibility service."""
    return CompatibilityService(get_machine(), get_model_facts(), get_peft_service())
