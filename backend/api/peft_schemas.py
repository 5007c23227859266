"""Requests and responses of /api/peft."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from domain.models.load_states import LoadState
from domain.peft.algorithms import Algorithm, AlgorithmName
from domain.peft.config import PeftConfig, PeftOverrides
from domain.peft.use_cases import UseCaseId

ModelId = Annotated[
    str,
    StringConstraints(
        min_length=1,
        max_length=96,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?$",
    ),
    Field(description="The Hub's `owner/name`.", examples=["HuggingFaceTB/SmolLM2-135M-Instruct"]),
]
Revision = Annotated[str, StringConstraints(min_length=1, max_length=100, pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]*$")]
Overrides = Annotated[PeftOverrides, Field(description="Settings kept exactly as sent, or refused.")]


class Request(BaseModel):
    """Base of request bodies: unknown fields and values of another type are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Response(BaseModel):
    """Base of response bodies: every field is always there."""

    model_config = ConfigDict(frozen=True, from_attributes=True)


class ParameterInfo(Response):
    name: str
    type: str
    default: Any = Field(description="What this algorithm uses on this machine if nothing is asked for.")
    minimum: float | None
    maximum: float | None
    choices: list[Any] | None
    description: str


class AlgorithmInfo(Response):
    id: Algorithm
    name: str
    summary: str
    paper: str
    extra: bool = Field(description="Whether it is beyond LoRA, QLoRA, DoRA, PiSSA and rsLoRA.")
    parameters: list[ParameterInfo]
    constraints: list[str]
    memory: str
    speed: str
    available: bool
    unavailable_reason: str | None


class AlgorithmList(Response):
    algorithms: list[AlgorithmInfo]


class UseCaseInfo(Response):
    id: UseCaseId
    name: str
    summary: str
    defaults: dict[str, Any]


class UseCaseList(Response):
    use_cases: list[UseCaseInfo]


class ConfigureRequest(Request):
    algorithm: AlgorithmName = Algorithm.LORA
    use_case: Annotated[UseCaseId, Field(strict=False)] | None = None
    model_id: ModelId | None = None
    revision: Revision | None = None
    overrides: Overrides = Field(default_factory=PeftOverrides)
    initial_adapter_id: str | None = Field(
        default=None,
        max_length=64,
        description="The adapter that the run is to continue: it decides what follows from its weights, and names the "
        "model and the algorithm where the request does not.",
    )


class ChosenParameter(Response):
    value: Any
    source: Literal["default", "use_case", "algorithm", "hardware", "adapter", "override"]
    reason: str


class ConfigurationFit(Response):
    verdict: Literal["fits", "tight", "does_not_fit", "unknown"]
    estimate_bytes: int
    available_bytes: int


class TrainedModules(Response):
    role: str = Field(description="What the modules do: attention, mlp, state_space, shared_expert, expert, other.")
    modules: int
    parameters: int = Field(description="What an adapter trains in them.")


class ConfigureResponse(Response):
    algorithm: Algorithm
    use_case: UseCaseId | None
    model_id: str | None
    config: PeftConfig
    parameters: dict[str, ChosenParameter] = Field(description="Every parameter with where its value came from.")
    fit: ConfigurationFit | None = Field(
        description="Whether it fits this machine with all rows at full length; null where that cannot be known. What "
        "would make it fit: POST /api/models/compatibility."
    )
    trained: list[TrainedModules] | None = Field(
        description="What will be trained, by what the modules do; null without a model, or where its layers are not "
        "known."
    )


class LoadModelRequest(Request):
    model_id: ModelId
    revision: Revision | None = None
    algorithm: AlgorithmName = Algorithm.LORA
    use_case: Annotated[UseCaseId, Field(strict=False)] | None = None
    overrides: Overrides = Field(
        default_factory=PeftOverrides, description="They hold for jobs of the same algorithm on the loaded model too."
    )
    adapter_id: str | None = Field(default=None, max_length=64, description="Also put this adapter on the base.")
    engine: Literal["auto", "unsloth", "transformers"] = "auto"
    device: Literal["auto", "cpu"] | Annotated[int, Field(ge=0, le=63)] = "auto"
    wait_s: float = Field(default=0, ge=0, le=600, description="Answer when it is ready, or after this long.")
    force: bool = Field(default=False, description="Load even what is estimated not to fit.")
    allow_pickle: bool = Field(
        default=False,
        description="Where there are no safetensors: convert pickled weights, once, without running them.",
    )


class Progress(Response):
    fraction: float | None
    downloaded_bytes: int | None
    total_bytes: int | None
    bytes_per_s: float | None = Field(description="Of the last ten seconds of a download.")
    eta_s: float | None


class Parameters(Response):
    total: int | None = Field(description="Parameters of the base; null until it is loaded.")
    trainable: int | None = Field(description="Parameters that an adapter of this configuration trains.")


class Memory(Response):
    estimated_bytes: int | None = Field(description="Estimated for holding the base; null for unknown families.")
    measured_bytes: int | None = Field(description="Of the engine process or the GPU's allocator, when last looked at.")


class LoadError(Response):
    type: str
    message: str
    log_tail: list[str]


class LoadedModelResponse(Response):
    id: str
    model_id: str
    revision: str | None
    algorithm: Algorithm
    config: PeftConfig
    engine: Literal["transformers", "unsloth"]
    engine_reason: str = Field(description="Why this engine: what Unsloth lacks here, or that it was asked for.")
    device: str
    state: LoadState
    progress: Progress
    adapters: list[str] = Field(description="Adapters on the base; all may be used without loading it again.")
    parameters: Parameters
    memory: Memory
    loaded_at: str | None
    last_used_at: str | None
    load_s: float | None
    engine_pid: int | None
    error: LoadError | None


class LoadedModelList(Response):
    models: list[LoadedModelResponse]
