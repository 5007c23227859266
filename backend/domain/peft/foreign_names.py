"""What other programs call settings, and what to send here instead."""

from collections.abc import Iterable
from types import MappingProxyType

# Names of transformers' TrainingArguments, TRL's SFTConfig and PEFT's LoraConfig.
_INSTEAD = MappingProxyType(
    {
        "r": "rank",
        "lora_r": "rank",
        "lora_alpha": "alpha",
        "lora_dropout": "dropout",
        "init_lora_weights": "init_weights",
        "load_in_4bit": "quantization='nf4', or algorithm qlora",
        "load_in_8bit": "quantization='int8'",
        "bf16": "precision='bf16'",
        "fp16": "precision='fp16'",
        "lr": "learning_rate",
        "per_device_train_batch_size": "batch_size",
        "per_device_eval_batch_size": "batch_size, which holds for evaluation too",
        "gradient_accumulation_steps": "gradient_accumulation",
        "num_train_epochs": "epochs",
        "warmup_steps": "warmup_ratio, a fraction of the steps",
        "lr_scheduler_type": "scheduler: linear, cosine or constant, each with its warm-up",
        "lr_scheduler_kwargs": "min_learning_rate_ratio for a floor",
        "optim": "optimizer: adamw or adamw_8bit; SGD, Lion and Adafactor are not offered, since an adapter's state is "
        "small and AdamW's rates are the ones known for it",
        "max_length": "max_seq_length",
        "logging_steps": "nothing: every step is recorded",
        "eval_steps": "eval_every_steps",
        "save_steps": "checkpoint_every_steps",
        "save_total_limit": "keep_checkpoints",
        "assistant_only_loss": "train_on='assistant'",
        "completion_only_loss": "train_on='last_assistant'",
        "group_by_length": "nothing: rows of like length share a batch unless they are packed",
        "random_state": "seed",
        "label_smoothing_factor": "nothing: label smoothing is not offered, since it blurs the loss that is reported",
        "beta": "preference_beta",
        "loss_type": "objective: sft, dpo, orpo or kto",
        "rl": "objective: sft, dpo, orpo or kto",
        "modules_to_save": "nothing: only adapters are trained, so that many can share one base",
    }
)


def instead_of(names: Iterable[str]) -> list[str]:
    """Return a sentence for each name that is another program's."""
    return [f"{name}: send {_INSTEAD[name]}" for name in names if name in _INSTEAD]
