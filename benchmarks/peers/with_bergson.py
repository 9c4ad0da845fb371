"""bergson: its `ekfac` and `trackstar` pipelines, as its command line runs them, on the CPU.

It takes causal language models of transformers and rows of token ids. The subject is wrapped as
one, which changes nothing of what is computed: a picture is the token of its number and that of its
label, the model looks the picture up and predicts the label; a passage is its characters and the
one that comes last.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from bergson import IndexConfig, PreprocessConfig, QuerySetConfig, ScoreConfig
from bergson.cli.commands import ApproxUnrolling, Ekfac, Hessian, Trackstar
from bergson.config.config import (
    ApproxUnrollingConfig,
    AstraConfig,
    DataConfig,
    HessianConfig,
    HessianPipelineConfig,
    TrackstarConfig,
    TrackstarIndexConfig,
)
from bergson.data import load_scores_loss_signed
from datasets import Dataset
from subject import MODELS, Inputs, Method, Offer, main
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.modeling_outputs import CausalLMOutput

MOST_TOKENS = 2**15


class SubjectConfig(PretrainedConfig):
    """Args:
    subject: its name.
    shape: of all pictures; nothing for text.
    """

    model_type = "subject"

    def __init__(self, subject: str = "", shape: tuple[int, ...] = (), **others: Any) -> None:
        super().__init__(**others)
        self.subject, self.shape = subject, list(shape)


class Wrapped(PreTrainedModel):
    """The subject's model, from token ids to logits of the next token."""

    config_class = SubjectConfig
    _supports_sdpa = _supports_eager = True

    def __init__(self, config: SubjectConfig, *_: Any) -> None:
        super().__init__(config)
        net = MODELS[config.subject]()
        # a picture stands in a sequence, in the end of which nothing is predicted
        self.net = (
            nn.Sequential(*(part for part in net if not isinstance(part, nn.Flatten)))
            if config.shape
            else net
        )
        if config.shape:
            self.pictures = nn.Embedding(*config.shape)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """They are loaded."""

    def get_input_embeddings(self) -> nn.Module:
        """Through which bergson lets gradients flow."""
        return (
            self.pictures
            if self.config.shape
            else next(part for part in self.net.modules() if isinstance(part, nn.Embedding))
        )

    def forward(self, input_ids: Tensor, **_: Any) -> CausalLMOutput:
        if self.config.shape:
            seen = self.pictures(input_ids[:, :1])
            return CausalLMOutput(logits=self.net(torch.cat([seen, torch.zeros_like(seen)], dim=1)))
        logits = self.net(input_ids[:, :-1])
        return CausalLMOutput(logits=torch.cat([logits, torch.zeros_like(logits[:, :1])], dim=1))


AutoConfig.register("subject", SubjectConfig)
AutoModelForCausalLM.register(SubjectConfig, Wrapped)


class Bergson(Method):
    """What its pipelines read: model, tokenizer and rows, in files."""

    def prepare(self) -> None:
        given, self._sets = self.given, 0
        pictures = given.train.tensors[1].ndim == 1
        every = torch.cat([part.tensors[0] for part in (given.train, given.test, given.later)])
        subject = next(name for name, make in MODELS.items() if fits(make(), given))
        self._models = [str(self.store / f"model-{number}") for number in range(len(given.states))]
        for path, state in zip(self._models, given.states, strict=True):
            model = Wrapped(
                SubjectConfig(subject, tuple(every.flatten(1).shape) if pictures else ())
            )
            # by position: without the layer that flattens pictures the others have other numbers
            model.net.load_state_dict(
                dict(zip(model.net.state_dict(), state.values(), strict=True))
            )
            if pictures:
                model.pictures.weight.data.copy_(every.flatten(1))
            model.save_pretrained(path)
        words = {str(number): number for number in range(len(every) if pictures else 65)}
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(WordLevel(words, unk_token="0")),
            model_max_length=MOST_TOKENS,
        )
        for path in self._models:
            tokenizer.save_pretrained(path)
        first = 0
        for part, data in (("train", given.train), ("test", given.test), ("later", given.later)):
            x, y = data.tensors
            ids = (
                torch.stack([torch.arange(first, first + len(x)), y], dim=1)
                if pictures
                else torch.cat([x, y[:, -1:]], dim=1)
            )
            Dataset.from_dict(
                {"input_ids": ids.tolist(), "length": [ids.shape[1]] * len(ids)}
            ).save_to_disk(str(self.store / part))
            first += len(x)

    def _index(self, run: Path, kind: type[Any] = IndexConfig) -> Any:
        data = DataConfig(dataset=str(self.store / "train"))
        mean = "mean"  # over a passage's characters, as it was trained
        return kind(
            run_path=str(run),
            model=self._models[-1],
            data=data,
            token_batch_size=1000,
            loss_reduction=mean,
            overwrite=True,
        )

    def _query(self, tests: TensorDataset) -> QuerySetConfig:
        """One score for each test sample, its default."""
        return QuerySetConfig(
            dataset=str(self.store / ("test" if tests is self.given.test else "later"))
        )

    def _scores(self, run: Path) -> Tensor:
        """What it reads as the change of the loss, negative for helpful whatever the pipeline."""
        return -load_scores_loss_signed(str(run / "scores"))[0]


def fits(model: nn.Module, given: Inputs) -> bool:
    """Whether parameters have the names and shapes of the subject's."""
    own, theirs = (
        {name: value.shape for name, value in state.items()}
        for state in (model.state_dict(), given.states[-1])
    )
    return own == theirs


class Factored(Bergson):
    """`bergson ekfac`.

    Args:
        steps: of conjugate gradients that refine the solution.
    """

    def __init__(self, given: Inputs, store: Path, steps: int = 0) -> None:
        super().__init__(given, store)
        # all samples at once: a part of them would be another Hessian
        self._astra = AstraConfig(
            num_steps=steps, solver="cg", batch_size=len(given.train), micro_batch_size=500
        )
        self._hessian = HessianConfig(method="kfac", ev_correction=True)

    def prepare(self) -> None:
        super().prepare()
        Hessian(self._hessian, self._index(self.store / "hessian" / "kfac")).execute()

    def score(self, tests: TensorDataset) -> Tensor:
        self._sets += 1
        run = self.store / f"run-{self._sets}"
        run.mkdir()
        (run / "hessian").symlink_to(self.store / "hessian")
        pipeline = HessianPipelineConfig(query=self._query(tests), astra=self._astra, resume=True)
        Ekfac(
            self._index(run), self._hessian, ScoreConfig(), PreprocessConfig(), pipeline
        ).execute()
        return self._scores(run)


class Track(Bergson):
    """`bergson trackstar`, which has no part that is done before the tests are known."""

    def score(self, tests: TensorDataset) -> Tensor:
        self._sets += 1
        run = self.store / f"run-{self._sets}"
        Trackstar(
            self._index(run, TrackstarIndexConfig), TrackstarConfig(query=self._query(tests))
        ).execute()
        return self._scores(run)


class Source(Bergson):
    """`bergson approxunrolling`, whose parts that are done before the tests are known it has in one
    with the others.
    """

    def score(self, tests: TensorDataset) -> Tensor:
        given = self.given
        self._sets += 1
        run = self.store / f"run-{self._sets}"
        options = given.settings["options"]
        if "momentum" not in options:
            raise RuntimeError(
                "of AdamW it needs the optimiser's state at each checkpoint, which the subject "
                "does not keep"
            )
        segments = len(given.states)
        unrolling = ApproxUnrollingConfig(
            checkpoints=self._models,
            segments=segments,
            lr_list=given.interval_rates,
            step_size_list=[len(part) for part in np.array_split(given.rates, segments)],
            momentum=options["momentum"],
            query=self._query(tests),
        )
        ApproxUnrolling(
            self._index(run), HessianConfig(method="kfac", ev_correction=True), unrolling
        ).execute()
        return self._scores(run)


OFFERS = {
    "source": Offer("SOURCE (`approxunrolling`), 5 checkpoints, 5 segments", Source),
    "ekfac": Offer("`ekfac`, its defaults (damping 0.1 of the mean eigenvalue)", Factored),
    "ekfac-cg": Offer(
        "`ekfac` refined by 10 steps of CG on all samples",
        lambda given, store: Factored(given, store, 10),
    ),
    "trackstar": Offer("`trackstar`, its defaults (projected to 16 x 16)", Track),
}

if __name__ == "__main__":
    main(OFFERS, "bergson", "transformers")
