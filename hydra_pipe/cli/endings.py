"""The last lines of `record` and of `run`: what came out, and what to do next."""

from hydra_pipe.cli.show import print_table
from hydra_pipe.errors import printable
from hydra_pipe.store.run.manifest import RunDirectory
from hydra_pipe.store.run.results import DEFAULT_METHOD
from hydra_pipe.store.run.stages import EXPORT, RECORD

# Number of samples that `run` prints.
WORST = 12


def say_recorded(run: str) -> None:
    """Print the loss and accuracy of a recording, and how many labels look wrong."""
    from hydra_pipe.cleaning.estimate import wrong_labels_line

    facts = RunDirectory.open(run).stages[RECORD].facts
    loss, accuracy = facts.get("last_epoch_loss"), facts.get("test_accuracy")
    said = [] if not isinstance(loss, float) else [f"loss {loss:.4g} in the last epoch"]
    if isinstance(accuracy, float):
        said.append(f"accuracy {accuracy:.1%} on {facts.get('n_tests'):,} tests")
    if said:
        print(", ".join(said))
    line = wrong_labels_line(run)
    if line is not None:
        print(printable(line))


def say_worst(run: str, method: str) -> None:
    """Print the samples that harm the tests most, by an exported result, and the next commands."""
    from hydra_pipe.store.data.rankings import KEY, SAMPLES, opened_table

    path = RunDirectory.open(run).path
    file = opened_table(path / EXPORT.of(method).area / SAMPLES)
    columns = ["rank", "train_id", "label"]
    columns += [KEY] if KEY in file.schema_arrow.names else []
    table = file.read([*columns, "relevance_sum"]).sort_by("rank")
    rows = table.slice(0, WORST).to_pylist()
    print("training samples that harm the tests most, by relevance summed over the tests:")
    cells = [
        ["-" if row[name] is None else printable(str(row[name])) for name in columns]
        + [f"{row['relevance_sum']:+.4g}"]
        for row in rows
    ]
    print_table(["rank", "sample", *columns[2:], "relevance"], cells)
    which = "" if method == DEFAULT_METHOD else f" --method {method}"
    print(printable(f"next: hydra-pipe report {run}{which}"))
    print(printable(f"next: hydra-pipe clean {run}"))
