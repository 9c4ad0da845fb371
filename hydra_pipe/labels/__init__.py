"""Wrong labels, found from what a network thought of each sample while it trained.

Pure NumPy: no torch, no disk, no Dask.
"""

from hydra_pipe.labels.dynamics import Dynamics, TopLogits
from hydra_pipe.labels.judging import Evidence, Verdict, judge

__all__ = ["Dynamics", "Evidence", "TopLogits", "Verdict", "judge"]
