"""The engines: batching, randomness, stop texts, limits; what opens them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jz3.engines import EngineConfig, Request, Sampling, open_engine
from jz3.engines.on_demand import engine_on_demand
from jz3.engines.text import cut_at_stop
from jz3.errors import Jz3Error
from jz3.seeding import rng

PROMPTS = (
    "The answer is",
    "## Question\nHow many apples does a farmer pick?\n\n## Solution\n",
    "x",
    "First multiply the rows",
)


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Iterator[Any]:
    opened = open_engine(EngineConfig(batch_size=3), tiny_model, "float32")
    yield opened
    opened.close()


def requests(count: int) -> list[Request]:
    return [
        Request(id=f"r{i}", prompt=PROMPTS[i % len(PROMPTS)] + " and" * (i // 2), seed=i)
        for i in range(count)
    ]


def test_greedy_equals_generate_of_transformers(engine: Any, tiny_model: Path) -> None:
    import torch

    from jz3.models import load_model, load_tokenizer

    model, tokenizer = load_model(tiny_model, "float32"), load_tokenizer(tiny_model)
    asked = requests(7)
    given = engine.generate(asked, Sampling(max_new_tokens=12))
    assert [g.id for g in given] == [r.id for r in asked]
    for request, generation in zip(asked, given, strict=True):
        ids = tokenizer(request.prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            reference = model.generate(  # pyright: ignore[reportCallIssue]
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False
            )
        assert generation.text == tokenizer.decode(reference[0, ids.shape[1] :])
        assert (generation.finish, generation.prompt_tokens, generation.new_tokens) == (
            "length",
            ids.shape[1],
            12,
        )


def test_sampled_text_does_not_depend_on_batch_or_order(engine: Any, tiny_model: Path) -> None:
    sampling = Sampling(max_new_tokens=30, temperature=1.0, top_p=0.9)
    asked = requests(9)
    together = {g.id: g for g in engine.generate(asked, sampling)}
    assert {g.id: g for g in engine.generate(asked[::-1], sampling)} == together
    single = open_engine(EngineConfig(batch_size=1), tiny_model, "float32")
    assert {g.id: g for g in single.generate(asked, sampling)} == together
    single.close()
    assert len({g.text for g in together.values()}) == len(asked)
    other = [Request(id=r.id, prompt=r.prompt, seed=r.seed + 1000) for r in asked]
    assert all(g.text != together[g.id].text for g in engine.generate(other, sampling))


def test_end_token_ends_a_row_and_the_others_go_on(engine: Any) -> None:
    sampling = Sampling(max_new_tokens=40, temperature=1.0)
    asked = requests(5)
    before = engine.generate(asked, sampling)
    victim = engine._tokenizer(before[2].text, add_special_tokens=False).input_ids[5]
    kept = engine._ends
    engine._ends = frozenset({victim})
    try:
        after = engine.generate(asked, sampling)
    finally:
        engine._ends = kept
    assert after[2].finish == "stop" and after[2].new_tokens < 40
    for old, new in zip(before, after, strict=True):
        assert old.text.startswith(new.text)
        assert new.finish == "stop" or new == old


def test_stop_text_is_cut_off_even_across_tokens(engine: Any) -> None:
    sampling = Sampling(max_new_tokens=40, temperature=1.0)
    whole = engine.generate(requests(4), sampling)
    for place, generation in enumerate(whole):
        readable = generation.text.split("\ufffd")[0]
        stop = readable[-3:]
        if len(stop) < 3:
            continue
        cut = engine.generate(
            requests(4), Sampling(max_new_tokens=40, temperature=1.0, stop=("never", stop))
        )[place]
        assert (cut.text, cut.finish) == (generation.text[: generation.text.find(stop)], "stop")
        assert cut.new_tokens < 40
        break
    else:
        pytest.fail("no readable continuation to cut")


def test_prompt_beyond_the_context_is_an_outcome(engine: Any) -> None:
    kept, engine._context = engine._context, 20
    try:
        long = Request(id="long", prompt="apples " * 50)
        short = Request(id="short", prompt="The")
        given = engine.generate([long, short], Sampling(max_new_tokens=100))
    finally:
        engine._context = kept
    assert (given[0].text, given[0].finish, given[0].new_tokens) == ("", "too_long", 0)
    assert given[0].prompt_tokens >= 50
    assert given[1].finish == "length" and given[1].prompt_tokens + given[1].new_tokens == 20


def test_empty_prompt_and_empty_list(engine: Any) -> None:
    assert engine.generate([], Sampling()) == []
    (empty,) = engine.generate([Request(id="e", prompt="")], Sampling(max_new_tokens=3))
    assert empty.prompt_tokens == 1 and empty.finish in ("stop", "length")


def test_pick_follows_the_distribution_and_the_nucleus() -> None:
    import torch

    from jz3.engines.transformers_engine import pick

    chances = torch.tensor([0.45, 0.05, 0.3, 0.2])
    rows = chances.log().repeat(4000, 1)

    def shares(**settings: Any) -> np.ndarray:
        drawn = pick(rows, [rng(i) for i in range(len(rows))], Sampling(**settings))
        return np.bincount(drawn, minlength=4) / len(rows)

    assert np.abs(shares(temperature=1.0) - chances.numpy()).max() < 0.03
    assert np.abs(shares(temperature=1.0, top_p=0.7) - [0.6, 0, 0.4, 0]).max() < 0.03
    sharp = (chances**2 / (chances**2).sum()).numpy()
    assert np.abs(shares(temperature=0.5) - sharp).max() < 0.03
    assert shares(temperature=0.0).tolist() == [1, 0, 0, 0]
    wide = torch.zeros(1, 6000)
    assert pick(wide, [rng(1)], Sampling(temperature=1.0, top_p=0.9999))[0] < 6000


def test_pick_refuses_nan() -> None:
    import torch

    from jz3.engines.transformers_engine import pick

    with pytest.raises(Jz3Error, match="NaN"):
        pick(torch.tensor([[0.0, float("nan")]]), [rng(0)], Sampling())


@pytest.mark.parametrize(
    "settings",
    [{"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"stop": ("",)}],
)
def test_bad_sampling_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings)).split("_")[0]):
        Sampling(**settings)


def test_unknown_engine_and_missing_package_are_named(tiny_model: Path) -> None:
    with pytest.raises(ValueError, match="engine must be one of transformers, vllm, openai, got 'vlm'"):
        open_engine(EngineConfig(name="vlm"), tiny_model)
    try:
        import vllm  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        with pytest.raises(Jz3Error, match=r"jz3\[synth\]"):
            open_engine(EngineConfig(name="vllm"), tiny_model)


def test_the_gpus_memory_is_given_back_before_an_engine_is_opened(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM refuses to start where this process holds on to what earlier models took."""
    done: list[str] = []

    class Opened:
        def info(self) -> dict[str, Any]:
            return {}

        def close(self) -> None: ...

    def opened(*_: Any) -> Opened:
        done.append("opened")
        return Opened()

    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: done.append("emptied"))
    monkeypatch.setattr("jz3.engines.on_demand.open_engine", opened)
    with engine_on_demand(EngineConfig(), tiny_model, "float32", tmp_path / "note.json") as engine:
        engine.get()
    assert done == ["emptied", "opened"]


def test_info_names_versions_and_model(engine: Any, tiny_model: Path) -> None:
    info = engine.info()
    assert (info["name"], info["model"], info["dtype"]) == ("transformers", tiny_model.name, "float32")
    assert set(info["versions"]) == {"torch", "transformers"}
    json.dumps(info)


def test_cut_at_stop_takes_the_first_of_several() -> None:
    assert cut_at_stop("one two three", ("three", "two")) == ("one ", True)
    assert cut_at_stop("one", ("two",)) == ("one", False)


def test_a_hybrid_model_goes_on_when_a_row_of_its_batch_has_ended(tiny_model: Path, tmp_path: Path) -> None:
    import torch
    from transformers import Lfm2Config, Lfm2ForCausalLM

    from jz3.models import load_tokenizer

    tokenizer = load_tokenizer(tiny_model)
    torch.manual_seed(0)
    config = Lfm2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention"],
        max_position_embeddings=40,
    )
    Lfm2ForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    # The context ends the longer prompts first.
    asked = [Request(id=str(i), prompt="and the number" * (1 + i), seed=i) for i in range(3)]
    texts = []
    for batch in (1, 3):
        engine = open_engine(EngineConfig(batch_size=batch), tmp_path, "float32")
        given = engine.generate(asked, Sampling(max_new_tokens=30))
        texts.append([(g.text, g.new_tokens) for g in given])
        engine.close()
    assert texts[0] == texts[1]
    assert len({tokens for _, tokens in texts[0]}) > 1
