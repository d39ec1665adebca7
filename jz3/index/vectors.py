"""What is searched: the features of a store, or those of several checkpoints side by side.

    <x_i, y> = sum over checkpoints c of w_c * <phi_c(i), phi_c(q)>
    x_i = [sqrt(w_1) phi_1(i), sqrt(w_2) phi_2(i), ...],  y = [sqrt(w_1) phi_1(q), sqrt(w_2) phi_2(q), ...]

So one index and one inner product give the checkpoints' weighted sum.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from jz3.errors import Jz3Error
from jz3.files import canonical_json, hash_text
from jz3.store import CheckpointStore, Coding, Shard, Store, scan, scan_checkpoints
from jz3.store.format import decode_rows
from jz3.store.scan import check_checkpoints, differ

if TYPE_CHECKING:
    import torch

BLOCK = 4096


@dataclass(frozen=True, slots=True)
class Member:
    """A checkpoint's features."""

    store: Store
    coding: Coding
    weight: float = 1.0


class Vectors:
    """The members' features as one vector [K] a document, K the sum of theirs."""

    def __init__(self, members: Sequence[Member]) -> None:
        """Take stores as they are open.

        Args:
            members: at least one; several hold the same documents in the same shards.

        Raises:
            Jz3Error: several can't be combined, see `jz3.store.scan.check_checkpoints`, or a coding is of
                other rows.
        """
        self.members = list(members)
        first = self.members[0].store
        self.folder, self.shards = first.folder, first.shards
        self.k = sum(member.store.info.k for member in self.members)
        self._positions = {shard.number: position for position, shard in enumerate(self.shards)}
        for member in self.members:
            member.store.check(member.coding)
        if len(self.members) > 1:
            check_checkpoints([member.store for member in self.members])

    def __len__(self) -> int:
        return len(self.members[0].store)

    @property
    def identity(self) -> str:
        """What the vectors are, see StoreInfo.identity."""
        parts = [(member.store.info.identity(), member.weight) for member in self.members]
        return parts[0][0] if len(parts) == 1 else hash_text(canonical_json(parts))

    @property
    def damaged(self) -> list[str]:
        """What is wrong with shards that were left out."""
        return [text for member in self.members for text in member.store.damaged.values()]

    def checksums(self) -> dict[int, str]:
        """Return per shard's number what tells it from others, of all members."""
        columns = zip(*(member.store.shards for member in self.members), strict=True)
        return {shards[0].number: "+".join(s.xxh3 for s in shards) for shards in columns}

    def weighted(self, parts: "Sequence[torch.Tensor]") -> "torch.Tensor":
        """Join the members' features [N, K_c] float32 of the same documents or queries.

        Returns:
            [N, K] float32.
        """
        import torch

        if len(parts) == 1:
            return parts[0]
        weighed = [part * member.weight**0.5 for part, member in zip(parts, self.members, strict=True)]
        return torch.cat(weighed, 1)

    def blocks(self, shards: Sequence[Shard] | None = None) -> Iterator[tuple[Shard, int, np.ndarray]]:
        """Yield vectors in blocks of at most BLOCK, whatever the size of the shards.

        Args:
            shards: which of `self.shards`; all by default.

        Yields:
            A shard, the block's first row in it, its vectors [n, K] float32.

        Raises:
            Jz3Error: a shard can't be read, or the members' hold different documents.
        """
        for shard in self.shards if shards is None else shards:
            self._check_ids(shard)
            for start in range(0, shard.rows, BLOCK):
                yield shard, start, self.rows(shard, slice(start, start + BLOCK))

    def rows(self, shard: Shard, rows: np.ndarray | slice) -> np.ndarray:
        """Return the vectors [n, K] float32 of some rows of a shard."""
        import torch

        parts = []
        for member, there in zip(self.members, self._of(shard), strict=True):
            codes = torch.from_numpy(np.asarray(there.codes[rows]))
            parts.append(decode_rows(codes, member.coding))
        return self.weighted(parts).numpy()

    def scan(self, queries: "torch.Tensor", k: int) -> "tuple[torch.Tensor, np.ndarray]":
        """Find the k documents with the largest inner products with every query [Q, K], looking at every one.

        Returns:
            scores and document ids, see `jz3.store.scan`.

        Raises:
            ValueError, Jz3Error: see `jz3.store.scan` and `jz3.store.scan_checkpoints`.
        """
        if len(self.members) == 1:
            return scan(self.members[0].store, self.members[0].coding, queries, k)
        parts = queries.split([member.store.info.k for member in self.members], 1)
        return scan_checkpoints(
            [
                CheckpointStore(
                    store=m.store, coding=m.coding, queries=part.contiguous(), weight=m.weight**0.5
                )
                for m, part in zip(self.members, parts, strict=True)
            ],
            k,
        )

    def _of(self, shard: Shard) -> list[Shard]:
        """Return every member's shard that stands where this one of the first does."""
        return [member.store.shards[self._positions[shard.number]] for member in self.members]

    def _check_ids(self, shard: Shard) -> None:
        for member, there in zip(self.members[1:], self._of(shard)[1:], strict=True):
            if not np.array_equal(there.id, shard.id):
                raise Jz3Error(differ(self.members[0].store, member.store))
