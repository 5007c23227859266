"""Chooses the files of a repository or a folder that make up the requested dataset.

Source: the rules of `datasets`: the card's `configs`, or else the names of files and folders
(https://huggingface.co/docs/hub/datasets-file-names-and-splits and .../datasets-manual-configuration).
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from core.errors import DatasetRejected

_KINDS = (".parquet", ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".xlsx", ".xlsm", ".txt")  # the likeliest first
_PACKED = (".gz", ".zip")
# Files beside the data that hold no data.
_NO_DATA = frozenset(("dataset_infos.json", "dataset_info.json", "state.json", "requirements.txt", "license.txt"))
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
}
_KEYWORD = re.compile(rf"(?<![a-z])({'|'.join(_SPLITS)})(?![a-z])")
_SHOWN = 20


@dataclass(frozen=True)
class Parts:
    """The files of one split of one configuration, in order.

    Attributes:
        left_out: Files of the same split in another format.
    """

    config: str
    split: str
    paths: tuple[str, ...]
    left_out: tuple[str, ...]


def choose(paths: Sequence[str], card: Mapping[str, Any] | None, config: str | None, split: str | None) -> Parts:
    """Choose the files.

    Args:
        paths: All files, relative to the root.
        card: The front matter of README.md, if there is one.
        config: The configuration asked for; the default one if None.
        split: The split asked for; `train` if None, or the only one.

    Raises:
        DatasetRejected: There is no such configuration or split, or there are several and the client named none.
    """
    data = [path for path in paths if _kind(path) is not None and _is_data(path)]
    configs = (card or {}).get("configs")
    if isinstance(configs, list) and configs:
        name, splits = _from_card(data, configs, config)
    else:
        name, splits = _from_names(data, config)
    if not splits:
        script = next((path for path in paths if path.endswith(".py")), None)
        made = f"it is made by a script ({script}), which is never run; try revision=refs/convert/parquet. "
        raise DatasetRejected(
            f"There are no data files ({', '.join(_KINDS)}): {made if script is not None else ''}"
            f"the files are {list(paths)[:_SHOWN]}."
        )
    wanted = split or ("train" if "train" in splits else next(iter(splits)) if len(splits) == 1 else None)
    if wanted not in splits:
        asked = f"no split {split!r}" if split is not None else "more than one split, and none is named"
        raise DatasetRejected(f"There is {asked}; there are {sorted(splits)}.")
    return _of_one_kind(name, wanted, splits[wanted])


def _is_data(path: str) -> bool:
    parts = PurePosixPath(path).parts
    return not any(part.startswith((".", "__")) for part in parts) and parts[-1].lower() not in _NO_DATA


def _kind(path: str) -> str | None:
    name = path.lower()
    for packed in _PACKED:
        name = name.removesuffix(packed)
    return next((kind for kind in _KINDS if name.endswith(kind)), None)


def _of_one_kind(config: str, split: str, paths: Sequence[str]) -> Parts:
    """Keep the files of the most frequent format. The same rows are often published in several formats."""
    kinds = Counter(str(_kind(path)) for path in paths)
    best = max(kinds, key=lambda kind: (kinds[kind], -_KINDS.index(kind)))
    kept = sorted(path for path in paths if _kind(path) == best)
    return Parts(config, split, tuple(kept), tuple(sorted(set(paths) - set(kept))))


def _from_names(data: Sequence[str], config: str | None) -> tuple[str, dict[str, list[str]]]:
    folders = {path.split("/")[0] for path in data if path.count("/") >= 2 and path.split("/")[1].lower() in _SPLITS}
    if config not in (None, "default") or len(folders) > 1:
        named = [path for path in data if config is not None and config in PurePosixPath(path).parts[:-1]]
        if not named:
            known = sorted(folders or {path.split("/")[0] for path in data if "/" in path})[:_SHOWN]
            what = f"no configuration {config!r}" if config is not None else "more than one configuration"
            raise DatasetRejected(f"There is {what}; there are {known or ['default']}.")
        data = named
    splits: dict[str, list[str]] = {}
    for path in data:
        keywords = _KEYWORD.findall(path.lower())
        if keywords:
            splits.setdefault(_SPLITS[keywords[-1]], []).append(path)
    return config or "default", splits or ({"train": list(data)} if data else {})


def _from_card(data: Sequence[str], configs: list[Any], config: str | None) -> tuple[str, dict[str, list[str]]]:
    known = {str(item.get("config_name", "default")): item for item in configs if isinstance(item, Mapping)}
    defaults = [name for name, item in known.items() if item.get("default") is True or name == "default"]
    name = config or (defaults[0] if defaults else next(iter(known)) if len(known) == 1 else None)
    if name not in known:
        asked = f"no configuration {config!r}" if config is not None else "more than one configuration"
        raise DatasetRejected(f"There is {asked}; there are {sorted(known)[:_SHOWN]}.")
    item = known[name]
    folder = str(item.get("data_dir", "")).strip("/")
    inside = [path for path in data if not folder or path.startswith(f"{folder}/")]
    told = item.get("data_files")
    if told is None:
        return name, _from_names(inside, None)[1]
    splits: dict[str, list[str]] = {}
    for split, patterns in _patterns(told):
        for pattern in patterns:
            full = pattern if pattern in data or not folder else f"{folder}/{pattern}"
            matches = [path for path in data if _glob(full).fullmatch(path)]
            splits.setdefault(split, []).extend(path for path in matches if path not in splits.get(split, []))
    return name, {split: paths for split, paths in splits.items() if paths}


def _patterns(told: Any) -> list[tuple[str, list[str]]]:
    if isinstance(told, Mapping):
        told = [{"split": split, "path": path} for split, path in told.items()]
    if isinstance(told, list) and told and all(isinstance(item, Mapping) for item in told):
        return [(str(item.get("split", "train")), _texts(item.get("path"))) for item in told]
    return [("train", _texts(told))]


def _texts(value: Any) -> list[str]:
    return [str(item) for item in (value if isinstance(value, list) else [value]) if item is not None]


def _glob(pattern: str) -> re.Pattern[str]:
    """Translate a pattern in which `*` stays in a folder and `**` does not."""
    words = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = re.split(r"(\*\*/|\*\*|\*|\?)", pattern.removeprefix("./"))
    return re.compile("".join(words.get(part, re.escape(part)) for part in parts))
