"""From a use case, an algorithm and overrides to a complete configuration, each value with its reason."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from pydantic import ValidationError

from core.errors import SettingRejected
from domain.experts import decide, obstacle, what_is_left_out
from domain.memory.activations import missing_targets
from domain.memory.estimate import TrainedRole, estimate, trained_by_role
from domain.memory.hardware_fit import fit_to_memory
from domain.memory.unsloth import UnslothHere
from domain.memory.verdict import judge
from domain.models.records import Verdict
from domain.models.shape import ModelShape, Role
from domain.peft.algorithms import SPECS, Algorithm, AlgorithmSpec
from domain.peft.config import DECOMPOSED, PARAMETER_NAMES, PeftConfig
from domain.peft.initial_adapter import InitialAdapter
from domain.peft.learning_rate import default_learning_rate
from domain.peft.objectives import SPECS as OBJECTIVE_SPECS
from domain.peft.objectives import Objective
from domain.peft.targets import why_refused
from domain.peft.use_cases import USE_CASES, UseCaseId

Source = Literal["default", "use_case", "algorithm", "hardware", "adapter", "override"]


@dataclass(frozen=True)
class MachineFacts:
    """What the configuration needs to know of the machine.

    Attributes:
        has_gpu: Whether training will run on a CUDA GPU.
        supports_bf16: Whether that GPU computes in bfloat16 (compute capability 8.0 and later).
        unsloth: Unsloth, where it can hold a base on that GPU; its memory is counted for what it would hold.
    """

    has_gpu: bool
    supports_bf16: bool
    unsloth: UnslothHere | None = None


@dataclass(frozen=True)
class Choice:
    """Where a value came from and why."""

    value: Any
    source: Source
    reason: str


@dataclass(frozen=True)
class Fit:
    """How a configuration compares with what the machine has free."""

    verdict: Verdict
    estimate_bytes: int
    available_bytes: int


@dataclass(frozen=True)
class Configuration:
    """A complete configuration and, for every parameter, where its value came from.

    Attributes:
        fit: Whether it fits the machine, with all rows as long as they may be; None where the model's layers or the
            free memory are not known.
        trained: What will be trained, by what the modules do; None where the model's layers are not known.
    """

    config: PeftConfig
    choices: Mapping[str, Choice]
    fit: Fit | None
    trained: list[TrainedRole] | None = None


# Sources: "LoRA Without Regret" (thinkingmachines.ai/blog/lora) for rank, alpha and target modules; QLoRA (arXiv
# 2305.14314), figure 2, table 9 and appendix B, for targets, dropout and warm-up; "Straight to Zero" (arXiv 2502.15938)
# for the decay; Hugging Face's TrainingArguments for clipping and weight decay. The learning rate is in
# `domain.peft.learning_rate`, what the device decides in `domain.memory.hardware_fit`.
_DEFAULTS: dict[str, tuple[Any, str]] = {
    "rank": (16, "enough for most instruction tuning ('LoRA Without Regret': capacity, not rank, matters)"),
    "alpha": (32, "32 at every rank, as in 'LoRA Without Regret': the best rate then hardly depends on the rank"),
    "dropout": (0.05, "QLoRA paper, appendix B: 0.05 for small models"),
    "target_modules": ("all-linear", "adapting every linear layer matters most (QLoRA paper, figure 2)"),
    "target_experts": ("auto", "decided by the model and the memory; where these are not known, stacked ones stay"),
    "bias": ("none", "the base's biases are shared by all adapters on it"),
    "use_rslora": (False, "scaled by alpha / r"),
    "use_dora": (False, "direction and magnitude are not separated"),
    "init_weights": ("default", "B starts at zero, so training starts from the base's output"),
    "objective": ("sft", "the answers of the data are learned"),
    "preference_beta": (None, "only preferences have a weight"),
    "quantization": ("none", "weights as published"),
    "epochs": (3.0, "small sets are seen a few times"),
    "max_steps": (None, "epochs decide"),
    "warmup_ratio": (0.03, "QLoRA paper, appendix B"),
    "scheduler": ("linear", "decay to zero beats other schedules at equal compute (arXiv 2502.15938)"),
    "min_learning_rate_ratio": (0.0, "the decay goes to zero"),
    "weight_decay": (0.0, "adapters are regularised by their rank"),
    "max_grad_norm": (1.0, "the common clip of the Hugging Face Trainer"),
    "adam_beta1": (0.9, "Adam's paper, arXiv 1412.6980, algorithm 1"),
    "adam_beta2": (0.999, "Adam's paper, arXiv 1412.6980, algorithm 1"),
    "adam_epsilon": (1e-8, "Adam's paper, arXiv 1412.6980, algorithm 1"),
    "neftune_noise_alpha": (0.0, "no noise; NEFTune (arXiv 2310.05914) takes 5 to 15"),
    "max_seq_length": (2048, "several turns"),
    "packing": (False, "rows of like length are batched together instead"),
    "train_on": ("assistant", "loss on answers only"),
    "seed": (42, "any fixed number makes a run repeatable"),
    "eval_every_steps": (None, "evaluated once at the end if there are validation rows"),
    "early_stopping_patience": (None, "the run goes to its end"),
    "checkpoint_every_steps": (None, "checkpoints go by time"),
    "checkpoint_every_minutes": (5.0, "what is lost to a crash is trained again in five minutes"),
    "lora_plus_ratio": (None, "A and B learn at one rate"),
    "loftq_iterations": (None, "only LoftQ corrects a rounding"),
    "keep_checkpoints": (2, "an older one is there if the newest is damaged"),
}


def _hardware_choices(machine: MachineFacts) -> dict[str, Choice]:
    if not machine.has_gpu:
        reason = "no CUDA GPU: "
        values: dict[str, tuple[Any, str]] = {
            "precision": ("fp32", reason + "CPUs without bf16 matrix units are slower in bf16"),
            "batch_size": (4, reason + "larger batches gain nothing on a CPU"),
            "gradient_accumulation": (1, reason + "small effective batches learn more a pass"),
            "gradient_checkpointing": (False, reason + "host memory is ample and recomputing is slow"),
            "optimizer": ("adamw", reason + "bitsandbytes' 8-bit optimizer runs on GPUs"),
        }
    else:
        precision = "bf16" if machine.supports_bf16 else "fp16"
        values = {
            "precision": (precision, f"the GPU computes in {precision}"),
            "batch_size": (2, "activations of two rows fit most GPUs"),
            "gradient_accumulation": (
                4,
                "an effective batch of eight: LoRA loses by large ones",
            ),
            "gradient_checkpointing": (True, "saves most of the activation memory"),
            # Whatever the memory: it costs neither quality nor speed.
            "optimizer": ("adamw_8bit", "a quarter of AdamW's state at equal quality (arXiv 2110.02861)"),
        }
    return {name: Choice(value, "hardware", why) for name, (value, why) in values.items()}


def configure(
    algorithm: Algorithm,
    *,
    use_case: UseCaseId | None,
    overrides: Mapping[str, Any],
    machine: MachineFacts,
    shape: ModelShape | None = None,
    available_bytes: int | None = None,
    initial: InitialAdapter | None = None,
) -> Configuration:
    """Make a complete configuration.

    Precedence, lowest first: default, use case, algorithm, hardware, initial adapter, override. What defines the
    algorithm or follows from the initial adapter cannot be overridden.

    Args:
        algorithm: The method.
        use_case: The purpose, or None for the general defaults.
        overrides: What the client sets itself, by parameter name.
        machine: The device that will train.
        shape: The model, if one is named and its layers are known.
        available_bytes: What the machine has free for it, if known: the batch is chosen to fit.
        initial: The adapter whose weights the run begins with, if it continues one.

    Raises:
        SettingRejected: An override contradicts the algorithm, the machine, the initial adapter or another setting;
            `errors` lists every one of them with its location.
    """
    choices = {name: Choice(value, "default", why) for name, (value, why) in _DEFAULTS.items()}
    if use_case is not None:
        case = USE_CASES[use_case]
        choices |= {n: Choice(v, "use_case", f"{case.name}: {case.reasons[n]}") for n, v in case.defaults.items()}
    choices |= _algorithm_choices(algorithm, choices)
    choices |= _hardware_choices(machine)
    if shape is not None:
        choices |= _model_choices(shape, choices)
    choices |= _follow_overrides(algorithm, overrides)
    choices |= _objective_choices(overrides.get("objective", "sft"))
    choices |= _initial_choices(initial)
    asked = {name: Choice(value, "override", "asked for") for name, value in overrides.items()}
    choices |= {"learning_rate": _learning_rate(shape, algorithm, use_case, choices | asked)} | asked
    _refuse(initial.refusals(algorithm, overrides) if initial is not None else _refused_start(overrides))
    config = _validated(algorithm, choices, overrides, machine, shape)
    if shape is not None:
        choices["target_experts"] = _experts(shape, config, available_bytes, choices, overrides, machine)
        config = config.model_copy(update={"target_experts": choices["target_experts"].value})
    fit = None
    if shape is not None and available_bytes is not None:
        choices |= _memory_choices(shape, config, available_bytes, overrides, machine)
        config = config.model_copy(update={name: choices[name].value for name in PARAMETER_NAMES})
        on_gpu, unsloth = machine.has_gpu, machine.unsloth
        needed = estimate(shape, config, on_gpu=on_gpu, unsloth=unsloth, available_bytes=available_bytes)
        fit = Fit(judge(needed, available_bytes, unsloth), needed.total_bytes, available_bytes)
    trained = trained_by_role(shape, config) if shape is not None else None
    return Configuration(config, {name: choices[name] for name in PARAMETER_NAMES}, fit, trained)


def _validated(
    algorithm: Algorithm,
    choices: Mapping[str, Choice],
    overrides: Mapping[str, Any],
    machine: MachineFacts,
    shape: ModelShape | None,
) -> PeftConfig:
    values = {name: choices[name].value for name in PARAMETER_NAMES}
    _refuse(_contradictions(algorithm, values, overrides, machine, shape))
    try:
        config = PeftConfig.model_validate(values)
    except ValidationError as error:
        problems = [
            {"location": [str(part) for part in item["loc"]], "message": f"{item['loc'][0]}: {item['msg']}"}
            for item in error.errors(include_input=False)
        ]
        raise SettingRejected("; ".join(str(item["message"]) for item in problems), errors=problems) from error
    why = obstacle(shape, config) if config.target_experts is True else None
    _refuse([("target_experts", f"experts cannot be adapted: {why}")] if why is not None else [])
    return config


def _model_choices(shape: ModelShape, choices: Mapping[str, Choice]) -> dict[str, Choice]:
    """Follow the model: no row longer than it knows; what of it is left out of all linear modules is said."""
    changed = {}
    if shape.max_positions is not None and choices["max_seq_length"].value > shape.max_positions:
        changed["max_seq_length"] = Choice(shape.max_positions, "default", "the longest sequence that the model knows")
    left_out = _left_out(shape)
    if left_out:
        reason = f"{choices['target_modules'].reason}; left out: {', '.join(left_out)}"
        changed["target_modules"] = Choice("all-linear", "default", reason)
    return changed


def _experts(
    shape: ModelShape,
    config: PeftConfig,
    available_bytes: int | None,
    choices: Mapping[str, Choice],
    overrides: Mapping[str, Any],
    machine: MachineFacts,
) -> Choice:
    """Choose whether experts are adapted where that is left open, and say what does not reach them."""
    choice = choices["target_experts"]
    if choice.value == "auto":
        decision = decide(shape, config, available_bytes, overrides, on_gpu=machine.has_gpu)
        choice = Choice(decision.adapted, "hardware" if decision.by_memory else "default", decision.reason)
    notes = what_is_left_out(shape, config.model_copy(update={"target_experts": choice.value}))
    return Choice(choice.value, choice.source, "; ".join([choice.reason, *notes]))


# What is said of modules that `all-linear` leaves out.
_WHY_LEFT_OUT: Mapping[Role, str] = MappingProxyType(
    {
        "router": "{} routers, which choose the experts",
        "tower": "{} modules for pictures or sound, through which no text passes",
        "unreached": "{} modules that no gradient reaches",
        "refused": "{} modules on which PEFT puts no adapter, or only together with stacked experts",
        "bypassed": "{} modules whose weight is read past them",
        "special": "{} modules that compute more than a product",
    }
)


def _left_out(shape: ModelShape) -> list[str]:
    counts: Counter[Role] = Counter()
    for linear, count in shape.linears():
        counts[linear.role] += count
    left_out = [words.format(counts[role]) for role, words in _WHY_LEFT_OUT.items() if counts[role]]
    experts = sum(len(block.part.stacked) * block.count for block in shape.blocks)
    said = f"{experts} tensors of stacked experts, which are no linear modules (see target_experts)"
    return [*left_out, said] if experts else left_out


def _memory_choices(
    shape: ModelShape,
    config: PeftConfig,
    available_bytes: int,
    overrides: Mapping[str, Any],
    machine: MachineFacts,
) -> dict[str, Choice]:
    """Choose what the memory decides; the effective batch stays."""
    on_gpu, unsloth = machine.has_gpu, machine.unsloth
    changes = fit_to_memory(shape, config, available_bytes, overrides, on_gpu=on_gpu, unsloth=unsloth)
    changed = config.model_copy(update=dict(changes))
    needed = estimate(shape, changed, on_gpu=on_gpu, unsloth=unsloth, available_bytes=available_bytes)
    rows, gib = f"{config.max_seq_length} tokens a row", f"{available_bytes / 2**30:.1f} GiB free"
    if needed.engine == "unsloth":
        gib += " with Unsloth"
    reason = {
        "fits": f"so that {rows} fit the {gib}",
        "tight": f"so that {rows} just fit the {gib}",
    }.get(judge(needed, available_bytes, unsloth), f"needs least, but {rows} do not fit the {gib} in any way")
    return {name: Choice(value, "hardware", reason) for name, value in changes.items()}


def _learning_rate(
    shape: ModelShape | None, algorithm: Algorithm, use_case: UseCaseId | None, choices: Mapping[str, Choice]
) -> Choice:
    """Take the rate for the model and the scaling as they are, times what the use case wants."""
    alpha, use_rslora = choices["alpha"].value, choices["use_rslora"].value
    ratio = choices["lora_plus_ratio"].value
    rate, reason = default_learning_rate(shape, algorithm, alpha=alpha, use_rslora=use_rslora, lora_plus_ratio=ratio)
    objective = OBJECTIVE_SPECS.get(choices["objective"].value)
    if objective is not None and objective.rate_factor != 1.0:
        slower = f"a twentieth, as TRL's defaults for {objective.name} and for SFT are 1e-6 and 2e-5"
        return Choice(rate * objective.rate_factor, "default", f"{objective.name}: {slower}; times {reason}")
    case = USE_CASES[use_case] if use_case is not None else None
    if case is None or case.rate_factor == 1.0:
        return Choice(rate, "algorithm" if SPECS[algorithm].unscaled else "default", reason)
    return Choice(
        rate * case.rate_factor, "use_case", f"{case.name}: {case.rate_reason}; {case.rate_factor:g} times {reason}"
    )


def _algorithm_choices(algorithm: Algorithm, choices: Mapping[str, Choice]) -> dict[str, Choice]:
    spec = SPECS[algorithm]
    values = {**spec.defaults, **spec.fixed}
    if spec.unscaled:
        values |= {"alpha": choices["rank"].value, "dropout": 0.0}
    return {
        name: Choice(value, "algorithm", f"{spec.name}: {spec.reasons.get(name, choices[name].reason)}")
        for name, value in values.items()
    }


# TRL's DPOConfig, KTOConfig and ORPOConfig have this weight; the DPO paper (arXiv 2305.18290, appendix B) too.
_PREFERENCE_BETA = 0.1


def _objective_choices(objective: Objective) -> dict[str, Choice]:
    """Return what learning from preferences needs otherwise than learning answers."""
    spec = OBJECTIVE_SPECS.get(objective)
    if spec is None or objective == "sft":
        return {}  # what is no objective is refused with the other settings
    both = "both answers" if spec.sequences == 2 else "the answer"
    values: dict[str, tuple[Any, str]] = {
        "preference_beta": (_PREFERENCE_BETA, f"the usual weight (TRL's, and {spec.paper})"),
        "dropout": (0.0, "the two sides are compared, and dropout would differ between them"),
        "train_on": ("assistant", f"{both} of a row count, the turns before do not"),
    }
    if objective == "kto":
        values["batch_size"] = (4, "KTO compares each answer with the others of its pass")
    return {name: Choice(value, "default", f"{spec.name}: {why}") for name, (value, why) in values.items()}


def _objective_refusals(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Refuse what cannot be combined with learning from preferences, or has no effect without."""
    objective: Objective = values["objective"]
    if objective not in OBJECTIVE_SPECS:
        return []  # the configuration's own check says so
    spec = OBJECTIVE_SPECS[objective]
    if objective == "sft":
        given = overrides.get("preference_beta") is not None
        return [("preference_beta", "has no effect with objective='sft'")] if given else []
    refusals = []
    if values["preference_beta"] is None:
        refusals.append(("preference_beta", f"{spec.name} needs a weight"))
    if values["train_on"] != "assistant":
        refusals.append(("train_on", f"{spec.name} compares answers: only 'assistant' has a meaning"))
    if spec.refers and values["init_weights"] in DECOMPOSED:
        why = "compares with the base under the adapter, which this method changes; use lora, rslora, dora or qlora"
        refusals.append(("objective", f"{spec.name} {why}"))
    if objective == "kto" and values["batch_size"] == 1:
        refusals.append(("batch_size", "KTO compares each answer with the others of its pass: at least 2"))
    return refusals


def _initial_choices(initial: InitialAdapter | None) -> dict[str, Choice]:
    """Return what the adapter that a run continues decides or prefers."""
    if initial is None:
        return {}
    choices = {
        name: Choice(value, "adapter", f"{initial.id}, which the run continues, has it")
        for name, value in initial.decided.items()
    }
    choices["init_weights"] = Choice("adapter", "adapter", f"A and B are those of {initial.id}")
    return choices | {
        name: Choice(value, "adapter", f"{initial.id}, which the run continues, was trained with it")
        for name, value in initial.preferred.items()
    }


def _refused_start(overrides: Mapping[str, Any]) -> list[tuple[str, str]]:
    if overrides.get("init_weights") != "adapter":
        return []
    return [("init_weights", "'adapter' needs an initial_adapter_id, the adapter that the run continues")]


def _follow_overrides(algorithm: Algorithm, overrides: Mapping[str, Any]) -> dict[str, Choice]:
    """Keep a scaling of one where the client sets the rank alone; elsewhere alpha is the same at every rank."""
    spec = SPECS[algorithm]
    if not spec.unscaled or "rank" not in overrides:
        return {}
    return {"alpha": Choice(overrides["rank"], "algorithm", f"{spec.name}: {spec.reasons['alpha']}")}


def _contradictions(
    algorithm: Algorithm,
    values: Mapping[str, Any],
    overrides: Mapping[str, Any],
    machine: MachineFacts,
    shape: ModelShape | None,
) -> list[tuple[str, str]]:
    refusals = _method_refusals(SPECS[algorithm], overrides)
    if overrides.get("loftq_iterations") is not None and values["init_weights"] != "loftq":
        refusals.append(("loftq_iterations", "without effect but with the algorithm 'loftq'"))
    refusals += _objective_refusals(values, overrides)
    if not machine.has_gpu:
        refusals += _cpu_refusals(values)
    if shape is not None:
        refusals += _model_refusals(shape, values)
    if overrides.get("max_steps") is not None and "epochs" in overrides:
        refusals.append(("epochs", "has no effect beside max_steps; send one of them"))
    if values["scheduler"] == "constant" and values["min_learning_rate_ratio"] > 0:
        refusals.append(("min_learning_rate_ratio", "has no effect with scheduler='constant', which does not decay"))
    if values["early_stopping_patience"] is not None and values["eval_every_steps"] is None:
        refusals.append(("early_stopping_patience", "early stopping needs eval_every_steps"))
    return refusals


def _refuse(refusals: list[tuple[str, str]]) -> None:
    if refusals:
        errors = [{"location": [name], "message": f"{name}: {message}"} for name, message in refusals]
        raise SettingRejected("; ".join(f"{name}: {message}" for name, message in refusals), errors=errors)


def require_device(config: PeftConfig, machine: MachineFacts) -> None:
    """Refuse a finished configuration that the device cannot compute: it was made for another machine.

    The rules that `configure` has beside are for new configurations, and are not asked again.

    Raises:
        SettingRejected: The device lacks what it takes; `errors` says what, with its location.
    """
    if not machine.has_gpu:
        _refuse(_cpu_refusals(config.model_dump()))


def _method_refusals(spec: AlgorithmSpec, overrides: Mapping[str, Any]) -> list[tuple[str, str]]:
    refusals = []
    for name, value in overrides.items():
        if name in spec.fixed and value != spec.fixed[name]:
            refusals.append((name, f"{spec.name} requires {name}={spec.fixed[name]!r}: {spec.reasons[name]}"))
        for refused, reason in spec.refused.get(name, {}).items():
            if value == refused:
                refusals.append((name, f"{name}={value!r} cannot be used with {spec.name}: {reason}"))
    return refusals


def _model_refusals(shape: ModelShape, values: Mapping[str, Any]) -> list[tuple[str, str]]:
    refusals = []
    if shape.max_positions is not None and values["max_seq_length"] > shape.max_positions:
        refusals.append(("max_seq_length", f"the model knows sequences of at most {shape.max_positions} tokens"))
    if values["packing"] and shape.carries_state:
        refusals.append(("packing", "the model's layers carry a state from one row of a sequence to the next"))
    missing = missing_targets(shape, values["target_modules"])
    if missing:
        known = {linear.path.rpartition(".")[2] for linear, _ in shape.linears()}
        refusals.append(("target_modules", why_refused(missing, known, tied=shape.tied_embeddings)))
    return refusals


def _cpu_refusals(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    refusals = {
        ("precision", "fp16"): "fp16 needs a CUDA GPU; use fp32 or bf16",
        ("optimizer", "adamw_8bit"): "the 8-bit optimizer needs a CUDA GPU; use adamw",
        ("quantization", "int8"): "int8 needs a CUDA GPU; nf4 works on a CPU",
    }
    return [(name, why) for (name, refused), why in refusals.items() if values[name] == refused]
