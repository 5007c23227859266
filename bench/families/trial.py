"""Tries one family in small: the count, every method, resume, stock PEFT, the merge, an answer."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from model_shapes import read_shape
from peft import PeftModel

from domain.configure import MachineFacts, configure
from domain.memory.estimate import adapter_parameters
from domain.memory.verdict import assess
from domain.peft.algorithms import Algorithm
from domain.peft.config import PeftConfig
from domain.protocol import AboutExport, ChatMessage, Generate, Merge, StopMode, Train
from engine.base import Base
from engine.channel import Stopped
from engine.generation import generate
from engine.merge import merge
from engine.stock_model import load_stock
from engine.training import train

METHODS = (Algorithm.LORA, Algorithm.QLORA, Algorithm.DORA, Algorithm.PISSA, Algorithm.RSLORA)
_CPU = MachineFacts(has_gpu=False, supports_bf16=False)
_STEPS = 3
_PROBE = torch.arange(4, 36).reshape(2, 16)
# Of fp32 weights. The logits of random weights are of order one; a lost layer moves them by a hundredth and more.
_TOLERANCE = 2e-4
_ROWS = "".join(
    json.dumps({"messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": f"number {n}"}]})
    + "\n"
    for n in range(12)
)


@dataclass
class Trial:
    """What came of one family.

    Attributes:
        parameters: Of the small model.
        attention: The attention that it computes with.
        results: Name of a check → `yes`, or why not.
    """

    family: str
    parameters: int = 0
    attention: str = ""
    results: dict[str, str] = field(default_factory=dict)

    def check(self, name: str, action: Callable[[], str | None]) -> bool:
        """Note whether an action goes well; what it returns is why not."""
        try:
            why = action()
        except Exception as error:  # noqa: BLE001 - a family's own code may raise anything; it is the result
            why = f"{type(error).__name__}: {error}"
        self.results[name] = "yes" if why is None else " ".join(why.split())[:200]
        return why is None

    def as_json(self) -> str:
        """Write it as one line."""
        return json.dumps(asdict(self))


class _Channel:
    """Hears nothing, and asks a run for a stop at the `stop_at`-th look."""

    def __init__(self, stop_at: int | None = None) -> None:
        self._looks, self._stop_at = 0, stop_at

    def check_stop(self, request_id: str) -> None:
        self._looks += 1
        if self._looks == self._stop_at:
            raise Stopped("pause")

    def stop_requested(self, request_id: str) -> StopMode | None:
        return None

    def take_checkpoint_request(self, request_id: str) -> bool:
        return False

    def emit(self, event: Any) -> None:
        """Take an event."""


def try_family(family: str, path: Path, scratch: Path, methods: Sequence[Algorithm] = METHODS) -> Trial:
    """Try everything with one small model.

    Args:
        family: Its model type.
        path: Its folder.
        scratch: A folder for what is made.
        methods: What to train with. The first of them is LoRA, on which the other checks build.
    """
    trial = Trial(family)
    values = json.loads((path / "config.json").read_text("utf-8"))
    shape = read_shape(values)

    def verdict() -> str | None:
        if shape is None:
            return "its class cannot be followed without data"
        judged = assess(shape, _config(Algorithm.LORA), 2**40, on_gpu=False)
        return None if judged.verdict == "fits" else f"{judged.verdict}: {judged.reasons} {judged.blockers}"

    trial.check("verdict", verdict)

    def count() -> str | None:
        base = _load(path, Algorithm.LORA)
        trial.parameters, trial.attention = base.total_parameters, str(base.model.config._attn_implementation)
        if shape is None:
            return "no shape"
        trained = adapter_parameters(shape, _config(Algorithm.LORA))
        if shape.parameters != base.total_parameters:
            return f"{shape.parameters} said, {base.total_parameters} there"
        return None if trained == base.trainable_parameters else f"{trained} trained said, {base.trainable_parameters}"

    trial.check("exact count", count)
    for method in methods:
        trial.check(method.value, lambda method=method: _trains(path, scratch, method))  # type: ignore[misc]
    if trial.results["lora"] != "yes":
        return trial
    trial.check("resume to the bit", lambda: _resumes(path, scratch))
    trial.check("stock PEFT", lambda: _loads_in_stock_peft(path, scratch))
    trial.check("merge", lambda: _merges(path, scratch))
    trial.check("generate", lambda: _answers(path, scratch))
    return trial


def _config(method: Algorithm, **overrides: Any) -> PeftConfig:
    values = {
        **{"rank": 4, "max_seq_length": 64, "max_steps": _STEPS, "batch_size": 2, "learning_rate": 1e-2},
        **{"dropout": 0.0, "train_on": "all", "checkpoint_every_steps": 1, "keep_checkpoints": 5},
        **overrides,
    }
    return configure(method, use_case=None, overrides=values, machine=_CPU).config


def _load(path: Path, method: Algorithm) -> Base:
    return Base(path, _config(method), "cpu", "transformers")


def _run(path: Path, folder: Path, method: Algorithm, channel: _Channel) -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.jsonl").write_text(_ROWS, encoding="utf-8")
    command = Train(
        request_id="r", adapter_id="adp", config=_config(method), dataset_path=str(folder / "rows.jsonl"),
        validation_path=None, validation_fraction=0.0, output_path=str(folder / "adp"), base_model_id="small/model",
        base_revision=None, checkpoints_path=str(folder / "checkpoints"), max_checkpoint_bytes=None,
        recorded_step=10**9, about=None,
    )  # fmt: skip
    return train(_load(path, method), command, channel)  # type: ignore[arg-type]


def _trains(path: Path, scratch: Path, method: Algorithm) -> str | None:
    folder = scratch / method.value
    shutil.rmtree(folder, ignore_errors=True)
    figures = _run(path, folder, method, _Channel())
    return None if figures.steps == _STEPS else f"{figures.steps} steps"


def _adapter(folder: Path) -> bytes:
    return (folder / "adp" / "adapter_model.safetensors").read_bytes()


def _resumes(path: Path, scratch: Path) -> str | None:
    folder = scratch / "resumed"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        _run(path, folder, Algorithm.LORA, _Channel(stop_at=4))
        return "it could not be stopped in the middle"
    except Stopped:
        _run(path, folder, Algorithm.LORA, _Channel())
    return None if _adapter(folder) == _adapter(scratch / "lora") else "other weights"


def _stock(path: Path) -> Any:
    """Load a folder as anybody would."""
    return load_stock(path, torch.float32)[0]


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(input_ids=_PROBE, use_cache=False).logits
    return logits.float()


def _compare(one: torch.Tensor, other: torch.Tensor, plain: torch.Tensor) -> str | None:
    moved = float((other - plain).abs().max())
    apart = float((one - other).abs().max())
    if moved == 0.0:
        return "the adapter changes nothing"
    return None if apart <= _TOLERANCE * max(1.0, float(other.abs().max())) else f"{apart:.1e} apart, of {moved:.1e}"


def _loads_in_stock_peft(path: Path, scratch: Path) -> str | None:
    base = _load(path, Algorithm.LORA)
    with torch.no_grad():
        plain = _logits(base.model)
        base.attach("adp", scratch / "lora" / "adp")
        with base.using("adp"):
            ours = _logits(base.model)
    stock = PeftModel.from_pretrained(_stock(path), str(scratch / "lora" / "adp"))
    return _compare(ours, _logits(stock), plain)


def _merges(path: Path, scratch: Path) -> str | None:
    out = scratch / "merged"
    shutil.rmtree(out, ignore_errors=True)
    about = AboutExport(
        adapter_id="adp", adapter_name="adapter", adapter_version=1, base_model_id="small/model", base_revision=None,
        format="merged", created_at="2026-01-01T00:00:00.000000Z",
    )  # fmt: skip
    command = Merge(
        request_id="r", adapter_id="adp", adapter_path=str(scratch / "lora" / "adp"), output_path=str(out),
        base_model_id="small/model", about=about,
    )  # fmt: skip
    merge(_load(path, Algorithm.LORA), command, _Channel())  # type: ignore[arg-type]
    stock = PeftModel.from_pretrained(_stock(path), str(scratch / "lora" / "adp"))
    return _compare(_logits(_stock(out)), _logits(stock), _logits(_stock(path)))


def _answers(path: Path, scratch: Path) -> str | None:
    base = _load(path, Algorithm.LORA)
    base.attach("adp", scratch / "lora" / "adp")
    command = Generate(
        request_id="r", messages=[ChatMessage(role="user", content="say 1")], prompt=None, adapter_id="adp",
        max_new_tokens=4, temperature=0.0, top_p=1.0, seed=None, stop=[],
    )  # fmt: skip
    answer = generate(base, command, _Channel())  # type: ignore[arg-type]
    return None if 1 <= answer.completion_tokens <= 4 else f"{answer.completion_tokens} tokens"
