import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thrifty.core import quantities as q

PARSERS = [q.parse_bytes, q.parse_flops, q.parse_seconds, q.parse_hours]
PARSERS += [q.parse_dollars, q.parse_tokens]


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (q.parse_bytes, "24GiB", 24 * 2**30),
        (q.parse_bytes, "24 gib", 24 * 2**30),
        (q.parse_bytes, "1e3GiB", 1000 * 2**30),
        (q.parse_bytes, "800MB", 8e8),
        (q.parse_bytes, "1,024 kB", 1.024e6),
        (q.parse_bytes, ".5 TiB", 2**39),
        (q.parse_bytes, "7B", 7),
        (q.parse_bytes, 7_000_000, 7e6),
        (q.parse_bytes, "2e10", 2e10),
        (q.parse_bytes, "24g", 24e9),
        (q.parse_bytes, "24 G", 24e9),
        (q.parse_bytes, "24gb", 24e9),
        (q.parse_flops, "3e17", 3e17),
        (q.parse_flops, "3E17", 3e17),
        (q.parse_flops, "+3e+17 FLOPs", 3e17),
        (q.parse_flops, "300PFLOP", 3e17),
        (q.parse_flops, "300 pflops", 3e17),
        (q.parse_flops, "300P", 3e17),
        (q.parse_flops, "3EFLOP", 3e18),
        (q.parse_flops, "3e2EFLOP", 3e20),
        (q.parse_flops, "1_000_000", 1e6),
        (q.parse_seconds, "90", 90),
        (q.parse_seconds, "1h30m", 5400),
        (q.parse_seconds, "1 h 30 min", 5400),
        (q.parse_seconds, "2d03h", 51 * 3600),
        (q.parse_seconds, "0h5m", 300),
        (q.parse_hours, "2", 7200),
        (q.parse_hours, 2, 7200),
        (q.parse_hours, "45m", 2700),
        (q.parse_hours, "2H", 7200),
        (q.parse_dollars, "$20", 20),
        (q.parse_dollars, "20$", 20),
        (q.parse_dollars, " $ 1,234.50 ", 1234.5),
        (q.parse_dollars, "20 usd", 20),
        (q.parse_dollars, "$1.5k", 1500),
        (q.parse_tokens, "20M", 2e7),
        (q.parse_tokens, "500K", 5e5),
        (q.parse_tokens, "20 M tokens", 2e7),
        (q.parse_tokens, "1.5b", 1.5e9),
    ],
)
def test_parses(parse, text, value):
    assert parse(text) == pytest.approx(value, rel=1e-12)


NONSENSE = [
    *("", "  ", "0", "-3", "nan", "inf", "1e999", "1e-999", "abc", "3 parsecs", "3/h", "2 per h"),
    *("1,5", "1,0000", "1..2", "--3", "1__0", "3e", "3 3", "€20", "12:30", "²", "\ud800", "3\0"),
    *("7" * 100_000 + "x", 0, -1.5, math.nan, math.inf, 10**400, 10**5000, True, None, [1], {}),
]


@pytest.mark.parametrize("parse", PARSERS)
@pytest.mark.parametrize("number", range(len(NONSENSE)))
def test_refuses_with_a_hint(parse, number):
    with pytest.raises(ValueError, match=r"\nhint: ") as refusal:
        parse(NONSENSE[number])
    assert len(str(refusal.value)) < 500


@pytest.mark.parametrize(
    ("parse", "text", "message"),
    [
        (q.parse_flops, "3E", "unknown unit"),  # 3e18, or 3e17 cut short?
        (q.parse_flops, "3e17 FLOP/s", "is a rate"),
        (q.parse_flops, "0", "more than zero"),
        (q.parse_bytes, "3GiBB", "GiB"),
        (q.parse_seconds, "2h30", "without a unit"),  # minutes, or seconds?
        (q.parse_hours, "2h30", "without a unit"),
        (q.parse_seconds, "2h -30m", "cannot read"),
        (q.parse_dollars, "£20", "not in US dollars"),
        (q.parse_dollars, "₹20", "not in US dollars"),
        (q.parse_dollars, "20 EUR", "unknown unit 'eur'"),
        (q.parse_dollars, "$2/h", "is a rate"),
        (q.parse_dollars, "$", "missing"),
        (q.parse_tokens, "20MB", "unknown unit"),
        (q.parse_tokens, "tokens", "missing"),
        (q.parse_bytes, "5 GiB 3 MiB", "cannot read"),  # only times are sums
        (q.parse_bytes, "24", r"without a unit\nhint: did you mean 24GiB\?"),
        (q.parse_bytes, 24, r"did you mean 24GiB\?"),
        (q.parse_bytes, "2e9TiB", "more memory than any run can use"),
        (q.parse_flops, "1e31", "more FLOPs than any run can use"),
        (q.parse_flops, "3x", "k, M, G, T, P, E or Z before it"),
        (q.parse_tokens, "2e99", "'2e99' is more tokens than any run can use"),
        (q.parse_hours, "1e9", "more hours than any run can use"),
        (q.parse_seconds, "40000d", "more time than any run can use"),
        (q.parse_dollars, "1e16", "more dollars than any run can use"),
    ],
)
def test_says_what_is_wrong(parse, text, message):
    with pytest.raises(ValueError, match=message):
        parse(text)


@pytest.mark.parametrize(
    ("show", "value", "text"),
    [
        (q.format_bytes, 24 * 2**30, "24 GiB"),
        (q.format_bytes, 999.7 * 2**20, "1000 MiB"),
        (q.format_bytes, 1023 * 2**20, "1023 MiB"),
        (q.format_bytes, 1023.6 * 2**20, "1 GiB"),
        (q.format_bytes, 500, "500 B"),
        (q.format_bytes, 0, "0 B"),
        (q.format_bytes, -3 * 2**20, "-3 MiB"),
        (q.format_flops, 3.2e17, "320 PFLOP"),
        (q.format_flops, 999.4e12, "999 TFLOP"),
        (q.format_flops, 999.7e12, "1 PFLOP"),
        (q.format_flops, 5e24, "5000 ZFLOP"),
        (q.format_seconds, 0.0123, "0.0123 s"),
        (q.format_seconds, 99.97, "100 s"),
        (q.format_seconds, 100.4, "1m40s"),
        (q.format_seconds, 3725, "62m05s"),
        (q.format_seconds, 7200, "2h00m"),
        (q.format_seconds, 3e7, "347d05h"),
        (q.format_seconds, math.inf, "inf s"),
        (q.format_dollars, 1234.5, "$1,234.50"),
        (q.format_dollars, 0.0123, "$0.0123"),
        (q.format_tokens, 999_700, "1 M"),
        (q.format_tokens, 12, "12"),
    ],
)
def test_formats(show, value, text):
    assert show(value) == text


BOTH_WAYS = [
    (q.format_bytes, q.parse_bytes),
    (q.format_flops, q.parse_flops),
    (q.format_seconds, q.parse_seconds),
    (q.format_dollars, q.parse_dollars),
    (q.format_tokens, q.parse_tokens),
    (q.FORMATS["tokens"], q.parse_tokens),
]


@pytest.mark.parametrize(("show", "parse"), BOTH_WAYS)
@given(value=st.floats(1e-3, 3e9))
def test_a_parser_reads_what_its_formatter_prints(value, show, parse):
    assert parse(show(value)) == pytest.approx(value, rel=0.00501)  # three digits


@pytest.mark.parametrize("show", q.FORMATS.values(), ids=q.FORMATS)
@given(value=st.floats())
def test_any_number_can_be_printed(value, show):
    assert show(value)


@pytest.mark.parametrize("parse", PARSERS)
@given(text=st.text() | st.text(alphabet="0123456789.,_eE+-kKmMGTPhds$ iBFLOP"))
def test_any_text_is_read_or_refused(text, parse):
    try:
        value = parse(text)
    except ValueError as error:
        refusal = str(error)
    else:
        assert 0 < value < math.inf
        return
    assert "\nhint: " in refusal
