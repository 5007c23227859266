"""Parameters counted from config.json alone, beside the count of transformers and the published count.

    python ../bench/parameter_counts.py [folder]      (from backend/)

The folder, by default ../../shared/data/configs, holds `<owner>__<name>/config.json`. transformers builds each model on
the meta device, where tensors have a shape and no memory. It does not build models that bring their own code. The
command exits with 1 if a difference is not accounted for.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from model_shapes import read_shape

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "backend"))


# `safetensors.total` in the Hub's answer for the model. For a gated model it is that of a mirror of the same weights.
PUBLISHED = {
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "Qwen/Qwen-7B": 7_721_324_544,
    "Qwen/Qwen2-7B": 7_615_616_512,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen2.5-72B": 72_706_203_648,
    "Qwen/Qwen3-0.6B": 751_632_384,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "Qwen/Qwen3-30B-A3B": 30_532_122_624,
    "Qwen/Qwen3-235B-A22B": 235_093_634_560,
    "01-ai/Yi-34B": 34_388_917_248,
    "deepseek-ai/DeepSeek-V3": 684_531_386_000,
    "deepseek-ai/DeepSeek-R1": 684_489_845_504,
    "google/gemma-2-2b": 2_614_341_888,
    "google/gemma-2-2b-it": 2_614_341_888,
    "google/gemma-2-9b": 9_241_705_984,
    "google/gemma-3-4b-it": 4_300_079_472,
    "internlm/internlm2-7b": 7_737_708_544,
    "meta-llama/Llama-2-7b-hf": 6_738_417_664,
    "meta-llama/Llama-2-13b-hf": 13_015_866_880,
    "meta-llama/Llama-3.2-3B-Instruct": 3_212_749_824,
    "meta-llama/Meta-Llama-3-70B": 70_553_706_496,
    "meta-llama/Meta-Llama-3.1-8B": 8_030_261_248,
    "microsoft/Phi-3-mini-128k-instruct": 3_821_079_552,
    "microsoft/phi-4": 14_659_507_200,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "mistralai/Mistral-Nemo-Instruct-2407": 12_247_782_400,
    "mistralai/Mixtral-8x7B-v0.1": 46_702_792_704,
    "mistralai/Mixtral-8x22B-v0.1": 140_620_634_112,
    "moonshotai/Kimi-K2-Instruct": 1_026_408_235_864,
    "openai/gpt-oss-120b": 116_829_156_672,
}


def _deepseek_ahead(config: dict[str, Any]) -> int:
    """Count the layer that predicts one more token. It is published with the model; transformers does not load it.

    Source: DeepSeek-V3 (arXiv 2412.19437), section 2.2: a whole layer, a projection from two hidden states to one,
    three norms, and copies of embedding and head.
    """
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    shape = read_shape(config)
    assert shape is not None
    sparse = next(block for block in shape.blocks if block.part.stacked)
    return int(sparse.part.parameters + 2 * hidden * hidden + 3 * hidden + 2 * vocab * hidden)


def _routing_biases(config: dict[str, Any]) -> int:
    layers = config["num_hidden_layers"] + config["num_nextn_predict_layers"] - config["first_k_dense_replace"]
    return int(layers * config["n_routed_experts"])


def _scales(config: dict[str, Any]) -> int:
    """Count FP8's scales: one for each block of 128 x 128, rounded up, in every linear module, experts included."""

    def blocks(rows: int, columns: int) -> int:
        return math.ceil(rows / 128) * math.ceil(columns / 128)

    shape = read_shape(config)
    assert shape is not None
    hidden, width, experts = config["hidden_size"], config["moe_intermediate_size"], config["n_routed_experts"]
    one_expert = 3 * blocks(hidden, width)
    total = 0
    for block in shape.blocks:
        linears = sum(blocks(linear.fan_out, linear.fan_in) for linear in block.part.linears)
        sparse = bool(block.part.stacked)
        layers = block.count + (config["num_nextn_predict_layers"] if sparse else 0)
        total += layers * (linears + (experts * one_expert if sparse else 0))
    return total


def stored_beside(model_id: str, config: dict[str, Any]) -> tuple[int, str]:
    """Return the elements that a checkpoint holds beside the model's parameters, and what they are."""
    if model_id.startswith("meta-llama/Llama-2"):
        return config["num_hidden_layers"] * 64, "rotary frequencies, a buffer of 64 a layer"
    if model_id == "Qwen/Qwen3-0.6B":
        return config["vocab_size"] * config["hidden_size"], "the tied head, stored a second time"
    if model_id == "deepseek-ai/DeepSeek-R1":
        return _deepseek_ahead(config) + _routing_biases(config), "the prediction layer, routing biases"
    if model_id == "deepseek-ai/DeepSeek-V3":
        scales = _scales(config)
        return _deepseek_ahead(config) + _routing_biases(config) + scales, "the same, and FP8's scales"
    if model_id == "moonshotai/Kimi-K2-Instruct":
        # The figure leaves out FP8's scales but for those of the last, half-filled row of blocks of kv_a_proj.
        partial = config["num_hidden_layers"] * config["hidden_size"] // 128
        return _routing_biases(config) + partial, "routing biases, scales of half-filled blocks"
    return 0, ""


def counted_by_transformers(config: dict[str, Any]) -> int | None:
    """Build the model on the meta device and count; return None if its code comes from elsewhere."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    kept = {key: value for key, value in config.items() if key not in ("auto_map", "quantization_config")}
    if config["model_type"] == "minicpm3":
        del kept["rope_scaling"]  # transformers 5.17 fails on the published one; it holds no parameters
    try:
        parsed = AutoConfig.for_model(**kept)
    except ValueError:
        return None
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(parsed, trust_remote_code=False)
    return sum(int(parameter.numel()) for parameter in model.parameters())


def main(folder: Path) -> int:
    """Print the table."""
    from engine.guards import hide_broken_torchvision

    hide_broken_torchvision()
    paths = sorted(folder.glob("*/config.json"))
    if not paths:
        print(f"no configs in {folder}")
        return 1
    unexplained = 0
    print(f"{'model':44} {'ours':>17} {'- transformers':>14} {'- published':>15}  of which stored beside")
    for path in paths:
        model_id = path.parent.name.replace("__", "/", 1)
        config = json.loads(path.read_bytes())
        shape = read_shape(config)
        if shape is None:
            print(f"{model_id:44} {'unknown':>17}")
            continue
        built, published = counted_by_transformers(config), PUBLISHED.get(model_id)
        beside, what = stored_beside(model_id, config) if published is not None else (0, "")
        from_built = shape.parameters - built if built is not None else None
        rest = shape.parameters + beside - published if published is not None else 0
        unexplained += bool(from_built) + bool(rest)
        columns = (
            f"{from_built if from_built is not None else 'own code':>14}",
            f"{shape.parameters - published if published is not None else '':>15}",
            f"{beside} {what}" if beside else "",
            f"REST {rest}" if rest else "",
        )
        print(f"{model_id:44} {shape.parameters:>17}", *columns)
    print(f"{unexplained} differences not accounted for")
    return 1 if unexplained else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT.parent / "shared" / "data" / "configs")
    sys.exit(main(parser.parse_args().folder))
