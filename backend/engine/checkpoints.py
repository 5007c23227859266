"""Checkpoints: everything that a run needs to go on as if it had not stopped. The files are safetensors and JSON.

checkpoints/<job>/step-00000040/
    adapter.safetensors      the trained parameters
    optimizer.safetensors    the optimizer's tensors, as `<parameter>.<name>`
    rng.safetensors          torch's random number generators (nothing else in the loop draws numbers: the
                             order of rows comes from the seed and the epoch alone)
    initial.safetensors      PiSSA, OLoRA and LoftQ of several iterations only: A and B as initialised
    best.safetensors         early stopping only: the parameters of the best evaluation, if those are others
    state.json               progress, sampler position, scheduler, scaler, the optimizer's groups
    manifest.json            sha256 of each file
"""

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from core.files import finish_replacing, storage_errors, whole_folder
from core.manifest import FolderDamaged, verify, write_manifest

Tensors = dict[str, torch.Tensor]
_NAME = re.compile(r"step-(\d{8})")
_FORMAT = 1
_INSIDE = "/"  # between the name of a dictionary in an optimizer's state and the name of a tensor in it


@dataclass
class RunProgress:
    """The progress of a run between two optimizer steps.

    Attributes:
        step: Optimizer steps done.
        epoch: Which pass over the data, from 0.
        position: Batches of that pass that are done.
        passes: Passes over the data so far, as a fraction.
        evaluation_due: Whether the evaluation that belongs after `step` has not been done yet.
        waits: Evaluations in a row without a lower loss.
        tokens: Non-padding tokens so far.
        step_time_s: Seconds in optimizer steps alone, evaluation left out.
        elapsed_s: Seconds of the run, stops left out.
    """

    step: int = 0
    epoch: int = 0
    position: int = 0
    passes: float = 0.0
    evaluation_due: bool = True
    initial_eval_loss: float | None = None
    eval_loss: float | None = None
    best_eval_loss: float | None = None
    best_step: int | None = None
    waits: int = 0
    first_loss: float | None = None
    loss: float | None = None
    tokens: int = 0
    step_time_s: float = 0.0
    elapsed_s: float = 0.0


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run. Tensors by name; `settings` is plain JSON."""

    progress: RunProgress
    adapter: Tensors
    optimizer: Tensors
    rng: Tensors
    settings: dict[str, Any]
    initial: Tensors = field(default_factory=dict)
    best: Tensors = field(default_factory=dict)


class CheckpointFolder:
    """One job's checkpoints.

    Args:
        folder: Made when the first checkpoint is written.
        keep: How many are kept, the newest always.
        max_bytes: How many bytes they may take together; None for no limit. The newest is always kept.
        about: What the manifests say of the run.
    """

    def __init__(self, folder: Path, keep: int, max_bytes: int | None, about: Mapping[str, Any]) -> None:
        self._folder, self._keep, self._max_bytes, self._about = folder, keep, max_bytes, dict(about)

    def write(self, checkpoint: Checkpoint) -> Path:
        """Write a checkpoint under another name, flush it and rename it; then delete checkpoints beyond the limits.

        Raises:
            StorageFull: No space is left; the older ones stay.
        """
        target = self._folder / f"step-{checkpoint.progress.step:08d}"
        with whole_folder(target) as folder:
            self._fill(folder, checkpoint)
        self._prune(target)
        return target

    def prove(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint under another name and delete it, to know that checkpoints can be written.

        Raises:
            StorageFull: No space is left.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        with (
            storage_errors(self._folder / "state.json"),
            tempfile.TemporaryDirectory(dir=self._folder, prefix=".step-", suffix=".tmp") as scratch,
        ):
            self._fill(Path(scratch), checkpoint)

    def _fill(self, folder: Path, checkpoint: Checkpoint) -> None:
        for name in ("adapter", "optimizer", "rng", "initial", "best"):
            tensors: Tensors = getattr(checkpoint, name)
            if tensors:
                save_file({key: _own(tensor) for key, tensor in tensors.items()}, folder / f"{name}.safetensors")
        state = {"progress": asdict(checkpoint.progress), "settings": checkpoint.settings}
        (folder / "state.json").write_text(json.dumps(state), encoding="utf-8")
        write_manifest(folder, self._about | {"format": _FORMAT, "step": checkpoint.progress.step})

    def newest(self, recorded_step: int, skipped: Callable[[str, str], None]) -> Checkpoint | None:
        """Return the newest checkpoint that verifies; None without one.

        Args:
            recorded_step: The last step whose metrics are recorded. Checkpoints beyond it are tried last, since a run
                that goes on from one leaves a gap in the metrics.
            skipped: Called with the name of each damaged folder and what is wrong with it.
        """
        finish_replacing(self._folder)
        newest_first = list(reversed(checkpoint_folders(self._folder)))
        newest_first.sort(key=lambda folder: step_of(folder) > recorded_step)
        for folder in newest_first:
            try:
                return read_checkpoint(folder)
            except FolderDamaged as error:
                skipped(folder.name, str(error))
        return None

    def _prune(self, written: Path) -> None:
        """Delete checkpoints beyond the limits, and those of later steps, which the run has abandoned."""
        beyond, kept, total = [], 0, 0
        for folder in reversed(checkpoint_folders(self._folder)):
            abandoned = step_of(folder) > step_of(written)
            size = sum(path.stat().st_size for path in folder.iterdir())
            too_big = self._max_bytes is not None and total + size > self._max_bytes
            if folder != written and (abandoned or kept >= self._keep or too_big):
                beyond.append(folder)
            else:
                kept, total = kept + 1, total + size
        for folder in beyond:
            shutil.rmtree(folder)


def checkpoint_folders(folder: Path) -> list[Path]:
    """Return a job's checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*") if _NAME.fullmatch(path.name))


def step_of(folder: Path) -> int:
    """Return the step that a checkpoint's name says."""
    return int(folder.name.removeprefix("step-"))


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint, and verify the sum of each file.

    Raises:
        FolderDamaged: It does not verify, or was written by another version of this format.
    """
    about = verify(folder)
    if about.get("format") != _FORMAT:
        raise FolderDamaged(f"its format is {about.get('format')}; this version reads {_FORMAT}")
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    tensors = {
        name: load_file(path) if (path := folder / f"{name}.safetensors").exists() else {}
        for name in ("adapter", "optimizer", "rng", "initial", "best")
    }
    return Checkpoint(progress=RunProgress(**state["progress"]), settings=state["settings"], **tensors)


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a tensor to memory of its own: safetensors refuses views of shared storage."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def split_optimizer(optimizer: torch.optim.Optimizer) -> tuple[Tensors, dict[str, Any]]:
    """Take an optimizer's state apart into tensors and plain values (torch's and bitsandbytes' alike)."""
    state = optimizer.state_dict()
    tensors: Tensors = {}
    values: dict[str, dict[str, Any]] = {}
    for index, entries in state["state"].items():
        # bitsandbytes puts its quantised tensors into a dictionary of their own among the others.
        for name, value in _flat(entries):
            if isinstance(value, torch.Tensor):
                tensors[f"{index}.{name}"] = value
            else:
                values.setdefault(str(index), {})[name] = value
    return tensors, {"groups": state["param_groups"], "values": values}


def _flat(entries: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in entries.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}{_INSIDE}{inner}", held) for inner, held in value.items())
        else:
            yield name, value


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Tensors, plain: Mapping[str, Any]) -> None:
    """Give an optimizer the state that `split_optimizer` took apart."""
    state: dict[int, dict[str, Any]] = {}

    def put(index: str, name: str, value: Any) -> None:
        outer, inside, inner = name.partition(_INSIDE)
        entries = state.setdefault(int(index), {})
        if inside:
            entries.setdefault(outer, {})[inner] = value
        else:
            entries[name] = value

    for key, tensor in tensors.items():
        index, _, name = key.partition(".")
        put(index, name, tensor)
    for index, entries in plain["values"].items():
        for name, value in entries.items():
            put(index, name, value)
    optimizer.load_state_dict({"state": state, "param_groups": plain["groups"]})


def rng_state(device: torch.device) -> Tensors:
    """Return the generators that dropout draws from."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_rng(device: torch.device, states: Tensors) -> None:
    """Set the generators that `rng_state` read."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
