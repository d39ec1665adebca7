"""Filters that only read: fields, language, length, solvability, repetition. Each returns a reason or ""."""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable

from jz3.filtering.config import FilteringConfig
from jz3.grading.answer import extract_boxed, fenced_blocks
from jz3.records import LEVELS, Problem

_ASKS = re.compile(
    r"\?|\b(?:find|calculate|determine|compute|evaluate|solve|simplify|express|estimate|factor|expand|give|write|"
    r"state|list|count|convert|round|differentiate|integrate|name|identify|choose|sketch|construct|maximi[sz]e|"
    r"minimi[sz]e|complete|fill|finding|derive|deduce|perform|apply|verify|formulate|confirm|prove|show|what|how many|how much|which|when|where|who)\b",
    re.IGNORECASE,
)
_FIGURE = re.compile(
    r"\b(?:shown|pictured|depicted|illustrated|drawn|given|seen)\s+(?:in|on|by)\s+the\s+(?:\w+\s+)?"
    r"(?:figure|diagram|graph|picture|image|illustration|drawing|chart|plot)\b"
    r"|\b(?:figure|diagram|graph|picture|image|illustration|drawing|chart|plot|table)\s+(?:shown\s+|given\s+)?(?:below|above)\b"
    r"|\b(?:in|from|see|refer to|using)\s+the\s+(?:figure|diagram|picture|image|illustration|drawing)\b"
    r"|\b(?:figure|fig\.)\s+\d|\bas shown (?:below|above)\b|!\[[^\]]*\]\(|\\includegraphics",
    re.IGNORECASE,
)
_PARTS = re.compile(
    r"(?:^|\s)\(a\)\s[\s\S]{3,}?\s\(b\)\s|^\s*a[.)]\s[\s\S]+?^\s*b[.)]\s|\bpart\s+\(?(?:a|1|i)\b[\s\S]+?\bpart\s+\(?(?:b|2|ii)\b",
    re.IGNORECASE | re.MULTILINE,
)
_CHOICES = re.compile(r"\(?A[).][\s\S]{1,200}?\(?B[).][\s\S]{1,200}?\(?C[).]")
_ITEM = re.compile(r"^\s*\d{1,2}[.)]\s+[*_]*(\S.*)$", re.MULTILINE)
_FOLLOWING = re.compile(r"\b(?:find|determine|calculate|compute|answer|evaluate|solve)\b[^.\n]*\bfollowing\b[^.\n]*:\s*$", re.I | re.M)
_QUESTION = re.compile(r"[^.?!\n]*\?")
_PROOF = re.compile(
    r"\b(?:prove|disprove)\b|\b(?:show|demonstrate|verify|deduce)\s+that\b|\bgive a proof\b|\bjustify your\b", re.IGNORECASE
)
_OPEN_QUESTION = re.compile(r"\b(?:what|how|which|who|whom|whose|when|where|why|find|calculate|compute)\b", re.IGNORECASE)
_YES_NO_QUESTION = re.compile(
    r"(?:^|,)\s*(?:is|are|was|were|does|do|did|(?:can|could)(?!\s+you)|will|would|has|have|must|should)\s"
    r"|\bwhether\b", re.IGNORECASE
)
_YES_NO_ANSWER = re.compile(r"(?:\\text\s*\{)?\s*(?:yes|no|true|false)\b[^0-9]{0,40}", re.IGNORECASE)
_CORRECTION = re.compile(
    r"\bwait\b[,.!:]|\boops\b|\b(?:an?|my|the|some)\s+(?:initial\s+|earlier\s+|previous\s+|calculation\s+)?(?:mistake|error)\s+"
    r"(?:in (?:the|my|our)|here|above|was made|must|indicates)|\b(?:i|we) made an? (?:mistake|error)|\bapologi[sz]e|\bmy apologies"
    r"|\bcorrection\s*:|\bre-?(?:evaluate|evaluation|examine|examining|consider) (?:the|our|my|this|initial)\b|\blet(?:'s| us| me) "
    r"(?:re-?(?:evaluate|examine|consider|calculate|do)|correct|try again|start over)|\b(?:this|which) (?:seems|appears) (?:to be )?"
    r"(?:not possible|impossible|incorrect|wrong|inconsistent)|\bthere (?:seems|appears|must) (?:to )?(?:be|have been) (?:a|an|some) "
    r"(?:mistake|error|inconsistency|misunderstanding|confusion)|\bthe problem(?: statement)? (?:is|seems|appears)(?: to be)? "
    r"(?:ill-posed|flawed|incorrect|inconsistent|incomplete)",
    re.IGNORECASE,
)
_META = re.compile(
    r"\bas an ai\b|\blanguage model\b|\b(?:this|the) (?:problem|question) (?:is|was) (?:suitable|designed|inspired|intended|meant|"
    r"appropriate|created|aimed)\b|\b(?:suitable|appropriate|accessible|challeng\w+|typical|designed|tailored|aimed|ideal|familiar)\b"
    r"[^.\n]{0,40}\b(?:school|AMC|AIME|graders?|contest\w*|competitions?|undergraduates?)\b|\b(?:grade|middle|high|elementary)[- ]"
    r"school level\b|\bcollege[- ]level\b|\b(?:AMC|AIME)[ -]?(?:8|10|12)?[- ](?:level|style|contestants?)\b|\b(?:provided|given|above) "
    r"(?:math )?(?:content|text|extract|passage)\b|\[(?:problem|solution|level)\]|##\s*(?:new )?(?:problem|instruction|math content)",
    re.IGNORECASE,
)


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
    foreign = sum(ord(c) > 127 and not unicodedata.name(c, "").startswith(("LATIN", "GREEK", "MATHEMATICAL", "DOUBLE-STRUCK"))
                  for c in letters)  # fmt: skip
    return "language" if foreign > config.max_foreign_letters * len(letters) else ""


def boxed(row: Problem, config: FilteringConfig) -> str:
    r"""Refuse solutions without \boxed{}, or whose recorded answer is another one."""
    found = extract_boxed(row.solution)
    if not found:
        return "no_boxed_answer"
    return "" if row.answer.strip() == found else "answer_differs_from_box"


def has_question(row: Problem, config: FilteringConfig) -> str:
    """Refuse problems that ask for nothing."""
    return "" if _ASKS.search(row.problem) else "no_question"


def figure(row: Problem, config: FilteringConfig) -> str:
    """Refuse problems that need a figure or table they don't hold."""
    drawn = any(mark in row.problem for mark in ("```", "[asy]", "\\begin{tikz", "\\begin{tabular", "\\begin{array", "|--"))
    return "missing_figure" if _FIGURE.search(row.problem) and not drawn else ""


def parts(row: Problem, config: FilteringConfig) -> str:
    """Refuse problems with several questions; multiple choice is one question."""
    if not config.reject_multi_part:
        return ""
    text = row.problem
    questions = {" ".join(q.lower().split()) for q in _QUESTION.findall(text)}
    items = _ITEM.findall(text)
    asking = len(items) if _FOLLOWING.search(text) else sum(bool("?" in i or _ASKS.match(i)) for i in items)
    several = len(questions) > 1 or (asking > 1 or _PARTS.search(text)) and not _CHOICES.search(text)
    return "multi_part" if several else ""


def proof(row: Problem, config: FilteringConfig) -> str:
    """Refuse problems that ask for a proof."""
    return "proof" if config.reject_proofs and _PROOF.search(row.problem) else ""


def yes_no(row: Problem, config: FilteringConfig) -> str:
    """Refuse problems answered by yes or no."""
    if not config.reject_yes_no:
        return ""
    asked = re.split(r"(?<=[.!?])\s+", row.problem.strip())[-1]
    closed = _YES_NO_QUESTION.search(asked) and ("?" in asked or "whether" in asked) and not _OPEN_QUESTION.search(asked)
    return "yes_no" if closed or _YES_NO_ANSWER.fullmatch(row.answer) else ""


def self_correction(row: Problem, config: FilteringConfig) -> str:
    """Refuse solutions that correct or doubt themselves."""
    return "self_correction" if config.reject_self_corrections and _CORRECTION.search(prose(row.solution)) else ""


def meta_talk(row: Problem, config: FilteringConfig) -> str:
    """Refuse texts about the task instead of mathematics."""
    text = f"{row.problem}\n{prose(row.solution)}"
    return "meta_talk" if config.reject_meta_talk and _META.search(text) else ""


def repetition(row: Problem, config: FilteringConfig) -> str:
    """Refuse texts that fell into a loop."""
    for text in (row.problem, prose(row.solution)):
        if repeated_share(text) > config.max_repeated_share or re.search(r"(\S{1,12}?)\1{30}", text):
            return "repetition"
    return ""


def repeated_share(text: str, size: int = 8, times: int = 4) -> float:
    """Return the share of a text's words that lie in `size`-word phrases occurring at least `times` times."""
    words = text.lower().split()
    phrases = [tuple(words[i : i + size]) for i in range(len(words) - size + 1)]
    counts = Counter(phrases)
    covered = bytearray(len(words))
    for start, phrase in enumerate(phrases):
        if counts[phrase] >= times:
            covered[start : start + size] = b"\1" * size
    return sum(covered) / len(words) if words else 0.0


def prose(solution: str) -> str:
    """Return a solution without its code and output blocks."""
    return re.sub(r"```[\s\S]*?(?:```|$)", "\n", solution)


TEXT_FILTERS: tuple[Callable[[Problem, FilteringConfig], str], ...] = (
    fields_present,
    length,
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
