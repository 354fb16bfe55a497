"""The bounded store, against a plain list in the order of use."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from qcowfs.metadata.lru import BoundedStore

KEYS = st.integers(0, 5)
COSTS = st.integers(0, 12)
STEPS = st.lists(st.tuples(KEYS, st.none() | COSTS), max_size=40)
LIMIT = 20


@given(STEPS)
def test_the_store_agrees_with_a_list_in_the_order_of_use(steps: list[tuple[int, int | None]]) -> None:
    store: BoundedStore[int, str] = BoundedStore(LIMIT)
    used: list[tuple[int, str, int]] = []  # the least recently used first
    for number, (key, cost) in enumerate(steps):
        known = next((entry for entry in used if entry[0] == key), None)
        used = [entry for entry in used if entry is not known]
        if cost is None:
            assert store.get(key) == (known[1] if known else None)
            used += [known] if known else []
        else:
            store.put(key, str(number), cost)
            used.append((key, str(number), cost))
            while sum(c for _, _, c in used) > LIMIT and len(used) > 1:
                del used[0]
        assert store.bytes_used == sum(c for _, _, c in used)
    assert [store.get(key) for key, _, _ in used] == [value for _, value, _ in used]


def test_the_newest_value_stays_even_where_it_is_over_the_limit() -> None:
    store: BoundedStore[str, int] = BoundedStore(10)
    store.put("small", 1, 5)
    store.put("large", 2, 11)
    assert (store.get("small"), store.get("large"), store.bytes_used) == (None, 2, 11)
    store.put("next", 3, 1)
    assert (store.get("large"), store.get("next"), store.bytes_used) == (None, 3, 1)


def test_a_look_up_keeps_a_value_longer() -> None:
    store: BoundedStore[str, int] = BoundedStore(2)
    store.put("a", 1, 1)
    store.put("b", 2, 1)
    assert store.get("a") == 1
    store.put("c", 3, 1)
    assert (store.get("a"), store.get("b"), store.get("c")) == (1, None, 3)
