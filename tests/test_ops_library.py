"""The torch.library registrations: schemas, fake shapes and torch.compile."""

import pytest
import torch
from accuracy import normal

import jz3.ops.library  # noqa: F401
from jz3.ops.encode import encode
from jz3.ops.segment_project import segment_project
from jz3.ops.sketch import sketch

MEAN, SCALE = torch.zeros(16), torch.ones(16)
CODES = encode(normal(0, 9, 16), MEAN, SCALE, "4bit")
EXAMPLES = {
    "signs": (3, "m", 2, 300, 1, 128),
    "segment_project": (normal(0, 5, 3), normal(1, 5, 4), normal(2, 4, 2), torch.tensor([0, 2, 5])),
    "sketch": (normal(0, 2, 50), "m", 8, 0),
    "sign_project": (normal(0, 2, 50), 8, 0, "m", 0),
    "ce_hidden_grad": (normal(0, 3, 4), normal(1, 7, 4), torch.tensor([0, -100, 6]), torch.ones(3)),
    "ce_hidden_grad of columns": (
        normal(0, 4, 3).T,
        normal(1, 7, 4),
        torch.tensor([0, -100, 6]),
        torch.ones(3),
    ),
    "encode": (normal(0, 3, 16), MEAN, SCALE, "4bit"),
    "decode": (CODES, MEAN, SCALE, "4bit"),
    "score_topk": (CODES, MEAN, SCALE, "4bit", normal(1, 2, 16), 4, torch.ones(9), torch.arange(9)),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_registration_is_consistent(name: str) -> None:
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(getattr(torch.ops.jz3, name.split()[0]).default, EXAMPLES[name], test_utils=tests)


def test_they_compose_with_torch_compile() -> None:
    def both(a: torch.Tensor, g: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
        blocks = torch.ops.jz3.segment_project(a * 2, g, None, bounds)
        return torch.ops.jz3.sketch(blocks.flatten(1), "m", 8, 0) + 1

    a, g, _, bounds = EXAMPLES["segment_project"]
    compiled = torch.compile(both, backend="eager", fullgraph=True)
    expected = sketch(segment_project(a * 2, g, None, bounds).flatten(1), "m", 8, seed=0) + 1
    assert torch.equal(compiled(a, g, bounds), expected)
