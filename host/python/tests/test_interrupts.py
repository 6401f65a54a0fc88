"""Long calls: progress, Ctrl-C, other threads."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import tightfit


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def interrupted(call: Callable[..., object], after: float) -> float:
    """Runs a call that is interrupted, and gives the seconds until it had ended."""
    sent = []

    def send() -> None:
        sent.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    timer = threading.Timer(after, send)
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            call()
        return time.monotonic() - sent[0]
    finally:
        timer.cancel()
        timer.join()


def test_ctrl_c_ends_a_load_with_everything_given_back(large: Path) -> None:
    plan = tightfit.plan(large, "cpu")
    tightfit.load(plan)
    before = resident()
    for _ in range(5):
        taken = interrupted(lambda: tightfit.load(plan, threads=1), 0.01)
        # 0.2 s on a machine of its own; this may be shared.
        assert taken < 1, taken
    assert resident() - before < plan.bytes / 4


def test_ctrl_c_ends_saving(large: Path, tmp_path: Path) -> None:
    assert interrupted(lambda: tightfit.save(large, tmp_path / "saved", threads=1), 0.05) < 1
    assert list(tmp_path.iterdir()) == []


def test_progress_is_told_on_the_calling_thread(large: Path) -> None:
    seen = []

    def progress(done: int, total: int) -> None:
        assert threading.current_thread() is threading.main_thread()
        seen.append((done, total))

    tightfit.load(large, "cpu", threads=1, progress=progress)
    assert seen == sorted(seen) and len(seen) > 1
    assert seen[-1][0] == seen[-1][1] > 900_000_000
    assert tightfit.load(large, "cpu", progress=True) is not None


def test_what_a_callback_raises_ends_the_load(large: Path) -> None:
    plan = tightfit.plan(large, "cpu")

    def progress(done: int, total: int) -> None:
        raise LookupError("enough")

    with pytest.raises(LookupError, match="enough"):
        tightfit.load(plan, progress=progress, threads=1)


def test_other_threads_go_on_meanwhile(large: Path) -> None:
    turns = 0
    done = threading.Event()

    def count() -> None:
        nonlocal turns
        while not done.is_set():
            turns += 1
            time.sleep(0.001)

    other = threading.Thread(target=count)
    other.start()
    start = time.monotonic()
    tightfit.load(large, "cpu", threads=1)
    taken = time.monotonic() - start
    done.set()
    other.join()
    # With the interpreter's lock held it would have had no turn.
    assert turns > 20 * taken, (turns, taken)


def test_loads_leave_memory_where_it_was(llama: Path) -> None:
    plan = tightfit.plan(llama, "cpu")
    for _ in range(10):
        tightfit.load(plan).unload()
    before = resident()
    for _ in range(200):
        model = tightfit.load(plan)
        array = model["model.layers.0.mlp.up_proj.weight"].codes.numpy()
        model.unload()
        del array
        assert model.memory[0].reserved == 0
    assert resident() - before < 20 * plan.bytes
