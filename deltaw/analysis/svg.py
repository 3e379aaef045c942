"""What matplotlib writes as SVG, made fit to stand inside an HTML page.

Gone are the prolog, metadata, the style sheet (inline it would rule the whole page), groups that group nothing, shapes
that can't be seen, fonts, and ids that nothing refers to. The ids left are named by a hash of the picture, so that
two pictures on one page don't collide. Numbers keep one decimal: a tenth of a pixel. The ink's colour becomes
`currentColor`. Hover texts become `<title>` children. Everything passes through an XML tree, never through pasted
strings, so a label can't break out of its element.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from xml.etree import ElementTree

from deltaw.analysis.page import visible

ROOT = 16.0  # CSS pixels in a rem
READABLE = 416.0, 0.8  # a picture is shrunk to this many CSS pixels or share of its size, then scrolls in its box
HREF = "{http://www.w3.org/1999/xlink}href"
SHAPES = ("path", "use")
HALO = "halo"  # the id of groups whose text keeps a rim of the page's colour, to be read on lines


def inline(svg: str, ink: str, hover: Mapping[str, Sequence[str]]) -> str:
    """One `<svg>` element. `hover` has, by a group's id, the texts of the shapes in it, in order."""
    root = ElementTree.fromstring(svg)
    prefix = f"p{hashlib.sha256(svg.encode()).hexdigest()[:10]}-"
    wanted = {element.get(HREF, "#")[1:] for element in root.iter()}
    names = {name: f"{prefix}{i}" for i, name in enumerate(sorted(wanted - {""}))}
    for group in root.iter():
        for shape, text in zip(_shapes(group), hover.get(group.get("id", ""), ()), strict=False):
            ElementTree.SubElement(shape, "title").text = visible(text)
    width = float(root.get("viewBox", "0 0 0 0").split()[2])
    least = min(width, max(READABLE[0], READABLE[1] * width))
    look = f"width:{width / ROOT:g}rem;min-width:{least / ROOT:g}rem;max-width:100%;height:auto"
    whole = ElementTree.Element("svg", {"viewBox": root.get("viewBox", ""), "role": "img", "style": look})
    whole.extend(part for child in root for part in _tidied(child, names, ink))
    return ElementTree.tostring(whole, encoding="unicode", short_empty_elements=False)


def _shapes(group: ElementTree.Element) -> list[ElementTree.Element]:
    found = []
    for child in group:
        if _tag(child) in SHAPES:
            found.append(child)
        elif _tag(child) == "g":
            found += _shapes(child)
    return found


def _tag(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2]


def _tidied(element: ElementTree.Element, names: Mapping[str, str], ink: str) -> list[ElementTree.Element]:
    """The element without what is of no use: nothing, itself, or its children."""
    tag = _tag(element)
    if tag in ("metadata", "style") or (tag == "path" and element.get("style") == "fill: none"):
        return []
    children = [part for child in element for part in _tidied(child, names, ink)]
    attributes = _attributes(element, names, ink)
    if tag in ("g", "defs") and (not children or (tag == "g" and not attributes)):
        return children
    new = ElementTree.Element(tag, attributes)
    new.text = element.text if tag in ("text", "title") else None
    new.extend(children)
    return [new]


def _attributes(element: ElementTree.Element, names: Mapping[str, str], ink: str) -> dict[str, str]:
    kept = {}
    for key, value in element.attrib.items():
        if key == "id" and value == HALO:
            key, value = "style", "paint-order:stroke;stroke:var(--paper,Canvas);stroke-width:3px;stroke-linejoin:round"
        elif key == "id":
            value = names.get(value, "")
        elif key == HREF:
            key, value = "href", "#" + names[value[1:]]
        elif key == "style":
            rules = [rule.strip().replace(": ", ":") for rule in value.replace(ink, "currentColor").split(";")]
            value = ";".join(rule for rule in rules if not rule.startswith(("font-family", "font:")))
        elif value.startswith(("rotate(-0 ", "rotate(0 ")):
            continue
        elif key == "d":
            value = re.sub(r" *([A-Za-z]) *", r"\1", _rounded(value))
        else:
            value = _rounded(value)
        if value:
            kept[key] = value
    return kept


def _rounded(numbers: str) -> str:
    """A coordinate, a transformation or a path with one decimal."""
    return re.sub(r"-?\d+\.\d+(e-?\d+)?", lambda found: f"{float(found[0]):.1f}".removesuffix(".0"), numbers)
