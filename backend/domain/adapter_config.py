"""What the adapter_config.json of an adapter from elsewhere may say.

PEFT does what a config tells it: `auto_mapping` and `megatron_core` name modules that it imports, `corda_config` and
its kin name files that it unpickles, patterns are regular expressions that it runs over every layer's name, and some
initialisations change the base that others share. What changes the result and is not served here is refused; what PEFT
does not read, or reads for training alone, is left out and named in a warning.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from domain.peft.layer_names import ExpressionRejected, Matcher, means

MAX_RANK = 4096
_MAX_ALPHA = 10**6
PEFT_RANK = PEFT_ALPHA = 8  # what PEFT takes where a config does not say
PEFT_VERSION = (0, 21)  # whose settings these are
# What these say is used or told.
READ = frozenset({
    "peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "r", "lora_alpha", "lora_dropout",
    "target_modules", "use_rslora", "use_dora", "fan_in_fan_out", "inference_mode", "init_lora_weights", "bias",
    "rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern", "exclude_modules", "megatron_core",
    "qalora_group_size", "peft_version", "target_parameters",
})  # fmt: skip
# These say which layers are adapted.
TARGETING = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
# These change what an adapter computes, or have files read: they must be as if they were not there.
CHANGING = frozenset({
    "alora_invocation_tokens", "arrow_config", "corda_config", "kasa_config", "layer_replication", "lora_bias",
    "lora_ga_config", "megatron_config", "modules_to_save", "monteclora_config",
    "trainable_token_indices", "use_bdlora", "use_qalora",
})  # fmt: skip
# PEFT reads these when an adapter is made or trained, or not from a file; `ensure_weight_tying` only beside
# `modules_to_save` or embeddings, which are not served.
TRAINING_ONLY = frozenset({"ensure_weight_tying", "eva_config", "loftq_config", "runtime_config", "velora_config"})
# Settings that change the result where they are read: of PEFT before 0.4 and of ms-swift's own tuner.
_CHANGING_ELSEWHERE = frozenset({"enable_lora", "use_merged_linear", "use_qa_lora"})
# They leave the base as it is, and the file holds the A and B that training made of them.
_HARMLESS_INITS = (True, False, None, "gaussian", "orthogonal", "eva")
_MODULE = re.compile(r"[A-Za-z0-9_.]{1,256}")
_PLAIN_KEY = re.compile(r"\^?[A-Za-z0-9_.]{1,256}")
_LIBRARY = re.compile(r"transformers\.models\.[a-z0-9_]+\.(modeling|modular)_[a-z0-9_]+")
# Where transformers keeps a model's own code, and Unsloth what it compiles. Nothing here imports either.
_FOREIGN_LIBRARY = re.compile(r"(transformers_modules|unsloth|unsloth_compiled\w*)(\.[\w\-]+)*")
_CLASS = re.compile(r"[A-Z][A-Za-z0-9_]{1,100}")
_MAPPING_KEYS = ("base_model_class", "parent_library")


@dataclass
class ConfigReading:
    """A config as it is read: what is served, what of it is not as it came, and what is wrong with it.

    Attributes:
        config: As it is stored.
        rewritten: The settings in it that are not as they came.
        warnings: A sentence for each that a person should know of.
        problems: Why it is refused, if there are any.
    """

    config: dict[str, Any]
    rewritten: set[str]
    warnings: list[str]
    problems: list[str]

    def put(self, name: str, value: Any) -> None:
        """Store a setting otherwise than it came."""
        if name not in self.config or repr(self.config[name]) != repr(value):  # 8.0 equals 8, and is written otherwise
            self.config[name] = value
            self.rewritten.add(name)

    def drop(self, name: str) -> None:
        """Leave a setting out."""
        del self.config[name]
        self.rewritten.add(name)


def read_settings(config: Mapping[str, Any]) -> ConfigReading:
    """Check the settings that need no look at the weights."""
    reading = ConfigReading(dict(config), set(), [], [])
    _leave_out(reading)
    _read_auto_mapping(reading)
    reading.problems += _setting_problems(reading.config)
    _read_numbers(reading)
    _read_parameters(reading)
    return reading


def around_parameters(config: Mapping[str, Any], module: str) -> bool:
    """Tell whether a layer is around a parameter that target_parameters names, as PEFT nests and calls such layers.

    Args:
        config: Read by `read_settings`, without problems.
        module: The layer's path in the file.
    """
    host = module.replace(".base_layer", "")
    return any(means(name.rpartition(".")[0], host) for name in config.get("target_parameters") or ())


def serve_layers(reading: ConfigReading, ranks: Mapping[str, int]) -> None:
    """Check the settings that name layers against the layers that there are weights for, and store them plainly.

    Args:
        reading: Without problems so far; what is wrong is added to them.
        ranks: The rank of each layer's A and B.

    Nothing that is stored is an expression. Layers that the config names and the weights lack would get fresh weights;
    those are zero, and so without effect, with the default initialisation alone.
    """
    config, matcher = reading.config, Matcher()
    default = config.get("r", PEFT_RANK)
    try:
        named = _by_layer(reading, "rank_pattern", ranks, matcher)
        alphas = _by_layer(reading, "alpha_pattern", ranks, matcher)
    except ExpressionRejected as error:
        reading.problems.append(str(error))
        return
    found = {name: named.get(name, default) for name in ranks}
    wrong = [name for name, rank in ranks.items() if found[name] != rank]
    if wrong:
        reading.problems.append(
            f"the settings give {wrong[0]} the rank {found[wrong[0]]}, and its weights have {ranks[wrong[0]]}"
        )
    _store_pattern(reading, "rank_pattern", named)
    _store_pattern(reading, "alpha_pattern", alphas)
    if config.get("init_lora_weights", True) is not True:
        reading.put("init_lora_weights", True)
    _store_targets(reading, sorted(ranks))


def _leave_out(reading: ConfigReading) -> None:
    """Leave out what PEFT ignores; refuse what changes the result, or may."""
    known = READ | CHANGING | TRAINING_ONLY
    newer = _is_newer(reading.config.get("peft_version"))
    ignored = []
    for name in sorted(reading.config.keys() - READ):
        if _is_unset(reading.config[name]):
            continue
        if name in CHANGING or name in _CHANGING_ELSEWHERE:
            reading.problems.append(f"{name} is set, which this service does not serve")
        elif name not in known and newer:
            version = str(reading.config["peft_version"])[:40]
            reading.problems.append(f"{name[:60]} is set, a setting of PEFT {version} that is not known here")
        else:
            ignored.append(name)
            reading.drop(name)
    if ignored:
        named = ", ".join(name[:60] for name in ignored[:20])
        reading.warnings.append(f"Left out of adapter_config.json, since an answer does not depend on it: {named}.")


def _is_unset(value: Any) -> bool:
    return value in (None, False, "") or value == {} or value == []


def _is_newer(version: Any) -> bool:
    """Tell whether an adapter was saved by a later PEFT, whose settings may be ones that are not known here."""
    numbers = re.match(r"(\d{1,6})\.(\d{1,6})", version) if isinstance(version, str) else None
    return numbers is not None and (int(numbers[1]), int(numbers[2])) > PEFT_VERSION


def _read_auto_mapping(reading: ConfigReading) -> None:
    """Keep the class of transformers that auto_mapping names, which others import; leave out what else it says."""
    mapping = reading.config.get("auto_mapping")
    if mapping is None:
        return
    refused = f"auto_mapping names {str(mapping)[:100]}, which is no model of transformers: it would be imported"
    if not isinstance(mapping, dict):
        reading.problems.append(refused)
        return
    extra = sorted(mapping.keys() - set(_MAPPING_KEYS))
    if extra:
        named = ", ".join(name[:60] for name in extra[:20])
        reading.warnings.append(f"Left out of auto_mapping, since nothing reads it: {named}.")
    named_class, library = (mapping.get(key) for key in _MAPPING_KEYS)
    if named_class is None and library is None:
        reading.put("auto_mapping", None)
    elif not (isinstance(library, str) and isinstance(named_class, str) and _CLASS.fullmatch(named_class)):
        reading.problems.append(refused)
    elif _LIBRARY.fullmatch(library):
        reading.put("auto_mapping", {key: mapping[key] for key in _MAPPING_KEYS})
    elif _FOREIGN_LIBRARY.fullmatch(library):
        reading.put("auto_mapping", None)
        reading.warnings.append(f"Left out: auto_mapping, which names code outside transformers ({library[:100]}).")
    else:
        reading.problems.append(refused)


def _setting_problems(config: Mapping[str, Any]) -> Iterator[str]:
    if config.get("megatron_core", "megatron.core") not in (None, "megatron.core"):
        yield "megatron_core names a module to import"
    if config.get("peft_type") != "LORA":
        yield f"peft_type is {str(config.get('peft_type'))[:40]!r}; LoRA and its kin are served"
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        yield f"task_type is {str(config['task_type'])[:40]!r}, not CAUSAL_LM"
    if config.get("bias", "none") != "none":
        yield "bias is trained, which this service does not serve"
    for name in ("use_rslora", "use_dora", "fan_in_fan_out", "inference_mode"):
        if config.get(name, False) not in (True, False, None):
            yield f"{name} is neither true nor false"
    if config.get("init_lora_weights", True) not in _HARMLESS_INITS:
        yield (
            f"init_lora_weights is {str(config['init_lora_weights'])[:40]!r}: loading it would change the base, which "
            "other adapters share; convert it to plain LoRA first"
        )
    for name in ("base_model_name_or_path", "revision"):
        if not isinstance(config.get(name), str | None):
            yield f"{name} is not text"
    yield from _layer_problems(config)


def _layer_problems(config: Mapping[str, Any]) -> Iterator[str]:
    for name in ("target_modules", "exclude_modules", "layers_pattern"):
        value = config.get(name)
        if not isinstance(value, str | None) and not _all_are(value, str):
            yield f"{name} is neither text nor a list of text"
    indexes = config.get("layers_to_transform")
    if indexes is not None and type(indexes) is not int and not _all_are(indexes, int):
        yield "layers_to_transform is neither a number nor a list of numbers"


def _read_parameters(reading: ConfigReading) -> None:
    """Check the settings of an adapter on parameters, those of stacked experts for example.

    PEFT refuses dropout and DoRA beside them (PEFT 0.21, tuners/lora/layer.py, `ParamWrapper`); an answer needs no
    dropout.
    """
    config = reading.config
    names = config.get("target_parameters")
    if not names:
        return
    if not _all_are(names, str) or not all(_MODULE.fullmatch(name) and "." in name for name in names):
        reading.problems.append("target_parameters is no list of names of parameters, each with its module's")
        return
    if config.get("use_dora"):
        reading.problems.append("target_parameters and use_dora are both set, and PEFT puts no DoRA on a parameter")
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        reading.problems.append("ranks by layer are set beside target_parameters, which this service does not serve")
    if config.get("lora_dropout"):
        reading.put("lora_dropout", 0.0)
        reading.warnings.append("Set to 0: lora_dropout, which PEFT refuses beside target_parameters.")


def _all_are(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(type(item) is kind for item in value)


def _read_numbers(reading: ConfigReading) -> None:
    """Check ranks, scales and dropout; a whole number written as 8.0 is 8."""
    config = reading.config
    for name, low, high, default in (
        ("r", 1, MAX_RANK, PEFT_RANK),
        ("lora_alpha", 0, _MAX_ALPHA, PEFT_ALPHA),
        ("lora_dropout", 0, 1, 0),
    ):
        whole = name == "r"
        value = config.get(name, default)
        if not _is_number(value, low, high, whole=whole):
            kind = "a whole number" if whole else "a number"
            reading.problems.append(f"{name} is {str(value)[:40]!r}, not {kind} from {low} to {high}")
        elif whole and name in config:
            reading.put(name, int(value))
    _read_pattern(reading, "rank_pattern", 1, MAX_RANK, whole=True)
    _read_pattern(reading, "alpha_pattern", 0, _MAX_ALPHA, whole=False)


def _read_pattern(reading: ConfigReading, name: str, low: int, high: int, *, whole: bool) -> None:
    pattern = reading.config.get(name)
    if pattern is None:
        return
    if not isinstance(pattern, dict):
        reading.problems.append(f"{name} is no object of names of layers and numbers")
        return
    for key, value in pattern.items():
        if not _is_number(value, low, high, whole=whole):
            kind = "a whole number" if whole else "a number"
            reading.problems.append(
                f"{name} gives {key[:60]!r} the value {str(value)[:40]!r}, not {kind} from {low} to {high}"
            )
            return
    if whole:
        reading.put(name, {key: int(value) for key, value in pattern.items()})


def _is_number(value: Any, low: float, high: float, *, whole: bool) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        return False
    return not whole or value == int(value)


def _by_layer(reading: ConfigReading, name: str, modules: Iterable[str], matcher: Matcher) -> dict[str, Any]:
    """Return the values of a pattern by layer, for those that it means.

    Raises:
        ExpressionRejected: A key is no expression, or takes too long.
    """
    pattern = reading.config.get(name) or {}
    if not pattern:
        return {}
    try:
        keys = {module: matcher.key_of(pattern, module) for module in modules}
    except ExpressionRejected as error:
        raise ExpressionRejected(f"{name}: {error}") from error
    unused = sorted(pattern.keys() - set(keys.values()))
    if unused:
        named = ", ".join(repr(key[:60]) for key in unused[:20])
        reading.warnings.append(f"No layer takes its value from these keys of {name}: {named}.")
    return {module: pattern[key] for module, key in keys.items() if key is not None}


def _store_pattern(reading: ConfigReading, name: str, by_layer: Mapping[str, Any]) -> None:
    """Store a pattern whose keys are expressions by the layers that they mean; one of plain names stays as it is."""
    pattern = reading.config.get(name) or {}
    if not all(_PLAIN_KEY.fullmatch(key) for key in pattern):
        reading.put(name, {f"^{module}": value for module, value in by_layer.items()})


def _store_targets(reading: ConfigReading, modules: list[str]) -> None:
    """Store target_modules as names, each of a layer that there are weights for."""
    config = reading.config
    targets = config.get("target_modules")
    patterns = [name for name in ("layers_to_transform", "layers_pattern", "exclude_modules") if config.get(name)]
    if not patterns and (targets == "all-linear" or _name_plainly(targets, modules)):
        return
    if isinstance(targets, list):
        lacking = [name for name in targets if not any(means(name, module) for module in modules)]
        if lacking:
            named = ", ".join(name[:60] for name in lacking[:20])
            reading.warnings.append(f"target_modules names layers that there are no weights for: {named}.")
    reading.put("target_modules", modules)
    for name in patterns:
        reading.put(name, None)


def _name_plainly(targets: Any, modules: list[str]) -> bool:
    return isinstance(targets, list) and all(
        _MODULE.fullmatch(name) and any(means(name, module) for module in modules) for name in targets
    )
