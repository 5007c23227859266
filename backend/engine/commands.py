"""The command loop: one command at a time but for answers, one final event each, whatever happens."""

import traceback
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from core.errors import StorageFull
from domain import protocol
from domain.exports import ExportCheck, GgufFile, MergedModel
from domain.jobs.figures import TrainingFigures
from domain.results import DatasetFigures, Described, Generated, Loaded, MemoryHeld, Prepared, WarmedUp
from engine.base import Base
from engine.channel import Channel, Stopped
from engine.errors import BadSetting, CommandError, OutOfMemory
from engine.heap import give_back
from engine.row_check import NotTogether, RowFacts, row_facts

# These come in quick succession and free little memory.
_SHORT = (protocol.Generate, protocol.AttachAdapter, protocol.DetachAdapter)


class CommandLoop:
    """Carries out commands on the one base model of this process."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._base: Base | None = None
        self._rows: RowFacts | NotTogether | None = None  # whether answers are written together; None: nobody has asked
        self.handlers = dict(
            [
                protocol.WarmUp.carried_out_by(self._warm_up),
                protocol.LoadBase.carried_out_by(self._load),
                protocol.AttachAdapter.carried_out_by(self._attach),
                protocol.DetachAdapter.carried_out_by(self._detach),
                protocol.Generate.carried_out_by(self._generate),
                protocol.Train.carried_out_by(self._train),
                protocol.Analyze.carried_out_by(self._analyze),
                protocol.Describe.carried_out_by(self._describe),
                protocol.Merge.carried_out_by(self._merge),
                protocol.ExportGguf.carried_out_by(self._export_gguf),
                protocol.CheckExport.carried_out_by(self._check_export),
                protocol.PrepareGguf.carried_out_by(self._prepare_gguf),
                protocol.PreparePickled.carried_out_by(self._prepare_pickled),
            ]
        )

    def run(self) -> None:
        """Serve commands until end-of-file on the command pipe ends the process."""
        commands: deque[protocol.AnyCommand] = deque()
        while True:
            if not commands:
                commands.append(self._channel.next_command())
            if isinstance(commands[0], protocol.Generate) and not self._only_alone():
                self._answer(commands)
            if commands:
                self._serve(commands.popleft())

    def _serve(self, command: protocol.AnyCommand) -> None:
        request_id = command.request_id
        with self._told(request_id):
            self._channel.check_stop(request_id)
            result = self.handlers[type(command)](command)
            self._channel.emit(protocol.Done(request_id=request_id, result=result.model_dump(mode="json")))
        if not isinstance(command, _SHORT):
            give_back()  # here the memory is free after a failure too
        if isinstance(command, protocol.WarmUp):
            self._channel.rest()

    def _only_alone(self) -> bool:
        """Whether answers of the base are written one after the other. It is found out at the first one."""
        if self._base is None:
            return True
        if self._rows is None:
            try:
                self._rows = row_facts(self._base)
            except NotTogether as why:
                print(f"answers are written one after the other: {why}", flush=True)  # noqa: T201 - the engine's log
                self._rows = why
        return isinstance(self._rows, Exception)

    def _answer(self, commands: deque[protocol.AnyCommand]) -> None:
        """Write answers together, from the first command on."""
        from engine.answering import Answering

        if self._base is not None and isinstance(self._rows, RowFacts):
            Answering(self._base, self._channel, self._rows, self._serve, self._told).run(commands)

    @contextmanager
    def _told(self, request_id: str) -> Iterator[None]:
        """Report the failure of a command, in the classes of the protocol, if what happens within raises."""
        try:
            yield
        except Stopped as stopped:
            self._fail(request_id, "paused" if stopped.mode == "pause" else "cancelled", "stopped on request", [])
        except CommandError as error:
            self._fail(request_id, error.error_class, error.message, error.suggestions)
        except torch.OutOfMemoryError as error:
            self._fail(request_id, OutOfMemory.error_class, str(error), OUT_OF_MEMORY_SUGGESTIONS)
        except MemoryError:
            self._fail(request_id, OutOfMemory.error_class, "the host has no memory left", OUT_OF_MEMORY_SUGGESTIONS)
        except StorageFull as error:
            self._fail(request_id, "disk_full", error.detail, ["free space, then resume the job"])
        except Exception as error:  # noqa: BLE001 - the traceback goes to the log, the class to the client
            traceback.print_exc()
            self._fail(request_id, "engine", f"{type(error).__name__}: {error}", [])

    def _fail(self, request_id: str, error_class: protocol.ErrorClass, message: str, suggestions: list[str]) -> None:
        self._channel.emit(
            protocol.Failed(request_id=request_id, error_class=error_class, message=message, suggestions=suggestions)
        )

    # Handlers. Each imports what it needs: an engine that trains does not need the libraries of an export.

    def _warm_up(self, command: protocol.WarmUp) -> WarmedUp:
        from engine.warming import warm_up

        return warm_up()

    def _load(self, command: protocol.LoadBase) -> Loaded:
        if self._base is not None:
            raise BadSetting("this engine already holds a base")
        base = self._base = Base(Path(command.model_path), command.config, command.device, command.engine)
        return Loaded(total_parameters=base.total_parameters, memory_bytes=base.memory_bytes(), load_s=base.load_s)

    def _attach(self, command: protocol.AttachAdapter) -> MemoryHeld:
        base = self._loaded()
        base.attach(command.adapter_id, Path(command.path))
        return MemoryHeld(memory_bytes=base.memory_bytes())

    def _detach(self, command: protocol.DetachAdapter) -> MemoryHeld:
        base = self._loaded()
        base.detach(command.adapter_id)
        return MemoryHeld(memory_bytes=base.memory_bytes())

    def _generate(self, command: protocol.Generate) -> Generated:
        base = self._loaded()
        from engine.generation import generate

        return generate(base, command, self._channel)

    def _train(self, command: protocol.Train) -> TrainingFigures:
        base = self._loaded()
        from engine.training import train

        figures = train(base, command, self._channel)
        give_back()
        return figures.model_copy(update={"memory_bytes": base.memory_bytes()})

    def _analyze(self, command: protocol.Analyze) -> DatasetFigures:
        from engine.analysis import analyze

        return analyze(command, self._channel)

    def _describe(self, command: protocol.Describe) -> Described:
        from engine.outline import describe, limit_memory

        if self._base is None:
            limit_memory()
        return describe(command.config)

    def _merge(self, command: protocol.Merge) -> MergedModel:
        base = self._loaded()
        from engine.merge import merge

        return merge(base, command, self._channel)

    def _export_gguf(self, command: protocol.ExportGguf) -> GgufFile:
        base = self._loaded()
        from engine.gguf_export import export_gguf

        return export_gguf(base, command, self._channel)

    def _check_export(self, command: protocol.CheckExport) -> ExportCheck:
        from engine.export_check import check_export

        return check_export(command, self._channel)

    def _prepare_gguf(self, command: protocol.PrepareGguf) -> Prepared:
        from engine.gguf import prepare_gguf

        return prepare_gguf(command, self._channel)

    def _prepare_pickled(self, command: protocol.PreparePickled) -> Prepared:
        from engine.pickled import prepare_pickled

        return prepare_pickled(command, self._channel)

    def _loaded(self) -> Base:
        if self._base is None:
            raise BadSetting("no base is loaded")
        return self._base


OUT_OF_MEMORY_SUGGESTIONS = [
    "halve batch_size and double gradient_accumulation: the effective batch stays",
    "gradient_checkpointing=true",
    "halve max_seq_length",
    "algorithm qlora: a 4-bit base",
]
