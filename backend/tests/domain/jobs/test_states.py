"""The table of transitions."""

from hypothesis import given
from hypothesis import strategies as st

from domain.jobs.states import ACTIVE_STATES, FINAL_STATES, TRANSITIONS, JobState, may_change


def test_final_states_stay_final() -> None:
    assert {JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED} == FINAL_STATES
    assert not any(may_change(final, state) for final in FINAL_STATES for state in JobState)


def test_every_state_is_in_the_table_and_reachable() -> None:
    assert set(TRANSITIONS.table) == set(JobState)
    reached = {JobState.QUEUED}
    for _ in JobState:
        reached |= {following for state in reached for following in TRANSITIONS.table[state]}
    assert reached == set(JobState)


@given(st.sampled_from(JobState))
def test_only_what_is_in_an_engine_can_succeed_or_be_interrupted(state: JobState) -> None:
    assert may_change(state, JobState.SUCCEEDED) == (state in ACTIVE_STATES - {JobState.PREPARING})
    assert may_change(state, JobState.INTERRUPTED) == (state in ACTIVE_STATES)
    assert may_change(state, JobState.PREPARING) == (state is JobState.QUEUED)


@given(st.sampled_from(JobState))
def test_everything_unfinished_can_be_cancelled_and_all_but_the_running_queued_again(state: JobState) -> None:
    assert may_change(state, JobState.CANCELLED) == (state not in FINAL_STATES)
    assert may_change(state, JobState.QUEUED) == (state in {JobState.PAUSED, JobState.INTERRUPTED})
