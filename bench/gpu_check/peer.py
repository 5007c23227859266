"""transformers + PEFT + TRL on the same rows with the same settings, for comparison with the engines."""

import time
from pathlib import Path
from typing import Any


def train_with_trl(task: dict[str, Any]) -> dict[str, Any]:
    """Train with `SFTTrainer`.

    Returns:
        `losses` of the steps and `tokens_per_s`.
    """
    import torch
    from datasets import Dataset
    from peft import prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from domain.peft.config import PeftConfig
    from engine.batches import RowTokenizer, read_rows
    from engine.methods import lora_config
    from engine.transformers_backend import DTYPES, load_tokenizer, quantization_config
    from gpu_check.worker import speed

    config = PeftConfig.model_validate(task["config"])
    tokenizer = load_tokenizer(Path(task["model_path"]))
    rows = RowTokenizer(tokenizer, config.train_on, config.max_seq_length)
    ids = [piece.ids for n, row in enumerate(read_rows(Path(task["rows"]))) for piece in rows.rows(n, row)]
    model = AutoModelForCausalLM.from_pretrained(
        task["model_path"],
        dtype=DTYPES[config.precision],
        quantization_config=quantization_config(config),
        device_map={"": task["device"]},
        attn_implementation="sdpa",
    )
    if config.quantization != "none":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=config.gradient_checkpointing)
    on_cpu = task["device"] == "cpu"

    class Clock(TrainerCallback):
        """Notes when each step begins and ends."""

        def __init__(self) -> None:
            self.step_s: list[float] = []
            self._began = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if not on_cpu:
                torch.cuda.synchronize()
            self._began = time.monotonic()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if not on_cpu:
                torch.cuda.synchronize()
            self.step_s.append(time.monotonic() - self._began)

    clock = Clock()
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(Path(task["work"]) / "trl"),
            per_device_train_batch_size=config.batch_size,
            gradient_accumulation_steps=config.gradient_accumulation,
            max_steps=config.max_steps,
            learning_rate=config.learning_rate,
            lr_scheduler_type=config.scheduler,
            warmup_steps=0,
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            gradient_checkpointing=config.gradient_checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False} if config.gradient_checkpointing else None,
            optim="adamw_torch" if config.optimizer == "adamw" else "adamw_bnb_8bit",
            bf16=config.precision == "bf16",
            fp16=config.precision == "fp16",
            use_cpu=on_cpu,
            max_length=config.max_seq_length,
            packing=False,
            dataset_kwargs={"skip_prepare_dataset": True},
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            seed=config.seed,
            dataloader_pin_memory=not on_cpu,
        ),
        train_dataset=Dataset.from_dict({"input_ids": ids}),
        processing_class=tokenizer,
        peft_config=lora_config(config, model, "check/base", None),
        callbacks=[clock],
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    # Every row has the same length, so every step the same tokens.
    tokens = config.batch_size * config.gradient_accumulation * sum(map(len, ids)) / len(ids)
    return {"losses": losses, "tokens_per_s": speed([round(tokens)] * len(clock.step_s), clock.step_s)}
