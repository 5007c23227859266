"""The complete configuration of a fine-tune: every parameter, its type, range and meaning, in one place."""

from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, create_model, model_validator

from domain.peft.foreign_names import instead_of
from domain.peft.objectives import Objective

TargetModuleName = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9_.]+$")]

# Initialisations that decompose each target's weight in fp32. Each is a method of its own in `domain.peft.algorithms`,
# and has its arithmetic in `engine.decompositions`.
Decomposed = Literal["pissa", "olora", "loftq"]
DECOMPOSED: tuple[Decomposed, ...] = get_args(Decomposed)


class PeftConfig(BaseModel):
    """Every setting of a fine-tune. Instances are complete: nothing is left to a library's default."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    rank: int = Field(ge=1, le=1024, description="Rank r of the low-rank matrices.")
    alpha: int = Field(ge=1, le=4096, description="Scaling numerator: alpha / r, or alpha / √r with rsLoRA.")
    dropout: float = Field(ge=0, lt=1, description="Dropout on the adapter's input while training, 0..1.")
    target_modules: Literal["all-linear"] | Annotated[list[TargetModuleName], Field(min_length=1, max_length=64)] = (
        Field(description="Names of the linear layers to adapt, or 'all-linear' for all but the output head.")
    )
    target_experts: Literal["auto"] | bool = Field(
        description="Whether a model's experts are adapted as well, each with the same rank: those that are stacked in "
        "one tensor, and those that are modules of a list. 'auto' adapts them where target_modules is 'all-linear', "
        "the method can, and the memory is known to suffice. Dropout is left out on stacked experts."
    )
    bias: Literal["none"] = Field(description="Which biases are trained. Only 'none': see the constraints.")
    use_rslora: bool = Field(description="Scale by alpha / √r (rsLoRA).")
    use_dora: bool = Field(description="Train magnitudes beside directions (DoRA).")
    init_weights: Literal["default", "gaussian", "adapter", Decomposed] = Field(
        description="How A and B start; 'adapter': as those of the job's initial_adapter_id."
    )
    objective: Objective = Field(
        description="What is learned: 'sft' the answers themselves, 'dpo' and 'orpo' which of two answers is better, "
        "'kto' which answers are good."
    )
    preference_beta: float | None = Field(
        gt=0, le=100, description="DPO's and KTO's β, ORPO's λ; null without a preference to weigh."
    )
    quantization: Literal["none", "nf4", "int8"] = Field(description="How the base's linear weights are stored.")
    precision: Literal["fp32", "bf16", "fp16"] = Field(description="Type of the base's weights and of the compute.")
    learning_rate: float = Field(gt=0, le=1, description="Peak learning rate.")
    batch_size: int = Field(ge=1, le=1024, description="Rows a forward pass.")
    gradient_accumulation: int = Field(ge=1, le=1024, description="Forward passes an optimizer step.")
    epochs: float = Field(gt=0, le=1000, description="Passes over the data, unless max_steps is set.")
    max_steps: int | None = Field(ge=1, le=10_000_000, description="Optimizer steps; overrides epochs.")
    warmup_ratio: float = Field(ge=0, le=1, description="Fraction of the steps in which the rate rises, 0..1.")
    scheduler: Literal["linear", "cosine", "constant"] = Field(description="Learning rate after the warm-up.")
    min_learning_rate_ratio: float = Field(
        ge=0, lt=1, description="Where the decay ends, as a part of the peak: 0 decays to zero."
    )
    weight_decay: float = Field(ge=0, le=1, description="Decoupled weight decay of AdamW.")
    max_grad_norm: float = Field(gt=0, le=1e6, description="Gradients are clipped to this global 2-norm.")
    max_seq_length: int = Field(ge=8, le=1_048_576, description="Tokens a row; longer rows are truncated.")
    packing: bool = Field(description="Put several rows in one sequence, kept apart by position ids.")
    optimizer: Literal["adamw", "adamw_8bit"] = Field(description="AdamW in fp32, or bitsandbytes' 8-bit AdamW.")
    adam_beta1: float = Field(ge=0, lt=1, description="Decay of Adam's mean of the gradients.")
    adam_beta2: float = Field(ge=0, lt=1, description="Decay of Adam's mean of their squares.")
    adam_epsilon: float = Field(gt=0, le=1, description="Added to the root of that mean.")
    neftune_noise_alpha: float = Field(
        ge=0, le=1000, description="NEFTune: uniform noise of alpha / √(tokens · hidden size) on the embeddings."
    )
    gradient_checkpointing: bool = Field(description="Recompute activations to save memory.")
    train_on: Literal["assistant", "last_assistant", "all"] = Field(description="Which tokens carry loss.")
    seed: int = Field(ge=0, le=2**31 - 1, description="Seeds initialisation, dropout and the order of rows.")
    eval_every_steps: int | None = Field(ge=1, le=10_000_000, description="Steps between evaluations.")
    early_stopping_patience: int | None = Field(
        ge=1,
        le=1000,
        description="Stop after this many evaluations without a lower loss, and hand out the best one's weights.",
    )
    checkpoint_every_steps: int | None = Field(ge=1, le=10_000_000, description="Steps between checkpoints.")
    checkpoint_every_minutes: float | None = Field(gt=0, le=10_080, description="Minutes between checkpoints.")
    lora_plus_ratio: float | None = Field(
        ge=1, le=256, description="LoRA+: how many times A's learning rate B's is; null for one rate."
    )
    loftq_iterations: int | None = Field(
        ge=1, le=20, description="LoftQ: how often rounding and its correction alternate."
    )
    keep_checkpoints: int = Field(ge=1, le=1000, description="How many checkpoints a job keeps; the newest always.")


PARAMETER_NAMES: tuple[str, ...] = tuple(PeftConfig.model_fields)
# The values of settings that older runs did not have, as those runs behaved.
_BEFORE: dict[str, Any] = {
    "min_learning_rate_ratio": 0.0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "neftune_noise_alpha": 0.0,
    "lora_plus_ratio": None,
    "loftq_iterations": None,
    "objective": "sft",
    "preference_beta": None,
    "target_experts": "auto",  # experts in a list were adapted, and stacked ones were not
}


def recorded(values: object) -> PeftConfig:
    """Read a stored configuration. It may be older than some of the settings.

    Raises:
        ValidationError: The value is no configuration.
    """
    return PeftConfig.model_validate(_BEFORE | values if isinstance(values, dict) else values)


class OverridesBase(BaseModel):
    """A part of a configuration: what the client sets itself. Unknown names are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_foreign_names(cls, values: Any) -> Any:
        """Refuse other programs' names for settings by saying what to send instead."""
        known = instead_of(values) if isinstance(values, dict) else []
        if known:
            raise ValueError("; ".join(known))
        return values

    def sent(self) -> dict[str, Any]:
        """Return only what the client sent, an explicit null included."""
        return {name: getattr(self, name) for name in self.model_fields_set}


# Same annotation and bounds as PeftConfig, but absent by default: pydantic does not validate defaults, so an
# explicit null is refused wherever the parameter itself cannot be null.
PeftOverrides: type[OverridesBase] = create_model(  # type: ignore[call-overload]
    "PeftOverrides",
    __base__=OverridesBase,
    __module__=__name__,
    **{
        name: (field.rebuild_annotation(), Field(default=None, description=field.description))
        for name, field in PeftConfig.model_fields.items()
    },
)
