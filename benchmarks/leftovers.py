"""What many interrupted and resumed recordings, reductions and exports leave in one process, beside
what ten leave.

    python benchmarks/leftovers.py [ROUNDS]

ROUNDS: 200 if absent. Each is struck at random points, by an exception, by KeyboardInterrupt where
the work is done, or by SIGINT:
in what shows progress, between blocks, in the writers and readers; then it is done to its end. The
garbage collector is off, and the last tracebacks are kept, as a notebook keeps them. Prints what
there is after each ten rounds (threads, processes, files, locks, hooks, calls at exit), and at the
end what was struck. Exits 1 if there is more of anything than after the first ten.
"""

import faulthandler
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from leftovers import Rounds, small_files, standing, uncollected


def main() -> int:
    n_rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    start, first = time.monotonic(), None
    with tempfile.TemporaryDirectory() as directory, small_files(), uncollected():
        rounds = Rounds(Path(directory))
        while rounds.n_done < n_rounds:
            faulthandler.dump_traceback_later(300, exit=True)  # a hang tells where
            rounds.run(10)
            now = standing(rounds.models)
            first = first or now
            counts = ", ".join(
                f"{len(what) if isinstance(what, list) else what} {name}"
                for name, what in now.items()
            )
            print(
                f"{rounds.n_done:>5} rounds, {time.monotonic() - start:.0f} s: {counts}", flush=True
            )
            if now != first:
                print(f"after 10 rounds: {first}\nnow: {now}")
                return 1
        for name, n in sorted(rounds.struck.items()):
            print(f"{n:>5} {name}")
    faulthandler.cancel_dump_traceback_later()
    return 0


if __name__ == "__main__":
    sys.exit(main())
