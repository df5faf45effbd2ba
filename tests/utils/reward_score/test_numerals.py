from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verl.utils.reward_score.equivalence import equivalent
from verl.utils.reward_score.numerals import number

INTEGERS = st.integers(-(10**12), 10**12)


@settings(max_examples=50, deadline=None)
@given(INTEGERS, st.integers(1, 10**6))
def test_a_fraction_is_read_exactly_in_every_form(top, bottom):
    value = Fraction(top, bottom)
    for text in (f"{top}/{bottom}", f"\\frac{{{top}}}{{{bottom}}}", f"\\frac{{{-top}}}{{{-bottom}}}"):
        assert number(text).value == value
    sign, (whole, rest) = "-" * (value < 0), divmod(abs(value.numerator), value.denominator)
    assert number(f"{sign}{whole}\\frac{{{rest}}}{{{value.denominator}}}").value == value
    assert number(f"{sign}{whole} {rest}/{value.denominator}").value == value


@settings(max_examples=50, deadline=None)
@given(INTEGERS, st.integers(0, 12))
def test_a_decimal_is_read_exactly_in_every_form(digits, places):
    value = Fraction(digits, 10**places)
    text = (
        f"{'-' * (digits < 0)}{abs(digits) // 10**places}.{abs(digits) % 10**places:0{places}d}"
        if places
        else str(digits)
    )
    for form in (text, f"{digits}\\times10^{{{-places}}}", f"{digits}e{-places}", f"{digits} \\cdot 10^{{-{places}}}"):
        assert number(form).value == value


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**15))
def test_thousands_may_be_separated(value):
    assert number(f"{value:,}").value == number(f"{value:,}".replace(",", " ")).value == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0.\\overline{3}", Fraction(1, 3)),
        ("0.1\\overline{6}", Fraction(1, 6)),
        ("-2.0\\overline{142857}", -2 - Fraction(1, 70)),
        (".5", Fraction(1, 2)),
        ("5.", Fraction(5)),
        ("10^{-3}", Fraction(1, 1000)),
        ("-10^2", Fraction(-100)),
        ("1,234.5", Fraction(2469, 2)),
    ],
)
def test_value_of_a_numeral(text, value):
    assert number(text).value == value


@pytest.mark.parametrize(
    "text", ["", "-", ".", "1/0", "1,2", "12,34", "1.2.3", "x", "1e", "1e9999", "2^{3}", "1" * 1001]
)
def test_what_is_no_numeral(text):
    assert number(text) is None


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("0.333333", "1/3", True),
        ("0.33333", "1/3", False),
        ("0.333334", "1/3", False),
        ("3.14159265", "3.141593", True),
        ("2.9999999", "3", False),
        ("123456", "123457", False),
        ("50%", "1/2", True),
        ("50%", "50", True),
        ("50%", "0.5%", False),
    ],
)
def test_a_decimal_may_be_rounded_to_six_digits_and_a_percentage_given_without_its_sign(a, b, same):
    assert number(a).equals(number(b)) is number(b).equals(number(a)) is same


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(-20, 20), min_size=1, max_size=4), st.integers(-9, 9), st.integers(1, 9))
def test_a_factored_polynomial_equals_its_expansion_only(roots, shift, scale):
    coefficients = [scale]  # of the highest power first
    for root in roots:
        coefficients = [a - root * b for a, b in zip([*coefficients, 0], [0, *coefficients], strict=True)]
    terms = [f"({c})x^{{{len(roots) - i}}}" for i, c in enumerate(coefficients)]
    factored = f"{scale}\\cdot " + "".join(f"(x-({root}))" for root in roots)
    assert equivalent(factored, "+".join(terms))
    assert equivalent("+".join([*terms, str(shift)]), factored) is (shift == 0)
