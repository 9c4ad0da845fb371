"""Every name in a run directory, once."""

from typing import Final

FORMAT: Final = "hydra-pipe run"
FORMAT_VERSION: Final = 1

MANIFEST: Final = "run.json"
GRADIENTS: Final = "gradients.zarr"
RELEVANCE: Final = "relevance.zarr"
HYPERGRADIENTS: Final = "hypergradients"
RANKINGS: Final = "rankings"
CHECKPOINTS: Final = "checkpoints"
CHECKSUMS: Final = "checksums"
LOCKS: Final = "locks"
# of result "hydra"; of others report-RESULT.html
REPORT: Final = "report.html"
EVALUATION: Final = "evaluation"
CLEANING: Final = "cleaning"
PROBES: Final = "probes"
# in evaluation/KIND
RETRAINED: Final = "retrained"
TABLE: Final = "table.parquet"
SUMMARY: Final = "summary.json"
PLOT: Final = "plot.svg"
TRUTH: Final = "truth.npy"
FINAL_CHECKPOINT: Final = "final.pt"
# What repairing has moved out of the way, and nobody removes: it may be the user's.
SET_ASIDE: Final = "set-aside"

# groups of gradients.zarr
STEPS: Final = "steps"
TEST: Final = "test"
LABELS: Final = "labels"
PRECONDITIONER: Final = "preconditioner"
RANK: Final = "rank"
# arrays of gradients.zarr, and of test/<checkpoint>
GRADIENT: Final = "gradient"
SCALE: Final = "scale"
SAMPLE: Final = "sample"
STEP: Final = "step"
CURVATURE: Final = "curvature"
LOSS: Final = "loss"
# groups and arrays of hypergradients/METHOD.zarr
FACTORED: Final = "factored"
FOLDED: Final = "folded"
SWEPT: Final = "swept"
# arrays of gradients.zarr/steps
FIRST_ROW: Final = "first_row"
N_ROWS: Final = "n_rows"
GRADIENT_SCALE: Final = "gradient_scale"
IMBALANCE: Final = "imbalance"
# arrays of gradients.zarr/labels
TRAIN_LABELS: Final = "train"
TEST_LABELS: Final = "test"

# attributes
LAYOUT: Final = "hydra_pipe_blocks"
FEATURES: Final = "hydra_pipe_features"
PRECONDITIONED: Final = "preconditioned"
STATE: Final = "state"
MADE_OF: Final = "made_of"
N_RANKS: Final = "n_ranks"
KIND: Final = "hydra_pipe"
LABEL_NAMES: Final = "names"
SIGN: Final = "sign"
UNIT: Final = "unit"
METHOD: Final = "method"
TESTS: Final = "tests"
BY: Final = "by"
RUN_ID: Final = "run_id"
# of a group: its arrays that are coordinates beside those named like a dimension (CF conventions)
COORDINATES: Final = "coordinates"

# dimension names
ROW_DIM: Final = "row"
FEATURE_DIM: Final = "feature"
BLOCK_DIM: Final = "block"
GROUP_DIM: Final = "group"
STEP_DIM: Final = "step"
SAMPLE_DIM: Final = "sample"
TEST_DIM: Final = "test"
TEST_GROUP_DIM: Final = "test_group"
PARAMETER_DIM: Final = "parameter"
# of gradients.zarr/labels/test: not the name of the array, or readers such as xarray take labels for an index
TEST_LABEL_DIM: Final = "test_sample"
# arrays of relevance.zarr beside the results: labels of samples and of test samples
SAMPLE_LABEL: Final = "sample_label"
TEST_LABEL: Final = "test_label"

# setting of a reduction: number of the first steps that count
UPTO: Final = "upto"
# facts of a reduction, that its passes find
CURVATURE_LEFT: Final = "curvature_left"
DAMPING: Final = "damping"
LOSS_DIFFERENCE: Final = "loss_difference"
GRADIENTS_HELD: Final = "gradients_held"

SIGN_TEXT: Final = "positive: helpful, leaving the training sample out raises the test loss"
UNIT_TEXT: Final = "test loss"


def checkpoint_name(step: int) -> str:
    """Group of the test gradients taken after `step` steps."""
    return f"{step:010d}"


def rank_name(rank: int) -> str:
    """Group of the rows that process number `rank` recorded."""
    return f"{RANK}/{rank}"


def columns_dimension(result: str) -> str:
    """Second dimension of a result whose columns are not all test samples of the run, and the array of its coordinates."""
    return f"{TEST_DIM}_of_{result}"
