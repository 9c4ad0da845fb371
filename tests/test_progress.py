"""Progress as a person and as a log file see it."""

import os
import pty
import subprocess
import sys
import threading

import pytest

from hydra_pipe import progress as module
from hydra_pipe.progress import ConsoleProgress, Progress

PROGRAM = """
import time
from hydra_pipe.progress import ConsoleProgress
with ConsoleProgress().task("reduce", 3000, "rows") as task:
    for _ in range(3):
        time.sleep(0.15)
        task.advance(1000)
"""


def test_without_a_terminal_there_is_a_plain_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(module.time, "monotonic", lambda: float(next(clock)))
    with ConsoleProgress().task("record", 400, "rows") as task:
        for _ in range(4):
            task.advance(100)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "record: 200 rows of 400 rows, 10 rows/s, 20.0 s left",
        "record: 400 rows of 400 rows, 10 rows/s, 0.0 s left",
        "record: 400 rows in 50.0 s, 8 rows/s",
    ]


def test_bytes_are_written_with_units(capsys: pytest.CaptureFixture[str]) -> None:
    with ConsoleProgress().task("verify", 2**21, "bytes") as task:
        task.advance(2**21)
    assert capsys.readouterr().err.startswith("verify: 2 MiB in ")


def test_on_a_terminal_there_is_a_bar_with_rate_and_time_left() -> None:
    master, slave = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "120"}
    process = subprocess.Popen([sys.executable, "-c", PROGRAM], stderr=slave, env=environment)
    os.close(slave)
    shown = b""
    try:
        while piece := os.read(master, 4096):
            shown += piece
    except OSError:
        pass  # how Linux says that the other end has closed
    assert process.wait() == 0
    text = shown.decode()
    for part in ("reduce", "3,000 rows of 3,000 rows", "rows/s", "left", "━"):
        assert part in text


def test_threads_may_count_together(capsys: pytest.CaptureFixture[str]) -> None:
    with ConsoleProgress().task("reduce", 4000, "rows") as task:
        threads = [
            threading.Thread(target=lambda: [task.advance(1) for _ in range(1000)])
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert "reduce: 4,000 rows in" in capsys.readouterr().err


def test_a_library_call_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress()
    with progress.task("record", 1, "rows") as task:
        task.advance(1)
    progress.say("done")
    assert capsys.readouterr() == ("", "")
