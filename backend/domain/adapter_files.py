"""What an adapter that comes from elsewhere may hold, checked before anything loads it.

What its config may say is in `domain.adapter_config`.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from core.errors import AdapterRejected, NoSafeWeights
from domain.adapter_config import (
    MAX_RANK,
    PEFT_RANK,
    TARGETING,
    ConfigReading,
    around_parameters,
    read_settings,
    serve_layers,
)
from domain.hub.tree import RepoFile, Selection
from domain.models.config_checks import check_asks_for_no_code
from domain.models.load_files import is_named_template, vocabulary_files
from domain.models.safetensors_header import SafetensorsHeader
from domain.peft.algorithms import Algorithm

WEIGHTS, CONFIG, CARD = "adapter_model.safetensors", "adapter_config.json", "training.json"
ORIGINALS = "originals-"  # begins the names of folders with a base's own weights, beside the adapter in the making
# Formats of vocabularies that hold data alone.
_VOCABULARY_NAME = re.compile(r"\.(json|txt|spm|tiktoken|codes|model(\.v\d+)?)$")
# Of a tokenizer, beside its vocabulary and its named chat templates.
_TOKENIZER_FILES = frozenset(
    {"tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt", "chat_template.jinja"}
)
_KEPT_FILES = frozenset({CONFIG, WEIGHTS, CARD, "README.md", "manifest.json"})
# Formats whose readers run what a file tells them to, or may (pickle and its wrappers).
_PICKLED = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".dill", ".npy", ".npz"})
_PREFIX = "base_model.model."
_NAMED = re.compile(r"\.lora_[AB]\.\w+\.weight$")  # as in the model itself
_TENSOR = re.compile(
    r"base_model\.model\.(?P<module>[A-Za-z0-9_.]{1,256})\."
    r"(?P<part>lora_A\.weight|lora_B\.weight|lora_magnitude_vector(?:\.weight)?)"
)
# What macOS and Windows leave beside people's files; Finder's zips hold the first and, for each file, one of "._".
_LITTER_FOLDER = "__MACOSX"
_LITTER = frozenset({".DS_Store", "Icon\r", "Thumbs.db", "desktop.ini"})
_FLOATS = frozenset({"F32", "F16", "BF16"})


@dataclass(frozen=True)
class AdapterFacts:
    """What an adapter's config and weights say.

    Attributes:
        config: As it is stored; `rewritten` names the settings that are not as they came.
        warnings: A sentence for each thing that was left out.
        targeting: The settings that name layers, as they came.
        layers: Input and output features of each linear layer that there are weights for.
        on_parameters: Whether there are weights for parameters as well, of stacked experts for example.
        parameters: Of all tensors.
    """

    config: dict[str, Any]
    rewritten: tuple[str, ...]
    warnings: tuple[str, ...]
    base_model: str | None
    base_revision: str | None
    algorithm: Algorithm
    targeting: dict[str, Any]
    layers: dict[str, tuple[int, int]]
    on_parameters: bool
    parameters: int


def tokenizer_files(names: Iterable[str]) -> list[str]:
    """Choose the files of a tokenizer: vocabulary, settings, chat templates.

    Args:
        names: Relative paths with `/`.
    """
    present = list(names)
    vocabulary = {name for name in vocabulary_files(present) if _VOCABULARY_NAME.search(name)}
    return sorted(name for name in present if name in vocabulary | _TOKENIZER_FILES or is_named_template(name))


def kept_files(names: Iterable[str]) -> list[str]:
    """Choose what is kept of an adapter that comes, the small before the weights; the rest is neither read nor copied.

    Args:
        names: Relative paths with `/`.
    """
    present = set(names)
    kept = {*tokenizer_files(present), *(present & _KEPT_FILES)}
    return sorted(kept, key=lambda name: (name == WEIGHTS, name))


def is_litter(name: str) -> bool:
    """Tell whether a file is one that an operating system leaves beside people's files.

    Args:
        name: A relative path with `/`.
    """
    path = PurePosixPath(name)
    return _LITTER_FOLDER in path.parts or path.name in _LITTER or path.name.startswith("._")


def adapter_folder(where: str, names: Iterable[str]) -> str:
    """Find the folder with the adapter: the top, or the only one with an adapter_config.json.

    Args:
        where: For the message.
        names: Relative paths with `/`.

    Returns:
        The folder with a `/` at its end; nothing for the top. If no folder has an adapter: the one in which all files
        lie.

    Raises:
        AdapterRejected: There are several.
    """
    present = set(names)
    found = sorted(
        (name.removesuffix(CONFIG) for name in present if name.rpartition("/")[2] == CONFIG),
        key=lambda folder: (folder.count("/"), folder),
    )
    # A run's checkpoints lie in the folder of the adapter that it ended with.
    outer = [folder for at, folder in enumerate(found) if not any(folder.startswith(other) for other in found[:at])]
    if len(outer) > 1:
        named = ", ".join(folder.rstrip("/")[:100] for folder in outer[:10])
        raise AdapterRejected(
            f"{where} holds {len(outer)} adapters, in the folders {named}; send one of them on its own."
        )
    if outer:
        return outer[0]
    tops = {name.partition("/")[0] for name in present if "/" in name}
    return f"{tops.pop()}/" if len(tops) == 1 and all("/" in name for name in present) else ""


def check_names(where: str, names: Iterable[str], beside: Iterable[str] = ()) -> None:
    """Refuse a collection of files with pickles in it, or without an adapter.

    Args:
        where: For the message.
        names: Relative paths with `/`.
        beside: The files that lie outside of the adapter's folder.

    Raises:
        NoSafeWeights: The weights are there as a pickle only.
        AdapterRejected: There are pickles beside them, or no adapter.
    """
    present = set(names)
    pickles = sorted(name for name in {*present, *beside} if PurePosixPath(name).suffix.lower() in _PICKLED)
    if WEIGHTS not in present and "adapter_model.bin" in present:
        raise NoSafeWeights(
            f"{where} has its weights in adapter_model.bin only, which can run code and is not read. Convert it to "
            "adapter_model.safetensors."
        )
    if pickles:
        raise AdapterRejected(
            f"{where} holds files that can run code when they are read: {', '.join(pickles[:5])}. None was read; "
            "an adapter needs none of them: leave them out."
        )
    for name in (CONFIG, WEIGHTS):
        if name not in present:
            raise AdapterRejected(f"{where} has no {name}: it is not an adapter as PEFT saves it.{_hint(present)}")


def _hint(present: set[str]) -> str:
    """Say what to do with what is there in place of an adapter of PEFT's."""
    if present & {"adapters.safetensors", "adapters.npz"}:
        return " The weights are as mlx-lm saves them: convert them to PEFT's names and orientation first."
    return ""


def choose_adapter(model_id: str, files: Iterable[RepoFile]) -> Selection:
    """Choose what an import reads of a repository; pickles that lie beside it are not fetched.

    Raises:
        NoSafeWeights, AdapterRejected: There is no adapter that could be read.
    """
    known = {file.path: file for file in files}
    kept = kept_files(known)
    check_names(model_id, kept if WEIGHTS in known else {*kept, *(known.keys() & {"adapter_model.bin"})})
    small = tuple(known[name] for name in kept if name != WEIGHTS)
    return Selection(small, (known[WEIGHTS],))


def read_facts(where: str, config: Any, header: SafetensorsHeader) -> AdapterFacts:
    """Check an adapter's config and the header of its weights.

    Args:
        where: For messages.
        config: adapter_config.json, parsed.
        header: Of adapter_model.safetensors.

    Raises:
        AdapterRejected: It says something that this service does not do, or the two do not belong together.
        NeedsRemoteCode: It asks for code from elsewhere.
    """
    if not isinstance(config, dict):
        raise AdapterRejected(f"{where}: {CONFIG} is not a JSON object.")
    check_asks_for_no_code(where, CONFIG, config)
    reading = read_settings(config)
    _refuse(where, reading.problems)
    found = _layers(where, reading.config, header)
    layers = {module: shapes for module, shapes in found.items() if not around_parameters(reading.config, module)}
    _check_stacks(reading, {module: a[0] for module, (a, _) in found.items() if module not in layers})
    serve_layers(reading, {module: a[0] for module, (a, _) in layers.items()})
    _refuse(where, reading.problems)
    return AdapterFacts(
        config=reading.config,
        rewritten=tuple(sorted(reading.rewritten)),
        warnings=tuple(reading.warnings),
        base_model=config.get("base_model_name_or_path"),
        base_revision=config.get("revision"),
        algorithm=_algorithm(config),
        targeting={name: config.get(name) for name in TARGETING},
        layers={module: (a[1], b[0]) for module, (a, b) in layers.items()},
        on_parameters=len(layers) < len(found),
        parameters=header.parameters,
    )


def _check_stacks(reading: ConfigReading, ranks: Mapping[str, int]) -> None:
    """Check the layers around parameters: each has A and B of the rank for each expert, all of them in one tensor."""
    rank = reading.config.get("r", PEFT_RANK)
    wrong = [module for module, rows in ranks.items() if rows % rank]
    if wrong:
        reading.problems.append(f"the settings give the rank {rank}, and {wrong[0]} has {ranks[wrong[0]]} rows of A")
    if reading.config.get("target_parameters") and not ranks:
        reading.problems.append("target_parameters is set, and there are no weights for what it names")


def _refuse(where: str, problems: list[str]) -> None:
    if problems:
        raise AdapterRejected(f"{where}: {'; '.join(problems)}.")


def _algorithm(config: Mapping[str, Any]) -> Algorithm:
    if config.get("use_dora"):
        return Algorithm.DORA
    return Algorithm.RSLORA if config.get("use_rslora") else Algorithm.LORA


def _layers(
    where: str, config: Mapping[str, Any], header: SafetensorsHeader
) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return the shapes of A and B of each layer that the tensors belong to, once it has both, of one rank."""
    parts: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in header.shapes.items():
        matched = _TENSOR.fullmatch(name)
        if matched is None:
            raise AdapterRejected(f"{where}: {WEIGHTS} holds {name[:120]!r}, {_misnamed(name)}.")
        parts.setdefault(matched["module"], {})[matched["part"].split(".")[0]] = shape
    if not parts or header.parameters_by_dtype.keys() - _FLOATS:
        raise AdapterRejected(f"{where}: {WEIGHTS} holds {dict(header.parameters_by_dtype)}; floats are expected.")
    wanted = {"lora_A", "lora_B"} | ({"lora_magnitude_vector"} if config.get("use_dora") else set())
    for module, shapes in parts.items():
        a, b = shapes.get("lora_A", ()), shapes.get("lora_B", ())
        if (
            shapes.keys() != wanted
            or len(a) != 2
            or len(b) != 2
            or a[0] != b[1]
            or not _may_be_rank(config, module, a[0])
        ):
            raise AdapterRejected(f"{where}: the tensors of {module} do not belong together.")
    return {module: (parts[module]["lora_A"], parts[module]["lora_B"]) for module in sorted(parts)}


def _may_be_rank(config: Mapping[str, Any], module: str, rows: int) -> bool:
    return rows >= 1 and (rows <= MAX_RANK or around_parameters(config, module))


def _misnamed(name: str) -> str:
    """Say what is wrong with a tensor's name."""
    if not name.startswith(_PREFIX):
        return f"and the names of an adapter that PEFT saved begin with {_PREFIX}"
    if _NAMED.search(name):
        return "which holds the adapter's name; PEFT saves an adapter without it"
    return "which is neither A, B nor a magnitude of a linear layer"
