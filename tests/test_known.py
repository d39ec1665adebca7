"""Known queries: cosines in the pass against exact ones."""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_gradients import random_model, random_texts

from jz3.errors import Jz3Error
from jz3.features.exact import exact_cosines
from jz3.features.extract import extract, open_sink
from jz3.features.known import Known, fit_known
from jz3.features.sketch import Sketch
from jz3.gradients import linear_layers, make_batches, run_pass


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_all_directions_give_the_exact_cosines(name: str) -> None:
    model, texts = random_model(name), random_texts(12)
    layers = linear_layers(model)
    tasks = {"one": texts[:3], "two": texts[3:4]}
    exact = exact_cosines(model, layers, texts, texts[:4]).float()
    known = fit_known(model, "m", layers, tasks, rank=10**6)
    assert known.names == [t.id for t in texts[:4]] and known.k == 4
    found = extract(model, layers, texts, known)
    torch.testing.assert_close(found.values, exact, atol=2e-5, rtol=0)
    per_task = extract(model, layers, texts, fit_known(model, "m", layers, tasks, per="task", rank=10**6))
    expected = torch.stack([exact[:, :3].mean(1), exact[:, 3]], 1)
    torch.testing.assert_close(per_task.values, expected, atol=2e-5, rtol=0)
    torch.testing.assert_close(per_task.norm, found.norm)


def test_few_directions_are_close() -> None:
    model, texts = random_model("gpt2"), random_texts(16)
    layers = linear_layers(model)
    exact = exact_cosines(model, layers, texts[2:], texts[:2]).float()
    error = {}
    for rank in (1, 16):
        known = fit_known(model, "m", layers, {"t": texts[:2]}, rank=rank)
        error[rank] = float((extract(model, layers, texts[2:], known).values - exact).abs().mean())
    # 16 directions are all that so short queries can have on most layers; 1 is not.
    assert error[16] < 0.2 * error[1]


@pytest.mark.parametrize("kind", ["adapted", "sketch", "known"])
def test_a_sink_is_fit_for_use_after_a_pass_that_broke_off(kind: str) -> None:
    model, texts = random_model("llama"), random_texts(6)
    layers = linear_layers(model)
    projection: Any = fit_known(model, "m", layers, {"t": texts[:2]}, rank=4)
    if kind != "known":
        projection = projection.fit if kind == "adapted" else Sketch.of("m", layers, 64, 8, 8, 0)
    sink = open_sink(projection, model)
    assert getattr(sink, "wide", False) == (kind != "sketch")
    next(run_pass(model, layers, sink, make_batches(texts[:3], 1000)))
    again = extract(model, layers, texts[3:5], projection, sink=sink)
    fresh = extract(model, layers, texts[3:5], projection)
    assert torch.equal(again.norm, fresh.norm) and torch.equal(again.values, fresh.values)


def test_saved_and_read_again(tmp_path: Path) -> None:
    model, texts = random_model("llama"), random_texts(5)
    layers = linear_layers(model)
    known = fit_known(model, "m", layers, {"t": texts[:2]}, rank=4)
    path = tmp_path / "known.safetensors"
    known.save(path)
    again = Known.load(path, "m")
    one, two = (extract(model, layers, texts, k).values for k in (known, again))
    assert torch.equal(one, two) and again.names == known.names
    with pytest.raises(Jz3Error, match="fitted for model m"):
        Known.load(path, "another")
    (tmp_path / "known-fit.safetensors").write_bytes(b"other")
    with pytest.raises(Jz3Error, match="not the fit"):
        Known.load(path, "m")
    path.write_bytes(b"nonsense")
    with pytest.raises(Jz3Error, match="can't be read"):
        Known.load(path, "m")


def test_errors() -> None:
    model, texts = random_model("llama"), random_texts(2)
    layers = linear_layers(model)
    with pytest.raises(ValueError, match="'query' or 'task'"):
        fit_known(model, "m", layers, {"t": texts}, per="text")
    with pytest.raises(ValueError, match="at least one query"):
        fit_known(model, "m", layers, {"t": texts, "u": []})
    with pytest.raises(ValueError, match="at least one query"):
        fit_known(model, "m", layers, {})
