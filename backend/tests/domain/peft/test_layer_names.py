"""Expressions from elsewhere are matched as PEFT would, and never for longer than is allowed."""

import pytest

from domain.peft.layer_names import ExpressionRejected, Matcher

Q = "model.layers.0.self_attn.q_proj"


def test_an_expression_of_exponential_time_is_given_up() -> None:
    with pytest.raises(ExpressionRejected, match="too long to be matched"):
        Matcher(0.05).matches("(?:a|a)*[!?]", "a" * 60)


def test_the_limit_is_for_all_matches_together() -> None:
    now = [0.0]
    matcher = Matcher(10.0, lambda: now[0])
    assert matcher.key_of(["k_proj", "q_proj"], Q) == "q_proj"
    now[0] = 10.0
    with pytest.raises(ExpressionRejected, match="too long to be matched"):
        matcher.matches("q_proj", Q)


@pytest.mark.parametrize("expression", ["(", "a{2,1}", "(" * 5000, "[", r"\p{L}", "(?P<a>x)(?P<a>y)", "x" * 30_000])
def test_what_is_no_expression_to_peft_is_refused(expression: str) -> None:
    with pytest.raises(ExpressionRejected):
        Matcher().matches(expression, Q)
