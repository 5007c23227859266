"""The adapter's folder. A trial is written before the first step, the folder itself after the last one."""

import json
import os
import shutil
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save_file

from core.errors import StorageFull
from core.files import storage_errors, whole_folder
from core.manifest import write_manifest
from domain.jobs.figures import RunOutcome
from domain.protocol import Train
from engine import methods
from engine.adapter_check import check_folder
from engine.base import Base
from engine.card import begin_card, finish_card, readme
from engine.channel import Stopped
from engine.checkpoints import Tensors
from engine.errors import CannotSave
from engine.stored_names import names_for_peft
from engine.tokenizer_folder import save_tokenizer

SET_ASIDE = "-not-checked"  # ends the names of folders that did not pass their check
_NOTHING_YET = RunOutcome(
    steps=0,
    adapter_step=0,
    first_loss=0.0,
    final_loss=0.0,
    initial_eval_loss=None,
    final_eval_loss=None,
    best_eval_loss=None,
    tokens=0,
    elapsed_s=0.0,
    stopped_early=False,
    stopped_on_request=False,
)


class HandingOut:
    """Writes the folder that a run hands out.

    Everything that can be known or tried before the first step is, since a failure after the last step could lose the
    training.

    Args:
        base: With the adapter on it.
        command: Names the adapter and the folder.
        initial: A and B as initialised, where the adapter is converted afterwards.
    """

    def __init__(self, base: Base, command: Train, initial: Tensors) -> None:
        self._base, self._adapter_id, self._initial = base, command.adapter_id, initial
        self._output = Path(command.output_path)
        self._card = begin_card(base, command)

    def prove(self) -> None:
        """Write the folder once, read it again and delete it, to know that it can be written.

        Raises:
            StorageFull: There is no room for it.
            ExportDiffers: What can be read from it is not the adapter.
        """
        parent = self._output.parent
        with (
            storage_errors(self._output),
            tempfile.TemporaryDirectory(dir=parent, prefix=f".{self._output.name}-", suffix=".tmp") as scratch,
        ):
            self._fill(Path(scratch), _NOTHING_YET, {})

    def write(self, outcome: RunOutcome, losses: dict[int, float]) -> None:
        """Write the folder. It is there completely or not at all.

        A run that is cut off between this and its record is handed out again from its last checkpoint.

        Raises:
            StorageFull: There is no room for it.
            ExportDiffers: What can be read from it is not what was trained.
        """
        with whole_folder(self._output) as folder:
            self._fill(folder, outcome, losses)

    def set_aside(self) -> Path:
        """Move the folder aside, whose files do not answer as the adapter that was trained; return where it is."""
        kept = self._output.with_name(f"{self._output.name}{SET_ASIDE}")
        shutil.rmtree(kept, ignore_errors=True)
        os.replace(self._output, kept)
        return kept

    def _fill(self, folder: Path, outcome: RunOutcome, losses: dict[int, float]) -> None:
        state = methods.adapter_state(self._base.model, self._adapter_id)
        lora = self._base.model.peft_config[self._adapter_id]
        if self._initial:
            state, lora = methods.as_plain_lora(state, self._initial, lora)
        card = finish_card(self._card, outcome, losses)
        names = names_for_peft(self._base.model.get_base_model(), state)
        written = {names[name]: tensor for name, tensor in state.items()}
        save_file(written, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        # save_pretrained writes the given object's inference_mode as True and everything else as it is.
        lora.save_pretrained(str(folder))
        save_tokenizer(self._base.tokenizer, folder)
        (folder / "training.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(readme(card), encoding="utf-8")
        check_folder(folder, self._base, self._adapter_id, self._initial)
        write_manifest(folder, {"adapter_id": self._adapter_id})


@contextmanager
def saving(done: str) -> Iterator[None]:
    """Raise CannotSave for any failure of the block, since a failure to save does not lose what was trained.

    Args:
        done: What the run has done, for the message.

    Raises:
        CannotSave: Something failed; the traceback is in the log.
        StorageFull, Stopped: As they were raised.
    """
    try:
        yield
    except (StorageFull, Stopped):
        raise
    except Exception as error:
        traceback.print_exc()
        raise CannotSave(
            f"{done}, and its adapter cannot be saved: {type(error).__name__}: {error}",
            ["mend what the message names, then resume the job: what was trained is kept"],
        ) from error
