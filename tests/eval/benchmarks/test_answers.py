"""Answers in replies: where they stand, and every way to write a number."""

import pytest

from eval.benchmarks.answers import find_boxed, match_formula, match_number


@pytest.mark.parametrize(
  ("reply", "reference"),
  [
    ("First 3, then 5. So \\boxed{18}.", "18"),
    ("3 + 5 = 8\n#### 8", "8"),
    ("It costs 3 and 5, so 8 in all.", "8"),
    ("\\boxed{1,234}", "1234"),
    ("#### 1,234,567", "1234567"),
    ("She pays $1,234.50", "1234.5"),
    ("#### $5", "5"),
    ("\\boxed{\\$18.00}", "18"),
    ("\\boxed{18\\text{ dollars}}", "18"),
    ("\\boxed{18 \\text{ m}^2}", "18"),
    ("\\boxed{1{,}000}", "1000"),
    ("\\boxed{x = 7}", "7"),
    ("The loss is -3.", "-3"),
    ("The loss is \u22123 euros", "-3"),
    ("#### -12", "-12"),
    ("from 10-3", "3"),
    ("That is 25%.", "25"),
    ("\\boxed{25\\%}", "25"),
    ("\\boxed{0.5}", "1/2"),
    ("\\boxed{\\frac{3}{4}}", "0.75"),
    ("\\boxed{\\dfrac{3}{4}}", "0.75"),
    ("about .5", "0.5"),
    ("It is 18.", "18"),
    ("\\boxed{3} is wrong; it is \\boxed{4}", "4"),
    ("\\boxed{4} because 17 > 3", "4"),
    ("#### 4 books\nI had 17 before.", "4"),
    ("<think>perhaps \\boxed{3}</think>It is 4.", "4"),
    ("1, 2, 3", "3"),
    ("the years 1997, 2000", "2000"),
  ],
)
def test_right_number_is_right_however_written(reply, reference):
  assert match_number(reply, reference)


@pytest.mark.parametrize(
  ("reply", "reference"),
  [
    ("First 18, then 5.", "18"),
    ("18\n#### 5", "18"),
    ("\\boxed{5} and 18", "18"),
    ("\\boxed{none}, though 18", "18"),
    ("no number", "0"),
    ("", "0"),
    ("\\boxed{-18}", "18"),
    ("\\boxed{1.8}", "18"),
    ("<think>so it is 18", "18"),
    ("\\boxed{3/0}", "3"),
    ("9" * 5000, "9"),
  ],
)
def test_wrong_number_is_wrong(reply, reference):
  assert not match_number(reply, reference)


def test_box_holds_what_its_braces_hold():
  assert find_boxed("\\boxed{\\frac{1}{2}}") == "\\frac{1}{2}"
  assert find_boxed("\\boxed{a} then \\boxed{b") == "a"
  assert find_boxed("\\boxed {3}") == "3"
  assert find_boxed("none") is None


@pytest.mark.parametrize(
  ("boxed", "reference"),
  [
    ("\\frac{1}{2}", "\\dfrac12"),
    ("1/2", "\\frac{1}{2}"),
    ("\\frac{1}{2}", "0.5"),
    ("-\\frac{1}{2}", "-1/2"),
    ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3,\\frac{\\pi}{2})"),
    ("x=5", "5"),
    ("90^\\circ", "90"),
    ("\\text{Evelyn}", "Evelyn"),
    ("10,080", "10080"),
    ("33", "033"),
    ("\\sqrt2", "\\sqrt{2}"),
    ("5.0", "5"),
  ],
)
def test_formulas_are_equal_when_normalised(boxed, reference):
  assert match_formula(f"So \\boxed{{{boxed}}}.", reference)


@pytest.mark.parametrize(
  ("reply", "reference"),
  [
    ("\\boxed{\\frac{1}{3}}", "\\frac{1}{2}"),
    ("\\boxed{2x}", "x+x"),  # equal, but only after algebra
    ("It is 5.", "5"),  # no box
    ("\\boxed{3,4}", "34"),
    ("\\boxed{x}", "y"),
  ],
)
def test_other_formulas_are_not(reply, reference):
  assert not match_formula(reply, reference)
