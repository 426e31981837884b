"""Files as a kill, a full disk or a stranger leaves them: cut short, overwritten, or with values of another kind."""

import copy
import json


WRONG_VALUES = (None, True, -1, 0, 2**70, 10**400, float("nan"), float("inf"), "x", "", "../x", [], {}, [None], ["x"])
WRONG_VALUES += ({"a": 1}, [[1]])


def wrong_contents(content, rng, count):
    """`count` copies of a JSON value, in each of which one part, of any depth, is of another kind or gone."""
    places = list(_places(content))
    for _ in range(count):
        changed = copy.deepcopy(content)
        *path, last = places[rng.integers(len(places))]
        part = changed
        for key in path:
            part = part[key]
        if rng.random() < 0.2:
            del part[last]
        else:
            part[last] = copy.deepcopy(WRONG_VALUES[rng.integers(len(WRONG_VALUES))])
        yield changed


def wrong_json(content, rng, count):
    """Texts of `count` files: wrong contents, and some that are cut or are no mapping at all."""
    text = json.dumps(content)
    for number, changed in enumerate(wrong_contents(content, rng, count)):
        if number % 4 == 0:
            yield text[: rng.integers(len(text))]
        elif number % 40 == 1:
            yield json.dumps(WRONG_VALUES[rng.integers(len(WRONG_VALUES))])
        else:
            yield json.dumps(changed)


def damaged(data, rng, count):
    """`count` copies of a file's bytes: cut, with a stretch of zeros or of noise, or with one byte changed."""
    for number in range(count):
        at = int(rng.integers(len(data)))
        if number % 4 == 0:
            yield data[:at]
            continue
        length = 1 if number % 4 == 1 else int(rng.integers(1, 64))
        stretch = bytes(length) if number % 4 == 2 else rng.bytes(length)
        yield data[:at] + stretch + data[at + length :]


def _places(content, path=()):
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from _places(value, (*path, key))
