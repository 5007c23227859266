"""`python -m engine.gradient_worker`: computes gradients on another device for the engine that started it.

It holds a second copy of the base and of the adapter, and nothing else: the optimizer, the progress and the
checkpoints are the engine's. So it can be killed at any time, and nothing is lost.
"""

import os
import traceback
from multiprocessing.connection import Connection
from typing import Any

from engine.lifeline import die_with_parent


def main() -> None:
    """Serve orders until the socket closes."""
    die_with_parent(int(os.environ["PEFT_STUDIO_PARENT_PID"]))
    from engine.guards import before_transformers

    before_transformers()
    import torch

    from engine.commands import OUT_OF_MEMORY_SUGGESTIONS
    from engine.errors import CommandError, OutOfMemory
    from engine.gradient_worker_loop import GradientWorkerLoop
    from engine.worker_messages import SOCKET_VARIABLE, Answer, WorkerFailed

    engine: Connection[Any, Any] = Connection(int(os.environ[SOCKET_VARIABLE]))
    loop = GradientWorkerLoop()
    while True:
        try:
            order = engine.recv()
        except EOFError:
            return
        answer: Answer
        try:
            answer = loop.serve(order)
        except CommandError as error:
            answer = WorkerFailed(error.error_class, error.message, error.suggestions)
        except torch.OutOfMemoryError as error:
            answer = WorkerFailed(OutOfMemory.error_class, str(error), OUT_OF_MEMORY_SUGGESTIONS)
        except Exception as error:  # noqa: BLE001 - the traceback goes to the engine's log, the message to the engine
            traceback.print_exc()
            answer = WorkerFailed("engine", f"{type(error).__name__}: {error}", [])
        engine.send(answer)


if __name__ == "__main__":
    main()
