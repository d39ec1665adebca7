"""The names that pipelines import; heavy packages are imported when they are used."""

__version__ = "0.1.0"
