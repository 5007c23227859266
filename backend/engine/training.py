"""The `train` command: reads the data, makes the adapter, goes on from a checkpoint, trains, and writes the adapter."""

from array import array
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import set_seed

from domain.datasets.split import NothingToHoldOut, held_out, row_content
from domain.experts import what_is_left_out
from domain.jobs.figures import TrainingFigures
from domain.peft.objectives import SPECS as OBJECTIVES
from domain.protocol import Progress, Train, TrainingStarted
from engine import methods
from engine.adapter_check import TrainedAnswers
from engine.base import Base
from engine.batches import read_rows
from engine.card import LossRecorder, packages
from engine.channel import Channel
from engine.checkpoints import Checkpoint, CheckpointFolder, Tensors
from engine.continuing import initial_folder
from engine.errors import BadData, ExportDiffers
from engine.examples import ExampleTokenizer, teaches
from engine.frozen_weights import original_weights_kept
from engine.gradient_workers import GradientWorkers
from engine.handing_out import HandingOut, saving
from engine.initialisation import create_adapter
from engine.packing import require_rows_kept_apart
from engine.rows import RowStore
from engine.trainer import Trainer

_MOST_NAMED = 20
_ROUNDED_RESIDUAL = (
    "the losses of this run are on the rounded residual of the weights; the adapter is handed out for the model as "
    "published, and on it, or on the 4-bit base that serves it here, the rounding is another (docs/methods.md)"
)


class _ChannelControl:
    """The trainer's control over the channel of one request."""

    def __init__(self, channel: Channel, request_id: str) -> None:
        self._channel, self._request_id = channel, request_id

    def check_stop(self) -> None:
        self._channel.check_stop(self._request_id)

    def take_checkpoint_request(self) -> bool:
        return self._channel.take_checkpoint_request(self._request_id)


def train(base: Base, command: Train, channel: Channel) -> TrainingFigures:
    """Train a new adapter and leave it on the base under its name.

    Raises:
        CommandError: Of the class that says why.
        Stopped: The client ended the run.
        StorageFull: No space is left for the adapter or a checkpoint.
        CannotSave: The adapter or a checkpoint cannot be written, in the trial before the run or after it. What was
            trained is in the last checkpoint.
    """
    control, recorder = _ChannelControl(channel, command.request_id), LossRecorder(channel.emit)
    if command.config.packing:
        require_rows_kept_apart(base)
    rows, validation, skipped = _load_rows(base, command, channel, control.check_stop)
    output = Path(command.output_path)
    output.parent.mkdir(parents=True, exist_ok=True)
    checkpoints = _checkpoint_folder(command)
    damaged: list[str] = []
    resume = checkpoints.newest(command.recorded_step, lambda name, why: damaged.append(f"{name}: {why}"))
    if resume is not None and _begins_with(command, resume):
        resume = _with_patience(resume, command.config.early_stopping_patience)
    base.detach(command.adapter_id)  # an earlier run may have handed it out without a record
    try:
        changed = methods.changed_layers(base.model, command.config)
        with (
            original_weights_kept(base.model, changed, output.parent),
            GradientWorkers(base, [] if command.hands_out else command.workers) as workers,
        ):
            channel.emit(Progress(request_id=command.request_id, stage="adapter", fraction=None))
            initial = _create_adapter(base, command, resume, channel)
            workers.prepare(command, initial, control.check_stop)
            trainer = Trainer(
                base,
                command.config,
                rows,
                validation,
                request_id=command.request_id,
                emit=recorder.emit,
                control=control,
                checkpoints=checkpoints,
                resume=resume,
                initial=initial,
            )
            if workers.devices > 1:
                trainer.share_with(workers)
            handing_out = HandingOut(base, command, initial)
            with saving(f"{trainer.progress.step} steps are trained"):
                handing_out.prove()
                trainer.prove()
            started = _started(command, base, rows, validation, skipped, trainer.total_steps)
            resumed = {"resumed_from_step": resume.progress.step if resume else None, "skipped_checkpoints": damaged}
            channel.emit(TrainingStarted(**started, **resumed))
            outcome = trainer.hand_out() if command.hands_out else trainer.run()
            with saving(f"the run has ended after step {outcome.steps}"):
                handing_out.write(outcome, recorder.losses)
                answers = TrainedAnswers(base, command.adapter_id, command.config)
    finally:
        base.detach(command.adapter_id)
    # The adapter that is served comes from the files that are handed out.
    with saving(f"the run has ended after step {outcome.steps}"):
        base.attach(command.adapter_id, output)
        try:
            answers.compare(base)
        except ExportDiffers as error:
            base.detach(command.adapter_id)
            raise ExportDiffers(f"{error.message}; they are kept in {handing_out.set_aside()}") from error
    return TrainingFigures(
        **dict(outcome),
        trainable_parameters=started["trainable_parameters"],
        rows=started["rows"],
        validation_rows=started["validation_rows"],
        memory_bytes=base.memory_bytes(),
    )


def _checkpoint_folder(command: Train) -> CheckpointFolder:
    about = {
        "base_model_id": command.base_model_id,
        "base_revision": command.base_revision,
        "config": command.config.model_dump(mode="json"),
        "packages": packages(),
    }
    return CheckpointFolder(
        Path(command.checkpoints_path), command.config.keep_checkpoints, command.max_checkpoint_bytes, about
    )


def _begins_with(command: Train, checkpoint: Checkpoint) -> bool:
    """Tell whether a checkpoint is the one of another job that this job began with, and not one of its own."""
    begun_with = command.about.resumed_from if command.about is not None else None
    return begun_with is not None and begun_with.endswith(f"/step-{checkpoint.progress.step:08d}")


def _with_patience(checkpoint: Checkpoint, patience: int | None) -> Checkpoint:
    """Count the patience anew if the run that wrote the checkpoint ended for lack of it: more steps are asked for."""
    if patience is None or checkpoint.progress.waits < patience:
        return checkpoint
    return replace(checkpoint, progress=replace(checkpoint.progress, waits=0))


def _create_adapter(base: Base, command: Train, resume: Checkpoint | None, channel: Channel) -> Tensors:
    """Put the adapter on the base; return A and B as initialised if they are needed to convert it afterwards."""
    config = command.config
    set_seed(config.seed)
    again = resume.initial if resume is not None and resume.initial else None

    def before_layer(done: float) -> None:
        channel.check_stop(command.request_id)
        channel.emit(Progress(request_id=command.request_id, stage="adapter", fraction=done))

    return create_adapter(
        base,
        command.adapter_id,
        config,
        command.base_model_id,
        command.base_revision,
        again,
        continues=initial_folder(command),
        before_layer=before_layer,
    )


def _load_rows(
    base: Base, command: Train, channel: Channel, check_stop: Callable[[], None]
) -> tuple[RowStore, RowStore, int]:
    """Tokenize both sets. Rows with nothing to learn are counted and left out."""
    dataset = Path(command.dataset_path)
    paths = [dataset, Path(command.validation_path)] if command.validation_path else [dataset]
    held = _held_out(dataset, command.validation_fraction, command.config.seed)
    total = sum(_count_lines(path) for path in paths)
    tokenizer = ExampleTokenizer(base.tokenizer, command.config)
    training, validation, idle, done = RowStore(), RowStore(), array("q"), 0
    for validates, path in enumerate(paths):
        for number, row in enumerate(read_rows(path)):
            if done % 100 == 0:
                check_stop()
                channel.emit(Progress(request_id=command.request_id, stage="tokenizing", fraction=done / total))
            done += 1
            trains = not validates and number not in held
            for example in tokenizer.examples(number, row):
                if not teaches(example):
                    idle.extend([number] if trains else [])
                    continue
                for sequence in example:
                    (training if trains else validation).add(sequence)
    if not training:
        raise BadData(
            f"none of the rows to train on has a token to learn within {command.config.max_seq_length} tokens: "
            + _named(idle),
            ["raise max_seq_length", "train_on=all", "check that the rows have assistant answers"],
        )
    if (command.validation_path or held) and not validation:
        raise BadData("no validation row has a token to learn", ["more rows", "a larger validation_fraction"])
    return training, validation, len(idle)


def _count_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for _ in file)


def _named(numbers: Sequence[int]) -> str:
    """Name the first rows, counted from 1, and the number of the others."""
    more = f" and {len(numbers) - _MOST_NAMED} more" if len(numbers) > _MOST_NAMED else ""
    return f"rows {', '.join(str(number + 1) for number in numbers[:_MOST_NAMED])}{more}"


def _held_out(path: Path, fraction: float, seed: int) -> frozenset[int]:
    """Choose rows to hold out for validation. Rows of the same content are all held out or all trained on."""
    if fraction == 0:
        return frozenset()
    try:
        return held_out((row_content(row) for row in read_rows(path)), fraction, seed)
    except NothingToHoldOut as error:
        raise BadData(str(error), ["more rows", "a validation_dataset_id"]) from error


def _started(
    command: Train, base: Base, rows: RowStore, validation: RowStore, skipped: int, total_steps: int
) -> dict[str, Any]:
    truncated, per_row = rows.truncated, OBJECTIVES[command.config.objective].sequences
    warnings = []
    if command.config.quantization != "none" and methods.changed_layers(base.model, command.config):
        warnings.append(_ROUNDED_RESIDUAL)
    warnings += what_is_left_out(None, command.config) if methods.targeted_experts(base.model, command.config) else []
    if skipped:
        warnings.append(f"{skipped} rows have nothing to learn and were left out")
    if truncated:
        what = "rows" if per_row == 1 else "answers"
        warnings.append(f"{truncated} {what} were truncated to {command.config.max_seq_length} tokens")
    return {
        "request_id": command.request_id,
        "total_steps": total_steps,
        "rows": len(rows) // per_row,
        "validation_rows": len(validation) // per_row,
        "skipped_rows": skipped,
        "truncated_rows": truncated,
        "trained_tokens": rows.trained_tokens,
        "trainable_parameters": sum(p.numel() for p in base.model.parameters() if p.requires_grad),
        "warnings": warnings,
    }
