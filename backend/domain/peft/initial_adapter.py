"""The adapter that a run continues: what it decides of the run's settings, and why others are refused."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from core.errors import SettingRejected
from domain.peft.algorithms import SPECS, Algorithm
from domain.peft.config import PeftConfig


class CannotContinue(Exception):
    """No run can continue this adapter; the message says why."""


@dataclass(frozen=True)
class InitialAdapter:
    """An adapter whose weights a run begins with.

    Attributes:
        algorithm: The method of a run that names none.
        decided: The settings that follow from its weights: a run that asks for others is refused.
        preferred: Settings that an override may change.
    """

    id: str
    base_model_id: str
    base_revision: str | None
    algorithm: Algorithm
    decided: Mapping[str, Any]
    preferred: Mapping[str, Any] = field(default_factory=dict)

    @property
    def base(self) -> str:
        """Its base, as messages name it."""
        return self.base_model_id + (f" at {self.base_revision}" if self.base_revision is not None else "")

    def base_for(self, model_id: str | None, revision: str | None) -> tuple[str, str | None]:
        """Return the base of a run that continues it, and the base's revision.

        Raises:
            SettingRejected: The run names another.
        """
        for name, wanted, own in (
            ("model_id", model_id, self.base_model_id),
            ("revision", revision, self.base_revision),
        ):
            if wanted is not None and wanted != own:
                raise SettingRejected.of((name,), f"{self.id} belongs to {self.base}; leave {name} out")
        return self.base_model_id, self.base_revision

    @property
    def settings(self) -> dict[str, Any]:
        """What it decides, and what it prefers."""
        return {**self.decided, **self.preferred}

    def refusals(self, algorithm: Algorithm, overrides: Mapping[str, Any]) -> list[tuple[str, str]]:
        """Return the settings that contradict it, as (field, what is wrong)."""
        spec = SPECS[algorithm]
        refused = [
            ("algorithm", f"{spec.name} requires {name}={spec.fixed[name]!r}, and {self.id} has {value!r}")
            for name, value in self.decided.items()
            if name in spec.fixed and spec.fixed[name] != value
        ]
        return refused + [
            (name, f"the run continues {self.id}, which has {value!r}; leave it out")
            for name, value in self.decided.items()
            if name in overrides and not _same(overrides[name], value)
        ]


def read_initial_adapter(
    adapter_id: str,
    base_model_id: str,
    base_revision: str | None,
    algorithm: Algorithm,
    stored: Mapping[str, Any],
    trained_with: PeftConfig | None,
) -> InitialAdapter:
    """Return what an adapter decides.

    Methods that change the base while they train (PiSSA, OLoRA, LoftQ of several iterations) hand out a plain LoRA of
    twice the rank on the unmodified base. A run continues what was handed out.

    Args:
        adapter_id: Names it.
        base_model_id: What it belongs to.
        base_revision: Of the base.
        algorithm: By which it was trained.
        stored: Its adapter_config.json.
        trained_with: The configuration of its training, where that is known.

    Raises:
        CannotContinue: Its layers differ in rank or scaling, which no configuration here says.
    """
    for name in ("rank_pattern", "alpha_pattern"):
        if stored.get(name):
            raise CannotContinue(f"{adapter_id} has layers that differ in rank or scaling ({name})")
    decided: dict[str, Any] = {
        "rank": stored.get("r"),
        "alpha": stored.get("lora_alpha"),
        "use_rslora": bool(stored.get("use_rslora")),
        "use_dora": bool(stored.get("use_dora")),
        "target_modules": trained_with.target_modules if trained_with is not None else stored.get("target_modules"),
        "init_weights": "adapter",
    }
    preferred: dict[str, Any] = {}
    if trained_with is None:
        decided["target_experts"] = bool(stored.get("target_parameters"))
    else:
        decided["target_experts"] = trained_with.target_experts
        is_converted = stored.get("r") != trained_with.rank
        (preferred if is_converted else decided)["quantization"] = trained_with.quantization
    settings = decided | preferred
    likely = (algorithm, *((Algorithm.QLORA,) if settings.get("quantization") == "nf4" else ()), *SPECS)
    fitting = next(
        name for name in likely if all(settings.get(key, value) == value for key, value in SPECS[name].fixed.items())
    )
    return InitialAdapter(adapter_id, base_model_id, base_revision, fitting, decided, preferred)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, list) and isinstance(other, list):
        return sorted(one) == sorted(other)
    return bool(one == other)
