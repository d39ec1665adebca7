"""Small things that engines share: context length, stop texts, whole characters, package versions."""

import importlib.metadata
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNLIMITED = 1 << 30


def context_length(config: Any) -> int:
    """Return how many tokens the model of a transformers configuration can attend to."""
    text = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return UNLIMITED


def whole_characters(text: str) -> str:
    """Replace halves of characters (lone surrogates, which JSON can spell): no file could hold them.

    Args:
        text: from another machine.

    Returns:
        The text, its pairs of halves joined, with U+FFFD for every other half.
    """
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def cut_at_stop(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """Cut `text` before the first stop text in it.

    Returns:
        The text before it, and whether there was one.
    """
    places = [place for place in map(text.find, stop) if place >= 0]
    return (text[: min(places)], True) if places else (text, False)


def prompt_ids(tokenizer: "PreTrainedTokenizerBase", prompt: str) -> list[int]:
    """Tokenise a prompt as a text's beginning: start token if the tokenizer sets one, no end token; never empty."""
    ids: list[int] = list(tokenizer(prompt, verbose=False).input_ids)  # pyright: ignore[reportAssignmentType, reportArgumentType]
    end = tokenizer.eos_token_id
    if len(ids) > 1 and ids[-1] == end and not prompt.endswith(str(tokenizer.eos_token)):
        ids.pop()
    if not ids:
        start: Any = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else end
        if start is None:
            raise ValueError("an empty prompt can't be continued: the tokenizer has no start or end token")
        ids = [start]
    return ids


def versions(*packages: str) -> dict[str, str]:
    """Return the installed versions of packages; those that are absent are left out."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
