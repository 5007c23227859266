"""An adapter's card: all that it takes to train it again. training.json is for programs, README.md for people."""

import json
import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from core.manifest import sha256_of
from core.version import VERSION
from domain.jobs.figures import RunOutcome
from domain.protocol import StepMetrics, Train
from engine.base import Base
from engine.decompositions import freezes_others

_FORMAT = 1
_NF4 = (
    ", BitsAndBytesConfig",
    ', quantization_config=BitsAndBytesConfig(\n    load_in_4bit=True, bnb_4bit_quant_type="nf4", '
    "bnb_4bit_use_double_quant=True\n)",
)
_MAX_LOSSES = 20_000  # of a longer run every second or third or … loss is kept


class LossRecorder:
    """Passes events on, and keeps each step's loss.

    A run that goes on from a checkpoint has the losses from there on. Its job has the earlier ones.
    """

    def __init__(self, emit: Callable[[Any], None]) -> None:
        self._emit = emit
        self.losses: dict[int, float] = {}

    def emit(self, event: Any) -> None:
        """Pass an event on."""
        if isinstance(event, StepMetrics):
            self.losses[event.step] = event.loss
        self._emit(event)


def packages() -> dict[str, str]:
    """Return the versions of the packages that compute a training."""
    names = ("torch", "transformers", "tokenizers", "peft", "bitsandbytes", "numpy")
    return {"peft-studio": VERSION} | {name: version(name) for name in names}


def begin_card(base: Base, command: Train) -> dict[str, Any]:
    """Begin the card: everything about the adapter that is known before the first step.

    Returns:
        JSON, with `about` of the command first.
    """
    return {
        "format": _FORMAT,
        "adapter_id": command.adapter_id,
        **(command.about.model_dump() if command.about is not None else {}),
        "base_model_id": command.base_model_id,
        "base_revision": command.base_revision,
        "base_commit": _commit_of(base.path),
        "rows_sha256": sha256_of(Path(command.dataset_path)),
        "validation_rows_sha256": sha256_of(Path(command.validation_path)) if command.validation_path else None,
        "validation_fraction": command.validation_fraction,
        "gpus": 1 + len(command.workers),
        "config": command.config.model_dump(mode="json"),
        # Whether it corrects the 4-bit weights that it was trained on, rather than the published ones.
        "belongs_to_nf4": command.config.quantization == "nf4" and not freezes_others(command.config),
        "outcome": None,
        "packages": packages(),
        "machine": {
            "device": base.device.type,
            "engine": base.engine,
            "threads": torch.get_num_threads(),
            "architecture": platform.machine(),
            "python": platform.python_version(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        },
        "losses": [],
    }


def finish_card(card: dict[str, Any], outcome: RunOutcome, losses: dict[int, float]) -> dict[str, Any]:
    """Return the card with the run's outcome, and with `losses` as [step, loss]."""
    stride = -(-len(losses) // _MAX_LOSSES) or 1
    kept = [[step, loss] for step, loss in sorted(losses.items())][::stride]
    return card | {"outcome": outcome.model_dump(), "losses": kept}


def _commit_of(path: Path) -> str | None:
    """Return the commit of a base's folder, if it is a folder of the Hub's cache."""
    return path.name if path.parent.name == "snapshots" else None


def readme(card: dict[str, Any]) -> str:
    """Write the model card, with the front matter that the Hub reads."""
    base, outcome = card["base_model_id"], card["outcome"]
    before, after = outcome["initial_eval_loss"], outcome["final_eval_loss"]
    evaluation = (
        f"- Evaluation loss: {before:.4f} before, {after:.4f} after\n"
        if before is not None and after is not None
        else ""
    )
    config = json.dumps(card["config"], indent=2)
    imported, quantized = ("", "") if not card.get("belongs_to_nf4") else _NF4
    return (
        f"---\nbase_model: {base}\nlibrary_name: peft\ntags:\n- peft-studio\n---\n\n"
        f"# Adapter for {base}\n\n"
        f"- Steps: {outcome['steps']}\n"
        f"- Training loss: {outcome['first_loss']:.4f} first, {outcome['final_loss']:.4f} last\n"
        f"{evaluation}\n## Load it\n\n```python\nfrom peft import PeftModel\n"
        f"from transformers import AutoModelForCausalLM, AutoTokenizer{imported}\n\n"
        f'base = AutoModelForCausalLM.from_pretrained("{base}"{quantized})\n'
        'model = PeftModel.from_pretrained(base, "path/to/this/folder")\n'
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")\n```\n\n'
        f"## How it was made\n\n{_origin(card)}\n"
        f"## Train it again\n\n{_again(card)}\n\n"
        f"## Configuration\n\n```json\n{config}\n```\n"
    )


def _again(card: dict[str, Any]) -> str:
    """Say how to train the adapter again, or why that cannot be done."""
    if card.get("resumed_from") or card.get("initial_adapter_id") or card["outcome"]["stopped_on_request"]:
        return (
            "`training.json` has all of the above for a program. The run began with what another had trained, or a "
            "client ended it early: these settings alone do not give the same adapter again."
        )
    return (
        "`training.json` has all of the above for a program, and the loss of each step. With a PEFT Studio server "
        "running and the dataset at hand, from its `backend` folder:\n\n"
        "```console\n$ python -m reproduce path/to/this/folder --dataset path/to/the/dataset\n```\n\n"
        "It trains with the same settings and compares every loss; on a CPU of the same kind, with the same packages "
        "and number of threads, the weights are the same to the bit."
    )


def _origin(card: dict[str, Any]) -> str:
    """List what the adapter was made from."""
    revision = card["base_commit"] or card["base_revision"]
    dataset, machine = card.get("dataset") or {}, card["machine"]
    validation = card.get("validation_dataset")
    held_out = (
        f"{validation['name']} (sha256 `{validation['sha256']}`)"
        if validation
        else f"{card['validation_fraction']:g} of the rows"
    )
    versions = ", ".join(f"{name} {number}" for name, number in card["packages"].items())
    lines = [
        f"Base: {card['base_model_id']}" + (f" at `{revision}`" if revision else ""),
        f"Method: {card.get('algorithm', 'not recorded')}, seed {card['config']['seed']}",
        f"Dataset: {dataset.get('name', 'not recorded')} (sha256 `{card.get('dataset_sha256')}`), "
        f"as rows sha256 `{card['rows_sha256']}`",
        f"Held out: {held_out}",
        *([f"Begun with: the checkpoint {card['resumed_from']} of another job"] if card.get("resumed_from") else []),
        *([f"Continues: the adapter {card['initial_adapter_id']}"] if card.get("initial_adapter_id") else []),
        f"Packages: {versions}",
        f"Machine: {machine['device']} ({machine['architecture']}, {machine['cpu_capability']}), {machine['engine']}, "
        f"{machine['threads']} threads, Python {machine['python']}",
    ]
    return "".join(f"- {line}\n" for line in lines)
