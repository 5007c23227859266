"""A tokenizer's files: how they are saved, and which of the adapter's and the base's files are used.

A tokenizer has one chat template, several named ones, or none. transformers writes the named ones into a sub-folder.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from core.files import plain_files
from domain.adapter_files import tokenizer_files
from domain.models.load_files import TEMPLATES_FOLDER

Template = str | dict[str, str]
_TEMPLATE, _SETTINGS = "chat_template.jinja", "tokenizer_config.json"


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer with all its chat templates."""
    tokenizer.save_pretrained(folder)


def write_used_tokenizer(base_tokenizer: Any, adapter: Path, folder: Path) -> bool:
    """Write the tokenizer that an adapter is used with: its own, completed by the base's.

    The chat template is decided separately: an adapter that has one was trained with it, whatever else it has.

    Args:
        base_tokenizer: The base's.
        adapter: The adapter's folder.
        folder: Where to write.

    Returns:
        Whether the chat template is the adapter's.
    """
    template = own_template(adapter)
    if _is_whole(adapter):
        _copy_tokenizer(adapter, folder)
    else:
        save_tokenizer(base_tokenizer, folder)
    if template is None or not _is_whole(adapter):
        _put_template(folder, template or base_tokenizer.chat_template)
    return template is not None


def own_template(folder: Path) -> Template | None:
    """Return the chat template that a folder's files hold, or the named ones; None without any.

    Source: transformers, `PreTrainedTokenizerBase._from_pretrained`: files come before tokenizer_config.json.
    """
    files = sorted((folder / TEMPLATES_FOLDER).glob("*.jinja"))
    named: dict[str, Any] = {path.stem: path.read_text(encoding="utf-8") for path in files}
    if (folder / _TEMPLATE).is_file():
        named["default"] = (folder / _TEMPLATE).read_text(encoding="utf-8")
    if not named and (folder / _SETTINGS).is_file():
        said = json.loads((folder / _SETTINGS).read_bytes()).get("chat_template")
        named = {item["name"]: item["template"] for item in said} if isinstance(said, list) else {"default": said}
    templates = {name: template for name, template in named.items() if template}
    return templates["default"] if templates.keys() == {"default"} else templates or None


def fingerprint(folder: Path) -> str:
    """Return a digest of the files that make a folder's tokenizer."""
    digest, paths = hashlib.sha256(), dict(plain_files(folder))
    for name in tokenizer_files(paths):
        digest.update(name.encode() + b"\0" + hashlib.sha256(paths[name].read_bytes()).digest())
    return digest.hexdigest()


def _is_whole(folder: Path) -> bool:
    """Tell whether a folder holds a whole tokenizer, and not only settings or a template."""
    return (folder / "tokenizer.json").is_file() and (folder / _SETTINGS).is_file()


def _copy_tokenizer(source: Path, folder: Path) -> None:
    paths = dict(plain_files(source))
    for name in tokenizer_files(paths):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(paths[name], folder / name)


def _put_template(folder: Path, template: Template | None) -> None:
    """Replace the chat template of a folder's tokenizer by another, or by several named ones."""
    shutil.rmtree(folder / TEMPLATES_FOLDER, ignore_errors=True)
    (folder / _TEMPLATE).unlink(missing_ok=True)
    settings = json.loads((folder / _SETTINGS).read_bytes())
    if settings.pop("chat_template", None) is not None:
        (folder / _SETTINGS).write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for name, text in ({"default": template} if isinstance(template, str) else template or {}).items():
        path = folder / _TEMPLATE if name == "default" else folder / TEMPLATES_FOLDER / f"{name}.jinja"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
