"""Batched generation with transformers, on a CPU or one GPU."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jz3.engines.base import EngineConfig, Generation, Request, Sampling
from jz3.engines.text import context_length, cut_at_stop, prompt_ids, versions
from jz3.errors import Jz3Error
from jz3.seeding import rng

if TYPE_CHECKING:
    import numpy as np
    import torch

TAIL = 4
"""Prompt tokens decoded together with a continuation, so that its first space is kept."""


@dataclass(slots=True)
class _Row:
    """A request while it is being continued."""

    place: int
    request: Request
    ids: list[int]
    limit: int
    """New tokens that fit."""
    random: "np.random.Generator"
    new: list[int] = field(default_factory=list)
    text: str = ""
    finish: str = ""


class TransformersEngine:
    """Continues prompts with a model of transformers, a batch at a time.

    Step t of a request draws from its own random stream, number t of `rng(request.seed, "token")`,
    through the inverse distribution function of the (nucleus of the) next-token probabilities. So a
    continuation doesn't depend on what else is in its batch, except for the rounding of the matrix
    products, which may differ between batch shapes. A row leaves the batch when it is finished.
    """

    def __init__(self, config: EngineConfig, model: Path, dtype: str) -> None:
        import torch

        from jz3.inference import cache_argument, load_for_inference
        from jz3.models import load_tokenizer

        self._batch_size = config.batch_size
        self._name = model.name
        self._dtype = dtype
        self._tokenizer = load_tokenizer(model)
        self._model: Any = load_for_inference(model, dtype)
        self._device: torch.device = self._model.device
        self._cache = cache_argument(self._model)
        self._context = context_length(self._model.config)
        self._ends = self._end_tokens()

    def _end_tokens(self) -> frozenset[int]:
        """Collect every token that ends a text; nothing else of a generation_config is obeyed."""
        ends: set[int] = set()
        configs = (self._model.config.get_text_config(), getattr(self._model, "generation_config", None))
        value: Any
        for value in (self._tokenizer.eos_token_id, *(getattr(c, "eos_token_id", None) for c in configs)):
            ends.update([value] if isinstance(value, int) else value or [])
        return frozenset(ends)

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Generation]:
        """Continue every request's prompt; one Generation per request, in order."""
        rows = []
        for place, request in enumerate(requests):
            ids = prompt_ids(self._tokenizer, request.prompt)
            limit = min(sampling.max_new_tokens, self._context - len(ids))
            rows.append(_Row(place, request, ids, limit, rng(request.seed, "token")))
        fitting = []
        for row in rows:
            if row.limit < 1:
                row.finish = "too_long"
            else:
                fitting.append(row)
        fitting.sort(key=lambda row: (len(row.ids), row.place))
        for start in range(0, len(fitting), self._batch_size):
            self._continue(fitting[start : start + self._batch_size], sampling)
        return [
            Generation(
                id=row.request.id,
                text=row.text,
                finish=row.finish,
                prompt_tokens=len(row.ids),
                new_tokens=len(row.new),
            )
            for row in rows
        ]

    def _continue(self, rows: list[_Row], sampling: Sampling) -> None:
        """Fill in text and finish of rows that fit into one batch."""
        import torch

        from jz3.inference import roomy_cache

        pad = self._tokenizer.pad_token_id or 0
        width = max(len(row.ids) for row in rows)
        padded = [[pad] * (width - len(row.ids)) + row.ids for row in rows]
        real = [[0] * (width - len(row.ids)) + [1] * len(row.ids) for row in rows]
        ids = torch.tensor(padded, device=self._device)
        mask = torch.tensor(real, device=self._device)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        cache = roomy_cache(self._model.config)
        active = list(rows)
        with torch.inference_mode():
            while True:
                output = self._model(
                    input_ids=ids,
                    attention_mask=mask,
                    position_ids=positions,
                    use_cache=True,
                    logits_to_keep=1,
                    **{self._cache: cache},
                )
                drawn = pick(output.logits[:, -1], [row.random for row in active], sampling)
                going = [i for i, token in enumerate(drawn) if not self._append(active[i], token, sampling)]
                if not going:
                    return
                if len(going) < len(active):
                    chosen: Any = torch.tensor(going, device=self._device)
                    cache.reorder_cache(chosen)
                    mask, positions = mask[chosen], positions[chosen]
                    active = [active[i] for i in going]
                ids = torch.tensor([[row.new[-1]] for row in active], device=self._device)
                mask = torch.cat([mask, mask.new_ones(len(active), 1)], dim=1)
                positions = positions[:, -1:] + 1

    def _append(self, row: _Row, token: int, sampling: Sampling) -> bool:
        """Add a token to a row and return whether the row is finished."""
        row.new.append(token)
        if token in self._ends:
            row.text, row.finish = self._decode(row, row.new[:-1]), "stop"
            return True
        if sampling.stop and self._may_stop(row, sampling.stop):
            text, stopped = cut_at_stop(self._decode(row, row.new), sampling.stop)
            if stopped:
                row.text, row.finish = text, "stop"
                return True
        if len(row.new) == row.limit:
            row.text, row.finish = self._decode(row, row.new), "length"
            return True
        return False

    def _may_stop(self, row: _Row, stop: tuple[str, ...]) -> bool:
        """Look for a stop text in the last tokens only: a character takes at most four of them."""
        reach = 4 * max(map(len, stop)) + TAIL
        return cut_at_stop(self._plain(row.new[-reach:]), stop)[1]

    def _decode(self, row: _Row, new: list[int]) -> str:
        before = row.ids[-TAIL:]
        head, whole = self._plain(before), self._plain(before + new)
        return whole[len(head) :] if whole.startswith(head) else self._plain(new)

    def _plain(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def info(self) -> dict[str, Any]:
        """Name, versions, model and device, for the manifest."""
        return {
            "name": "transformers",
            "model": self._name,
            "dtype": self._dtype,
            "device": self._device.type,
            "batch_size": self._batch_size,
            "versions": versions("torch", "transformers"),
        }

    def close(self) -> None:
        """Free the model."""
        import gc

        import torch

        self._model = None
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def pick(logits: "torch.Tensor", streams: "Sequence[np.random.Generator]", sampling: Sampling) -> list[int]:
    """Choose the next token of every row.

    With probabilities p_v = softmax(logits / temperature)_v, restricted to the nucleus of top_p, and a
    uniform number u of the row's own stream, the token is the first v with p_0 + ... + p_v > u.

    Args:
        logits: [B, V], any floating type.
        streams: B random streams; one number is taken from each unless the choice is greedy.
        sampling: temperature and top_p.

    Returns:
        B token ids.

    Raises:
        Jz3Error: the model's logits are not numbers.
    """
    import torch

    scores = logits.float()
    if torch.isnan(scores).any():
        raise Jz3Error("the model's logits are NaN: its weights are damaged, or its training diverged")
    if sampling.temperature == 0:
        return scores.argmax(dim=-1).tolist()
    numbers = torch.tensor([stream.random() for stream in streams], dtype=torch.float64, device=scores.device)
    chances = torch.softmax(scores / sampling.temperature, dim=-1)
    if sampling.top_p < 1:
        chances = chances.masked_fill(chances < _nucleus_edge(chances, sampling.top_p), 0.0)
    heights = chances.to(torch.float64).cumsum(dim=-1)
    targets = (numbers * heights[:, -1]).unsqueeze(1)
    return torch.searchsorted(heights, targets, right=True).squeeze(1).tolist()


def _nucleus_edge(chances: "torch.Tensor", top_p: float) -> "torch.Tensor":
    """Return the least probability inside the nucleus of every row, [B, 1]; equal ones are all inside."""
    size, most = 512, chances.shape[-1]
    while True:
        # A full sort of the vocabulary costs as much as the model's step; the nucleus is mostly small.
        ordered = chances.topk(min(size, most), dim=-1).values
        reached = ordered.cumsum(dim=-1) >= top_p
        if size >= most or bool(reached[:, -1].all()):
            last = (~reached).sum(dim=-1, keepdim=True).clamp(max=ordered.shape[-1] - 1)
            return ordered.gather(1, last)
        size *= 8
