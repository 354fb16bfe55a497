"""Reads under way hold back what was dropped since they began."""

from __future__ import annotations

from qcowfs.metadata.epochs import ReadEpochs


def test_without_reads_everything_dropped_so_far_may_be_reused() -> None:
    epochs = ReadEpochs()
    assert [epochs.advance(), epochs.advance()] == [1, 2]
    assert epochs.current == 2


def test_a_read_holds_back_its_epoch_and_later_ones() -> None:
    epochs = ReadEpochs()
    epochs.advance()
    epoch = epochs.enter()
    assert [epochs.advance(), epochs.advance()] == [1, 1]
    epochs.leave(epoch)
    assert epochs.advance() == epochs.current == 4


def test_the_oldest_read_counts() -> None:
    epochs = ReadEpochs()
    old = epochs.enter()
    epochs.advance()
    new = epochs.enter()
    assert epochs.advance() == old == 0
    epochs.leave(old)
    assert epochs.advance() == new == 1
    epochs.leave(new)
    assert epochs.advance() == 4


def test_reads_of_one_epoch_are_counted() -> None:
    epochs = ReadEpochs()
    first, second = epochs.enter(), epochs.enter()
    epochs.leave(first)
    assert epochs.advance() == 0
    epochs.leave(second)
    assert epochs.advance() == epochs.current
