"""The `check_export` command: what was written is loaded again by stock transformers and compared with base + adapter.

It runs in a process that has loaded nothing before, so that nothing of the engine that wrote the export is in it. Base
and adapter are loaded by stock transformers and stock PEFT, answer a few prompts, and give each merged tensor by PEFT's
own merge. Then the export is loaded, and answers the same prompts. The two models are never in memory together.
"""

import gc
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import psutil
import torch
from safetensors import safe_open
from transformers import AutoTokenizer

from domain.exports import ExportCheck
from domain.models.gguf import read_gguf_model
from domain.protocol import CheckExport, Progress
from engine.channel import Channel
from engine.errors import BadModel, ExportDiffers
from engine.stock_model import ExpectedTensor, StockModel, answers, load_stock
from engine.tensor_difference import difference
from engine.transformers_backend import DTYPES

_TEXTS = (
    "The capital of France is Paris, and the river that flows through it is the Seine.",
    "def add(first, second):\n    return first + second\n",
    "1, 2, 3, 5, 8, 13: what comes next, and why?",
    "Zürich, São Paulo, 東京, Москва",
)
_TOKENS_A_TEXT = 48
# Beside the texts, tokens drawn at random: they reach more of a mixture's experts.
_DRAWN_TOKENS = 64
# How far the answers may be from those of base and adapter: the norm of their difference by their own norm, at the
# median token. A merge rounds each weight once more, to 24, 11 or 8 bits. docs/decisions/0009-exports.md has what was
# measured.
TOLERANCES = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1, "q8_0": 1e-1}
_MERGE_CHANGES = frozenset({"quantization_config", "dtype", "torch_dtype", "tie_word_embeddings", "eos_token_id"})
_READER_BYTES_A_NUMBER = 8  # transformers' reader of GGUF holds a file in fp32, and then the model beside it


class Written(Protocol):
    """The tensors of an export, by the names that it has them under."""

    names: set[str]
    kind: str

    def placed(self, group: dict[str, ExpectedTensor]) -> dict[str, ExpectedTensor]:
        """Return what must be in the export for a group of the model's tensors."""

    def differs(self, name: str, expected: ExpectedTensor) -> str:
        """Say how a tensor differs; nothing where it does not."""


def check_export(command: CheckExport, channel: Channel) -> ExportCheck:
    """Compare an export with its base and adapter.

    Raises:
        ExportDiffers: It is not what it must be; the message names the first tensor that differs.
        BadModel: Stock transformers cannot load the export, or the base.
        Stopped: The client ended it.
    """
    return _Check(command, channel).run()


class _Check:
    def __init__(self, command: CheckExport, channel: Channel) -> None:
        self._command, self._channel = command, channel
        self._export, self._base = Path(command.export_path), Path(command.base_path)
        self._notes: list[str] = []
        self._began_s = time.monotonic()

    def run(self) -> ExportCheck:
        self._report(0.0)
        dtype = _held_dtype(self._base, self._command)
        tokens = _load_tokenizer(self._base if self._command.gguf_file else self._export)
        stock = StockModel(self._base, Path(self._command.adapter_path), dtype, self._command.quantization)
        self._report(0.2)
        prompts = list(_prompts(tokens, stock.embeddings, stock.longest))
        reference = answers(stock.model, prompts, self._check_stop)
        self._report(0.3)
        written = self._written(stock)
        count = self._compare_tensors(stock, written)
        lacking, numbers = stock.lacking, sum(torch.Size(shape).numel() for shape in stock.tensors.values())
        del stock
        gc.collect()
        tolerance = TOLERANCES[written.kind]
        far = self._compare_answers(dtype, lacking, prompts, reference, tolerance, numbers)
        self._report(1.0)
        return ExportCheck(
            tensors=count,
            prompts=len(prompts),
            tokens=sum(len(prompt) for prompt in prompts),
            difference=far,
            tolerance=tolerance,
            elapsed_s=round(time.monotonic() - self._began_s, 3),
            notes=self._notes,
        )

    def _written(self, stock: StockModel) -> Written:
        if self._command.gguf_file:
            from engine.gguf_check import WrittenGguf

            config = json.loads((self._base / "config.json").read_text(encoding="utf-8"))
            return WrittenGguf(self._export / self._command.gguf_file, read_gguf_model(config))
        return WrittenFolder(self._export, self._base, stock, rounded=self._command.rounded_elsewhere)

    def _compare_tensors(self, stock: StockModel, written: Written) -> int:
        """Return how many tensors of the export were compared.

        Raises:
            ExportDiffers: One of them differs, or is missing, or belongs to nothing.
        """
        seen: set[str] = set()
        groups = stock.names.groups(stock.tensors)
        for number, group in enumerate(groups):
            self._check_stop()
            expected = {name: stock.expected(name) for name in group}
            for name, tensor in written.placed(expected).items():
                place: str | None = name
                if name not in written.names:  # one tensor under two names is written once
                    twins = [_places(twin, stock, written) for one in group for twin in stock.twins(one)]
                    there = [names for names in twins if names]
                    if not there:
                        raise ExportDiffers(f"the export has no tensor {name}, and base + adapter have one")
                    place = there[0][0] if len(group) == len(there[0]) == 1 else None
                if place is None:
                    continue
                how = written.differs(place, tensor)
                if how:
                    under = "" if place == name else f", which it holds as {place}"
                    raise ExportDiffers(f"the first tensor that differs from base + adapter is {name}{under}: it {how}")
                seen.add(place)
            self._report(0.3 + 0.4 * (number + 1) / len(groups))
        if over := sorted(written.names - seen):
            raise ExportDiffers(f"the export has a tensor {over[0]}, and base + adapter have none")
        return len(seen)

    def _compare_answers(
        self,
        dtype: torch.dtype,
        lacking: set[str],
        prompts: list[list[int]],
        reference: list[torch.Tensor],
        tolerance: float,
        numbers: int,
    ) -> float | None:
        options: dict[str, Any] = {}
        if self._command.gguf_file:
            needed, free = numbers * _READER_BYTES_A_NUMBER, psutil.virtual_memory().available
            if needed > free:
                self._notes.append(
                    f"Every tensor was compared, but no answer: transformers' reader of GGUF takes about {needed} "
                    f"bytes of memory, and {free} are free."
                )
                return None
            options["gguf_file"] = self._command.gguf_file
        model, lacks = load_stock(self._export, dtype, **options)
        if lost := sorted(lacks - lacking):
            raise ExportDiffers(f"stock transformers finds no tensor for {lost[0]} in the export")
        self._report(0.8)
        found = answers(model, prompts, self._check_stop)
        far = distance(found, reference)
        if far is None:
            self._notes.append("Every tensor was compared, but no answer: those of base + adapter are not finite here.")
        elif not far <= tolerance:
            raise ExportDiffers(
                f"no tensor differs, but the export's answers are {far:.3g} of their size away from those of base + "
                f"adapter, and {tolerance:g} is what rounding may make: its config or its names are not the base's"
            )
        return far

    def _check_stop(self) -> None:
        self._channel.check_stop(self._command.request_id)

    def _report(self, fraction: float) -> None:
        self._check_stop()
        self._channel.emit(Progress(request_id=self._command.request_id, stage="checking", fraction=fraction))


class WrittenFolder:
    """A merged model's tensors.

    Args:
        folder: Has them in safetensors files.
        base: The base's folder.
        stock: What they are compared with.
        rounded: Whether the base was rounded to few bits on another device.
    """

    def __init__(self, folder: Path, base: Path, stock: StockModel, *, rounded: bool) -> None:
        self._base, self._stock, self._rounded = base, stock, rounded
        self._files: dict[str, Path] = {}
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, framework="pt") as tensors:
                self._files |= dict.fromkeys(tensors.keys(), file)
        self.names = set(self._files)
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            if listed != {name: file.name for name, file in self._files.items()}:
                raise ExportDiffers("the index of the export's files does not name what they hold")
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self._compare_configs(config)
        self.kind = str(config.get("dtype") or config.get("torch_dtype") or "float32")
        if self.kind not in TOLERANCES:
            self.kind = "float32"

    def _compare_configs(self, config: dict[str, Any]) -> None:
        """Refuse a config that says something else than the base's, beside what a merge changes.

        Raises:
            ExportDiffers: It does.
        """
        own = json.loads((self._base / "config.json").read_text(encoding="utf-8"))
        other = [key for key in own.keys() | config.keys() if own.get(key) != config.get(key)]
        if wrong := sorted(set(other) - _MERGE_CHANGES):
            key = wrong[0]
            raise ExportDiffers(
                f"no tensor was compared: the export's config.json has {key} = {str(config.get(key))[:100]}, "
                f"and the base's {str(own.get(key))[:100]}"
            )

    def placed(self, group: dict[str, ExpectedTensor]) -> dict[str, ExpectedTensor]:
        """Return what must be in the files for a group of the model's tensors."""
        corrected = any(tensor.corrected for tensor in group.values())
        scale = max(tensor.scale for tensor in group.values())
        values = {name: tensor.value.float() if corrected else tensor.value for name, tensor in group.items()}
        reverted = self._stock.names.revert(values)
        return {name: ExpectedTensor(value, corrected, scale) for name, value in reverted.items()}

    def differs(self, name: str, expected: ExpectedTensor) -> str:
        """Say how a tensor differs; nothing where it does not."""
        with safe_open(self._files[name], framework="pt") as tensors:
            return difference(tensors.get_tensor(name), expected, rounded=self._rounded)


def distance(found: list[torch.Tensor], reference: list[torch.Tensor]) -> float | None:
    """Return how far answers are from each other: the norm of the difference by the norm, at the median token.

    The median: where an expert or a key is chosen by a hair's breadth, rounding chooses another for that token.

    Args:
        found: Of each prompt, (tokens, vocabulary).
        reference: The same.

    Returns:
        Infinity where an answer is not finite and the reference is; None if no reference is finite.
    """
    away = []
    for one, other in zip(found, reference, strict=True):
        finite = other.isfinite().all(dim=-1)
        relative = (one - other).norm(dim=-1) / other.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
        away.append(relative[finite].nan_to_num(nan=torch.inf))
    together = torch.cat(away)
    return float(together.median()) if together.numel() else None


def _places(twin: str, stock: StockModel, written: Written) -> list[str]:
    """Return the names that the export has a tensor under; none where it lacks one of them."""
    empty = ExpectedTensor(torch.empty(stock.tensors[twin], device="meta"), corrected=False, scale=0.0)
    names = list(written.placed({twin: empty}))
    return names if all(name in written.names for name in names) else []


def _held_dtype(base: Path, command: CheckExport) -> torch.dtype:
    """Return the type to hold the base in: that of its files where the engine that merged lost nothing of it."""
    held = DTYPES[command.precision]
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    stored = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), None)
    lossless = isinstance(stored, torch.dtype) and (held == torch.float32 or held == stored)
    return stored if lossless and command.quantization == "none" else held


def _load_tokenizer(folder: Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise BadModel(f"stock transformers cannot load the export's tokenizer: {error}") from error


def _prompts(tokens: Any, embeddings: int, longest: int | None) -> Iterable[list[int]]:
    most = max(2, min(_TOKENS_A_TEXT, longest or _TOKENS_A_TEXT))
    for text in _TEXTS:
        prompt = [token for token in tokens(text).input_ids if token < embeddings][:most]
        if prompt:
            yield prompt
    drawn = torch.Generator().manual_seed(0)
    yield torch.randint(embeddings, (min(_DRAWN_TOKENS, longest or _DRAWN_TOKENS),), generator=drawn).tolist()
