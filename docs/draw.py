"""Draws how it works, docs/how_it_works.svg: ``python docs/draw.py``.

The tree, the bank and the path are the demo's, and so are both answers: 16 × 16 clusters, five
layers, cluster 136 below cluster 8. The picture has a ground of its own and follows the reader's
light or dark colours.
"""

from collections.abc import Iterator
from pathlib import Path

TARGET = Path(__file__).with_name("how_it_works.svg")
WIDTH, HEIGHT = 1000, 392
CAPTION = 322  # where the lines below the columns stand
PROMPT = ("The atomic number", "of tin is")
PATH = (8, 136)
BRANCHING = (16, 16)
LAYERS = 5
ANSWER, WITHOUT = "50", "16"

LIGHT = dict(ground="#fbfbfd", edge="#d8dce3", ink="#1d2530", muted="#616b78", line="#aab3bf")
LIGHT |= dict(empty="#e4e8ee", anchor="#cfd6df", one="#e0761a", two="#2a78d6")
DARK = dict(ground="#161b22", edge="#343b45", ink="#e8edf3", muted="#9ca6b2", line="#5b6572")
DARK |= dict(empty="#2b323c", anchor="#444d59", one="#f29743", two="#5ea5f7")
STYLE = """
text { font-family: system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; }
.title { font-size: 16px; font-weight: 600; }
.note { font-size: 13px; }
.prompt { font-size: 16px; }
.answer { font-size: 30px; font-weight: 700; }
.number { font-size: 13px; font-weight: 700; }
.middle { text-anchor: middle; }
.wire { fill: none; }
.arrow { stroke-width: 1.8; marker-end: url(#head); }
"""


def colours(palette: dict[str, str]) -> str:
    """Classes, not variables, which some programs that show SVG do not know."""
    rules = (
        f".{n} {{ fill: {c}; }} .wire.{n} {{ fill: none; stroke: {c}; }}"
        for n, c in palette.items()
    )
    return "\n".join(rules)


def text(x: float, y: float, words: str, kind: str = "") -> str:
    kind += "" if "muted" in kind or "ground" in kind else " ink"
    return f'<text x="{x:g}" y="{y:g}" class="{kind.strip()}">{words}</text>'


def box(x: float, y: float, width: float, height: float, colour: str, round_: float = 2) -> str:
    size = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{round_:g}"'
    return f'<rect {size} class="{colour}"/>'


def wire(*points: tuple[float, float], colour: str = "line", width: float = 1) -> str:
    places = " ".join(f"{x:g},{y:g}" for x, y in points)
    return f'<polyline class="wire {colour}" points="{places}" stroke-width="{width:g}"/>'


def arrow(*points: tuple[float, float]) -> str:
    places = " ".join(f"{x:g},{y:g}" for x, y in points)
    return f'<polyline class="wire muted arrow" points="{places}"/>'


def dot(x: float, y: float, radius: float, colour: str) -> str:
    return f'<circle cx="{x:g}" cy="{y:g}" r="{radius:g}" class="{colour}"/>'


def title(number: int, x: float, words: str) -> Iterator[str]:
    yield dot(x + 11, 37, 11, "muted")
    yield text(x + 11, 41.5, str(number), "number ground middle")
    yield text(x + 30, 42.5, words, "title")


def prompt() -> Iterator[str]:
    """The text, and the vector that the encoder makes of it."""
    yield from title(1, 30, "A prompt")
    frame = 'x="30" y="76" width="180" height="72" rx="12" stroke-width="1.5"'
    yield f'<rect {frame} class="wire muted"/>'
    for line, words in enumerate(PROMPT):
        yield text(46, 106 + 25 * line, words, "prompt")
    yield arrow((120, 154), (120, 196))
    yield text(130, 179, "encoder", "note muted")
    for cell in range(12):
        shade = (cell * 5 + 3) % 9 / 9 * 0.75 + 0.2
        yield f'<g opacity="{shade:.2f}">{box(53 + 11.4 * cell, 204, 9.4, 24, "ink", 2)}</g>'
    yield text(120, 249, "its vector", "note muted middle")


def tree() -> Iterator[str]:
    """Two levels of the tree, the path in colour."""
    yield from title(2, 268, "Its cluster path")
    left, step = 272, 14.4
    rows = (84, 168, 262)
    parent = (left + step * 7.5, rows[0])
    lines, dots = [], []
    for level, (count, cluster) in enumerate(zip(BRANCHING, PATH, strict=True), 1):
        places = [(left + step * child, rows[level]) for child in range(count)]
        chosen = cluster % count
        yield from (wire(parent, place) for place in places if place != places[chosen])
        colour = ("one", "two")[level - 1]
        lines.append(wire(parent, places[chosen], colour=colour, width=3))
        yield from (dot(x, y, 4, "line") for x, y in places)
        dots.append(dot(*places[chosen], 6.5, colour))
        parent = places[chosen]
    yield from lines + dots
    yield dot(left + step * 7.5, rows[0], 5, "muted")
    yield text(left - 4, rows[1] + 22, "16 clusters", "note muted")
    yield text(left - 4, rows[2] + 22, "16 below each", "note muted")
    one, two = PATH
    words = f'path (<tspan class="one">{one}</tspan>, <tspan class="two">{two}</tspan>)'
    yield text(left + step * 7.5, CAPTION, words, "title middle")


def bank() -> Iterator[str]:
    """All blocks, each below that of the cluster above it; those of the path in colour."""
    yield from title(3, 548, "Its blocks, on disk")
    left, top, step = 556, 76, 11.4
    for child in range(BRANCHING[0]):
        colour = "one" if child == PATH[0] else "empty"
        yield box(left + step * child, top, 9.4, 30, colour)
        for below in range(BRANCHING[1]):
            colour = "two" if child * BRANCHING[1] + below == PATH[1] else "empty"
            yield box(left + step * child, top + 38 + step * below, 9.4, 9.4, colour)
    blocks = BRANCHING[0] * (1 + BRANCHING[1])
    yield text(left + step * 8, CAPTION, f"2 of {blocks} are read", "title middle")


def anchor() -> Iterator[str]:
    """The layers of the anchor with the blocks attached, and what comes out with and without."""
    yield from title(4, 786, "The anchor")
    left, top = 806, 136
    for layer in range(LAYERS):
        y = top + 27 * layer
        yield box(left, y, 84, 21, "anchor", 4)
        yield box(left + 88, y, 26, 21, "one", 4)
        yield box(left + 118, y, 13, 21, "two", 4)
    yield arrow((left + 42, top - 6), (left + 42, top - 30))
    yield text(left + 42, top - 38, ANSWER, "answer middle")
    yield text(left + 70, top - 41, f"without: {WITHOUT}", "note muted")
    yield text(left + 65, CAPTION, "a small model + blocks", "title middle")


def wires() -> Iterator[str]:
    """From one to the next."""
    yield arrow((206, 216), (236, 216), (236, 84), (366, 84))
    yield arrow((500, 200), (544, 200))
    yield arrow((748, 200), (796, 200))
    yield arrow((40, 154), (40, 362), (848, 362), (848, 340))
    yield text(52, 354, "the prompt itself", "note muted")


HEAD = (
    '<defs><marker id="head" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="6" markerHeight="6"'
    ' orient="auto-start-reverse"><path d="M0,0 L8,4 L0,8 z" class="muted"/></marker></defs>'
)
ABOUT = (
    "A prompt is made into a vector, the vector takes a path down a tree of clusters, the blocks of"
    " that path are read from disk and attached to the anchor, a small language model: asked for"
    f" the atomic number of tin it answers {ANSWER}, and {WITHOUT} without them."
)


def picture() -> str:
    view = f'xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}"'
    size = f'x=".5" y=".5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="14"'
    dark = f"@media (prefers-color-scheme: dark) {{\n{colours(DARK)}\n}}"
    lines = [f'<svg {view} role="img">', f"<title>{ABOUT}</title>"]
    lines += [f"<style>{STYLE}{colours(LIGHT)}\n{dark}\n</style>", HEAD]
    lines += [f'<rect {size} class="ground"/>', f'<rect {size} class="wire edge"/>']
    lines += [*wires(), *prompt(), *tree(), *bank(), *anchor(), "</svg>", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    TARGET.write_text(picture(), encoding="utf-8")
    print(TARGET)
