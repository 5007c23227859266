"""What shows that a setting took effect: one check a setting, over a run that was submitted over HTTP.

A run is compared with what a user can see of it (the adapter's files, metrics, events, checkpoints), with the engine's
report of what it built, and with a replay by hand of the same data and settings (tests/support/replay.py).
"""

import json
import math
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file

from tests.support import replay
from tests.support.drawn_settings import LLAMA_LINEARS
from tests.support.setting_run import Run


def check_rank(run: Run) -> None:
    assert run.built["ranks"] == [run.config["rank"]]
    assert run.adapter["r"] == run.config["rank"] * (2 if run.is_doubled else 1)  # handed out as plain LoRA
    assert {t.shape[0] for name, t in run.weights.items() if "lora_A" in name} == {run.adapter["r"]}


def check_alpha(run: Run) -> None:
    rank = run.config["rank"]
    expected = run.config["alpha"] / (math.sqrt(rank) if run.config["use_rslora"] else rank)
    assert run.built["scalings"] == pytest.approx([expected])
    assert run.adapter["lora_alpha"] == run.config["alpha"] * (2 if run.is_doubled else 1)


def check_use_rslora(run: Run) -> None:
    assert run.adapter["use_rslora"] is run.config["use_rslora"]


def check_dropout(run: Run) -> None:
    assert run.built["dropouts"] == [run.config["dropout"]]
    assert run.adapter["lora_dropout"] == run.config["dropout"]


def check_target_modules(run: Run) -> None:
    wanted = run.config["target_modules"]
    names = set(LLAMA_LINEARS) if wanted == "all-linear" else set(wanted)
    assert run.built["adapted_modules"] == dict.fromkeys(names, 2)
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in run.weights} == names


def check_target_experts(run: Run) -> None:
    assert run.config["target_experts"] is False  # the model has none
    assert not run.adapter["target_parameters"]


def check_bias(run: Run) -> None:
    assert run.adapter["bias"] == "none" == run.config["bias"]
    assert all(".lora_" in name for name in run.weights)


def check_use_dora(run: Run) -> None:
    assert run.adapter["use_dora"] is run.config["use_dora"]
    modules = sum(run.built["adapted_modules"].values())
    assert run.built["dora_modules"] == (modules if run.config["use_dora"] else 0)
    assert sum("magnitude" in name for name in run.weights) == run.built["dora_modules"]


def check_init_weights(run: Run) -> None:
    """What was handed out lies where the replay ended, which began as the setting says, whatever the rounding."""
    off, moved = 0.0, 0.0
    for name, there in run.replayed.weights.items():
        start, found = run.replayed.start[name], run.handed_out(name)
        if run.is_doubled:
            found = found[: run.config["rank"]]
            found = found.T if "lora_B" in name else found
        off += float((found - there).norm() ** 2)
        moved += float((there - start).norm() ** 2)
        if "lora_A" in name:
            assert float((found - there).norm()) < 0.2 * float(start.norm())
    # A warm-up can leave a run of one step where it began: what is left then is rounding.
    assert math.sqrt(off) <= (0.1 if run.config["precision"] == "fp32" else 0.5) * math.sqrt(moved) + 1e-6


def check_loftq_iterations(run: Run) -> None:
    """Where other weights were frozen, A and B as they started are handed out beside what they became, B negated.

    That is LoftQ with more than one iteration, and each iteration more starts from another correction.
    """
    for name, start in run.replayed.start.items():
        if not run.is_doubled:
            assert run.handed_out(name).shape == start.shape
            continue
        beside, expected = run.handed_out(name)[run.config["rank"] :], -start.T if "lora_B" in name else start
        torch.testing.assert_close(beside, expected, rtol=1e-3, atol=1e-4, msg=lambda why, name=name: f"{name}: {why}")


def check_quantization(run: Run) -> None:
    expected = {"none": {}, "nf4": {"nf4 (double)": 14}}[run.config["quantization"]]
    assert run.built["quantized_modules"] == expected


def check_precision(run: Run) -> None:
    dtype = {"fp32": "float32", "bf16": "bfloat16"}[run.config["precision"]]
    stored = {"uint8"} if run.config["quantization"] == "nf4" else set()
    assert set(run.built["base_types"]) == {dtype} | stored
    assert run.built["compute_types"] == ([dtype] if stored else [])
    assert set(run.built["adapter_types"]) == {"float32"}


def expected_groups(run: Run) -> list[tuple[int, float]]:
    """How many parameters learn at which peak: all at one, or with LoRA+ A, and at a multiple of its rate the rest."""
    slow = sum(tensor.numel() for name, tensor in run.replayed.start.items() if "lora_A" in name)
    every, rate = sum(tensor.numel() for tensor in run.replayed.start.values()), run.config["learning_rate"]
    if run.config["lora_plus_ratio"] is None:
        return [(every, rate)]
    return [(slow, rate), (every - slow, rate * run.config["lora_plus_ratio"])]


def check_learning_rate(run: Run) -> None:
    groups = [(group["parameters"], group["learning_rate"]) for group in run.built["groups"]]
    assert groups == expected_groups(run)
    trained = run.started["trainable_parameters"]
    assert sum(count for count, _ in groups) == trained == sum(run.built["adapter_types"].values())


def check_lora_plus_ratio(run: Run) -> None:
    """Which parameters are in which group, and each group's rate on the way, as the checkpoints have them.

    A is known by its shape: no layer is as narrow as the rank. The metric is A's rate (check_schedule), and where
    that took the weights is check_init_weights.
    """
    for folder in run.checkpoints:
        groups = json.loads((folder / "state.json").read_text())["settings"]["optimizer"]["groups"]
        state, ratio = load_file(folder / "optimizer.safetensors"), run.config["lora_plus_ratio"]
        step = int(folder.name.removeprefix("step-"))
        factors = [1.0] if ratio is None else [1.0, ratio]
        # After the last step of the schedule no step follows: what is left there is the ratio of the groups.
        slow_rate = replay.rate(run.config, step, run.total_steps) if step < run.total_steps else groups[0]["lr"]
        rates = [slow_rate * factor for factor in factors]
        assert [group["lr"] for group in groups] == pytest.approx(rates, rel=1e-9, abs=1e-15)
        held = [[state[f"{index}.exp_avg"].shape for index in group["params"]] for group in groups]
        assert sum(map(len, held)) == len(run.replayed.start)
        if ratio is not None:
            slow, fast = held
            assert all(len(shape) == 2 and shape[0] == run.config["rank"] for shape in slow)
            assert all(shape[0] > run.config["rank"] for shape in fast)


def check_adam(run: Run) -> None:
    for group in run.built["groups"]:
        assert group["betas"] == [run.config["adam_beta1"], run.config["adam_beta2"]]
        assert group["epsilon"] == run.config["adam_epsilon"]


def check_schedule(run: Run) -> None:
    expected = [replay.rate(run.config, step, run.total_steps) for step in range(len(run.metrics))]
    assert [row["learning_rate"] for row in run.metrics] == pytest.approx(expected, rel=1e-9, abs=1e-15)


def check_order(run: Run) -> None:
    """The same rows in the same batches: tokens exactly, losses and gradients' norms to rounding."""
    assert [row["tokens"] for row in run.metrics] == torch.tensor(run.replayed.tokens).cumsum(0).tolist()
    assert [row["loss"] for row in run.metrics] == pytest.approx(run.replayed.losses, rel=run.tolerance)
    norms = [row["grad_norm"] for row in run.metrics]
    assert norms == pytest.approx(run.replayed.norms, rel=20 * run.tolerance, abs=1e-4)


def check_steps(run: Run) -> None:
    assert run.started["total_steps"] == run.total_steps
    assert [row["step"] for row in run.metrics] == list(range(1, run.expected_end[0] + 1))


def check_weight_decay(run: Run) -> None:
    assert {group["weight_decay"] for group in run.built["groups"]} == {run.config["weight_decay"]}
    for folder in run.checkpoints:
        groups = json.loads((folder / "state.json").read_text())["settings"]["optimizer"]["groups"]
        assert {group["weight_decay"] for group in groups} == {run.config["weight_decay"]}


def check_max_grad_norm(run: Run) -> None:
    """Adam's first moment is a mean of the gradients as clipped, and no step can have put in more than the clip."""
    for folder in run.checkpoints:
        state = load_file(folder / "optimizer.safetensors")
        found = float(torch.stack([t.norm() for name, t in state.items() if name.endswith(".exp_avg")]).norm())
        step = int(folder.name.removeprefix("step-"))
        assert found <= run.config["max_grad_norm"] * (1 - run.config["adam_beta1"] ** step) * 1.001
        assert found == pytest.approx(run.replayed.momentum[step - 1], rel=20 * run.tolerance, abs=1e-5)


def check_max_seq_length(run: Run) -> None:
    assert run.started["rows"] == len(run.rows)
    assert run.started["skipped_rows"] == len(run.all_rows) - len(run.rows)
    assert run.started["truncated_rows"] == sum(row.cut for row in run.rows)
    assert sum(row["tokens"] for row in run.metrics[:1]) <= (
        run.config["max_seq_length"] * run.config["batch_size"] * run.config["gradient_accumulation"]
    )


def check_optimizer(run: Run) -> None:
    assert run.built["optimizer"] == {"adamw": "torch.AdamW"}[run.config["optimizer"]]


def check_gradient_checkpointing(run: Run) -> None:
    assert (run.built["checkpointed_modules"] > 0) is run.config["gradient_checkpointing"]


def check_train_on(run: Run) -> None:
    assert run.started["trained_tokens"] == sum(row.learned for row in run.rows)


def check_evaluations(run: Run) -> None:
    assert sorted(run.evaluated) == run.expected_evaluations
    # To rounding, which grows with the step as the weights part.
    assert run.evaluated == pytest.approx(run.replayed.evaluations, rel=2 * run.tolerance)


def check_early_stopping(run: Run) -> None:
    last, handed_out = run.expected_end
    outcome = run.record["outcome"]
    assert (outcome["steps"], outcome["adapter_step"]) == (last, handed_out)
    assert run.job["metrics"]["adapter_step"] == handed_out


def check_checkpoints(run: Run) -> None:
    assert [data["step"] for data in run.data("checkpoint")] == run.expected_checkpoints


def check_keep_checkpoints(run: Run) -> None:
    kept = run.expected_checkpoints[-run.config["keep_checkpoints"] :]
    assert [folder.name for folder in run.checkpoints] == [f"step-{step:08d}" for step in kept]


def check_objective(run: Run) -> None:
    """Answers are learned: the loss is theirs (`check_order`), and nothing is said of preferences."""
    assert run.config["objective"] == "sft" and run.config["preference_beta"] is None
    assert all(row["preference"] is None for row in run.metrics)


CHECKS: dict[str, Callable[[Run], None]] = {
    "rank": check_rank,
    "alpha": check_alpha,
    "dropout": check_dropout,
    "target_modules": check_target_modules,
    "target_experts": check_target_experts,
    "bias": check_bias,
    "use_rslora": check_use_rslora,
    "use_dora": check_use_dora,
    "init_weights": check_init_weights,
    "objective": check_objective,
    "preference_beta": check_objective,
    "quantization": check_quantization,
    "precision": check_precision,
    "learning_rate": check_learning_rate,
    "batch_size": check_order,
    "gradient_accumulation": check_order,
    "epochs": check_steps,
    "max_steps": check_steps,
    "warmup_ratio": check_schedule,
    "scheduler": check_schedule,
    "min_learning_rate_ratio": check_schedule,
    "adam_beta1": check_adam,
    "adam_beta2": check_adam,
    "adam_epsilon": check_adam,
    "neftune_noise_alpha": check_order,
    "weight_decay": check_weight_decay,
    "max_grad_norm": check_max_grad_norm,
    "max_seq_length": check_max_seq_length,
    "packing": check_order,
    "optimizer": check_optimizer,
    "gradient_checkpointing": check_gradient_checkpointing,
    "train_on": check_train_on,
    "seed": check_order,
    "eval_every_steps": check_evaluations,
    "early_stopping_patience": check_early_stopping,
    "checkpoint_every_steps": check_checkpoints,
    "checkpoint_every_minutes": check_checkpoints,
    "lora_plus_ratio": check_lora_plus_ratio,
    "loftq_iterations": check_loftq_iterations,
    "keep_checkpoints": check_keep_checkpoints,
}
