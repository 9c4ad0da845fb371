"""Names of everything in a run directory, each written once."""

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
# Page of the default result. The pages of other results are report-RESULT.html.
REPORT: Final = "report.html"
EVALUATION: Final = "evaluation"
CLEANING: Final = "cleaning"
COMBINED: Final = "combined"
PROBES: Final = "probes"
# Files in evaluation/KIND.
RETRAINED: Final = "retrained"
# Prefix of the directories of later rounds of retrainings, which end in the number of the round.
ROUND: Final = "round-"
TABLE: Final = "table.parquet"
SUMMARY: Final = "summary.json"
PLOT: Final = "plot.svg"
TRUTH: Final = "truth.npy"
FINAL_CHECKPOINT: Final = "final.pt"
# Directory for what a repair has moved out of the way. Nobody removes it: it may be the user's.
SET_ASIDE: Final = "set-aside"

# Groups of gradients.zarr.
STEPS: Final = "steps"
TEST: Final = "test"
LABELS: Final = "labels"
RANK: Final = "rank"
# Arrays of gradients.zarr, and of test/<checkpoint>.
GRADIENT: Final = "gradient"
SCALE: Final = "scale"
ROOT_OF_COLUMNS: Final = "root_of_columns"
ROOT_OF_BIASES: Final = "root_of_biases"
ROOT_OF_ELEMENTS: Final = "root_of_elements"
SAMPLE: Final = "sample"
STEP: Final = "step"
CURVATURE: Final = "curvature"
LOSS: Final = "loss"
TARGET: Final = "target"
LOGITS: Final = "logits"
TOP_CLASSES: Final = "top_classes"
LAST_INPUT: Final = "last_input"
# Groups and arrays of hypergradients/METHOD.zarr.
FACTORED: Final = "factored"
FOLDED: Final = "folded"
SWEPT: Final = "swept"
# Arrays of combined/RESULT.zarr.
ROWS: Final = "rows"
COLUMNS: Final = "columns"
STANDARD_ERROR: Final = "standard_error"
AGREEING: Final = "agreeing"
ROOT_MEAN_SQUARE: Final = "root_mean_square"
COSINE: Final = "cosine"
EFFECTIVE_RUNS: Final = "effective_runs"
VISITS: Final = "visits"
TEST_LOSS: Final = "test_loss"
IN_FIRST: Final = "in_first"
# Arrays of gradients.zarr/steps.
FIRST_ROW: Final = "first_row"
N_ROWS: Final = "n_rows"
GRADIENT_SCALE: Final = "gradient_scale"
IMBALANCE: Final = "imbalance"
# Arrays of gradients.zarr/labels.
TRAIN_LABELS: Final = "train"
TEST_LABELS: Final = "test"
TRAIN_KEYS: Final = "train_key"
TEST_KEYS: Final = "test_key"

# Attributes.
LAYOUT: Final = "hydra_pipe_blocks"
FEATURES: Final = "hydra_pipe_features"
PRECONDITIONED: Final = "preconditioned"
PACED: Final = "paced"
STATE: Final = "state"
MADE_OF: Final = "made_of"
N_RANKS: Final = "n_ranks"
DYNAMICS: Final = "dynamics"
KIND: Final = "hydra_pipe"
LABEL_NAMES: Final = "names"
SIGN: Final = "sign"
UNIT: Final = "unit"
METHOD: Final = "method"
TESTS: Final = "tests"
BY: Final = "by"
RUN_ID: Final = "run_id"
# Attribute of a group: its coordinate arrays that lack a dimension's name (CF conventions).
COORDINATES: Final = "coordinates"

# Names of dimensions.
ROW_DIM: Final = "row"
FEATURE_DIM: Final = "feature"
BLOCK_DIM: Final = "block"
GROUP_DIM: Final = "group"
STEP_DIM: Final = "step"
SAMPLE_DIM: Final = "sample"
TEST_DIM: Final = "test"
TEST_GROUP_DIM: Final = "test_group"
RANK_DIM: Final = "rank"
ELEMENT_DIM: Final = "element"
OUTPUT_DIM: Final = "output"
TOP_DIM: Final = "top"
INPUT_DIM: Final = "input"
RUN_DIM: Final = "run"
COLUMN_DIM: Final = "column"
# Dimension of gradients.zarr/labels/test. It is not the array's name, or readers such as
# xarray would take the labels for an index.
TEST_LABEL_DIM: Final = "test_sample"
# Arrays of relevance.zarr/RESULT-top: the relevance of the top samples of each side, and their ids.
HELPFUL: Final = "helpful"
HARMFUL: Final = "harmful"
HELPFUL_SAMPLE: Final = "helpful_sample"
HARMFUL_SAMPLE: Final = "harmful_sample"
# Arrays of relevance.zarr beside the results: labels of samples and of test samples.
SAMPLE_LABEL: Final = "sample_label"
TEST_LABEL: Final = "test_label"

# Settings of a recording: digests of the keys that samples and test samples have.
SAMPLE_KEYS_GIVEN: Final = "sample_keys"
TEST_KEYS_GIVEN: Final = "test_keys"
# Setting of a proposal: number of times that labels are judged.
ROUNDS: Final = "rounds"
# Setting of a combination: ids of its runs.
RUNS: Final = "runs"
# Setting of a reduction: number of the first steps that count.
UPTO: Final = "upto"
# Setting of top samples, of an export and of a report: number of samples on each side.
TOP: Final = "top"
# Facts of a reduction, found by its passes.
CURVATURE_LEFT: Final = "curvature_left"
DAMPING: Final = "damping"
LOSS_DIFFERENCE: Final = "loss_difference"
GRADIENTS_HELD: Final = "gradients_held"

SIGN_TEXT: Final = "positive: helpful, leaving the training sample out raises the test loss"
UNIT_TEXT: Final = "test loss"


def checkpoint_name(step: int) -> str:
    """Return the group of the test gradients taken after `step` steps."""
    return f"{step:010d}"


def key_bytes(which: str) -> str:
    """Return the second dimension of the array of keys `which`."""
    return f"{which}_byte"


def rank_name(rank: int) -> str:
    """Return the group of the rows that process number `rank` recorded."""
    return f"{RANK}/{rank}"


def columns_dimension(result: str) -> str:
    """Return the second dimension of a result whose columns are not all test samples of the run.

    The array of its coordinates has the same name.
    """
    return f"{TEST_DIM}_of_{result}"
