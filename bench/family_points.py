"""The estimate against measured peaks for families whose layers are not Llama's.

    python ../bench/family_points.py --save points.json      (from backend/)

It makes a model of random weights of each family and measures training it, each point in a fresh engine. The table goes
into docs/memory-families.md, which says what was fitted on it. It takes half an hour on two idle cores.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "backend"), str(ROOT / "bench")]

from judged import MIB
from memory_points import Point, measure, use_allocator
from model_shapes import read_shape
from own_points import PLATFORMS, constants_of

from domain.memory.activations import Batch
from domain.memory.estimate import estimate
from services.models.embedded import EmbeddedModel

_COMMON: dict[str, Any] = {
    "vocab_size": 49152, "hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 2,
    "head_dim": 64, "max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
    "tie_word_embeddings": True,
}  # fmt: skip
# Model type and sizes of each.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "a Gemma 4": ("gemma4_text", {
        **_COMMON, "intermediate_size": 2048, "global_head_dim": 128, "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0, "sliding_window": 128,
    }),
    "a Qwen 3.5 with experts": ("qwen3_5_moe_text", {
        **_COMMON, "moe_intermediate_size": 256, "shared_expert_intermediate_size": 512, "num_experts": 8,
        "num_experts_per_tok": 2, "linear_num_key_heads": 4, "linear_num_value_heads": 8, "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
    }),
    "a Nemotron-H": ("nemotron_h", {
        **_COMMON, "layers_block_type": ["mamba", "mlp", "attention", "mlp"] * 2, "intermediate_size": 2048,
        "mamba_num_heads": 16, "mamba_head_dim": 64, "n_groups": 2, "ssm_state_size": 64, "chunk_size": 64,
    }),
    "a gpt-oss": ("gpt_oss", {
        **_COMMON, "intermediate_size": 512, "num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": 128,
    }),
    "a Mamba": ("mamba", {
        "vocab_size": 49152, "hidden_size": 768, "num_hidden_layers": 12, "state_size": 16, "bos_token_id": 1,
        "eos_token_id": 2, "pad_token_id": 2,
    }),
    # Smaller, since a step of the two above takes minutes.
    "a small Mamba": ("mamba", {
        "vocab_size": 49152, "hidden_size": 512, "num_hidden_layers": 4, "state_size": 16, "bos_token_id": 1,
        "eos_token_id": 2, "pad_token_id": 2,
    }),
    "a small Qwen 3.5": ("qwen3_5_moe_text", {
        **_COMMON, "num_hidden_layers": 4, "moe_intermediate_size": 256, "shared_expert_intermediate_size": 512,
        "num_experts": 4, "num_experts_per_tok": 2, "linear_num_key_heads": 4, "linear_num_value_heads": 8,
        "linear_key_head_dim": 64, "linear_value_head_dim": 64,
    }),
    "a Mamba 2": ("mamba2", {
        "vocab_size": 49152, "hidden_size": 512, "num_hidden_layers": 8, "num_heads": 16, "head_dim": 64,
        "state_size": 64, "n_groups": 2, "chunk_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
        "tie_word_embeddings": True,
    }),
}  # fmt: skip
POINTS = tuple(
    point
    for name in FAMILIES
    for point in (
        Point("lora", 256, 1, 16, model=name),
        Point("qlora", 192, 2, 16, model=name),
        Point("dora", 128, 2, 16, model=name),
        Point("lora", 512, 1, 16, checkpointing=True, model=name),
    )
)


def make(name: str, folder: Path, small: Path) -> dict[str, Any]:
    """Write a model of a family, with the embedded model's tokenizer; return its config.json."""
    from engine.guards import hide_broken_torchvision

    hide_broken_torchvision()
    import torch
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from engine.model_class import attention_of, model_class

    family, sizes = FAMILIES[name]
    chosen, config = model_class(CONFIG_MAPPING[family](**sizes))
    torch.manual_seed(0)
    model = chosen._from_config(config, attn_implementation=attention_of(chosen), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    for file in small.iterdir():
        if file.name not in ("config.json", "generation_config.json") and file.suffix != ".safetensors":
            shutil.copy(file, folder)
    return dict(json.loads((folder / "config.json").read_text()))


def measured(cache: Path, save: Path | None, names: Sequence[str], allocator: str) -> list[dict[str, Any]]:
    """Measure the points of some families; each row has the family's config.json."""
    if not use_allocator(allocator):
        raise SystemExit(f"{allocator} is not installed")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        small = EmbeddedModel(cache, Path(scratch)).prepare(lambda stage, fraction: None)
        for name in names:
            config = make(name, Path(scratch) / name.replace(" ", "-"), small)
            for point in (point for point in POINTS if point.model == name):
                try:
                    row = measure(point, Path(scratch) / name.replace(" ", "-")) | {"model_config": config}
                except Exception as error:  # noqa: BLE001 - the other points are measured; this one is named
                    print(f"{name}, {point.algorithm}: {error}", file=sys.stderr, flush=True)
                    continue
                rows.append(row)
                print(line(row), flush=True)
                if save is not None:
                    save.write_text(json.dumps(rows, indent=1) + "\n")
    return rows


def line(row: Mapping[str, Any]) -> str:
    """Write a point as a row of the table: predicted, measured, error."""
    point = Point(**{name: row[name] for name in Point.__dataclass_fields__ if name in row})
    shape = read_shape(dict(row["model_config"]))
    if shape is None:
        raise ValueError(f"{point.model} has no shape")
    batch = Batch(point.batch, point.length, point.batch > 1, even=True)
    with constants_of(PLATFORMS[row["allocator"]]):
        predicted = estimate(shape, point.config(), on_gpu=False, batch=batch).total_bytes
    extra = ", checkpointing" if point.checkpointing else ""
    what = f"{point.model}, {point.algorithm}, {point.batch} x {point.length} tokens{extra}"
    error = predicted / row["peak_bytes"] - 1
    return f"| {what} | {predicted / MIB:,.0f} | {row['peak_bytes'] / MIB:,.0f} | {error:+.1%} |"


def main(arguments: argparse.Namespace) -> None:
    """Measure, or read kept measurements, and print the table."""
    print("| point | predicted MiB | measured MiB | error |", "|---|---:|---:|---:|", sep="\n")
    if arguments.points:
        for row in json.loads(arguments.points.read_text()):
            print(line(row))
        return
    measured(ROOT / ".cache", arguments.save, arguments.families or list(FAMILIES), arguments.allocator)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=Path, help="kept measurements instead of new ones")
    parser.add_argument("--save", type=Path, help="where to keep the measurements")
    parser.add_argument("--families", nargs="*", choices=list(FAMILIES))
    parser.add_argument("--allocator", default="glibc", choices=["glibc", "tcmalloc"])
    main(parser.parse_args())
