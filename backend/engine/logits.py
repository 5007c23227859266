"""The way from hidden states to logits as a model's own class goes it, for some tokens at a time.

A class of transformers for text is a trunk, which makes the hidden states, and a forward pass around it: the head, and
what the class does before and behind it (a bias, a scale, a cap, a layer of its own). That forward pass is called with
a trunk that hands out the hidden states of the wanted tokens. So nothing is known here about any family.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import nn

from engine.frozen_weights import unwrapped

_ROWS, _LENGTH = 2, 5
_DEPTH = 3  # modules deep: a decoder within a model within a class that answers
# How far logits of the same hidden states may be apart, as a part of the largest: products of other sizes add up in
# another order. A class that does something else with the tokens around one is off by far more, or fails.
_APART = {torch.float32: 1e-4, torch.bfloat16: 0.03, torch.float16: 0.005}


class NotSplit(Exception):
    """A class' logits cannot be computed from hidden states for some tokens alone; the text says why."""


class _Enough(Exception):
    """The hidden states are there: what comes behind them in the forward pass is not computed."""


class Tail:
    """What a model's class does behind its trunk.

    Shapes: B rows of T tokens, N of these tokens, hidden size H, vocabulary V.

    Args:
        bare: The model without PEFT's wrapper.
        trunk: Its part that makes the hidden states.

    Attributes:
        trains: Whether something behind the trunk is trained.
    """

    def __init__(self, bare: Any, trunk: nn.Module) -> None:
        self._bare, self._trunk = bare, trunk
        self._output: Callable[[torch.Tensor], Any] | None = None
        self.trains = False

    def hidden(self, run: Callable[[], Any]) -> torch.Tensor:
        """Return the hidden states, B × T × H, of a forward pass, which is left behind the trunk.

        Args:
            run: Calls the model.

        Raises:
            NotSplit: The trunk was not called, or returns no hidden states.
        """

        def leave(_module: nn.Module, _inputs: Any, output: Any) -> None:
            found.append(output)
            raise _Enough

        found: list[Any] = []
        handle = self._trunk.register_forward_hook(leave)
        try:
            run()
        except _Enough:
            return self._taken(found[0])
        finally:
            handle.remove()
        raise NotSplit("its forward pass does not call the part that holds the layers")

    def watched(self, run: Callable[[], Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the hidden states, B × T × H, and the logits, B × T × V, of a whole forward pass.

        Raises:
            NotSplit: As for `hidden`.
        """
        found: list[Any] = []
        handle = self._trunk.register_forward_hook(lambda _module, _inputs, output: found.append(output))
        try:
            logits: torch.Tensor = run().logits
        finally:
            handle.remove()
        if len(found) != 1:
            raise NotSplit(f"its forward pass calls the part that holds the layers {len(found)} times")
        return self._taken(found[0]), logits

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits of some tokens, N × V, from their hidden states, N × H, with a gradient if these have one.

        Raises:
            NotSplit: The class makes something else of them.
        """
        if self._output is None:
            raise ValueError("no forward pass has shown yet what the trunk returns")
        with _instead(self._trunk, self._output(hidden[None])):
            places = torch.zeros((1, hidden.shape[0]), dtype=torch.long, device=hidden.device)
            made: torch.Tensor = self._bare(input_ids=places, use_cache=False).logits
        if made.dim() != 3 or made.shape[:2] != places.shape:
            raise NotSplit(f"it makes logits of shape {tuple(made.shape)} of {hidden.shape[0]} tokens")
        return made.squeeze(0)  # a view; the gradient of `made[0]` would be another tensor as large as the logits

    def _taken(self, output: Any) -> torch.Tensor:
        """Take the hidden states out of the trunk's output, and note how such an output is made."""
        if isinstance(output, tuple):
            hidden: Any = output[0]
            rest = [None] * (len(output) - 1)
            self._output = lambda other: (other, *rest)
        else:
            hidden, kind = getattr(output, "last_hidden_state", None), type(output)
            self._output = lambda other: kind(last_hidden_state=other)
        if not isinstance(hidden, torch.Tensor) or hidden.dim() != 3:
            raise NotSplit("the part that holds its layers returns no hidden states")
        return hidden


@contextmanager
def _instead(module: nn.Module, output: Any) -> Iterator[None]:
    """Have a module return an output without computing."""
    own = module.__dict__.get("forward")

    @wraps(module.forward)
    def forward(*_arguments: Any, **_named: Any) -> Any:
        return output

    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = own


def tail_of(model: Any) -> Tail:
    """Find a model's tail, and show on the model itself that logits are the same by it.

    Ten tokens pass through the model. Their logits are computed again by the tail, in another order and in parts.

    Args:
        model: With adapters or without. Modes and random generators stay as they are.

    Raises:
        NotSplit: Its class does not compute each token's logits from that token's hidden state alone.
    """
    return _first_that_holds(model, _require_the_same)


def tail_without_data(model: Any, run: Callable[[], Any]) -> Tail:
    """Find the tail of a model without data, as far as shapes tell.

    Args:
        model: Of fake tensors.
        run: Calls it with B × T tokens.

    Raises:
        NotSplit: It has none.
    """

    def require_shapes(tail: Tail) -> None:
        hidden, logits = tail.watched(run)
        _require_places(hidden, logits)
        if tail.logits(hidden.flatten(0, 1)[:3]).shape != (3, logits.shape[-1]):
            raise NotSplit("it makes other logits of some tokens than of all")

    return _first_that_holds(model, require_shapes)


def _first_that_holds(model: Any, require: Callable[[Tail], None]) -> Tail:
    bare = unwrapped(model)
    why: NotSplit | None = None
    for trunk in _trunks(bare):
        tail = Tail(bare, trunk)
        try:
            require(tail)
        except NotSplit as error:
            why = why or error
        except Exception as error:  # noqa: BLE001 - the class' own code, called as it does not expect
            why = why or NotSplit(f"its forward pass fails where hidden states are handed to it: {error!r}"[:300])
        else:
            return tail
    raise why or NotSplit("it has no part that holds its layers")


def _trunks(bare: Any) -> Iterator[nn.Module]:
    """Yield the parts that may make the hidden states, from the outside in: all that hold a list of layers."""
    paths = {path: module for path, module in bare.named_modules() if path and path.count(".") < _DEPTH}
    named = getattr(bare, "base_model", bare)  # what the class calls its base comes first
    inner = sorted(paths, key=lambda path: (paths[path] is not named, path.count(".")))
    for path in inner:
        module = paths[path]
        if not isinstance(module, nn.ModuleList) and any(isinstance(part, nn.ModuleList) for part in module.modules()):
            yield module


def _require_places(hidden: torch.Tensor, logits: torch.Tensor) -> None:
    if logits.dim() != 3 or hidden.shape[:2] != logits.shape[:2]:
        raise NotSplit(f"it makes logits of shape {tuple(logits.shape)} of hidden states of {tuple(hidden.shape)}")


@torch.no_grad()  # type: ignore[untyped-decorator]
def _require_the_same(tail: Tail) -> None:
    bare = tail._bare
    with _evaluating(bare):
        embeddings = bare.get_input_embeddings().weight
        ids = torch.arange(1, 1 + 7 * _ROWS * _LENGTH, 7, device=embeddings.device) % embeddings.shape[0]
        hidden, logits = tail.watched(lambda: bare(input_ids=ids.reshape(_ROWS, _LENGTH), use_cache=False))
        _require_places(hidden, logits)
        flat, wanted = hidden.flatten(0, 1).flip(0), logits.flatten(0, 1).flip(0).float()
        again = torch.cat([tail.logits(flat[:3]), tail.logits(flat[3:])]).float()
        with torch.enable_grad():
            tail.trains = tail.logits(flat[:1]).requires_grad
    if again.shape != wanted.shape:
        raise NotSplit("it makes other logits of some tokens than of all")
    apart = float((again - wanted).abs().max()) / max(float(wanted.abs().max()), 1e-6)
    if not apart <= _APART.get(logits.dtype, _APART[torch.bfloat16]):
        raise NotSplit(f"a token's logits change by {apart:.1%} with the tokens around it")


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Switch a model to evaluation, and each of its modules back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
