"""Sizes as people read them."""

import pytest

from optimum_llava_ov.units import readable_rate, readable_size


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (999.6, "1.00 kB"),
        (3_421, "3.42 kB"),
        (9_996, "10.0 kB"),
        (99_960, "100 kB"),
        (547_915, "548 kB"),
        (999_499, "999 kB"),
        (999_500, "1.00 MB"),
        (4_700_000_000, "4.70 GB"),
        (13_300_000_000, "13.3 GB"),
        (2_500_000_000_000_000, "2,500 TB"),
    ],
)
def test_three_digits_and_a_unit(size, text):
    assert readable_size(size) == text


@pytest.mark.parametrize(
    ("rate", "text"), [(0.514, "0.51"), (7.634, "7.63"), (9.996, "10.0"), (38.21, "38.2"), (2506.2, "2,506")]
)
def test_a_rate_has_no_more_digits_than_a_measurement(rate, text):
    assert readable_rate(rate) == text
