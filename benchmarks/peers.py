"""Attribution scores of other libraries, for benchmarks/fidelity_peers.py, in an interpreter that has them and not hydra-pipe.

    PYTHON benchmarks/peers.py MODEL PEER INPUTS.npz SCORES.npz

INPUTS.npz has the data, the parameters after each epoch, the order of the training samples and the settings of the optimiser.
SCORES.npz gets `scores`, shape (train, test), positive for helpful, and `seconds`. Each peer is used as its documentation and
examples have it; where these leave something open, the choice is in its title.
"""

import contextlib
import json
import sys
import tempfile
import time
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

if util.find_spec("hydra_pipe") is None:  # the pipelines name it, and this interpreter needs but their models
    sys.modules["hydra_pipe"] = types.SimpleNamespace(Pipeline=None)  # type: ignore[assignment]
sys.path.insert(0, str(Path(__file__).parents[1] / "pipelines"))
import shakespeare

Score = Callable[[], Tensor]
State = dict[str, Tensor]


def mlp() -> nn.Module:
    """784-64-32-10."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def gpt() -> nn.Module:
    """2 layers of width 64 on 32 characters."""
    return shakespeare.Gpt(65, 32, 2, 64)


MODELS: dict[str, Callable[[], nn.Module]] = {"fashion": mlp, "gpt": gpt}


def losses(output: Tensor, target: Tensor) -> Tensor:
    """Of each sample; of a passage the mean over its characters."""
    if output.ndim == 3:
        return F.cross_entropy(output.transpose(1, 2), target, reduction="none").mean(1)
    return F.cross_entropy(output, target, reduction="none")


@dataclass
class Inputs:
    """What a peer is given.

    Args:
        model: with the final parameters.
        states: parameters after each epoch.
        start: parameters before the first step.
        train, test: samples.
        order: sample ids of each step.
        rates: learning rate of each step.
        settings: of the optimiser.
    """

    model: nn.Module
    states: list[State]
    start: State
    train: TensorDataset
    test: TensorDataset
    order: list[list[int]]
    rates: list[float]
    settings: dict[str, Any]

    @classmethod
    def read(cls, name: str, path: Path) -> "Inputs":
        arrays = dict(np.load(path))
        settings = json.loads(str(arrays["settings"]))
        model = MODELS[name]()

        def state(prefix: str) -> State:
            return {key: torch.tensor(arrays[f"{prefix}/{key}"]) for key in model.state_dict()}

        states = [state(str(epoch)) for epoch in range(settings["epochs"])]
        model.load_state_dict(states[-1])
        x, y, test_x, test_y = (torch.tensor(arrays[key]) for key in ("x", "y", "test_x", "test_y"))
        sizes = arrays["sizes"]
        order = [ids.tolist() for ids in np.split(arrays["order"], np.cumsum(sizes)[:-1])]
        train, test = TensorDataset(x, y), TensorDataset(test_x, test_y)
        return cls(model.eval(), states, state("start"), train, test, order, arrays["rates"].tolist(), settings)

    def epochs(self) -> Iterator[tuple[int, list[int], float]]:
        """Epoch, sample ids and learning rate of each step."""
        steps = len(self.order) // self.settings["epochs"]
        for step, (ids, rate) in enumerate(zip(self.order, self.rates, strict=True)):
            yield step // steps, ids, rate

    def loaders(self, train: int, test: int) -> tuple[Any, Any]:
        """In order, in batches of these sizes."""
        return DataLoader(self.train, train), DataLoader(self.test, test)

    def train_again(self, before: Callable[[int, list[int], float], Any], after: Callable[[int], Any] = lambda step: None) -> None:
        """The same training. `before(epoch, ids, rate)` is called before each step, `after(step)` after it."""
        self.model.load_state_dict(self.start)
        self.model.train()
        given, (x, y) = self.settings, self.train.tensors
        kind = getattr(torch.optim, given["optimizer"])
        self.optimizer = kind(self.model.parameters(), lr=self.rates[0], **given["options"])
        for step, (epoch, ids, rate) in enumerate(self.epochs()):
            self.optimizer.param_groups[0]["lr"] = rate
            self.optimizer.zero_grad()
            before(epoch, ids, rate)
            losses(self.model(x[ids]), y[ids]).mean().backward()
            if given["max_grad_norm"] is not None:
                nn.utils.clip_grad_norm_(self.model.parameters(), given["max_grad_norm"])
            self.optimizer.step()
            after(step)
        self.model.eval()
        for name, value in self.model.state_dict().items():
            apart = float((value - self.states[-1][name]).norm() / self.states[-1][name].norm())
            if not apart < 1e-2:
                raise RuntimeError(f"trained again {name} is {apart:.1e} apart")


def dattri_task(given: Inputs, states: Any, *, single: bool = False) -> Any:
    """An `AttributionTask`. `single`: of samples without a dimension for the batch, as TracIn and TRAK take them."""
    from dattri.task import AttributionTask

    model = given.model

    def loss(params: Any, data: Any) -> Tensor:
        x, y = (part.unsqueeze(0) for part in data) if single else data
        return losses(torch.func.functional_call(model, params, (x,)), y).mean()

    return AttributionTask(loss_func=loss, model=model, checkpoints=states)


def dattri_tracin(given: Inputs, *, project: bool = True) -> Score:
    from dattri.algorithm import TracInAttributor

    rates = np.array(given.rates).reshape(given.settings["epochs"], -1).mean(axis=1)
    task = dattri_task(given, given.states, single=True)
    weights = torch.tensor(rates, dtype=torch.float32)
    attributor = TracInAttributor(task=task, weight_list=weights, normalized_grad=False, device="cpu")
    if not project:
        attributor.projector_kwargs = None
    return lambda: attributor.attribute(*given.loaders(len(given.train), len(given.test)))


def dattri_influence(given: Inputs, kind: str, **options: Any) -> Score:
    from dattri import algorithm

    attributor = getattr(algorithm, f"IFAttributor{kind}")(task=dattri_task(given, given.states[-1]), device="cpu", **options)
    all_at_once, tests = given.loaders(len(given.train), len(given.test))

    def score() -> Tensor:
        attributor.cache(given.loaders(500, 200)[0] if kind == "EKFAC" else all_at_once)
        with torch.no_grad():
            return attributor.attribute(all_at_once, tests)

    return score


def dattri_trak(given: Inputs, states: list[State]) -> Score:
    from dattri.algorithm import TRAKAttributor
    from dattri.task import AttributionTask

    model = given.model

    def log_probability(params: Any, data: Any) -> Tensor:
        x, y = (part.unsqueeze(0) for part in data)
        return -losses(torch.func.functional_call(model, params, (x,)), y).mean()

    def margin(params: Any, data: Any) -> Tensor:
        logp = log_probability(params, data)
        return logp - torch.log(1 - torch.exp(logp))

    def probability(params: Any, data: Any) -> Tensor:
        return torch.exp(log_probability(params, data))

    task = AttributionTask(loss_func=margin, model=model, checkpoints=states)
    options: dict[str, Any] = {"device": "cpu"}
    if len(given.train) <= 512:
        options["proj_dim"] = 128  # with as many columns as samples its matrix is singular
    attributor = TRAKAttributor(task=task, correct_probability_func=probability, device="cpu", projector_kwargs=options)
    train, test = given.loaders(len(given.train), len(given.test))

    def score() -> Tensor:
        with torch.no_grad():
            attributor.cache(train)
            return attributor.attribute(test)

    return score


def dattri_dvemb(given: Inputs, form: str, proj_dim: int = 4096) -> Score:
    from dattri.algorithm.dvemb import DVEmbAttributor
    from dattri.task import AttributionTask

    def loss(model: nn.Module, data: Any, device: Any) -> Tensor:
        x, y = data
        return losses(model(x.to(device)), y.to(device)).mean()

    task = AttributionTask(loss_func=loss, model=given.model, checkpoints=given.states[-1])
    attributor = DVEmbAttributor(task=task, proj_dim=proj_dim, factorization_type=form)
    x, y = given.train.tensors

    def score() -> Tensor:
        def before(epoch: int, ids: list[int], rate: float) -> None:
            attributor.cache_gradients(epoch, (x[ids], y[ids]), torch.tensor(ids), rate)
            given.optimizer.zero_grad()

        given.train_again(before)
        attributor.cache()
        return attributor.attribute(DataLoader(given.test, 50))

    return score


def trak(given: Inputs, states: list[State], proj_dim: int = 2048) -> Score:
    from trak import TRAKer
    from trak.modelout_functions import AbstractModelOutput

    class Passage(AbstractModelOutput):  # type: ignore[misc] # no stubs
        """Margin of a passage's mean log-probability; of pictures "image_classification" is what the package has."""

        def __init__(self) -> None:
            """There is nothing to keep; the base class has it abstract."""

        @staticmethod
        def get_output(model: Any, weights: Any, buffers: Any, x: Tensor, y: Tensor) -> Tensor:
            logits = torch.func.functional_call(model, (weights, buffers), x.unsqueeze(0))
            logp = -losses(logits, y.unsqueeze(0)).mean()
            return logp - torch.log(1 - torch.exp(logp))

        @staticmethod
        def get_out_to_loss_grad(model: Any, weights: Any, buffers: Any, batch: Any) -> Tensor:
            x, y = batch
            return (1 - torch.exp(-losses(torch.func.functional_call(model, (weights, buffers), x), y))).clone().detach()[:, None]

    pictures = given.train.tensors[1].ndim == 1
    size = min(500, len(given.train))

    def score() -> Tensor:
        with tempfile.TemporaryDirectory() as store:
            traker = TRAKer(
                model=given.model,
                task="image_classification" if pictures else Passage(),
                train_set_size=len(given.train),
                save_dir=store,
                device="cpu",
                use_half_precision=False,
                proj_dim=proj_dim,
            )
            train, test = given.loaders(size, size)
            for number, state in enumerate(states):
                traker.load_checkpoint(state, model_id=number)
                for batch in train:
                    traker.featurize(batch=batch, num_samples=len(batch[0]))
            traker.finalize_features()
            for number, state in enumerate(states):
                traker.start_scoring_checkpoint(exp_name="tests", checkpoint=state, model_id=number, num_targets=len(given.test))
                for batch in test:
                    traker.score(batch=batch, num_samples=len(batch[0]))
            return torch.tensor(np.array(traker.finalize_scores(exp_name="tests")))

    return score


def llm_capture(given: Inputs, store: Path, more: Callable[[], list[Any]] = list) -> Any:
    """Hooks of dattri-llm that write what is trained within `collect()` into `store`."""
    from dattri_llm import REGISTER_ALL, GradientStorageManager, HookManager, HookManagerConfig, OffloadCallback

    offload = OffloadCallback(offload_interval=1, file_manager=GradientStorageManager(str(store)))
    return HookManager(given.model, config=HookManagerConfig(linear_io=REGISTER_ALL), callbacks=[offload, *more()])


def llm_at_the_end(given: Inputs, data: TensorDataset, store: Path) -> None:
    """Gradients of samples at the final parameters, each of its own loss."""
    hooks = llm_capture(given, store)
    with hooks.collect():
        for x, y in DataLoader(data, 100):
            given.model.zero_grad()
            losses(given.model(x), y).sum().backward()
    hooks.remove()


def llm(given: Inputs, kind: str, *, trajectory: bool = True, **options: Any) -> Score:
    """dattri-llm: stores of training and tests, then `attribute_from_cache`."""
    import dattri_llm
    from dattri_llm import AttributionArguments, OptimizerStateCallback

    adam = kind == "AdamWInfluence"

    def score() -> Tensor:
        with tempfile.TemporaryDirectory() as directory:
            train, test, out = (Path(directory) / name for name in ("train", "test", "out"))
            moments: list[Any] = []

            def more() -> list[Any]:
                if adam:
                    moments.append(OptimizerStateCallback(given.model, lambda: given.optimizer))
                return moments

            order = list(range(len(given.train)))
            if trajectory:
                hooks = llm_capture(given, train, more)
                with hooks.collect():
                    given.train_again(lambda *_: None, moments[0].record_post if adam else lambda step: None)
                hooks.remove()
                # rows are in the order in which samples were first met
                order = list(dict.fromkeys(i for ids in given.order for i in ids))
            else:
                llm_at_the_end(given, given.train, train)
            llm_at_the_end(given, given.test, test)
            if kind == "DVEmb":
                options["learning_rate"] = dict(enumerate(given.rates))
            if adam:
                options["dynamics"] = moments[0].dynamics()
            arguments = AttributionArguments(output_dir=str(out), use_cpu=True, dataloader_pin_memory=False)
            found = getattr(dattri_llm, f"{kind}Attributor")(arguments).attribute_from_cache(str(train), str(test), **options)
            _, matrix = found.agnostic_matrix()
            # it takes samples with the same content for one, and adds up what they score
            contents = [x.numpy().tobytes() + y.numpy().tobytes() for x, y in given.train]
            rows = {content: row for row, content in enumerate(dict.fromkeys(contents[i] for i in order))}
            if matrix.shape != (len(rows), len(given.test)):
                raise RuntimeError(f"scored {tuple(matrix.shape)}")
            shares = torch.tensor([contents.count(content) for content in contents])
            return matrix[[rows[content] for content in contents]] / shares[:, None]

    return score


def few(given: Inputs) -> int:
    """Columns of TRAK: what it has by default, or fewer than half of the samples, for else its matrix is singular."""
    return 2048 if len(given.train) > 4096 else 128


@dataclass(frozen=True)
class Peer:
    """A method of another library.

    Args:
        title: of it, with what was chosen.
        prepare: from the inputs, what is timed.
    """

    title: str
    prepare: Callable[[Inputs], Score]


PEERS = {
    "dattri-tracin": Peer("dattri TracIn, 5 checkpoints, projected to 512", dattri_tracin),
    "dattri-tracin-full": Peer("dattri TracIn, 5 checkpoints, not projected", lambda g: dattri_tracin(g, project=False)),
    "dattri-ekfac": Peer("dattri EK-FAC, damping 5e-3", lambda g: dattri_influence(g, "EKFAC", damping=5e-3)),
    "dattri-arnoldi": Peer(
        "dattri influence, Arnoldi, 100 iterations, 5e-3", lambda g: dattri_influence(g, "Arnoldi", regularization=5e-3)
    ),
    "dattri-trak": Peer("dattri TRAK, last checkpoint", lambda g: dattri_trak(g, g.states[-1:])),
    "dattri-trak-5": Peer("dattri TRAK, 5 checkpoints", lambda g: dattri_trak(g, g.states)),
    "dattri-dvemb": Peer("dattri DVEmb, elementwise, 4096", lambda g: dattri_dvemb(g, "elementwise")),
    "dattri-dvemb-kronecker": Peer("dattri DVEmb, kronecker, 4096", lambda g: dattri_dvemb(g, "kronecker")),
    "llm-tracin": Peer("dattri-llm TracIn, every step", lambda g: llm(g, "TracIn")),
    "llm-gradcos": Peer("dattri-llm GradCos, last checkpoint", lambda g: llm(g, "TracIn", trajectory=False, normalized_grad=True)),
    "llm-ekfac": Peer("dattri-llm EK-FAC, damping 1e-3", lambda g: llm(g, "EKFAC", trajectory=False)),
    "llm-dvemb": Peer("dattri-llm DVEmb, every parameter", lambda g: llm(g, "DVEmb", propagation="test")),
    "llm-adamw": Peer("dattri-llm AdamW-influence, every parameter", lambda g: llm(g, "AdamWInfluence", propagation="test")),
    "trak": Peer("traker TRAK, last checkpoint", lambda g: trak(g, g.states[-1:], few(g))),
    "trak-5": Peer("traker TRAK, 5 checkpoints", lambda g: trak(g, g.states, few(g))),
    "dattri-cg": Peer(
        "dattri influence, CG, 10 iterations, 5e-3", lambda g: dattri_influence(g, "CG", regularization=5e-3, max_iter=10)
    ),
}


def main() -> None:
    name, peer, inputs, out = sys.argv[1:]
    torch.manual_seed(0)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    # the fused kernel has no second derivative on the CPU
    fused = contextlib.nullcontext() if name != "gpt" else torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with fused:
        score = PEERS[peer].prepare(Inputs.read(name, Path(inputs)))
        start = time.perf_counter()
        scores = score().detach().numpy()
        seconds = time.perf_counter() - start
    if not np.isfinite(scores).all():
        raise SystemExit(f"{np.mean(~np.isfinite(scores)):.0%} of its scores are not finite")
    np.savez(out, scores=scores, seconds=seconds)


if __name__ == "__main__":
    main()
