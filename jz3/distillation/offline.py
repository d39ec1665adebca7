"""The offline teacher: worked problems on the topic of the text, in place of a language model."""

import re
from collections import Counter
from collections.abc import Callable, Collection, Sequence

from jz3.distillation.parser import format_reply
from jz3.distillation.teachers import Reply, Request, Spending
from jz3.errors import Jz3Error
from jz3.seeding import rng, seed_for

STAND_IN = "offline teacher, not GPT-4"
GENERAL = "general"
"""The topic of a text without any keyword."""

FAMILIES = {
    "word problems": ("gsm_symbolic", "gsm_symbolic", "gsm_symbolic", "leg_counting", "time_intervals"),
    "arithmetic": ("chain_sum", "products", "fraction_simplification"),
    "number theory": ("gcd", "lcm", "prime_factorization", "count_primes", "base_conversion"),
    "algebra": ("simple_equations", "polynomial_values", "complex_arithmetic", "number_sequence"),
    "geometry": ("simple_geometry",),
    "calculus": ("polynomial_integrals",),
    "probability": ("coin_flip",),
}
"""Topic to the families drawn from, in equal shares; a family named twice has two."""

_KEYWORDS = {
    "word problems": {
        2.0: r"how many|how much|in total|altogether|each day|per (?:day|week|hour)|times as (?:many|much)|"
        r"twice as|half as|many minutes|legs",
        1.0: r"he|she|his|her|they|has|buys?|bought|sells?|sold|costs?|gives?|picks?|money|dollars?|left|"
        r"students?|friends?|school|boxes|eggs|minutes|hours?|days?|weeks?|years? old|[$€£]\d",
    },
    "arithmetic": {
        2.0: r"calculate|add(?:ition|ing)?|subtract(?:ion|ing)?|multipl(?:y|ication|ying)|divi(?:de|sion)|"
        r"decimals?|percent(?:age)?|product of|(?:calculate|what is) \d+ [-+]|fractions?|lowest terms|numerator|"
        r"denominator|rounding",
        1.0: r"sum|product|difference|quotient|digits?|from left to right|arithmetic|float(?:ing)?|exact",
    },
    "number theory": {
        3.0: r"gcd|lcm|divides|in base|decimal number|greatest common divisor|least common multiple|"
        r"prime(?:s| numbers?| factors?)?|"
        r"divisib\w+|divisors?|modulo|modular|congruen\w+|coprime|totient|factori[sz]ation|base-\d+|base \d+",
        1.0: r"integers?|remainder|binary|hexadecimal|residues?|euclid\w*|diophantine|factors?",
    },
    "algebra": {
        3.0: r"polynomials?|equations?|solve|satisf(?:y|ies)|p\(x\)|unknown|complex numbers?|imaginary|real part|"
        r"matri(?:x|ces)|eigenvalues?|roots?|sequences?|next term|linear",
        1.0: r"coefficients?|constants?|first factor|degree|variables?|expressions?|symbols?|simplif\w+|expand|terms?|"
        r"vectors?|rings?|fields?|groups?|series|algebra\w*",
    },
    "geometry": {
        3.0: r"angles?|triangles?|polygons?|circles?|geometr\w+|perimeter|radius|quadrilateral|pentagon|hexagon|"
        r"ellipse|rectangles?",
        1.0: r"points?|lines?|planes?|areas?|distance|coordinates?|vertices|rotat\w+|sides?|degrees",
    },
    "calculus": {
        3.0: r"integra(?:l|ls|te|tion|nd)|derivatives?|differentia\w+|antiderivative|calculus|limits?|ode|ordinary",
        1.0: r"functions?|continuous|taylor|gradient|quadrature|sin|cos|exp|log|gamma|bessel|convergen\w+",
    },
    "probability": {
        3.0: r"probabilit\w+|random variables?|distributions?|coins?|dice|binomial|poisson|bernoulli|statistic\w*|"
        r"variance|expectation",
        1.0: r"random|samples?|mean|density|pdf|cdf|events?|likely|outcomes?|flips?|tests?",
    },
}
"""Topic to weight to words. A text's score for a topic adds each word's weight the first three times."""

_PATTERNS = {
    topic: [
        (weight, re.compile(rf"(?<![\w$])(?:{words})(?!\w)", re.IGNORECASE)) for weight, words in rows.items()
    ]
    for topic, rows in _KEYWORDS.items()
}
_MOST = 3
_LEAST = 2.0
"""A lower best score says nothing about the topic."""


def topic_of(text: str) -> str:
    """Return the topic of a text: the one whose keywords score highest.

    Returns:
        One of the topics of `FAMILIES`, or `general` if there are hardly any keywords.
    """
    scores: dict[str, float] = {}
    for topic, patterns in _PATTERNS.items():
        scores[topic] = 0.0
        for weight, pattern in patterns:
            found = Counter(word.lower() for word in pattern.findall(text))
            scores[topic] += weight * sum(min(n, _MOST) for n in found.values())
    best = max(scores, key=lambda topic: scores[topic])
    return best if scores[best] >= _LEAST else GENERAL


class OfflineTeacher:
    """Writes a worked problem of a family that belongs to the text's topic.

    It knows no levels: the prompt's level is kept in the row, but doesn't change the problem. A text
    of no known topic gets a problem of any family. Every draw depends on the run's seed and the
    prompt's id alone.

    Args:
        seed: the run's seed.
        avoid: families it must not write, such as those whose problems are texts of the corpus.

    Raises:
        Jz3Error: no family is left.
    """

    name = "offline"
    stand_in = STAND_IN

    def __init__(self, seed: int, avoid: Collection[str] = ()) -> None:
        self._seed = seed
        self._choices = {name: [f for f in members if f not in avoid] for name, members in FAMILIES.items()}
        self._any = [f for members in self._choices.values() for f in dict.fromkeys(members)]
        if not self._any:
            raise Jz3Error(
                "the offline teacher has no family left that the corpus doesn't use; drop some there"
            )

    def answer(self, requests: Sequence[Request], advance: Callable[[int], None]) -> list[Reply]:
        """Write one problem a request, with a CoT or a Python solution as the prompt asks."""
        replies = []
        for request in requests:
            replies.append(self._write(request))
            advance(1)
        return replies

    def _write(self, request: Request) -> Reply:
        from jz3.worked import worked_problems

        topic = topic_of(request.text)
        choice = self._choices.get(topic) or self._any
        family = choice[int(rng(self._seed, "offline teacher", request.prompt.id).integers(len(choice)))]
        drawn = worked_problems(family, seed_for(self._seed, "offline teacher", request.prompt.id), 1)[0]
        solution = drawn.tool if request.prompt.kind == "tool" else drawn.cot
        return Reply(
            text=format_reply(drawn.question, solution),
            meta={"stand_in": STAND_IN, "topic": topic, "family": family},
        )

    def spending(self) -> Spending:
        """Nothing: it is a program."""
        return Spending()

    def close(self) -> None:
        """There is nothing to close."""
