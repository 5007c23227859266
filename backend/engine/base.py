"""The base model an engine holds, and the adapters on it."""

import json
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import psutil
import torch
from huggingface_hub.errors import StrictDataclassError
from peft import PeftModel, PeftModelForCausalLM
from safetensors import SafetensorError

from domain.peft.config import PeftConfig
from engine import methods
from engine.attach import attach_by_peft, attach_plain, detach_plain
from engine.backend import backend_of
from engine.dora import use_blocks
from engine.errors import BadModel, BadSetting
from engine.heap import passing
from engine.served_tokenizer import ServedTokenizer, ServedTokenizers, complete_tokenizer


class Base:
    """One base model at one precision, with any number of adapters by name.

    Raises:
        BadModel: The files are missing, broken, or need code of their own.
        BadSetting: A target module is not in the model.
    """

    def __init__(self, path: Path, config: PeftConfig, device: str, engine: str) -> None:
        started = time.monotonic()
        use_blocks()
        self.engine, self.backend = engine, backend_of(engine)
        try:
            with passing():
                self.model, self.tokenizer = self.backend.load(path, config, device)
        except (OSError, ValueError, KeyError, json.JSONDecodeError, StrictDataclassError) as error:
            raise BadModel(f"{path.name} cannot be loaded: {error}") from error
        self.path, self.loaded_with = path, config
        self.device = torch.device(device)
        self.model.requires_grad_(False)
        self.model.eval()
        complete_tokenizer(self.tokenizer)
        self.tokenizers = ServedTokenizers(self.tokenizer, self.model.generation_config.eos_token_id)
        self._folders: dict[str, Path] = {}  # of the adapters that came from files
        self.total_parameters = logical_parameters(self.model)
        self.trainable_parameters = methods.trainable_parameters(self.model, config)
        self.load_s = time.monotonic() - started

    @property
    def adapters(self) -> list[str]:
        """Names of the adapters on the base."""
        return list(self.model.peft_config) if isinstance(self.model, PeftModel) else []

    @property
    def trained(self) -> dict[str, torch.nn.Parameter]:
        """The parameters that are trained, by name, without the active adapter's own name in it."""
        own = f".{self.model.active_adapter}."
        return {name.replace(own, "."): p for name, p in self.model.named_parameters() if p.requires_grad}

    def attach(self, name: str, path: Path) -> None:
        """Load an adapter's folder onto the base.

        Raises:
            BadSetting: The adapter does not belong to this base, which stays as it was.
        """
        if name in self.adapters:
            return
        try:
            plain = attach_plain(self.model, name, path)
            self.model = plain if plain is not None else attach_by_peft(self.model, name, path, str(self.device))
        except (ValueError, RuntimeError, OSError, SafetensorError) as error:
            raise BadSetting(f"the adapter does not fit this base: {error}") from error
        if plain is None:
            self.model.eval()
        self._folders[name] = path

    def create(self, name: str, config: Any) -> None:
        """Add a new adapter with fresh weights and make it the trainable one.

        Raises:
            BadSetting: PEFT cannot put it beside the adapters that are on the base.
        """
        if isinstance(self.model, PeftModel):
            try:
                self.model.add_adapter(name, config)
            except ValueError as error:
                raise BadSetting(
                    f"the adapter cannot stand beside those that are on the base: {error}",
                    ["unload the model, or take the other adapters off it"],
                ) from error
        else:
            # Not get_peft_model: it would write the local folder over the base's id in the adapter's config.
            self.model = PeftModelForCausalLM(self.model, config, adapter_name=name)
        self.model.set_adapter(name)

    def detach(self, name: str) -> None:
        """Take an adapter off. Without its last adapter the base is the plain model again."""
        if name not in self.adapters:
            return
        self.tokenizers.forget(self._folders.pop(name, None))
        others = [other for other in self.adapters if other != name]
        if others:
            if name in self.model.active_adapters:
                self.model.set_adapter(others[0], inference_mode=True)  # PEFT would warn that it chooses one
            if detach_plain(self.model, name):
                return  # it left nothing trainable
            self.model.delete_adapter(name)
        else:
            self.model = self.model.unload()
        self.model.requires_grad_(False)

    def using(self, name: str | None) -> AbstractContextManager[Any]:
        """Compute with one adapter, or with the bare base for None.

        Raises:
            BadSetting: No adapter of that name is on the base.
        """
        if name is None:
            return self.model.disable_adapter() if isinstance(self.model, PeftModel) else nullcontext()
        if name not in self.adapters:
            raise BadSetting(f"the adapter {name} is not on this base")
        self.model.set_adapter(name, inference_mode=True)
        return nullcontext()

    def served(self, name: str | None) -> ServedTokenizer:
        """Return the tokenizer that an adapter is used with; for None that of the bare base.

        Raises:
            BadSetting: No adapter of that name came onto the base from files, or its own tokenizer cannot be used.
        """
        if name is None:
            return self.tokenizers.of_base
        if name not in self._folders:
            raise BadSetting(f"the adapter {name} is not on this base")
        return self.tokenizers.of_adapter(self._folders[name])

    @property
    def embeddings(self) -> int:
        """How many tokens the model has embeddings for."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    def memory_bytes(self) -> int:
        """Memory in use: what torch's CUDA allocator has reserved, or without a GPU what the process has resident."""
        if self.device.type == "cuda":
            return int(torch.cuda.memory_reserved(self.device))
        return int(psutil.Process().memory_info().rss)


def logical_parameters(model: Any) -> int:
    """Count a model's parameters. A 4-bit tensor has two in each of its elements."""
    count = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        count += int(state.shape.numel()) if state is not None else parameter.numel()
    return count
