"""A loaded model's engine for one long piece of work: a training, or an export."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from core.errors import ModelBusy
from domain.models.load_states import LoadState
from services.engines.process import EngineProcess
from services.loading.loaded_base import LoadedBase
from services.loading.loaded_model import LoadedModel

# Takes the thing that is waited for and its progress (0..1, or None). Waits a moment, or raises if the work is to end.
Wait = Callable[[str, float | None], None]


@contextmanager
def borrow(model: LoadedModel, purpose: str, wait: Wait) -> Iterator[EngineProcess]:
    """Wait until the base of a model is loaded and free, and hold it for the length of the block.

    From the call on the base does not give way to other loads. While it is held, others who ask for its engine get
    ModelBusy.

    Args:
        model: The model, loaded or loading.
        purpose: What the base is busy with, for others to read.
        wait: Called again and again while the base loads, and while something else holds it.

    Raises:
        StudioError: The load failed, with its error.
        ModelNotReady: The base was unloaded.
    """
    base = model.base
    with base.awaited():
        while not base.settled:
            wait(f"{base.state.value} the base", base.progress.fraction)
        if base.state is LoadState.FAILED and base.error is not None:
            raise base.error
        process = _acquire(base, purpose, wait)
        try:
            yield process
        finally:
            base.release()


def _acquire(base: LoadedBase, purpose: str, wait: Wait) -> EngineProcess:
    while True:
        try:
            return base.acquire(purpose)
        except ModelBusy:
            wait(f"waiting for the base, which is {base.busy_with}", None)
