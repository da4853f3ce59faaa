"""What people write on a command: volumes with a unit, ages, sexes."""

from __future__ import annotations

import math
import re

from brainldm.base.covariates import implausible, sex_code
from brainldm.base.errors import UsageError

_QUANTITY = re.compile(
    r"^\s*([+-]?[0-9]+(?:_[0-9]+)*(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?|[+-]?\.[0-9]+)\s*([^\s0-9].*?)?\s*$"
)
_MM3_IN = {"mm3": 1.0, "mm^3": 1.0, "mm³": 1.0, "ul": 1.0, "µl": 1.0, "μl": 1.0}
_MM3_IN |= dict.fromkeys(("ml", "cc", "cm3", "cm^3", "cm³"), 1e3) | dict.fromkeys(("l", "dm3", "dm^3", "dm³"), 1e6)


def parse_volume(text: str) -> float:
    """A volume in mm^3 from text with a unit.

    >>> parse_volume("40ml"), parse_volume("40000 mm3"), parse_volume("1.45 L")
    (40000.0, 40000.0, 1450000.0)
    """
    number, unit = _quantity(text, "a volume", "40ml or 40000mm3")
    if not unit:
        raise UsageError(
            f"{text!r} is a volume without a unit.",
            remedy=f"Write {text.strip()}ml or {text.strip()}mm3.",
            reason="missing_unit",
        )
    if unit.lower() not in _MM3_IN:
        raise UsageError(
            f"{text!r}: {unit!r} is not a unit of volume known here.",
            remedy="Use mm3, ml, cm3 or l.",
            reason="unknown_unit",
        )
    value = number * _MM3_IN[unit.lower()]
    if not (math.isfinite(value) and value > 0):
        raise UsageError(f"{text!r}: a volume must be above 0 and finite.", remedy="Write, say, 40ml.")
    return value


def parse_age(text: str) -> float:
    """An age in years from text.

    >>> parse_age("70"), parse_age("61.5 y")
    (70.0, 61.5)
    """
    number, unit = _quantity(text, "an age", "70")
    if unit.lower() not in ("", "y", "yr", "yrs", "year", "years"):
        raise UsageError(f"{text!r}: an age is in years here, not in {unit!r}.", remedy="Write, say, 70.")
    fault = implausible("age_years", number)
    if fault:
        raise UsageError(f"{text!r}: this age {fault}.", remedy="Write the age in years, say, 70.")
    return number


def parse_sex(text: str) -> int:
    """0 for female, 1 for male.

    >>> parse_sex("F"), parse_sex("male")
    (0, 1)
    """
    code = sex_code(text)
    if code is None:
        raise UsageError(f"{text!r} is not a sex known here.", remedy="Write F or M (female, male, 0, 1).")
    return code


def _quantity(text: str, kind: str, example: str) -> tuple[float, str]:
    found = _QUANTITY.match(text)
    if not found:
        hint = " (the decimal mark is a point)" if re.search(r"[0-9],[0-9]", text) else ""
        raise UsageError(f"{text!r} is not {kind}{hint}.", remedy=f"Write, say, {example}.", reason="not_a_number")
    unit = found.group(2) or ""
    if unit.startswith(","):
        raise UsageError(
            f"{text!r} is not {kind} (the decimal mark is a point).",
            remedy=f"Write, say, {example}.",
            reason="not_a_number",
        )
    return float(found.group(1)), unit
