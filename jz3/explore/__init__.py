"""`jz3 explore`: a local page on which a problem finds its texts, and scores and sources can be looked at."""

from jz3.explore.server import serve

__all__ = ["serve"]
