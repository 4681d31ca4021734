"""Charts: plots as geometry, and pages that draw them and write figures for a reader.

Goes in: points, titles, pictures. Comes out: what ``charts.html.jinja`` draws as SVG, and templates that
escape all they are given. Never knows what it shows.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

POINTS = 120  # of a curve
STEPS = [1, 2, 2.5, 5, 10]  # between ticks, times a power of ten
SHARE = (0.0, 1.0)
NONE, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Axis:
    """One axis of a chart."""

    title: str
    low: float
    high: float
    log: bool = False
    whole: bool = False  # marked at whole numbers only

    @classmethod
    def around(cls, title: str, values: Iterable[float], log: bool = False) -> Axis:
        """An axis from tick to tick that holds all values."""
        from matplotlib.ticker import MaxNLocator

        low, high = min(values := list(values)), max(values)
        if log:
            return cls(title, 10.0 ** np.floor(np.log10(low)), 10.0 ** np.ceil(np.log10(high)), True)
        if high - low <= 1e-8 * max(abs(low), abs(high)):  # as far as the ticks tell, all are one value
            around = abs(high) / 10 or 1.0
            low, high = low - around, high + around
        ticks = MaxNLocator(5, steps=STEPS).tick_values(low, high)
        return cls(title, float(ticks[0]), float(ticks[-1]))

    def share(self, value: float) -> float:
        """Where a value stands, from 0 at the low end to 1."""
        low, high, value = (
            np.log10([self.low, self.high, value]) if self.log else (self.low, self.high, value)
        )
        return float((value - low) / ((high - low) or 1))

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """Values to mark, and what to write there."""
        from matplotlib.ticker import MaxNLocator

        if self.log:
            powers = range(round(np.log10(self.low)), round(np.log10(self.high)) + 1)
            return [(10.0**power, f"10{str(power).translate(SUPERSCRIPTS)}") for power in powers]
        places = MaxNLocator(5, steps=STEPS, integer=self.whole).tick_values(self.low, self.high)
        inside = [place for place in places if -1e-9 <= self.share(place) <= 1 + 1e-9]
        return [(float(place), f"{place:,.10g}".replace("-", MINUS)) for place in inside]


@dataclass(frozen=True)
class Series:
    """A line or a row of dots."""

    name: str
    points: list[tuple[float, float]]
    look: str  # a class of the template's stylesheet
    dots: list[float] = field(default_factory=list)  # radius of a dot at each point, if there are any
    line: bool = True  # whether a line joins the points


@dataclass(frozen=True)
class Chart:
    """A plot that says in words what it shows."""

    key: str  # unique on the page
    title: str
    words: str
    x: Axis
    y: Axis
    series: list[Series]

    WIDTH, HEIGHT = 400, 300
    LEFT, RIGHT, TOP, BOTTOM = 58, 14, 12, 50

    def across(self, value: float) -> float:
        """Horizontal place in the drawing, to a tenth of its unit."""
        return round(self.LEFT + self.x.share(value) * (self.WIDTH - self.LEFT - self.RIGHT), 1)

    def down(self, value: float) -> float:
        """Vertical place."""
        return round(
            self.HEIGHT - self.BOTTOM - self.y.share(value) * (self.HEIGHT - self.TOP - self.BOTTOM), 1
        )

    def line(self, series: Series) -> str:
        """The points as SVG writes them."""
        return " ".join(f"{self.across(x)},{self.down(y)}" for x, y in series.points)


def points(x: NDArray[Any], y: NDArray[Any]) -> list[tuple[float, float]]:
    """At most ``POINTS`` points of a curve, evenly chosen, ends included."""
    kept = np.unique(np.linspace(0, len(x) - 1, POINTS).round().astype(int))
    return [(float(a), float(b)) for a, b in zip(x[kept], y[kept], strict=True)]


def template(name: str) -> Any:
    """A page of this package, that escapes all it is given, with filters for figures."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    page = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Any] = {
        "number": number,
        "signed": _signed,
        "certainty": lambda value: f"{value:.3f}" if value < 0.9995 else "over 0.999",
        "count": "{:,}".format,
        "percent": "{:.0%}".format,
        "duration": _duration,
        "interval": _interval,
    }
    page.filters |= filters
    return page.get_template(name)


def number(value: float | None, digits: int = 3) -> str:
    """A figure; a dash for one that is not known."""
    return NONE if value is None else f"{value:.{digits}f}"


def _signed(value: float | None) -> str:
    return NONE if value is None else f"{value:+.3f}".replace("-", MINUS)


def _interval(measured: dict[str, float | None]) -> str:
    low, high = measured["low"], measured["high"]
    return "" if low is None or high is None else f"{low:.3f} to {high:.3f}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def inline(pixels: NDArray[np.uint8]) -> str:
    """A picture, uint8 [height, width, 3], as a data: URI."""
    from PIL import Image

    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, format="JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(sink.getvalue()).decode()
