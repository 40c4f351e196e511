"""A worker process that never outlives the one that started it, however that one went."""

import multiprocessing
import os
import threading


def end_with_parent() -> None:
    """End this process when its parent is gone; call it once, first thing."""
    threading.Thread(target=_wait, daemon=True).start()


def _wait() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
