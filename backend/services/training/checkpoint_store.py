"""The server's view of the checkpoints that engines write: listed, handed on, deleted."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.errors import CheckpointNotFound, CheckpointUnusable
from core.files import finish_replacing, whole_folder
from core.manifest import FolderDamaged, read_manifest, verify


@dataclass(frozen=True)
class CheckpointFacts:
    """One checkpoint. `problem` says what is wrong with it, or is None."""

    id: str
    step: int
    size_bytes: int
    created_s: float
    problem: str | None


class CheckpointStore:
    """Keeps a folder for each job, and in it a folder for each checkpoint.

    Args:
        folder: Holds all of them.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def folder_of(self, job_id: str) -> Path:
        """Return where a job's checkpoints are, or will be."""
        return self._folder / job_id

    def all(self, job_id: str, *, check_sums: bool) -> list[CheckpointFacts]:
        """Return a job's checkpoints, oldest first.

        Args:
            job_id: The job.
            check_sums: Whether to compare every file's sum, and not only its size.
        """
        checkpoints = (_facts(path, check_sums) for path in sorted(self.folder_of(job_id).glob("step-*")))
        return [facts for facts in checkpoints if facts is not None]

    def about(self, job_id: str, checkpoint_id: str | None) -> tuple[str, dict[str, Any]]:
        """Return the id and the manifest of one checkpoint, or of the newest that verifies.

        Raises:
            CheckpointNotFound: The job has no such checkpoint, or none at all.
            CheckpointUnusable: It does not verify.
        """
        wanted = [path for path in sorted(self.folder_of(job_id).glob("step-*")) if checkpoint_id in (None, path.name)]
        if not wanted:
            raise CheckpointNotFound(
                f"The job {job_id} has no checkpoint{f' {checkpoint_id}' if checkpoint_id else ''}."
            )
        problems = []
        for path in reversed(wanted):
            try:
                return path.name, verify(path)
            except FolderDamaged as error:
                problems.append(f"{path.name}: {error}")
        raise CheckpointUnusable(f"No checkpoint of the job {job_id} can be used: {'; '.join(problems)}.")

    def copy(self, job_id: str, checkpoint_id: str, to_job_id: str) -> None:
        """Give another job a checkpoint to begin with. Files are shared where the file system can link them.

        Raises:
            CheckpointUnusable: It was deleted meanwhile.
            StorageFull: No space is left.
        """
        try:
            with whole_folder(self.folder_of(to_job_id) / checkpoint_id) as folder:
                for path in (self.folder_of(job_id) / checkpoint_id).iterdir():
                    _link_or_copy(path, folder / path.name)
                verify(folder)
        except (FileNotFoundError, FolderDamaged) as error:
            self.delete(to_job_id)
            why = f"{job_id}/{checkpoint_id} was replaced by a newer one while it was copied; try again."
            raise CheckpointUnusable(why) from error

    def delete(self, job_id: str) -> None:
        """Delete a job's checkpoints, if there are any."""
        if self.folder_of(job_id).exists():
            shutil.rmtree(self.folder_of(job_id))

    def remove_leftovers(self) -> None:
        """Delete unfinished checkpoints, and put back those that were being replaced.

        Folders of jobs that the database does not know stay: the database may be another one, or an older copy.
        """
        for folder in self._folder.glob("job_*/"):
            finish_replacing(folder)
            for temporary in folder.glob(".step-*.tmp"):
                shutil.rmtree(temporary)


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:  # a file system without links
        shutil.copyfile(source, target)


def _facts(path: Path, check_sums: bool) -> CheckpointFacts | None:
    """Return one checkpoint, or None if its run has just deleted it."""
    problem = None
    try:
        (verify if check_sums else read_manifest)(path)
    except FolderDamaged as error:
        problem = str(error)
    try:
        size = sum(file.stat().st_size for file in path.iterdir())
        return CheckpointFacts(path.name, int(path.name.removeprefix("step-")), size, path.stat().st_mtime, problem)
    except FileNotFoundError:
        return None
