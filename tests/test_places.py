"""Where clusters lie, remembered."""

from __future__ import annotations

from qcowfs.metadata import places
from qcowfs.metadata.places import Places


class Table:
    """A table of clusters that counts how often it is asked."""

    def __init__(self, entries: dict[int, int]) -> None:
        self.entries = entries
        self.asked: list[int] = []

    def look_up(self, cluster: int) -> int | None:
        self.asked.append(cluster)
        return self.entries.get(cluster)


def test_a_cluster_is_looked_up_once() -> None:
    table = Table({5: 0x50000})
    known = Places(table.look_up)
    assert [known.find(5), known.find(5)] == [0x50000, 0x50000]
    assert table.asked == [5]


def test_a_cluster_that_has_no_place_is_looked_up_again() -> None:
    table = Table({})
    known = Places(table.look_up)
    assert known.find(5) is None
    table.entries[5] = 0x50000
    assert known.find(5) == 0x50000


def test_a_forgotten_cluster_is_looked_up_anew() -> None:
    table = Table({5: 0x50000})
    known = Places(table.look_up)
    known.find(5)
    table.entries[5] = 0x90000
    known.forget(5)
    assert known.find(5) == 0x90000


def test_what_is_noted_needs_no_lookup() -> None:
    table = Table({})
    known = Places(table.look_up)
    known.note(5, 0x50000)
    assert (known.find(5), table.asked) == (0x50000, [])


def test_who_asks_for_many_clusters_of_an_area_learns_all_of_it() -> None:
    table = Table({cluster: cluster << 16 for cluster in range(200) if cluster != 70})
    known = Places(table.look_up)
    for cluster in (64, 127, 90, 80):
        known.find(cluster)
    assert known.known == {cluster: cluster << 16 for cluster in range(64, 128) if cluster != 70}


def test_no_more_is_remembered_than_the_bound_and_one_area() -> None:
    known = Places(lambda cluster: cluster << 9)
    for cluster in range(places.MOST_KNOWN * 2):
        assert known.find(cluster) == cluster << 9
    assert len(known.known) <= places.MOST_KNOWN + 64
