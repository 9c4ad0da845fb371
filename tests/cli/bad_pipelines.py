"""Pipelines that go wrong, one function for each way. Run by test_bad_input.py."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

from hydra_pipe import Pipeline


def data(n: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(n)
    return TensorDataset(
        torch.randn(n, 6, generator=generator), torch.randint(0, 3, (n,), generator=generator)
    )


def losses(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(output, target, reduction="none")


def make(model: nn.Module | None = None, **changes: object) -> Pipeline:
    model = model or nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    parameters = [p for p in model.parameters() if p.requires_grad] or [
        nn.Parameter(torch.zeros(1))
    ]
    fields: dict[str, object] = {
        "model": model,
        "optimizer": torch.optim.SGD(parameters, lr=0.1),
        "loss": losses,
        "train": data(20),
        "test": data(5),
        "batch_size": 4,
        "epochs": 2,
    }
    return Pipeline(**(fields | changes))


def pipeline(lr: float = 0.1, epochs: int = 2, nesterov: bool = False) -> Pipeline:
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    momentum = 0.9 if nesterov else 0.0
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, nesterov=nesterov, momentum=momentum)
    return make(model, optimizer=optimizer, epochs=epochs)


def raises() -> Pipeline:
    return make(train=data(int("twenty")))


def returns_nothing() -> None:
    make()


def needs_a_value(lr: float) -> Pipeline:
    return make()


def scalar_loss() -> Pipeline:
    return make(loss=F.cross_entropy)


def loss_of_another_shape() -> Pipeline:
    return make(loss=lambda output, target: (output - target[:, None]) ** 2)


def loss_that_raises() -> Pipeline:
    return make(loss=lambda output, target: output @ target)


def model_that_raises() -> Pipeline:
    return make(nn.Linear(7, 3))


def infinite_loss() -> Pipeline:
    steps = iter(range(100))

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return losses(output, target) + (
            torch.tensor([0.0, 0.0, torch.inf, 0.0]) if next(steps) == 3 else 0.0
        )

    return make(loss=loss)


def infinite_gradient() -> Pipeline:
    # the square root has an infinite slope at 0, and 0 is what the first sample gives
    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (output.sum(1) - output.sum(1).detach()).sqrt()

    return make(loss=loss)


class Changing(Dataset):
    """Yields another shape from the tenth sample on."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return torch.zeros(6 if i < 10 else 7), 0


class Odd(Dataset):
    """Yields no pairs."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, i: int) -> torch.Tensor:
        return torch.zeros(6)


class Broken(Dataset):
    """Cannot be read at one place."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        if i == 13:
            raise OSError("the picture is broken")
        return torch.zeros(6), 0


def changing_shape() -> Pipeline:
    return make(train=Changing())


def no_pairs() -> Pipeline:
    return make(train=Odd())


def broken_dataset() -> Pipeline:
    return make(train=Broken())


def empty_test() -> Pipeline:
    return make(test=data(0))


def no_dataset() -> Pipeline:
    return make(train=7)


def too_few_labels() -> Pipeline:
    return make(sample_labels=[1, 2, 3])


def nothing_to_train() -> Pipeline:
    model = nn.Linear(6, 3).requires_grad_(False)
    return make(model, optimizer=torch.optim.SGD(list(model.parameters()), lr=0.1))


def other_optimizer() -> Pipeline:
    model = nn.Linear(6, 3)
    return make(model, optimizer=torch.optim.Adadelta(model.parameters()))


def strangers_parameters() -> Pipeline:
    return make(optimizer=torch.optim.SGD(nn.Linear(6, 3).parameters(), lr=0.1))


def penalty() -> Pipeline:
    model = nn.Linear(6, 3)

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return losses(output, target) + 0.01 * model.weight.square().sum()

    return make(model, loss=loss)


def mixing() -> Pipeline:
    # a softmax over the batch instead of the classes
    return make(nn.Sequential(nn.Linear(6, 5), nn.Softmax(dim=0), nn.Linear(5, 3)))
