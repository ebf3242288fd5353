from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpm.cli import times

NOW = 1763879880.0  # 2025-11-23T06:38:00Z
MOMENTS = st.datetimes(min_value=datetime(1970, 1, 2), max_value=datetime(2025, 11, 22), timezones=st.just(UTC))  # noqa: DTZ001


@pytest.mark.parametrize(
    ("text", "seconds_ago"),
    [
        ("now", 0),
        ("-10m", 600),
        ("-1h30m", 5400),
        ("-2d", 172800),
        ("-1w", 604800),
        ("-90s", 90),
        ("5 minutes ago", 300),
        ("1 minute ago", 60),
        ("1 hour 30 minutes ago", 5400),
        ("2 days, 1 hour ago", 176400),
        ("90 secs ago", 90),
        ("5min ago", 300),
        ("5 Minutes Ago", 300),
        ("2025-11-23T06:38:00Z", 0),
        ("2025-11-23T07:38:00+01:00", 0),
        ("2025-11-23 07:38:00+01:00", 0),
        ("2025-11-23T01:08-05:30", 0),
        ("2025-11-23T07:38", 0),
        ("2025-11-23", 27480),
        ("20251123", 27480),
        ("1763879880", 0),
        ("@1763879880", 0),
        ("1763879879.5", 0.5),
        ("  -10m ", 600),
    ],
)
def test_times_are_parsed(text: str, seconds_ago: float) -> None:
    assert times.parse(text, NOW, zone=timezone(timedelta(hours=1))) == NOW - seconds_ago


@pytest.mark.parametrize(
    "text", ["", "10m", "+10m", "-10", "-m", "-10y", "minutes ago", "5 ago", "5 fortnights ago", "yesterday", "25:00",
             "2025-13-01", "2025-11-23T", "1e9", "nan", "inf", "-10m ago", "²", "0x10", "9" * 400]
)  # fmt: skip
def test_an_invalid_time_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"not a time|in the future"):
        times.parse(text, NOW)


def test_the_future_is_refused_except_for_a_small_clock_skew() -> None:
    assert times.parse("2025-11-23T06:38:59Z", NOW) == NOW + 59
    with pytest.raises(ValueError, match="is in the future"):
        times.parse("2025-11-23T06:40:00Z", NOW)


def test_a_time_before_1970_is_refused() -> None:
    with pytest.raises(ValueError, match="before 1970"):
        times.parse("1969-12-31T23:59:59Z", NOW)
    with pytest.raises(ValueError, match="before 1970"):
        times.parse("-99999d", NOW)


def test_the_zone_of_the_system_is_the_default() -> None:
    """The fixture of this directory sets the zone to Berlin: +01:00 in winter, +02:00 in summer."""
    assert times.parse("2025-11-23T07:38:00", NOW) == NOW
    assert times.parse("2025-07-01T12:00:00", NOW) == datetime(2025, 7, 1, 10, tzinfo=UTC).timestamp()
    # 02:30 occurs twice on 26 October: the first, still +02:00, is meant
    assert times.parse("2025-10-26T02:30:00", NOW) == datetime(2025, 10, 26, 0, 30, tzinfo=UTC).timestamp()


@given(MOMENTS, st.integers(-14 * 60, 14 * 60))
def test_iso_with_any_offset_is_the_same_moment(moment: datetime, offset_minutes: int) -> None:
    elsewhere = moment.astimezone(timezone(timedelta(minutes=offset_minutes)))
    assert times.parse(elsewhere.isoformat(), NOW) == moment.timestamp()


@given(MOMENTS, st.integers(-14 * 60, 14 * 60))
def test_the_zone_applies_only_without_an_offset(moment: datetime, offset_minutes: int) -> None:
    zone = timezone(timedelta(minutes=offset_minutes))
    assert times.parse(moment.astimezone(zone).replace(tzinfo=None).isoformat(), NOW, zone) == moment.timestamp()
    assert times.parse(moment.isoformat(), NOW, zone) == moment.timestamp()


@given(st.dictionaries(st.sampled_from("wdhms"), st.integers(0, 50), min_size=1))
def test_short_and_worded_relative_times_agree(parts: dict[str, int]) -> None:
    names = {"w": "weeks", "d": "days", "h": "hours", "m": "minutes", "s": "seconds"}
    short = "-" + "".join(f"{count}{unit}" for unit, count in parts.items())
    words = " ".join(f"{count} {names[unit]}" for unit, count in parts.items()) + " ago"
    span = timedelta(**{names[unit]: count for unit, count in parts.items()})
    assert times.parse(short, NOW) == times.parse(words, NOW) == NOW - span.total_seconds()


@given(st.text(max_size=30) | st.from_regex(r"[-@+0-9wdhmsTZ: .]{1,30}"))
def test_any_text_is_a_past_moment_or_an_error_with_a_remedy(text: str) -> None:
    try:
        at, refusal = times.parse(text, NOW), ""
    except ValueError as error:
        at, refusal = NOW, str(error)
    assert 0 <= at <= NOW + times.SKEW_S
    assert not refusal or "use ISO 8601" in refusal or "in the future" in refusal
