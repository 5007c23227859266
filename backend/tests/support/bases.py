"""Requests for bases in memory."""

from domain.configure import MachineFacts, configure
from domain.peft.algorithms import Algorithm
from services.hardware.devices import Device
from services.loading.base_request import BaseKey, BaseRequest

CPU = MachineFacts(has_gpu=False, supports_bf16=False)
CONFIG = configure(Algorithm.LORA, use_case=None, overrides={}, machine=CPU).config
FREE_BYTES = 1000
DEVICE = Device("cpu", CPU, FREE_BYTES)


def base_request(
    name: str, *, device: str = "cpu", needed_bytes: int | None = 1, for_client: bool = True
) -> BaseRequest:
    """Return a request for a base of the plain configuration."""
    key = BaseKey(name, None, "none", "fp32", device, "transformers")
    return BaseRequest(
        key, "only", CONFIG, DEVICE, needed_bytes, for_client=for_client, force=False, allow_pickle=False
    )
