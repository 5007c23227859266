"""Passes through a model whose tensors have sizes and types but no data (torch's FakeTensorMode).

Fake tensors take the kernels that a CPU would take, and autograd keeps of them what it would keep of real ones. One
layer of each kind computes; the others hand on what they are given.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributions import Distribution
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import masking_utils
from transformers.integrations import moe

from domain.models.shape import Kept, Passes, Passing, highest
from engine.layer_kinds import Layer, chunk_of
from engine.live_storages import LiveStorages
from engine.logits import NotSplit, tail_without_data
from engine.roles import linear_modules, stacked_experts

ROWS = 2
HALF, FULL = torch.bfloat16, torch.float32
# Two lengths give what grows with T and what grows with T²: the shortest multiple of the layers' chunks that is no
# shorter than this, and twice that. A layer that computes token by token takes the short ones.
_LENGTH, _SHORT_LENGTHS = 256, (32, 64)
_LONGEST_CHUNK = 4096
_MODE = FakeTensorMode(allow_non_fake_inputs=True)
# Where a configuration says that attention weights are dropped in training.
_ATTENTION_DROPOUTS = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob", "attn_dropout")


@dataclass
class Seen:
    """What one forward pass showed of one kind of layer, or (under no kind) of what is outside the layers.

    Attributes:
        size: Bytes of what it keeps.
        storages: What it keeps.
        read: Path of a linear module → the storage of its input.
        inputs: Elements of the layer's input.
        logits: Elements kept that have the logits' size; they are not in `size`.
        forward: Bytes held after each operator of its forward pass, of its input and what it made.
        backward: Bytes held after each operator of its backward pass, beside what was held before it but for the
            gradient that came in.
    """

    size: int = 0
    storages: set[int] = field(default_factory=set)
    read: dict[str, int] = field(default_factory=dict)
    inputs: int = 0
    logits: int = 0
    forward: list[int] = field(default_factory=list)
    backward: list[int] = field(default_factory=list)

    @property
    def passing(self) -> list[int]:
        """Bytes that are there after each operator beside all that the layer keeps."""
        return [held - self.size for held in self.forward] + self.backward

    def reads(self, path: str, prefix: str) -> str:
        """Say who else keeps a linear module's input, in the words of `domain.models.shape.Linear`."""
        storage = self.read.get(path)
        if storage is None:
            return "own"
        if storage in self.storages:
            return "kept"
        readers = [reader for reader, read in self.read.items() if read == storage]
        return "own" if len(readers) == 1 else readers[0].removeprefix(prefix)


# What a pass showed, by kind of layer.
Shown = dict[int | None, Seen]


class Passed:
    """What passes of both lengths showed, by compute type and by whether a mask was passed."""

    def __init__(self, lengths: tuple[int, int]) -> None:
        self.lengths = lengths
        self.shown: dict[tuple[torch.dtype, bool], list[Shown]] = {}

    def seen(self, kind: int | None) -> Seen:
        """Return what the shorter pass in fp32 without a mask showed of one kind of layer."""
        return self.shown[FULL, False][0].get(kind, Seen())

    def computes(self, kind: int | None) -> bool:
        """Tell whether text passes through layers of that kind."""
        return kind in self.shown[FULL, False][0]

    def by_token(self, kind: int | None) -> bool:
        """Tell whether layers of that kind keep more tensors of more tokens, and not only larger ones."""
        short, long = (len(at.get(kind, Seen()).storages) for at in self.shown[FULL, False])
        return long - short > (self.lengths[1] - self.lengths[0]) // 2

    @property
    def tokens(self) -> int:
        """Tokens of that pass."""
        return ROWS * self.lengths[0]

    def kept(self, kind: int | None) -> Passes:
        """Return what layers of that kind keep."""
        half, half_masked, full, full_masked = (
            self._grown(*(at.get(kind, Seen()).size for at in self.shown[width, masked]))
            for width in (HALF, FULL)
            for masked in (False, True)
        )
        return Passes(half, half_masked, full, full_masked)

    def passing(self, kind: int | None) -> Passing:
        """Return what layers of that kind compute with beside what is kept."""
        half, full = (
            self._moments(*(at.get(kind, Seen()).passing for at in self.shown[width, False])) for width in (HALF, FULL)
        )
        return Passing(half, full)

    def _moments(self, short: list[int], long: list[int]) -> tuple[Kept, ...]:
        """Return the operators after which the most is held, each at some length.

        A layer that computes token by token, or chunk by chunk, has more operators at the greater length. There the
        most of all of them stands for all.
        """
        if len(short) != len(long):
            short, long = [max(short)], [max(long)]
        return highest(self._grown(*pair) for pair in set(zip(short, long, strict=True)))

    def _grown(self, short: int, long: int) -> Kept:
        """Solve a·T + b·T² from the bytes at two lengths."""
        first, second = self.lengths
        square = (long / second - short / first) / (second - first) / ROWS
        return Kept(short / first / ROWS - square * first, square)


class WithoutData:
    """Passes through one model.

    Args:
        model: On the meta device. Fake tensors take the place of its own.
        text: The configuration of its text part.
        layers: Its layers.
    """

    def __init__(self, model: Any, text: Any, layers: list[Layer]) -> None:
        self._model, self._text, self._layers = model, text, layers

    def unfused(self) -> Passed:
        """Pass through it as a CPU computes."""
        return self._passed(self._suitable_lengths(), dropout=True)

    def fused(self, unfused: Passed) -> Passed:
        """Pass through it as a GPU computes, whose fused attention drops attention weights without keeping them."""
        dropouts = (getattr(self._text, name, 0) for name in _ATTENTION_DROPOUTS)
        if not any(isinstance(value, float) and value > 0 for value in dropouts):
            return unfused
        return self._passed(unfused.lengths, dropout=False)

    def with_experts(self, unfused: Passed) -> Passed:
        """Pass through it as `unfused` did, with a gradient for stacked experts."""
        return self._passed(unfused.lengths, dropout=True, experts=True)

    def reached(self) -> tuple[set[str], set[str]]:
        """Return the paths of the linear modules that are called, and of what a gradient reaches.

        Those are linear modules, and tensors of stacked experts. A module whose weight is changed in place by a forward
        pass is in neither: it cannot be held otherwise.
        """
        called: set[str] = set()
        reached: set[str] = set()
        _make_fake(self._model, FULL)
        for path, parameter in _expert_tensors(self._model):
            parameter.requires_grad_(True)
            parameter.register_hook(lambda _gradient, path=path: reached.add(path))

        def note(path: str) -> Callable[[Any, Any, Any], None]:
            def hook(_module: Any, _inputs: Any, output: Any) -> None:
                called.add(path)
                if isinstance(output, torch.Tensor) and output.requires_grad:
                    output.register_hook(lambda _gradient: reached.add(path))

            return hook

        handles = [module.register_forward_hook(note(path)) for path, module in linear_modules(self._model)]
        watch = _Watch(self._model, self._layers, int(self._text.vocab_size))
        changes = _Changes()
        try:
            with watch.watching(), _as_real(masked=False):
                with changes:
                    logits = self._forward(_SHORT_LENGTHS[0], masked=False)
                _backward(logits)
        finally:
            for handle in handles:
                handle.remove()
        changed = {
            path
            for path, module in linear_modules(self._model)
            if module.weight.untyped_storage()._cdata in changes.storages
        }
        return called - changed, reached - changed

    def has_tail(self) -> bool:
        """Tell whether its class makes logits of some tokens' hidden states alone, as far as shapes tell."""
        _make_fake(self._model, FULL)

        def run() -> Any:
            ids = torch.zeros((ROWS, _SHORT_LENGTHS[0]), dtype=torch.long)
            return self._model(input_ids=ids, use_cache=False)

        try:
            with torch.no_grad(), _as_real(masked=False), _MODE, _Answers():
                tail_without_data(self._model, run)
        except NotSplit:
            return False
        return True

    def _passed(self, lengths: tuple[int, int], *, dropout: bool, experts: bool = False) -> Passed:
        passed = Passed(lengths)
        for width in (HALF, FULL):
            _make_fake(self._model, width)
            if experts:
                for _, parameter in _expert_tensors(self._model):
                    parameter.requires_grad_(True)
            for masked in (False, True):
                # What a mask adds to what passes is little beside T × T of what passes without one.
                followed = not masked and not experts
                passed.shown[width, masked] = [
                    self._pass(at, masked=masked, dropout=dropout, followed=followed) for at in lengths
                ]
        return passed

    def _suitable_lengths(self) -> tuple[int, int]:
        """Choose the lengths by whether more tensors are kept of more tokens, and not only larger ones."""
        _make_fake(self._model, FULL)
        short, long = (
            sum(len(seen.storages) for seen in self._pass(length, masked=False, dropout=True, followed=False).values())
            for length in _SHORT_LENGTHS
        )
        if long - short > _SHORT_LENGTHS[0] // 2:
            return _SHORT_LENGTHS
        chunk = max((chunk_of(layer.module) for layer in self._layers if layer.first), default=1)
        length = -(-_LENGTH // chunk) * chunk if chunk <= _LONGEST_CHUNK else _LENGTH
        return length, 2 * length

    def _pass(self, length: int, *, masked: bool, dropout: bool, followed: bool) -> Shown:
        """Pass through it once.

        Args:
            length: Tokens a row.
            masked: Whether a mask is passed.
            dropout: Whether attention drops weights.
            followed: Whether to go back as well, and to note what is held after each operator.
        """
        watch = _Watch(self._model, self._layers, int(self._text.vocab_size))
        with (
            watch.watching(followed=followed),
            _as_real(masked=masked),
            nullcontext() if dropout else _WithoutDropout(),
        ):
            logits = self._forward(length, masked=masked)
            if followed:
                _backward(logits)
        return watch.shown

    def _forward(self, length: int, *, masked: bool) -> torch.Tensor:
        with _MODE, _Answers(), _EvenShares():
            arguments: dict[str, Any] = {"use_cache": False}
            if masked:
                arguments["attention_mask"] = torch.ones((ROWS, length), dtype=torch.long)
            logits: torch.Tensor = self._model(
                input_ids=torch.zeros((ROWS, length), dtype=torch.long), **arguments
            ).logits
        return logits


def _backward(logits: torch.Tensor) -> None:
    with _MODE, _Answers():
        logits.float().sum().backward()


def _make_fake(model: nn.Module, compute: torch.dtype) -> None:
    """Put fake tensors of a compute type in place of a model's tensors; ties stay."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            if id(parameter) not in made:
                kind = compute if parameter.dtype in (HALF, FULL) else parameter.dtype
                with _MODE:
                    empty = torch.empty(parameter.shape, dtype=kind, device="cpu")
                made[id(parameter)] = nn.Parameter(empty, requires_grad=False)
            module._parameters[name] = made[id(parameter)]
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                with _MODE:
                    module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")


def _expert_tensors(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the tensors of stacked experts by their paths."""
    for _, stacked in stacked_experts(model):
        yield stacked.path, model.get_parameter(stacked.path)


class _Watch:
    """Notes what a forward pass keeps, and by which layer."""

    def __init__(self, model: nn.Module, layers: list[Layer], vocab: int) -> None:
        self._model, self._layers, self._vocab = model, layers, vocab
        self._live = LiveStorages()
        self._owned = {self._live.number(tensor) for tensor in (*model.parameters(), *model.buffers())}
        self._shared: set[int] = set()  # what layers are given beside their input: one for all of them
        self._within: list[int | None] = [None]
        self._outputs: dict[int, Any] = {}
        self._begun: dict[int, tuple[int, int]] = {}  # operators before a layer's pass, and bytes held then
        self.shown: Shown = {None: Seen()}

    @contextmanager
    def watching(self, *, followed: bool = False) -> Iterator[None]:
        """Watch what is computed within; note what is held after each operator where it is `followed`."""
        embedding = self._model.get_input_embeddings()  # type: ignore[operator]
        # A copy, which keeps nothing: some classes scale what the embedding returns in place.
        handles = [embedding.register_forward_hook(lambda _m, _i, output: output.requires_grad_(True).clone())]
        standing_in = []
        for layer in self._layers:
            if layer.first:
                handles.append(layer.module.register_forward_pre_hook(self._entering(layer.kind), with_kwargs=True))
                handles.append(layer.module.register_forward_hook(self._leaving(layer.kind)))
            else:
                standing_in.append(layer.module)
                layer.module.forward = self._handing_on(layer)  # type: ignore[method-assign]
        handles += [
            module.register_forward_pre_hook(self._reading(path)) for path, module in linear_modules(self._model)
        ]
        try:
            live = self._live if followed else nullcontext()
            with live, torch.autograd.graph.saved_tensors_hooks(self._note, lambda tensor: tensor):
                yield
        finally:
            for handle in handles:
                handle.remove()
            for module in standing_in:
                del module.forward
            self._outputs.clear()

    def _entering(self, kind: int) -> Callable[..., None]:
        def enter(_module: Any, arguments: Any, named: Any) -> None:
            self._within.append(kind)
            hidden = arguments[0] if arguments else named.get("hidden_states")
            seen = self.shown.setdefault(kind, Seen())
            seen.inputs = hidden.numel() if isinstance(hidden, torch.Tensor) else 0
            others = [value for value in tree_leaves((arguments, named)) if isinstance(value, torch.Tensor)]
            self._shared |= {self._live.number(value) for value in others if value is not hidden}
            self._begun[kind] = (
                len(self._live.moments),
                self._live.held - (hidden.nbytes if isinstance(hidden, torch.Tensor) else 0),
            )
            if isinstance(hidden, torch.Tensor) and hidden.requires_grad:
                hidden.register_hook(lambda _gradient: self._went_back(kind))

        return enter

    def _leaving(self, kind: int) -> Callable[..., None]:
        def leave(_module: Any, _arguments: Any, output: Any) -> None:
            self._outputs[kind] = output
            self._within.pop()
            self.shown[kind].forward = self._since(kind)
            hidden = output[0] if type(output) in (tuple, list) else output
            if isinstance(hidden, torch.Tensor) and hidden.requires_grad:
                hidden.register_hook(lambda gradient: self._goes_back(kind, gradient))

        return leave

    def _goes_back(self, kind: int, gradient: torch.Tensor) -> None:
        self._begun[kind] = len(self._live.moments), self._live.held - gradient.nbytes

    def _went_back(self, kind: int) -> None:
        self.shown[kind].backward = self._since(kind)

    def _since(self, kind: int) -> list[int]:
        """Return the bytes held after each operator since a layer's pass began, without what was held before."""
        operators, held = self._begun[kind]
        return [moment - held for moment in self._live.moments[operators:]]

    def _handing_on(self, layer: Layer) -> Callable[..., Any]:
        """Return what stands in for a layer like one that has computed: it hands its input on in the same form."""
        forward = layer.module.forward

        def hand_on(*arguments: Any, **named: Any) -> Any:
            if layer.kind not in self._outputs:  # the first of its kind was not passed
                return forward(*arguments, **named)
            output = self._outputs[layer.kind]
            hidden = arguments[0] if arguments else named["hidden_states"]
            return type(output)([hidden, *output[1:]]) if type(output) in (tuple, list) else hidden

        return hand_on

    def _reading(self, path: str) -> Callable[[Any, Any], None]:
        def read(_module: Any, arguments: Any) -> None:
            if arguments and isinstance(arguments[0], torch.Tensor):
                number = self._live.number(arguments[0])
                self.shown.setdefault(self._within[-1], Seen()).read[path] = number

        return read

    def _note(self, tensor: torch.Tensor) -> torch.Tensor:
        key = self._live.number(tensor)
        if key in self._owned or any(key in seen.storages for seen in self.shown.values()):
            return tensor
        seen = self.shown[None if key in self._shared else self._within[-1]]
        seen.storages.add(key)
        if tensor.dim() and tensor.shape[-1] == self._vocab and tensor.is_floating_point():
            seen.logits += tensor.numel()
        else:
            seen.size += tensor.untyped_storage().nbytes()
        return tensor


@contextmanager
def _as_real(*, masked: bool) -> Iterator[None]:
    """Have transformers do with fake tensors what it would do with real ones.

    It makes a mask of fake tensors every time, of real ones only where one is needed; and torch's grouped product takes
    no fake tensors in fp32. A product with one expert's matrix keeps the same.
    """
    replaced: dict[Any, dict[str, Any]] = {
        moe: {"_grouped_mm": _as_one_expert},
        Distribution: {"_validate_args": False},  # by the values that its parameters would have
    }
    if not masked:
        replaced[masking_utils] = {
            "is_tracing": lambda _tensor=None: False,
            "find_packed_sequence_indices": lambda _positions: None,
        }
    own = {module: {name: getattr(module, name) for name in names} for module, names in replaced.items()}
    _set(replaced)
    try:
        yield
    finally:
        _set(own)


def _as_one_expert(rows: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
    return rows.to(weight.dtype) @ weight[0]


def _set(functions: dict[Any, dict[str, Any]]) -> None:
    for module, names in functions.items():
        for name, function in names.items():
            setattr(module, name, function)


class _Answers(TorchDispatchMode):
    """Answers what a model asks a tensor for its value, which a fake one does not have: no, or one.

    Asked which members of a row are not zero, it says all of them: every expert is chosen by some token. Asked that of
    a table after it, by each of those, it says an even share. What picks members of a row by yes and no picks all.
    """

    def __init__(self) -> None:
        super().__init__()
        self._shares = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call an operator of torch."""
        if func is torch.ops.aten._local_scalar_dense.default:
            kind = args[0].dtype
            return False if kind == torch.bool else 1.0 if kind.is_floating_point else 1
        if func is torch.ops.aten.nonzero.default and (args[0].dim() == 1 or self._shares):
            asked = args[0]
            if asked.dim() == 1:
                self._shares = asked.numel()
            found = asked.numel() if asked.dim() == 1 else -(-asked.numel() // self._shares)
            return asked.new_empty((found, asked.dim()), dtype=torch.long)
        if func is torch.ops.aten.index.Tensor:
            args = (args[0], [_all_of(picked) for picked in args[1]])
        return func(*args, **(kwargs or {}))


def _all_of(picked: torch.Tensor | None) -> torch.Tensor | None:
    if picked is not None and picked.dtype == torch.bool and picked.dim() == 1:
        return picked.new_empty(picked.shape, dtype=torch.long)
    return picked


class _EvenShares(TorchFunctionMode):
    """Splits evenly where the sizes are values that were asked for: `_Answers` said one to each."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function of torch."""
        kwargs = kwargs or {}
        if func is torch.Tensor.split and len(args) > 1 and isinstance(args[1], list) and set(args[1]) == {1}:
            size = args[0].shape[args[2] if len(args) > 2 else kwargs.get("dim", 0)]
            share, over = divmod(size, len(args[1]))
            args = (args[0], [share + (at < over) for at in range(len(args[1]))], *args[2:])
        return func(*args, **kwargs)


class _Changes(TorchDispatchMode):
    """Notes the storages that operators write into."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call an operator of torch."""
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, torch.Tensor):
                self.storages.add(value.untyped_storage()._cdata)
        return func(*args, **(kwargs or {}))


class _WithoutDropout(TorchFunctionMode):
    """Takes dropout out of scaled_dot_product_attention, so that a CPU takes the fused kernel as a GPU would."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function of torch."""
        kwargs = kwargs or {}
        if func is nn.functional.scaled_dot_product_attention and kwargs.get("dropout_p"):
            kwargs = kwargs | {"dropout_p": 0.0}
        return func(*args, **kwargs)
