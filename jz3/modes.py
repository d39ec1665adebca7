"""What torch computes in, whatever the code around jz3 has switched on."""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def plain_modes() -> Iterator[None]:
    """Leave inference mode, `no_grad`, autocast and another default device; as a context or a decorator.

    What runs a pass may be called from within any of them. Native code is given addresses: numbers in another format
    than they were made in, as autocast has it, it would read wrongly.
    """
    import torch

    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield
