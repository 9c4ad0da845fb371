"""Pictures of a run, drawn with matplotlib."""

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hydra_pipe.errors import RunError, printable
from hydra_pipe.notebook.extras import imported
from hydra_pipe.notebook.results import Results
from hydra_pipe.progress import Progress
from hydra_pipe.store import names
from hydra_pipe.store.run.results import DEFAULT_METHOD

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Blue helps and red harms: the colour-blind can tell these two apart.
_HELPFUL, _HARMFUL, _COLOURS = "#3b6fb6", "#c23b3b", "RdBu"
_MOST_NUMBERS, _MOST_TICKS, _LONGEST_LABEL = 12, 25, 16
_WINDOWS = 50


class Plots:
    """Pictures of a run, as `run.plot`.

    Each method draws one picture and returns its matplotlib axes. Each takes `ax`, the axes to
    draw on. Default: a new figure. Each raises an ExtraError if matplotlib is not installed.
    """

    def __init__(self, results: Results) -> None:
        self._results = results

    def heatmap(
        self,
        method: str = DEFAULT_METHOD,
        ax: "Axes | None" = None,
        *,
        progress: Progress | None = None,
    ) -> "Axes":
        """Draw mean relevance by label of the training samples and label of the test samples.

        The means are read from `classes.parquet`, if it was exported, and are added up column by
        column otherwise.

        The colours end at the largest mean of two different labels, because means within one
        label are often far larger. A mean beyond has the last colour. If there are few labels,
        each number is written into its cell.

        Raises:
            UsageError: the method has no test samples.
            RunError: the relevance was not computed, or labels are not known.
            StoreError: the relevance is damaged.
        """
        pyplot = imported("matplotlib.pyplot", "a heat map")
        source = self._results.source(method)
        if source.train_labels is None or source.test_labels is None:
            raise RunError(
                f"{self._results.path} has no labels for method {method}: give the pipeline "
                "sample_labels and test_labels, or a "
                f"Recorder labels"
            )
        classes = self._results.totals(method, progress or Progress()).classes
        train, rows = np.unique(classes["train_label"].to_numpy(), return_inverse=True)
        test, columns = np.unique(classes["test_label"].to_numpy(), return_inverse=True)
        means = np.full((len(train), len(test)), np.nan)
        means[rows, columns] = classes["relevance_mean"].to_numpy()

        axes = ax or pyplot.subplots(figsize=_size(len(test), len(train)), layout="constrained")[1]
        limit = _limit(means, train[:, None] == test[None, :])
        # All numbers share one power of ten, which stands beside the colours. So 10 classes
        # leave room for three digits.
        power = int(np.floor(np.log10(limit)))
        scaled, limit = means / 10.0**power, limit / 10.0**power
        image = axes.imshow(
            scaled, cmap=_COLOURS, vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest"
        )
        beyond = "both" if np.abs(scaled).max() > limit else "neither"
        unit = f"1e{power} × " * (power != 0) + printable(source.relevance.attributes[names.UNIT])  # noqa: RUF001 - a sign of maths
        axes.figure.colorbar(
            image, ax=axes, extend=beyond, label=f"mean relevance ({unit}); positive: helpful"
        )
        _label_ticks(axes.xaxis, test, turned=True)
        _label_ticks(axes.yaxis, train, turned=False)
        axes.set(
            xlabel="label of the test samples", ylabel="label of the training samples", title=method
        )
        if max(means.shape) <= _MOST_NUMBERS:
            for (row, column), mean in np.ndenumerate(scaled):
                colour = "white" if abs(mean) > 0.6 * limit else "black"
                # adding 0.0 avoids -0.0
                shown = f"{round(mean, 1) + 0.0:.1f}" if abs(mean) < 100 else f"{mean:.0f}"
                axes.text(
                    column, row, shown, ha="center", va="center", color=colour, fontsize="small"
                )
        return axes

    def distribution(
        self,
        method: str = DEFAULT_METHOD,
        ax: "Axes | None" = None,
        *,
        progress: Progress | None = None,
    ) -> "Axes":
        """Draw the distribution of relevance, summed over the test samples.

        The picture shows how many training samples are below and above zero, and how far the
        tails reach. The count is logarithmic, so that a single sample is visible.

        Raises:
            UsageError: the method has no test samples.
            RunError: the relevance was not computed.
            StoreError: the relevance is damaged.
        """
        pyplot = imported("matplotlib.pyplot", "a distribution")
        source = self._results.source(method)
        sums = (
            self._results.totals(method, progress or Progress()).samples["relevance_sum"].to_numpy()
        )
        axes = ax or pyplot.subplots(figsize=(7, 4), layout="constrained")[1]
        edges = _edges_with_zero(sums)
        harmful, helpful = sums[sums < 0], sums[sums >= 0]
        axes.hist(harmful, edges, color=_HARMFUL, label=f"harmful: {len(harmful):,}")
        axes.hist(helpful, edges, color=_HELPFUL, label=f"helpful: {len(helpful):,}")
        axes.set_yscale("log")
        axes.axvline(0, color="grey", linewidth=0.8)
        axes.legend(frameon=False)
        what = (
            f"{source.n_tests:,} test samples"
            if source.columns.by is None
            else f"{source.n_tests:,} means"
        )
        unit = printable(source.relevance.attributes[names.UNIT])
        axes.set(
            xlabel=f"relevance, summed over {what} ({unit})",
            ylabel="training samples",
            title=method,
        )
        return axes

    def loss(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the training loss of each step and its running mean.

        Mean test losses are points at the steps where test gradients were taken.

        Raises:
            RunError: no step was recorded.
            StoreError: the recording is damaged.
        """
        pyplot = imported("matplotlib.pyplot", "a loss curve")
        gradients = self._results.gradients
        losses = gradients.step_table(names.LOSS)
        if not len(losses):
            raise RunError(f"{self._results.path} has no step yet: record it first")
        axes = ax or pyplot.subplots(figsize=(7, 4), layout="constrained")[1]
        steps, window = np.arange(1, len(losses) + 1), max(1, len(losses) // _WINDOWS)
        axes.plot(
            steps, losses, color="grey", alpha=0.4, linewidth=0.8, label="training, each step"
        )
        smooth = np.convolve(losses, np.full(window, 1 / window), "valid")
        if window > 1:
            axes.plot(
                steps[window - 1 :],
                smooth,
                color=_HELPFUL,
                label=f"training, mean of {window} steps",
            )
        tests = [(step, gradients.test_losses(step)) for step in gradients.test_steps()]
        if tests:
            means = [values.mean() for _, values in tests]
            label = f"test, mean of {len(tests[0][1]):,} samples"
            axes.plot(
                [step for step, _ in tests], means, "o", color=_HARMFUL, markersize=5, label=label
            )
        axes.legend(frameon=False)
        axes.set(xlabel="step", ylabel="loss")
        return axes


def _limit(means: NDArray[np.float64], of_one_label: NDArray[np.bool_]) -> float:
    others = np.abs(means[~of_one_label])
    return float(others.max() if others.size and others.max() > 0 else np.abs(means).max()) or 1.0


def _edges_with_zero(values: NDArray[np.float64]) -> list[float]:
    """Return edges of some 60 bins of one width, one edge at zero.

    So no bin is both harmful and helpful.
    """
    low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
    width = (high - low) / 60 or 1.0
    return list(np.arange(np.floor(low / width), np.ceil(high / width) + 2) * width)


def _size(n_columns: int, n_rows: int) -> tuple[float, float]:
    """Return the size of a figure in inches, so that 2 classes and 100 both fit on a page."""
    return min(9.0, max(4.5, 2.2 + 0.5 * n_columns)), min(8.0, max(3.2, 1.2 + 0.42 * n_rows))


def _label_ticks(axis: Any, labels: NDArray[Any], *, turned: bool) -> None:
    """Set a tick for each label, or for every few labels if the ticks would touch."""
    every = -(-len(labels) // _MOST_TICKS)
    shown = [printable(str(label)) for label in labels[::every]]
    shown = [
        text if len(text) <= _LONGEST_LABEL else f"{text[: _LONGEST_LABEL - 1]}…" for text in shown
    ]
    axis.set_ticks(np.arange(0, len(labels), every), shown)
    if turned and max(map(len, shown)) > 3:
        for label in axis.get_ticklabels():
            label.set(rotation=45, ha="right", rotation_mode="anchor")
