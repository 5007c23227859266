"""Reads a byte-level BPE tokenizer out of a GGUF file. It is the same as in the model's own repository.

`tokenizer.ggml.pre` says how text is split before it is merged. transformers ignores it and goes by the model's
architecture, so the same text could become other tokens than those that the model was trained on.
"""

from pathlib import Path
from typing import Any

from gguf import GGUFReader, TokenType
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from domain.models.gguf import pre_tokenizer_of
from engine.errors import BadModel

_ROLES = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}  # GGUF's names, transformers' names
_ENDS = ("eos", "eot", "eom")
_SPECIAL = (TokenType.CONTROL, TokenType.UNKNOWN)


class GgufMetadata:
    """The metadata of a GGUF file: everything but its tensors.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self._fields = GGUFReader(path).fields

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value, or the default where the file does not have it."""
        field = self._fields.get(key)
        return field.contents() if field is not None else default

    @property
    def has_byte_level_tokenizer(self) -> bool:
        """Whether its tokenizer is byte-level BPE, the kind that `pre` belongs to."""
        return bool(self.get("tokenizer.ggml.model") == "gpt2")  # GGUF's name for byte-level BPE

    def token_of(self, role: str) -> int | None:
        """Return the token of a role."""
        token = self.get(f"tokenizer.ggml.{role}_token_id")
        return None if token is None else int(token)

    @property
    def ends(self) -> list[int]:
        """The tokens that end an answer."""
        return list(dict.fromkeys(token for role in _ENDS if (token := self.token_of(role)) is not None))


def read_tokenizer(metadata: GgufMetadata) -> Any:
    """Build the tokenizer.

    Raises:
        BadModel: The file does not say how text is split, or names an unknown way.
    """
    name = str(metadata.get("tokenizer.ggml.pre", ""))
    splitter = pre_tokenizer_of(name)
    if splitter is None:
        said = f"by {name!r:.40}, which is not known here" if name else "in no way that the file names"
        raise BadModel(
            f"the tokenizer of the GGUF file splits text {said}: it would read other tokens than the model's"
        )
    tokens, kinds = metadata.get("tokenizer.ggml.tokens", []), metadata.get("tokenizer.ggml.token_type", [])
    kinds = kinds or [TokenType.NORMAL] * len(tokens)
    used = [number for number, kind in enumerate(kinds) if kind != TokenType.UNUSED]
    merges = [tuple(merge.split(" ", 1)) for merge in metadata.get("tokenizer.ggml.merges", [])]
    vocabulary = {tokens[number]: number for number in used}
    core = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=splitter.ignores_merges))
    if splitter.composes:
        core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.Sequence([_step(step) for step in splitter.steps])
    core.decoder = decoders.ByteLevel()
    marks = [number for number in used if kinds[number] in (*_SPECIAL, TokenType.USER_DEFINED)]
    core.add_tokens(
        [AddedToken(tokens[number], normalized=False, special=kinds[number] in _SPECIAL) for number in marks]
    )
    _surround(core, metadata, tokens, adds_bos=splitter.adds_bos)
    roles = {theirs: metadata.token_of(ours) for ours, theirs in _ROLES.items()}
    named = {f"{role}_token": tokens[number] for role, number in roles.items() if number is not None}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False, **named)
    tokenizer.chat_template = _templates(metadata)
    return tokenizer


def _step(step: dict[str, Any]) -> Any:
    if step["type"] == "Digits":
        return pre_tokenizers.Digits(individual_digits=True)
    if step["type"] == "ByteLevel":
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=step["use_regex"])
    from tokenizers import Regex

    return pre_tokenizers.Split(Regex(step["pattern"]["Regex"]), behavior="isolated")


def _surround(core: Tokenizer, metadata: GgufMetadata, tokens: list[str], *, adds_bos: bool) -> None:
    """Have the tokenizer put around a text the tokens that the file names."""
    bos, eos = metadata.token_of("bos"), metadata.token_of("eos")
    before = bos is not None and metadata.get("tokenizer.ggml.add_bos_token", adds_bos)
    after = eos is not None and metadata.get("tokenizer.ggml.add_eos_token", False)
    added = [
        (tokens[number], number) for number, wanted in ((bos, before), (eos, after)) if number is not None and wanted
    ]
    if added:
        begins, ends = (added[0][0],) if before else (), (added[-1][0],) if after else ()
        core.post_processor = processors.TemplateProcessing(
            single=[*begins, "$A", *ends],
            pair=[*begins, "$A", *ends, *(f"{mark}:1" for mark in begins), "$B:1", *(f"{mark}:1" for mark in ends)],
            special_tokens=list(dict(added).items()),
        )


def _templates(metadata: GgufMetadata) -> str | dict[str, str] | None:
    default = metadata.get("tokenizer.chat_template")
    names = metadata.get("tokenizer.chat_templates", [])
    named = {name: metadata.get(f"tokenizer.chat_template.{name}") for name in names}
    return {"default": default, **named} if named and default else named or default
