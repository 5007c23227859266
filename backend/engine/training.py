"""The `train` command: data, adapter, run, and the folder that is handed out."""

import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from peft import LoraConfig
from safetensors.torch import save_file
from transformers import set_seed

from core.files import fsync_file, fsync_folder
from domain.protocol import Progress, Train, TrainingStarted
from engine import methods
from engine.base import Base
from engine.batches import Row, read_rows, tokenize
from engine.channel import Channel
from engine.errors import BadData
from engine.trainer import Outcome, Trainer


def train(base: Base, command: Train, channel: Channel) -> dict[str, Any]:
    """Train a new adapter and leave it on the base under its name.

    Returns:
        The outcome's figures, the trainable parameters and the adapter's folder.

    Raises:
        CommandError: Of the class that says why.
    """

    def check_stop() -> None:
        channel.check_stop(command.request_id)

    rows, validation, skipped = _load_rows(base, command, channel, check_stop)
    lora = methods.lora_config(command.config, command.base_model_id, command.base_revision)
    output = Path(command.output_path)
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        with methods.original_weights_kept(base.model, command.config, output.parent):
            set_seed(command.config.seed)  # the adapter's initialisation
            channel.emit(Progress(request_id=command.request_id, stage="adapter", fraction=None))
            base.create(command.adapter_id, lora)
            pissa = command.config.init_weights == "pissa"
            initial = methods.adapter_state(base.model, command.adapter_id) if pissa else None
            trainer = Trainer(
                base,
                command.config,
                rows,
                validation,
                request_id=command.request_id,
                emit=channel.emit,
                check_stop=check_stop,
            )
            started = _started(command, base, rows, validation, skipped, trainer.total_steps)
            channel.emit(started)
            outcome = trainer.run()
            state = methods.adapter_state(base.model, command.adapter_id)
            saved = base.model.peft_config[command.adapter_id]
            if initial is not None:
                state, saved = methods.as_plain_lora(state, initial, saved)
            _write_adapter(output, state, saved, base, command, outcome)
    finally:
        base.detach(command.adapter_id)
    # What is handed out is what is served: the adapter comes back from its own files.
    base.attach(command.adapter_id, output)
    return {
        **asdict(outcome),
        "trainable_parameters": started.trainable_parameters,
        "rows": len(rows),
        "validation_rows": len(validation),
        "path": str(output),
    }


def _load_rows(
    base: Base, command: Train, channel: Channel, check_stop: Callable[[], None]
) -> tuple[list[Row], list[Row], int]:
    """Tokenize both sets; rows with nothing to learn are counted and left out."""
    conversations = list(read_rows(Path(command.dataset_path)))
    held_out = list(read_rows(Path(command.validation_path))) if command.validation_path else []
    numbered = list(enumerate(conversations))
    if command.validation_fraction > 0:
        random.Random(command.config.seed).shuffle(numbered)  # noqa: S311 - not a secret
        size = min(len(numbered) - 1, max(1, round(command.validation_fraction * len(numbered))))
        held_out_numbered, numbered = numbered[:size], numbered[size:]
    else:
        held_out_numbered = list(enumerate(held_out))
    total = len(numbered) + len(held_out_numbered)
    done = 0
    sets: list[list[Row]] = []
    for rows in (numbered, held_out_numbered):
        tokenized = []
        for number, messages in rows:
            if done % 100 == 0:
                check_stop()
                channel.emit(Progress(request_id=command.request_id, stage="tokenizing", fraction=done / total))
            config = command.config
            tokenized.append(tokenize(base.tokenizer, number, messages, config.train_on, config.max_seq_length))
            done += 1
        sets.append(tokenized)
    learning = [[row for row in rows if row.trained_tokens] for rows in sets]
    if not learning[0]:
        raise BadData(
            f"none of the {len(sets[0])} rows has a token to learn within {command.config.max_seq_length} tokens",
            ["raise max_seq_length", "train_on=all", "check that the rows have assistant answers"],
        )
    if (command.validation_path or command.validation_fraction > 0) and not learning[1]:
        raise BadData("no validation row has a token to learn", ["more rows", "a larger validation_fraction"])
    return learning[0], learning[1], len(sets[0]) - len(learning[0])


def _started(
    command: Train, base: Base, rows: list[Row], validation: list[Row], skipped: int, total_steps: int
) -> TrainingStarted:
    truncated = sum(row.truncated for row in rows)
    warnings = []
    if skipped:
        warnings.append(f"{skipped} rows have nothing to learn and were left out")
    if truncated:
        warnings.append(f"{truncated} rows were truncated to {command.config.max_seq_length} tokens")
    return TrainingStarted(
        request_id=command.request_id,
        total_steps=total_steps,
        rows=len(rows),
        validation_rows=len(validation),
        skipped_rows=skipped,
        truncated_rows=truncated,
        trained_tokens=sum(row.trained_tokens for row in rows),
        trainable_parameters=sum(p.numel() for p in base.model.parameters() if p.requires_grad),
        warnings=warnings,
    )


def _write_adapter(
    output: Path, state: dict[str, Any], lora: LoraConfig, base: Base, command: Train, outcome: Outcome
) -> None:
    """Write the folder aside, flush it, and rename it: it is whole or it is not there."""
    temporary = output.with_name(output.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file(state, temporary / "adapter_model.safetensors", metadata={"format": "pt"})
    # save_pretrained writes the given object's inference_mode as True and everything else as it is.
    lora.save_pretrained(str(temporary))
    base.tokenizer.save_pretrained(temporary)
    record = {
        "base_model_id": command.base_model_id,
        "base_revision": command.base_revision,
        "config": command.config.model_dump(mode="json"),
        "outcome": asdict(outcome),
        "packages": {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")},
    }
    (temporary / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    (temporary / "README.md").write_text(_card(command, outcome), encoding="utf-8")
    for file in temporary.iterdir():
        fsync_file(file)
    # A run cut off after this point and before its record was written is trained again to the same place.
    shutil.rmtree(output, ignore_errors=True)
    os.replace(temporary, output)
    fsync_folder(output.parent)


def _card(command: Train, outcome: Outcome) -> str:
    """Write the model card, with the front matter that the Hub reads."""
    evaluation = (
        f"- Evaluation loss: {outcome.initial_eval_loss:.4f} before, {outcome.final_eval_loss:.4f} after\n"
        if outcome.initial_eval_loss is not None and outcome.final_eval_loss is not None
        else ""
    )
    config = json.dumps(command.config.model_dump(mode="json"), indent=2)
    return (
        f"---\nbase_model: {command.base_model_id}\nlibrary_name: peft\ntags:\n- peft-studio\n---\n\n"
        f"# Adapter for {command.base_model_id}\n\n"
        f"- Steps: {outcome.steps}\n- Training loss: {outcome.first_loss:.4f} first, {outcome.final_loss:.4f} last\n"
        f"{evaluation}\n## Load it\n\n```python\nfrom peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'base = AutoModelForCausalLM.from_pretrained("{command.base_model_id}")\n'
        'model = PeftModel.from_pretrained(base, "path/to/this/folder")\n'
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")\n```\n\n'
        f"## Configuration\n\n```json\n{config}\n```\n"
    )
