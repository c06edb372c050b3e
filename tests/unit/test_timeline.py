from __future__ import annotations

from datetime import datetime

from hypothesis import given
from hypothesis import strategies as st

from sb3_mlflow_ckpt.timeline import Timeline

_NOON = "2026-01-01T12:00:00.000Z"


def test_a_time_that_comes_later_is_kept_as_it_is() -> None:
    timeline = Timeline()
    timeline.note("2026-01-01T11:59:59.999Z")
    assert timeline.after(_NOON) == _NOON


def test_a_clock_that_is_put_back_goes_on_from_the_last_time() -> None:
    timeline = Timeline()
    timeline.note(_NOON)
    assert timeline.after("2025-06-01T00:00:00.000Z") == "2026-01-01T12:00:00.001Z"
    assert timeline.after("2025-06-01T00:00:00.000Z") == "2026-01-01T12:00:00.002Z"


def test_what_is_no_time_is_passed_over() -> None:
    timeline = Timeline()
    for value in (None, 3, "yesterday", ["x"], "9999-12-31T23:59:59.999Z"):
        timeline.note(value)
    assert timeline.after(_NOON) == _NOON


@given(st.lists(st.datetimes(min_value=datetime(1971, 1, 1), max_value=datetime(9000, 1, 1))))
def test_times_ascend_as_texts_whatever_the_clock_does(moments: list[datetime]) -> None:
    timeline = Timeline()
    given_out = [timeline.after(f"{moment.isoformat(timespec='milliseconds')}Z") for moment in moments]
    assert given_out == sorted(set(given_out))
