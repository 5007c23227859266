"""The engine's end of the two pipes: commands in, events out."""

import os
import queue
import threading
import time
from contextlib import suppress

from pydantic import BaseModel, ValidationError

from domain import protocol


class Stopped(Exception):
    """The client asked that the running command end now, in the way that `mode` says."""

    def __init__(self, mode: protocol.StopMode) -> None:
        super().__init__(mode)
        self.mode = mode


class Channel:
    """Reads commands on a thread of its own, so that `stop` and end-of-file are seen while torch works."""

    def __init__(self, command_fd: int, event_fd: int) -> None:
        self._commands = os.fdopen(command_fd, "rb")
        self._events = os.fdopen(event_fd, "wb", buffering=0)
        self._write_lock = threading.Lock()
        self._queue: queue.Queue[protocol.AnyCommand] = queue.Queue()
        self._rest_lock = threading.Lock()
        self._awake = threading.Event()
        self._awake.set()
        self._stops: dict[str, protocol.StopMode] = {}
        self._checkpoints_wanted: set[str] = set()
        threading.Thread(target=self._read, name="commands", daemon=True).start()
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def _read(self) -> None:
        for line in self._commands:
            try:
                command = protocol.COMMANDS.validate_json(line)
            except ValidationError as error:
                # Only a server of another version could send this. It must not be dropped silently.
                print(f"not a command: {error}", flush=True)  # noqa: T201 - the engine's log file
                continue
            if isinstance(command, protocol.Stop):
                self._stops[command.target_id] = command.mode
            elif isinstance(command, protocol.WriteCheckpoint):
                self._checkpoints_wanted.add(command.target_id)
            else:
                with self._rest_lock:
                    self._queue.put(command)
                    self._awake.set()
        os._exit(0)  # end-of-file: the server is gone

    def _beat(self) -> None:
        while True:
            self._awake.wait()
            self.emit(protocol.Heartbeat())
            time.sleep(protocol.HEARTBEAT_S)

    def next_command(self) -> protocol.AnyCommand:
        """Wait for the next command."""
        return self._queue.get()

    def waiting_commands(self) -> list[protocol.AnyCommand]:
        """Take the commands that have come, if any have."""
        found = []
        with suppress(queue.Empty):
            while True:
                found.append(self._queue.get_nowait())
        return found

    def rest(self) -> None:
        """Send no heartbeats until the next command. Every thread of the process then waits for the pipe."""
        with self._rest_lock:
            if self._queue.empty():
                self._awake.clear()

    def emit(self, event: BaseModel) -> None:
        """Send one event. A pipe with no reader left ends the process."""
        data = protocol.encode(event)
        try:
            with self._write_lock:
                view = memoryview(data)
                while view:
                    view = view[self._events.write(view) or 0 :]
        except BrokenPipeError:
            os._exit(0)

    def stop_requested(self, request_id: str) -> bool:
        """Tell whether the client asked to end the command."""
        return request_id in self._stops

    def check_stop(self, request_id: str) -> None:
        """Raise Stopped if the client asked to end the command."""
        mode = self._stops.get(request_id)
        if mode is not None:
            raise Stopped(mode)

    def take_checkpoint_request(self, request_id: str) -> bool:
        """Tell whether the client asked for a checkpoint since the last call."""
        if request_id not in self._checkpoints_wanted:
            return False
        self._checkpoints_wanted.discard(request_id)
        return True
