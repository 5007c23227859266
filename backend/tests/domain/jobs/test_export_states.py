"""The table of transitions of exports."""

from hypothesis import given
from hypothesis import strategies as st

from domain.jobs.export_states import FINAL_STATES, TRANSITIONS, ExportState, may_change


def test_every_state_is_in_the_table_and_reachable() -> None:
    assert set(TRANSITIONS.table) == set(ExportState)
    reached = {ExportState.QUEUED}
    for _ in ExportState:
        reached |= {following for state in reached for following in TRANSITIONS.table[state]}
    assert reached == set(ExportState)


@given(st.sampled_from(ExportState), st.sampled_from(ExportState))
def test_final_states_stay_final_and_only_what_runs_ends(current: ExportState, following: ExportState) -> None:
    if current in FINAL_STATES:
        assert not may_change(current, following)
    if following in (ExportState.SUCCEEDED, ExportState.FAILED, ExportState.QUEUED):
        assert may_change(current, following) == (current is ExportState.RUNNING)
    if following is ExportState.CANCELLED:
        assert may_change(current, following) == (current not in FINAL_STATES)
