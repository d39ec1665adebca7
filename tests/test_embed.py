"""The three calls that pipelines embed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import jz3
from jz3.models import load_model, load_tokenizer

DOCS = [f"The sum of {a} and {b} is {a + b}." for a, b in zip(range(3, 15), range(20, 8, -1), strict=True)]
QUERY = ("Question: what is 7 plus 9?\n", "The sum of 7 and 9 is 16.")


def test_three_calls(tiny_model: Path) -> None:
    model, tokenizer = load_model(tiny_model, "float32"), load_tokenizer(tiny_model)
    features = jz3.featurize(model, tokenizer, DOCS, jz3.Adapted([QUERY], k=256, rank=16))
    scores = jz3.influence_scores(features, {"sums": [QUERY]})
    assert scores.values.shape == (len(DOCS), 1) and np.abs(scores.values).max() <= 1.001
    chosen = jz3.select(scores, 4)
    assert scores.values[chosen[0]] == scores.values.max() and len(set(chosen)) == 4
    again = features.encode([(DOCS[0][:1], DOCS[0][1:])])
    assert again.shape == (1, 256)


def test_sketch_needs_no_query(tiny_model: Path) -> None:
    model, tokenizer = load_model(tiny_model, "float32"), load_tokenizer(tiny_model)
    features = jz3.featurize(model, tokenizer, DOCS[:3], jz3.Sketch(k=4096, left=32, right=16))
    norms = np.linalg.norm(features.values, axis=1)
    assert (np.abs(norms - 1) < 0.35).all()


def test_errors(tiny_model: Path) -> None:
    model, tokenizer = load_model(tiny_model, "float32"), load_tokenizer(tiny_model)
    with pytest.raises(ValueError, match="docs is empty"):
        jz3.featurize(model, tokenizer, [])
    with pytest.raises(ValueError, match="text 1 has 0 token"):
        jz3.featurize(model, tokenizer, ["fine text", ""])
    features = jz3.featurize(model, tokenizer, DOCS[:2], jz3.Sketch(k=64, left=8, right=8))
    with pytest.raises(ValueError, match="at least one query"):
        jz3.influence_scores(features, {"none": []})
    with torch.no_grad():
        output: Any = model.get_output_embeddings()
        output.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="gradient of query 0 has the norm nan"):
        features.encode([QUERY])
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        jz3.nothing  # noqa: B018
