"""A matplotlib figure as an SVG that stands inside an HTML page.

matplotlib draws under `STYLE`, never under the user's matplotlibrc. Of what it writes, this takes out the prolog,
metadata, the style sheet (inline it would rule the whole page), groups that group nothing, shapes that can't be seen,
fonts, and ids that nothing refers to: a third of the bytes. The ids left are named by a hash of the picture, so that
two pictures on one page don't collide. Numbers keep one decimal: a tenth of a pixel. The ink's colour becomes
`currentColor`. Hover texts become `<title>` children. Everything passes through an XML tree, never through pasted
strings, so a label can't break out of its element.

matplotlib has no option for any of this, and no library that is here does it: written by hand for that.
"""

import hashlib
import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from deltaw.analysis.page import visible

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

INK = "#010203"  # stands for currentColor
SERIES = ("#2c73cb", "#d4701d", "#a14b87", "#526e41", "#3f99d9", "#ac7f9b")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (7, 2, 2, 2)))  # each round of colours has its own
MARGIN = 0.03  # inches around a picture
ROOT = 16.0  # CSS pixels in a rem
READABLE = 328.0, 0.74  # a picture is shrunk to this many CSS pixels or share of its size, then scrolls in its box
HREF = "{http://www.w3.org/1999/xlink}href"
HALO = "halo"  # the id of texts that keep a rim of the page's colour, to be read on lines
STYLE: Any = {
    "figure.dpi": 72,  # so that a point is a pixel
    "font.size": 12,
    "font.family": "DejaVu Sans",
    "text.parse_math": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "deltaw",
    "savefig.transparent": True,
    "axes.axisbelow": True,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "grid.color": INK,
    "grid.alpha": 0.13,
    "grid.linewidth": 1,
    "legend.frameon": False,
    "legend.borderpad": 0,
    "legend.borderaxespad": 0.6,
    "legend.labelcolor": INK,
    "text.color": INK,
    **{f"{axis}tick.{what}": look for axis in "xy" for what, look in (("color", INK), ("major.size", 0))},
}


class Figure:
    """Its axes, its legend's entries, and the hover texts of its shapes."""

    def __init__(self) -> None:
        self.entries: list[tuple[Any, str]] = []
        self.titles: dict[str, Sequence[str]] = {}

    def axes(self, wide: float, tall: float) -> "Axes":
        """Of so many pixels; what stands around them, `svg` makes room for."""
        from matplotlib.figure import Figure

        self.drawn = Figure(figsize=(wide / 72, tall / 72))
        return self.drawn.add_axes((0, 0, 1, 1))

    def hover(self, artist: "Artist", titles: Sequence[str]) -> None:
        """A text for each of the artist's shapes."""
        artist.set_gid(f"hover-{len(self.titles)}")
        self.titles[f"hover-{len(self.titles)}"] = titles

    def svg(self) -> str:
        """One `<svg>` element."""
        written = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        around = self.drawn.get_tightbbox().padded(MARGIN)  # savefig's own "tight" draws all of it twice
        self.drawn.savefig(written, format="svg", metadata=nothing, bbox_inches=around)
        return _inline(written.getvalue(), self.titles)


@contextmanager
def figure() -> Iterator[Figure]:
    """A figure to draw under `STYLE`; matplotlib's settings stay as they were."""
    import matplotlib as mpl
    from matplotlib.rcsetup import cycler

    with warnings.catch_warnings(), mpl.rc_context():
        warnings.simplefilter("ignore")  # a letter that the measuring font lacks: the reader's font has it
        mpl.rcdefaults()
        looks = cycler(linestyle=DASHES) * cycler(color=SERIES)
        mpl.rcParams.update({**STYLE, "axes.prop_cycle": looks})
        yield Figure()


def _inline(svg: str, hover: Mapping[str, Sequence[str]]) -> str:
    """`hover` has, by a group's id, the texts of the shapes in it, in order."""
    root = ElementTree.fromstring(svg)
    prefix = f"p{hashlib.sha256(svg.encode()).hexdigest()[:10]}-"
    wanted = {element.get(HREF, "#")[1:] for element in root.iter()}
    names = {name: f"{prefix}{i}" for i, name in enumerate(sorted(wanted - {""}))}
    for group in root.iter():
        titles = hover.get(group.get("id", ""), ())
        shapes = [shape for shape in group.iter() if _tag(shape) in ("path", "use") and "id" not in shape.attrib]
        for shape, text in zip(shapes, titles, strict=False):
            ElementTree.SubElement(shape, "title").text = visible(text)
    width = float(root.get("viewBox", "0 0 0 0").split()[2])
    least = min(width, max(READABLE[0], READABLE[1] * width))
    size = f"width:{width / ROOT:g}rem;min-width:{least / ROOT:g}rem;max-width:100%;height:auto"
    look = f"{size};overflow:visible;text-rendering:geometricPrecision"  # letters as wide as they were measured
    whole = ElementTree.Element("svg", {"viewBox": root.get("viewBox", ""), "role": "img", "style": look})
    whole.extend(part for child in root for part in _tidied(child, names))
    return ElementTree.tostring(whole, encoding="unicode", short_empty_elements=False)


def _tag(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2]


def _tidied(element: ElementTree.Element, names: Mapping[str, str]) -> list[ElementTree.Element]:
    """The element without what is of no use: nothing, itself, or its children."""
    tag = _tag(element)
    if tag in ("metadata", "style") or (tag == "path" and element.get("style") == "fill: none"):
        return []
    children = [part for child in element for part in _tidied(child, names)]
    attributes = _attributes(element, names)
    if tag in ("g", "defs") and (not children or (tag == "g" and not attributes)):
        return children
    new = ElementTree.Element(tag, attributes)
    new.text = element.text if tag in ("text", "title") else None
    new.extend(children)
    return [new]


def _attributes(element: ElementTree.Element, names: Mapping[str, str]) -> dict[str, str]:
    attributes = {}
    for key, value in element.attrib.items():
        if key == "id" and value == HALO:
            key, value = "style", "paint-order:stroke;stroke:var(--paper,Canvas);stroke-width:3px;stroke-linejoin:round"
        elif key == "id":
            value = names.get(value, "")
        elif key == HREF:
            key, value = "href", "#" + names[value[1:]]
        elif key == "style":
            rules = [rule.strip().replace(": ", ":") for rule in value.replace(INK, "currentColor").split(";")]
            value = ";".join(rule for rule in rules if not rule.startswith(("font-family", "font:")))
        elif value.startswith(("rotate(-0 ", "rotate(0 ")):
            continue
        elif key == "d":
            value = re.sub(r" *([A-Za-z]) *", r"\1", _rounded(value))
        else:
            value = _rounded(value)
        if value:
            attributes[key] = value
    return attributes


def _rounded(numbers: str) -> str:
    """A coordinate, a transformation or a path with one decimal."""
    return re.sub(r"-?\d+\.\d+(e-?\d+)?", lambda match: f"{float(match[0]):.1f}".removesuffix(".0"), numbers)
