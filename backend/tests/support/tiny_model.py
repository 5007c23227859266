"""A random Llama of 0.2 million parameters with a tokenizer and a chat template, made once and kept.

`python -m tests.support.tiny_model FOLDER` makes it there.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from filelock import FileLock

from tests.support.no_engine import unguarded
from tests.support.server import BACKEND, CACHE
from tests.support.shapes import keep_shape

TINY_ID = "tests/tiny-llama"
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_CORPUS = ["the quick brown fox jumps over the lazy dog", "pack my box with five dozen liquor jugs", "0123456789 ?!.,"]


def copy_tiny_model(folder: Path) -> None:
    """Write the model as a normal local folder, from the one that is kept.

    It is made in a process of its own where there is none yet: who wants a copy does not import torch.
    """
    made_by = [version(name) for name in ("torch", "transformers", "tokenizers")] + [Path(__file__).read_text("utf-8")]
    kept = CACHE / f"tiny-llama-{hashlib.sha256(repr(made_by).encode()).hexdigest()[:12]}"
    if not kept.exists():
        _make_once(kept)
    shutil.copytree(kept, folder)
    keep_shape(CACHE, json.loads((folder / "config.json").read_text("utf-8")))


def _make_once(kept: Path) -> None:
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{kept}.lock"), tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        if not kept.exists():
            command = [sys.executable, "-m", "tests.support.tiny_model", f"{scratch}/made"]
            subprocess.run(command, cwd=BACKEND, env=unguarded(os.environ), check=True)
            Path(scratch, "made").rename(kept)  # whole, or not there


def make_tiny_model(folder: Path, **shape: int) -> None:
    """Write the model as a normal local folder. The weights are the same each time.

    Args:
        shape: Dimensions in the terms of LlamaConfig, where others are wanted.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    core = Tokenizer(models.BPE(unk_token=None))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    core.train_from_iterator(_CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", pad_token="<|end|>")
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    tiny = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "max_position_embeddings": 256}
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            num_attention_heads=4,
            num_key_value_heads=2,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
            **tiny | shape,
        )
    )
    folder.mkdir(parents=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    make_tiny_model(Path(sys.argv[1]))
