"""Which base is wanted, and how it is loaded."""

from dataclasses import dataclass

from domain.jobs.load_options import LoadOptions
from domain.peft.config import PeftConfig
from services.hardware.devices import Device, EngineName, device_name


@dataclass(frozen=True)
class BaseKey:
    """Identifies a base in memory: everything that changes how it is loaded.

    Attributes:
        max_seq_length: Tokens that Unsloth loads it for; None for transformers, which loads alike for every length.
    """

    model_id: str
    revision: str | None
    quantization: str
    precision: str
    device: str
    engine: EngineName
    max_seq_length: int | None = None

    def serves(self, config: PeftConfig) -> bool:
        """Whether a fine-tune of this configuration can run on the base."""
        same = (self.quantization, self.precision) == (config.quantization, config.precision)
        return same and (self.max_seq_length is None or config.max_seq_length <= self.max_seq_length)


@dataclass(frozen=True)
class BaseRequest:
    """A base that is wanted, and how it is loaded if it is not there.

    Attributes:
        config: What decides how its weights are stored.
        needed_bytes: Estimated for loading it; None where the model's layers are not known.
        for_client: Whether a client wants it, and not a job.
        force: Whether to load it even if it does not fit.
    """

    key: BaseKey
    engine_reason: str
    config: PeftConfig
    device: Device
    needed_bytes: int | None
    for_client: bool
    force: bool
    allow_pickle: bool

    @property
    def options(self) -> LoadOptions:
        """The options with which the same base is loaded again."""
        return LoadOptions(
            engine=self.key.engine,
            device=device_name(self.key.device),
            force=self.force,
            allow_pickle=self.allow_pickle,
        )
