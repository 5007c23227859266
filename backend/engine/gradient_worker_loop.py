"""The work of a gradient worker: one base, one adapter, and the passes that the engine sends."""

import torch
from safetensors.torch import load
from transformers import set_seed

from engine.base import Base
from engine.errors import BadSetting
from engine.initialisation import create_adapter
from engine.neftune import add_noise
from engine.objectives import objective_of
from engine.shared_tensors import SharedTensors
from engine.worker_messages import (
    Answer,
    Computed,
    Differentiate,
    Evaluate,
    Held,
    Hold,
    Order,
    Prepare,
    Prepared,
    as_batch,
)


class GradientWorkerLoop:
    """Carries out the orders: first `Hold`, then `Prepare`, then passes."""

    def __init__(self) -> None:
        self._base: Base | None = None
        self._replica: _Replica | None = None

    def serve(self, order: Order) -> Answer:
        """Carry out an order.

        Raises:
            CommandError: Of the class that says why not.
        """
        if isinstance(order, Hold):
            if order.threads is not None:
                torch.set_num_threads(order.threads)
            self._base = Base(order.path, order.config, order.device, order.engine)
            return Held()
        if isinstance(order, Prepare):
            if self._base is None:
                raise BadSetting("the worker has no base yet")
            self._replica = _Replica(self._base, order)
            return Prepared({name: tuple(tensor.shape) for name, tensor in self._base.trained.items()})
        if self._replica is None:
            raise BadSetting("the worker has no adapter yet")
        return self._replica.compute(order)


class _Replica:
    """The adapter on the worker's base, and the memory that it shares with the engine."""

    def __init__(self, base: Base, order: Prepare) -> None:
        config = order.config
        set_seed(config.seed)
        again = load(order.initial) if order.initial is not None else None
        create_adapter(
            base,
            order.adapter_id,
            config,
            order.base_model_id,
            order.base_revision,
            again,
            continues=order.continues,
        )
        base.backend.begin_training(base.model, config)
        if config.neftune_noise_alpha > 0:
            add_noise(base.model.get_input_embeddings(), config.neftune_noise_alpha)
        self._model, self._device, self._trained = base.model, base.device, base.trained
        self._objective = objective_of(base, config)
        self._parameters = SharedTensors(order.parameters_file, self._trained)
        self._gradients = SharedTensors(order.gradients_file, self._trained)

    def compute(self, order: Differentiate | Evaluate) -> Computed:
        with torch.no_grad():
            for name, parameter in self._trained.items():
                parameter.copy_(self._parameters[name])
        if isinstance(order, Evaluate):
            self._model.eval()
            with torch.no_grad():
                made = {one.index: self._objective(as_batch(one), order.size) for one in order.passes}
            return Computed({index: one.all_figures() for index, one in made.items()}, [])
        return self._differentiate(order)

    def _differentiate(self, order: Differentiate) -> Computed:
        self._model.train()
        figures = {}
        for one in order.passes:
            seed_generators(one.seed, self._device)
            made = self._objective(as_batch(one), order.size)
            (made.loss * order.scale).backward()
            figures[one.index] = made.all_figures()
        gradients = {name: p.grad for name, p in self._trained.items() if p.grad is not None}
        self._gradients.write(gradients)
        for parameter in self._trained.values():
            parameter.grad = None
        return Computed(figures, list(gradients))


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed the generators that dropout and noise draw from, of the CPU and of the device."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
