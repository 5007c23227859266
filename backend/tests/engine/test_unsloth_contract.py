"""Without a GPU: every argument that we pass to Unsloth is one that the installed Unsloth takes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from server import BACKEND
from test_methods import config_for

from domain.algorithms import Algorithm
from engine.unsloth_backend import unsloth_arguments

SCRIPT = """
import inspect, json, os
from engine.guards import hide_broken_torchvision
hide_broken_torchvision()
import unsloth
parameters = inspect.signature(unsloth.FastLanguageModel.from_pretrained).parameters
print(json.dumps({name: parameter.kind.name for name, parameter in parameters.items()}))
"""


@pytest.fixture(scope="module")
def parameters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    environment = os.environ | {
        "UNSLOTH_ALLOW_CPU": "1",
        "UNSLOTH_SKIP_TORCHVISION_CHECK": "1",
        "HF_HUB_OFFLINE": "1",
        "UNSLOTH_COMPILE_LOCATION": str(tmp_path_factory.mktemp("unsloth")),
        "UNSLOTH_DISABLE_STATISTICS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=BACKEND, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("algorithm", Algorithm)
def test_every_argument_is_in_the_real_signature(parameters: dict[str, str], algorithm: Algorithm) -> None:
    arguments = unsloth_arguments(Path("model"), config_for(algorithm))
    named = {name for name, kind in parameters.items() if kind != "VAR_KEYWORD"}
    assert set(arguments) <= named
    assert arguments["load_in_4bit"] == (algorithm is Algorithm.QLORA)
