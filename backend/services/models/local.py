"""Models on this machine: the operator's folders, what was prepared here, the Hub's cache, the embedded model.

Only names, config.json and safetensors headers are read. A folder whose weights are missing, truncated or broken
is no model. A model in the Hub's cache that has no tokenizer is none either, because a download would complete it.
Such a folder is left out, and the log says why.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from core.errors import ModelNotFound, ModelRejected, NoSafeWeights, StudioError
from core.logging import get_logger
from core.start_checks import why_unreadable
from domain.hub.repos import MODELS, model_repo
from domain.hub.tree import is_commit
from domain.hub.wire import text, texts
from domain.models.records import (
    ModelDetails,
    ModelSummary,
    SearchQuery,
    check_model_id,
    check_revision,
    has_chat_template,
    in_bounds,
    needs_remote_code,
    weight_files,
)
from domain.models.safetensors_header import SafetensorsHeader
from services.hub.cache_dir import cached_repo, commit_at
from services.models.folders import (
    inside,
    model_folder,
    model_folders,
    read_header,
    read_json,
    text_of,
    walk,
    why_no_model,
    why_not_followed,
)
from services.models.snapshot_specs import MODEL

_MAX_HEADERS = 512  # kept parsed; each has some hundred tensors
# What the Hub derives a task from, for the class names that leave no doubt. Source: huggingface/transformers,
# utils/update_metadata.py, PIPELINE_TAGS_AND_AUTO_MODELS.
_TASK_OF_ENDING = {
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForMaskedLM": "fill-mask",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
}
_log = get_logger(__name__)


@dataclass(frozen=True)
class LocalModel:
    """A model on this machine.

    Attributes:
        path: Its folder; None where it still has to be prepared.
        revision: The Hub's commit, where it came from there.
        config: config.json, where there is no folder to read it from.
    """

    model_id: str
    path: Path | None
    summary: ModelSummary
    revision: str | None
    config: dict[str, Any] | None = None


class LocalModels:
    """Finds the models. Every call looks at the disk again. A header is parsed again only if its file changed.

    Args:
        model_dirs: Folders with `name` or `owner/name` below them.
        prepared_dir: A folder with `name` or `owner--name` below it.
        hub_cache_dir: Where huggingface_hub keeps downloads.
        embedded: The model that needs no Hub, if there is one.
    """

    def __init__(
        self,
        model_dirs: Sequence[Path],
        *,
        prepared_dir: Path | None,
        hub_cache_dir: Callable[[], Path | None],
        embedded: Callable[[], LocalModel | None] | None,
    ) -> None:
        self._model_dirs = tuple(model_dirs)
        self._prepared_dir = prepared_dir
        self._hub_cache_dir = hub_cache_dir
        self._embedded = embedded
        self._lock = threading.Lock()
        self._headers: dict[tuple[str, int, int], SafetensorsHeader] = {}

    def all(self) -> tuple[LocalModel, ...]:
        """Return every model once, ordered by id. The operator's folders come before other copies."""
        by_id: dict[str, LocalModel] = {}
        for model in self._candidates():
            by_id.setdefault(model.model_id, model)
        return tuple(by_id[model_id] for model_id in sorted(by_id, key=str.lower))

    def find(self, model_id: str, revision: str | None = None) -> LocalModel | None:
        """Return the model of an id, or None. Only its possible folders are looked at.

        Args:
            model_id: `name` or `owner/name`.
            revision: A commit in the Hub's cache. None accepts any copy on this machine.
        """
        try:
            check_model_id(model_id)
        except ModelRejected:
            return None
        return next((model for model in self._places(model_id, revision)), None)

    def find_last(self, model_id: str, revision: str) -> LocalModel | None:
        """Return the model at the commit that a branch or tag was at when the Hub's cache last fetched it, or None.

        It is used when the Hub cannot be asked. The branch may have moved on since.
        """
        cache_dir = self._hub_cache_dir()
        try:
            check_model_id(model_id)
            check_revision(revision)
        except ModelRejected:
            return None
        commit = commit_at(cached_repo(cache_dir, model_repo(model_id)), revision) if cache_dir is not None else None
        return self.find(model_id, commit) if commit is not None else None

    def lacking(self, model_id: str, revision: str | None) -> tuple[str, ...]:
        """Return the parts that a model in the Hub's cache lacks; none if it is whole or not there."""
        cache_dir = self._hub_cache_dir()
        if cache_dir is None:
            return ()
        repo = cached_repo(cache_dir, model_repo(model_id))
        commit = revision if is_commit(revision) else commit_at(repo, revision or "main")
        folder = repo / "snapshots" / commit if commit is not None else None
        return MODEL.lacking(folder) if folder is not None and folder.is_dir() else ()

    def flaw(self, model_id: str) -> StudioError | None:
        """Return why what the operator's folders have of an id is no model; None if they have nothing or no flaw."""
        for root in self._model_dirs:
            parts = model_id.split("/")
            folder = model_folder(root.expanduser(), parts)
            try:
                if folder is not None:
                    self._load(model_id, folder, None)
            except (NoSafeWeights, ModelRejected) as error:
                return error
            except (ValueError, OSError) as error:
                return ModelRejected(f"{model_id} is in {folder}, but cannot be used: {error}.")
            reason = why_no_model(root.expanduser(), parts)
            if reason is not None:
                return ModelNotFound(f"There is no model {model_id} on this machine: {reason}.")
        return None

    def unreadable_dirs(self) -> tuple[str, ...]:
        """Say which of the operator's folders cannot be read now, and why."""
        reasons = ((root, why_unreadable(root.expanduser())) for root in self._model_dirs)
        return tuple(f"{root} of PEFT_STUDIO_MODEL_DIRS {reason}" for root, reason in reasons if reason is not None)

    def left_out(self) -> list[tuple[Path, str]]:
        """Return what is passed over in the operator's folders, and why."""
        found: list[tuple[Path, str]] = []

        def skip(path: Path, reason: str) -> None:
            found.append((path, reason))

        for root in self._model_dirs:
            for name, folder in model_folders(root.expanduser(), levels=2, on_skip=skip):
                try:
                    self._load(name, folder, None)
                except StudioError as error:
                    skip(folder, error.detail)
                except (ValueError, OSError) as error:
                    skip(folder, str(error))
        return found

    def search(self, query: SearchQuery) -> list[LocalModel]:
        """Return the models that a query matches, ordered by id. The Hub's order is not known here."""
        return [model for model in self.all() if _matches(model.summary, query)]

    def config(self, model: LocalModel) -> dict[str, Any] | None:
        """Return the model's config.json, or None if it has become unreadable."""
        return model.config if model.path is None else self._json(model.path, "config.json")

    def details(self, model: LocalModel) -> ModelDetails:
        """Return what the model's folder says of it."""
        config = self.config(model)
        folder = model.path
        files = walk(folder, self._roots(folder)) if folder is not None else ()
        paths = [file.path for file in files]
        tokenizer = self._json(folder, "tokenizer_config.json") if folder and "tokenizer_config.json" in paths else None
        return ModelDetails(
            summary=model.summary,
            sha=model.revision,
            revision=model.revision,
            files=files,
            parameters_by_dtype=self._count_by_dtype(folder, paths) if folder is not None else None,
            config=config,
            chat_template=has_chat_template(paths, tokenizer),
            base_model=None,
            languages=None,
            requires_remote_code=needs_remote_code(config, tokenizer),
        )

    def _count_by_dtype(self, folder: Path, paths: Iterable[str]) -> dict[str, int] | None:
        counts: dict[str, int] = {}
        try:
            for name in weight_files(paths):
                for dtype, number in self._header((folder / name).resolve()).parameters_by_dtype.items():
                    counts[dtype] = counts.get(dtype, 0) + number
        except (ValueError, OSError) as error:  # changed since it was found
            _log.warning("local_models.weights_not_read", path=str(folder), reason=str(error))
            return None
        return counts or None

    def _json(self, folder: Path, name: str) -> dict[str, Any] | None:
        try:
            return read_json(inside(folder / name, self._roots(folder)))
        except (ValueError, OSError) as error:
            _log.warning("local_models.file_not_read", path=str(folder / name), reason=str(error))
            return None

    def _roots(self, folder: Path) -> tuple[Path, ...]:
        """Return where a model's files may be: in its folder, or for the Hub's cache where its links lead.

        In the operator's folders, links lead where the operator wants them to (`why_not_followed` says more).
        """
        if any(folder.is_relative_to(root.expanduser()) for root in self._model_dirs):
            return (Path(folder.anchor),)
        cache_dir = self._hub_cache_dir()
        if cache_dir is None or not folder.resolve().is_relative_to(cache_dir.resolve()):
            return (folder.resolve(),)
        # <cache>/models--owner--name/snapshots/<commit>: links into the repository's blobs, which may be links into
        # the blobs that all repositories share (huggingface_hub/utils/_shared_blobs.py).
        repo = folder.parent.parent
        return folder.resolve(), (repo / "blobs").resolve(), (cache_dir / "blobs").resolve()

    def _candidates(self) -> Iterator[LocalModel]:
        for root in self._model_dirs:
            for name, folder in model_folders(root.expanduser(), levels=2):
                yield from self._read(name, folder, None)
        if self._prepared_dir is not None:
            for name, folder in model_folders(self._prepared_dir, levels=1):
                yield from self._read(name.replace("--", "/", 1), folder, None)
        for repo in self._cached_repos():
            yield from self._cached(repo, None)
        yield from self._embedded_model()

    def _places(self, model_id: str, revision: str | None) -> Iterator[LocalModel]:
        """Yield the models of one id, in the order of `_candidates`."""
        if revision is None:
            for root in self._model_dirs:
                folder = model_folder(root.expanduser(), model_id.split("/"))
                yield from self._read(model_id, folder, None) if folder is not None else ()
            if self._prepared_dir is not None:
                folder = model_folder(self._prepared_dir, [model_id.replace("/", "--", 1)])
                yield from self._read(model_id, folder, None) if folder is not None else ()
        cache_dir = self._hub_cache_dir()
        if cache_dir is not None:
            yield from self._cached(cached_repo(cache_dir, model_repo(model_id)), revision)
        if revision is None:
            yield from (model for model in self._embedded_model() if model.model_id == model_id)

    def _embedded_model(self) -> Iterator[LocalModel]:
        embedded = self._embedded() if self._embedded is not None else None
        if embedded is not None:
            yield replace(embedded, summary=replace(embedded.summary, local=True))

    def _cached_repos(self) -> list[Path]:
        cache_dir = self._hub_cache_dir()
        try:
            return sorted(cache_dir.glob(f"{MODELS.folder_prefix}*")) if cache_dir is not None else []
        except OSError as error:
            _log.warning("local_models.cache_not_read", path=str(cache_dir), reason=str(error))
            return []

    def _cached(self, repo: Path, revision: str | None) -> Iterator[LocalModel]:
        """Yield a repository of the Hub's cache: at a commit, or at `main`, or else at the revision fetched last."""
        model_id = repo.name.removeprefix(MODELS.folder_prefix).replace("--", "/")
        try:
            commits = {path.name: path for path in (repo / "snapshots").iterdir() if path.is_dir()}
        except OSError:  # not there
            return
        if revision is None:
            main = text_of(repo / "refs" / "main")
            order = sorted(commits, key=lambda name: (name == main, commits[name].stat().st_mtime_ns), reverse=True)
        else:
            order = [revision] if revision in commits else []
        for commit in order:
            models = list(self._read(model_id, commits[commit], commit))
            if models:
                yield from models
                return

    def _read(self, model_id: str, folder: Path, revision: str | None) -> Iterator[LocalModel]:
        """Yield the model in a folder, if it is whole and all its files are below its roots."""
        try:
            yield self._load(model_id, folder, revision)
        except NoSafeWeights:
            return  # not a model of this service; the operator knows what else is in the folder
        except (ValueError, OSError, ModelRejected) as error:
            _log.warning("local_models.left_out", path=str(folder), reason=str(error))

    def _load(self, model_id: str, folder: Path, revision: str | None) -> LocalModel:
        """Read the model in a folder.

        Raises:
            NoSafeWeights, ModelRejected, ValueError, OSError: There is no whole model. The message says why.
        """
        check_model_id(model_id)
        paths = list(folder.iterdir())
        names = [path.name for path in paths if path.is_file()]
        for path in paths:
            if path.name.endswith(".safetensors") and (reason := why_not_followed(path)) is not None:
                raise ValueError(f"{path.name} {reason}")
        if "config.json" not in names or not any(name.endswith(".safetensors") for name in names):
            raise NoSafeWeights(f"{model_id} has no safetensors weights in {folder}.")
        weights = weight_files(names)
        if not weights:
            raise ValueError("a shard of the weights is missing")
        if revision is not None and (lacking := MODEL.missing(names)):
            raise ValueError(f"it is without {' and without '.join(lacking)}")
        roots = self._roots(folder)
        read = {name: inside(folder / name, roots) for name in ("config.json", *weights)}
        config = read_json(read.pop("config.json"))
        headers = [self._header(path) for path in read.values()]
        size_bytes = sum(path.stat().st_size for path in read.values())
        summary = _summary(model_id, config, sum(header.parameters for header in headers) or None, size_bytes)
        return LocalModel(model_id, folder, summary, revision)

    def _header(self, path: Path) -> SafetensorsHeader:
        """Read one file's header.

        Raises:
            ValueError: It is broken, or the file is not as long as it says.
            OSError: It cannot be read.
        """
        status = path.stat()
        key = (str(path), status.st_size, status.st_mtime_ns)
        with self._lock:
            known = self._headers.get(key)
        if known is not None:
            return known
        header = read_header(path)
        with self._lock:
            if len(self._headers) >= _MAX_HEADERS:
                self._headers.clear()
            self._headers[key] = header
        return header


def _summary(model_id: str, config: dict[str, Any], parameters: int | None, size_bytes: int) -> ModelSummary:
    architectures = texts(config.get("architectures"))
    tasks = {task for name in architectures for ending, task in _TASK_OF_ENDING.items() if name.endswith(ending)}
    return ModelSummary(
        model_id=model_id,
        author=model_id.split("/")[0] if "/" in model_id else None,
        task=tasks.pop() if len(tasks) == 1 else None,
        # save_pretrained of transformers writes its version; other libraries' configs lack it.
        library="transformers" if text(config.get("transformers_version")) else None,
        parameters=parameters,
        size_bytes=size_bytes,
        architecture=architectures[0] if architectures else None,
        local=True,
    )


def _matches(summary: ModelSummary, query: SearchQuery) -> bool:
    """Tell whether a model matches. An unknown value matches no filter."""
    wanted = {
        "task": query.task,
        "author": query.author,
        "library": query.library,
        "license": query.license,
        "gated": query.gated,
    }
    if any(value is not None and getattr(summary, name) != value for name, value in wanted.items()):
        return False
    if query.query and query.query.lower() not in summary.model_id.lower():
        return False
    return set(query.tags) <= set(summary.tags) and in_bounds(summary, query)
