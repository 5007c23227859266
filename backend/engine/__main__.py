"""`python -m engine`: one base model, its adapters, and the commands of domain/protocol.py."""

import gc
import os
import sys

from core.confinement import confine
from domain import protocol
from engine.lifeline import die_with_parent


def main() -> None:
    """Serve commands until the command pipe closes."""
    die_with_parent(int(os.environ["PEFT_STUDIO_PARENT_PID"]))
    # Training gives way to the server's answers: a process at nice 19 gets the processor time that is left over.
    os.nice(int(os.environ["PEFT_STUDIO_ENGINE_NICE"]))
    if refused := confine():
        print(f"This engine keeps its access to the network: {refused}", file=sys.stderr)  # noqa: T201 - its log
    command_fd = int(os.environ[protocol.COMMAND_FD_VARIABLE])
    event_fd = int(os.environ[protocol.EVENT_FD_VARIABLE])
    for descriptor in (command_fd, event_fd):
        os.set_inheritable(descriptor, False)  # a library's own subprocess must not hold the pipes open

    from engine.channel import Channel

    channel = Channel(command_fd, event_fd)
    from engine.guards import before_transformers

    before_transformers()
    from engine.commands import CommandLoop

    # What the libraries brought stays until the end. Looking through all half a million objects for garbage took 275 ms
    # of processor time, in the middle of a token or an adapter's load; without them it takes 2.
    gc.freeze()
    CommandLoop(channel).run()


if __name__ == "__main__":
    main()
