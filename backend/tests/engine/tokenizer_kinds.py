"""Tokenizers of the kinds that decode in ways of their own, made on the spot."""

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "def f(x):\n    if x > 10:\n        return 22\n    else:\n        return x\n",
    "the quick brown fox jumps over the lazy dog , isn't it ?",
    "pack my box with five dozen liquor jugs . 0123456789 !",
    "  two spaces   three\ttab",
]
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def llama2_style() -> Any:
    """A sentence piece BPE: a space is put before a text, and taken away from what is decoded."""
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    core.decoder = decoders.Sequence(steps)
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=[*SPECIAL, *bytes_])
    core.train_from_iterator(CORPUS, trainer)
    # The bytes are tokens of the vocabulary, and no marks in a text.
    return _finished(_without_marks(core, bytes_), adds_bos=True)


def metaspace() -> Any:
    """A Unigram with Metaspace, as T5 and XLM-R have it."""
    core = Tokenizer(models.Unigram())
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    core.train_from_iterator(CORPUS, trainers.UnigramTrainer(vocab_size=120, special_tokens=SPECIAL, unk_token="<unk>"))
    return _finished(core, adds_bos=True)


def word_piece() -> Any:
    """A WordPiece, whose decoder takes spaces away before punctuation."""
    core = Tokenizer(models.WordPiece(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    core.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIAL))
    return _finished(core, adds_bos=False, clean_up_tokenization_spaces=True)


def byte_level(*, adds_bos: bool = False, adds_eos: bool = False) -> Any:
    """A byte-level BPE, as GPT-2, Llama 3 and Qwen have it."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=500, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    return _finished(core, adds_bos=adds_bos, adds_eos=adds_eos)


KINDS = {"llama 2": llama2_style, "metaspace": metaspace, "word piece": word_piece, "byte level": byte_level}


def _without_marks(core: Tokenizer, names: list[str]) -> Tokenizer:
    import json

    content = json.loads(core.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] not in names]
    return Tokenizer.from_str(json.dumps(content))


def _finished(core: Tokenizer, *, adds_bos: bool, adds_eos: bool = False, **settings: Any) -> Any:
    core.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in SPECIAL])
    single = f"{'<s> ' if adds_bos else ''}$A{' </s>' if adds_eos else ''}"
    marks = [(mark, core.token_to_id(mark)) for mark in ("<s>", "</s>")]
    if adds_bos or adds_eos:
        core.post_processor = processors.TemplateProcessing(single=single, special_tokens=marks)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>", **settings
    )
