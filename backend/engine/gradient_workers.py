"""One run over several devices: the engine deals the passes of each step to workers and adds up their gradients.

docs/decisions/0018-several-gpus.md says why it is done like this.
"""

import hashlib
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save

from domain import protocol
from domain.protocol import Train
from engine.base import Base
from engine.batches import Batch
from engine.checkpoints import Tensors
from engine.continuing import initial_folder
from engine.errors import BadSetting, CommandError, WorkerDied
from engine.gradient_worker_loop import seed_generators
from engine.objectives import Figures, Objective, Size, add
from engine.shared_tensors import SharedTensors, bytes_for, memory_file
from engine.worker_messages import (
    SOCKET_VARIABLE,
    Computed,
    Differentiate,
    Evaluate,
    Held,
    Hold,
    Order,
    Pass,
    Prepare,
    Prepared,
    WorkerFailed,
    as_pass,
)

_BACKEND = Path(__file__).resolve().parents[1]
_LOOK_S = 0.2  # between two looks for a stop while a worker computes
_EVALUATED_AT_ONCE = 8  # passes a device: their tokens are in memory together
A = TypeVar("A")
CheckStop = Callable[[], None]


class GradientWorkers:
    """The worker processes of one run. They load their bases as soon as this is made.

    Args:
        base: The engine's own base.
        devices: A GPU's uuid, or `cpu`, for each worker.

    Raises:
        OSError: A process cannot be started.
    """

    def __init__(self, base: Base, devices: Sequence[str]) -> None:
        self._base = base
        self._parameters_file = memory_file()
        self._workers: list[_Worker] = []
        threads = max(1, (os.cpu_count() or 1) // (1 + len(devices)))
        try:
            for device in devices:
                worker = _Worker(device, base.engine, self._parameters_file)
                self._workers.append(worker)
                shown, own_threads = ("cpu", threads) if device == "cpu" else ("cuda:0", None)
                worker.send(Hold(base.path, base.loaded_with, shown, base.engine, own_threads))
        except BaseException:
            self.close()
            raise

    @property
    def devices(self) -> int:
        """How many devices the run has, the engine's own among them."""
        return 1 + len(self._workers)

    def prepare(self, command: Train, initial: Tensors, check_stop: CheckStop) -> None:
        """Make the adapter on every worker, once the engine has made its own.

        Args:
            command: The run.
            initial: A and B as initialised, where the adapter starts on other weights than the base's.
            check_stop: Raises Stopped to end the run.

        Raises:
            CommandError: A worker could not load the base, or not make the adapter.
            WorkerDied: A worker's process ended.
        """
        if not self._workers:
            return
        trained = self._base.trained
        size = bytes_for(trained.values())
        os.truncate(self._parameters_file, size)
        kept = save({name: tensor.contiguous() for name, tensor in initial.items()}) if initial else None
        for worker in self._workers:
            worker.receive(Held, check_stop)
            os.truncate(worker.gradients_file, size)
            worker.send(
                Prepare(
                    command.adapter_id,
                    command.config,
                    command.base_model_id,
                    command.base_revision,
                    kept,
                    initial_folder(command),
                    self._parameters_file,
                    worker.gradients_file,
                )
            )
        wanted = [(name, tuple(tensor.shape)) for name, tensor in trained.items()]
        for worker in self._workers:
            if list(worker.receive(Prepared, check_stop).parameters.items()) != wanted:
                raise BadSetting(f"the adapter on {worker.device} has other parameters than the one of the engine")

    def passes(self, objective: Objective, check_stop: CheckStop, seed: int) -> "DealtPasses":
        """Return the passes of the run over all devices. Call it after `prepare`.

        Args:
            objective: What is minimised, on the engine's own model.
            check_stop: Raises Stopped to end the run.
            seed: Of the run.
        """
        return DealtPasses(self._base, objective, check_stop, seed, self._workers, self._parameters_file)

    def close(self) -> None:
        """End the workers at once: they hold nothing that the engine has not."""
        for worker in self._workers:
            worker.close()
        self._workers = []
        if self._parameters_file >= 0:
            os.close(self._parameters_file)
            self._parameters_file = -1

    def __enter__(self) -> "GradientWorkers":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class DealtPasses:
    """The passes of a step dealt to the engine and its workers in turn.

    Each pass has random numbers of its own, seeded by the run's seed, the step and its place in the step. So the number
    of devices changes a run by the rounding of a sum alone.
    """

    def __init__(
        self,
        base: Base,
        objective: Objective,
        check_stop: CheckStop,
        seed: int,
        workers: Sequence["_Worker"],
        parameters_file: int,
    ) -> None:
        self._objective, self._check_stop, self._seed, self._workers = objective, check_stop, seed, workers
        self._device, self._trained = base.device, base.trained
        self._parameters = SharedTensors(parameters_file, self._trained)
        self._gradients = [SharedTensors(worker.gradients_file, self._trained) for worker in workers]

    def gradients(self, step: int, batches: Sequence[Batch], size: Size, scaler: torch.amp.GradScaler) -> Figures:
        """Do as `Passes.gradients` says.

        Raises:
            CommandError: A worker could not do its part.
            WorkerDied: A worker's process ended.
        """
        seeds = [_seed_of(self._seed, step, index) for index in range(len(batches))]
        passes = [as_pass(index, seeds[index], batch) for index, batch in enumerate(batches)]
        scale = float(scaler.get_scale())
        asked = self._ask(passes, lambda share: Differentiate(share, size, scale))
        figures: dict[int, Figures] = {}
        for index in range(0, len(batches), 1 + len(self._workers)):
            self._check_stop()
            seed_generators(seeds[index], self._device)
            made = self._objective(batches[index], size)
            scaler.scale(made.loss).backward()
            figures[index] = made.all_figures()
        for number in asked:  # always in the same order: the sum has the same bits
            computed = self._workers[number].receive(Computed, self._check_stop)
            figures |= computed.figures
            self._add(self._gradients[number], computed.gradients)
        return add(figures[index] for index in range(len(batches)))

    def losses(self, batches: Iterable[Batch], size: Size) -> Figures:
        """Do as `Passes.losses` says.

        Raises:
            CommandError: A worker could not do its part.
            WorkerDied: A worker's process ended.
        """
        total: list[Figures] = []
        devices, remaining = 1 + len(self._workers), iter(batches)
        while some := list(islice(remaining, devices * _EVALUATED_AT_ONCE)):
            passes = [as_pass(index, 0, batch) for index, batch in enumerate(some)]
            asked = self._ask(passes, lambda share: Evaluate(share, size))
            figures: dict[int, Figures] = {}
            for index in range(0, len(some), devices):
                self._check_stop()
                figures[index] = self._objective(some[index], size).all_figures()
            for number in asked:
                figures |= self._workers[number].receive(Computed, self._check_stop).figures
            total += [figures[index] for index in range(len(some))]
        return add(total)

    def _ask(self, passes: list[Pass], order: Callable[[list[Pass]], Order]) -> list[int]:
        """Send every worker its share; return the numbers of those that have one."""
        self._parameters.write(self._trained)
        shares = [passes[first :: 1 + len(self._workers)] for first in range(1, 1 + len(self._workers))]
        for worker, share in zip(self._workers, shares, strict=True):
            if share:
                worker.send(order(share))
        return [number for number, share in enumerate(shares) if share]

    def _add(self, gradients: SharedTensors, names: Sequence[str]) -> None:
        for name in names:
            parameter, gradient = self._trained[name], gradients[name]
            if parameter.grad is None:
                parameter.grad = gradient.to(parameter.device, copy=True)
            else:
                parameter.grad.add_(gradient.to(parameter.device))


class _Worker:
    """One worker process, and the engine's end of its socket."""

    def __init__(self, device: str, engine: str, parameters_file: int) -> None:
        self.device = device
        self.gradients_file = memory_file()
        own, others = socket.socketpair()
        environment = {
            **os.environ,
            SOCKET_VARIABLE: str(others.fileno()),
            protocol.BACKEND_VARIABLE: engine,
            "PEFT_STUDIO_PARENT_PID": str(os.getpid()),
        }
        if device != "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = device
        with others:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "engine.gradient_worker"],
                cwd=_BACKEND,
                env=environment,
                stdin=subprocess.DEVNULL,
                pass_fds=(others.fileno(), parameters_file, self.gradients_file),
            )
        self._engine: Connection[Any, Any] = Connection(own.detach())

    def send(self, order: Order) -> None:
        try:
            self._engine.send(order)
        except OSError as error:
            raise self._died() from error

    def receive(self, answer: type[A], check_stop: CheckStop) -> A:
        """Wait for an answer of a type."""
        try:
            while not self._engine.poll(_LOOK_S):
                check_stop()
            received = self._engine.recv()
        except (EOFError, OSError) as error:
            raise self._died() from error
        if isinstance(received, WorkerFailed):
            raise _error(received, self.device)
        if not isinstance(received, answer):
            raise TypeError(f"the worker on {self.device} answered {type(received).__name__}")
        return received

    def _died(self) -> WorkerDied:
        code = self._process.wait()
        how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        return WorkerDied(f"the process that computes gradients on {self.device} ended {how}")

    def close(self) -> None:
        self._engine.close()
        self._process.kill()
        self._process.wait()
        if self.gradients_file >= 0:
            os.close(self.gradients_file)
            self.gradients_file = -1


def _error(failed: WorkerFailed, device: str) -> CommandError:
    """Return the error that a worker met as the engine's own."""
    kinds: Mapping[str, type[CommandError]] = {kind.error_class: kind for kind in CommandError.__subclasses__()}
    kind = kinds.get(failed.error_class, CommandError)
    return kind(f"on {device}: {failed.message}", failed.suggestions)


def _seed_of(seed: int, step: int, index: int) -> int:
    """Return the seed of a pass, one of 2**63."""
    digest = hashlib.sha256(f"{seed}:{step}:{index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
