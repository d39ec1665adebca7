"""What of a text is scored: start tokens, completions, conversations, texts that are too long."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from jz3.corpus.readers import SourceText
from jz3.evaluation.nll import encode as scored
from jz3.explain import pieces_of
from jz3.gradients import make_batches, start_tokens, tokenize_chat, tokenize_query, tokenize_text
from jz3.models import load_tokenizer
from jz3.records import Query
from jz3.scoring.config import ScoreSettings
from jz3.training.packing import encode

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def with_start(folder: Path) -> Any:
    """The tiny tokenizer, but with a token that it puts before every text."""
    from tokenizers.processors import TemplateProcessing

    tokenizer: Any = load_tokenizer(folder)
    end = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{end} $A", special_tokens=[(end, tokenizer.eos_token_id)]
    )
    return tokenizer


def with_prefix() -> Any:
    """A tokenizer with a sign for the beginning of every text, as Llama 2's and Mistral's have it."""
    from tokenizers import Tokenizer, models, normalizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {c: i for i, c in enumerate(("<end>", "\u2581", *"\n abcdefgh.?"))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    steps = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    backend.normalizer = normalizers.Sequence(steps)  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


def test_a_completion_has_the_tokens_that_the_training_teaches() -> None:
    tokenizer = with_prefix()
    prompt, completion = "abc?\n", "dab. a"
    (taught,), _ = encode([(prompt, completion)], tokenizer)
    query = tokenize_query(tokenizer, "q", prompt, completion, 100)
    assert (query.ids, query.start) == (taught.ids.tolist(), taught.target)
    asked = Query(id="q", task="t", problem="", prompt=prompt, completion=completion, role="eval")
    head, tail = scored(tokenizer, asked)
    assert ([*head, *tail, tokenizer.eos_token_id], len(head)) == (query.ids, query.start)
    text = tokenize_text(tokenizer, "t", prompt + completion, 100, prompt="abc?")
    assert (text.ids, text.start) == (query.ids[:-1], query.start - 1)
    assert "".join(pieces_of(tokenizer, prompt + completion, "abc?", len(text.ids))) == prompt + completion


def test_completion_is_scored(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    query = tokenize_query(tokenizer, "q", "What is 2+2?", "It is 4.", 100)
    assert tokenizer.decode(query.ids[: query.start]) == "What is 2+2?"
    assert query.ids[-1] == tokenizer.eos_token_id and query.cut == 0
    with pytest.raises(ValueError, match="empty completion"):
        tokenize_query(tokenizer, "q", "What?", "", 100)
    with pytest.raises(ValueError, match="prompt alone"):
        tokenize_query(tokenizer, "q", "What is 2+2?" * 20, "4", 10)
    with pytest.raises(ValueError, match="at least 2"):
        tokenize_text(tokenizer, "t", "", 10)


def test_a_prompt_is_not_scored(tiny_model: Path) -> None:
    tokenizer, marked = load_tokenizer(tiny_model), with_start(tiny_model)
    text = "What is 2+2?\n\nIt is 4."
    found = tokenize_text(tokenizer, "t", text, 100, prompt="  What is 2+2?\n")
    assert tokenizer.decode(found.ids[: found.start]) == "What is 2+2?"
    assert tokenizer.decode(found.ids) == text
    # The corpus stage mends ends of lines and takes common indentation away; the prompt is as it was read.
    for other, prompt in (
        ("\n " + text, "\n What is 2+2?"),
        ("What is\n\n2+2?\n\nIt is 4.", " What is\r\n  \r\n2+2?"),
    ):
        tokens = tokenize_text(tokenizer, "t", other, 100, prompt=prompt)
        assert tokenizer.decode(tokens.ids[tokens.start :]) == "\n\nIt is 4."
    start = tokenize_text(marked, "t", text, 100, prompt="What is 2+2?")
    assert (start.ids[1:], start.start) == (found.ids, found.start + 1)
    # Another beginning is no prompt, nor is none.
    for prompt in ("It is", ""):
        assert tokenize_text(tokenizer, "t", text, 100, prompt=prompt).start == 1
    assert tokenize_text(tokenizer, "t", " \n \n", 100).start == 1
    for prompt in (text, f"{text} And 3+3?", "  What is\r\n2+2? It is 4. And 3+3?"):
        with pytest.raises(ValueError, match="at least"):
            tokenize_text(tokenizer, "t", text, 100, prompt=prompt)
    with pytest.raises(ValueError, match="nothing is left to score"):
        tokenize_text(tokenizer, "t", text, found.start, prompt="What is 2+2?")


def test_half_characters_are_refused(tiny_model: Path) -> None:
    """As a JSON escape gives them: an emoji's first half."""
    tokenizer: Any = load_tokenizer(tiny_model)
    tokenizer.chat_template = TEMPLATE
    with pytest.raises(ValueError, match="text t is no valid Unicode: surrogates not allowed"):
        tokenize_text(tokenizer, "t", "an apple \ud83c", 10)
    for pair in (("a\ud83c", "b"), ("a", "b\ud83c")):
        with pytest.raises(ValueError, match="query q is no valid Unicode"):
            tokenize_query(tokenizer, "q", *pair, 10)
        messages = [{"role": r, "content": c} for r, c in zip(("user", "assistant"), pair, strict=True)]
        with pytest.raises(ValueError, match="conversation c is no valid Unicode"):
            tokenize_chat(tokenizer, "c", messages, 10)


def test_start_token_is_added_and_never_scored(tiny_model: Path) -> None:
    plain, marked = load_tokenizer(tiny_model), with_start(tiny_model)
    assert start_tokens(plain) == () and start_tokens(marked) == (marked.eos_token_id,)
    text, same = tokenize_text(marked, "t", "one two", 100), tokenize_text(plain, "t", "one two", 100)
    assert text.ids == [marked.eos_token_id, *same.ids] and text.start == same.start == 1
    query = tokenize_query(marked, "q", "one", " two", 100)
    assert query.ids[0] == marked.eos_token_id and marked.decode(query.ids[1 : query.start]) == "one"
    alone = tokenize_query(marked, "q", "", "two", 100)
    assert alone.start == 1 and alone.ids[0] == marked.eos_token_id
    with pytest.raises(ValueError, match="1 token"):
        tokenize_text(marked, "t", "", 100)


def test_conversation_scores_the_last_answer(tiny_model: Path) -> None:
    tokenizer: Any = load_tokenizer(tiny_model)
    question, answer = {"role": "user", "content": "one?"}, {"role": "assistant", "content": "two"}
    with pytest.raises(ValueError, match="no chat template"):
        tokenize_chat(tokenizer, "c", [question, answer], 100)
    tokenizer.chat_template = TEMPLATE
    tokens = tokenize_chat(tokenizer, "c", [question, answer], 100)
    assert tokenizer.decode(tokens.ids[: tokens.start]) == "<user>one?</><assistant>"
    assert tokenizer.decode(tokens.ids[tokens.start :]) == "two</>"
    with pytest.raises(ValueError, match="does not end with an answer"):
        tokenize_chat(tokenizer, "c", [question], 100)
    tokenizer.chat_template = "{{ messages | length }}" + TEMPLATE
    with pytest.raises(ValueError, match="changes the prompt"):
        tokenize_chat(tokenizer, "c", [question, answer], 100)


def test_long_texts_are_cut_or_split_and_counted(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    text = "one two three four five " * 10
    whole = tokenize_text(tokenizer, "t", text, 10_000)
    cut = tokenize_text(tokenizer, "t", text, 16)
    assert cut.ids == whole.ids[:16] and cut.cut == len(whole.ids) - 16 and whole.cut == 0
    split = tokenize_text(tokenizer, "t", text, 16, long="split")
    [batch] = make_batches([split], 32)
    assert split.ids == whole.ids and batch.windowed and batch.ids.shape[1] == 16
    # Every token after the first is scored in exactly one window.
    scored = [
        token
        for row, begin, end in zip(
            batch.ids.tolist(), batch.starts.tolist(), batch.lengths.tolist(), strict=True
        )
        for token in row[begin:end]
    ]
    assert scored == whole.ids[1:]
    with pytest.raises(ValueError, match="'begin' or 'split'"):
        tokenize_text(tokenizer, "t", text, 16, long="drop")


def test_what_lies_far_behind_the_cut_is_not_tokenised(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer: Any = load_tokenizer(tiny_model)
    seen = []
    call = type(tokenizer).__call__

    def spy(self: Any, text: str, **options: Any) -> Any:
        seen.append(len(text))
        return call(self, text, **options)

    monkeypatch.setattr(type(tokenizer), "__call__", spy)
    words = "The sum of 12 and 30 is 42, naïve \u2211 say.\n\n"
    for text in (words * 1000, "ab" * 20_000, words + " " * 40_000 + words, words, "\u6570\u5b66" * 9000):
        for count in (3, 40):
            whole = tokenize_text(tokenizer, "0", text, count)
            seen.clear()
            begin = tokenize_text(tokenizer, "0", text, count, "begin")
            assert (begin.ids, begin.start) == (whole.ids, whole.start)
            if text.startswith(words * 2):
                assert max(seen) < 2000
    seen.clear()
    pieces = pieces_of(tokenizer, words * 1000, words, 40)
    assert len(pieces) == 40 and (words * 2).startswith("".join(pieces)) and max(seen) < 2000
    seen.clear()
    scored = SourceText(text=words * 1000, source="", where="corpus.jsonl:1")
    assert len(ScoreSettings(max_tokens=40).tokens_of(tokenizer, scored).ids) == 40 and max(seen) < 2000
    prompted = tokenize_text(tokenizer, "0", words * 1000, 60, "begin", prompt=words)
    assert prompted == dataclasses.replace(
        tokenize_text(tokenizer, "0", words * 1000, 60, prompt=words), cut=prompted.cut
    )
