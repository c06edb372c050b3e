"""How single values are written on pages."""

from __future__ import annotations

import pytest

from sb3_mlflow_ckpt.runs.comparison import MISSING
from sb3_mlflow_ckpt.web import formats

ANYTHING = [
    None,
    True,
    0,
    -1,
    2**80,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "\udc80",
    [],
    [1],
    {},
    {"a": {}},
    object(),
]


@pytest.mark.parametrize("value", ANYTHING, ids=range(len(ANYTHING)))
def test_every_format_takes_any_value(value: object) -> None:
    for write in (formats.text, formats.block, formats.setting, formats.count, formats.reward, formats.size):
        assert isinstance(write(value), str)
    formats.moment(value)
    assert formats.between(value, value) in ("", "0 s")


def test_what_steers_a_text_is_shown_and_does_nothing() -> None:
    assert formats.text("a\nb\u202ec\x1b[31m") == "a\\x0ab\\u202ec\\x1b[31m"
    assert formats.block("first\n\tsecond\r\x00") == "first\n\tsecond\\x0d\\x00"


@pytest.mark.parametrize(
    ("seconds", "written"),
    [(0, "0 s"), (59.9, "59 s"), (60, "1 min"), (125, "2 min 5 s"), (7200, "2 h"), (93_600, "1 d 2 h"), (-5, "0 s")],
    ids=["nothing", "seconds", "a-minute", "minutes", "hours", "days", "backwards"],
)
def test_a_duration_has_its_two_greatest_units(seconds: float, written: str) -> None:
    assert formats.duration(seconds) == written


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (185_300, "185 kB"),
        (1.45e9, "1.4 GB"),
        (999_600, "1.0 MB"),
        (-1, ""),
    ],
    ids=["none", "bytes", "kilo", "hundreds", "giga", "rounds-up", "negative"],
)
def test_sizes_have_at_most_three_digits(value: float, written: str) -> None:
    assert formats.size(value) == written


def test_times_are_in_utc_whatever_their_zone() -> None:
    moment = formats.moment("2026-01-01T01:30:00.250+01:00")
    assert moment == formats.Moment("2026-01-01T00:30:00.250Z", "2026-01-01 00:30 UTC")
    assert formats.moment("2026-01-01T01:30:00") is None
    assert formats.between("2026-01-01T00:00:00Z", "2026-01-01T02:05:00Z") == "2 h 5 min"
    assert formats.between("2026-01-01T02:00:00Z", "2026-01-01T00:00:00Z") == ""


def test_settings_are_written_as_a_file_has_them() -> None:
    written = [formats.setting(value) for value in (None, True, 3e-4, "auto", [1, "a"], {"b": None}, MISSING)]
    assert written == ["null", "true", "0.0003", "auto", '[1, "a"]', '{"b": null}', "not set"]


def test_a_setting_of_any_length_is_cut() -> None:
    assert len(formats.setting("x" * 10**6)) < 3000


def test_rewards_have_a_minus_sign_that_lines_up() -> None:
    assert formats.reward(-1234.56) == "\N{MINUS SIGN}1,234.6"
    assert formats.reward(None) == formats.reward(True) == formats.reward(float("nan")) == ""
