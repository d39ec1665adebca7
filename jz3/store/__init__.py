"""The feature store: append-only shards of fixed-width rows, memory-mapped, checksummed.

A store is a folder with `store.json` (what the rows are) and, per shard, `NNNNNN.safetensors`
(id [n] uint64, norm [n] float32, codes [n, bytes] uint8) with a `NNNNNN.json` that holds its rows,
size, xxh3 and the store it belongs to. Both are written whole or not at all, the JSON last, so that
a shard without one does not exist. Adding documents never touches old shards; readers may read
while the store grows.
"""

from jz3.store.format import (
    CODES,
    Coding,
    StoreInfo,
    decode_rows,
    encode_rows,
    module_hash,
    open_store,
    read_info,
)
from jz3.store.reader import Store
from jz3.store.scan import CheckpointStore, scan, scan_checkpoints
from jz3.store.shard import Shard, has_shard, write_codes, write_shard
from jz3.store.tools import find_store, merge_stores, verify

__all__ = [
    "CODES",
    "CheckpointStore",
    "Coding",
    "Shard",
    "Store",
    "StoreInfo",
    "decode_rows",
    "encode_rows",
    "find_store",
    "has_shard",
    "merge_stores",
    "module_hash",
    "open_store",
    "read_info",
    "scan",
    "scan_checkpoints",
    "verify",
    "write_codes",
    "write_shard",
]
