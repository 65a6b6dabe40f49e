"""Write docs/reference/ from signatures and docstrings: python docs/make_reference.py, or make reference."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from torch import nn

import fastbegan
import fastbegan.layers
import fastbegan_kernels

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "reference"
PAGES = {"fastbegan_kernels": fastbegan_kernels, "fastbegan.layers": fastbegan.layers, "fastbegan": fastbegan}
NAMES = {name for module in PAGES.values() for name in module.__all__}
NOTE = "<!-- made by docs/make_reference.py (make reference) -->"


def pages() -> dict[str, str]:
    """The text of every page by its file's name."""
    made = {f"{name}.md": _page(name, module) for name, module in PAGES.items()}
    links = [f"- [{name}]({name}.md): {_doc(module).splitlines()[0]}\n" for name, module in PAGES.items()]
    return made | {"README.md": f"{NOTE}\n# Reference\n\n{''.join(links)}"}


def undocumented() -> list[str]:
    """Public functions, classes and methods without a docstring, but for methods that stand for one of nn.Module."""
    found = []
    for module in PAGES.values():
        for name in module.__all__:
            value = getattr(module, name)
            found += [f"{module.__name__}.{name}"] if callable(value) and not _doc(value) else []
            for member, _ in _members(value):
                if not _doc(value, member) and not hasattr(nn.Module, member):
                    found.append(f"{module.__name__}.{name}.{member}")
    return found


def _page(title: str, module: ModuleType) -> str:
    links = " · ".join(f"[{name}](#{name.lower()})" for name in module.__all__)
    others = ", ".join(f"[{name}]({name}.md)" for name in PAGES if name != title)
    parts = [f"{NOTE}\n# {title}", _doc(module), links, f"Other pages: {others}"]
    for name in module.__all__:
        value = getattr(module, name)
        parts.append(f"## {name}")
        if title == "fastbegan" and name in fastbegan.layers.__all__:
            parts.append(f"See [fastbegan.layers](fastbegan.layers.md#{name.lower()}).")
        elif isinstance(value, ModuleType):
            parts += [_source(value), _doc(value)]
            if name in ("layers", "losses"):
                parts.append("All of it is on the page [fastbegan.layers](fastbegan.layers.md).")
        elif callable(value):
            parts += _entry(name, value)
        else:
            parts.append(f"`{type(value).__name__}` with the keys {', '.join(f'`{key}`' for key in value)}.")
    return "\n\n".join(part for part in parts if part) + "\n"


def _entry(name: str, value: Any) -> list[str]:
    bare = dataclasses.is_dataclass(value) or (isinstance(value, type) and issubclass(value, Exception))
    parts = [_source(value), "" if bare else _code(name, value), _doc(value), "\n".join(_fields(value))]
    if isinstance(value, type) and not bare:
        parts.append(_doc(value, "__init__"))
    if links := [f"[{base.__name__}](#{base.__name__.lower()})" for base in _listed_bases(value)]:
        parts.append(f"Also everything of {', '.join(links)}.")
    for member, held in _members(value):
        parts += [f"### {name}.{member}", _code(member, held), _doc(value, member)]
    return parts


def _ours(value: Any) -> bool:
    return value.__module__.split(".")[0] in ("fastbegan", "fastbegan_kernels")


def _markdown(text: str) -> str:
    """A docstring with its sections (Args, Returns, Raises ...) as lists under a bold word."""
    lines, section = [], ""
    for line in text.splitlines():
        if heading := re.fullmatch(r"(Args|Attributes|Returns|Yields|Raises):", line):
            section = heading[1]
            lines += [f"**{section}**", ""]
        elif section and line.startswith("    "):
            entry, item = line[4:], re.match(r"    (\S+): ", line)
            listed = section not in ("Returns", "Yields")
            lines.append(f"- `{item[1]}`: {line[item.end() :]}" if item and listed else entry.replace("    ", "  "))
        else:
            section = section if not line else ""
            lines.append(line)
    return "\n".join(lines)


def _doc(value: Any, member: str | None = None) -> str:
    """A docstring; that of a method from the first of our classes that has one, for torch's change with its version."""
    if member is None:
        return _markdown(inspect.cleandoc(value.__doc__ or ""))
    held = (vars(cls)[member].__doc__ for cls in value.__mro__ if _ours(cls) and member in vars(cls))
    return _markdown(inspect.cleandoc(next(filter(None, held), "")))


def _listed_bases(value: Any) -> list[type]:
    return [base for base in getattr(value, "__bases__", ()) if _ours(base) and base.__name__ in NAMES]


def _members(owner: Any) -> Iterator[tuple[str, Any]]:
    """Public methods and properties of a class, with those of its bases that have no entry of their own."""
    seen = set()
    for cls in owner.__mro__ if isinstance(owner, type) else ():
        if cls is owner or (_ours(cls) and not any(issubclass(base, cls) for base in _listed_bases(owner))):
            for name, held in vars(cls).items():
                held = held.__func__ if isinstance(held, (classmethod, staticmethod)) else held
                known = name.startswith("_") or name == "extra_repr" or name in seen
                if not known and isinstance(held, (property, FunctionType)):
                    seen.add(name)
                    yield name, held


def _fields(owner: Any) -> Iterator[str]:
    """A dataclass's fields, those of its bases first, with the string under each."""
    bases = owner.__mro__[::-1] if isinstance(owner, type) and dataclasses.is_dataclass(owner) else ()
    for base in filter(dataclasses.is_dataclass, bases):
        body = getattr(ast.parse(inspect.getsource(base)).body[0], "body", [])  # pyright: ignore[reportArgumentType]
        for node, below in zip(body, [*body[1:], None], strict=False):
            if isinstance(node, ast.AnnAssign):
                text = (
                    below.value.value if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) else ""
                )
                yield f"- `{ast.unparse(node)}`: {' '.join(str(text).split())}".removesuffix(": ")


def _code(name: str, value: Any) -> str:
    """A declaration, annotations as in the source; "()" where the constructor is torch's."""
    if isinstance(value, property):
        return f"```python\n{name}: {value.fget.__annotations__['return'] if value.fget else ''}\n```"
    call = value.__init__ if isinstance(value, type) else value
    taken = inspect.signature(call) if _ours(call) else inspect.Signature()
    words, starred = [], False
    for one in taken.parameters.values():
        if one.kind is one.KEYWORD_ONLY and not starred:
            words.append("*")
        starred = starred or one.kind in (one.KEYWORD_ONLY, one.VAR_POSITIONAL)
        stars = {one.VAR_POSITIONAL: "*", one.VAR_KEYWORD: "**"}.get(one.kind, "")
        annotation = "" if one.annotation is one.empty else f": {one.annotation}"
        default = "" if one.default is one.empty else f" = {one.default!r}"
        words += [] if one.name in ("self", "cls") else [f"{stars}{one.name}{annotation}{default}"]
    result = taken.empty if isinstance(value, type) else taken.return_annotation
    end = ")" if result is taken.empty else f") -> {result}"
    lines = [f"{name}({', '.join(words)}{end}"]
    if len(lines[0]) > 110:
        lines = [f"{name}(", *(f"    {word}," for word in words), end]
    return "\n".join(["```python", *lines, "```"])


def _source(value: Any) -> str:
    path = Path(inspect.getsourcefile(value) or "").resolve().relative_to(ROOT).as_posix()
    return f"[{path}](../../{path})"


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, text in pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
    if missing := undocumented():
        sys.exit(f"error: no docstring: {', '.join(missing)}")
