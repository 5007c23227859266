"""Where a model goes, what runs it there, and why."""

from dataclasses import dataclass

import pytest

from core.errors import SettingRejected
from domain.configure import MachineFacts
from services.hardware.devices import Device, EngineChoice, capability_of, choose_device, choose_engine


@dataclass(frozen=True)
class Gpu:
    index: int
    memory_free_bytes: int | None
    uuid: str | None = None
    compute_capability: str | None = "8.0"
    supports_bf16: bool | None = True


GPUS = [Gpu(0, 10, "GPU-a"), Gpu(1, 30, "GPU-b"), Gpu(2, 20, "GPU-c", compute_capability="6.1")]
UNSLOTH, PLAIN = EngineChoice("unsloth", "a GPU of 8.0"), EngineChoice("transformers", "no package unsloth")
CPU = Device("cpu", MachineFacts(has_gpu=False, supports_bf16=False), 1)


def test_a_gpu_is_known_by_its_uuid() -> None:
    assert choose_device("auto", GPUS, 1).gpu_uuid == "GPU-b"  # the one with most memory free
    chosen = choose_device(2, GPUS, 1)
    assert (chosen.torch_name, chosen.gpu_uuid, chosen.compute_capability) == ("cuda:2", "GPU-c", "6.1")
    assert choose_device("cpu", GPUS, 1).gpu_uuid is None


@pytest.mark.parametrize(
    ("device", "machine", "obstacle", "why"),
    [
        (choose_device(1, GPUS, 1), PLAIN, None, "no package unsloth"),
        (CPU, UNSLOTH, None, "the model goes to the CPU"),
        (choose_device(2, GPUS, 1), UNSLOTH, None, "compute capability 6.1 of cuda:2"),
        (choose_device(1, GPUS, 1), UNSLOTH, "no fast layers for the family phi3", "phi3"),
    ],
)
def test_what_unsloth_cannot_do_goes_elsewhere_or_is_refused_with_the_reason(
    device: Device, machine: EngineChoice, obstacle: str | None, why: str
) -> None:
    choice = choose_engine("auto", device, machine, obstacle)
    assert choice.name == "transformers" and why in choice.reason
    with pytest.raises(SettingRejected, match=why):
        choose_engine("unsloth", device, machine, obstacle)


def test_unsloth_is_taken_where_it_can_and_left_where_it_is_not_wanted() -> None:
    device = choose_device("auto", GPUS, 1)
    assert choose_engine("auto", device, UNSLOTH, None) == EngineChoice("unsloth", "a GPU of 8.0")
    assert choose_engine("unsloth", device, UNSLOTH, None) == EngineChoice("unsloth", "asked for")
    assert choose_engine("transformers", device, UNSLOTH, None) == EngineChoice("transformers", "asked for")


def test_an_unknown_capability_is_the_lowest() -> None:
    assert capability_of(None) == (0, 0) and capability_of("12.0") == (12, 0)
