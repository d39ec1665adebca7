"""The one exception a user of jz3 has to know besides ValueError and TypeError."""


class Jz3Error(RuntimeError):
    """A run can't go on for a reason its user can mend; the message names the value and the remedy."""
