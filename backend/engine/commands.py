"""The command loop: one command at a time, one final event each, whatever happens."""

import traceback
from pathlib import Path
from typing import Any

import torch

from core.errors import StorageFull
from domain import protocol
from engine.base import Base
from engine.channel import Channel, Stopped
from engine.errors import BadSetting, CommandError, OutOfMemory
from engine.heap import give_back

# These come one after the other, and leave little behind.
_SHORT = (protocol.Generate, protocol.AttachAdapter, protocol.DetachAdapter)


class CommandLoop:
    """Carries out commands on the one base model of this process."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._base: Base | None = None

    def run(self) -> None:
        """Serve commands; returns never (end-of-file on the command pipe ends the process)."""
        while True:
            command = self._channel.next_command()
            self._serve(command)
            if not isinstance(command, _SHORT):
                give_back()  # here it is free after a failure as well

    def _serve(self, command: Any) -> None:
        request_id = command.request_id
        try:
            self._channel.check_stop(request_id)
            result = self._dispatch(command)
            self._channel.emit(protocol.Done(request_id=request_id, result=result))
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

    def _fail(self, request_id: str, error_class: Any, message: str, suggestions: list[str]) -> None:
        self._channel.emit(
            protocol.Failed(request_id=request_id, error_class=error_class, message=message, suggestions=suggestions)
        )

    def _dispatch(self, command: Any) -> dict[str, Any]:
        if isinstance(command, protocol.LoadBase):
            return self._load(command)
        if isinstance(command, protocol.PrepareGguf):
            from engine.gguf import prepare_gguf

            return prepare_gguf(command, self._channel)
        if isinstance(command, protocol.PreparePickled):
            from engine.pickled import prepare_pickled

            return prepare_pickled(command, self._channel)
        if isinstance(command, protocol.Analyze):
            from engine.analysis import analyze

            return analyze(command, self._channel)
        base = self._loaded()
        if isinstance(command, protocol.AttachAdapter):
            base.attach(command.adapter_id, Path(command.path))
            return {"memory_bytes": base.memory_bytes()}
        if isinstance(command, protocol.DetachAdapter):
            base.detach(command.adapter_id)
            return {"memory_bytes": base.memory_bytes()}
        if isinstance(command, protocol.Generate):
            from engine.generation import generate

            return generate(base, command, self._channel)
        if isinstance(command, protocol.Train):
            from engine.training import train

            found = train(base, command, self._channel)
            give_back()
            return {**found, "memory_bytes": base.memory_bytes()}
        if isinstance(command, protocol.Merge):
            from engine.merge import merge

            return merge(base, command, self._channel)
        if isinstance(command, protocol.ExportGguf):
            from engine.gguf_export import export_gguf

            return export_gguf(base, command, self._channel)
        raise BadSetting(f"this engine does not know the command {command.kind}")

    def _load(self, command: protocol.LoadBase) -> dict[str, Any]:
        if self._base is not None:
            raise BadSetting("this engine already holds a base")
        base = Base(Path(command.model_path), command.config, command.device, command.engine)
        self._base = base
        return {
            "total_parameters": base.total_parameters,
            "trainable_parameters": base.trainable_parameters,
            "memory_bytes": base.memory_bytes(),
            "load_s": base.load_s,
            "adapters": base.adapters,
        }

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
