"""Two processes that train together, as a launcher starts them, and what both kinds of trainer have
to leave behind.
"""

import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from support import ROOT
from support.recordings import arrays, assert_same_arrays

import hydra_pipe
from hydra_pipe.store import names

HERE = Path(__file__).parent


def rows_of_two(
    script: str, directory: Path, of_rank: Mapping[str, str], **of_both: str
) -> dict[str, np.ndarray[Any, Any]]:
    """Start `script`, which trains without the callback ("plain"), with it ("whole"), and with it,
    stopped and resumed ("run").

    Args:
        script: of this directory; it puts the weights of each training into `directory`/RANK.pt.
        directory: its argument.
        of_rank: what the environment of a rank has, "RANK" in place of its number.
        of_both: what else the environment has.

    Returns:
        The arrays of "run". It was recorded as "whole", and all weights are the same, bit for bit.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent), str(ROOT)]),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    common |= {
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    } | of_both
    ranks = []
    for rank in range(2):
        own = common | {name: value.replace("RANK", str(rank)) for name, value in of_rank.items()}
        with (directory / f"{rank}.log").open("w") as log:
            command = [sys.executable, str(HERE / script), str(directory)]
            ranks.append(
                subprocess.Popen(
                    command, env=os.environ | own, stdout=log, stderr=subprocess.STDOUT
                )
            )
    try:
        codes = [rank.wait(240) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert codes == [0, 0], "\n".join(
        (directory / f"{rank}.log").read_text()[-3000:] for rank in range(2)
    )
    one, two = (torch.load(directory / f"{rank}.pt") for rank in range(2))
    for name in ("whole", "run"):
        for found in (one[name], two[name]):
            assert all(torch.equal(value, one["plain"][key]) for key, value in found.items())
    assert_same_arrays(directory / "whole", directory / "run")
    assert hydra_pipe.verify(directory / "run") == []
    rows = arrays(directory / "run")
    assert np.isfinite(rows[f"{names.STEPS}/{names.LOSS}"]).all()
    return rows


def samples_of_two(rows: Mapping[str, np.ndarray[Any, Any]]) -> list[int]:
    """The samples of all rows, in order."""
    return sorted(
        np.concatenate([rows[f"rank/{rank}/{names.SAMPLE}"] for rank in range(2)]).tolist()
    )
