"""Completed queries: the ridge estimate against its definition, and what it is for."""

import math

import pytest
import torch
from test_gradients import random_model, random_texts

from jz3.features.adapted import AdaptedFit, fit_adapted
from jz3.features.completion import Completion, fit_completion
from jz3.features.extract import extract
from jz3.gradients import linear_layers


def plain_fit(k: int) -> AdaptedFit:
    """A fit of one layer whose first coordinates have the most energy."""
    eye, energy = torch.eye(k), torch.arange(k, 0, -1).float()
    coordinates = torch.arange(k) * k + torch.arange(k)
    return AdaptedFit(
        "m", ["a"], {"a": eye}, {"a": eye}, {"a": coordinates}, torch.zeros(k), torch.ones(k), energy
    )


def structured(count: int, seed: int, shared: float) -> torch.Tensor:
    """Rows of 60 numbers: few common causes and noise."""
    causes = torch.randn(4, 60, generator=torch.Generator().manual_seed(0))
    draw = torch.Generator().manual_seed(seed)
    mix, noise = torch.randn(count, 4, generator=draw), torch.randn(count, 60, generator=draw)
    return shared * mix @ causes + 0.5 * noise


def test_what_was_left_out_is_predicted() -> None:
    completion = Completion.of(plain_fit(60), 12, structured(40, 1, 1.0))
    documents, queries = structured(200, 2, 1.0), structured(10, 3, 1.0)
    exact = documents @ queries.T
    error = []
    for psi in (queries[:, :12], completion.fold(queries)):
        difference = documents[:, :12] @ psi.T - exact
        error.append(float((difference - difference.mean(0)).square().sum()))
    assert math.isfinite(completion.ridge) and error[1] < 0.3 * error[0]


def test_weak_coordinates_stand_for_those_left_out() -> None:
    """All of 400 coordinates share their causes' agreement; weights find it with few documents, weakest first."""
    draw = torch.Generator().manual_seed(5)
    spread = torch.arange(1, 401).float() ** -0.5
    causes = torch.randn(30, 400, generator=draw) * spread

    def rows(count: int) -> torch.Tensor:
        own = torch.randn(count, 400, generator=draw) * spread
        return torch.randn(count, 30, generator=draw) @ causes + own

    completion = Completion.of(plain_fit(400), 200, rows(24))
    documents, queries = rows(200), rows(10)
    exact = documents @ queries.T
    error = []
    for psi in (queries[:, :200], (1 + completion.beta) * queries[:, :200], completion.fold(queries)):
        difference = documents[:, :200] @ psi.T - exact
        error.append(float((difference - difference.mean(0)).square().sum()))
    beta = completion.beta
    assert bool((beta >= 0).all()) and float(beta[199]) > 0.2 and len(beta.unique()) <= 3
    assert torch.equal(beta[:64], beta[:1].expand(64)) and torch.equal(beta[128:], beta[199:].expand(72))
    assert error[1] < 0.8 * error[0] and error[2] < 0.8 * error[0]


def test_nothing_is_added_where_nothing_can_be_predicted() -> None:
    completion = Completion.of(plain_fit(60), 12, structured(40, 1, 0.0))
    queries = structured(10, 3, 0.0)
    assert math.isinf(completion.ridge) and torch.equal(completion.fold(queries), queries[:, :12])
    assert not bool(completion.beta.any())


def test_fold_is_ridge_regression_and_lambda_the_best_left_out() -> None:
    """Both against regressions solved one by one in the coordinates' own space."""
    values, queries = structured(20, 1, 1.0).double(), structured(5, 3, 1.0).double()
    completion = Completion.of(plain_fit(60), 12, values.float())
    centred = values - values.mean(0)
    unit = centred[:, :12].square().sum(1).mean()

    def slopes(x: torch.Tensor, y: torch.Tensor, share: float) -> torch.Tensor:
        return torch.linalg.solve(x.T @ x + share * unit * torch.eye(12).double(), x.T @ y)

    beta = completion.beta.double()
    missing = centred[:, 12:] @ queries[:, 12:].T - centred[:, :12] @ (beta * queries[:, :12]).T
    expected = (1 + beta) * queries[:, :12] + slopes(centred[:, :12], missing, completion.ridge).T
    torch.testing.assert_close(completion.fold(queries.float()).double(), expected, atol=1e-4, rtol=1e-4)
    error = {}
    for share in (0.01, 0.03, 0.1, 0.3, 1.0, 3.0):
        total = 0.0
        for i in range(20):
            rest = [j for j in range(20) if j != i]
            target = centred[:, 12:] @ values[rest, 12:].T - centred[:, :12] @ (beta * values[rest, :12]).T
            w = slopes(centred[rest, :12], target[rest], share)
            total += float((centred[i, :12] @ w - target[i]).square().sum())
        error[share] = total
    assert completion.ridge == min(error, key=lambda s: error[s])


def test_from_texts_and_a_document_without_numbers_is_left_out() -> None:
    model, texts = random_model("llama"), random_texts(8)
    layers = linear_layers(model)
    fit = fit_adapted(model, "m", layers, texts[:2], texts[2:], k=40, rank=4)
    values = extract(model, layers, texts, fit).values
    worse = torch.cat([values, torch.full((1, 40), torch.nan)])
    one, other = (Completion.of(fit, 10, v).fold(values) for v in (values, worse))
    made = fit_completion(model, layers, fit, 10, texts).fold(values)
    assert torch.equal(one, other) and bool(torch.isfinite(one).all())
    torch.testing.assert_close(made, one)
    with pytest.raises(ValueError, match="at least two documents"):
        fit_completion(model, layers, fit, 10, texts[:1])
