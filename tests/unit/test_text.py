"""Small pieces of messages."""

from __future__ import annotations

import pytest

from ghosttrain.text import byte_size, clock, counted, listed, one_line


def test_a_list_is_cut_and_the_rest_counted() -> None:
    assert listed([]) == ""
    assert listed("abc") == "a, b, c"
    assert listed("abcde", most=2, joiner="; ") == "a; b and 3 more"


def test_an_error_is_one_line_and_has_a_name_at_least() -> None:
    assert one_line(" a\n  b\tc ") == "a b c"
    assert one_line(ValueError("two\nlines")) == "two lines"
    assert one_line(MemoryError()) == "MemoryError"
    assert one_line("") == ""


def test_counts_have_a_plural() -> None:
    assert [counted(n, "file") for n in (0, 1, 2)] == ["0 files", "1 file", "2 files"]


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (2.5e9, "2.5 GB"), (3e16, "30000.0 TB")],
)
def test_sizes_are_powers_of_1000(count: float, text: str) -> None:
    assert byte_size(count) == text


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.4, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3600, "1:00:00")]
)
def test_clock(seconds, shown):
    assert clock(seconds) == shown
