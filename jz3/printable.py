"""Foreign text on a terminal."""

import re

_CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    """Replace all control characters but ends of lines and tabs: a terminal would obey them.

    Args:
        text: of a corpus, a model, or another machine.

    Returns:
        The text with a replacement character for each.
    """
    return _CONTROLS.sub("\ufffd", text)
