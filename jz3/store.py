"""The feature store: append-only shards of fixed-width rows, memory-mapped, checksummed.

A store is a folder with `store.json` (what the rows are) and, per shard, `NNNNNN.safetensors`
(codes [n, bytes] uint8, norm [n] float32, id [n] uint64) with a `NNNNNN.json` that holds its rows,
size and xxh3. Both are written whole or not at all, the JSON last, so that a shard without one does
not exist. Adding documents never touches old shards; readers may read while the store grows.
"""

import contextlib
import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jz3.errors import Jz3Error
from jz3.files import atomic_path, hash_file, read_json, write_json

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

FORMAT = "jz3-store-1"
CODES = {8: "int8", 4: "4bit", 1: "1bit"}
"""Bits per number and the code of jz3.ops.encode that has them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreInfo:
    """What a store's rows are; two stores fit together if all of it is equal."""

    kind: str
    k: int
    bits: int
    model_hash: str
    projection_hash: str
    """Hash of the fit's or sketch's file."""
    reduction: str


@dataclass(frozen=True, slots=True)
class Shard:
    """One shard's arrays, mapped from disk and not copied."""

    number: int
    codes: np.ndarray
    """[n, bytes] uint8."""
    norm: np.ndarray
    """[n] float32, of the whole gradient."""
    id: np.ndarray
    """[n] uint64."""


def open_store(folder: Path, info: StoreInfo) -> None:
    """Create the store `folder`, or check that what is there holds the same kind of rows.

    Raises:
        Jz3Error: the folder holds a store of another kind; the differences are named.
    """
    path = folder / "store.json"
    if not path.is_file():
        write_json(path, {"format": FORMAT, **asdict(info)})
        return
    found, wanted = asdict(read_info(folder)), asdict(info)
    different = [
        f"{key}: {found[key]!r} in the store, {wanted[key]!r} now"
        for key in wanted
        if found[key] != wanted[key]
    ]
    if different:
        raise Jz3Error(f"{folder} holds other features ({'; '.join(different)}); use another folder")


def read_info(folder: Path) -> StoreInfo:
    """Read what a store's rows are."""
    table = read_json(folder / "store.json")
    if table.pop("format", None) != FORMAT:
        raise Jz3Error(f"{folder / 'store.json'} is not of the format {FORMAT!r}")
    return StoreInfo(**table)


def has_shard(folder: Path, number: int) -> bool:
    """Tell whether a shard is there whole."""
    return (folder / f"{number:06d}.json").is_file()


def write_shard(
    folder: Path,
    number: int,
    ids: list[str],
    values: "torch.Tensor",
    norm: "torch.Tensor",
    projection: "Coding",
) -> None:
    """Code and write one shard.

    Args:
        folder: the store.
        number: the shard's number.
        ids: n document ids of 16 hexadecimal digits.
        values: [n, K] float32, unit-norm features.
        norm: [n] float32.
        projection: mean, scale and bits of the code.
    """
    from safetensors.numpy import save_file

    from jz3.ops.encode import encode

    codes = encode(values, projection.mean, projection.scale, CODES[projection.bits])
    arrays = {
        "codes": codes.numpy(),
        "norm": norm.numpy().astype(np.float32),
        "id": np.array([int(i, 16) for i in ids], dtype=np.uint64),
    }
    path = folder / f"{number:06d}.safetensors"
    with atomic_path(path) as part:
        save_file(arrays, part)
    write_json(
        folder / f"{number:06d}.json",
        {"rows": len(ids), "bytes": path.stat().st_size, "xxh3": hash_file(path)},
    )


@dataclass(frozen=True, slots=True)
class Coding:
    """How numbers become codes: standardised by mean and scale, then `bits` each."""

    mean: "torch.Tensor"
    scale: "torch.Tensor"
    bits: int


class Store:
    """Reads a store; a damaged shard is named, reported and left out."""

    def __init__(self, folder: Path, verify: bool = False) -> None:
        """Map all whole shards.

        Args:
            folder: the store.
            verify: also check every shard's checksum, not only its size.
        """
        self.folder, self.info = folder, read_info(folder)
        self.damaged: dict[str, str] = {}
        """File name and what is wrong with it."""
        self.shards: list[Shard] = []
        for sidecar in sorted(folder.glob("[0-9]*.json")):
            path = sidecar.with_suffix(".safetensors")
            try:
                self.shards.append(_map_shard(path, read_json(sidecar), verify))
            except Jz3Error as error:
                self.damaged[path.name] = str(error)
                log.warning("shard left out: %s", error)

    def __len__(self) -> int:
        return sum(len(s.id) for s in self.shards)

    def values(self, coding: Coding) -> Iterator[tuple[Shard, "torch.Tensor"]]:
        """Yield every shard with its decoded unit-norm features [n, K] float32."""
        import torch

        from jz3.ops.encode import decode

        for shard in self.shards:
            codes = torch.from_numpy(np.array(shard.codes))
            yield shard, decode(codes, coding.mean, coding.scale, CODES[coding.bits])


def _map_shard(path: Path, sidecar: dict[str, int | str], verify: bool) -> Shard:
    if not path.is_file():
        raise Jz3Error(f"{path} is missing; delete its .json and run the stage that writes it")
    remedy = "delete it with its .json and run the stage that writes it"
    if path.stat().st_size != sidecar["bytes"]:
        raise Jz3Error(f"{path} has {path.stat().st_size} bytes, expected {sidecar['bytes']}; {remedy}")
    if verify and hash_file(path) != sidecar["xxh3"]:
        raise Jz3Error(f"{path} doesn't have the checksum {sidecar['xxh3']}; {remedy}")
    arrays = _map_safetensors(path)
    with contextlib.suppress(KeyError):
        if len(arrays["id"]) == sidecar["rows"]:
            return Shard(int(path.stem), arrays["codes"], arrays["norm"], arrays["id"])
    raise Jz3Error(f"{path} doesn't hold the {sidecar['rows']} rows that its .json names; {remedy}")


def _map_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Map a safetensors file's arrays without reading them (its own reader copies)."""
    types = {"U8": np.uint8, "F32": np.float32, "U64": np.uint64}
    with open(path, "rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        try:
            header = json.loads(handle.read(length))
        except (ValueError, MemoryError) as error:
            raise Jz3Error(
                f"{path} has no readable header; delete it with its .json and run again"
            ) from error
    data = np.memmap(path, np.uint8, "r")
    arrays = {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, stop = entry["data_offsets"]
            raw = data[8 + length + start : 8 + length + stop]
            arrays[name] = raw.view(types[entry["dtype"]]).reshape(entry["shape"])
    return arrays
