"""Processes that load models are given what they need of the environment, and none of its secrets."""

import pytest

from core.environment import without_secrets

SECRETS = (
    "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "PEFT_STUDIO_API_KEY", "PEFT_STUDIO_DATABASE_URL", "PGPASSWORD",
    "OPENAI_API_KEY", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "UV_INDEX_PASSWORD", "hf_token",
)  # fmt: skip


@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_is_left_out(name: str) -> None:
    assert without_secrets({name: "canary", "PATH": "/bin"}) == {"PATH": "/bin"}


@pytest.mark.parametrize(
    "name",
    ["PATH", "HOME", "HF_HOME", "HF_TOKEN_PATH", "TOKENIZERS_PARALLELISM", "CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH",
     "PEFT_STUDIO_PARENT_PID", "OMP_NUM_THREADS", "SSL_CERT_FILE"],
)  # fmt: skip
def test_the_rest_is_passed_on(name: str) -> None:
    assert without_secrets({name: "x"}) == {name: "x"}
