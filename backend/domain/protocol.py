"""What the services and an engine process say to each other: one JSON object a line, on a pair of pipes.

Every command carries a `request_id` and is answered by any number of events and exactly one final event
(`done`, or `failed`). `stop`, `write_checkpoint` and `shutdown` are obeyed while another command runs. An engine
that is alive says so every HEARTBEAT_S seconds, whatever it does.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from domain.models.gguf import GgufType
from domain.peft.config import PeftConfig

HEARTBEAT_S = 2.0
# File descriptors' environment variables of an engine process.
COMMAND_FD_VARIABLE = "PEFT_STUDIO_ENGINE_COMMAND_FD"
BACKEND_VARIABLE = "PEFT_STUDIO_ENGINE_BACKEND"
EVENT_FD_VARIABLE = "PEFT_STUDIO_ENGINE_EVENT_FD"


class _Line(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


class ChatMessage(_Line):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str


# Commands


class _Command(_Line):
    request_id: str


class LoadBase(_Command):
    """Load the base model that this engine holds for the rest of its life."""

    kind: Literal["load_base"] = "load_base"
    model_path: str
    config: PeftConfig
    device: str
    engine: Literal["transformers", "unsloth"]


class AttachAdapter(_Command):
    """Load an adapter from a folder onto the base, under a name."""

    kind: Literal["attach_adapter"] = "attach_adapter"
    adapter_id: str
    path: str


class DetachAdapter(_Command):
    """Take an adapter off the base and free its memory."""

    kind: Literal["detach_adapter"] = "detach_adapter"
    adapter_id: str


class Generate(_Command):
    """Continue a conversation or a text, with one adapter or with the bare base."""

    kind: Literal["generate"] = "generate"
    messages: list[ChatMessage] | None
    prompt: str | None
    adapter_id: str | None
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int | None
    stop: list[str]


class Train(_Command):
    """Train a new adapter on the base and write it to a folder.

    The run goes on from the newest checkpoint in `checkpoints_path` that verifies, and of those beyond
    `recorded_step`, whose metrics were lost, only if there is no other; without one, it starts from the base.
    `about` is what the adapter's card says of the run beside what the engine knows itself. With `hands_out` nothing is
    trained: the adapter of the checkpoint is written, as a stop with `keep` would have.
    """

    kind: Literal["train"] = "train"
    adapter_id: str
    config: PeftConfig
    dataset_path: str
    validation_path: str | None
    validation_fraction: float
    output_path: str
    base_model_id: str
    base_revision: str | None
    checkpoints_path: str
    max_checkpoint_bytes: int | None
    recorded_step: int
    about: dict[str, Any]
    hands_out: bool = False


class Analyze(_Command):
    """Say what a fine-tune would learn from a dataset, by a model's tokenizer alone."""

    kind: Literal["analyze"] = "analyze"
    model_path: str
    dataset_path: str
    rows: int
    config: PeftConfig
    example_row: int | None


class PrepareGguf(_Command):
    """Turn a GGUF file into a folder of safetensors with its tokenizer."""

    kind: Literal["prepare_gguf"] = "prepare_gguf"
    gguf_path: str
    output_path: str
    model_id: str


class PreparePickled(_Command):
    """Turn a folder of pickled weights into one of safetensors, running nothing that a pickle names."""

    kind: Literal["prepare_pickled"] = "prepare_pickled"
    source_path: str
    output_path: str
    model_id: str


class Merge(_Command):
    """Write base and adapter as one normal model into a folder. The base stays as it is.

    `about` is kept in the folder beside what the engine knows itself.
    """

    kind: Literal["merge"] = "merge"
    adapter_id: str
    adapter_path: str
    output_path: str
    base_model_id: str
    about: dict[str, Any]


class ExportGguf(_Command):
    """Write base and adapter as one GGUF file into a folder. The base stays as it is."""

    kind: Literal["export_gguf"] = "export_gguf"
    adapter_id: str
    adapter_path: str
    output_path: str
    base_model_id: str
    quantization: GgufType
    about: dict[str, Any]


StopMode = Literal["discard", "pause", "keep"]


class Stop(_Command):
    """End the command `target_id` early; it answers with its own final event.

    A training run is thrown away (`discard`), leaves a checkpoint (`pause`), or ends well with the adapter as it is
    (`keep`). Any other command ends in one way.
    """

    kind: Literal["stop"] = "stop"
    target_id: str
    mode: StopMode


class WriteCheckpoint(_Command):
    """Write a checkpoint of the training run `target_id` after the optimizer step under way."""

    kind: Literal["write_checkpoint"] = "write_checkpoint"
    target_id: str


class Shutdown(_Command):
    """Exit now."""

    kind: Literal["shutdown"] = "shutdown"


Command = Annotated[
    LoadBase
    | AttachAdapter
    | DetachAdapter
    | Generate
    | Train
    | Analyze
    | Merge
    | ExportGguf
    | PrepareGguf
    | PreparePickled
    | Stop
    | WriteCheckpoint
    | Shutdown,
    Field(discriminator="kind"),
]

# Events


class _Event(_Line):
    request_id: str


class Progress(_Event):
    """How far a command is: `fraction` 0..1, or None where it cannot be known."""

    kind: Literal["progress"] = "progress"
    stage: str
    fraction: float | None


class Token(_Event):
    """A piece of generated text."""

    kind: Literal["token"] = "token"
    text: str


class TrainingStarted(_Event):
    """What the run will do, known once the data is tokenized."""

    kind: Literal["training_started"] = "training_started"
    total_steps: int
    rows: int
    validation_rows: int
    skipped_rows: int
    truncated_rows: int
    trained_tokens: int
    trainable_parameters: int
    warnings: list[str]
    resumed_from_step: int | None
    skipped_checkpoints: list[str]


class OptimizerGroup(_Line):
    """Parameters that the optimizer treats alike. `learning_rate` is the peak, before the scheduler."""

    parameters: int
    learning_rate: float
    weight_decay: float
    betas: list[float]
    epsilon: float


class TrainingBuilt(_Event):
    """What the run is made of, read back from the modules and the optimizer before the first step.

    Types map to elements, names of modules and of storages to how many there are; lists hold the distinct values.
    """

    kind: Literal["training_built"] = "training_built"
    engine: str
    device: str
    base_types: dict[str, int]
    quantized_modules: dict[str, int]
    compute_types: list[str]
    checkpointed_modules: int
    adapted_modules: dict[str, int]
    ranks: list[float]
    scalings: list[float]
    dropouts: list[float]
    dora_modules: int
    adapter_types: dict[str, int]
    optimizer: str
    groups: list[OptimizerGroup]


class Computing(_Event):
    """How the adapter computes in this run: which library's layers, and why not the faster ones."""

    kind: Literal["computing"] = "computing"
    how: str


class StepMetrics(_Event):
    """One optimizer step. `tokens` counts all non-padding tokens so far; times are seconds.

    `grad_norm` is None where fp16 gradients overflowed and the step was left out.
    """

    kind: Literal["step"] = "step"
    step: int
    total_steps: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float | None
    step_s: float
    step_tokens: int
    tokens: int
    tokens_per_s: float
    memory_bytes: int
    elapsed_s: float
    eta_s: float


class Evaluated(_Event):
    """Mean loss a trained token over the validation rows, before the first step (0) or after `step`."""

    kind: Literal["evaluated"] = "evaluated"
    step: int
    epoch: float
    eval_loss: float
    elapsed_s: float


class CheckpointWritten(_Event):
    """A checkpoint is whole on the disk."""

    kind: Literal["checkpoint"] = "checkpoint"
    step: int
    path: str
    size_bytes: int


class Heartbeat(_Line):
    """The engine's process runs. Sent on a thread of its own."""

    kind: Literal["heartbeat"] = "heartbeat"


class Done(_Event):
    """The command ended well. `result` depends on the command; see the engine's handlers."""

    kind: Literal["done"] = "done"
    result: dict[str, Any]


class Failed(_Event):
    """The command ended in an error of the given class; the engine itself lives on."""

    kind: Literal["failed"] = "failed"
    error_class: Literal[
        "out_of_memory",
        "bad_data",
        "not_finite",
        "bad_setting",
        "bad_model",
        "disk_full",
        "cannot_save",
        "cancelled",
        "paused",
        "engine",
    ]
    message: str
    suggestions: list[str]


Event = Annotated[
    Progress
    | Token
    | TrainingStarted
    | TrainingBuilt
    | Computing
    | StepMetrics
    | Evaluated
    | CheckpointWritten
    | Heartbeat
    | Done
    | Failed,
    Field(discriminator="kind"),
]
FinalEvent = Done | Failed

COMMANDS: TypeAdapter[Command] = TypeAdapter(Command)
EVENTS: TypeAdapter[Event] = TypeAdapter(Event)


def encode(line: BaseModel) -> bytes:
    """Write a command or an event as one line of UTF-8 JSON."""
    return line.model_dump_json().encode() + b"\n"
