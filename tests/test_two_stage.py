"""Sets chosen from a store: as if it were in memory, and only what is needed is read."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from jz3.errors import Jz3Error
from jz3.selection.config import SETS
from jz3.selection.two_stage import CHOOSERS, choose_set, gather
from jz3.store import Coding, Store, StoreInfo, open_store, write_shard

INFO = StoreInfo(kind="adapted", k=32, bits=4, model_hash="m", projection_hash="p", reduction="mean")
CODING = Coding(torch.zeros(32), torch.full((32,), 32**-0.5), 4)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    open_store(tmp_path, INFO)
    random = torch.Generator().manual_seed(3)
    for number in range(4):
        values = torch.randn(30, 32, generator=random)
        ids = [f"{(7919 * (30 * number + row)) % 2**64:016x}" for row in range(30)]
        write_shard(tmp_path, number, ids, values / values.norm(dim=1, keepdim=True), torch.ones(30), CODING)
    return Store(tmp_path)


def whole(store: Store) -> tuple[np.ndarray, np.ndarray]:
    values = torch.cat([v for _, v in store.values(CODING)]).numpy()
    return np.concatenate([shard.id for shard in store.shards]), values


@pytest.mark.parametrize("chooser", SETS)
def test_a_set_from_the_store_is_the_set_among_the_best_in_memory(store: Store, chooser: str) -> None:
    queries = torch.randn(5, 32, generator=torch.Generator().manual_seed(4))
    ids, values = whole(store)
    scores = values.astype(np.float64) @ queries.mean(0).double().numpy()
    best = np.lexsort((ids, -scores))[:40]
    wanted = [best[row] for row in islice(CHOOSERS[chooser](values[best], queries.numpy()), 12)]
    seen: list[int] = []
    found = choose_set(store, CODING, queries, 12, chooser, 40, seen.append)
    assert found.tolist() == ids[wanted].tolist() and sum(seen) == 120
    assert len(choose_set(store, CODING, queries, 500, chooser, 500)) == 120


def test_gathered_in_the_order_asked_for(store: Store) -> None:
    ids, values = whole(store)
    rows = [77, 3, 118, 40, 4]
    np.testing.assert_array_equal(gather(store, CODING, ids[rows].tolist()), values[rows])
    assert gather(store, CODING, []).shape == (0, 32)
    with pytest.raises(Jz3Error, match="lacks 1 of 2 candidates, e.g. 000000000000beef"):
        gather(store, CODING, [0xBEEF, int(ids[5])])


def test_wrong_arguments_are_told(store: Store) -> None:
    queries = torch.ones(1, 32)
    with pytest.raises(ValueError, match="chooser must be one of matching"):
        choose_set(store, CODING, queries, 3, "influence")
    with pytest.raises(ValueError, match="at least k"):
        choose_set(store, CODING, queries, 30, candidates=20)
