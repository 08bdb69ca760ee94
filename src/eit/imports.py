"""Import torch and timm faster."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quick_imports(freeze: bool = False) -> Iterator[None]:
    """Import without the cyclic garbage collector.

    It would walk through the functions and classes of torch and timm again and again and find nothing to free. With
    `freeze` it ignores them afterwards too; otherwise it takes another second at the end of the process.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if freeze and not gc.get_freeze_count():  # once; later there are objects that come and go
            gc.freeze()
        if was_enabled:
            gc.enable()
