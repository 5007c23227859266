"""The forms that a request may hold an answer to, in OpenAI's terms: `response_format`, `tools`, `tool_choice`."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from api.peft_schemas import Request
from core.errors import Rejected
from domain.answer_forms import ANY_OBJECT, AnswerForm, CallsForm, Schema, ToolForm
from domain.answer_schemas import SchemaRefused, check_schema

Name = Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_-]+$")]


class OptionNotHere(Rejected):
    """The option would have no effect here."""

    slug, title = "option-not-here", "Option not here"


def refuse(field: str, why: str) -> OptionNotHere:
    """Return the refusal of a field."""
    message = f"{field}: {why}."
    return OptionNotHere(message, errors=[{"location": field.split("."), "message": message}])


class JsonSchema(Request):
    name: Name
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema", description="A JSON Schema; null: any object.")
    strict: bool | None = Field(default=None, description="The answer is held to the schema in either case.")


class ResponseFormat(Request):
    """What the answer is: any text, a JSON object, or JSON by a schema. Nothing else can be generated then."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def wanted(self) -> Schema | None:
        """Return the schema that the answer is held to.

        Raises:
            OptionNotHere: No answer can be held to it, with the reason.
        """
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise refuse("response_format", "json_schema goes with the type json_schema")
        if self.type == "text":
            return None
        schema = self.json_schema.schema_ if self.json_schema is not None else None
        if schema is None:
            return ANY_OBJECT
        try:
            check_schema(schema)
        except SchemaRefused as error:
            raise refuse("response_format", f"no answer can be held to the schema: {error}") from error
        return schema


class FunctionName(Request):
    name: Name


class NamedTool(Request):
    type: Literal["function"]
    function: FunctionName


class AllowedTools(Request):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=128)]


class ToolChoice(Request):
    """A function that has to be called, or those that may be."""

    type: Literal["function", "allowed_tools"]
    function: FunctionName | None = None
    allowed_tools: AllowedTools | None = None

    def names(self) -> list[str]:
        """Return the functions that may be called."""
        if self.function is not None:
            return [self.function.name]
        return [tool.function.name for tool in self.allowed_tools.tools] if self.allowed_tools is not None else []

    @property
    def required(self) -> bool:
        """Whether one has to be called."""
        return self.allowed_tools is None or self.allowed_tools.mode == "required"


class Function(Request):
    name: Annotated[str, StringConstraints(min_length=1, max_length=64)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = Field(default=None, description="Hold the arguments of calls to `parameters`.")


class Tool(Request):
    type: Literal["function"]
    function: Function


Choice = Literal["none", "auto", "required"] | ToolChoice | None


def form_of(
    wanted: ResponseFormat | None, tools: Sequence[Tool], choice: Choice, *, several: bool
) -> AnswerForm | None:
    """Return what an answer is held to; None for nothing.

    Args:
        tools: Those that are offered.
        several: Whether an answer may have several calls.

    Raises:
        OptionNotHere: Something cannot be held to, or names what there is not.
    """
    schema = wanted.wanted() if wanted is not None else None
    calls, field = _calls_of(tools, choice, several=several)
    if schema is None and calls is None:
        return None
    if calls is not None and calls.required:
        schema = None  # the answer is a call
    return AnswerForm(field=field if calls is not None else "response_format", json_schema=schema, calls=calls)


def _calls_of(tools: Sequence[Tool], choice: Choice, *, several: bool) -> tuple[CallsForm | None, str]:
    """Return the form of calls, and the field that asks for it."""
    required = choice == "required" or (isinstance(choice, ToolChoice) and choice.required)
    if isinstance(choice, ToolChoice):
        if (choice.type == "function") != (choice.function is not None) or (choice.allowed_tools is None) == (
            choice.function is None
        ):
            raise refuse("tool_choice", "send function or allowed_tools, as its type says")
        named = choice.names()
        missing = set(named) - {tool.function.name for tool in tools}
        if missing:
            raise refuse("tool_choice", f"tools has no function {', '.join(sorted(missing))}")
        tools = [tool for tool in tools if tool.function.name in named]
        several = several and choice.function is None
    if required and not tools:
        raise refuse("tool_choice", "there are no tools to call")
    forms = [ToolForm(name=tool.function.name, arguments=_arguments(place, tool)) for place, tool in enumerate(tools)]
    strict = any(tool.function.strict for tool in tools)
    if not tools or not (required or isinstance(choice, ToolChoice) or strict or not several):
        return None, ""
    field = (
        "tool_choice" if required or isinstance(choice, ToolChoice) else "tools" if strict else "parallel_tool_calls"
    )
    return CallsForm(tools=forms, required=required, several=several), field


def _arguments(place: int, tool: Tool) -> Schema:
    """Return the schema of a function's arguments; any object where it is not strict and cannot be held to."""
    schema = tool.function.parameters
    if not schema:
        return {"type": "object", "additionalProperties": False}  # as OpenAI has it: no parameters
    if schema.get("type", "object") != "object":
        raise refuse(f"tools.{place}.function.parameters", "the arguments of a call are an object")
    try:
        check_schema(schema)
    except SchemaRefused as error:
        if tool.function.strict:
            why = f"no call can be held to the schema: {error}"
            raise refuse(f"tools.{place}.function.parameters", why) from error
        return ANY_OBJECT
    return {"type": "object"} | schema
