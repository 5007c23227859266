"""What an adapter that comes from elsewhere may say and hold, checked before anything loads it.

PEFT does what a config tells it: `auto_mapping` and `megatron_core` name modules that it imports, `corda_config` and
its kin name files that it unpickles, patterns are regular expressions that it runs over every layer's name, and some
initialisations change the base that others share. What this service does not need is refused.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from core.errors import AdapterRejected, NoSafeWeights
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
_MODULE = re.compile(r"[A-Za-z0-9_.]{1,256}")
_PATTERN = re.compile(r"\^?[A-Za-z0-9_.]{1,256}")
_LIBRARY = re.compile(r"transformers\.models\.[a-z0-9_]+\.modeling_[a-z0-9_]+")
_CLASS = re.compile(r"[A-Z][A-Za-z0-9]{1,100}")
_TENSOR = re.compile(
    r"base_model\.model\.(?P<module>[A-Za-z0-9_.]{1,256})\."
    r"(?P<part>lora_A\.weight|lora_B\.weight|lora_magnitude_vector(?:\.weight)?)"
)
_FLOATS = frozenset({"F32", "F16", "BF16"})
# What these say is used or told; every other setting must be as if it were not there.
_READ = frozenset({
    "peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "r", "lora_alpha", "lora_dropout",
    "target_modules", "use_rslora", "use_dora", "fan_in_fan_out", "inference_mode", "init_lora_weights", "bias",
    "rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern", "exclude_modules", "megatron_core",
    "qalora_group_size", "peft_version",
})  # fmt: skip
_MAX_RANK = 4096


@dataclass(frozen=True)
class AdapterFacts:
    """What an adapter's config and weights say.

    Attributes:
        config: As it is stored; `rewritten` names the settings that are not as they came.
        parameters: Of all tensors.
    """

    config: dict[str, Any]
    rewritten: tuple[str, ...]
    base_model: str | None
    base_revision: str | None
    algorithm: Algorithm
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


def check_names(where: str, names: Iterable[str]) -> None:
    """Refuse a collection of files with pickles in it, or without an adapter.

    Args:
        where: For the message.
        names: Relative paths with `/`.

    Raises:
        NoSafeWeights: The weights are there as a pickle only.
        AdapterRejected: There are pickles beside them, or no adapter.
    """
    present = set(names)
    pickles = sorted(name for name in present if PurePosixPath(name).suffix.lower() in _PICKLED)
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
            raise AdapterRejected(f"{where} has no {name}: it is not an adapter as PEFT saves it.")


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
    problems = [*_code_problems(config), *_setting_problems(config)]
    if problems:
        raise AdapterRejected(f"{where}: {'; '.join(problems)}.")
    modules = _modules(where, config, header)
    stored, rewritten = _as_served(config, modules)
    return AdapterFacts(
        config=stored,
        rewritten=rewritten,
        base_model=config.get("base_model_name_or_path"),
        base_revision=config.get("revision"),
        algorithm=_algorithm(config),
        parameters=header.parameters,
    )


def _algorithm(config: Mapping[str, Any]) -> Algorithm:
    if config.get("use_dora"):
        return Algorithm.DORA
    return Algorithm.RSLORA if config.get("use_rslora") else Algorithm.LORA


def _code_problems(config: Mapping[str, Any]) -> Iterable[str]:
    """Name the settings that would have code imported, unpickled or run."""
    mapping = config.get("auto_mapping")
    if mapping is not None:
        known = isinstance(mapping, dict) and mapping.keys() <= {"base_model_class", "parent_library"}
        names = [mapping.get("parent_library"), mapping.get("base_model_class")] if known else []
        plain = all(isinstance(name, str) for name in names) and known
        if not plain or not _LIBRARY.fullmatch(names[0] or "") or not _CLASS.fullmatch(names[1] or ""):
            yield f"auto_mapping names {str(mapping)[:100]}, which is no model of transformers: it would be imported"
    if config.get("megatron_core", "megatron.core") not in (None, "megatron.core"):
        yield "megatron_core names a module to import"
    for name in sorted(config.keys() - _READ):
        value = config[name]
        if value not in (None, False, "") and value != {} and value != []:
            yield f"{name[:60]} is set, which this service does not serve"


def _setting_problems(config: Mapping[str, Any]) -> Iterable[str]:
    if config.get("peft_type") != "LORA":
        yield f"peft_type is {str(config.get('peft_type'))[:40]!r}; LoRA and its kin are served"
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        yield f"task_type is {str(config['task_type'])[:40]!r}, not CAUSAL_LM"
    yield from _range_problems(config)
    if config.get("bias", "none") != "none":
        yield "bias is trained, which this service does not serve"
    for name in ("use_rslora", "use_dora", "fan_in_fan_out", "inference_mode"):
        if config.get(name, False) not in (True, False, None):
            yield f"{name} is neither true nor false"
    if config.get("init_lora_weights", True) not in (True, False, None, "gaussian", "orthogonal"):
        yield (
            f"init_lora_weights is {str(config['init_lora_weights'])[:40]!r}: loading it would change the base, which "
            "other adapters share; convert it to plain LoRA first"
        )
    yield from _pattern_problems(config)
    for name in ("base_model_name_or_path", "revision"):
        if not isinstance(config.get(name), str | None):
            yield f"{name} is not text"


def _range_problems(config: Mapping[str, Any]) -> Iterable[str]:
    for name, low, high in (("r", 1, _MAX_RANK), ("lora_alpha", 0, 10**6), ("lora_dropout", 0, 1)):
        value = config.get(name, 0 if name == "lora_dropout" else None)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            yield f"{name} is not a number from {low} to {high}"


def _pattern_problems(config: Mapping[str, Any]) -> Iterable[str]:
    for name in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(name) or {}
        if not isinstance(pattern, dict) or not all(
            _PATTERN.fullmatch(key) and type(value) is int and 0 < value <= 10**6 for key, value in pattern.items()
        ):
            yield f"{name} is not a map from names of layers to numbers"


def _modules(where: str, config: Mapping[str, Any], header: SafetensorsHeader) -> list[str]:
    """Return the layers that the tensors belong to, once each has its A and B of one rank."""
    parts: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in header.shapes.items():
        matched = _TENSOR.fullmatch(name)
        if matched is None:
            raise AdapterRejected(
                f"{where}: {WEIGHTS} holds {name[:120]!r}, which is neither A, B nor a magnitude of a linear layer."
            )
        parts.setdefault(matched["module"], {})[matched["part"].split(".")[0]] = shape
    if not parts or header.parameters_by_dtype.keys() - _FLOATS:
        raise AdapterRejected(f"{where}: {WEIGHTS} holds {dict(header.parameters_by_dtype)}; floats are expected.")
    wanted = {"lora_A", "lora_B"} | ({"lora_magnitude_vector"} if config.get("use_dora") else set())
    for module, shapes in parts.items():
        a, b = shapes.get("lora_A", ()), shapes.get("lora_B", ())
        if shapes.keys() != wanted or len(a) != 2 or len(b) != 2 or a[0] != b[1] or not 1 <= a[0] <= _MAX_RANK:
            raise AdapterRejected(f"{where}: the tensors of {module} do not belong together.")
    return sorted(parts)


def _as_served(config: dict[str, Any], modules: list[str]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the config with nothing in it that PEFT would run as an expression, or fill with weights of its own.

    Layers that the config names and the weights lack would get fresh ones; those are zero, and so without effect, with
    the default initialisation alone.
    """
    changed: dict[str, Any] = {}
    if config.get("init_lora_weights", True) is not True:
        changed["init_lora_weights"] = True
    patterns = [name for name in ("layers_to_transform", "layers_pattern", "exclude_modules") if config.get(name)]
    if patterns or not _names_plainly(config.get("target_modules"), modules):
        changed |= {"target_modules": modules} | dict.fromkeys(patterns)
    return config | changed, tuple(sorted(changed))


def _names_plainly(targets: Any, modules: list[str]) -> bool:
    """Tell whether target_modules are names, each of a layer that there are weights for."""
    if targets == "all-linear":
        return True
    return isinstance(targets, list) and all(
        isinstance(name, str)
        and _MODULE.fullmatch(name)
        and any(module == name or module.endswith(f".{name}") for module in modules)
        for name in targets
    )
