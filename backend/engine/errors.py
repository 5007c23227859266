"""Why a command failed, in the classes of domain/protocol.py.

CommandError
├── BadData       the rows cannot be trained on
├── BadSetting    a setting cannot take effect on this model
├── BadForm       an answer cannot be held to its form
├── BadModel      the model's files cannot be loaded
├── NotFinite     the loss became NaN or infinite
├── ExportDiffers an export is not what base and adapter make
├── CannotSave    what was trained, or would be, cannot be written as an adapter
├── OutOfMemory   the device has no memory left
├── NoRoom        an answer does not fit beside what is in memory now
└── WorkerDied    a process that computes gradients on another device ended
"""

from typing import ClassVar

from domain.protocol import ErrorClass


class CommandError(Exception):
    """A failure whose cause is known. `suggestions` say what to change, best first."""

    error_class: ClassVar[ErrorClass] = "engine"

    def __init__(self, message: str, suggestions: list[str] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.suggestions = suggestions or []


class BadData(CommandError):
    """The rows cannot be trained on."""

    error_class = "bad_data"


class BadSetting(CommandError):
    """A setting cannot take effect on this model."""

    error_class = "bad_setting"


class BadForm(CommandError):
    """An answer cannot be held to its form."""

    error_class = "bad_form"


class BadModel(CommandError):
    """The model's files cannot be loaded."""

    error_class = "bad_model"


class NotFinite(CommandError):
    """The loss became NaN or infinite."""

    error_class = "not_finite"


class ExportDiffers(CommandError):
    """An export is not what base and adapter make."""

    error_class = "export_differs"


class CannotSave(CommandError):
    """What was trained, or would be, cannot be written as an adapter."""

    error_class = "cannot_save"


class OutOfMemory(CommandError):
    """The device has no memory left."""

    error_class = "out_of_memory"


class WorkerDied(CommandError):
    """A process that computes gradients on another device ended."""

    error_class = "worker_died"


class NoRoom(CommandError):
    """An answer does not fit beside what is in memory now; later it may."""

    error_class = "no_room"
