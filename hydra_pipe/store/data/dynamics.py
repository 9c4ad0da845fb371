"""Arrays of the dynamics: what the network thought of each sample at its steps."""

from dataclasses import asdict, dataclass
from typing import Any

from hydra_pipe.store import names
from hydra_pipe.store.json_parsing import is_count
from hydra_pipe.store.zarr.table import TableColumn

# Outputs of a sample that are all kept. Of more outputs, the largest TOP are kept.
MOST_OUTPUTS = 64
TOP = 8
# Numbers of the last layer's input that are kept. More numbers are projected to so many.
LAST_INPUTS = 32


@dataclass(frozen=True)
class DynamicsShape:
    """Sizes of the dynamics of a row.

    Args:
        n_outputs: number of outputs of the model for a sample. 0: outputs are not kept, since a
            sample has several positions, or none that are known.
        n_inputs: number of kept numbers of the last layer's input. 0: the input is not known.
    """

    n_outputs: int = 0
    n_inputs: int = 0

    @property
    def keeps_all(self) -> bool:
        """True if all outputs are kept, False if the largest are kept."""
        return self.n_outputs <= MOST_OUTPUTS

    @property
    def columns(self) -> list[TableColumn]:
        """Columns of the table of rows."""
        found = [TableColumn(names.LOSS, "float32"), TableColumn(names.TARGET, "int32")]
        if self.n_outputs and self.keeps_all:
            found.append(TableColumn(names.LOGITS, "float16", (self.n_outputs, names.OUTPUT_DIM)))
        elif self.n_outputs:
            found += [
                TableColumn(names.LOGITS, "float16", (2 + TOP, names.OUTPUT_DIM)),
                TableColumn(names.TOP_CLASSES, "int32", (TOP, names.TOP_DIM)),
            ]
        if self.n_inputs:
            width = (self.n_inputs, names.INPUT_DIM)
            found.append(TableColumn(names.LAST_INPUT, "float16", width))
        return found

    def to_json(self) -> dict[str, int]:
        """Return the attribute of `gradients.zarr`."""
        return asdict(self)

    @classmethod
    def from_json(cls, found: Any) -> "DynamicsShape":
        """Read the attribute. Raises: ValueError: it has another form."""
        sizes = found if isinstance(found, dict) else {}
        n_outputs, n_inputs = sizes.get("n_outputs"), sizes.get("n_inputs")
        if not is_count(n_outputs) or not is_count(n_inputs) or n_inputs > LAST_INPUTS:
            raise ValueError("no sizes of the dynamics")
        return cls(n_outputs, n_inputs)
