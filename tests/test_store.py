"""The store: what is written is read back; damage is named and the rest stays usable."""

from pathlib import Path

import numpy as np
import pytest
import torch

from jz3.errors import Jz3Error
from jz3.store import Coding, Store, StoreInfo, has_shard, open_store, write_shard

INFO = StoreInfo(kind="adapted", k=32, bits=4, model_hash="m", projection_hash="p", reduction="mean")
CODING = Coding(torch.linspace(-1, 1, 32), torch.linspace(0.5, 2, 32), 4)


def fill(folder: Path, shards: int = 3, rows: int = 5) -> torch.Tensor:
    open_store(folder, INFO)
    values = CODING.mean + CODING.scale * torch.randn(
        shards * rows, 32, generator=torch.Generator().manual_seed(0)
    )
    for number in range(shards):
        part = values[number * rows : (number + 1) * rows]
        ids = [f"{2**63 + number * rows + i:016x}" for i in range(rows)]
        write_shard(folder, number, ids, part, torch.arange(rows, dtype=torch.float32), CODING)
    return values


def test_round_trip(tmp_path: Path) -> None:
    values = fill(tmp_path)
    store = Store(tmp_path, verify=True)
    assert len(store) == 15 and not store.damaged
    decoded = torch.cat([v for _, v in store.values(CODING)])
    # 16 Lloyd-Max levels leave 0.0095 of a normal's variance.
    error = ((decoded - values) / CODING.scale).square().mean()
    assert 0.004 < float(error) < 0.02
    assert [int(i) for s in store.shards for i in s.id] == [2**63 + i for i in range(15)]
    assert store.shards[1].norm.tolist() == [0, 1, 2, 3, 4]


def test_opening_copies_nothing(tmp_path: Path) -> None:
    fill(tmp_path)
    base = Store(tmp_path).shards[0].codes
    while not isinstance(base, np.memmap):
        assert base.base is not None
        base = base.base
    assert base.filename == tmp_path / "000000.safetensors"


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "nonsense"])
def test_damaged_shard_is_named_and_the_rest_is_used(tmp_path: Path, damage: str) -> None:
    fill(tmp_path)
    path = tmp_path / "000001.safetensors"
    data = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    else:
        changed = {"truncated": data[:-3], "nonsense": bytes(len(data))}
        data[-5] ^= 1
        path.write_bytes(changed.get(damage, data))
    store = Store(tmp_path, verify=True)
    assert list(store.damaged) == ["000001.safetensors"]
    assert [s.number for s in store.shards] == [0, 2]


def test_half_written_shard_does_not_exist(tmp_path: Path) -> None:
    fill(tmp_path)
    (tmp_path / "000002.json").unlink()
    (tmp_path / "000003.safetensors.part").write_bytes(b"half")
    store = Store(tmp_path, verify=True)
    assert [s.number for s in store.shards] == [0, 1] and not store.damaged
    assert has_shard(tmp_path, 1) and not has_shard(tmp_path, 2)


def test_foreign_store_is_refused(tmp_path: Path) -> None:
    fill(tmp_path)
    other = StoreInfo(kind="sketch", k=32, bits=4, model_hash="m", projection_hash="p", reduction="mean")
    with pytest.raises(Jz3Error, match="kind: 'adapted' in the store, 'sketch' now"):
        open_store(tmp_path, other)


def test_readable_while_growing(tmp_path: Path) -> None:
    fill(tmp_path, shards=1)
    before = Store(tmp_path)
    fill(tmp_path, shards=3)
    assert len(before) == 5 and len(Store(tmp_path)) == 15
