"""A byte-level BPE tokenizer in the terms of GGUF."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, SpecialVocab, TokenType
from transformers import AutoTokenizer

from core.errors import ExportRejected
from domain.models.gguf import pre_tokenizer_name
from engine.turn_ends import TurnEnds


@dataclass(frozen=True)
class GgufTokenizer:
    """A tokenizer as a GGUF file describes it.

    Attributes:
        pre: llama.cpp's name for how text is split.
        tokens: By id, as many as the model has embeddings.
        kinds: The type of each token.
        special: Merges, special tokens and the chat template.
        adds_bos: Whether a text gets the beginning-of-text token.
        adds_eos: Whether a text gets the end-of-text token.
    """

    pre: str
    tokens: list[str]
    kinds: list[TokenType]
    special: SpecialVocab
    adds_bos: bool
    adds_eos: bool

    def write(self, writer: GGUFWriter) -> None:
        """Add it to a file's metadata."""
        writer.add_tokenizer_model("gpt2")  # GGUF's name for byte-level BPE
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.kinds)
        self.special.add_to_gguf(writer, quiet=True)
        writer.add_add_bos_token(self.adds_bos)
        writer.add_add_eos_token(self.adds_eos)


def read_gguf_tokenizer(folder: Path, base: Path, vocabulary: int, ends: TurnEnds) -> GgufTokenizer:
    """Read a tokenizer's folder.

    Args:
        folder: As `save_pretrained` writes it.
        base: The base's folder, whose config.json may name special tokens that the tokenizer does not.
        vocabulary: The number of embeddings that the model has.
        ends: The tokens and texts that end a turn.

    Raises:
        ExportRejected: llama.cpp would read other tokens.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ExportRejected("The tokenizer has no tokenizer.json.")
    pre = pre_tokenizer_name(json.loads(path.read_text(encoding="utf-8")))
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    tokens, kinds = _tokens(tokenizer, vocabulary)
    special = SpecialVocab(folder, load_merges=True, n_vocab=vocabulary)
    special._try_load_from_config_json(base)  # for roles that the tokenizer leaves open; its own come first
    special.chat_template = _templates(tokenizer.chat_template)
    special.add_special_token = {}  # llama.cpp guesses these; the tokenizer is asked below
    ids = tokenizer("a").input_ids
    adds_eos = bool(ids) and ids[-1] == tokenizer.eos_token_id
    _add_ends(special.special_token_ids, ends, keeps_eos=adds_eos)
    return GgufTokenizer(
        pre=pre,
        tokens=tokens,
        kinds=kinds,
        special=special,
        adds_bos=bool(ids) and ids[0] == tokenizer.bos_token_id,
        adds_eos=adds_eos,
    )


def _add_ends(roles: dict[str, int], ends: TurnEnds, *, keeps_eos: bool) -> None:
    """Name the token that ends a turn, where it is not the tokenizer's own end. llama.cpp stops at each of three roles.

    Args:
        roles: Special tokens by role. This is changed.
        ends: The tokens and texts that end a turn.
        keeps_eos: Whether texts get the tokenizer's own end token, which then keeps its role.
    """
    own = roles.get("eos")
    if ends.mark is None or own == ends.mark:
        return
    roles["eot"] = ends.mark
    if not keeps_eos:
        roles["eos"] = ends.mark
        if own is not None:
            roles.setdefault("eom", own)


def _templates(templates: str | dict[str, str] | None) -> str | list[dict[str, str]] | None:
    """Return chat templates as GGUF has them: one, or several by name with the default among them."""
    if not isinstance(templates, dict):
        return templates
    return [{"name": name, "template": template} for name, template in templates.items()]


def _tokens(tokenizer: Any, vocabulary: int) -> tuple[list[str], list[TokenType]]:
    by_id = {number: token for token, number in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    tokens, kinds = [], []
    for number in range(vocabulary):
        token, kind = by_id.get(number), TokenType.NORMAL
        if token is None:  # embeddings beyond the last token, for the sake of a round number
            token, kind = f"[PAD{number}]", TokenType.UNUSED
        elif number in added:
            kind = TokenType.CONTROL if added[number].special else TokenType.USER_DEFINED
        tokens.append(token)
        kinds.append(kind)
    return tokens, kinds
