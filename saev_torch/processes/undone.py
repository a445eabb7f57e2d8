"""What an interrupt kept from being done: Python calls a finalizer once, and one that is interrupted there never again.

Then a descriptor stays open, or an engine, with all that it holds, stays in the list of finalizers for good.
"""

import weakref


def make_up() -> None:
    """Call the finalizers of objects that are gone, which should have been called when they went."""
    # A private table, but all public ways to it begin at a finalizer that somebody has kept. Each is called once.
    for finalizer, info in tuple(getattr(weakref.finalize, "_registry", {}).items()):
        if info.weakref() is None:
            finalizer()
