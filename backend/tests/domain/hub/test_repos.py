"""A repository's places and errors follow from its kind."""

import pytest

from core import errors
from domain.hub.repos import Repo, dataset_repo, model_repo
from domain.hub.tree import tree_from_wire

MODEL, DATASET = model_repo("me/x"), dataset_repo("me/x")


def test_a_kind_has_places_of_its_own() -> None:
    assert (MODEL.api_path, MODEL.file_path, MODEL.folder_name) == ("/api/models/me/x", "/me/x", "models--me--x")
    assert (DATASET.api_path, DATASET.file_path, DATASET.folder_name) == (
        "/api/datasets/me/x",
        "/datasets/me/x",
        "datasets--me--x",
    )


@pytest.mark.parametrize(
    ("repo", "missing", "gated", "rejected", "words"),
    [
        (MODEL, errors.ModelNotFound, errors.ModelGated, errors.ModelRejected, "licence"),
        (DATASET, errors.DatasetNotFound, errors.DatasetGated, errors.DatasetRejected, "terms"),
    ],
)
def test_a_kind_has_errors_of_its_own(
    repo: Repo,
    missing: type[errors.StudioError],
    gated: type[errors.StudioError],
    rejected: type[errors.StudioError],
    words: str,
) -> None:
    assert type(repo.not_found()) is type(repo.no_such_revision()) is missing
    assert type(repo.access_to_ask_for()) is gated
    assert f"accept its {words}" in repo.access_to_ask_for().detail
    with pytest.raises(rejected, match="no path in a repository"):
        tree_from_wire(repo, [{"type": "file", "path": "../x"}])
    for revision in ("a..b", "-x", "a//b", "x" * 101, "a/"):
        with pytest.raises(rejected, match="not the name of a branch"):
            repo.check(revision)
    for wrong in ("", "a/b/c", "../x", "a--b", "x.git", "/x", "x" * 97):
        with pytest.raises(rejected, match=f"A {repo.kind.word} id is"):
            Repo(repo.kind, wrong).check()
    repo.check("refs/convert/parquet")


def test_a_rejected_dataset_always_lists_its_errors() -> None:
    assert errors.DatasetRejected("x").extras == {"errors": []}
    assert errors.DatasetRejected("x", errors=[1], rows=2).extras == {"errors": [1], "rows": 2}
