"""How figures are written: with units, and with as many digits as a person reads."""

import json
from typing import Any

_STEPS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
UNKNOWN = "–"


def size(value: float | None) -> str:
    """Write bytes in the largest unit that leaves a figure of one or more."""
    if value is None:
        return UNKNOWN
    amount, step = float(value), 0
    while abs(amount) >= 1024 and step < len(_STEPS) - 1:
        amount, step = amount / 1024, step + 1
    return f"{amount:.0f} {_STEPS[step]}" if step == 0 or amount >= 100 else f"{amount:.1f} {_STEPS[step]}"


def duration(seconds: float | None) -> str:
    """Write seconds as a person says them: 42 s, 3 min 10 s, 2 h 5 min, 3 d 4 h."""
    if seconds is None:
        return UNKNOWN
    whole = max(0, round(seconds))
    days, hours, minutes, rest = whole // 86400, whole // 3600 % 24, whole // 60 % 60, whole % 60
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    if minutes:
        return f"{minutes} min {rest} s"
    return f"{seconds:.1f} s" if 0 < seconds < 10 else f"{rest} s"


def number(value: float | None) -> str:
    """Write a count with separators, a fraction with four digits that count."""
    if value is None:
        return UNKNOWN
    if isinstance(value, bool):
        return "yes" if value else "no"
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.4g}"


def count(value: float | None) -> str:
    """Write a large count shortly: 135 M, 7.6 B."""
    if value is None:
        return UNKNOWN
    for unit, name in ((10**12, " T"), (10**9, " B"), (10**6, " M"), (10**3, " k")):
        if abs(value) >= unit:
            amount = value / unit
            return f"{amount:.0f}{name}" if amount >= 100 else f"{amount:.1f}{name}"
    return number(value)


def percent(fraction: float | None) -> str:
    """Write a fraction of 1 as percent."""
    return UNKNOWN if fraction is None else f"{fraction * 100:.0f} %"


def setting(value: Any) -> str:
    """Write the value of a setting: text as it is, other values as JSON."""
    if value is None:
        return UNKNOWN
    if isinstance(value, str):
        return value
    if isinstance(value, float) and not isinstance(value, bool):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return ", ".join(setting(item) for item in value)
    return json.dumps(value, ensure_ascii=False, default=str)


def words(name: str) -> str:
    """Write a name of the API in words: `learning_rate` as `learning rate`."""
    return name.replace("_", " ").replace("-", " ")


FILTERS = {
    "size": size,
    "duration": duration,
    "number": number,
    "count_short": count,
    "percent": percent,
    "setting": setting,
    "words": words,
}
