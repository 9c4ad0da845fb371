"""The interface that each kind of evaluation implements."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hydra_pipe.evaluation.kinds import Options
from hydra_pipe.evaluation.result import Result
from hydra_pipe.progress import Progress
from hydra_pipe.retraining.subject import Relevance, Subject
from hydra_pipe.store.data.evaluations import Retrained


@dataclass(frozen=True)
class EvaluationRequest:
    """One evaluation that is to be made.

    Args:
        subject: run and pipeline.
        retrained: results of retrainings, kept as they finish.
        settings: the kind's own, as `Evaluator.settings` gave them.
        methods: names of relevance arrays; None: all that the kind can use.
        memory: budget of this process, such as "4GiB".
        progress: place to show progress.
    """

    subject: Subject
    retrained: Retrained
    settings: Mapping[str, Any]
    methods: str | None
    memory: str
    progress: Progress


class Evaluator(ABC):
    """A kind of evaluation."""

    def settings(self, subject: Subject, options: Options, progress: Progress) -> dict[str, Any]:
        """Return the settings that the kind's results depend on.

        With other settings, results are computed anew.

        Raises:
            UsageError: an option has an impossible value.
        """
        return {}

    @abstractmethod
    def scored(
        self, subject: Subject, methods: str | None, settings: Mapping[str, Any]
    ) -> Mapping[str, Relevance]:
        """Return the relevance that the results depend on, by name.

        Args:
            subject: run and pipeline.
            methods: names of relevance arrays; None: all that the kind can use.
            settings: the kind's own, as `settings` gave them.

        Raises:
            HydraError: something is missing that the kind cannot do without.
        """

    @abstractmethod
    def evaluate(self, request: EvaluationRequest) -> Result:
        """Train again as far as the kind needs it, and compare.

        Raises:
            HydraError: any error of `retrain` and `Subject`.
        """
