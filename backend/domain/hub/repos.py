"""A repository of the Hub: its kind, its names and its addresses."""

import re
from dataclasses import dataclass

from core.errors import (
    AccessDenied,
    DatasetGated,
    DatasetNotFound,
    DatasetRejected,
    ModelGated,
    ModelNotFound,
    ModelRejected,
    NotFound,
    Rejected,
)

# Source: huggingface_hub/utils/_validators.py, REPO_ID_REGEX and validate_repo_id.
_NAME = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?"
_ID = re.compile(rf"(?:{_NAME}/)?{_NAME}")
_MAX_ID_CHARACTERS = 96
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._/-]{0,99}")


@dataclass(frozen=True)
class RepoKind:
    """A kind of repository: its names, its addresses and its errors.

    Attributes:
        word, plural: What one is called; the plural is also the name of the kind's routes below `/api`.
        file_prefix: Stands before the id in the address of a file.
        folder_prefix: Begins the name of a repository's folder in the Hub's cache.
        terms: What a user must accept on the page of a gated repository.
        id_field: The member of a problem document that names it.
        missing, gated, rejected: The errors of this kind.
    """

    word: str
    plural: str
    file_prefix: str
    folder_prefix: str
    terms: str
    id_field: str
    missing: type[NotFound]
    gated: type[AccessDenied]
    rejected: type[Rejected]

    def check_revision(self, revision: str) -> None:
        """Refuse what cannot be a branch, tag or commit.

        Raises:
            Rejected: An error of the repository's kind. The revision has characters that no revision has, or it is too
                long.
        """
        if not _REVISION.fullmatch(revision) or ".." in revision or "//" in revision or revision.endswith("/"):
            raise self.rejected(f"{revision[:100]!r} is not the name of a branch, a tag or a commit.")


MODELS = RepoKind(
    word="model",
    plural="models",
    file_prefix="",
    folder_prefix="models--",
    terms="licence",
    id_field="model_id",
    missing=ModelNotFound,
    gated=ModelGated,
    rejected=ModelRejected,
)
DATASETS = RepoKind(
    word="dataset",
    plural="datasets",
    file_prefix="datasets/",
    folder_prefix="datasets--",
    terms="terms",
    id_field="hub_id",
    missing=DatasetNotFound,
    gated=DatasetGated,
    rejected=DatasetRejected,
)


@dataclass(frozen=True)
class Repo:
    """One repository.

    Attributes:
        id: `name` or `owner/name`.
    """

    kind: RepoKind
    id: str

    def __str__(self) -> str:
        return self.id

    @property
    def api_path(self) -> str:
        """The path of the API's answers about the repository. More are below it."""
        return f"/api/{self.kind.plural}/{self.id}"

    @property
    def file_path(self) -> str:
        """The path below which its files are."""
        return f"/{self.kind.file_prefix}{self.id}"

    @property
    def folder_name(self) -> str:
        """Its folder's name in the Hub's cache."""
        return f"{self.kind.folder_prefix}{self.id.replace('/', '--')}"

    def check(self, revision: str | None = None) -> None:
        """Refuse what cannot be an id of the Hub, or a branch, tag or commit.

        Raises:
            Rejected: An error of the repository's kind. The id or the revision has characters that the Hub does not
                allow, or it is too long.
        """
        allowed = _ID.fullmatch(self.id) and len(self.id) <= _MAX_ID_CHARACTERS
        if not allowed or "--" in self.id or ".." in self.id or self.id.endswith(".git"):
            raise self.kind.rejected(
                f"A {self.kind.word} id is `name` or `owner/name` of letters, digits, '-', '_' and '.', without '--' "
                f"or '..', {_MAX_ID_CHARACTERS} characters at most; {self.id[:_MAX_ID_CHARACTERS]!r} is not."
            )
        if revision is not None:
            self.kind.check_revision(revision)

    def not_found(self) -> NotFound:
        """Return the error of a repository that does not exist, or that the Hub hides from the client."""
        return self.kind.missing(
            f"The Hub has no {self.kind.word} {self.id}, or it is private and HF_TOKEN has no access."
        )

    def no_such_revision(self) -> NotFound:
        """Return the error of a branch, tag or commit that does not exist."""
        return self.kind.missing(f"{self.id} has no such revision.")

    def access_to_ask_for(self) -> AccessDenied:
        """Return the error of a gated repository."""
        return self.kind.gated(
            f"{self.id} is gated: accept its {self.kind.terms}, and set HF_TOKEN, or send X-HF-Token, with your token.",
            **{self.kind.id_field: self.id},
        )


def model_repo(model_id: str) -> Repo:
    """Return a model's repository. Adapters are in model repositories too."""
    return Repo(MODELS, model_id)


def dataset_repo(dataset_id: str) -> Repo:
    """Return a dataset's repository."""
    return Repo(DATASETS, dataset_id)
