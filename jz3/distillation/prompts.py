"""The problem-writing prompts, one file per level and one for Python solutions."""

import functools
from pathlib import Path

from jz3.records import LEVELS

PLACEHOLDER = "{text}"
NAMES = (*LEVELS, "tool")
_FOLDER = Path(__file__).parent.parent / "prompts"


@functools.cache
def template(name: str) -> str:
    """Return the prompt of a level, or of `tool`, with its placeholder.

    Raises:
        ValueError: there is no such prompt, or its file has not exactly one placeholder.
    """
    if name not in NAMES:
        raise ValueError(f"no prompt {name!r}; there are {', '.join(NAMES)}")
    text = (_FOLDER / f"{name}.md").read_text(encoding="utf-8").strip() + "\n\n"
    if text.count(PLACEHOLDER) != 1:
        raise ValueError(
            f"prompt {name!r} must hold {PLACEHOLDER} once, it holds it {text.count(PLACEHOLDER)} times"
        )
    return text


def fill(name: str, text: str) -> str:
    """Return the prompt `name` for a text; whatever the text holds is taken literally."""
    before, _, after = template(name).partition(PLACEHOLDER)
    return before + text.strip() + after
