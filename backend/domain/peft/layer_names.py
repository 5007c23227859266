"""Which layers the names and expressions of an adapter's config mean, by PEFT's own rules.

An expression from elsewhere may take Python's `re` exponential time. `regex` reads the same language, stops at a time
limit and lets other threads run meanwhile.

Source: PEFT 0.21, `get_pattern_key` and `match_target_against_key` in utils/other.py, `check_target_module_exists` in
    tuners/tuners_utils.py.
"""

import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import regex

_LIMIT_S = 2.0
_MAX_LENGTH = 20_000  # the expressions that tools write for pictures' models have some hundred characters
_FIRST_INDEX = r".*?\.[^.]*\.(?P<idx>\d+)\."


class ExpressionRejected(ValueError):
    """An expression is none, or takes too long."""


class Matcher:
    """Matches names against expressions.

    Args:
        limit_s: Seconds for all matches together.
        monotonic: Tells the time in seconds.
    """

    def __init__(self, limit_s: float = _LIMIT_S, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._deadline_s = monotonic() + limit_s
        self._compiled: dict[str, Any] = {}

    def matches(self, expression: str, name: str) -> bool:
        """Tell whether an expression matches a whole name.

        Raises:
            ExpressionRejected: It is no regular expression, or takes too long.
        """
        return bool(self._within_limit(expression, self._expression(expression).fullmatch, name))

    def key_of(self, keys: Iterable[str], module: str) -> str | None:
        """Return the key of rank_pattern or alpha_pattern that holds for a layer.

        It is the first that matches the end of the layer's path, from a dot on.

        Raises:
            ExpressionRejected: As `matches` says.
        """
        return next((key for key in keys if self.begins(rf"(.*\.)?({key})$", module)), None)

    def begins(self, expression: str, name: str) -> Any:
        """Return the match of an expression with the beginning of a name, or None.

        Raises:
            ExpressionRejected: As `matches` says.
        """
        return self._within_limit(expression, self._expression(expression).match, name)

    def _within_limit(self, expression: str, match: Callable[..., Any], name: str) -> Any:
        left_s = self._deadline_s - self._monotonic()
        try:
            if left_s <= 0:
                raise TimeoutError
            return match(name, timeout=left_s, concurrent=True)
        except TimeoutError as error:
            raise ExpressionRejected(f"the expression {expression[:100]!r} takes too long to be matched") from error

    def _expression(self, expression: str) -> Any:
        known = self._compiled.get(expression)
        if known is not None:
            return known
        if len(expression) > _MAX_LENGTH:
            raise ExpressionRejected(f"the expression {expression[:100]!r}… has more than {_MAX_LENGTH} characters")
        try:
            re.compile(expression)  # what PEFT reads it with
            compiled = regex.compile(expression, regex.V0)
        except (re.error, regex.error, RecursionError, OverflowError, ValueError) as error:
            raise ExpressionRejected(f"{expression[:100]!r} is no regular expression: {error}") from error
        self._compiled[expression] = compiled
        return compiled


def means(name: str, module: str) -> bool:
    """Tell whether a name is a layer's path or the end of it, from a dot on."""
    return module == name or module.endswith(f".{name}")


def is_targeted(config: Mapping[str, Any], module: str, matcher: Matcher) -> bool:
    """Tell whether an adapter's config puts an adapter on a linear layer.

    Args:
        config: With target_modules as text or a list of text, and layers_to_transform, layers_pattern and
            exclude_modules as PEFT takes them.
        module: The layer's path in the base.
        matcher: Matches expressions.

    Raises:
        ExpressionRejected: An expression is none, or takes too long.
    """
    excluded = config.get("exclude_modules")
    if excluded and _is_named(excluded, module, matcher):
        return False
    targets = config.get("target_modules")
    if targets == "all-linear":
        return True
    if not targets or not _is_named(targets, module, matcher):
        return False
    if isinstance(targets, str) or module in targets:
        return True
    wanted = config.get("layers_to_transform")
    return wanted is None or wanted == [] or _index(config, module, matcher) in _listed(wanted)


def _is_named(names: str | Sequence[str], module: str, matcher: Matcher) -> bool:
    if isinstance(names, str):
        return matcher.matches(names, module)
    return any(means(name, module) for name in names)


def _index(config: Mapping[str, Any], module: str, matcher: Matcher) -> int | None:
    """Return a layer's place in the list that layers_pattern names, or in the first list of its path."""
    patterns = _listed(config.get("layers_pattern") or [])
    expressions = [rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\." for pattern in patterns] or [_FIRST_INDEX]
    found = next(filter(None, (matcher.begins(expression, module) for expression in expressions)), None)
    return int(found["idx"]) if found is not None else None


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
