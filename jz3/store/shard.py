"""One shard: a safetensors file of fixed-width rows and the JSON that says it is whole.

The file is laid out as `id` [n] uint64, `norm` [n] float32, `codes` [n, bytes] uint8 behind the
header, so that the number of rows and the file's size say where everything lies: opening a store
reads no shard.
"""

import contextlib
import errno
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from jz3.errors import Jz3Error
from jz3.files import hash_file, raise_trouble, write_json
from jz3.store.format import Coding, encode_rows, read_info, row_bytes

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

REMEDY = "delete it with its .json and run again what writes it"
ALIGNMENT = 64
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True, slots=True)
class Shard:
    """One shard on disk; its arrays are mapped when they are asked for, never copied.

    Every access maps the file anew and the mapping ends with the last array that uses it, so that
    a store of many shards doesn't hold their memory.
    """

    number: int
    path: Path
    rows: int
    size: int
    """Bytes of the file."""
    xxh3: str
    row_bytes: int

    @property
    def id(self) -> np.ndarray:
        """[n] uint64."""
        return self.id_and_codes()[0]

    @property
    def norm(self) -> np.ndarray:
        """[n] float32, of the whole gradient."""
        return self._mapped()[8 * self.rows : 12 * self.rows].view(np.float32)

    @property
    def codes(self) -> np.ndarray:
        """[n, bytes] uint8."""
        return self.id_and_codes()[1]

    def id_and_codes(self) -> tuple[np.ndarray, np.ndarray]:
        """Return both from one mapping."""
        data = self._mapped()
        codes = data[12 * self.rows :].reshape(self.rows, self.row_bytes)
        return data[: 8 * self.rows].view(np.uint64), codes

    def verify(self) -> None:
        """Compare the checksum.

        Raises:
            Jz3Error: it differs, or the file can't be read.
            OSError: the disk or its server is in trouble.
        """
        try:
            found = hash_file(self.path)
        except OSError as error:
            raise_trouble(error, self.path)
            raise Jz3Error(f"{self.path} can't be read ({error}); {REMEDY}") from error
        if found != self.xxh3:
            raise Jz3Error(f"{self.path} has the checksum {found}, expected {self.xxh3}; {REMEDY}")

    def _mapped(self) -> np.ndarray:
        """Map the file and return what is behind its header.

        Copy on write: torch takes such arrays without a copy and without a complaint, and nothing that is
        written to them reaches the file. torch's mappings, unlike numpy's, hold no file descriptor.
        """
        import torch

        try:
            found = self.path.stat().st_size
            data = torch.from_file(
                str(self.path), shared=False, size=min(found, self.size), dtype=torch.uint8
            ).numpy()
        except (OSError, RuntimeError) as error:
            raise_trouble(error, self.path)
            raise Jz3Error(f"{self.path} can't be mapped ({error}); {REMEDY}") from error
        header = self.size - self.rows * (12 + self.row_bytes)
        if found != self.size or int.from_bytes(data[:8].tobytes(), "little") != header - 8:
            raise Jz3Error(f"{self.path} doesn't hold the {self.rows} rows that its .json names; {REMEDY}")
        return data[header:]


def shard_path(folder: Path | str, number: int) -> Path:
    """Return the file of a shard; its JSON lies beside it."""
    return Path(folder) / f"{number:06d}.safetensors"


def has_shard(folder: Path | str, number: int) -> bool:
    """Tell whether a shard is there whole: its JSON and a file of the size that this names."""
    path = shard_path(folder, number)
    try:
        return read_sidecar(path.with_suffix(".json"))["bytes"] == path.stat().st_size
    except (OSError, Jz3Error):
        return False


def read_sidecar(path: Path | str) -> dict[str, Any]:
    """Read the JSON of a shard.

    Raises:
        Jz3Error: it is damaged.
        OSError: it can't be read.
    """
    with open(path, "rb") as handle:
        text = handle.read()
    with contextlib.suppress(ValueError):
        table = json.loads(text)
        wanted = {"rows": int, "bytes": int, "xxh3": str, "store": str}
        if isinstance(table, dict) and all(isinstance(table.get(k), t) for k, t in wanted.items()):
            return table
    raise Jz3Error(f"{path} is damaged; delete it with its .safetensors and run again what writes it")


def open_shard(
    folder: Path, number: int, sidecar: dict[str, Any], size: int, identity: str, width: int
) -> Shard:
    """Make a Shard of what its JSON and its file's size say.

    Args:
        folder: the store.
        number: the shard's number.
        sidecar: from `read_sidecar`.
        size: of the file in bytes; -1 if there is none.
        identity: of the store, see StoreInfo.identity.
        width: bytes of a row's codes.

    Raises:
        Jz3Error: the file is missing, truncated or of another store.
    """
    path = shard_path(folder, number)
    if size < 0:
        raise Jz3Error(f"{path} is missing; delete its .json and run again what writes it")
    if sidecar["store"] != identity:
        raise Jz3Error(f"{path} is of another store ({sidecar['store']}, this one is {identity}); {REMEDY}")
    if size != sidecar["bytes"]:
        raise Jz3Error(f"{path} has {size} bytes, expected {sidecar['bytes']}; {REMEDY}")
    rows = sidecar["rows"]
    if rows < 0 or size - rows * (12 + width) < 8:
        raise Jz3Error(f"{path} doesn't hold the {rows} rows that its .json names; {REMEDY}")
    return Shard(number, path, rows, size, sidecar["xxh3"], width)


def write_shard(
    folder: Path | str,
    number: int,
    ids: Sequence[str],
    values: "torch.Tensor",
    norm: "torch.Tensor",
    projection: Coding,
) -> None:
    """Code and write one shard, whole or not at all.

    A shard that is there already is replaced if it holds the same documents, as after a kill.

    Args:
        folder: the store, see `open_store`.
        number: the shard's number.
        ids: n document ids of 16 hexadecimal digits.
        values: [n, K] float32, unit-norm features.
        norm: [n] float32.
        projection: mean, scale and bits of the code.

    Raises:
        ValueError: an id has more than 64 bits, lengths differ, or a number isn't finite.
        Jz3Error: the store holds other rows, the shard other documents, or the disk is full.
    """
    info = read_info(folder)
    if projection.bits != info.bits or values.shape[1:] != (info.k,):
        raise Jz3Error(
            f"{folder} holds {info.k} numbers of {info.bits} bits a document, got {tuple(values.shape[1:])} "
            f"of {projection.bits} bits"
        )
    write_codes(folder, number, ids, encode_rows(values, projection), norm)


def write_codes(
    folder: Path | str, number: int, ids: Sequence[str], codes: "torch.Tensor", norm: "torch.Tensor"
) -> None:
    """Write one shard of rows that are coded already, as `write_shard` does.

    Args:
        folder, number, ids, norm: as of `write_shard`.
        codes: [n, bytes] uint8, see `encode_rows`.

    Raises:
        ValueError, Jz3Error: as `write_shard`.
    """
    info = read_info(folder)
    width = row_bytes(info.bits, info.k)
    if codes.shape[1:] != (width,):
        raise Jz3Error(f"{folder} holds rows of {width} bytes, got codes of the shape {tuple(codes.shape)}")
    if not len(ids) == len(codes) == len(norm):
        raise ValueError(f"shard {number}: got {len(ids)} ids, {len(codes)} features and {len(norm)} norms")
    norms = norm.cpu().numpy().astype(np.float32)
    if not np.isfinite(norms).all():
        bad = int(np.flatnonzero(~np.isfinite(norms))[0])
        raise ValueError(f"shard {number}: the norm of document {ids[bad]} is {norms[bad]}")
    arrays = {"id": _numbers(ids), "norm": norms, "codes": np.ascontiguousarray(codes.cpu().numpy())}
    path = shard_path(folder, number)
    _make_room(folder, number, arrays["id"])
    part = path.with_name(path.name + ".part")
    try:
        size, digest = _write_safetensors(part, arrays, {"jz3-store": info.identity()})
        os.replace(part, path)
        write_json(
            path.with_suffix(".json"),
            {"rows": len(ids), "bytes": size, "xxh3": digest, "store": info.identity()},
        )
    except OSError as error:
        # What a full disk needs least is half a shard.
        for leftover in (part, path.with_suffix(".json.part")):
            leftover.unlink(missing_ok=True)
        if error.errno in FULL:
            raise Jz3Error(
                f"shard {number} does not fit on the disk of {folder} ({error.strerror}); "
                "free some space and run again, the shards before it stay"
            ) from error
        raise


def _numbers(ids: Sequence[str]) -> np.ndarray:
    try:
        return np.array([int(i, 16) for i in ids], dtype=np.uint64)
    except (ValueError, OverflowError) as error:
        bad = next(i for i in ids if not (len(i) <= 16 and set(i) <= set("0123456789abcdefABCDEF") and i))
        raise ValueError(
            f"document ids must be at most 16 hexadecimal digits (64 bits), got {bad!r}"
        ) from error


def _make_room(folder: Path | str, number: int, ids: np.ndarray) -> None:
    """Remove the JSON of a shard that is to be replaced; refuse if it holds other documents."""
    sidecar = shard_path(folder, number).with_suffix(".json")
    if has_shard(folder, number):
        try:
            there = _open(folder, number).id
        except Jz3Error as error:
            log.warning("shard replaced: %s", error)
        else:
            if not np.array_equal(there, ids):
                raise Jz3Error(f"shard {number} of {folder} holds other documents, and a store only grows")
    # First of all, so that no reader ever sees a JSON beside another's data.
    sidecar.unlink(missing_ok=True)


def _open(folder: Path | str, number: int) -> Shard:
    folder, info, path = Path(folder), read_info(folder), shard_path(folder, number)
    sidecar = read_sidecar(path.with_suffix(".json"))
    width = row_bytes(info.bits, info.k)
    return open_shard(folder, number, sidecar, path.stat().st_size, info.identity(), width)


def _write_safetensors(path: Path, arrays: dict[str, np.ndarray], about: dict[str, str]) -> tuple[int, str]:
    """Write arrays in the given order and return the file's size and xxh3."""
    types = {np.dtype(np.uint64): "U64", np.dtype(np.float32): "F32", np.dtype(np.uint8): "U8"}
    table: dict[str, Any] = {"__metadata__": about}
    end = 0
    for name, array in arrays.items():
        table[name] = {
            "dtype": types[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [end, end + array.nbytes],
        }
        end += array.nbytes
    header = json.dumps(table, separators=(",", ":")).encode()
    header += b" " * (-(8 + len(header)) % ALIGNMENT)
    digest, size = xxhash.xxh3_64(), 0
    with open(path, "wb") as handle:
        for piece in (
            len(header).to_bytes(8, "little"),
            header,
            *(a.reshape(-1).view(np.uint8).data for a in arrays.values()),
        ):
            digest.update(piece)
            handle.write(piece)
            size += len(piece)
        handle.flush()
        os.fsync(handle.fileno())
    return size, digest.hexdigest()
