"""Chat templates of many families: those that TRL and Unsloth carry, and some more written after their models'."""

import ast
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_LOOP = "{% for m in messages %}"
_END = "{% endfor %}{% if add_generation_prompt %}"


def _plain(before: str, after: str, prompt: str) -> str:
    return f"{_LOOP}{{{{ {before} + m['content'] + {after} }}}}{_END}{{{{ {prompt} }}}}{{% endif %}}"


# In the manner of the named families, whose templates no package here carries.
WRITTEN = {
    "exaone": _plain(
        "'[|' + m['role'] + '|]'", "('[|endofturn|]\\n' if m['role'] != 'user' else '\\n')", "'[|assistant|]'"
    ),
    "granite": _plain(
        "'<|start_of_role|>' + m['role'] + '<|end_of_role|>'",
        "'<|end_of_text|>\\n'",
        "'<|start_of_role|>assistant<|end_of_role|>'",
    ),
    "kimi": _plain(
        "'<|im_' + m['role'] + '|>' + m['role'] + '<|im_middle|>'",
        "'<|im_end|>'",
        "'<|im_assistant|>assistant<|im_middle|>'",
    ),
    "baichuan": _plain(
        "('<reserved_106>' if m['role'] == 'user' else '<reserved_107>' if m['role'] == 'assistant' else '')",
        "(eos_token if m['role'] == 'assistant' else '')",
        "'<reserved_107>'",
    ),
    "no marks at all": _plain(
        "('Q: ' if m['role'] == 'user' else 'A: ' if m['role'] == 'assistant' else 'System: ')", "'\\n\\n'", "'A: '"
    ),
    "rewrites every turn but the last": (
        f"{_LOOP}<|{{{{ m['role'] }}}}|>{{{{ ('final: ' if loop.last else '') + m['content'] }}}}<|end|>\n"
        f"{_END}<|assistant|>{{% endif %}}"
    ),
    "numbers its turns": (
        f"{_LOOP}[{{{{ loop.index }}}} of {{{{ messages | length }}}} {{{{ m['role'] }}}}] {{{{ m['content'] }}}}</end>"
        f"{_END}[assistant] {{% endif %}}"
    ),
}


def trl_templates(*, with_marks: bool) -> dict[str, str]:
    """TRL's templates, as models have them or with generation marks added for training."""
    spec = find_spec("trl")
    folder = Path((spec.submodule_search_locations or [""])[0]) / "chat_templates" if spec is not None else Path()
    return {
        path.stem: path.read_text(encoding="utf-8")
        for path in sorted(folder.glob("*.jinja"))
        if path.stem.endswith("_training") == with_marks
    }


def unsloth_templates() -> dict[str, str]:
    """Unsloth's templates, read from its source: importing it wants a GPU."""
    spec = find_spec("unsloth")
    folder = Path((spec.submodule_search_locations or [""])[0]) if spec is not None else Path()
    found = {}
    for node in ast.parse((folder / "chat_templates.py").read_text(encoding="utf-8")).body:
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.targets[0], ast.Name)
        ):
            name = node.targets[0].id
            if name.endswith("_template") and "messages" in str(node.value.value):
                found[f"unsloth {name}"] = str(node.value.value).replace("{system_message}", "Be kind.")
    return found


def tokenizer_with(path: Path, template: str) -> Any:
    """The tiny model's tokenizer with a template, whose marks are single tokens as they are in its model."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    marks = set(re.findall(r"<\|[^|<>{}' ]+\|>|<｜[^｜<>{}']+｜>|</?[a-z_]+>|\[/?INST\]", template))
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>", "additional_special_tokens": sorted(marks)})
    tokenizer.chat_template = template
    return tokenizer
