"""A small curve without axes."""

_WIDTH, _HEIGHT = 240.0, 44.0


def sparkline(values: list[float]) -> str:
    """Return the points of a polyline over 240 × 44 units; empty where there are fewer than two figures.

    Args:
        values: Finite figures, in order.
    """
    if len(values) < 2:
        return ""
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    step = _WIDTH / (len(values) - 1)
    return " ".join(
        f"{index * step:.1f},{2 + (_HEIGHT - 4) * (1 - (value - low) / span):.1f}" for index, value in enumerate(values)
    )
