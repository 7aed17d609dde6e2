"""How the plug-in gets into vLLM: the versions it knows, methods replaced, errors that reach the
client."""

import contextlib
import functools
from collections.abc import Callable

from ..checks import shorten

# Of vLLM, tested. 0.33 was only read: the methods patched have the same signatures there, but it has
# no build for CPU to run them on.
VERSIONS = ("0.32",)
LONGEST = 390  # characters of an error


def patch(owner, name: str, around: Callable) -> None:
    """Replace a method, or a module's function, by around(method, ...), once."""
    method = getattr(owner, name)
    if "softar" in vars(method):
        return

    @functools.wraps(method)
    def patched(*args, **kwargs):
        return around(method, *args, **kwargs)

    patched.softar = True
    setattr(owner, name, patched)


@contextlib.contextmanager
def refusing():
    """A ValueError, for those who call vLLM from Python, is vLLM's error of the client too: the
    server answers 400, in one line that sends nobody's megabytes back."""
    from vllm.exceptions import VLLMValidationError

    class SoftError(VLLMValidationError, ValueError):
        pass

    try:
        yield
    except ValueError as error:
        raise SoftError(shorten(str(error), LONGEST)) from None
