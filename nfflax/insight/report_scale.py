"""Numbers made fit to be drawn: fewer points, round ticks, a range, a few characters."""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

MOST_POINTS = 1000  # of one line: more than any screen has columns for

_FEW = 25  # points among which none is taken for an outlier
_OUTLIERS = 0.03  # share of a line's points that the range need not hold


def thinned(x: np.ndarray, y: np.ndarray, most: int = MOST_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most so many of the points, without those that are not finite.

    Of every stretch of equal length the lowest and the highest point stay, and of the whole the
    first and the last, so that no spike is lost.
    """
    finite = np.isfinite(x) & np.isfinite(y)
    x, y = x[finite], y[finite]
    if len(x) <= most:
        return x, y
    edges = np.linspace(1, len(x) - 1, (most - 2) // 2 + 1).astype(int)
    kept = {0, len(x) - 1}
    for first, end in itertools.pairwise(edges.tolist()):
        part = y[first:end]
        kept |= {first + int(part.argmin()), first + int(part.argmax())}
    chosen = np.array(sorted(kept))
    return x[chosen], y[chosen]


@dataclasses.dataclass(frozen=True)
class Scale:
    """An axis: its range, and whether it is logarithmic."""

    low: float
    high: float
    is_log: bool = False

    def place(self, values: np.ndarray) -> np.ndarray:
        """Where values lie between the ends of the axis, 0 to 1; beyond them, outside of that."""
        low, high = self.low, self.high
        if self.is_log:
            values, low, high = np.log(np.maximum(values, 1e-300)), math.log(low), math.log(high)
        return (values - low) / (high - low)

    def ticks(self, most: int) -> list[float]:
        """Up to so many round numbers on the axis."""
        if self.is_log and self.high / self.low >= 8:
            decades = math.log10(self.high / self.low)
            factors = (1, 2, 5) if decades < 1.5 else (1, 3) if decades < 3 else (1,)
            lowest = math.floor(math.log10(self.low))
            powers = range(lowest, math.ceil(math.log10(self.high)) + 1)
            found = [factor * 10.0**power for power in powers for factor in factors]
            found = [tick for tick in found if self.low <= tick <= self.high * (1 + 1e-9)]
            return found[:: math.ceil(len(found) / most)] if found else []
        return _round_ticks(self.low, self.high, most)


def fitted(
    lines: Iterable[np.ndarray],
    *,
    low: float | None = None,
    high: float | None = None,
    is_log: bool = False,
    robust: str = "",
) -> Scale:
    """The axis that shows these values; `low` and `high` fix an end.

    `robust` "high" or "low" lets the few values at that end that lie far off leave the picture: a
    bad start must not flatten all the rest.
    """
    ends = list(_ends(lines, robust, is_log))
    if not ends:
        return Scale(0.1, 1.0, True) if is_log else Scale(low or 0.0, high or 1.0)
    least, most = min(end[0] for end in ends), max(end[1] for end in ends)
    if is_log:
        air = max((most / least) ** 0.06, 1.05)
        return Scale(least / air, most * air, True)
    air = 0.06 * (most - least) or 0.06 * abs(most) or 0.5
    bottom = least - air if low is None else low
    top = most + air if high is None else high
    return Scale(bottom, top if top > bottom else bottom + 1.0)


def _ends(lines: Iterable[np.ndarray], robust: str, is_log: bool) -> Iterator[tuple[float, float]]:
    for values in lines:
        values = values[np.isfinite(values)]
        values = values[values > 0] if is_log else values
        if len(values):
            share = _OUTLIERS if len(values) > _FEW else 0.0
            low = np.quantile(values, share if robust == "low" else 0, method="nearest")
            high = np.quantile(values, 1 - share if robust == "high" else 1, method="nearest")
            yield float(low), float(high)


def _round_ticks(low: float, high: float, most: int) -> list[float]:
    """The multiples of 1, 2 or 5 times a power of ten in a range, as many as there is room for."""
    size = 10.0 ** math.floor(math.log10((high - low) / max(most, 1)))
    steps = (factor * size for factor in (1, 2, 5, 10, 20, 50))
    for step in steps:
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first < most:
            return [number * step for number in range(first, last + 1)]
    return []


def number(value: float, kind: str = "") -> str:
    """A value in a few characters; `kind`: "share" (in per cent), "count", "loss" or nothing."""
    if not math.isfinite(value):
        return "not finite"
    if kind == "share":
        return f"{100 * value:.2f}%"
    if kind == "loss":  # in columns: with as many decimals each
        return f"{value:.4f}"
    if kind == "count":
        return f"{value:,.0f}"
    if value == 0:
        return "0"
    if abs(value) >= 1e5 or abs(value) < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def tick_labels(ticks: Sequence[float], kind: str = "") -> list[str]:
    """Ticks in words, all with as many decimals as the finest needs."""
    if kind == "share":
        return [f"{label}%" for label in tick_labels([100 * tick for tick in ticks])]
    if any(tick and (abs(tick) >= 1e6 or abs(tick) < 1e-3) for tick in ticks):
        return [number(tick) for tick in ticks]
    texts = [f"{tick:.10f}".rstrip("0").rstrip(".") for tick in ticks]
    ratio = ticks[-1] / ticks[0] if ticks and ticks[0] > 0 else 0
    if ratio > 50:  # a logarithmic axis: each tick has its own size
        return [f"{float(text):,g}" for text in texts]
    decimals = max((len(text.partition(".")[2]) for text in texts), default=0)
    return [f"{tick:,.{decimals}f}" for tick in ticks]
