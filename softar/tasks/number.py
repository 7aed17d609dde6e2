"""Numbers in texts: what `score=number` reads, one text for all spellings of one number."""

import re
from decimal import MAX_EMAX, MAX_PREC, MIN_EMIN, Context, Decimal, Inexact, InvalidOperation
from fractions import Fraction

# of "10-8" the last is 8, not -8: a sign stands behind no word, number or closing bracket
SIGN = r"(?:(?<![\w.)\]}%])([-\u2212\u2013])(?:\\?[$€£¥])?)?"
COMMA = r"(?:,(?:\\!)?|\{,\}|\\,)"  # as LaTeX has them, too; "1,2" is a list
PLAIN = rf"(?:(?:\d+(?:{COMMA}\d{{2,3}})*{COMMA}\d{{3}}(?!\d)|\d+)\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
# 30 digits: Python limits how long an integer it reads
TOP, BOTTOM = r"(\d{1,30})", r"(0*[1-9]\d{0,29})"
SLASH = rf"{TOP}/{BOTTOM}(?![\w/]|[.,]\d)"  # no date
LATEX = rf"\\[dt]?frac ?\{{?{TOP}\}}?\{{?{BOTTOM}\}}?"
FRACTION = (
    rf"(?<![\w./])(?:{TOP} ?(?:(?<= )(?=\d)|(?=\\)))?(?:{SLASH}|{LATEX})"  # maybe mixed: 3 1/2
)
NUMBER = re.compile(rf"{SIGN}(?:{FRACTION}|({PLAIN}))")
MARKER = re.compile(r"####|\banswer\W*(?:is\b|[:=])|\\boxed\{", re.IGNORECASE)
# with the number as 0: it is but a part of what is meant, or a sign stands apart from it
FORMULA = re.compile(r"\\(?:sqrt|pi|[dt]?frac)\b|[√π]|[\^\-\u2212\u2013]\W*0")
EXACT = Context(prec=MAX_PREC, Emax=MAX_EMAX, Emin=MIN_EMIN)  # rounds nothing
ENDS = Context(prec=200, traps=[Inexact])  # enough for what ends, of 30 digits by 30


def last_number(text: str) -> str:
    """The last number in a text, "" for none. Equal numbers give one text, whatever their spelling
    and size: "18" for "$18.00", "18." and "36/2", "1/3" for "2/6". Nothing is rounded."""
    found = [*NUMBER.finditer(text)]
    return _spelt(*found[-1].groups()) if found else ""


def is_clear(gold: str) -> bool:
    """Does a gold answer say which number it means: the only one in it, or the only one behind its
    last marker (####, "answer is", "Answer:", \\boxed)? Of "(1, 2)" or a date the last would count,
    of "x^2" the 2."""
    parts = gold, MARKER.split(gold)[-1]
    clear = [part for part in parts if len(NUMBER.findall(part)) == 1]
    return bool(clear) and not FORMULA.search(NUMBER.sub("0", clear[-1]))


def _spelt(sign: str | None, whole: str | None, *parts: str | None) -> str:
    """sign, whole: of any number.   parts: two fractions, each above and below, and a plain number;
    one of the three is there."""
    *fractions, plain = parts
    minus = "-" if sign else ""
    if plain is None:
        top, bottom = map(int, filter(None, fractions))
        ratio = int(whole or 0) + Fraction(top, bottom)
        try:
            value = ENDS.divide(Decimal(ratio.numerator), Decimal(ratio.denominator))
        except Inexact:
            return f"{minus}{ratio}"
    else:
        digits = re.sub(r"[^\d.eE+-]", "", plain)
        try:
            value = Decimal(digits)
        except InvalidOperation:  # an exponent of twenty digits: equal only to itself
            return minus + digits
    value = value.normalize(EXACT)
    if not value:
        return "0"
    return minus + (f"{value:f}" if abs(value.adjusted()) < 40 else str(value))
