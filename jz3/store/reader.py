"""Reading a store: all whole shards, while it may grow."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from jz3.errors import Jz3Error
from jz3.store.format import Coding, decode_rows, read_info, row_bytes
from jz3.store.shard import Shard, open_shard, read_sidecar

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)


class Store:
    """Reads a store; a damaged shard is named, reported and left out."""

    def __init__(self, folder: Path | str, verify: bool = False) -> None:
        """Find all whole shards.

        Args:
            folder: the store.
            verify: also check every shard's checksum, not only its size.

        Raises:
            Jz3Error: the folder holds no store.
        """
        self.folder, self.info = Path(folder), read_info(folder)
        self.damaged: dict[str, str] = {}
        """File name and what is wrong with it."""
        self.shards: list[Shard] = []
        self.refresh(verify)

    def __len__(self) -> int:
        return sum(s.rows for s in self.shards)

    def refresh(self, verify: bool = False) -> list[Shard]:
        """Take in what was written since the store was opened, and return the new shards in order."""
        known = {s.number for s in self.shards}
        identity, width = self.info.identity(), row_bytes(self.info.bits, self.info.k)
        new = []
        sidecars, sizes = _list(self.folder)
        for number, path in sorted(sidecars.items()):
            if number in known:
                continue
            name = f"{number:06d}.safetensors"
            try:
                shard = open_shard(
                    self.folder, number, read_sidecar(path), sizes.get(number, -1), identity, width
                )
                if verify:
                    shard.verify()
            except Jz3Error as error:
                if name not in self.damaged:
                    log.warning("shard left out: %s", error)
                self.damaged[name] = str(error)
                continue
            except FileNotFoundError:
                # Being replaced at this moment: it is there whole at the next look.
                continue
            self.damaged.pop(name, None)
            new.append(shard)
        self.shards = sorted([*self.shards, *new], key=lambda s: s.number)
        return new

    def values(self, coding: Coding) -> Iterator[tuple[Shard, "torch.Tensor"]]:
        """Yield every shard with its decoded unit-norm features [n, K] float32."""
        import torch

        self.check(coding)
        for shard in self.shards:
            yield shard, decode_rows(torch.from_numpy(shard.codes), coding)

    def check(self, coding: Coding) -> None:
        """Refuse a coding of other rows.

        Raises:
            Jz3Error: its bits or its number of coordinates are not the store's.
        """
        if coding.bits != self.info.bits or len(coding.mean) != self.info.k:
            raise Jz3Error(
                f"{self.folder} holds {self.info.k} numbers of {self.info.bits} bits a document, the coding is for "
                f"{len(coding.mean)} of {coding.bits} bits"
            )


def _list(folder: Path) -> tuple[dict[int, str], dict[int, int]]:
    """Return per shard number the path of its JSON and the size of its file, from one look at the folder."""
    sidecars: dict[int, str] = {}
    sizes: dict[int, int] = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            stem, _, suffix = entry.name.partition(".")
            if stem.isdecimal() and suffix == "json":
                sidecars[int(stem)] = entry.path
    # After the JSONs, which are written last: a shard that appears in between is seen at the next look.
    for number in sidecars:
        try:
            sizes[number] = os.stat(folder / f"{number:06d}.safetensors").st_size
        except FileNotFoundError:
            continue
    return sidecars, sizes
