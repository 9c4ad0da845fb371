"""Progress of work that takes more than a second: a bar on a terminal, plain lines elsewhere."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from hydra_pipe.units import format_bytes, format_seconds

_LINE_EVERY_SECONDS = 15.0


class Task:
    """One counted piece of work. `advance` may be called from several threads."""

    def advance(self, n: int) -> None:
        """Count `n` more units as done."""


class Progress:
    """Progress that shows nothing. A library call uses it unless the caller asks for more."""

    @contextmanager
    def task(self, description: str, total: int, unit: str) -> Iterator[Task]:
        """Count `total` units of `unit` ("rows", "steps", "bytes") while the block runs."""
        yield Task()

    def say(self, message: str) -> None:
        """Print one line for the person who waits."""


class ConsoleProgress(Progress):
    """Progress on standard error.

    On a terminal it is a bar with rate and time left, elsewhere a line every 15 seconds.
    """

    def __init__(self) -> None:
        self._terminal = sys.stderr is not None and sys.stderr.isatty()

    @contextmanager
    def task(self, description: str, total: int, unit: str) -> Iterator[Task]:
        if self._terminal:
            with _bar_task(description, total, unit) as task:
                yield task
        else:
            task = _LineTask(description, total, unit)
            yield task
            task.finish()

    def say(self, message: str) -> None:
        _tell(message)


def _tell(line: str) -> None:
    """Print a line of progress.

    The work goes on even if nobody can read the line: a terminal is gone, or a disk is full.
    """
    with suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)


class _LineTask(Task):
    def __init__(self, description: str, total: int, unit: str) -> None:
        self._description, self._total, self._unit = description, total, unit
        self._lock = threading.Lock()
        self._done = 0
        self._start = self._last_line = time.monotonic()

    def advance(self, n: int) -> None:
        with self._lock:
            self._done += n
            now = time.monotonic()
            if now - self._last_line < _LINE_EVERY_SECONDS:
                return
            self._last_line = now
            rate = self._done / (now - self._start)
            left = (self._total - self._done) / rate if rate else 0.0
        _tell(
            f"{self._description}: {_amount(self._done, self._unit)} of "
            f"{_amount(self._total, self._unit)}, "
            f"{_amount(rate, self._unit)}/s, {format_seconds(left)} left"
        )

    def finish(self) -> None:
        seconds = time.monotonic() - self._start
        rate = self._done / seconds if seconds else 0.0
        _tell(
            f"{self._description}: {_amount(self._done, self._unit)} in "
            f"{format_seconds(seconds)}, {_amount(rate, self._unit)}/s"
        )


@contextmanager
def _bar_task(description: str, total: int, unit: str) -> Iterator[Task]:
    # Importing rich takes a tenth of a second. A command without a terminal saves the time.
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[amounts]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=Console(stderr=True)) as bars:
        identifier = bars.add_task(description, total=total, amounts="")

        class BarTask(Task):
            def __init__(self) -> None:
                self._lock = threading.Lock()
                self._done, self._start, self._shown = 0, time.monotonic(), 0.0

            def advance(self, n: int) -> None:
                with self._lock:
                    self._done += n
                    now = time.monotonic()
                    # A bar redraws ten times a second, so updates at every step of a fast loop
                    # are waste.
                    if now - self._shown < 0.1 and self._done < total:
                        return
                    self._shown = now
                    rate = self._done / max(now - self._start, 1e-9)
                    amounts = (
                        f"{_amount(self._done, unit)} of {_amount(total, unit)}, "
                        f"{_amount(rate, unit)}/s"
                    )
                    bars.update(identifier, completed=self._done, amounts=amounts)

        yield BarTask()


def _amount(n: float, unit: str) -> str:
    return format_bytes(n) if unit == "bytes" else f"{n:,.0f} {unit}"
