"""Bases in memory, with an engine that takes no time."""

from concurrent.futures import Future
from typing import Any

from domain.configure import MachineFacts, configure
from domain.peft.algorithms import Algorithm
from services.hardware.devices import Device
from services.loading.base_request import BaseKey, BaseRequest

CPU = MachineFacts(has_gpu=False, supports_bf16=False)
CONFIG = configure(Algorithm.LORA, use_case=None, overrides={}, machine=CPU).config
FREE_BYTES = 1000
DEVICE = Device("cpu", CPU, FREE_BYTES)


class Engine:
    """Has loaded whatever it is told to, and knows whether it was ended."""

    pid, has_pending = 1, False

    def __init__(self, *_: Any, on_exit: Any = None, **__: Any) -> None:
        self.on_exit, self.ended = on_exit, False

    def request(self, *_: Any) -> tuple[str, "Future[dict[str, Any]]"]:
        future: Future[dict[str, Any]] = Future()
        future.set_result({"total_parameters": 1, "memory_bytes": 1, "load_s": 0.1})
        return "request", future

    def resident_bytes(self) -> int:
        return 1

    def log_tail(self) -> list[str]:
        return []

    def close(self) -> None:
        self.ended = True


def base_request(
    name: str, *, device: str = "cpu", needed_bytes: int | None = 1, for_client: bool = True
) -> BaseRequest:
    """Return a request for a base of the plain configuration."""
    key = BaseKey(name, None, "none", "fp32", device, "transformers")
    return BaseRequest(
        key, "only", CONFIG, DEVICE, needed_bytes, for_client=for_client, force=False, allow_pickle=False
    )
