"""The three calls that pipelines embed."""

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

import jz3
from jz3.features.extract import extract
from jz3.features.lora import LoraShape, WarmUp, adapter_sizes
from jz3.gradients import linear_layers, tokenize_query
from jz3.machine import products_obstacle
from jz3.models import load_model, load_tokenizer

DOCS = [f"The sum of {a} and {b} is {a + b}." for a, b in zip(range(3, 15), range(20, 8, -1), strict=True)]
QUERY = ("Question: what is 7 plus 9?\n", "The sum of 7 and 9 is 16.")


def test_three_calls(tiny_model: Path) -> None:
    model, tokenizer = load_model(tiny_model, "float32"), load_tokenizer(tiny_model)
    features = jz3.featurize(model, tokenizer, DOCS, jz3.Adapted([QUERY], k=256, rank=16))
    scores = jz3.influence_scores(features, {"sums": [QUERY]})
    assert scores.values.shape == (len(DOCS), 1) and np.abs(scores.values).max() <= 1.001
    again = jz3.influence_scores(features, {"sums": [QUERY]})
    assert scores != again and len({features, scores, again}) == 3  # as keys of a cache
    chosen = jz3.select(scores, 4)
    assert scores.values[chosen[0]] == scores.values.max() and len(set(chosen)) == 4
    again = features.encode([(DOCS[0][:1], DOCS[0][1:])])
    assert again.shape == (1, 256)


def test_queries_are_encoded_without_dropout(tiny_model: Path) -> None:
    """A model that goes on to be trained is in training mode again."""
    model: Any = load_model(tiny_model, "float32")
    docs: Any = np.array(DOCS)
    features = jz3.featurize(model, load_tokenizer(tiny_model), docs, jz3.Sketch(k=128))
    before = features.encode([QUERY])
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.train()
    assert np.array_equal(features.encode([QUERY]), before)


@pytest.mark.parametrize("products", ["int8_backward", "int16"])
def test_queries_need_no_products_that_this_machine_has_not(
    tiny_model: Path, products: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Features may have been pickled on another one."""
    model = load_model(tiny_model, "float32")
    features = jz3.featurize(model, load_tokenizer(tiny_model), DOCS, jz3.Sketch(k=128), products="exact")
    expected = features.encode([QUERY])
    monkeypatch.setattr("jz3.gradients.passes.products_obstacle", lambda kind: "too old" * (kind != "exact"))
    elsewhere = dataclasses.replace(features, products=products)
    assert np.array_equal(elsewhere.encode([QUERY]), expected)


def unit(values: np.ndarray) -> np.ndarray:
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def test_queries_are_completed_from_the_sample(tiny_model: Path) -> None:
    model, tokenizer = load_model(tiny_model, "float32"), load_tokenizer(tiny_model)
    plain, completed = (
        jz3.featurize(model, tokenizer, DOCS, jz3.Adapted([QUERY], k=16, rank=16, completion=more))
        for more in (0, 512)
    )
    assert plain.completion is None and completed.completion is not None
    assert np.allclose(unit(plain.values), unit(completed.values), atol=1e-5)
    fit = completed.completion.fit
    asked = [tokenize_query(tokenizer, "", *QUERY, 512)]
    wide = extract(model, linear_layers(model), asked, fit, side="query").values
    assert wide.shape == (1, 528)
    assert np.allclose(completed.encode([QUERY]), completed.completion.fold(wide).numpy(), atol=1e-5)
    # What a document's own coordinates are stays; what they stand for is added.
    own = wide[:, completed.completion.positions].numpy()
    assert np.allclose(unit(plain.encode([QUERY])), unit(own), atol=1e-5)
    assert not np.allclose(plain.encode([QUERY]), completed.encode([QUERY]), atol=1e-4)


def test_sketch_needs_no_query(tiny_model: Path) -> None:
    model, tokenizer = load_model(tiny_model, "float32"), load_tokenizer(tiny_model)
    features = jz3.featurize(model, tokenizer, DOCS[:3], jz3.Sketch(k=4096, left=32, right=16))
    norms = np.linalg.norm(features.values, axis=1)
    assert (np.abs(norms - 1) < 0.35).all()


def test_less_warms_up_once_per_model_and_texts(tiny_model: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model(tiny_model, "float32"), load_tokenizer(tiny_model)
    shape = LoraShape(rank=4, alpha=16.0)
    kind = jz3.Less(tmp_path, k=64, shape=shape, warm_up=WarmUp(share=0.5, epochs=2, batch_texts=2))
    features = jz3.featurize(model, tokenizer, DOCS, kind)
    assert features.values.shape == (len(DOCS), 128)
    assert np.allclose(np.linalg.norm(features.values, axis=1), 1, atol=1e-4)
    [folder] = tmp_path.iterdir()
    written = [path.stat().st_mtime_ns for path in sorted(folder.iterdir())]
    assert len(written) == 2
    assert np.array_equal(jz3.featurize(model, tokenizer, DOCS, kind).values, features.values)
    assert [path.stat().st_mtime_ns for path in sorted(folder.iterdir())] == written
    # A text as a query has its plain gradient, which is not Adam's direction.
    [query] = features.encode([("", DOCS[0])])
    assert np.isclose(np.linalg.norm(query), 1, atol=1e-4) and query @ features.values[0] < 0.99
    scores = jz3.influence_scores(features, {"sums": [QUERY]})
    assert np.allclose(scores.values[:, 0], features.values @ features.encode([QUERY])[0])
    jz3.featurize(model, tokenizer, DOCS[1:], kind)
    assert len(list(tmp_path.iterdir())) == 2


def test_the_callers_random_numbers_stay(tiny_model: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model(tiny_model, "float32"), load_tokenizer(tiny_model)
    shape = LoraShape(rank=2, dropout=0.5)
    less = jz3.Less(tmp_path, k=16, shape=shape, warm_up=WarmUp(share=0.5, epochs=1))
    before = torch.get_rng_state()
    for kind in (jz3.Adapted(k=16, rank=4), jz3.Sketch(k=16, left=4, right=4), less):
        jz3.featurize(model, tokenizer, iter(DOCS[:3]), kind)
        assert torch.equal(torch.get_rng_state(), before)


def wide_model() -> Any:
    """A model whose blocks jz3's own code computes, where that is built."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 512}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads))  # pyright: ignore[reportArgumentType]


def test_less_is_exact_whatever_is_asked_for(tiny_model: Path, tmp_path: Path) -> None:
    if reason := products_obstacle("int16"):
        pytest.skip(reason)
    model, tokenizer = wide_model(), load_tokenizer(tiny_model)
    warm_up = WarmUp(share=0.5, epochs=1, batch_texts=2)
    kinds = (jz3.Sketch(k=64), jz3.Less(tmp_path, k=64, shape=LoraShape(rank=4), warm_up=warm_up))
    found = [jz3.featurize(model, tokenizer, DOCS[:4], kind, products="int16").products for kind in kinds]
    assert found == ["int16", "exact"]


@pytest.mark.parametrize("own_code", [True, False])
def test_what_the_caller_has_switched_on_changes_nothing(tiny_model: Path, own_code: bool) -> None:
    tokenizer = load_tokenizer(tiny_model)

    def features(model: Any) -> list[np.ndarray]:
        found = jz3.featurize(model, tokenizer, DOCS[:4], jz3.Adapted([QUERY], k=64, rank=8, completion=64))
        return [found.values, found.encode([QUERY])]

    model = wide_model() if own_code else load_model(tiny_model, "float32")
    expected = features(model)
    for mode in (torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.device("meta")):
        with mode:
            assert all(map(np.array_equal, features(model), expected)), mode


def test_threads_share_a_model(tiny_model: Path) -> None:
    model, tokenizer = load_model(tiny_model, "float32"), load_tokenizer(tiny_model)
    features = jz3.featurize(model, tokenizer, DOCS[:2], jz3.Sketch(64, 8, 8))
    queries = [[("Question: ", text)] for text in DOCS]
    expected = [features.encode(query) for query in queries]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(features.encode, queries))
    assert all(map(np.array_equal, found, expected))


def test_a_model_that_is_being_trained_is_left_as_it_was(tiny_model: Path) -> None:
    model: Any = load_model(tiny_model, "float32")
    tokenizer = load_tokenizer(tiny_model)
    model.train()
    model.model.layers[0].eval()
    model.model.embed_tokens.requires_grad_(False)

    def state() -> list[Any]:
        modules = [(m.training, len(m._forward_hooks)) for m in model.modules()]
        return [*modules, *(p.requires_grad for p in model.parameters())]

    before = state()
    features = jz3.featurize(model, tokenizer, DOCS[:2], jz3.Sketch(64, 8, 8))
    assert state() == before
    features.encode([QUERY])
    assert state() == before
    with pytest.raises(ValueError, match="at least 2 are needed"):
        jz3.featurize(model, tokenizer, ["a"])
    assert state() == before and all(p.grad is None for p in model.parameters())


def test_a_compiled_model_has_the_features_of_the_model(tiny_model: Path) -> None:
    model, tokenizer = load_model(tiny_model, "float32"), load_tokenizer(tiny_model)
    compiled: Any = torch.compile(model, backend="eager")
    one, two = (jz3.featurize(m, tokenizer, DOCS[:3], jz3.Sketch(64, 8, 8)) for m in (model, compiled))
    assert np.array_equal(one.values, two.values)


def test_a_tokenizer_that_is_set_up_anew_is_seen(tiny_model: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    model: Any = load_model(tiny_model, "float32")
    tokenizer: Any = load_tokenizer(tiny_model)
    plain = jz3.featurize(model, tokenizer, DOCS[:2], jz3.Sketch(64, 8, 8))
    end = (tokenizer.eos_token, tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{end[0]} $A", special_tokens=[end]
    )
    marked = jz3.featurize(model, tokenizer, DOCS[:2], jz3.Sketch(64, 8, 8))
    # The first word is scored too where a start token goes before it.
    assert not np.allclose(plain.loss, marked.loss, rtol=1e-3)


def test_what_is_no_text_is_told(tiny_model: Path) -> None:
    model, tokenizer = load_model(tiny_model, "float32"), load_tokenizer(tiny_model)
    wrong: Any = [*DOCS, None]
    kind: Any = "sketch"
    with pytest.raises(TypeError, match=r"text 12 must be a str, got None \(1 such"):
        jz3.featurize(model, tokenizer, wrong)
    with pytest.raises(TypeError, match="kind must be an Adapted, Sketch or Less, got 'sketch'"):
        jz3.featurize(model, tokenizer, DOCS, kind)
    with pytest.raises(TypeError, match="several texts, got one: 'The sum"):
        jz3.featurize(model, tokenizer, DOCS[0])
    frame = pytest.importorskip("pandas").DataFrame({"a long enough name": DOCS})
    tables: list[Any] = [dict(enumerate(DOCS)), dict.fromkeys(DOCS), frame, np.array([DOCS])]
    for table in tables:
        with pytest.raises(
            TypeError, match=f"several texts, got a {type(table).__name__}; give its texts alone"
        ):
            jz3.featurize(model, tokenizer, table)
    for queries in (QUERY, [(*QUERY, "")], ["ab"], np.array([[*QUERY, ""]])):
        pairs: Any = queries
        with pytest.raises(TypeError, match="query 0 must be a pair"):
            jz3.featurize(model, tokenizer, DOCS, jz3.Adapted(pairs))


def test_what_is_no_model_or_tokenizer_is_told(tiny_model: Path) -> None:
    model, tokenizer = load_model(tiny_model, "float32"), load_tokenizer(tiny_model)
    name: Any = "tiny"
    wrapped: Any = torch.nn.DataParallel(model)
    with pytest.raises(
        TypeError, match="model must be a loaded causal language model, got 'tiny'; for example"
    ):
        jz3.featurize(name, tokenizer, DOCS)
    with pytest.raises(TypeError, match=r"got a DataParallel; give its \.module"):
        jz3.featurize(wrapped, tokenizer, DOCS)
    with pytest.raises(TypeError, match="tokenizer must be a loaded tokenizer, got 'tiny'; for example"):
        jz3.featurize(model, name, DOCS)
    sizes: dict[str, Any] = {
        "d_model": 8,
        "d_kv": 4,
        "num_layers": 1,
        "num_heads": 2,
        "d_ff": 8,
        "vocab_size": 512,
    }
    translator: Any = T5ForConditionalGeneration(T5Config(**sizes))
    with pytest.raises(
        TypeError, match="causal language model, got T5ForConditionalGeneration, which has an enc"
    ):
        jz3.featurize(translator, tokenizer, DOCS)
    tokenizer.add_tokens(["sum"])
    count = model.get_input_embeddings().num_embeddings
    with pytest.raises(ValueError, match=f"text 0 holds the token {count}, the model has {count} embeddings"):
        jz3.featurize(model, tokenizer, DOCS, jz3.Sketch(64, 8, 8))


def test_settings_out_of_range_are_told(tiny_model: Path) -> None:
    model, tokenizer = load_model(tiny_model, "float32"), load_tokenizer(tiny_model)
    wrong: list[tuple[type, dict[str, Any]]] = [
        *((jz3.Adapted, {name: -1}) for name in ("documents", "k", "rank", "layers", "completion")),
        *((jz3.Adapted, {name: 0}) for name in ("k", "rank", "layers")),
        *((jz3.Sketch, {name: number}) for name in ("k", "left", "right") for number in (0, -1)),
        (jz3.Less, {"folder": "less", "k": 0}),
    ]
    for kind, settings in wrong:
        *_, (name, number) = settings.items()
        with pytest.raises(
            ValueError, match=rf"{kind.__name__}: {name} must be in \[[01], \d+\], got {number}"
        ):
            kind(**settings)
    with pytest.raises(TypeError, match="Adapted: k must be an int, got float"):
        jz3.Adapted(k=2.5)  # pyright: ignore[reportArgumentType]
    for name in ("max_tokens", "batch_tokens"):
        limit: dict[str, Any] = {name: 0}
        with pytest.raises(ValueError, match=rf"featurize: {name} must be in \[\d, \d+\], got 0"):
            jz3.featurize(model, tokenizer, DOCS, jz3.Sketch(64, 8, 8), **limit)


def test_numbers_may_be_numpys_or_torchs(tiny_model: Path, tmp_path: Path) -> None:
    """Counts that were computed are no plain ints."""
    model, tokenizer = load_model(tiny_model, "float32"), load_tokenizer(tiny_model)
    shape, warm_up = LoraShape(rank=2), WarmUp(share=0.5, epochs=1)
    numbers: list[Any] = [np.int64, np.uint16, torch.tensor]
    makes: list[Callable[[Any], Any]] = [
        lambda n: jz3.Adapted([QUERY], k=n(64), rank=n(8), layers=n(4), completion=n(8), seed=n(3)),
        lambda n: jz3.Sketch(n(64), left=n(8), right=n(8), seed=n(3)),
        lambda n: jz3.Less(tmp_path, k=n(16), shape=shape, warm_up=warm_up, seed=n(3)),
    ]
    for make in makes:
        features = jz3.featurize(model, tokenizer, DOCS, make(int), max_tokens=64, batch_tokens=128)
        for number in numbers:
            kind, tokens = make(number), {"max_tokens": number(64), "batch_tokens": number(128)}
            assert kind == make(int) and type(kind.k) is int
            again = jz3.featurize(model, tokenizer, DOCS, kind, **tokens)
            assert np.array_equal(again.values, features.values)
    scores = jz3.influence_scores(features, {"sums": [QUERY]})
    assert all(jz3.select(scores, number(4)) == jz3.select(scores, 4) for number in numbers)
    none: list[Any] = [np.float64(4), np.array([4, 4]), np.True_, "4"]
    for wrong in none:
        with pytest.raises(TypeError, match="Sketch: seed must be an int, got"):
            jz3.Sketch(seed=wrong)


def test_settings_of_less_that_cannot_be_are_told(tiny_model: Path, tmp_path: Path) -> None:
    """They ended in divisions by zero, in other layers, or in gradients of 0 that the texts were blamed for."""
    wrong: list[tuple[type, dict[str, Any], str]] = [
        (LoraShape, {"rank": 0}, r"LoraShape: rank must be in \[1, \d+\], got 0"),
        (LoraShape, {"alpha": 0.0}, "LoraShape: alpha must be above 0, got 0.0"),
        (LoraShape, {"dropout": 1.0}, r"LoraShape: dropout must be in \[0, 1\), got 1.0"),
        (WarmUp, {"epochs": 0}, r"WarmUp: epochs must be in \[1, \d+\], got 0"),
        (WarmUp, {"batch_texts": 0}, r"WarmUp: batch_texts must be in \[1, \d+\], got 0"),
        (WarmUp, {"share": 2.0}, r"WarmUp: share must be in \(0, 1\], got 2.0"),
        (WarmUp, {"learning_rate": 0.0}, "WarmUp: learning_rate must be above 0, got 0.0"),
        (jz3.Less, {"folder": tmp_path, "learning_rates": [1e-5]}, r"as many as checkpoints \(0\), got 1"),
    ]
    for kind, settings, message in wrong:
        with pytest.raises(ValueError, match=message):
            kind(**settings)
    kinds: list[dict[str, Any]] = [
        {"folder": None},
        {"folder": "", "checkpoints": "a"},
        {"folder": "", "learning_rates": 1},
    ]
    for settings in kinds:
        *_, (name, value) = settings.items()
        with pytest.raises(TypeError, match=f"Less: {name} must be .* got {value!r}"):
            jz3.Less(**settings)
    once = jz3.Less(tmp_path, (str(path) for path in (tmp_path / "none",)))  # pyright: ignore[reportArgumentType]
    model, tokenizer = load_model(tiny_model, "float32"), load_tokenizer(tiny_model)
    with pytest.raises(jz3.Jz3Error, match="none/adapter_config.json is missing"):
        jz3.featurize(model, tokenizer, DOCS, once)


def test_layers_of_less_may_be_named_as_for_peft(tiny_model: Path) -> None:
    model = load_model(tiny_model, "float32")
    for one, several in (("q_proj", ("q_proj",)), (["q_proj"], ("q_proj",)), ("all-linear", ("all-linear",))):
        names: Any = one
        shape = LoraShape(rank=np.int64(2), targets=names)  # pyright: ignore[reportArgumentType]
        assert shape == LoraShape(rank=2, targets=several)
        assert adapter_sizes(model, shape)


def test_less_on_a_model_with_adapters_is_told(tiny_model: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, tokenizer = load_model(tiny_model, "float32"), load_tokenizer(tiny_model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"model must be without adapters.*model\.unload\(\)"):
        jz3.featurize(adapted, tokenizer, DOCS, jz3.Less(tmp_path))


def test_queries_may_be_any_iterable(tiny_model: Path) -> None:
    """What is gone through once made a fit without queries, and scores that were no numbers."""
    model, tokenizer = load_model(tiny_model, "float32"), load_tokenizer(tiny_model)
    listed, once = ([QUERY, (DOCS[0][:5], DOCS[0][5:])] for _ in range(2))
    stream: Any = iter(once)
    kinds = [jz3.Adapted(queries, k=64, rank=8, completion=0) for queries in (listed, stream)]
    features = [jz3.featurize(model, tokenizer, DOCS, kind) for kind in kinds]
    assert np.array_equal(features[0].values, features[1].values)
    rows: Any = np.array(once)
    assert np.array_equal(features[0].encode(rows), features[0].encode(listed))
    stream = iter(once)
    one, two = (jz3.influence_scores(features[0], {"sums": queries}) for queries in (listed, stream))
    assert np.array_equal(one.values, two.values)
    with pytest.raises(ValueError, match="at least one query, got {'sums': 0}"):
        stream = iter(())
        jz3.influence_scores(features[0], {"sums": stream})


def test_what_are_no_queries_or_scores_is_told(tiny_model: Path) -> None:
    model, tokenizer = load_model(tiny_model, "float32"), load_tokenizer(tiny_model)
    features: Any = jz3.featurize(model, tokenizer, DOCS, jz3.Sketch(64, 8, 8))
    nothing: list[Any] = [None, 5]
    for queries in nothing:
        with pytest.raises(TypeError, match="queries must be several pairs"):
            features.encode(queries)
        with pytest.raises(TypeError, match="queries must be several pairs"):
            jz3.Adapted(queries)
        with pytest.raises(TypeError, match="docs must be several texts, got (None|5)"):
            jz3.featurize(model, tokenizer, queries)
        with pytest.raises(TypeError, match="query 0 must be a pair"):
            features.encode([queries])
    with pytest.raises(TypeError, match=r"tasks must be a mapping .* got \["):
        wrong: Any = [QUERY]
        jz3.influence_scores(features, wrong)
    with pytest.raises(TypeError, match="scores must be what influence_scores returned, got Features"):
        jz3.select(features, 2)
    with pytest.raises(TypeError, match="features must be what featurize returned, got ndarray"):
        jz3.influence_scores(features.values, {"sums": [QUERY]})
    scores = jz3.influence_scores(features, {"sums": [QUERY]})
    with pytest.raises(TypeError, match="k must be an int, got float"):
        jz3.select(scores, 2.5)  # pyright: ignore[reportArgumentType]


def test_names_are_listed_before_they_are_loaded() -> None:
    code = "import jz3, sys; assert {*jz3.__all__} <= {*dir(jz3)}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


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
