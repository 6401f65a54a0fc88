"""Progress as a callback or as tqdm's bar."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Union

Progress = Union[bool, Callable[[int, int], Any], None]


@contextmanager
def reporting(progress: Progress, what: str) -> Iterator[Callable[[int, int], Any] | None]:
    """Gives what the native half calls with the bytes that are done and those of all."""
    if progress is None or progress is False:
        yield None
    elif progress is not True:
        yield progress
    else:
        with _tqdm()(desc=what, unit="B", unit_scale=True, unit_divisor=1024) as bar:

            def report(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            yield report


def _tqdm() -> Any:
    # That of transformers can be switched off with its other bars.
    if "transformers" in sys.modules:
        from transformers.utils import logging

        return logging.tqdm
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError("progress=True needs tqdm: pip install tqdm, or give a function") from error
    return tqdm
