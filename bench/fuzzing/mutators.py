"""Seeded damage to bytes, to lines of text, and to values of JSON."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import numpy as np

TOKENS = [
    b"\0", b"\t", b"\n", b"\r", b"\r\n", b'"', b"'", b"\\", b",", b";", b"=", b"[", b"]", b"{", b"}", b"#",
    b"\xff\xfe", b"\xef\xbb\xbf", b"\xe2\x80\xa8", b"\xed\xa0\x80", b"\\ud800", b"\x1b[31m", b"<script>",
    b"nan", b"inf", b"-inf", b"NaN", b"-Infinity", b"null", b"true", b"-1", b"0", b"1e400", b"1e-400", b"0x7f",
    b"9" * 400, b"9" * 5000, b"[" * 70, b"[" * 3000, b'{"a":' * 3000, b"x" * 70000, b"~nobody/x", b"~", b"../../x",
    b"a" * 300, b"1979-05-27T07:32:00Z", b"[]", b"{}", b'""', b"'''", b'["a"]', b"a.b.c = 1\n", b"[data]\n", b"[a]\n",
]  # fmt: skip
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 7, 10**9, 10**18, 10**25, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"),
    "", "a", "\0", "\ud800", "é" * 300, "<script>", "../x", "/etc/passwd", [], {}, [1], ["a"], [[]], [None], {"a": 1},
    {"": None}, [1, 2, 3], [0.1, 0.2, 0.3], ["a", "b"], "x" * 70000,
]  # fmt: skip


def broken(raw: bytes, rng: np.random.Generator, others: list[bytes]) -> bytes:
    """Return the bytes after one to four of: flips, cuts, doubled and zeroed pieces, tokens, pieces of other inputs."""
    out = bytearray(raw)
    for _ in range(int(rng.integers(1, 5))):
        at, to = sorted(int(k) for k in rng.integers(0, len(out) + 1, 2))
        to = min(to, at + int(rng.choice([1, 4, 16, 512])))
        kind = int(rng.integers(0, 8))
        if kind <= 1 and out:
            for k in rng.integers(0, len(out), int(rng.choice([1, 1, 3, 30]))):
                out[k] ^= 1 << int(rng.integers(0, 8))
        elif kind == 2:
            del out[at : len(out) if rng.random() < 0.3 else to]
        elif kind == 3:
            out[at:at] = out[at:to]
        elif kind == 4:
            out[at:to] = bytes([int(rng.choice([0, 255]))]) * (to - at)
        elif kind <= 6:
            token = TOKENS[int(rng.integers(len(TOKENS)))]
            out[at : at if kind == 5 else at + len(token)] = token
        else:
            other = others[int(rng.integers(len(others)))]
            start = int(rng.integers(0, len(other) + 1))
            out[at:to] = other[start : start + int(rng.choice([4, 64, 4096]))]
    return bytes(out)


def broken_line(raw: bytes, rng: np.random.Generator) -> bytes:
    """Return `key = value` lines with one value or key replaced, or a line doubled, dropped or moved."""
    lines = raw.split(b"\n")
    k = int(rng.integers(len(lines)))
    key, equals, value = lines[k].partition(b"=")
    token = TOKENS[int(rng.integers(len(TOKENS)))]
    kind = int(rng.integers(0, 6))
    if kind <= 2 and equals:
        quoted = [token, b'"' + token + b'"', b"[" + token + b"]", json.dumps(_value(rng)).encode()]
        lines[k] = key + b"= " + quoted[int(rng.integers(len(quoted)))]
    elif kind == 3:
        lines[k] = token + equals + value
    elif kind == 4:
        del lines[k]
    else:
        lines.insert(int(rng.integers(len(lines))), lines[k])
    return b"\n".join(lines)


def broken_json(text: str, rng: np.random.Generator) -> str:
    """Return the JSON with one to three values replaced, dropped or added anywhere in it."""
    value = json.loads(text)
    for _ in range(int(rng.integers(1, 4))):
        places: list[tuple[Any, Any]] = []
        _walk(value, places.append)
        if not places:
            return json.dumps(_value(rng))
        holder, key = places[int(rng.integers(len(places)))]
        kind = int(rng.integers(0, 6))
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder[str(_value(rng))[:50]] = _value(rng)
        elif kind == 1:
            holder.append(_value(rng))
        elif kind == 2:
            other, there = places[int(rng.integers(len(places)))]
            holder[key] = json.loads(json.dumps(other.get(there) if isinstance(other, dict) else None))
        else:
            holder[key] = _value(rng)
    return json.dumps(value)


def _walk(value: Any, tell: Callable[[tuple[Any, Any]], None]) -> None:
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        tell((value, key))
        _walk(value[key], tell)


def _value(rng: np.random.Generator) -> Any:
    return copy.deepcopy(VALUES[int(rng.integers(len(VALUES)))])
