"""Training of a pipeline with a recorder: the stage `record`, from settings to final message."""

import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from hydra_pipe.errors import InterruptedRunError, PipelineError, RecordWarning
from hydra_pipe.maths.quantise import Dtype
from hydra_pipe.plan.layout import EncodingChoice
from hydra_pipe.progress import Progress
from hydra_pipe.recording.collectives import n_processes
from hydra_pipe.recording.optimizers import maximizes
from hydra_pipe.recording.recorder import Recorder
from hydra_pipe.recording.settings import (
    check_options,
    json_settings,
    needs_recording,
    record_settings,
)
from hydra_pipe.recording.test_gradients import say_without_tests
from hydra_pipe.store import names
from hydra_pipe.store.data.checkpoints import remove_checkpoints, save_final
from hydra_pipe.store.run.stages import Settings
from hydra_pipe.training.checkpointing import Checkpoints, Interval
from hydra_pipe.training.interruption import StopRequest, stop_requested
from hydra_pipe.training.pipeline import Pipeline, described
from hydra_pipe.training.trainer import Midway, accuracy, take_tests, train, try_tests
from hydra_pipe.units import format_seconds


@dataclass(frozen=True)
class RecordOptions:
    """Options of the recording, checked before the pipeline is built.

    Args:
        encoding, dim, dtype: options of the rows, explained at `Recorder`.
        interval: time or steps between two checkpoints.
        test_every: steps at which test gradients are taken during training, in the form of
            `Midway.parse`.
        overwrite: True discards an existing recording.
    """

    encoding: EncodingChoice
    dim: int
    dtype: Dtype | None
    interval: Interval
    test_every: str | None
    overwrite: bool

    @classmethod
    def parse(
        cls,
        encoding: str,
        dim: int,
        dtype: str | None,
        checkpoint_every: str | None,
        test_every: str | None,
        *,
        overwrite: bool,
    ) -> "RecordOptions":
        """Check the options of a user, see `hydra_pipe.record`.

        Raises:
            UsageError: an unknown encoding or dtype, or an interval that cannot be read.
            PipelineError: several processes have been started.
        """
        check_options(encoding, dim, dtype)
        interval = Interval.parse(checkpoint_every)
        if n_processes() > 1:
            raise PipelineError(
                f"a pipeline is trained by one process, not by {n_processes()}: start one, or "
                "use Recorder in a loop of your own"
            )
        return cls(
            cast("EncodingChoice", encoding),
            dim,
            cast("Dtype | None", dtype),
            interval,
            test_every,
            overwrite,
        )


def record_run(
    pipeline: Pipeline, run: Path, settings: Settings, options: RecordOptions, progress: Progress
) -> bool:
    """Train `pipeline` and record the training into `run`: see `hydra_pipe.record`.

    Args:
        pipeline: pipeline, trained in place.
        run: directory of the run.
        settings: origin of the pipeline, kept in the manifest.
        options: options of the recording.
        progress: receiver of progress and messages.

    Returns:
        True if there was anything to do.

    Raises:
        InterruptedRunError: a signal asked to stop.
        HydraError: a subclass of it; the message says what is wrong and what to do.
    """
    tests = Midway.parse(options.test_every, pipeline)
    own = json_settings(settings | described(pipeline))
    own |= {} if options.test_every is None else {"test_every": options.test_every}
    of_recorder = record_settings(
        options.encoding,
        options.dim,
        options.dtype,
        pipeline.seed,
        len(pipeline.train),
        pipeline.sample_keys,
    )
    if not needs_recording(run, of_recorder | own, overwrite=options.overwrite):
        # An earlier process may have been killed after completing the run, just before this line.
        remove_checkpoints(run / names.CHECKPOINTS)
        return False
    if maximizes(pipeline.optimizer):
        warnings.warn(
            "the optimizer has maximize=True, so a large loss of a test sample is good. R > 0 says "
            "that leaving the training sample out raises this loss, and tables call the sample "
            "helpful: read helpful as harmful, or minimise the negative of the loss",
            RecordWarning,
            stacklevel=3,
        )
    recorder = Recorder(
        pipeline.model,
        pipeline.optimizer,
        run,
        len(pipeline.train),
        encoding=options.encoding,
        dim=options.dim,
        dtype=options.dtype,
        seed=pipeline.seed,
        settings=own,
        sample_keys=pipeline.sample_keys,
        overwrite=options.overwrite,
    )
    start = time.monotonic()
    with stop_requested() as stop:
        slip = _record(pipeline, recorder, tests, options, stop, progress)
    # after the recording is closed: a warning filter may turn this warning into an error
    if slip is not None:
        say_without_tests(slip, recorder.path)
    progress.say(f"recorded {run} in {format_seconds(time.monotonic() - start)}")
    return True


def _record(
    pipeline: Pipeline,
    recorder: Recorder,
    tests: Midway,
    options: RecordOptions,
    stop: StopRequest,
    progress: Progress,
) -> Exception | None:
    """Train, take the test gradients and close the recording.

    Returns:
        The error that stopped the test gradients at the end; None if they were taken.
    """
    start = time.monotonic()
    directory = recorder.path / names.CHECKPOINTS
    checkpoints = Checkpoints(
        directory, pipeline, recorder, options.interval, stop, progress, anew=options.overwrite
    )
    try:
        try_tests(pipeline)
        trained = train(pipeline, recorder, progress, checkpoints, tests)
        train_seconds = time.monotonic() - start
        slip = take_tests(pipeline, recorder, progress, checkpoints)
        recorder.facts |= {
            "train_seconds": train_seconds,
            "checkpoint_seconds": checkpoints.seconds,
            "test_seconds": time.monotonic() - start - train_seconds,
            "last_epoch_loss": trained.last_epoch_loss,
            "test_accuracy": accuracy(pipeline)
            if pipeline.test is not None and slip is None
            else None,
            "final_sha256": save_final(directory, pipeline.model),
        }
        labels = pipeline.sample_labels if pipeline.sample_labels is not None else trained.labels
        if labels is not None:
            recorder.label_samples(labels)
        recorder.close()
    except BaseException as error:
        recorder.fail(error)
        if checkpoints.step and not isinstance(error, InterruptedRunError):
            progress.say(
                f"a checkpoint is kept: the same command resumes after step {checkpoints.step:,}"
            )
        raise
    remove_checkpoints(directory)  # nothing is left to resume
    return slip
