"""Responses of /api/hardware."""

from typing import Literal

from pydantic import Field

from api.peft_schemas import Response


class Gpu(Response):
    index: int = Field(description="The driver's number of the GPU.")
    uuid: str | None = Field(description="Of the GPU, or of its first MIG instance where MIG is on.")
    name: str | None
    memory_total_bytes: int | None = Field(description="Bytes; null, as any field here, if not known.")
    memory_used_bytes: int | None = Field(description="Bytes held by every program, this one included.")
    memory_free_bytes: int | None = Field(description="Bytes that no program holds.")
    compute_capability: str | None = Field(description="Major and minor, as in `8.6`.")
    supports_bf16: bool | None = Field(description="Whether it multiplies bfloat16 matrices (8.0 and later).")
    utilization_percent: int | None = Field(description="0..100: how much of the time a kernel ran.")
    temperature_c: int | None = Field(description="Degrees Celsius.")
    power_w: float | None = Field(description="Watts drawn.")
    error: str | None = Field(description="Why this GPU cannot be used; null if it can.")


class Cpu(Response):
    model: str | None
    architecture: str = Field(description="As `uname -m` names it.")
    physical_cores: int | None = Field(description="Of the machine.")
    logical_cores: int = Field(description="That this process may use, by its affinity and its container's quota.")
    max_frequency_mhz: float | None = Field(description="Megahertz; the present one if the highest is not known.")
    utilization_percent: float | None = Field(description="0..100 over all cores, since the reading before.")
    features: list[str] = Field(description="Instruction sets that speed up matrix products.")


class Memory(Response):
    total_bytes: int = Field(description="Bytes: the host's, or the container's limit.")
    available_bytes: int = Field(description="Bytes that can still be had without swapping.")
    used_bytes: int = Field(description="Bytes: total less available.")
    used_percent: float = Field(description="0..100.")
    limited_by: Literal["cgroup"] | None = Field(description="What keeps the total below the host's.")


class Disk(Response):
    path: str = Field(description="The data directory.")
    total_bytes: int = Field(description="Bytes of the disk that holds it.")
    free_bytes: int = Field(description="Bytes free for this user.")


class Cuda(Response):
    available: bool = Field(description="Whether a GPU answers.")
    driver_version: str | None
    cuda_version: str | None = Field(description="The newest CUDA that the driver supports.")
    reason: str | None = Field(description="Why CUDA is not available; null if it is.")


class Engine(Response):
    name: Literal["unsloth", "transformers"] = Field(description="What trains on this machine by default.")
    reason: str


class WarmEngine(Response):
    engine: Literal["transformers", "unsloth", "none"] = Field(
        description="The library that will load a model in it; `none` for the one that reads models' shapes."
    )
    gpu_uuid: str | None = Field(description="The one GPU that it will use; null for one that works on the CPU.")
    state: Literal["starting", "ready"] = Field(description="Whether its imports are done.")
    memory_bytes: int = Field(description="Bytes of host memory that it holds, and gives up where they are needed.")
    pid: int = Field(description="Its process id, which is that of the loaded model's engine once it is taken.")


class Usage(Response):
    gpus: list[Gpu]
    cpu: Cpu
    memory: Memory
    disk: Disk
    warm_engines: list[WarmEngine] = Field(
        description="Engine processes that are kept ready for the next load, with nothing loaded and no GPU memory."
    )


class Profile(Usage):
    cuda: Cuda
    platform: str = Field(description="Operating system and its version.")
    python_version: str
    packages: dict[str, str | None] = Field(description="Installed versions; null if not installed.")
    engine: Engine
    measured_at: str = Field(description="When this was measured, RFC 3339 in UTC.")
    age_s: float = Field(description="Seconds since then.")
    expires_at: str = Field(description="When it will be measured again, RFC 3339 in UTC.")


class CheckResult(Response):
    name: str = Field(description="What was checked; a number at its end is the GPU's.")
    status: Literal["pass", "fail", "warn", "skip"]
    detail: str = Field(description="What was found.")
    fix: str | None = Field(description="What to do about it.")


class Validation(Response):
    valid: bool = Field(description="Whether no check failed.")
    checks: list[CheckResult]
    checked_at: str = Field(description="When torch was last asked, RFC 3339 in UTC; driver and GPUs are as now.")
    age_s: float = Field(description="Seconds since then.")
