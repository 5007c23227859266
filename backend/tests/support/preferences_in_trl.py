"""Preferences learned by TRL's trainers, with the tokens, order, adapter and settings of the engine's run."""

from pathlib import Path
from typing import Any

import torch
from torch.utils.data import SequentialSampler

from domain.configure import MachineFacts, configure
from domain.peft.algorithms import Algorithm
from domain.peft.config import PeftConfig
from engine.batches import epoch_batches, grouping_of
from engine.examples import ExampleTokenizer
from engine.rows import IGNORED, Row, RowStore
from engine.transformers_backend import load_tokenizer
from tests.support.three_ways import adapted, trl_settings

STEPS = 6
_ROWS = 6


def config_for(objective: str, learning_rate: float) -> PeftConfig:
    """Configure a short run whose every step has all rows."""
    settings = {
        "objective": objective, "rank": 8, "max_seq_length": 256, "batch_size": _ROWS, "gradient_accumulation": 1,
        "max_steps": STEPS, "learning_rate": learning_rate, "warmup_ratio": 0.0,
    }  # fmt: skip
    machine = MachineFacts(has_gpu=False, supports_bf16=False)
    return configure(Algorithm.LORA, use_case=None, overrides=settings, machine=machine).config


def rows_for(path: Path, config: PeftConfig) -> RowStore:
    """Tokenize the rows with a model's tokenizer."""
    tokenizer = ExampleTokenizer(load_tokenizer(path), config)
    return RowStore(
        row
        for number, one in enumerate(_conversations(config.objective))
        for example in tokenizer.examples(number, one)
        for row in example
    )


def _conversations(objective: str) -> list[dict[str, Any]]:
    """Return rows whose token sequences all have another length, so that every epoch has the same order."""
    made = []
    for number in range(_ROWS):
        prompt = [{"role": "user", "content": "What is one plus one?" + " Really?" * number}]
        good = [{"role": "assistant", "content": "Squawk, two!" + " Squawk!" * (2 * number)}]
        bad = [{"role": "assistant", "content": "I do not know."}]
        if objective == "kto":
            made.append({"prompt": prompt, "completion": bad if number % 3 == 0 else good, "label": number % 3 != 0})
        else:
            made.append({"prompt": prompt, "chosen": good, "rejected": bad})
    return made


def _parts(row: Row) -> tuple[list[int], list[int]]:
    """Return a row's prompt and its answer."""
    learned = [at for at, label in enumerate(row.labels) if label != IGNORED]
    return row.ids[: learned[0]], row.ids[learned[0] : learned[-1] + 1]


def _trl_rows(config: PeftConfig, rows: RowStore) -> list[dict[str, Any]]:
    """Return the rows as TRL's collators take them, in the order of the engine's batch."""
    (batch,) = epoch_batches(rows, grouping_of(config, 0), seed=config.seed, epoch=0)
    step = grouping_of(config, 0).per_example
    by_number = {rows[at].number: [rows[at + more] for more in range(step)] for at in range(0, len(rows), step)}
    ordered = [by_number[number] for number in dict.fromkeys(batch.rows)]
    if config.objective == "dpo":
        return [
            {"prompt_ids": _parts(good)[0], "chosen_ids": _parts(good)[1], "rejected_ids": _parts(bad)[1]}
            for good, bad in ordered
        ]
    answers = [_parts(row)[1] for (row,) in ordered]
    return [
        {
            "prompt_ids": _parts(row)[0],
            "completion_ids": answers[at],
            "KL_completion_ids": answers[at - 1],
            "label": row.liked,
        }
        for at, (row,) in enumerate(ordered)
    ]


def losses_in_trl(
    path: Path, config: PeftConfig, rows: RowStore, scratch: Path, continues: Path | None = None
) -> list[float]:
    """Train with TRL's trainer of the objective.

    Args:
        continues: The folder of the adapter that is continued, if one is. TRL compares with a copy of it then.
    """
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

    trainer_class, arguments_class = {"dpo": (DPOTrainer, DPOConfig), "kto": (KTOTrainer, KTOConfig)}[config.objective]

    class Recording(trainer_class):  # type: ignore[misc, valid-type]
        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

        def _get_train_sampler(self, dataset: Any = None, *_: Any) -> SequentialSampler:
            return SequentialSampler(dataset if dataset is not None else self.train_dataset)

        def training_step(self, *arguments: Any, **named: Any) -> torch.Tensor:
            loss: torch.Tensor = super().training_step(*arguments, **named)
            found.append(float(loss))
            return loss

    found: list[float] = []
    arguments = arguments_class(
        **trl_settings(config, scratch),
        beta=config.preference_beta,
        max_steps=STEPS,
        warmup_steps=0,
        lr_scheduler_type="linear",
    )
    data = Dataset.from_list(_trl_rows(config, rows))
    Recording(
        model=adapted(path, config, continues),
        args=arguments,
        train_dataset=data,
        processing_class=load_tokenizer(path),
    ).train()
    return found
