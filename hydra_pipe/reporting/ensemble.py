"""The words of a page about a combination of runs: their agreement, and cautions."""

from pathlib import Path

import numpy as np

from hydra_pipe.errors import RunError
from hydra_pipe.reporting.source import ReportSource
from hydra_pipe.store.data.combined import Combined
from hydra_pipe.store.names import COSINE, EFFECTIVE_RUNS, RUNS
from hydra_pipe.store.run.commands import PATHS
from hydra_pipe.store.run.manifest import RunDirectory
from hydra_pipe.store.run.stages import COMBINE

# A mean cosine below this: the runs say hardly the same of a test sample.
LITTLE_SHARED = 0.2
# A run whose columns are this many times as large as those of the median run.
MUCH_LARGER = 10.0


def tiles_of(combined: Combined) -> list[tuple[str, str]]:
    """Return pairs of a figure and its meaning: the runs, and how alike they are."""
    facts = combined.column_facts()
    cosine = facts[COSINE]
    found = [(f"{combined.n_runs:,}", "runs combined")]
    if np.isfinite(cosine).any():
        found += [
            (f"{np.nanmean(cosine):.2f}", "mean cosine between two runs, of one test sample"),
            (f"{facts[EFFECTIVE_RUNS].mean():.1f}", "independent runs that their mean is worth"),
        ]
    return found


def about_combined(combined: Combined) -> list[str]:
    """Return cautions for a reader of a mean over runs, the gravest first."""
    cosine, scales = combined.column_facts()[COSINE], combined.scales()
    found = []
    known = cosine[np.isfinite(cosine)]
    if len(known) and known.mean() < LITTLE_SHARED:
        found.append(
            f"Two runs say hardly the same of a test sample (mean cosine {known.mean():.2f}): what "
            "one run says is mostly chance. Combine more runs, and trust only values that are "
            "stable in nearly all of them."
        )
    sizes = np.nanmedian(scales, axis=1)
    largest = float(sizes.max() / max(float(np.median(sizes)), 1e-30))
    if largest > MUCH_LARGER:
        found.append(
            f"Run {int(sizes.argmax()) + 1} of {combined.n_runs} has relevance {largest:.0f} times "
            "as large as the median run: its training is rough. Each run counts alike all the same."
        )
    found.append(
        f"Values are means over {combined.n_runs} runs, each brought to the same size in each "
        "column. The number after ± is the standard error of the mean, and a value is stable in "
        "the runs that have its sign. The mean predicts training in general. What made one run's "
        "own prediction is on the page of this run."
    )
    return found


def first_run(source: ReportSource) -> RunDirectory:
    """Return the first of the combined runs, whose samples have the ids of the combination.

    Raises:
        RunError: the run is not where it was, or lacks samples.
    """
    assert source.combined is not None
    entry = source.directory.stages[COMBINE.of(source.result)]
    paths, ids = entry.facts.get(PATHS), entry.settings.get(RUNS)
    if not (isinstance(paths, list) and paths and isinstance(ids, list) and ids):
        raise RunError(f"{source.directory.path} does not say where its runs are")
    run = RunDirectory.open(Path(str(paths[0])))
    if run.run_id != ids[0]:
        raise RunError(f"{run.path} is another run than the one that was combined")
    if source.combined.has_others_than_first:
        raise RunError(f"{run.path} lacks samples of the other runs")
    return run
