"""Which files make a dataset."""

from typing import Any

import pytest

from core.errors import DatasetRejected
from domain.datasets.parts import choose

PLAIN = ["README.md", ".gitattributes", "train.jsonl", "test.jsonl", "dataset_infos.json"]
SHARDED = [f"data/{split}-{n:05d}-of-00002.parquet" for split in ("train", "test") for n in range(2)]
CONVERTED = [f"{config}/{split}/0000.parquet" for config in ("main", "socratic") for split in ("train", "test")]


def paths(files: list[str], card: Any = None, config: str | None = None, split: str | None = None) -> list[str]:
    return list(choose(files, card, config, split).paths)


@pytest.mark.parametrize(
    ("files", "config", "split", "found"),
    [
        (PLAIN, None, None, ["train.jsonl"]),
        (PLAIN, None, "test", ["test.jsonl"]),
        (SHARDED, None, None, SHARDED[:2]),
        (SHARDED, "default", "test", SHARDED[2:]),
        (CONVERTED, "main", "test", ["main/test/0000.parquet"]),
        (["anything.csv"], None, None, ["anything.csv"]),
        (["data/dev.json.gz"], None, "validation", ["data/dev.json.gz"]),
        (["training_set.csv", "evaluation.csv"], None, "train", ["training_set.csv"]),
        (["brain.csv"], None, None, ["brain.csv"]),  # no keyword inside a word
        (["train.csv", "train.parquet"], None, None, ["train.parquet"]),
        (["en/a.jsonl", "fr/a.jsonl"], "fr", None, ["fr/a.jsonl"]),
    ],
)
def test_names_of_files_and_folders_tell(files: list[str], config: Any, split: Any, found: list[str]) -> None:
    assert paths(files, None, config, split) == found


def test_files_of_another_format_are_named() -> None:
    assert choose(["train.csv", "train.parquet"], None, None, None).left_out == ("train.csv",)


@pytest.mark.parametrize(
    ("card", "config", "split", "found"),
    [
        ({"configs": [{"config_name": "default", "data_files": "d/*.csv"}]}, None, None, ["d/a.csv", "d/b.csv"]),
        ({"configs": [{"config_name": "x", "data_files": ["d/a.csv", "e/**"]}]}, "x", None, ["d/a.csv", "e/f/c.csv"]),
        (
            {
                "configs": [
                    {"config_name": "x", "data_files": [{"split": "test", "path": "d/a.csv"}]},
                    {"config_name": "y", "default": True, "data_files": [{"split": "extra", "path": ["d/?.csv"]}]},
                ]
            },
            None,
            "extra",
            ["d/a.csv", "d/b.csv"],
        ),
        ({"configs": [{"config_name": "x", "data_dir": "d", "data_files": {"test": "b.csv"}}]}, "x", None, ["d/b.csv"]),
        ({"configs": [{"config_name": "x", "data_dir": "d"}]}, None, None, ["d/a.csv", "d/b.csv"]),
        ({"license": "mit"}, None, None, ["d/a.csv", "d/b.csv", "e/f/c.csv"]),
    ],
)
def test_the_card_tells(card: Any, config: Any, split: Any, found: list[str]) -> None:
    assert paths(["d/a.csv", "d/b.csv", "e/f/c.csv", "README.md"], card, config, split) == found


@pytest.mark.parametrize(
    ("files", "card", "config", "split", "words"),
    [
        ([], None, None, None, "no data files"),
        (["make.py"], None, None, None, "script"),
        (PLAIN, None, None, "validation", r"no split 'validation'; there are \['test', 'train'\]"),
        (["test.csv", "validation.csv"], None, None, None, "more than one split"),
        (CONVERTED, None, None, None, r"more than one configuration; there are \['main', 'socratic'\]"),
        (PLAIN, None, "other", None, "no configuration 'other'"),
        (PLAIN, {"configs": [{"config_name": "a"}, {"config_name": "b"}]}, None, None, "more than one configuration"),
        (PLAIN, {"configs": [{"config_name": "a", "data_files": "../../etc/*"}]}, None, None, "no data files"),
        (PLAIN, {"configs": [{"config_name": "a", "data_files": {"x": None}}]}, None, None, "no data files"),
    ],
)
def test_what_is_not_there_is_told(files: list[str], card: Any, config: Any, split: Any, words: str) -> None:
    with pytest.raises(DatasetRejected, match=words):
        choose(files, card, config, split)
