"""Imports adapters from a folder, a zip or a repository of the Hub. Each is copied, checked and stored whole."""

import json
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from core.clock import Clock, SystemClock
from core.errors import (
    AccessDenied,
    AdapterRejected,
    ModelRejected,
    NotFound,
    TooLarge,
    Unavailable,
)
from core.files import storage_errors, whole_folder
from core.logging import get_logger
from core.manifest import NAME as MANIFEST
from core.manifest import FolderDamaged, verify, write_manifest
from core.settings import get_settings
from core.singleton import singleton
from domain.adapter_config import TARGETING
from domain.adapter_files import CONFIG, WEIGHTS, AdapterFacts, choose_adapter
from domain.adapter_fit import fit
from domain.hub.repos import model_repo
from domain.models.records import check_model_id, check_revision
from services.adapters.checks import check_adapter, check_small_files, read_card, read_json
from services.adapters.staging import allowed_folder, copy_folder, unzip
from services.hub.downloads import Downloads, get_downloads
from services.hub.snapshot_spec import Part, SnapshotSpec
from services.model_registry_service import get_model_facts, get_model_files
from services.models.facts import ModelFacts
from services.models.files import ModelFiles
from store.database import Database, get_database
from store.records import AdapterRecord, to_text
from store.repositories import Adapters

_log = get_logger(__name__)
_MAX_MANIFEST_BYTES = 2**20
# The files that are read of an adapter's repository on the Hub.
_SNAPSHOT = SnapshotSpec((Part.named(CONFIG), Part.named(WEIGHTS)), choose_adapter, check_small_files)


@dataclass(frozen=True)
class ImportSettings:
    """A client's settings for an adapter that it imports.

    Attributes:
        name: The adapter's name; None to name it after its source.
        base_model_id: The base; needed if the adapter's own config names none, or a path.
    """

    name: str | None
    base_model_id: str | None
    base_revision: str | None


class ZipPlace:
    """The file that a zip is written to while it arrives.

    Args:
        path: Made when the first bytes arrive.
        max_bytes: A larger one is refused.
    """

    def __init__(self, path: Path, max_bytes: int) -> None:
        self.path, self.filename = path, "upload"
        self._max_bytes, self._size_bytes = max_bytes, 0
        self._file: IO[bytes] | None = None

    def receive(self, filename: str) -> "ZipPlace":
        """Open the file."""
        self.filename = filename
        self._file = self.path.open("xb")
        return self

    def write(self, data: bytes) -> int:
        """Append.

        Raises:
            TooLarge: It is more than an adapter may have.
            StorageFull: There is no room for it.
        """
        self._size_bytes += len(data)
        if self._size_bytes > self._max_bytes:
            raise TooLarge(f"The zip is larger than {self._max_bytes} bytes.")
        if self._file is None:
            raise ValueError("nothing has begun to come")
        with storage_errors(self.path):
            return self._file.write(data)

    def close(self) -> None:
        """Keep the file until the place goes."""
        with storage_errors(self.path):
            self.abandon()

    def abandon(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


class AdapterIntake:
    """Imports adapters.

    Args:
        folder: Has a sub-folder for each adapter.
        roots: An adapter's folder must be below one of these.
        max_bytes: The most bytes of an adapter, packed or unpacked.
        files: Knows whether a base is safe to load.
        downloads: Fetches repositories.
    """

    def __init__(
        self,
        database: Database,
        folder: Path,
        roots: tuple[Path, ...],
        max_bytes: int,
        files: ModelFiles,
        models: ModelFacts,
        downloads: Downloads,
        clock: Clock,
    ) -> None:
        self._database, self._folder, self._roots, self._max_bytes = database, folder, roots, max_bytes
        self._files, self._models, self._downloads, self._clock = files, models, downloads, clock
        folder.mkdir(parents=True, exist_ok=True)

    def from_folder(self, path: str, settings: ImportSettings) -> AdapterRecord:
        """Copy an adapter from a folder on this machine.

        Raises:
            PathNotAllowed: It is not below a permitted folder, or has a link that leads out.
            NoSafeWeights, AdapterRejected, NeedsRemoteCode, TooLarge, StorageFull: What is wrong with it.
        """
        source = allowed_folder(path, self._roots)
        return self._store(
            lambda target: copy_folder(source, target, self._max_bytes),
            settings,
            source.name,
            {"kind": "folder", "path": str(source)},
        )

    def from_hub(self, model_id: str, revision: str | None, settings: ImportSettings) -> AdapterRecord:
        """Download an adapter. Pickles beside it are not downloaded.

        Raises:
            ModelNotFound, AccessDenied, HubUnavailable, DownloadCorrupt: As the Hub says.
            NoSafeWeights, AdapterRejected, NeedsRemoteCode, TooLarge, StorageFull: What is wrong with it.
        """
        snapshot = self._downloads.fetch(model_repo(model_id), revision, lambda _: None, lambda: False, spec=_SNAPSHOT)
        blobs = snapshot.parent.parent / "blobs"
        source = {"kind": "hub", "model_id": model_id, "revision": revision, "commit": snapshot.name}
        return self._store(
            lambda target: copy_folder(snapshot, target, self._max_bytes, (blobs,)), settings, model_id, source
        )

    @contextmanager
    def receiving(self) -> Iterator[ZipPlace]:
        """Provide a file for a zip that arrives, for the length of the block."""
        place = ZipPlace(self._folder / f".adp_{uuid.uuid4().hex[:12]}.zip.tmp", self._max_bytes)
        try:
            yield place
        finally:
            place.abandon()
            place.path.unlink(missing_ok=True)

    def from_zip(self, place: ZipPlace, settings: ImportSettings) -> AdapterRecord:
        """Unpack the adapter that has arrived.

        Raises:
            NoSafeWeights, AdapterRejected, NeedsRemoteCode, TooLarge, StorageFull: What is wrong with it.
        """
        source = {"kind": "upload", "filename": place.filename}
        name = place.filename.removesuffix(".zip") or "upload"
        return self._store(lambda target: unzip(place.path, target, self._max_bytes), settings, name, source)

    def _store(
        self, fill: Callable[[Path], None], settings: ImportSettings, name: str, source: dict[str, Any]
    ) -> AdapterRecord:
        """Fill a folder, check the files in it, and keep it. After any error nothing is left of it."""
        adapter_id = f"adp_{uuid.uuid4().hex[:12]}"
        target = self._folder / adapter_id
        with whole_folder(target) as folder:
            fill(folder)
            _check_sums(folder, name)
            facts = check_adapter(folder, name)
            base, revision = self._base_of(facts, settings, name)
            facts = self._fitted(facts, base, revision, name)
            card = read_card(folder, name)
            rewritten = _write_config(folder, facts, base, revision)
            write_manifest(folder, {"adapter_id": adapter_id, "source": source})
        record = AdapterRecord(
            id=adapter_id,
            name=settings.name or name[-200:],
            base_model_id=base,
            base_revision=revision,
            algorithm=card.algorithm or facts.algorithm.value,
            config=card.config,
            job_id=None,
            dataset_sha256=card.dataset_sha256,
            metrics=card.metrics,
            path=str(target),
            created_at=to_text(self._clock.now()),
            version=0,  # given when it is stored
            source=source
            | ({"rewritten": rewritten} if rewritten else {})
            | ({"warnings": list(facts.warnings)} if facts.warnings else {}),
        )
        return self._record(record)

    def _record(self, record: AdapterRecord) -> AdapterRecord:
        try:
            with self._database.begin() as connection:
                Adapters(connection).add(record)
                stored = Adapters(connection).get(record.id)
        except BaseException:
            shutil.rmtree(record.path, ignore_errors=True)
            raise
        _log.info("adapter.imported", adapter_id=record.id, source=record.source["kind"])
        return stored or record

    def _base_of(self, facts: AdapterFacts, settings: ImportSettings, name: str) -> tuple[str, str | None]:
        """Return the base and its revision. A base that is known to need code of its own is refused.

        Raises:
            AdapterRejected: Neither the client nor the adapter names a base.
            NeedsRemoteCode, NoSafeWeights, ModelRejected: The service never loads this base.
        """
        base = settings.base_model_id or facts.base_model
        named_here = settings.base_model_id is not None
        revision = settings.base_revision or (None if named_here else facts.base_revision)
        try:
            check_model_id(base or "")
            if revision is not None:
                check_revision(revision)
        except ModelRejected as error:
            raise AdapterRejected(
                f"{name}: its base is {str(facts.base_model)[:100]!r}, which is no model id; name it as base_model_id."
            ) from error
        with suppress(NotFound, Unavailable, AccessDenied):  # judged when it is loaded
            self._files.check(str(base), revision)
        return str(base), revision

    def _fitted(self, facts: AdapterFacts, base: str, revision: str | None, name: str) -> AdapterFacts:
        """Check an adapter against its base, if it is known what that is made of.

        Raises:
            AdapterRejected: It does not fit.
        """
        try:
            shape = self._models.shape(base, revision)
        except (NotFound, Unavailable, AccessDenied, ModelRejected):
            shape = None  # judged when it is loaded
        if shape is None:
            return facts
        if facts.on_parameters and not shape.has_stacked_experts:
            raise AdapterRejected(f"{name} does not fit {base}: it adapts parameters, and the base has no experts.")
        found = fit(facts.layers, facts.targeting, shape)
        if found.problem is not None:
            raise AdapterRejected(f"{name} does not fit {base}: {found.problem}.")
        if not found.lacks_idle:
            return facts
        # PEFT would ask for weights of those layers, too.
        config = facts.config | {"target_modules": sorted(facts.layers)} | dict.fromkeys(TARGETING[1:])
        return replace(facts, config=config, rewritten=tuple(sorted({*facts.rewritten, "target_modules"})))


def _check_sums(folder: Path, name: str) -> None:
    """Check an adapter that this service has handed out against the sums that came with it."""
    if (folder / MANIFEST).exists():
        manifest = read_json(folder / MANIFEST, name, _MAX_MANIFEST_BYTES)
        if isinstance(manifest, dict) and manifest.keys() == {"about", "files", "sum"}:
            try:
                verify(folder)
            except FolderDamaged as error:
                raise AdapterRejected(f"{name} is damaged: {error}.") from error
        (folder / MANIFEST).unlink()


def _write_config(folder: Path, facts: AdapterFacts, base: str, revision: str | None) -> list[str]:
    """Write the config as it is served, if it differs from the one that came; return the settings that differ."""
    said = {"base_model_name_or_path": base, "revision": revision}
    changed = {key: value for key, value in said.items() if facts.config.get(key) != value}
    if changed or facts.rewritten:
        # In the order it came: of rank_pattern, the first key that matches holds.
        content = json.dumps(facts.config | changed, indent=2) + "\n"
        (folder / CONFIG).write_text(content, encoding="utf-8")
    return sorted({*changed, *facts.rewritten})


@singleton
def get_adapter_intake() -> AdapterIntake:
    """Return the process's adapter intake."""
    settings = get_settings()
    return AdapterIntake(
        get_database(),
        settings.home / "adapters",
        (settings.home, *settings.model_dirs),
        settings.max_upload_bytes,
        get_model_files(),
        get_model_facts(),
        get_downloads(),
        SystemClock(),
    )
