"""Filters that only read: fields, language, length, solvability, repetition. Each returns a reason or ""."""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable

from jz3.filtering import phrases
from jz3.filtering.config import FilteringConfig
from jz3.grading.answer import extract_boxed, fenced_blocks
from jz3.records import LEVELS, Problem


def fields_present(row: Problem, config: FilteringConfig) -> str:
    """Refuse rows whose fields are empty, unknown or not of their kind's form."""
    if not row.problem.strip():
        return "empty_problem"
    if not row.solution.strip():
        return "empty_solution"
    if row.kind not in ("cot", "tool"):
        return "unknown_kind"
    if row.level not in (*LEVELS, "tool"):
        return "unknown_level"
    if row.kind == "tool":
        kinds = [kind for kind, _ in fenced_blocks(row.solution)]
        if "python" not in kinds:
            return "no_code"
        if "output" not in kinds:
            return "no_output"
        if kinds != ["python", "output"] * (len(kinds) // 2):
            return "unpaired_blocks"
    return ""


def truncated(row: Problem, config: FilteringConfig) -> str:
    """Refuse rows whose writer was cut off by its token limit."""
    return "truncated" if row.meta.get("finish") == "length" else ""


def length(row: Problem, config: FilteringConfig) -> str:
    """Refuse texts too short to say something or too long to learn from."""
    for name, text, least, most in (
        ("problem", row.problem, config.min_problem_chars, config.max_problem_chars),
        ("solution", row.solution, config.min_solution_chars, config.max_solution_chars),
    ):
        if len(text.strip()) < least:
            return f"short_{name}"
        if len(text) > most:
            return f"long_{name}"
    return ""


def language(row: Problem, config: FilteringConfig) -> str:
    """Refuse texts written in another script, or damaged by a wrong decoding."""
    text = row.problem + row.solution
    if "\0" in text or text.count("\ufffd") > 2:
        return "damaged_text"
    letters = [c for c in text if c.isalpha()]
    known = ("LATIN", "GREEK", "MATHEMATICAL", "DOUBLE-STRUCK")
    foreign = sum(ord(c) > 127 and not unicodedata.name(c, "").startswith(known) for c in letters)
    return "language" if foreign > config.max_foreign_letters * len(letters) else ""


def boxed(row: Problem, config: FilteringConfig) -> str:
    r"""Refuse solutions without \boxed{}, or whose recorded answer is another one."""
    found = extract_boxed(row.solution)
    if not found:
        return "no_boxed_answer"
    return "" if row.answer.strip() == found else "answer_differs_from_box"


def has_question(row: Problem, config: FilteringConfig) -> str:
    """Refuse problems that ask for nothing."""
    return "" if phrases.ASKS.search(row.problem) else "no_question"


def figure(row: Problem, config: FilteringConfig) -> str:
    """Refuse problems that need a figure or table they don't hold."""
    drawn = any(sign in row.problem for sign in phrases.DRAWN)
    return "missing_figure" if phrases.MISSING_FIGURE.search(row.problem) and not drawn else ""


def parts(row: Problem, config: FilteringConfig) -> str:
    """Refuse problems with several questions; multiple choice is one question."""
    if not config.reject_multi_part:
        return ""
    text = row.problem
    questions = {" ".join(q.lower().split()) for q in phrases.QUESTION.findall(text)}
    items = phrases.ITEM.findall(text)
    asking = (
        len(items) if phrases.LIST_OF_TASKS.search(text) else sum(bool(phrases.TASK.search(i)) for i in items)
    )
    several = (
        len(questions) > 1 or (asking > 1 or phrases.PARTS.search(text)) and not phrases.CHOICES.search(text)
    )
    return "multi_part" if several else ""


def proof(row: Problem, config: FilteringConfig) -> str:
    """Refuse problems that ask for a proof."""
    return "proof" if config.reject_proofs and phrases.PROOF.search(row.problem) else ""


def yes_no(row: Problem, config: FilteringConfig) -> str:
    """Refuse problems answered by yes or no."""
    if not config.reject_yes_no:
        return ""
    asked = re.split(r"(?<=[.!?])\s+", row.problem.strip())[-1]
    closed = (
        phrases.YES_NO_QUESTION.search(asked)
        and ("?" in asked or "whether" in asked)
        and not phrases.OPEN_QUESTION.search(asked)
    )
    return "yes_no" if closed or phrases.YES_NO_ANSWER.fullmatch(row.answer) else ""


def self_correction(row: Problem, config: FilteringConfig) -> str:
    """Refuse solutions that correct or doubt themselves."""
    found = config.reject_self_corrections and phrases.CORRECTION.search(prose(row.solution))
    return "self_correction" if found else ""


def meta_talk(row: Problem, config: FilteringConfig) -> str:
    """Refuse texts about the task instead of mathematics."""
    text = f"{row.problem}\n{prose(row.solution)}"
    return "meta_talk" if config.reject_meta_talk and phrases.META.search(text) else ""


def repetition(row: Problem, config: FilteringConfig) -> str:
    """Refuse texts that fell into a loop."""
    for text in (row.problem, prose(row.solution)):
        if repeated_share(text) > config.max_repeated_share or re.search(r"(\S{1,12}?)\1{30}", text):
            return "repetition"
    return ""


def repeated_share(text: str, size: int = 8, times: int = 4) -> float:
    """Return the share of a text's words that lie in `size`-word phrases occurring at least `times` times."""
    words = text.lower().split()
    runs = [tuple(words[i : i + size]) for i in range(len(words) - size + 1)]
    counts = Counter(runs)
    covered = bytearray(len(words))
    for start, run in enumerate(runs):
        if counts[run] >= times:
            covered[start : start + size] = b"\1" * size
    return sum(covered) / len(words) if words else 0.0


def prose(solution: str) -> str:
    """Return a solution without its code and output blocks."""
    return re.sub(r"```[\s\S]*?(?:```|$)", "\n", solution)


TEXT_FILTERS: tuple[Callable[[Problem, FilteringConfig], str], ...] = (
    fields_present,
    length,
    truncated,
    language,
    boxed,
    has_question,
    figure,
    parts,
    proof,
    yes_no,
    self_correction,
    meta_talk,
    repetition,
)
"""In the order in which they refuse."""
