import pytest

from domain.hub.tree import RepoFile
from services.hub.download_flight import DownloadCancelled, Flight, Progress
from tests.support.hub_double import ManualClock

ONE, TWO = (RepoFile(name, 1000, "0" * 40, None) for name in ("one", "two"))


def test_progress_is_known_once_the_total_is() -> None:
    flight = Flight(ManualClock())
    assert flight.progress() is None
    flight.total_bytes = 10
    assert flight.progress() == Progress(0, 10, None)


def test_speed_is_of_the_last_ten_seconds_and_not_of_what_was_here_already() -> None:
    clock = ManualClock()
    flight = Flight(clock)
    flight.total_bytes = 2000
    flight.has(ONE, 500)  # resumed
    speeds = []
    for size in (600, 700, 700):
        clock.advance(2)
        flight.has(ONE, size, 100)
        progress = flight.progress()
        assert progress is not None
        speeds.append(progress.bytes_per_s)
    assert speeds == [50.0, 50.0, 50.0]

    clock.advance(11)
    stalled = flight.progress()
    assert stalled == Progress(700, 2000, 0.0)


def test_bytes_are_of_all_files_together_and_a_restart_takes_them_back() -> None:
    flight = Flight(ManualClock())
    flight.total_bytes = 2000
    for file, size in ((ONE, 400), (TWO, 300), (ONE, 0)):
        flight.has(file, size, size)
    progress = flight.progress()
    assert progress is not None
    assert progress.done_bytes == 300


def test_a_flight_that_nobody_waits_for_says_so() -> None:
    flight = Flight(ManualClock())
    flight.check()
    flight.stopped.set()
    with pytest.raises(DownloadCancelled):
        flight.check()
