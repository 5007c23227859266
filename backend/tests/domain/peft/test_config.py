"""Configurations as they are stored and as clients send parts of them."""

import pytest
from pydantic import ValidationError

from domain.configure import MachineFacts, configure
from domain.peft.algorithms import Algorithm
from domain.peft.config import _BEFORE, PARAMETER_NAMES, PeftOverrides, recorded
from domain.peft.foreign_names import _INSTEAD

CPU = MachineFacts(has_gpu=False, supports_bf16=False)
CONFIG = configure(Algorithm.LORA, use_case=None, overrides={}, machine=CPU).config


def test_what_was_stored_before_a_setting_existed_is_read_as_what_was_done_then() -> None:
    stored = CONFIG.model_dump(mode="json", exclude=set(_BEFORE))
    assert recorded(stored) == CONFIG
    assert recorded(stored | {"adam_beta1": 0.5}).adam_beta1 == 0.5


@pytest.mark.parametrize("values", [None, [], "x", {}, {"rank": 1}])
def test_what_is_no_configuration_is_not_read_as_one(values: object) -> None:
    with pytest.raises(ValidationError):
        recorded(values)


@pytest.mark.parametrize("name", sorted(_INSTEAD))
def test_another_programs_name_for_a_setting_is_refused_with_what_to_send(name: str) -> None:
    assert name not in PARAMETER_NAMES
    with pytest.raises(ValidationError, match=f"{name}: send ") as caught:
        PeftOverrides.model_validate({name: 1, "rank": 8})
    sent = caught.value.errors()[0]["msg"].partition("send ")[2]
    assert sent.startswith("nothing") or any(parameter in sent for parameter in [*PARAMETER_NAMES, "qlora"])
