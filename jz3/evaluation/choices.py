"""Multiple choice: how choices are written into a problem and read from a solution."""

import re
from collections.abc import Callable, Sequence

HEADING = "Answer Choices:"
LINE = re.compile(r"^\(([A-Z])\) (.*)$", re.MULTILINE)
SAID = re.compile(
    r"(?:answer|option|choice)\s+is\s*:?\s*(?:option|choice)?\s*\**\(?([A-Z])(?![A-Za-z'])"
    r"|(?:[Oo]ption|[Cc]hoice)\s+\(?([A-Z])\)?\s+is\s+(?:the\s+)?(?:correct|right|answer)"
)
ALONE = re.compile(r"\W*([A-Z])\W*")
WRAPPING = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}")


def with_choices(question: str, choices: Sequence[str]) -> str:
    """Write the choices below a question, a line each, marked (A), (B) ..."""
    lines = [f"({chr(ord('A') + i)}) {' '.join(str(choice).split())}" for i, choice in enumerate(choices)]
    return "\n".join([question.strip(), HEADING, *lines])


def without_choices(problem: str) -> str:
    """Return the bare question of a problem that `with_choices` wrote; other problems as they are."""
    question, found, _ = problem.rpartition(f"\n{HEADING}\n")
    return question if found else problem


def choices_of(problem: str) -> dict[str, str]:
    """Return letter and text of the choices that `with_choices` wrote; empty for other problems."""
    _, found, choices = problem.rpartition(f"\n{HEADING}\n")
    return dict(LINE.findall(choices)) if found else {}


def chosen_letter(
    output: str,
    prediction: str,
    choices: dict[str, str],
    equal: Callable[[list[tuple[str, str]]], list[bool]],
) -> str:
    """Return the letter that a solution chooses, or "" if it chooses none or several.

    The letter in the extracted answer counts first, then the last "the answer is (X)" or "option (X) is
    correct", then a letter that is all there is, then a choice whose text the extracted answer equals.

    Args:
        output: the whole solution.
        prediction: the answer extracted from it.
        choices: letter to text.
        equal: compares (text, prediction) pairs, e.g. `Grader.equal_many`.
    """
    bare = WRAPPING.sub(r"\1", prediction).strip(" $.*")
    marked = re.match(r"\(?([A-Z])(?:$|\)|[.:]\s)", bare)
    if marked and marked[1] in choices:
        return marked[1]
    said = [a or b for a, b in SAID.findall(output) if (a or b) in choices]
    if said:
        return said[-1]
    alone = ALONE.fullmatch(output)
    if alone and alone[1] in choices:
        return alone[1]
    if not bare:
        return ""
    # Choices may differ in the unit alone, which equality ignores.
    letters = [letter for letter, choice in choices.items() if choice == bare] or list(choices)
    verdicts = equal([(choices[letter], prediction) for letter in letters])
    equals = [letter for letter, same in zip(letters, verdicts, strict=True) if same]
    return equals[0] if len(equals) == 1 else ""
