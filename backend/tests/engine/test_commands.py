"""Every command has one handler and one result, and what is not a command is not in the table."""

from typing import Any, get_args, get_type_hints

import pytest
from pydantic import BaseModel

from domain import protocol
from engine.commands import CommandLoop
from tests.support.training_command import TestChannel

COMMANDS = get_args(protocol.AnyCommand)


def _loop() -> CommandLoop:
    return CommandLoop(TestChannel())


def _leaves(kind: type[object]) -> list[type[object]]:
    found: list[type[object]] = kind.__subclasses__()
    return [leaf for below in found for leaf in (_leaves(below) or [below])]


def test_every_command_is_sent_and_has_a_handler() -> None:
    # pydantic makes a class of `Command[…]` as well, above each command.
    written = {kind for kind in _leaves(protocol.Command) if "[" not in kind.__name__}
    assert written == set(COMMANDS) == set(_loop().handlers)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.__name__)
def test_a_handler_takes_its_command_and_returns_its_result(command: type[protocol.Command[Any, Any]]) -> None:
    types = get_type_hints(_loop().handlers[command])
    assert types == {"command": command, "return": command.result_type()}
    assert all(issubclass(event, BaseModel) for event in command.event_types())


def test_every_event_but_the_final_ones_belongs_to_a_command() -> None:
    told = {event for command in COMMANDS for event in command.event_types()}
    assert told | {protocol.Done, protocol.Failed} == set(get_args(protocol.CommandEvent))


def test_a_command_with_no_base_fails_and_the_loop_goes_on() -> None:
    channel = TestChannel()
    loop = CommandLoop(channel)
    command = protocol.DetachAdapter(adapter_id="a")
    loop._serve(command)
    assert channel.events == [
        protocol.Failed(
            request_id=command.request_id, error_class="bad_setting", message="no base is loaded", suggestions=[]
        )
    ]


def test_kinds_are_different_and_each_line_is_read_back_as_it_was() -> None:
    lines = [*COMMANDS, *get_args(protocol.Signal)]
    kinds = [line.model_fields["kind"].default for line in lines]
    assert len(set(kinds)) == len(kinds)
    command = protocol.DetachAdapter(adapter_id="a")
    assert protocol.COMMANDS.validate_json(protocol.encode(command)) == command
