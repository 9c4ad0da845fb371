"""hydra-pipe: find the training samples behind a prediction of a PyTorch model.

Record a training run, reduce it out of core, rank its data.
"""

import sys
from typing import TYPE_CHECKING, Any

if sys.platform == "win32":
    raise ImportError(
        "hydra-pipe runs on Linux and macOS: the locks of a run need a POSIX system. On Windows "
        "use the Windows Subsystem for Linux"
    )

if TYPE_CHECKING:
    from hydra_pipe.api import plan_reduction, prune, record, reduce, verify
    from hydra_pipe.cleaning.dataset import cleaned
    from hydra_pipe.cleaning.proposal import Cleaning
    from hydra_pipe.cleaning.run import clean_run as clean
    from hydra_pipe.combining.run import combine_runs as combine
    from hydra_pipe.errors import HydraError
    from hydra_pipe.evaluation.run import Evaluation
    from hydra_pipe.evaluation.run import evaluate_run as evaluate
    from hydra_pipe.exporting.run import export_run as export
    from hydra_pipe.per_sample.registry import register_layer_rule
    from hydra_pipe.probing import probe
    from hydra_pipe.recording.content_keys import content_keys
    from hydra_pipe.recording.optimizer_rules import LionRule, OptimizerRule
    from hydra_pipe.recording.optimizers import register_optimizer_rule
    from hydra_pipe.recording.pending import StepNote
    from hydra_pipe.recording.recorder import Recorder
    from hydra_pipe.recording.several_optimizers import SeveralOptimizers
    from hydra_pipe.recording.tracking import TrackedLoader
    from hydra_pipe.reduction.run import ReductionPlan
    from hydra_pipe.reporting.run import report_run as report
    from hydra_pipe.reporting.shown import ShownSamples
    from hydra_pipe.rewinding.spikes import Spikes
    from hydra_pipe.rewinding.step import Rewind
    from hydra_pipe.store.integrity.faults import Fault
    from hydra_pipe.training.pipeline import Pipeline
    from hydra_pipe.training.trainer import Trained, train
    from hydra_pipe.view import Run, open_run

__version__ = "0.1.0"
__all__ = [
    "Cleaning",
    "Evaluation",
    "Fault",
    "HydraError",
    "LionRule",
    "OptimizerRule",
    "Pipeline",
    "Recorder",
    "ReductionPlan",
    "Rewind",
    "Run",
    "SeveralOptimizers",
    "ShownSamples",
    "Spikes",
    "StepNote",
    "TrackedLoader",
    "Trained",
    "clean",
    "cleaned",
    "combine",
    "content_keys",
    "evaluate",
    "export",
    "open_run",
    "plan_reduction",
    "probe",
    "prune",
    "record",
    "reduce",
    "register_layer_rule",
    "register_optimizer_rule",
    "report",
    "train",
    "verify",
]

# Map from a public name to its module, and to its name there.
_HOMES = {
    "Cleaning": ("hydra_pipe.cleaning.proposal", "Cleaning"),
    "Evaluation": ("hydra_pipe.evaluation.run", "Evaluation"),
    "Fault": ("hydra_pipe.store.integrity.faults", "Fault"),
    "HydraError": ("hydra_pipe.errors", "HydraError"),
    "LionRule": ("hydra_pipe.recording.optimizer_rules", "LionRule"),
    "OptimizerRule": ("hydra_pipe.recording.optimizer_rules", "OptimizerRule"),
    "Pipeline": ("hydra_pipe.training.pipeline", "Pipeline"),
    "Recorder": ("hydra_pipe.recording.recorder", "Recorder"),
    "ReductionPlan": ("hydra_pipe.reduction.run", "ReductionPlan"),
    "Rewind": ("hydra_pipe.rewinding.step", "Rewind"),
    "Run": ("hydra_pipe.view", "Run"),
    "SeveralOptimizers": ("hydra_pipe.recording.several_optimizers", "SeveralOptimizers"),
    "ShownSamples": ("hydra_pipe.reporting.shown", "ShownSamples"),
    "Spikes": ("hydra_pipe.rewinding.spikes", "Spikes"),
    "StepNote": ("hydra_pipe.recording.pending", "StepNote"),
    "TrackedLoader": ("hydra_pipe.recording.tracking", "TrackedLoader"),
    "Trained": ("hydra_pipe.training.trainer", "Trained"),
    "clean": ("hydra_pipe.cleaning.run", "clean_run"),
    "cleaned": ("hydra_pipe.cleaning.dataset", "cleaned"),
    "combine": ("hydra_pipe.combining.run", "combine_runs"),
    "content_keys": ("hydra_pipe.recording.content_keys", "content_keys"),
    "evaluate": ("hydra_pipe.evaluation.run", "evaluate_run"),
    "export": ("hydra_pipe.exporting.run", "export_run"),
    "open_run": ("hydra_pipe.view", "open_run"),
    "plan_reduction": ("hydra_pipe.api", "plan_reduction"),
    "probe": ("hydra_pipe.probing", "probe"),
    "prune": ("hydra_pipe.api", "prune"),
    "record": ("hydra_pipe.api", "record"),
    "reduce": ("hydra_pipe.api", "reduce"),
    "register_layer_rule": ("hydra_pipe.per_sample.registry", "register_layer_rule"),
    "register_optimizer_rule": ("hydra_pipe.recording.optimizers", "register_optimizer_rule"),
    "report": ("hydra_pipe.reporting.run", "report_run"),
    "train": ("hydra_pipe.training.trainer", "train"),
    "verify": ("hydra_pipe.api", "verify"),
}


def __getattr__(name: str) -> Any:
    # Names are imported on first use: torch takes seconds to import, and a worker that only
    # reduces needs none of it.
    if name not in _HOMES:
        raise AttributeError(f"module 'hydra_pipe' has no attribute {name!r}")
    import importlib

    module, own_name = _HOMES[name]
    value = getattr(importlib.import_module(module), own_name)
    globals()[name] = value
    return value
