"""What the services and an engine process say to each other: one JSON object a line, on a pair of pipes.

Every command carries a `request_id` and is answered by any number of events and exactly one final event
(`done` with its result, or `failed`). `Merge(Command[MergedModel, Progress])` says the types: the answer is a
MergedModel, and the events before it are of Progress. Signals are obeyed while a command runs, and are not answered. An
engine that is alive says so every HEARTBEAT_S seconds, whatever it does. Only one that rests, after `WarmUp`, says
nothing until its next command.
"""

import uuid
from collections.abc import Callable
from typing import Annotated, Any, Generic, Literal, Never, Self, TypeVar, cast, get_args

from pydantic import BaseModel, ConfigDict, Field, JsonValue, TypeAdapter

from domain.answer_forms import AnswerForm
from domain.exports import ExportCheck, GgufFile, MergedModel
from domain.jobs.figures import TrainingFigures
from domain.jobs.progress import PreferenceFigures, StepFigures
from domain.models.gguf import GgufType
from domain.peft.config import PeftConfig
from domain.results import (
    DatasetFigures,
    Described,
    Generated,
    Loaded,
    MemoryHeld,
    Prepared,
    TokenChances,
    WarmedUp,
)

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


class ChatTurn(ChatMessage):
    """One turn of a conversation with what only some have: calls of tools, and their answers."""

    content: str = ""
    name: str | None = None
    tool_calls: list[dict[str, JsonValue]] | None = None
    tool_call_id: str | None = None


# Events


class _Event(_Line):
    request_id: str

    def data(self) -> dict[str, Any]:
        """Return what it says, as a job's event is stored and streamed."""
        return self.model_dump(mode="json", exclude={"request_id", "kind"})


class Progress(_Event):
    """How far a command is: `fraction` 0..1, or None where it cannot be known."""

    kind: Literal["progress"] = "progress"
    stage: str
    fraction: float | None


class Token(_Event):
    """A piece of generated text, and the chances of its tokens if they were asked for."""

    kind: Literal["token"] = "token"
    text: str
    chances: list[TokenChances] = Field(default_factory=list)


class TrainingStarted(_Event):
    """What the run will do, known once the data is tokenized."""

    kind: Literal["started"] = "started"
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
    `loss` says in words how it is computed: by chunks of tokens, or over all logits at once and why.
    """

    kind: Literal["built"] = "built"
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
    loss: str
    groups: list[OptimizerGroup]


class Computing(_Event):
    """How the adapter computes in this run: which library's layers, and why not the faster ones."""

    kind: Literal["computing"] = "computing"
    how: str


class StepMetrics(StepFigures, _Event):
    """One optimizer step, in the figures that its job keeps."""

    kind: Literal["metrics"] = "metrics"
    step_s: float
    step_tokens: int

    def figures(self) -> StepFigures:
        """Return what a job keeps of it."""
        return StepFigures.model_validate(self.data())


class Evaluated(_Event):
    """Mean loss a trained token over the validation rows, before the first step (0) or after `step`."""

    kind: Literal["evaluation"] = "evaluation"
    step: int
    epoch: float
    eval_loss: float
    token_accuracy: float | None = None
    preference: PreferenceFigures | None = None
    elapsed_s: float


class CheckpointWritten(_Event):
    """A checkpoint is whole on the disk."""

    kind: Literal["checkpoint"] = "checkpoint"
    step: int
    size_bytes: int


# What a training run says of itself, in the words of the job's events.
RunEvent = Progress | TrainingStarted | TrainingBuilt | Computing | StepMetrics | Evaluated | CheckpointWritten


class Heartbeat(_Line):
    """The engine's process runs. Sent on a thread of its own."""

    kind: Literal["heartbeat"] = "heartbeat"


class Done(_Event):
    """The command ended well. `Command.read_result` reads the result, whose type depends on the command."""

    kind: Literal["done"] = "done"
    result: dict[str, JsonValue]


ErrorClass = Literal[
    "out_of_memory",
    "bad_data",
    "not_finite",
    "bad_setting",
    "bad_form",
    "bad_model",
    "disk_full",
    "cannot_save",
    "export_differs",
    "worker_died",
    "no_room",
    "cancelled",
    "paused",
    "engine",
]


class Failed(_Event):
    """The command ended in an error of the given class; the engine itself lives on."""

    kind: Literal["failed"] = "failed"
    error_class: ErrorClass
    message: str
    suggestions: list[str]


CommandEvent = Token | RunEvent | Done | Failed
Event = Annotated[CommandEvent | Heartbeat, Field(discriminator="kind")]


# Commands

R = TypeVar("R", bound=BaseModel)
E = TypeVar("E", bound=_Event)


class Command(_Line, Generic[R, E]):
    """Base of the commands: `Command[R, E]` is answered with an R, after any number of events of the type E."""

    request_id: str = Field(default_factory=lambda: uuid.uuid4().hex)

    @classmethod
    def result_type(cls) -> type[R]:
        """Return the type of the answer."""
        return cast(type[R], _type_arguments(cls)[0])

    @classmethod
    def event_types(cls) -> tuple[type[_Event], ...]:
        """Return the types of the events before the final one."""
        events = _type_arguments(cls)[1]
        return () if events is Never else get_args(events) or (events,)

    @classmethod
    def read_result(cls, result: dict[str, JsonValue]) -> R:
        """Read the result of a final event.

        Raises:
            ValidationError: It is none of this command.
        """
        return cls.result_type().model_validate(result)

    @classmethod
    def carried_out_by(cls, handler: Callable[[Self], R]) -> "Handler":
        """Pair the command with what carries it out; mypy compares what that takes and returns."""
        return cls, handler


Handler = tuple[type[Command[Any, Any]], Callable[[Any], BaseModel]]


def _type_arguments(command: type[BaseModel]) -> tuple[Any, ...]:
    """Return R and E of a command's class."""
    arguments = (base.__pydantic_generic_metadata__["args"] for base in command.__mro__ if issubclass(base, BaseModel))
    return next(filter(None, arguments))


class WarmUp(Command[WarmedUp, Never]):
    """Import what later commands need, load nothing, and rest until the next command comes."""

    kind: Literal["warm_up"] = "warm_up"


class LoadBase(Command[Loaded, Never]):
    """Load the base model that this engine holds for the rest of its life."""

    kind: Literal["load_base"] = "load_base"
    model_path: str
    config: PeftConfig
    device: str
    engine: Literal["transformers", "unsloth"]


class AttachAdapter(Command[MemoryHeld, Never]):
    """Load an adapter from a folder onto the base, under a name."""

    kind: Literal["attach_adapter"] = "attach_adapter"
    adapter_id: str
    path: str


class DetachAdapter(Command[MemoryHeld, Never]):
    """Take an adapter off the base and free its memory."""

    kind: Literal["detach_adapter"] = "detach_adapter"
    adapter_id: str


class Generate(Command[Generated, Token]):
    """Continue a conversation, a text or tokens, with one adapter or with the bare base.

    `tools` go through the chat template. Without `max_new_tokens` the answer may fill the context, up to a bound.
    `logprobs` is how many of the likeliest tokens are told beside each token of the text; with `echo` the text begins
    with the prompt. The penalties and `logit_bias` (token → what is added to its logit) are OpenAI's. An answer with a
    `form` is held to it. `free_bytes` is what the device has free, where that is known; `most_together` is how many
    answers the engine may write at once.
    """

    kind: Literal["generate"] = "generate"
    messages: list[ChatMessage | ChatTurn] | None
    prompt: str | None
    adapter_id: str | None
    max_new_tokens: int | None
    temperature: float
    top_p: float
    seed: int | None
    stop: list[str]
    prompt_ids: list[int] | None = None
    tools: list[dict[str, JsonValue]] | None = None
    logprobs: int | None = None
    echo: bool = False
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: dict[int, float] = Field(default_factory=dict)
    form: AnswerForm | None = None
    free_bytes: int | None = None
    most_together: int = 16


class AboutDataset(_Line):
    """What tells a dataset from any other, and how its files were read."""

    name: str
    format: str
    rows: int
    sha256: str
    settings: dict[str, JsonValue]


class AboutRun(_Line):
    """What an adapter's card says of its job."""

    name: str
    job_id: str
    algorithm: str
    resumed_from: str | None
    initial_adapter_id: str | None = None
    dataset_sha256: str
    dataset: AboutDataset
    validation_dataset: AboutDataset | None


class Train(Command[TrainingFigures, RunEvent]):
    """Train a new adapter on the base and write it to a folder.

    The run goes on from the newest checkpoint in `checkpoints_path` that verifies, and of those beyond
    `recorded_step`, whose metrics were lost, only if there is no other; without one, it starts from the base.
    `about` is what the adapter's card says of the run beside what the engine knows itself. With `hands_out` nothing is
    trained: the adapter of the checkpoint is written, as a stop with `keep` would have. `workers` names the devices
    beside the engine's own that take a share of every step: a GPU by its uuid, or `cpu`. `initial_adapter_path` is the
    folder of the adapter that the run continues, where the configuration's `init_weights` is `adapter`.
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
    about: AboutRun | None
    hands_out: bool = False
    workers: list[str] = Field(default_factory=list)
    initial_adapter_path: str | None = None


class Analyze(Command[DatasetFigures, Progress]):
    """Say what a fine-tune would learn from a dataset, by a model's tokenizer alone."""

    kind: Literal["analyze"] = "analyze"
    model_path: str
    dataset_path: str
    rows: int
    config: PeftConfig
    example_row: int | None


class Describe(Command[Described, Never]):
    """Say what a config.json describes. The engine holds no model for it, and computes with no data."""

    kind: Literal["describe"] = "describe"
    config: dict[str, JsonValue]


class PrepareGguf(Command[Prepared, Progress]):
    """Turn a GGUF file into a folder of safetensors with its tokenizer."""

    kind: Literal["prepare_gguf"] = "prepare_gguf"
    gguf_path: str
    output_path: str
    model_id: str


class PreparePickled(Command[Prepared, Progress]):
    """Turn a folder of pickled weights into one of safetensors, running nothing that a pickle names."""

    kind: Literal["prepare_pickled"] = "prepare_pickled"
    source_path: str
    output_path: str
    model_id: str


class AboutExport(_Line):
    """What is kept in an export's folder of where it is from."""

    adapter_id: str
    adapter_name: str
    adapter_version: int
    base_model_id: str
    base_revision: str | None
    format: str
    created_at: str


class Merge(Command[MergedModel, Progress]):
    """Write base and adapter as one normal model into a folder. The base stays as it is.

    `about` is kept in the folder beside what the engine knows itself.
    """

    kind: Literal["merge"] = "merge"
    adapter_id: str
    adapter_path: str
    output_path: str
    base_model_id: str
    about: AboutExport


class ExportGguf(Command[GgufFile, Progress]):
    """Write base and adapter as one GGUF file into a folder. The base stays as it is."""

    kind: Literal["export_gguf"] = "export_gguf"
    adapter_id: str
    adapter_path: str
    output_path: str
    base_model_id: str
    quantization: GgufType
    about: AboutExport


class CheckExport(Command[ExportCheck, Progress]):
    """Load what an export wrote with stock transformers, and compare it with base and adapter.

    The engine that carries it out holds no base. `precision` and `quantization` say how the engine that wrote the
    export held the base, and `rounded_elsewhere` whether it rounded the base to few bits on another device than this.
    """

    kind: Literal["check_export"] = "check_export"
    base_path: str
    adapter_path: str
    export_path: str
    gguf_file: str | None
    precision: Literal["fp32", "bf16", "fp16"]
    quantization: Literal["none", "nf4", "int8"]
    rounded_elsewhere: bool


StopMode = Literal["discard", "pause", "keep"]


class Stop(_Line):
    """End the command `target_id` early; it answers with its own final event.

    A training run is thrown away (`discard`), leaves a checkpoint (`pause`), or ends well with the adapter as it is
    (`keep`). Any other command ends in one way.
    """

    kind: Literal["stop"] = "stop"
    target_id: str
    mode: StopMode


class WriteCheckpoint(_Line):
    """Write a checkpoint of the training run `target_id` after the optimizer step under way."""

    kind: Literal["write_checkpoint"] = "write_checkpoint"
    target_id: str


AnyCommand = (
    WarmUp
    | LoadBase
    | AttachAdapter
    | DetachAdapter
    | Generate
    | Train
    | Analyze
    | Describe
    | Merge
    | ExportGguf
    | CheckExport
    | PrepareGguf
    | PreparePickled
)
Signal = Stop | WriteCheckpoint

COMMANDS: TypeAdapter[AnyCommand | Signal] = TypeAdapter(Annotated[AnyCommand | Signal, Field(discriminator="kind")])
EVENTS: TypeAdapter[Event] = TypeAdapter(Event)


def encode(line: BaseModel) -> bytes:
    """Write a command, a signal or an event as one line of UTF-8 JSON."""
    return line.model_dump_json().encode() + b"\n"
