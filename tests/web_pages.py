"""Owns how tests read a page: as a tree of elements, strictly; what no page may hold fails at once."""

from __future__ import annotations

from collections.abc import Iterator
from html.parser import HTMLParser

_VOID = {"meta", "link", "input", "br", "hr", "img"}
_INLINE_HANDLERS = "on"


class Element:
    """An element: its name, attributes and children; texts are children, too."""

    def __init__(self, name: str, attributes: dict[str, str]) -> None:
        self.name = name
        self.attributes = attributes
        self.children: list[Element | str] = []

    @property
    def text(self) -> str:
        """Everything that is written in it, with single spaces."""
        return " ".join("".join(self._texts()).split())

    def _texts(self) -> Iterator[str]:
        for child in self.children:
            if isinstance(child, str):
                yield child
            else:
                yield from child._texts()
                yield " "

    def all(self, name: str = "", **attributes: str) -> list[Element]:
        """Return the elements within it that have a name and attributes; `_` stands for `-`, `cls` is a class."""
        return [element for element in self._walk() if element._is(name, attributes)]

    def one(self, name: str = "", **attributes: str) -> Element:
        """Return the only one."""
        (found,) = self.all(name, **attributes)
        return found

    def _is(self, name: str, wanted: dict[str, str]) -> bool:
        if name and self.name != name:
            return False
        for key, value in wanted.items():
            if key == "cls":
                if value not in self.attributes.get("class", "").split():
                    return False
            elif self.attributes.get(key.strip("_").replace("_", "-")) != value:
                return False
        return True

    def _walk(self) -> Iterator[Element]:
        for child in self.children:
            if isinstance(child, Element):
                yield child
                yield from child._walk()


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Element("#document", {})
        self._open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), (tag, names)
        assert "style" not in names and not any(name.startswith(_INLINE_HANDLERS) for name in names), (tag, names)
        assert tag != "style" and (tag != "script" or "src" in names)
        element = Element(tag, {name: value or "" for name, value in attrs})
        self._open[-1].children.append(element)
        if tag not in _VOID:
            self._open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        # Elements that are closed in another order than they were opened are a template's mistake.
        assert self._open[-1].name == tag, (tag, [element.name for element in self._open])
        self._open.pop()

    def handle_data(self, data: str) -> None:
        self._open[-1].children.append(data)


def read_page(body: bytes) -> Element:
    """Return the document; fail on what is not well-formed, on inline styles and scripts, and on ids given twice."""
    reader = _Reader()
    reader.feed(body.decode())
    reader.close()
    assert reader._open == [reader.root], [element.name for element in reader._open]
    ids = [element.attributes["id"] for element in reader.root.all() if "id" in element.attributes]
    assert len(ids) == len(set(ids)), sorted(one for one in ids if ids.count(one) > 1)
    return reader.root
