"""Does the tasks of one engine: `python -m gpu_check.worker ENGINE` reads tasks, a line of JSON each, and answers each.

Unsloth patches transformers, so each engine has a process of its own. A task that fails is the last of its process.
"""

import gc
import json
import os
import statistics
import sys
import traceback
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from engine.guards import hide_broken_torchvision
from tests.support.channel_double import RecordingChannel

WARM_UP_STEPS = 2  # what is compiled, and what allocators learn, is not the speed of a long run


class Recorder(RecordingChannel):
    """A channel that keeps a command's events."""

    def of(self, kind: str) -> list[Any]:
        """Return the events of a kind."""
        return [event for event in self.events if event.kind == kind]


def forget_peak() -> None:
    """Make the next `peak_bytes` count from here."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_bytes() -> int | None:
    """Most memory reserved on the GPU since `forget_peak`; None on a CPU, where tasks share a process's one peak."""
    import torch

    return int(torch.cuda.max_memory_reserved()) if torch.cuda.is_available() else None


def speed(step_tokens: list[int], step_s: list[float]) -> float:
    """Return the median tokens a second of the steps after the warm-up."""
    pairs = list(zip(step_tokens, step_s, strict=True))
    return statistics.median(tokens / seconds for tokens, seconds in pairs[WARM_UP_STEPS:] or pairs)


def mean_loss(base: Any, path: str, config: Any) -> float:
    """Return the mean loss a token over stored texts, from the logits of the model as it is now."""
    import torch

    from engine.batches import RowTokenizer, read_rows

    tokenizer = RowTokenizer(base.tokenizer, config.train_on, config.max_seq_length)
    total, count = 0.0, 0
    for number, row in enumerate(read_rows(Path(path))):
        for piece in tokenizer.rows(number, row):
            ids = torch.tensor([piece.ids], device=base.device)
            with torch.no_grad():
                logits = base.model(input_ids=ids, use_cache=False).logits[0, :-1].float()
            total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
            count += len(piece.ids) - 1
    return total / count


def prove(task: dict[str, Any]) -> dict[str, Any]:
    """Train, go on from the middle as after a crash, merge, and measure the losses of the adapter and the merge."""
    from domain.peft.config import PeftConfig
    from domain.protocol import AboutExport, Merge
    from engine.base import Base
    from engine.merge import merge

    config, work = PeftConfig.model_validate(task["config"]), Path(task["work"])
    forget_peak()
    base = Base(Path(task["model_path"]), config, task["device"], task["engine"])
    before = mean_loss(base, task["held_out"], config)
    whole, figures = _train(base, config, task, "whole", recorded_step=0)
    answer = {
        "computation": whole.of("computing")[-1].how,
        "losses": [event.loss for event in whole.of("metrics")],
        "tokens_per_s": speed(
            [event.step_tokens for event in whole.of("metrics")], [event.step_s for event in whole.of("metrics")]
        ),
        "peak_bytes": peak_bytes(),
        "before": before,
        "load_s": base.load_s,
        "trainable_parameters": figures.trainable_parameters,
    }
    with base.using("whole"):
        answer["after"] = mean_loss(base, task["held_out"], config)
    about = AboutExport(
        adapter_id="whole", adapter_name="whole", adapter_version=1, base_model_id="check/base", base_revision=None,
        format="merged", created_at=datetime.now(UTC).isoformat(),
    )  # fmt: skip
    merge(
        base,
        Merge(
            adapter_id="whole", adapter_path=str(work / "whole"), output_path=str(work / "merged"),
            base_model_id="check/base", about=about,
        ),
        Recorder(),
    )  # fmt: skip
    base.detach("whole")
    resumed, _ = _train(base, config, task, "resumed", recorded_step=task["resume_at"])
    answer["resumed_from"] = resumed.of("started")[-1].resumed_from_step
    answer["resumed_losses"] = [event.loss for event in resumed.of("metrics")]
    return answer


def _train(base: Any, config: Any, task: dict[str, Any], name: str, *, recorded_step: int) -> tuple[Recorder, Any]:
    from domain.protocol import Train
    from engine.training import train

    work, recorder = Path(task["work"]), Recorder()
    command = Train(
        adapter_id=name,
        config=config,
        dataset_path=task["rows"],
        validation_path=None,
        validation_fraction=0.0,
        output_path=str(work / name),
        base_model_id="check/base",
        base_revision=None,
        checkpoints_path=str(work / "checkpoints"),
        max_checkpoint_bytes=None,
        recorded_step=recorded_step,
        about=None,
    )
    return recorder, train(base, command, recorder)


def merged(task: dict[str, Any]) -> dict[str, Any]:
    """Load the model that `prove` merged with plain transformers, and measure its loss on the same rows."""
    from domain.peft.config import PeftConfig
    from engine.base import Base

    config = PeftConfig.model_validate(task["config"] | {"quantization": "none", "init_weights": "default"})
    base = Base(Path(task["work"]) / "merged", config, task["device"], "transformers")
    return {"after": mean_loss(base, task["held_out"], config)}


def peer(task: dict[str, Any]) -> dict[str, Any]:
    """Do the same work with transformers + PEFT + TRL as a user would write it."""
    from gpu_check.peer import train_with_trl

    forget_peak()
    return train_with_trl(task) | {"peak_bytes": peak_bytes()}


def write(task: dict[str, Any]) -> dict[str, Any]:
    """Write the model, in a process whose GPU memory is free again afterwards."""
    from gpu_check.shapes import write_model

    write_model(task["model"], Path(task["model_path"]))
    return {}


TASKS = {"write": write, "prove": prove, "merged": merged, "peer": peer}


def kept_bytes() -> int:
    """Return the bytes of the GPU that tensors still hold once a task is over; 0 on a CPU."""
    import torch

    gc.collect()
    return int(torch.cuda.memory_allocated()) if torch.cuda.is_available() else 0


def main() -> int:
    """Do tasks until there are no more. Each result, or the reason why there is none, is one line."""
    # What libraries print goes to the log, and not between the answers.
    with os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8") as answers:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        hide_broken_torchvision()
        if sys.argv[1] == "unsloth":
            import unsloth  # noqa: F401 - before transformers, which it patches
        import engine.training  # noqa: F401 - before the first task comes

        for line in sys.stdin:
            task = json.loads(line)
            try:
                result = TASKS[task["kind"]](task)
                result["kept_bytes"] = kept_bytes()
            except Exception as error:  # noqa: BLE001 - whatever it is, it is what the check found
                traceback.print_exc()
                result = {"error": f"{type(error).__name__}: {error}"[:500]}
            answers.write(json.dumps(result) + "\n")
            answers.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
