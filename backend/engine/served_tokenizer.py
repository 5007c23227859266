"""The tokenizer that a model is used with, bare or with an adapter."""

import tempfile
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from llguidance import LLTokenizer
from llguidance.hf import from_tokenizer

from engine.batches import FALLBACK_TEMPLATE
from engine.errors import BadModel, BadSetting
from engine.rendering import ChatRenderer
from engine.text_tokens import TextTokenizer
from engine.tokenizer_folder import fingerprint, save_tokenizer, write_used_tokenizer
from engine.tool_syntax import ToolSyntax, tool_syntax
from engine.transformers_backend import load_tokenizer
from engine.turn_ends import TurnEnds, turn_ends

TemplateSource = Literal["model", "adapter", "none: a plain one is used"]


def complete_tokenizer(tokenizer: Any) -> None:
    """Give a tokenizer a chat template and a padding token if it has none.

    Raises:
        BadModel: It cannot tell which characters a token stands for, so nothing could be masked.
    """
    if tokenizer.chat_template is None:
        tokenizer.chat_template = FALLBACK_TEMPLATE
    if tokenizer.pad_token_id is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    if not tokenizer.is_fast:
        raise BadModel("the tokenizer has no fast version, so tokens cannot be traced back to characters")


class ServedTokenizer:
    """A tokenizer with its chat template and what ends its turns.

    Args:
        tokenizer: Complete.
        adapted: Whether the chat template is an adapter's.
        said_ends: The end tokens that the model's generation config names.
    """

    def __init__(self, tokenizer: Any, *, adapted: bool, said_ends: Any) -> None:
        self.tokenizer = tokenizer
        self._adapted, self._said_ends = adapted, said_ends

    @property
    def template_source(self) -> TemplateSource:
        """Whose chat template is used."""
        if self.tokenizer.chat_template == FALLBACK_TEMPLATE:
            return "none: a plain one is used"
        return "adapter" if self._adapted else "model"

    @cached_property
    def renderer(self) -> ChatRenderer:
        """Renders conversations."""
        return ChatRenderer(self.tokenizer)

    @cached_property
    def text(self) -> TextTokenizer:
        """Tokenizes plain texts."""
        return TextTokenizer(self.tokenizer)

    @cached_property
    def ends(self) -> TurnEnds:
        """The tokens and texts that end an answer."""
        return turn_ends(self.tokenizer, self.renderer, self._said_ends)

    @cached_property
    def tool_syntax(self) -> ToolSyntax | None:
        """How calls of tools are written; None if that is not known."""
        marks = self.tokenizer.convert_ids_to_tokens(list(self.ends.ids))
        return tool_syntax(self.tokenizer, self.renderer, [*marks, *self.ends.texts])

    @cached_property
    def constrained(self) -> LLTokenizer:
        """The tokenizer as grammars need it. It is made for the first answer that is held to a form.

        Raises:
            ValueError: Its kind is not known there.
        """
        return from_tokenizer(self.tokenizer, eos_token=list(self.ends.ids) or None)


class ServedTokenizers:
    """The tokenizers of a base and of the adapters on it. Equal ones are in memory once.

    Args:
        tokenizer: The base's, complete.
        said_ends: The end tokens that the model's generation config names.
    """

    def __init__(self, tokenizer: Any, said_ends: Any) -> None:
        self._said_ends = said_ends
        self.of_base = ServedTokenizer(tokenizer, adapted=False, said_ends=said_ends)
        self._by_folder: dict[Path, ServedTokenizer] = {}

    def of_adapter(self, folder: Path) -> ServedTokenizer:
        """Return the tokenizer that an adapter is used with. It is read at the first call.

        Raises:
            BadSetting: The adapter's own cannot be used.
        """
        if folder not in self._by_folder:
            with tempfile.TemporaryDirectory() as scratch:
                self._by_folder[folder] = self.written(folder, Path(scratch))
        return self._by_folder[folder]

    def forget(self, folder: Path | None) -> None:
        """Drop an adapter's tokenizer, if it was read."""
        if folder is not None:
            self._by_folder.pop(folder, None)

    def written(self, adapter: Path, folder: Path) -> ServedTokenizer:
        """Write the tokenizer that an adapter is used with into a folder, and return it.

        Raises:
            BadSetting: The adapter's own cannot be used.
        """
        try:
            adapted = write_used_tokenizer(self.of_base.tokenizer, adapter, folder)
            if fingerprint(folder) == self._base_fingerprint:
                tokenizer = self.of_base.tokenizer
            else:
                tokenizer = load_tokenizer(folder)
                complete_tokenizer(tokenizer)
        except (OSError, ValueError, KeyError, TypeError, BadModel) as error:
            raise BadSetting(f"the adapter's tokenizer cannot be used: {error}") from error
        return ServedTokenizer(tokenizer, adapted=adapted, said_ends=self._said_ends)

    @cached_property
    def _base_fingerprint(self) -> str:
        with tempfile.TemporaryDirectory() as scratch:
            save_tokenizer(self.of_base.tokenizer, Path(scratch))
            return fingerprint(Path(scratch))
