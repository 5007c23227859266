"""Forms that an answer is held to: JSON by a schema, or calls of tools."""

from pydantic import BaseModel, ConfigDict, JsonValue

Schema = dict[str, JsonValue]
ANY_OBJECT: Schema = {"type": "object"}


class _Form(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ToolForm(_Form):
    """A tool that may be called.

    Attributes:
        arguments: The schema of its arguments.
    """

    name: str
    arguments: Schema


class CallsForm(_Form):
    """Calls of tools, as the chat template writes them.

    Attributes:
        required: Whether the answer is one. Otherwise a text may be answered instead, or come before.
        several: Whether it may be several.
    """

    tools: list[ToolForm]
    required: bool
    several: bool


class AnswerForm(_Form):
    """What an answer is held to. With both, it is one of them.

    Attributes:
        field: The request's field that asks for it, for the message of a refusal.
        json_schema: The answer is JSON that this describes.
    """

    field: str
    json_schema: Schema | None = None
    calls: CallsForm | None = None
