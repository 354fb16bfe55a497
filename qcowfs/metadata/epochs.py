"""Which reads are still under way, so that no cluster is reused beneath a reader.

Owns the numbering of epochs. Must not know what is read. A cluster that was dropped in an epoch may be reused
once no read that began in that epoch or before is left.
"""

from __future__ import annotations

from collections import Counter


class ReadEpochs:
    """Counts the reads of each epoch."""

    def __init__(self) -> None:
        """Start in epoch 0 without reads."""
        self.current = 0
        self._reads: Counter[int] = Counter()

    def enter(self) -> int:
        """Begin a read that may wait between finding a cluster and having its bytes; its epoch."""
        epoch = self.current
        self._reads[epoch] += 1
        return epoch

    def leave(self, epoch: int) -> None:
        """End a read that began in that epoch."""
        self._reads[epoch] -= 1
        if not self._reads[epoch]:
            del self._reads[epoch]

    def advance(self) -> int:
        """Begin a new epoch; everything dropped before the returned one may be reused."""
        self.current += 1
        return min(self._reads, default=self.current)
