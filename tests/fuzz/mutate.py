"""Documents near valid ones: those of the corpus with a few changes, of their bytes or of their JSON."""

import json
from collections.abc import Iterator, Sequence
from random import Random
from typing import Any

ODD: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    1.5,
    10**30,
    10**400,
    1e308,
    float("inf"),
    float("nan"),
    "",
    "0",
    "-1",
    "1e999",
    "\u0000",
    "\ud800",
    "\u2028",
    '"',
    "\\",
    "9" * 400,
    "9" * 5000,
    "a\nb",
    "\u0663",
    "${POLLER_FUZZ}",
    [],
    {},
    [[]],
    {"": {}},
    {"Ref": "Stage"},
)
_SNIPPETS = (
    b"\0", b"\xff", b"\xed\xa0\x80", b"\n", b"\r\n", b'"', b"\\", b"{", b"[", b"]", b"}", b"null", b"1e999", b"NaN",
    b"\\ud800", b"${", b"${POLLER_FUZZ}", b"*", b"&a ", b"!Ref ", b": ", b"- ", b"%", b"=", b",", b"9" * 30,
)  # fmt: skip


def near(documents: Sequence[bytes], chance: Random) -> bytes:
    """One of the documents after one to four changes."""
    document = chance.choice(documents)
    for _ in range(chance.randint(1, 4)):
        document = changed(document, documents, chance)
    return document


def changed(document: bytes, others: Sequence[bytes], chance: Random) -> bytes:
    """The document after one change. `others`: what a part of may be put into it."""
    return _changed_json(document, chance) or _changed_bytes(document, others, chance)


def _changed_bytes(document: bytes, others: Sequence[bytes], chance: Random) -> bytes:
    start = chance.randint(0, len(document))
    end = min(len(document), start + chance.randint(0, 40))
    match chance.randrange(6):
        case 0:
            return document[:start]
        case 1:
            return document[:start] + document[end:]
        case 2:
            return document[:start] + chance.choice(_SNIPPETS) + document[end:]
        case 3:
            return document[:start] + chance.randbytes(chance.randint(1, 8)) + document[end:]
        case 4:
            return document[:end] + document[start:]
        case _:
            other = chance.choice(others)
            return document[:start] + other[chance.randint(0, len(other)) :]


def _changed_json(document: bytes, chance: Random) -> bytes | None:
    """One value of a JSON document is another one, gone, or somewhere else too. Of a text with more around it the part
    from the first brace to the last one. None: half of the time, and when it has no JSON.
    """
    if chance.random() < 0.5:
        return None
    start, end = document.find(b"{"), document.rfind(b"}") + 1
    try:
        root = json.loads(document[start:end])
        places = list(_places(root))
    except (ValueError, RecursionError):
        return None
    if not places:
        return None
    box, key = chance.choice(places)
    match chance.randrange(5):
        case 0:
            box[key] = chance.choice(ODD)
        case 1:
            del box[key]
        case 2:
            other, name = chance.choice(places)
            box[key] = json.loads(json.dumps(other[name]))
        case 3 if isinstance(box, dict):
            box[chance.choice(("", "a.b", "x" * 300, key.lower(), key.upper()))] = box.pop(key)
        case _:
            box[key] = "@deep@"
    depth = chance.choice((30, 90, 400, 900, 980))
    try:
        text = json.dumps(root).replace('"@deep@"', "[" * depth + "]" * depth)
    except (ValueError, RecursionError):
        return None
    return document[:start] + text.encode() + document[end:]


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every value inside, as the container and its key."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(items):
        yield value, key
        yield from _places(item)
