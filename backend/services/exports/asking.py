"""A command of an export, sent to an engine: its progress is the export's, and a stop of the export stops it."""

from collections.abc import Callable

from domain import protocol
from domain.protocol import R
from services.engines.process import CommandFailed, EngineDied, EngineProcess, death_class
from services.exports.control import ExportControl, ExportStopped


def ask(
    process: EngineProcess,
    control: ExportControl,
    command: protocol.Command[R, protocol.Progress],
    oom_kills: Callable[[], int],
    stop: Callable[[], None] | None = None,
) -> R:
    """Have an engine carry a command out.

    Args:
        oom_kills: Counts the processes that the kernel has killed for want of memory.
        stop: Ends the command early. If None, the engine is asked to end it.

    Raises:
        ExportStopped: Somebody stopped the export.
        CommandFailed, EngineDied: As the engine says, or how it ended.
    """
    control.check()
    kills = oom_kills()
    future = process.request(command, lambda event: control.report(event.stage, event.fraction))
    control.call_on_stop(stop or (lambda: process.stop(command.request_id)))
    try:
        return future.result()
    except CommandFailed as error:
        if error.extras["error_class"] == "cancelled":
            raise ExportStopped("The export was stopped.") from error
        raise
    except EngineDied as error:
        control.check()  # the server ends and its engines with it, or the stop ended this one
        error.extras["error_class"] = death_class(error, out_of_memory=oom_kills() > kills)
        raise
