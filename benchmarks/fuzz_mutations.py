"""Mutations of what JSON holds, and of bytes: one or two, and rarely three, at places by chance."""

import copy
import functools
import json
import math

TEXTS = [
    *("", " \n", "a", "é🙂", "\ud800", "a\x00b", "\x1b]52;c;aGk=\x07", "\u202egnp", "\ufeff", "\r"),
    *("null", "[", "{}", "NaN", "-1", "1e999", "../x", "/dev/zero", "hf://x", "{{ x }}", "{x}"),
    *("<think>", "</think>", "<|end|>", "<|im_end|>", "assistant", "x" * 5000, "9" * 5000, "a.b.c"),
]
DEEP = functools.reduce(lambda inner, _: [inner], range(150), "deep")
ODD = [None, True, False, 0, -1, 1, 7, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, math.nan, math.inf]
ODD += [*TEXTS, [], {}, [[]], {"": ""}, {"a": {"b": [1]}}, DEEP, [0] * 3000]
BYTES = [b"", b"\0", b"\xff", b"\xef\xbb\xbf", b'"', b"\\", b"\n", b"\r", b"{", b"]", b",", b":"]
BYTES += [b"[" * 20_000, b"9" * 5000, b'{"a":' * 3000, b"\xed\xa0\x80", b"\xff\xfe", b"\t", b"-"]


def places(value):
    """(container, key) of every value inside."""
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from places(value[key])


def mutated(rng, value):
    """A copy of what JSON holds, with a few values replaced, removed, repeated or renamed."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        found = list(places(value))
        if not found:
            return rng.choice(ODD)
        (inside, key), (other, at) = rng.choice(found), rng.choice(found)
        match rng.randrange(6):
            case 0:
                del inside[key]
            case 1:
                inside[key] = copy.deepcopy(other[at])
            case 2 if isinstance(inside, list):
                inside.insert(rng.randint(0, len(inside)), copy.deepcopy(inside[key]))
            case 2:
                inside[rng.choice([*TEXTS, at]) if isinstance(at, str) else "a"] = inside.pop(key)
            case 3 if isinstance(inside[key], str):
                text, n = inside[key], rng.randint(0, len(inside[key]))
                inside[key] = text[:n] + rng.choice(TEXTS) + text[n + rng.randint(0, 4) :]
            case 3 if type(inside[key]) is int:
                inside[key] += rng.choice([-1, 1, 8, -(2**33), 2**40])
            case _:
                inside[key] = copy.deepcopy(rng.choice(ODD))
    return value


def torn(rng, data):
    """Bytes with a few cut, put in, turned or repeated."""
    for _ in range(rng.choice([1, 1, 2, 3])):
        a, b = sorted((rng.randint(0, len(data)), rng.randint(0, len(data))))
        match rng.randrange(6):
            case 0:
                data = data[:a]
            case 1:
                data = data[:a] + data[min(b, a + 8) :]
            case 2:
                data = data[:a] + data[a:b] + data[a:]
            case 3 if data:
                at = min(a, len(data) - 1)
                data = data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
            case _:
                data = data[:a] + rng.choice(BYTES) + data[a + rng.randint(0, 2) :]
    return data


def dumped(value):
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")


def damaged(rng, path):
    """Mutate a file of JSON, in its values or its bytes; or put something else in its place."""
    data = path.read_bytes()
    match rng.randrange(8):
        case 0:
            path.unlink()
        case 1 if rng.random() < 0.3:
            path.unlink()
            path.mkdir()
        case 1 | 2 | 3:
            path.write_bytes(torn(rng, data))
        case _:
            path.write_bytes(dumped(mutated(rng, json.loads(data))))
