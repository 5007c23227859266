"""How an engine's events move a job on, and that what is stored is read back as it was."""

from hypothesis import given
from hypothesis import strategies as st

from domain.jobs.progress import EngineUsed, JobProgress, StepFigures

steps = st.integers(1, 50)


def figures(step: int) -> StepFigures:
    return StepFigures(
        step=step, total_steps=50, epoch=step / 10, loss=1.0, learning_rate=1e-4, grad_norm=None, step_s=0.5,
        step_tokens=10, tokens=10 * step, tokens_per_s=20.0, memory_bytes=1, elapsed_s=1.0, eta_s=2.0,
    )  # fmt: skip


@given(st.lists(st.one_of(steps.map(lambda step: ("step", step)), steps.map(lambda step: ("kept", step)), steps.map(
    lambda step: ("evaluated", step)))))  # fmt: skip
def test_what_was_recorded_stays_recorded_whatever_is_trained_again(events: list[tuple[str, int]]) -> None:
    progress = JobProgress()
    for name, step in events:
        before = progress
        if name == "step":
            progress = progress.stepped(figures(step))
            assert (progress.step, progress.fraction, progress.last) == (step, step / 50, figures(step))
        elif name == "kept":
            progress = progress.kept(step)
        else:
            progress = progress.evaluated(step)
        marks = [(p.recorded_step, p.evaluated_step, p.checkpoint_step) for p in (before, progress)]
        assert all(old <= new for old, new in zip(*marks, strict=True))
        assert JobProgress.model_validate(progress.as_json()) == progress


def test_only_what_is_known_is_stored() -> None:
    assert JobProgress().as_json() == {}
    assert JobProgress(forced=True).begun_with(5).as_json() == {"forced": True, "step": 5, "recorded_step": 5}
    assert JobProgress().started(3, 10).as_json() == {"step": 3, "total_steps": 10}


def test_how_the_adapter_computes_is_added_to_the_engine() -> None:
    progress = JobProgress().on_engine(EngineUsed(name="unsloth", reason="asked for", computation=None))
    assert progress.as_json() == {"engine": {"name": "unsloth", "reason": "asked for", "computation": None}}
    assert progress.computed("PEFT's layers").as_json()["engine"]["computation"] == "PEFT's layers"


@given(st.lists(st.booleans(), min_size=1))
def test_the_newest_failure_decides_whether_the_next_run_only_hands_out(pauses: list[bool]) -> None:
    progress = JobProgress().started(3, 10)
    assert not progress.hands_out
    for hands_out in pauses:
        before, progress = progress, progress.paused(hands_out=hands_out)
        assert progress.hands_out is hands_out
        assert progress.model_copy(update={"hands_out": before.hands_out}) == before  # and nothing else is changed
    # The next run of it begins, and knows.
    assert progress.started(3, 10).hands_out is pauses[-1]
    assert progress.started(3, 10).as_json()["hands_out"] is pauses[-1]
