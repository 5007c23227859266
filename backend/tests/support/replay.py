"""A fine-tune written by hand from what the settings are documented to mean, to compare a real run with.

Nothing of the engine is used: rows are tokenized turn by turn, batches are made, masked and scheduled here, and
tests/support/replay_model.py builds what is trained.
"""

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModelForCausalLM
from torch.nn import functional
from transformers import AutoTokenizer, set_seed

from tests.support.replay_model import build

IGNORED = -100


@dataclass(frozen=True)
class Tokens:
    """A row: ids, labels, and whether its end was cut off."""

    ids: list[int]
    labels: list[int]
    cut: bool

    @property
    def learned(self) -> int:
        return sum(label != IGNORED for label in self.labels[1:])


@dataclass
class Replay:
    """What the run gave, a value a step; `weights` are those after step `keep`, `start` those before the first."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    momentum: list[float] = field(default_factory=list)
    evaluations: dict[int, float] = field(default_factory=dict)
    start: dict[str, torch.Tensor] = field(default_factory=dict)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)


def tokenize(path: Path, conversations: list[list[dict[str, str]]], config: dict[str, Any]) -> list[Tokens]:
    """Tokenize with the tiny model's template, turn by turn; the mark that ends an answer is learned with it."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    end, limit = tokenizer.convert_tokens_to_ids("<|end|>"), config["max_seq_length"]
    found = []
    for turns in conversations:
        last = max(at for at, turn in enumerate(turns) if turn["role"] == "assistant")
        ids: list[int] = []
        labels: list[int] = []
        for at, turn in enumerate(turns):
            role = [tokenizer.convert_tokens_to_ids(f"<|{turn['role']}|>")]
            said = [*tokenizer.encode(turn["content"], add_special_tokens=False), end]
            line = tokenizer.encode("\n", add_special_tokens=False)
            answer = turn["role"] == "assistant" and (config["train_on"] == "assistant" or at == last)
            whole = config["train_on"] == "all"
            ids += role + said + line
            for part, learned in ((role, whole), (said, whole or answer), (line, whole)):
                labels += part if learned else [IGNORED] * len(part)
        found.append(Tokens(ids[:limit], labels[:limit], len(ids) > limit))
    return found


def order(rows: list[Tokens], config: dict[str, Any], epoch: int) -> list[list[list[Tokens]]]:
    """Return the epoch's batches, each as sequences, each as the rows laid in it."""
    generator = random.Random(f"{config['seed']}:{epoch}")
    shuffled = list(rows)
    generator.shuffle(shuffled)
    size = config["batch_size"]
    if config["packing"]:
        sequences = _packed(shuffled, config["max_seq_length"])
        generator.shuffle(sequences)
        return [sequences[at : at + size] for at in range(0, len(sequences), size)]
    batches: list[list[list[Tokens]]] = []
    for at in range(0, len(shuffled), 50 * size):
        near = sorted(shuffled[at : at + 50 * size], key=lambda row: len(row.ids), reverse=True)
        batches += [[[row] for row in near[first : first + size]] for first in range(0, len(near), size)]
    generator.shuffle(batches)
    return batches


def _packed(rows: list[Tokens], capacity: int) -> list[list[Tokens]]:
    """Lay the longest row first, each in the fullest sequence with room; of two as full, the one filled last."""
    sequences: list[list[Tokens]] = []
    filled: list[int] = []  # when a sequence was last filled
    for now, row in enumerate(sorted(rows, key=lambda row: len(row.ids), reverse=True)):
        rooms = [capacity - sum(len(other.ids) for other in sequence) for sequence in sequences]
        fitting = [at for at, room in enumerate(rooms) if room >= len(row.ids)]
        if fitting:
            at = min(fitting, key=lambda at: (rooms[at], -filled[at]))
            sequences[at].append(row)
            filled[at] = now
        else:
            sequences.append([row])
            filled.append(now)
    return sequences


def rate(config: dict[str, Any], step: int, total: int) -> float:
    """Return the learning rate of a step, counted from 0: a linear warm-up from zero, then the decay."""
    warm = math.ceil(config["warmup_ratio"] * total)
    if step < warm:
        part = step / warm
    else:
        done = (step - warm) / max(1, total - warm)
        part = {"linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2, "constant": 1.0}[config["scheduler"]]
        part = part * (1 - config["min_learning_rate_ratio"]) + config["min_learning_rate_ratio"]
    return float(config["learning_rate"] * part)


def _loss(model: PeftModelForCausalLM, sequences: list[list[Tokens]], pad: int) -> torch.Tensor:
    """Return the summed loss of a batch. Rows in one sequence do not see each other: the mask is written out."""
    width = max(sum(len(row.ids) for row in rows) for rows in sequences)
    ids = torch.full((len(sequences), width), pad)
    labels = torch.full((len(sequences), width), IGNORED)
    positions = torch.zeros((len(sequences), width), dtype=torch.long)
    seen = torch.eye(width, dtype=torch.bool).repeat(len(sequences), 1, 1, 1)
    for at, rows in enumerate(sequences):
        low = 0
        for row in rows:
            high = low + len(row.ids)
            ids[at, low:high] = torch.tensor(row.ids)
            labels[at, low + 1 : high] = torch.tensor(row.labels[1:])
            positions[at, low:high] = torch.arange(high - low)
            seen[at, 0, low:high, low:high] = torch.ones(high - low, high - low, dtype=torch.bool).tril()
            low = high
    logits = model(input_ids=ids, attention_mask=seen, position_ids=positions, use_cache=False).logits
    flat = logits[:, :-1].float().flatten(0, 1)
    return functional.cross_entropy(flat, labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum")


def run(
    path: Path,
    config: dict[str, Any],
    rows: list[Tokens],
    validation: list[Tokens],
    *,
    steps: int,
    total: int,
    keep: int,
    evaluate: list[int],
) -> Replay:
    """Train `steps` of `total` steps."""
    model = build(path, config)
    pad = int(model.config.pad_token_id)
    named = {name.replace(".default.", "."): p for name, p in model.named_parameters() if p.requires_grad}
    found = Replay(start={name: p.detach().clone() for name, p in named.items()})
    # LoRA+: all but A learn at a multiple of the rate.
    ratios = {name: 1.0 if "lora_A" in name else config["lora_plus_ratio"] or 1.0 for name in named}
    optimizer = torch.optim.AdamW(
        [{"params": [p], "ratio": ratios[name]} for name, p in named.items()],
        betas=(config["adam_beta1"], config["adam_beta2"]),
        eps=config["adam_epsilon"],
        weight_decay=config["weight_decay"],
    )
    if config["neftune_noise_alpha"]:
        model.get_input_embeddings().register_forward_hook(_noise(config["neftune_noise_alpha"]))

    def evaluate_if_due(step: int) -> None:
        if step in evaluate:
            model.eval()
            with torch.no_grad():
                losses = [float(_loss(model, [[row]], pad)) for row in validation]
            found.evaluations[step] = sum(losses) / sum(row.learned for row in validation)
            model.train()

    set_seed(config["seed"])
    model.train()
    epoch, size = 0, config["gradient_accumulation"]
    evaluate_if_due(0)
    while len(found.losses) < steps:
        batches = order(rows, config, epoch)
        for first in range(0, len(batches), size):
            step = len(found.losses)
            if step == steps:
                break
            passes = batches[first : first + size]
            every = [row for batch in passes for sequence in batch for row in sequence]
            loss = sum(_whole(model, batch, pad) for batch in passes)
            count = sum(row.learned for row in every)
            norm = _clip(named.values(), count, config["max_grad_norm"])
            for group in optimizer.param_groups:
                group["lr"] = rate(config, step, total) * group["ratio"]
            optimizer.step()
            optimizer.zero_grad()
            found.losses.append(loss / count)
            found.norms.append(norm)
            found.tokens.append(sum(len(row.ids) for row in every))
            moments = [state["exp_avg"].norm() for state in optimizer.state.values()]
            found.momentum.append(float(torch.stack(moments).norm()))
            if step + 1 == keep:
                found.weights = {name: p.detach().clone() for name, p in named.items()}
            evaluate_if_due(step + 1)
        epoch += 1
    return found


def _clip(parameters: Iterable[torch.nn.Parameter], count: int, limit: float) -> float:
    """Make gradients of a sum those of a mean over `count`, and no longer than `limit`; return how long they were."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    for gradient in gradients:
        gradient /= count
    norm = float(torch.stack([gradient.norm() for gradient in gradients]).norm())
    scale = min(1.0, limit / (norm + 1e-6))
    for gradient in gradients:
        gradient *= scale
    return norm


def _noise(alpha: float) -> Any:
    """NEFTune's noise: uniform within ± alpha / √(L · d), on every token, padding included, and only in training."""

    def hook(module: torch.nn.Module, _: Any, embedded: torch.Tensor) -> torch.Tensor | None:
        if not module.training:
            return None
        length, width = embedded.shape[-2:]
        return embedded + torch.empty_like(embedded).uniform_(-1, 1) * alpha / math.sqrt(length * width)

    return hook


def _whole(model: PeftModelForCausalLM, batch: list[list[Tokens]], pad: int) -> float:
    loss = _loss(model, batch, pad)
    loss.backward()
    return float(loss.detach())
