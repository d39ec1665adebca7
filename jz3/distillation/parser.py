"""The reply of a teacher or synthesiser: how it is written, and how it is read back."""

import re
from dataclasses import dataclass

REASONS = {
    "empty": "the reply holds no text",
    "truncated": "the reply was cut off: its length limit was reached, or a code block or \\boxed{ stays open",
    "no_problem": "there is no [Problem], or nothing in it",
    "no_solution": "there is no [Solution], or nothing in it",
    "several_problems": "there is more than one [Problem] or [Solution]",
    "answer_in_problem": "the problem itself holds a \\boxed{}",
    "no_code": "a tool reply without a python block",
    "no_output": "a tool reply whose last python block is not followed by its output block",
    "no_boxed_answer": "the solution holds no \\boxed{} with something in it",
}
"""Why a reply is refused."""

_STRICT = re.compile(
    r"(?:^[ \t>#]*)?(?P<bold>\*\*|__)?\[(?P<close>/?)(?P<name>problem(?: description)?|solution)[ \t]*:?\]"
    r"(?(bold)[ \t]*:?[ \t]*(?:\*\*|__)?)[ \t]*:?",
    re.IGNORECASE | re.MULTILINE,
)
_LOOSE = re.compile(
    r"^(?:[ \t>]*(?:\#{1,6}[ \t]*(?:\*\*|__)?|\*\*|__)(?:new )?(?P<head>problem|question|solution)"
    r"(?: statement)?[ \t]*(?:\*\*|__)?[ \t]*:?[ \t]*(?:\*\*|__)?[ \t]*(?=$|(?<=[:*_])\S?)"
    r"|[ \t]*(?P<plain>problem|question|solution)[ \t]*:[ \t]*)",
    re.IGNORECASE | re.MULTILINE,
)
_END = re.compile(r"\[/(?:problem(?: description)?|solution)\]", re.IGNORECASE)
_FENCE = re.compile(r"^[ \t]*```[ \t]*(?P<language>[\w+-]*)[ \t]*$", re.MULTILINE)
_WRAPPED = re.compile(
    r"\s*```[ \t]*(?:markdown|md|text|latex|tex|plaintext)?[ \t]*\r?\n(.*)\n```\s*", re.DOTALL
)
"""A reply that is one block as a whole."""
_RULE = re.compile(r"\n[ \t]*(?:-{3,}|\*{3,}|_{3,})\s*\Z")
"""A line across the page behind a part."""
_PYTHON = ("python", "py", "python3")
_OUTPUT = ("output", "", "text", "txt", "plaintext", "console", "stdout")


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedReply:
    """A reply taken apart."""

    problem: str
    solution: str
    answer: str
    """The content of the solution's last \\boxed{}."""


class ReplyError(ValueError):
    """A reply that can't be used.

    Attributes:
        reason: one of `REASONS`.
        detail: what was found.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail or REASONS[reason]}")
        self.reason = reason
        self.detail = detail or REASONS[reason]


def format_reply(problem: str, solution: str) -> str:
    """Write a reply; `parse_reply` reads it back as it was, unless a text holds such a marker itself."""
    return f"[Problem]: {problem.strip()}\n\n[Solution]: {solution.strip()}"


def parse_reply(text: str, kind: str, finish: str = "stop") -> ParsedReply:
    """Take a reply apart.

    Markdown around the markers, a block around all, closing tags and prose before the first marker are passed over; if
    no bracketed marker is there, headings such as `**Problem:**` are taken. Code fences of a tool
    reply become ```python and ```output.

    Args:
        text: the reply.
        kind: `cot` or `tool`.
        finish: `stop`, or `length` if the reply's length limit was reached.

    Returns:
        Problem, solution and answer.

    Raises:
        ReplyError: the reply can't be used; its reason is one of `REASONS`.
    """
    from jz3.grading.answer import extract_boxed

    if not text.strip():
        raise ReplyError("empty")
    if finish == "length":
        raise ReplyError("truncated", "the reply reached its length limit")
    wrapped = _WRAPPED.fullmatch(text)
    problem, solution = _split(wrapped[1] if wrapped else text)
    if "\\boxed" in problem:
        raise ReplyError("answer_in_problem")
    if kind == "tool":
        solution = _tool_blocks(solution)
    elif len(_FENCE.findall(solution)) % 2:
        raise ReplyError("truncated", "a code block stays open")
    answer = extract_boxed(solution).strip()
    if not answer:
        if re.search(r"\\boxed\{[^}]*\Z", solution):
            raise ReplyError("truncated", "a \\boxed{ stays open")
        raise ReplyError("no_boxed_answer")
    return ParsedReply(problem=problem, solution=solution, answer=answer)


def _split(text: str) -> tuple[str, str]:
    """Find problem and solution."""
    marks = [(m, m["name"].split()[0].lower()) for m in _STRICT.finditer(text) if not m["close"]]
    if not marks:
        marks = [(m, (m["head"] or m["plain"]).lower()) for m in _LOOSE.finditer(text)]
        marks = [(m, "problem" if name == "question" else name) for m, name in marks]
    problems = [m for m, name in marks if name == "problem"]
    solutions = [m for m, name in marks if name == "solution"]
    if len(problems) > 1 or len(solutions) > 1:
        raise ReplyError("several_problems", f"{len(problems)} problems and {len(solutions)} solutions")
    if not problems or (solutions and solutions[0].start() < problems[0].start()):
        raise ReplyError("no_problem")
    if not solutions:
        raise ReplyError("no_solution")
    problem = _content(text[problems[0].end() : solutions[0].start()])
    solution = _content(text[solutions[0].end() :])
    if not problem:
        raise ReplyError("no_problem", "nothing between [Problem] and [Solution]")
    if not solution:
        raise ReplyError("no_solution", "nothing after [Solution]")
    return problem, solution


def _content(text: str) -> str:
    """Cut at a closing tag, take a line across the page off the end, and strip."""
    return _RULE.sub("", _END.split(text, maxsplit=1)[0]).strip()


def _tool_blocks(solution: str) -> str:
    """Check that code and output alternate, and name their fences python and output."""
    fences = list(_FENCE.finditer(solution))
    if not any(f["language"].lower() in _PYTHON for f in fences[::2]):
        raise ReplyError("no_code")
    if len(fences) % 2:
        raise ReplyError("truncated", "a code block stays open")
    kinds: list[str] = []
    for opening in fences[::2]:
        language = opening["language"].lower()
        after_code = bool(kinds) and kinds[-1] == "python"
        kinds.append(
            "python" if language in _PYTHON else "output" if language in _OUTPUT and after_code else language
        )
    if kinds[len(kinds) - 1 - kinds[::-1].index("python") :][1:2] != ["output"]:
        raise ReplyError("no_output")
    pieces, end = [], 0
    for opening, name in zip(fences[::2], kinds, strict=True):
        pieces.append(solution[end : opening.start()] + f"```{name}")
        end = opening.end()
    return "".join(pieces) + solution[end:]
