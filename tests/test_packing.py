"""Packs lose no token, and the documents in them don't see each other."""

from collections import Counter

import pytest

from jz3.models import load_model, load_tokenizer
from jz3.training import packing
from jz3.training.config import TrainSettings
from jz3.training.packing import IGNORED, Document, Phase, encode, split

SETTINGS = TrainSettings(max_length=64, batch_packs=2)


def rows(count, offset=0):
    """Rows of many lengths."""
    return [
        (
            f"## Question\nWhat is {i} and {i + offset}?\n\n## Solution\n",
            "The sum is " + f"{i} " * (i % 23 + 1),
        )
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return load_tokenizer(tiny_model)


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    """Packs in a folder of its own."""
    return lambda phases, tokenizer, settings, seed: packing.pack(
        phases, tokenizer, settings, seed, tmp_path_factory.mktemp("packs") / "new"
    )


def labelled(packs):
    return Counter(
        label for pack_labels in packs.dataset["labels"] for label in pack_labels if label != IGNORED
    )


def test_only_the_completion_and_the_end_are_predicted(tokenizer):
    prompt, completion = "## Question\nHow many?\n\n## Solution\n", "There are 36 apples."
    (document,), dropped = encode([(prompt, completion)], tokenizer)
    assert document.ids[: document.target].tolist() == tokenizer(prompt)["input_ids"]
    assert tokenizer.decode(document.ids[document.target :]) == completion + tokenizer.eos_token
    assert not dropped


def test_a_plain_text_is_predicted_whole_but_for_its_first_token(tokenizer):
    (document,), _ = encode([("", "Plain text.")], tokenizer)
    assert document.target == 1
    assert tokenizer.decode(document.ids) == "Plain text." + tokenizer.eos_token


def test_the_prompt_keeps_its_tokens_where_they_would_merge_with_the_completion(tokenizer):
    prompt, completion = "The ans", "wer is 5."
    alone = tokenizer(prompt)["input_ids"]
    assert tokenizer(prompt + completion)["input_ids"][: len(alone)] != alone, "the example must merge"
    (document,), _ = encode([(prompt, completion)], tokenizer)
    assert document.ids[: document.target].tolist() == alone
    assert tokenizer.decode(document.ids) == prompt + completion + tokenizer.eos_token


def test_an_end_token_of_the_tokenizer_itself_does_not_end_the_prompt(tokenizer):
    class EndingTokenizer:
        eos_token_id = tokenizer.eos_token_id

        def __call__(self, texts, add_special_tokens=True):
            ids = tokenizer(texts)["input_ids"]
            if not add_special_tokens:
                return {"input_ids": ids}
            if isinstance(texts, str):
                return {"input_ids": [*ids, self.eos_token_id]}
            return {"input_ids": [[*i, self.eos_token_id] for i in ids]}

    expected, _ = encode([("A prompt\n", "A completion")], tokenizer)
    got, _ = encode([("A prompt\n", "A completion")], EndingTokenizer())  # pyright: ignore[reportArgumentType]
    assert got[0].ids.tolist() == expected[0].ids.tolist() and got[0].target == expected[0].target


def test_unusable_rows_are_counted_and_named(tokenizer, caplog, pack):
    phase = Phase(name="p", rows=[("a", ""), ("b", " \n"), ("c", "\ud800"), ("d", "fine"), ("e\udfff", "x")])
    packs = pack([phase], tokenizer, SETTINGS, 0)
    assert packs.dropped == {"p": {"bad_unicode": 2, "empty_completion": 2}}
    assert packs.counts["p"]["rows"] == 5 and packs.counts["p"]["documents"] == 1
    assert "2 rows left out: bad_unicode" in caplog.text


@pytest.mark.parametrize(
    "length, target", [(2, 1), (64, 10), (65, 10), (200, 1), (200, 150), (127, 63), (128, 64)]
)
def test_pieces_predict_each_token_once(length, target):
    import numpy as np

    document = Document(ids=np.arange(length, dtype=np.int32), target=target)
    pieces = split(document, 64)
    assert all(2 <= len(p.ids) <= 64 and 1 <= p.target < len(p.ids) for p in pieces)
    assert [t for p in pieces for t in p.ids[p.target :]] == list(range(target, length))


def test_packing_loses_no_predicted_token(tokenizer, pack):
    phases = [
        Phase(name="a", rows=[*rows(150), ("", "many words " * 100)]),
        Phase(name="b", rows=rows(40, 7)),
    ]
    expected = Counter()
    for phase in phases:
        for document in encode(phase.rows, tokenizer)[0]:
            expected.update(document.ids[document.target :].tolist())
    packs = pack(phases, tokenizer, SETTINGS, 0)
    assert labelled(packs) == expected
    assert sum(c["targets"] for c in packs.counts.values()) == sum(expected.values())
    assert packs.counts["a"]["split_rows"] > 0
    assert max(map(len, packs.dataset["input_ids"])) <= 64
    assert not any(packs.dropped.values())


def test_packs_are_well_filled(tokenizer, pack):
    packs = pack([Phase(name="a", rows=rows(300))], tokenizer, SETTINGS, 0)
    assert packs.counts["a"]["tokens"] / (64 * len(packs.phase)) > 0.85


def test_overlong_rows_can_be_rejected(tokenizer, pack):
    settings = TrainSettings(max_length=64, overlong="reject")
    packs = pack([Phase(name="a", rows=[*rows(5), ("", "many words " * 100)])], tokenizer, settings, 0)
    assert packs.dropped == {"a": {"overlong": 1}} and packs.counts["a"]["documents"] == 5


def test_phases_are_read_in_order_and_shuffled_within(tokenizer, pack):
    phases = [Phase(name="a", rows=rows(60)), Phase(name="b", rows=rows(60, 5))]
    packs = pack(phases, tokenizer, SETTINGS, 0)
    first_b = packs.phase.index("b")
    assert set(packs.phase[:first_b]) == {"a"} and set(packs.phase[first_b:]) == {"b"}
    b_alone = pack([phases[1]], tokenizer, SETTINGS, 0)
    assert packs.dataset["input_ids"][first_b:] == b_alone.dataset["input_ids"][:]
    again, other = pack(phases, tokenizer, SETTINGS, 0), pack(phases, tokenizer, SETTINGS, 1)
    assert again.dataset["input_ids"][:] == packs.dataset["input_ids"][:]
    assert other.dataset["input_ids"][:] != packs.dataset["input_ids"][:]
    assert labelled(other) == labelled(packs)
    longest = [max(lengths) for lengths in packs.dataset["seq_lengths"][:first_b]]
    assert longest != sorted(longest, reverse=True), "best fit leaves the packs sorted by length"


def test_epochs_repeat_a_phase_in_another_order(tokenizer, pack):
    phases = [Phase(name="a", rows=rows(30)), Phase(name="b", rows=rows(10, 5))]
    once = pack(phases, tokenizer, SETTINGS, 0)
    twice = pack(phases, tokenizer, TrainSettings(max_length=64, epochs=2), 0)
    assert labelled(twice) == Counter({k: 2 * n for k, n in labelled(once).items()})
    n = once.phase.count("a")
    assert twice.phase[: 2 * n] == ["a"] * (2 * n)
    assert twice.dataset["input_ids"][:n] != twice.dataset["input_ids"][n : 2 * n]


def test_the_token_budget_ends_the_reading(tokenizer, pack):
    phases = [Phase(name="a", rows=rows(30)), Phase(name="b", rows=rows(10, 5))]
    whole = pack(phases, tokenizer, SETTINGS, 0)
    limit = whole.counts["a"]["tokens"] - 20
    packs = pack(phases, tokenizer, TrainSettings(max_length=64, max_tokens=limit), 0)
    assert limit - 64 < packs.counts["a"]["tokens"] <= limit
    assert "b" not in packs.phase and packs.dropped["b"] == {"over_budget": 10}
    assert (
        packs.counts["a"]["documents"] + packs.dropped["a"]["over_budget"] == whole.counts["a"]["documents"]
    )
    exactly = sum(count["tokens"] for count in whole.counts.values())
    packs = pack(phases, tokenizer, TrainSettings(max_length=64, max_tokens=exactly), 0)
    assert packs.counts == whole.counts and not any(packs.dropped.values())


def test_even_packs_take_as_many_steps_whatever_the_texts_lengths(tokenizer, pack):
    from itertools import pairwise

    long, short = [("", "seven words of a text that is " * 4)] * 40, rows(200)
    settings = TrainSettings(max_length=64, max_tokens=1000, epochs=2, packing="even")
    for phase in (Phase(name="a", rows=long), Phase(name="a", rows=short)):
        packs = pack([phase], tokenizer, settings, 0)
        assert [len(ids) for ids in packs.dataset["input_ids"]] == [64] * 15 + [40]
        assert [sum(lengths) for lengths in packs.dataset["seq_lengths"]] == [64] * 15 + [40]
        assert (packs.counts["a"]["tokens"], packs.counts["a"]["packs"]) == (1000, 16)
        assert packs.counts["a"]["targets"] == sum(labelled(packs).values())
        for lengths, labels in zip(packs.dataset["seq_lengths"], packs.dataset["labels"], strict=True):
            starts = [sum(lengths[:i]) for i in range(len(lengths))]
            assert all(labels[start] == IGNORED for start in starts), "predicted across documents"
    encoded = {tuple(p.ids.tolist()) for d in encode(short, tokenizer)[0] for p in split(d, 64)}
    first = packs.dataset[0]
    bounds = [sum(first["seq_lengths"][:i]) for i in range(len(first["seq_lengths"]) + 1)]
    whole = [tuple(first["input_ids"][start:end]) for start, end in pairwise(bounds)][:-1]
    assert whole and set(whole) <= encoded


def test_an_even_pack_that_predicts_nothing_is_left_out(tokenizer, pack):
    phase = Phase(name="a", rows=[("", f"a text of some words, number {i}") for i in range(40)])
    packs = pack([phase], tokenizer, TrainSettings(max_length=64, max_tokens=129, packing="even"), 0)
    assert [len(ids) for ids in packs.dataset["input_ids"]] == [64, 64]
    assert (packs.counts["a"]["tokens"], packs.counts["a"]["packs"], packs.phase) == (128, 2, ["a", "a"])
    one = pack([phase], tokenizer, TrainSettings(max_length=64, max_tokens=1, packing="even"), 0)
    assert one.phase == [] and len(one.dataset) == 0


def collated(packs, index, tokenizer):
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    collator = DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id, padding_free=True)
    return collator([packs.dataset[index]])


def token_losses(model, batch):
    """The loss of every predicted token of a pack."""
    from torch.nn.functional import cross_entropy

    labels = batch["labels"][0, 1:]
    kept = {k: v for k, v in batch.items() if k != "labels"}
    logits = model(**kept, use_cache=False).logits[0, :-1]
    return cross_entropy(logits, labels, reduction="none", ignore_index=IGNORED)[labels != IGNORED]


def alone_losses(model, batch):
    """The same, each document by itself, with the model's own attention."""
    import torch
    from torch.nn.functional import cross_entropy

    losses, bounds = [], batch["cu_seq_lens_q"].tolist()
    for start, end in zip(bounds, bounds[1:], strict=False):
        ids, labels = batch["input_ids"][:, start:end], batch["labels"][0, start + 1 : end]
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        losses.append(
            cross_entropy(logits, labels, reduction="none", ignore_index=IGNORED)[labels != IGNORED]
        )
    return torch.cat(losses)


@pytest.fixture(scope="module")
def packed(tokenizer, pack):
    packs = pack([Phase(name="a", rows=rows(40))], tokenizer, TrainSettings(max_length=256), 0)
    index = max(range(len(packs.phase)), key=lambda i: len(packs.dataset["seq_lengths"][i]))
    return collated(packs, index, tokenizer)


def packed_model(folder, dtype):
    from jz3.training.run import choose_attention

    model = load_model(folder, dtype)
    choose_attention(model)
    return model


def test_packed_loss_is_the_loss_of_each_document_alone(tiny_model, packed):
    """The packed float32 error may be at most twice that of the plain float32 computation."""
    import torch

    assert len(packed["cu_seq_lens_q"]) > 4, "the pack must hold several documents"
    with torch.no_grad():
        exact = alone_losses(load_model(tiny_model, "float64"), packed)
        plain = alone_losses(load_model(tiny_model, "float32"), packed)
        got = token_losses(packed_model(tiny_model, "float32"), packed)
    tolerance = 2 * (plain - exact).abs().max() + 8 * torch.finfo(torch.float32).eps
    assert len(got) == len(exact) > 50
    assert (got - exact).abs().max() <= tolerance
    assert tolerance < 1e-4


def test_packed_gradient_is_the_sum_of_the_documents_gradients(tiny_model, packed):
    import torch

    one, other = packed_model(tiny_model, "float64"), load_model(tiny_model, "float64")
    token_losses(one, packed).sum().backward()
    alone_losses(other, packed).sum().backward()
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-9, msg=name)


def test_changing_one_document_leaves_the_others_losses(tiny_model, packed):
    import torch

    model = packed_model(tiny_model, "float32")
    start, end = packed["cu_seq_lens_q"][1:3].tolist()
    changed = {**packed, "input_ids": packed["input_ids"].clone(), "labels": packed["labels"].clone()}
    changed["input_ids"][0, start:end] = (changed["input_ids"][0, start:end] + 7) % 500
    owner = torch.bucketize(torch.arange(len(packed["labels"][0])), packed["cu_seq_lens_q"], right=True)
    owner = owner[1:][packed["labels"][0, 1:] != IGNORED]
    with torch.no_grad():
        before, after = token_losses(model, packed), token_losses(model, changed)
    assert torch.equal(before[owner != 2], after[owner != 2])
    assert not torch.equal(before[owner == 2], after[owner == 2])


def test_a_window_shorter_than_a_document_is_refused():
    import torch

    from jz3.errors import Jz3Error
    from jz3.training.attention import document_attention

    x = torch.zeros(1, 2, 8, 4)
    bounds = torch.tensor([0, 6, 8])
    with pytest.raises(Jz3Error, match="max_length <= 4"):
        document_attention(torch.nn.Identity(), x, x, x, None, cu_seq_lens_q=bounds, sliding_window=4)
    with pytest.raises(Jz3Error, match="soft capping"):
        document_attention(torch.nn.Identity(), x, x, x, None, cu_seq_lens_q=bounds, softcap=30.0)


def test_packing_asks_for_few_rows_and_maps_what_it_packs(tokenizer, pack, monkeypatch):
    from collections.abc import Sequence

    class Asked(Sequence):
        """Rows that are given a few at a time only."""

        def __init__(self, held):
            self.held = held

        def __len__(self):
            return len(self.held)

        def __getitem__(self, index):
            assert len(range(len(self.held))[index]) <= 16
            return self.held[index]

    monkeypatch.setattr(packing, "CHUNK", 16)
    for settings in (SETTINGS, TrainSettings(max_length=64, epochs=2, packing="even")):
        expected = pack([Phase(name="a", rows=rows(100))], tokenizer, settings, 0)
        packs = pack([Phase(name="a", rows=Asked(rows(100)))], tokenizer, settings, 0)
        assert packs.dataset[:] == expected.dataset[:]
        assert packs.dataset.cache_files, "the packs are in memory"
