"""Training without the bars and notices of the libraries beneath."""

import contextlib
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide the progress bars of datasets and transformers, and a notice between the libraries.

    Our own bar shows the progress in tokens. The notice is that PEFT and TRL still use an old name
    of transformers, which no user can mend.
    """
    import datasets
    from transformers.utils import logging

    data_bars, model_bars = not datasets.are_progress_bars_disabled(), logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
            yield
    finally:
        if data_bars:
            datasets.enable_progress_bars()
        if model_bars:
            logging.enable_progress_bar()
