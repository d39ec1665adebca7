"""The phrases by which the text filters know a problem or solution; one pattern a line."""

import re


def _any(*patterns: str, flags: re.RegexFlag = re.IGNORECASE) -> re.Pattern[str]:
    return re.compile("|".join(f"(?:{p})" for p in patterns), flags)


def _words(text: str) -> str:
    return rf"\b(?:{'|'.join(text.split())})\b"


_PICTURE = r"(?:figure|diagram|graph|picture|image|illustration|drawing|chart|plot)"
_FAULT = r"(?:mistake|error|inconsistency|misunderstanding|confusion)"
_SCHOOL = _words("school AMC AIME grader graders contest contestants competition competitions undergraduates")
_VERBS = (
    "find calculate determine compute evaluate solve simplify express estimate factor expand give write state list "
    "count convert round differentiate integrate name identify choose sketch construct maximize maximise minimize "
    "minimise complete fill multiply divide add subtract reduce order arrange derive deduce perform apply verify "
    "formulate confirm prove show enter rewrite obtain"
)
_TASK_VERBS = _VERBS.title() + " Explain Describe Discuss Predict Interpret Use Using Establish Compare Plot"

ASKS = _any(r"\?", _words(_VERBS + " finding what how which when where who"))

MISSING_FIGURE = _any(
    rf"\b(?:shown|pictured|depicted|illustrated|drawn|given|seen)\s+(?:in|on|by)\s+the\s+(?:\w+\s+)?{_PICTURE}\b",
    rf"\b(?:{_PICTURE}|table)\s+(?:shown\s+|given\s+)?(?:below|above)\b",
    r"\b(?:in|from|see|refer to|using)\s+the\s+(?:figure|diagram|picture|image|illustration|drawing)\b",
    r"\b(?:figure|fig\.)\s+\d",
    r"\bas shown (?:below|above)\b",
    r"!\[[^\]]*\]\(",
    r"\\includegraphics",
)
DRAWN = ("```", "[asy]", "\\begin{tikz", "\\begin{tabular", "\\begin{array", "|--")
"""Signs that a problem brings its figure or table along."""

QUESTION = re.compile(r"[^.?!\n]*\?")
PARTS = _any(
    r"(?:^|\s)\(a\)\s[\s\S]{3,}?\s\(b\)\s",
    r"^\s*a[.)]\s[\s\S]+?^\s*b[.)]\s",
    r"\bpart\s+\(?(?:a|1|i)\b[\s\S]+?\bpart\s+\(?(?:b|2|ii)\b",
    flags=re.IGNORECASE | re.MULTILINE,
)
CHOICES = re.compile(r"\(?A[).][\s\S]{1,200}?\(?B[).][\s\S]{1,200}?\(?C[).]")
ITEM = re.compile(r"^\s*\d{1,2}[.)]\s+(\S[\s\S]*?)(?=^\s*\d{1,2}[.)]\s|\Z)", re.MULTILINE)
TASK = re.compile(rf"\?|(?:^|[:.,])[^\w:.,]*{_words(_TASK_VERBS)}")
LIST_OF_TASKS = re.compile(
    rf"{_words('find determine calculate compute answer evaluate solve task tasks question questions')}"
    r"[^.\n]{0,60}:?\W*^\s*1[.)]\s",
    re.IGNORECASE | re.MULTILINE,
)

PROOF = _any(
    r"\b(?:prove|disprove)\b",
    r"\b(?:show|demonstrate|verify|deduce)\s+that\b",
    r"\bgive a proof\b",
    r"\bjustify your\b",
)

OPEN_QUESTION = _any(_words("what how which who whom whose when where why find calculate compute"))
YES_NO_QUESTION = _any(
    r"(?:^|,)\s*(?:is|are|was|were|does|do|did|will|would|has|have|must|should)\s",
    r"(?:^|,)\s*(?:can|could)(?!\s+you)\s",
    r"\bwhether\b",
)
YES_NO_ANSWER = _any(r"(?:\\text\s*\{)?\s*(?:yes|no|true|false)\b\W*(?:[,;][^0-9]{0,40})?")

CORRECTION = _any(
    r"\bwait\b[,.!:]",
    r"\boops\b",
    r"\b(?:i|we) made an? (?:mistake|error)",
    rf"\b(?:an?|my|the|some)\s+(?:(?:initial|earlier|previous|calculation)\s+)?{_FAULT}\s+"
    r"(?:in (?:the|my|our)|here|above|was made|must|indicates)",
    rf"\bthere (?:seems|appears|must) (?:to )?(?:be|have been) (?:an?|some) {_FAULT}",
    r"\bapologi[sz]e|\bmy apologies",
    r"\bcorrection\s*:",
    r"\bre-?(?:evaluat|examin|consider)(?:e|ing|ion)? (?:the|our|my|this|initial)\b",
    r"\blet(?:'s|\u2019s| us| me) (?:re-?(?:evaluate|examine|consider|calculate|do)|correct|try again|start over)",
    r"\b(?:this|which) (?:seems|appears) (?:to be )?(?:not possible|impossible|incorrect|wrong|inconsistent)",
    r"\bthe problem(?: statement)? (?:is|seems|appears)(?: to be)? "
    r"(?:ill-posed|flawed|incorrect|inconsistent|incomplete)",
)

META = _any(
    r"\bas an ai\b",
    r"\blanguage model\b",
    r"\b(?:this|the) (?:problem|question) (?:is|was) "
    r"(?:suitable|designed|inspired|intended|meant|appropriate|created|aimed)\b",
    r"\b(?:suitable|appropriate|accessible|challeng\w+|typical|designed|tailored|aimed|ideal|familiar)\b"
    rf"[^.\n]{{0,40}}{_SCHOOL}",
    r"\b(?:grade|middle|high|elementary)[- ]school level\b|\bcollege[- ]level\b",
    r"\b(?:AMC|AIME)[ -]?(?:8|10|12)?[- ](?:level|style|contestants?)\b",
    r"\b(?:provided|given|above) (?:math(?:ematical)? )?(?:content|text|extract|passage)\b",
    r"\[(?:problem|solution|level)\]",
    r"##\s*(?:new )?(?:problem|instruction|math content)",
)
