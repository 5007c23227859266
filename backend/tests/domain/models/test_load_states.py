"""The table of transitions of bases in memory."""

from hypothesis import given
from hypothesis import strategies as st

from domain.models.load_states import GONE, TRANSITIONS, UNDER_WAY, USABLE, LoadState, may_change


def test_every_state_is_in_the_table_and_reachable() -> None:
    assert set(TRANSITIONS) == set(LoadState)
    reached = {LoadState.QUEUED}
    for _ in LoadState:
        reached |= {following for state in reached for following in TRANSITIONS[state]}
    assert reached == set(LoadState)


def test_every_state_is_of_one_kind() -> None:
    assert set(LoadState) == UNDER_WAY | USABLE | GONE
    assert len(UNDER_WAY) + len(USABLE) + len(GONE) == len(LoadState)


@given(st.sampled_from(LoadState), st.sampled_from(LoadState))
def test_what_is_loaded_is_never_loaded_again_and_what_is_gone_never_comes_back(
    current: LoadState, following: LoadState
) -> None:
    if current not in UNDER_WAY:
        assert not (following in UNDER_WAY and may_change(current, following))
    if current in GONE:
        assert not (following in USABLE and may_change(current, following))
    if following is LoadState.UNLOADING:
        assert may_change(current, following) == (current is not LoadState.UNLOADING)
