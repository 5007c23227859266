"""The `merge` command: base and adapter become one ordinary model that does not need PEFT."""

import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import save_file

from core.errors import StorageFull
from core.files import whole_folder
from core.manifest import write_manifest
from domain.exports import MergedModel
from domain.protocol import Merge, Progress
from engine.base import Base
from engine.channel import Channel
from engine.errors import BadModel, BadSetting
from engine.merged_weights import MergedWeights, adapter_attached
from engine.model_class import read_config
from engine.served_tokenizer import ServedTokenizer
from engine.turn_ends import TurnEnds

# A shard is in memory as a whole while it is written. safetensors lets no other thread run meanwhile, not even the
# heartbeat's.
_SHARD_BYTES = 2**30
_RESERVE_BYTES = 64 * 2**20  # for the database and logs, which may be on the same device


def merge(base: Base, command: Merge, channel: Channel) -> MergedModel:
    """Write the merged model.

    Raises:
        BadSetting: The adapter does not belong to this base, or is not finite in the base's type.
        StorageFull: There is no room; nothing was written.
        Stopped: The client ended it; the folder is deleted.
    """
    output = Path(command.output_path)
    output.parent.mkdir(parents=True, exist_ok=True)
    with adapter_attached(base, command.adapter_id, Path(command.adapter_path)):
        merged = MergedWeights(base, command.adapter_id)
        require_space(output.parent, merged.total_bytes)
        with whole_folder(output) as folder:
            served = base.tokenizers.written(Path(command.adapter_path), folder)
            require_embeddings(served, base.embeddings, base.tokenizer)
            result = MergedModel(
                size_bytes=merged.total_bytes,
                dtype=str(merged.dtype).removeprefix("torch."),
                adapted_layers=merged.adapted_layers,
                notes=[*_notes(merged), *template_notes(base, served)],
            )
            _write_weights(merged, folder, command.request_id, channel)
            _write_configs(merged, base.path, folder, served.ends)
            about = command.about.model_dump() | result.as_json() | {"packages": merging_packages()}
            (folder / "export.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
            (folder / "README.md").write_text(_card(command, merged), encoding="utf-8")
            channel.emit(Progress(request_id=command.request_id, stage="computing sums", fraction=None))
            write_manifest(folder, about)
    return result


def _notes(merged: MergedWeights) -> list[str]:
    written = str(merged.dtype).removeprefix("torch.")
    how = f"Base and adapter were added in fp32 and rounded to {written}, the type of the base's own files."
    return [*merged.notes, how] if merged.dtype.itemsize < 4 else merged.notes


def require_space(folder: Path, needed_bytes: int) -> None:
    """Refuse to begin if the device cannot hold the result.

    Raises:
        StorageFull: It says what is needed and what is free.
    """
    free = shutil.disk_usage(folder).free
    if free < needed_bytes + _RESERVE_BYTES:
        raise StorageFull(
            f"The export takes {needed_bytes} bytes in {folder}, whose device has {free} free "
            f"({_RESERVE_BYTES} are kept free)."
        )


def require_embeddings(served: ServedTokenizer, embeddings: int, own: Any = None) -> None:
    """Refuse a tokenizer that has tokens for which the model has no embeddings, beside those of the base's own.

    Args:
        served: The tokenizer of the export.
        embeddings: The number of embeddings that the model has.
        own: The base's tokenizer, where its tokens may go beyond as well: some classes add one that the model lacks.

    Raises:
        BadSetting: At such a token the model would fail or read something else.
    """
    last = max(served.tokenizer.get_vocab().values(), default=-1)
    most = embeddings - 1 if own is None else max(embeddings - 1, *own.get_vocab().values())
    if last > most:
        raise BadSetting(
            f"the adapter's tokenizer has a token {last}, and the model {embeddings} embeddings: it has grown, and "
            "there are no weights for what it has grown by"
        )


def template_notes(base: Base, served: ServedTokenizer) -> list[str]:
    """Return notes for the user on an export's chat template: whose it is, and which ends of turns are left to say."""
    notes = []
    if served.tokenizer.chat_template != base.tokenizer.chat_template:
        notes.append("The chat template is the adapter's own, not the base's.")
    if served.ends.texts:
        notes.append(
            f"Turns end in the text {served.ends.texts[0].strip()!r}, which is no single token: name it as a stop text "
            "wherever the model is served."
        )
    return notes


def merging_packages() -> dict[str, str]:
    """Return the versions of the packages that computed the merge."""
    return {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes", "gguf")}


def _write_weights(merged: MergedWeights, folder: Path, request_id: str, channel: Channel) -> None:
    groups = {group[0]: group for group in merged.groups}
    plan = split_state_dict_into_shards_factory(
        groups,
        get_storage_size=lambda group: sum(merged.tensors[name].size_bytes for name in group),
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=_SHARD_BYTES,
    )
    done = 0
    weight_map: dict[str, str] = {}
    for filename, firsts in plan.filename_to_tensors.items():
        shard: dict[str, torch.Tensor] = {}
        for name in (name for first in firsts for name in groups[first]):
            channel.check_stop(request_id)
            shard[name] = merged.compute(name)
            done += merged.tensors[name].size_bytes
            channel.emit(Progress(request_id=request_id, stage="merging", fraction=done / merged.total_bytes))
        # By the name that the tensor has in files of this architecture. In memory transformers may name it differently.
        shard = merged.stored_names.revert(shard)
        save_file(shard, folder / filename, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, filename)
    if plan.is_sharded:
        index = {"metadata": {"total_size": merged.total_bytes}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_configs(merged: MergedWeights, source: Path, folder: Path, ends: TurnEnds) -> None:
    """Copy the base's configs, so that what reads the base reads the merged model. Only outdated entries change."""
    said = merged.model.generation_config.eos_token_id
    new_ends = set(ends.ids) != set(said if isinstance(said, list) else [said])
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config.pop("quantization_config", None)
    for key in {"dtype", "torch_dtype"} & config.keys():
        config[key] = str(merged.dtype).removeprefix("torch.")
    if merged.untied:
        config["tie_word_embeddings"] = False
    if new_ends and "eos_token_id" in config:
        with_ends = config | {"eos_token_id": list(ends.ids)}
        if _is_taken(with_ends):
            config = with_ends
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    generation = source / "generation_config.json"
    if new_ends:
        settings = json.loads(generation.read_text(encoding="utf-8")) if generation.is_file() else {}
        settings.pop("_from_model_config", None)  # they are its own from here on
        content = json.dumps(settings | {"eos_token_id": list(ends.ids)}, indent=2) + "\n"
        (folder / "generation_config.json").write_text(content, encoding="utf-8")
    elif generation.is_file():
        shutil.copyfile(generation, folder / "generation_config.json")


def _is_taken(config: dict[str, Any]) -> bool:
    """Tell whether the family's class takes a config.json. Some take no list of ends; generation_config.json does."""
    try:
        read_config(config)
    except BadModel:
        return False
    return True


def _card(command: Merge, merged: MergedWeights) -> str:
    notes = "".join(f"- {note}\n" for note in _notes(merged))
    return (
        f"---\nbase_model: {command.base_model_id}\nlibrary_name: transformers\ntags:\n- peft-studio\n- merged\n---\n\n"
        f"# {command.base_model_id}, fine-tuned and merged\n\n"
        f"{command.base_model_id} with the adapter {command.adapter_id} in its weights "
        f"({merged.adapted_layers} layers). It loads like any model; PEFT is not needed.\n\n{notes}"
        "\n`export.json` says what it was made from and by which versions; `manifest.json` has each file's sha256.\n"
    )
