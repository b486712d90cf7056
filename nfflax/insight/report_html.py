"""HTML from Python: elements that escape all that is put into them, and the page around them.

Text comes from files that anyone may have written. It becomes markup in `tag` alone, which escapes
whatever is not `Html` already.
"""

import base64
import hashlib
import html
from collections.abc import Container, Iterable, Sequence
from importlib import resources
from typing import TypeAlias

Child: TypeAlias = "str | Iterable[Child] | None"
"""What an element may hold: text, markup, nothing, or any number of them."""


class Html(str):
    """Markup, as against text that is still to be escaped."""

    __slots__ = ()


def tag(name: str, *children: Child, **attributes: object) -> Html:
    """An element. A None among the children or attributes is left out.

    Attribute names lose a last underscore (`class_`), and the others become hyphens.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    inside = "".join(map(_markup, _flat(children)))
    return Html(f"<{name}{written}>{inside}</{name}>")


def joined(parts: Iterable[Child]) -> Html:
    """Several pieces one after the other."""
    return Html("".join(map(_markup, _flat(parts))))


def table(
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    caption: str,
    words: Container[int] = (0,),
) -> Html:
    """A table that scrolls in its own box; columns in `words` hold words, the others numbers."""

    def cells(kind: str, row: Sequence[str]) -> Iterable[Html]:
        for column, cell in enumerate(row):
            yield tag(
                "th" if kind == "th" or column == 0 else "td",
                cell,
                class_=None if column in words else "number",
                scope="col" if kind == "th" else "row" if column == 0 else None,
            )

    return tag(
        "div",
        tag(
            "table",
            tag("caption", tag("span", caption)),
            tag("thead", tag("tr", cells("th", head))),
            tag("tbody", (tag("tr", cells("td", row)) for row in rows)),
        ),
        class_="scroll",
        tabindex=0,
        role="region",
        aria_label=caption,
    )


def page(title: str, *parts: str) -> str:
    """A whole document that needs nothing else, and lets no other script run than its own."""
    style, script = _asset("report.css"), _asset("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    head = (
        '<meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        '<meta name="generator" content="nfflax report">'
        f"{tag('title', title)}<style>{style}</style>"
    )
    body = f"{tag('main', *parts)}<script>{script}</script>"
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>{body}</body></html>\n'


def _asset(name: str) -> str:
    return resources.files("nfflax.insight").joinpath(name).read_text("utf-8")


def _flat(children: Iterable[Child]) -> Iterable[str]:
    for child in children:
        if isinstance(child, str):
            yield child
        elif child is not None:
            yield from _flat(child)


def _markup(text: str) -> str:
    return text if isinstance(text, Html) else html.escape(text)
