"""A target that adapters are not put on is refused as what it is, wherever it is named."""

import pytest

from tests.support.rows import messages_jsonl
from tests.support.server import StudioServer
from tests.support.tiny_model import TINY_ID

pytestmark = pytest.mark.engine


@pytest.mark.parametrize(
    ("name", "words"),
    [("lm_head", "lm_head names the output head"), ("embed_tokens", "embed_tokens names an embedding")],
)
def test_a_head_or_an_embedding_as_a_target_is_named_as_such(studio: StudioServer, name: str, words: str) -> None:
    wanted = {"model_id": TINY_ID, "algorithm": "lora", "overrides": {"target_modules": ["q_proj", name]}}
    dataset = studio.upload(messages_jsonl())
    for path, body in (
        ("/api/peft/configure", wanted),
        ("/api/peft/load-model", wanted),
        ("/api/training/jobs", wanted | {"dataset_id": dataset["id"]}),
        ("/api/models/compatibility", {"model_id": TINY_ID, "algorithm": "lora", "target_modules": [name]}),
    ):
        answer = studio.http.post(path, json=body)
        assert answer.status_code == 422 and words in answer.json()["detail"], answer.text
        assert f"no linear layer named {name}" not in answer.text
