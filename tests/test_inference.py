"""Models that are only read from: packed linear layers and a cache with room, against what they replace."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, MistralConfig
from transformers.cache_utils import DynamicCache, DynamicSlidingWindowLayer

from jz3.errors import Jz3Error
from jz3.evaluation.nll import PADDING, SMALL_BATCH, _batch_size
from jz3.inference import ROOM, PackedLinear, cache_argument, load_for_inference, roomy_cache
from jz3.models import load_model

HEADS, WIDTH = 3, 8


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", [(1,), (20,), (2, 7), (300,)])
def test_a_packed_layer_is_as_exact_as_the_one_it_replaces(shape: tuple[int, ...], biased: bool) -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(72, 50, bias=biased)
    packed, x = PackedLinear(linear), torch.randn(*shape, 72)
    with torch.no_grad():
        exact = torch.nn.Linear(72, 50, bias=biased).double()
        exact.load_state_dict(linear.state_dict())
        wanted = exact(x.double())
        given, plain = packed(x), linear(x)
    assert given.shape == wanted.shape
    assert (given - wanted).abs().max() <= 2 * (plain - wanted).abs().max() + 1e-6
    assert torch.equal(packed.weight, linear.weight)
    assert (packed.bias is None) == (linear.bias is None)
    if packed.bias is not None:
        assert torch.equal(packed.bias, linear.bias)


@pytest.mark.skipif(torch.cuda.is_available(), reason="models go to the GPU here")
def test_a_model_is_packed_in_float32_and_says_the_same(tiny_model: Path) -> None:
    plain, packed = load_model(tiny_model, "float32"), load_for_inference(tiny_model, "float32")
    assert not any(type(m) is torch.nn.Linear for m in packed.modules())
    ids = torch.arange(3, 43).view(2, 20)
    with torch.inference_mode():
        assert torch.allclose(packed(ids).logits, plain(ids).logits, atol=1e-4)
    assert not any(isinstance(m, PackedLinear) for m in load_for_inference(tiny_model, "bfloat16").modules())


def config(**changed: Any) -> LlamaConfig:
    sizes = {"hidden_size": HEADS * WIDTH, "num_attention_heads": HEADS, "num_hidden_layers": 2}
    return LlamaConfig(**{**sizes, "intermediate_size": 32, "vocab_size": 50, **changed})


def test_a_cache_with_room_holds_what_a_plain_one_does() -> None:
    torch.manual_seed(0)
    roomy, plain = roomy_cache(config()), DynamicCache(config=config())
    rows = 5

    def step(tokens: int) -> None:
        for layer in range(2):
            keys, values = torch.randn(2, rows, HEADS, tokens, WIDTH)
            for given, wanted in zip(
                roomy.update(keys, values, layer), plain.update(keys, values, layer), strict=True
            ):
                assert torch.equal(given, wanted)

    step(7)
    for kept in ([0, 1, 2, 4], [3], None):
        for _ in range(ROOM + 9):
            step(1)
        assert roomy.get_seq_length() == plain.get_seq_length()
        if kept:
            chosen, rows = torch.tensor(kept), len(kept)
            cache: Any
            for cache in (roomy, plain):
                (cache.batch_select_indices if rows == 1 else cache.reorder_cache)(chosen)
    step(300)
    roomy.crop(-250)
    plain.crop(-250)
    step(3)


def test_a_step_copies_nothing_while_there_is_room() -> None:
    cache = roomy_cache(config())
    new = torch.randn(2, HEADS, 1, WIDTH)
    places = [cache.update(new, new, 0)[0].data_ptr() for _ in range(ROOM)]
    assert len(set(places)) == 1


def test_rows_that_are_picked_out_keep_their_room() -> None:
    """Else all layers' old rows would be held beside the new ones until the next step, which would copy those again."""
    cache: Any = roomy_cache(config())
    prompt, new = torch.randn(3, HEADS, 9, WIDTH), torch.randn(2, HEADS, 1, WIDTH)
    cache.update(prompt, prompt, 0)
    cache.reorder_cache(torch.tensor([2, 0]))
    place = cache.layers[0].keys.data_ptr()
    keys = cache.update(new, new, 0)[0]
    assert keys.data_ptr() == place and torch.equal(keys, torch.cat([prompt[[2, 0]], new], 2))


def test_sliding_windows_keep_their_own_cache() -> None:
    mistral = MistralConfig(
        hidden_size=24, num_attention_heads=3, num_key_value_heads=3, num_hidden_layers=2, sliding_window=4
    )
    assert all(type(layer) is DynamicSlidingWindowLayer for layer in roomy_cache(mistral).layers)


def test_the_caches_argument_is_found_by_name() -> None:
    def old(input_ids: Any, past_key_values: Any = None) -> None: ...

    def new(input_ids: Any, cache: Any = None) -> None: ...

    def none(input_ids: Any, **kwargs: Any) -> None: ...

    assert cache_argument(SimpleNamespace(forward=old)) == "past_key_values"
    assert cache_argument(SimpleNamespace(forward=new)) == "cache"
    with pytest.raises(Jz3Error, match="SimpleNamespace takes no cache and can't generate here"):
        cache_argument(SimpleNamespace(forward=none))


@pytest.mark.parametrize(
    ("lengths", "tokens", "count"),
    [
        ([100], 10, 1),
        ([100, 100, 100], 200, 2),
        ([100] * 50, 4096, 40),
        ([10, SMALL_BATCH // 2], 4096, 2),
        ([400, 410, 600], 4096, 2),
        ([1000, int(1000 * (1 + PADDING))], 4096, 2),
    ],
)
def test_batches_end_at_their_limit_or_where_padding_would_be_wasted(
    lengths: list[int], tokens: int, count: int
) -> None:
    assert _batch_size(lengths, tokens) == count
