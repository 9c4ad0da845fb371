"""What commands print, kept as text so that a change of it is seen: every `--help`, and every plan
of the archived runs.

    python tests/golden/texts.py tests/golden

Whoever changes a text on purpose makes the files anew, and reads the difference.
"""

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

from typer.main import get_command
from typer.testing import CliRunner

from hydra_pipe.cli.app import app

TESTS = Path(__file__).parents[1]
# arguments of `reduce --dry-run`; hydra-exact is the last: it loads torch, whose memory other plans
# would count
PLANS = """
whole --method hydra
whole --method hydra --keep-hypergradients --overwrite
whole --method hydra --mean --tests 0-1 --chunks 4x51
whole --method hydra --probe new
whole --method hydra --up-to-step 3
whole
whole --rank 20
whole --chunks 4x51 --probe new
whole --keep-hypergradients
whole --method tracin --by label
whole --method grad-dot
whole --method grad-dot --top 2
whole --method grad-cos
whole --method influence
whole --method self
pruned --method hydra-fisher --mean
whole --scheduler processes
whole --method hydra-exact
whole --method hydra-exact --rank 2
"""


def said(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "80"})
    text = f"$ hydra-pipe {' '.join(arguments)}\n{result.output.rstrip()}\n"
    return text if result.exit_code == 0 else f"{text}exit code {result.exit_code}\n"


def helps() -> str:
    """What `--help` prints, of every command."""
    commands = get_command(app).commands  # type: ignore[attr-defined]
    return "\n".join([said("--help"), *(said(name, "--help") for name in commands)])


def plans() -> str:
    """What `reduce --dry-run` prints, on one core; but for what is this machine's."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    os.chdir(TESTS / "archive")  # where the pipeline of the runs is
    texts = [
        said("reduce", f"v1/{line.split()[0]}", *line.split()[1:], "--dry-run")
        for line in PLANS.strip().splitlines()
    ]
    text = re.sub(r"[\d.]+ [KMGT]iB free", "... free", "\n".join(texts))
    before, exact, after = text.partition("$ hydra-pipe reduce v1/whole --method hydra-exact")
    return (
        before
        + exact
        + re.sub(r"(peak memory +at most|time +about) [\d.]+ (MiB|s)", r"\1 ... \2", after)
    )


TEXTS: dict[str, Callable[[], str]] = {"help.txt": helps, "plans.txt": plans}


if __name__ == "__main__":
    target = Path(sys.argv[1]).resolve()
    for name, made in TEXTS.items():
        (target / name).write_text(made())
