"""For the tests of saved state: through JSON and back, and states with something wrong in them."""

import copy
import json
from typing import Any

from hypothesis import strategies as st

JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 300),
    st.sampled_from(
        [-1, 1 << 16, 1 << 32, 1 << 64, 1 << 200, 1.5, float("nan"), "", "zz", "ff", "ä", [], {}]
    ),
    st.binary(max_size=20).map(bytes.hex),
    st.lists(st.integers(-1, 5), max_size=3),
)


def through_json(state: dict[str, Any]) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(json.dumps(state))
    assert loaded == state, "the state is not what JSON can carry"
    return loaded


def places(state: Any) -> list[tuple[Any, ...]]:
    """The path to every value within `state`."""
    if isinstance(state, dict):
        items = list(state.items())
    elif isinstance(state, list):
        items = list(enumerate(state))
    else:
        return []
    return [path for key, value in items for path in [(key,), *((key, *rest) for rest in places(value))]]


@st.composite
def mutated(draw: st.DrawFn, state: dict[str, Any]) -> dict[str, Any]:
    """A copy of `state` in which up to three values are others, or are missing."""
    state = copy.deepcopy(state)
    for _ in range(draw(st.integers(1, 3))):
        found = places(state)
        if not found:
            break
        path = draw(st.sampled_from(found))
        parent: Any = state
        for key in path[:-1]:
            parent = parent[key]
        value = parent[path[-1]]
        choice = draw(st.integers(0, 5))
        if choice == 0:
            del parent[path[-1]]
        elif choice <= 2 and isinstance(value, str) and value:
            # The right form and another content.
            position = draw(st.integers(0, len(value) - 1))
            parent[path[-1]] = (
                value[:position] + draw(st.sampled_from("0123456789abcdef")) + value[position + 1 :]
            )
        elif choice <= 2 and type(value) is int:
            parent[path[-1]] = value ^ 1 << draw(st.integers(0, 40))
        else:
            parent[path[-1]] = draw(JUNK)
    return state
