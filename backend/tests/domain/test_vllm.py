"""The command that serves an adapter with vLLM, and the adapters that it would serve wrongly."""

import json
import shlex
from typing import Any

import pytest

from domain.vllm import VllmBase, VllmServing, serve_with_vllm

PLAIN = {
    "peft_type": "LORA",
    "r": 16,
    "lora_alpha": 32,
    "use_rslora": True,
    "bias": "none",
    "target_modules": ["q_proj"],
}
HUB = VllmBase("Qwen/Qwen2.5-1.5B-Instruct", "abc123")


def served(folder: str = "/data/adapters/adp_1", base: VllmBase = HUB, **settings: Any) -> VllmServing:
    return serve_with_vllm(base, "ft:Qwen/Q:local:pip:1", folder, PLAIN | settings, f"{folder}/chat_template.jinja")


def test_the_command_names_base_adapter_and_template() -> None:
    command = served().command
    assert command == (
        "vllm serve Qwen/Qwen2.5-1.5B-Instruct --revision abc123 --enable-lora "
        "--lora-modules ft:Qwen/Q:local:pip:1=/data/adapters/adp_1 --max-lora-rank 16 "
        "--chat-template /data/adapters/adp_1/chat_template.jinja"
    )
    local = serve_with_vllm(VllmBase("/models/tiny llama", None), "a", "/data/adp_1", PLAIN, None)
    assert shlex.split(local.command or "")[:4] == ["vllm", "serve", "/models/tiny llama", "--enable-lora"]
    assert "--chat-template" not in (local.command or "") and "--revision" not in (local.command or "")


@pytest.mark.parametrize("folder", ["/data/my adapters/adp_1", "/data/a=b/adp_1", "/data/a,b/adp_1", "/data/it's/adp"])
def test_a_folder_of_any_name_arrives_whole(folder: str) -> None:
    words = shlex.split(served(folder).command or "")
    module = words[words.index("--lora-modules") + 1]
    # As vLLM reads it: the short form is split at its equals sign, and has no comma.
    if "=" in module and "," not in module:
        name, path = module.split("=")
    else:
        told = json.loads(module)
        name, path = told["name"], told["path"]
    assert (name, path) == ("ft:Qwen/Q:local:pip:1", folder)


@pytest.mark.parametrize(
    ("rank", "most"),
    [(1, 1), (2, 8), (8, 8), (9, 16), (24, 32), (64, 64), (65, 128), (200, 256), (257, 320), (512, 512)],
)
def test_the_rank_is_the_least_that_vllm_takes(rank: int, most: int) -> None:
    words = shlex.split(served(r=rank).command or "")
    assert words[words.index("--max-lora-rank") + 1] == str(most)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "target_parameters"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"bias": "lora_only"}, "bias"),
        ({"r": 513}, "513"),
    ],
)
def test_what_vllm_would_refuse_or_serve_otherwise_has_no_command(settings: dict[str, Any], says: str) -> None:
    told = served(**settings)
    assert told.command is None and says in (told.why_not or "") and "merged" in (told.why_not or "")
    both = served(**settings, lora_bias=True)
    assert "; " in (both.why_not or "")


def test_a_folder_without_a_config_has_no_command() -> None:
    assert serve_with_vllm(HUB, "a", "/data/adp_1", None, None).command is None
