"""What regtune is measured against: one model at a time, as tutorials and as experts train it.

Everyone trains the same networks on the same rows in batches of 64, with dropout, AdamW on the
weights alone and proximal L1.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from torchvision import transforms
from torchvision.datasets import MNIST

from regtune.task import Data
from worker.tasks.preparation import Prepared

BATCH_ROWS = 64
EVALUATION_ROWS = 1000
LEARNING_RATE = 1e-3
CLASSES = 10

Network = Callable[[float], nn.Module]
"""Builds a network with this dropout rate."""


@dataclass(frozen=True)
class Strengths:
    """How strongly a model is regularized."""

    weight_decay: float
    dropout: float
    l1_lambda: float


@dataclass(frozen=True)
class Held:
    """The rows of the first split, those to train on and those to validate on apart."""

    x: Tensor
    y: Tensor
    validation_x: Tensor
    validation_y: Tensor

    @classmethod
    def of(cls, prepared: Prepared) -> "Held":
        """Return copies of a study's rows."""
        rows, split = prepared.rows, prepared.splits[0]
        own, held = (
            torch.from_numpy(index).to(rows.x.device)
            for index in (split.training, split.validation)
        )
        return cls(rows.x[own], rows.y[own], rows.x[held], rows.y[held])

    def to(self, memory_format: torch.memory_format) -> "Held":
        """Return the same rows, images with their channels where a network wants them."""
        x, validation_x = (
            part.contiguous(memory_format=memory_format) for part in (self.x, self.validation_x)
        )
        return replace(self, x=x, validation_x=validation_x)


class HandTuned:
    """One model, trained as fast as plain PyTorch goes.

    Rows lie in memory as tensors, batches are taken by index, the optimizer is fused, and host and
    device wait for each other once an epoch.
    """

    def __init__(
        self,
        network: Network,
        rows: Held,
        strengths: Strengths,
        *,
        memory_format: torch.memory_format = torch.contiguous_format,
        capturable: bool = False,
    ) -> None:
        """``capturable`` says whether a CUDA graph may hold the optimizer's step."""
        device = rows.x.device
        self._rows = rows.to(memory_format)
        self._model = network(strengths.dropout).to(device).to(memory_format=memory_format)
        self._threshold = LEARNING_RATE * strengths.l1_lambda
        self._weights = [p for p in self._model.parameters() if p.ndim > 1]
        others = [p for p in self._model.parameters() if p.ndim == 1]
        self._optimizer = torch.optim.AdamW(
            [
                {"params": self._weights, "weight_decay": strengths.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=LEARNING_RATE,
            fused=True,
            capturable=capturable,
        )

    def train_epoch(self) -> float:
        """Train for one epoch; return the validation loss after it."""
        self._model.train()
        order = torch.randperm(len(self._rows.y), device=self._rows.y.device)
        for index in order.split(BATCH_ROWS):
            self._step(index)
        return self._validate()

    def _step(self, index: Tensor) -> None:
        x, y = self._rows.x.index_select(0, index), self._rows.y.index_select(0, index)
        self._optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(self._model(x), y).backward()
        self._optimizer.step()
        if self._threshold:
            shrink_(self._weights, self._threshold)

    @torch.no_grad()
    def _validate(self) -> float:
        self._model.eval()
        total = self._rows.x.new_zeros(())
        rows = self._rows.validation_x.split(EVALUATION_ROWS)
        labels = self._rows.validation_y.split(EVALUATION_ROWS)
        for x, y in zip(rows, labels, strict=True):
            total += nn.functional.cross_entropy(self._model(x), y, reduction="sum")
        return total.item() / len(self._rows.validation_y)


class Captured(HandTuned):
    """The same with a whole step as one CUDA graph; all batches must be full."""

    def __init__(
        self,
        network: Network,
        rows: Held,
        strengths: Strengths,
        *,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        super().__init__(network, rows, strengths, memory_format=memory_format, capturable=True)
        self._index = torch.arange(BATCH_ROWS, device=rows.x.device)
        self._graph = torch.cuda.CUDAGraph()
        # As PyTorch's notes on CUDA graphs have it: some steps on another stream, then the capture.
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):
                super()._step(self._index)
        torch.cuda.current_stream().wait_stream(aside)
        with torch.cuda.graph(self._graph):
            super()._step(self._index)

    def _step(self, index: Tensor) -> None:
        self._index.copy_(index)
        self._graph.replay()


class Tutorial:
    """One model, trained as an introduction to PyTorch would."""

    def __init__(
        self,
        network: Network,
        data_dir: Path,
        training_rows: int,
        validation_rows: int,
        strengths: Strengths,
        device: torch.device,
    ) -> None:
        transform = transforms.Compose(
            [transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))]
        )
        data = MNIST(data_dir, train=True, transform=transform)
        numbers = range(training_rows + validation_rows)
        training = Subset(data, numbers[:training_rows])
        validation = Subset(data, numbers[training_rows:])
        self._training = DataLoader(training, batch_size=BATCH_ROWS, shuffle=True)
        self._validation = DataLoader(validation, batch_size=EVALUATION_ROWS)
        self._validation_rows = validation_rows
        self._device = device
        self._model = network(strengths.dropout).to(device)
        self._threshold = LEARNING_RATE * strengths.l1_lambda
        self._optimizer = torch.optim.AdamW(
            self._model.parameters(), lr=LEARNING_RATE, weight_decay=strengths.weight_decay
        )

    def train_epoch(self) -> float:
        """Train for one epoch; return the validation loss after it."""
        self._model.train()
        for x, y in self._training:
            x, y = x.to(self._device), y.to(self._device)
            self._optimizer.zero_grad()
            loss = nn.functional.cross_entropy(self._model(x), y)
            loss.backward()
            self._optimizer.step()
            shrink_([p for p in self._model.parameters() if p.ndim > 1], self._threshold)
        self._model.eval()
        total = 0.0
        with torch.no_grad():
            for x, y in self._validation:
                x, y = x.to(self._device), y.to(self._device)
                total += nn.functional.cross_entropy(self._model(x), y, reduction="sum").item()
        return total / self._validation_rows


@torch.no_grad()
def shrink_(weights: list[nn.Parameter], threshold: float) -> None:
    """Take the proximal step of L1."""
    for weight in weights:
        weight.sub_(weight.clamp(-threshold, threshold))


def mlp(dropout: float) -> nn.Module:
    """Build 784-128-10 with batch norm."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(784, 128, bias=False),
        nn.BatchNorm1d(128),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(128, CLASSES),
    )


def cnn(dropout: float, channels: int = 1, side: int = 28) -> nn.Module:
    """Build a small network of two convolutions with batch norm, for square images."""
    return nn.Sequential(
        *_convolution(channels, 16),
        *_convolution(16, 32),
        nn.Flatten(),
        nn.Linear(32 * (side // 4) ** 2, 64),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(64, CLASSES),
    )


def shortened(data: Data, rows: int, test_rows: int) -> Data:
    """Return a data set with its first rows alone."""
    return Data(
        data.train_x[:rows],
        data.train_y[:rows],
        data.test_x[:test_rows],
        data.test_y[:test_rows],
        data.classes,
    )


def _convolution(channels: int, wider: int) -> list[nn.Module]:
    return [
        nn.Conv2d(channels, wider, 3, padding=1),
        nn.BatchNorm2d(wider),
        nn.ReLU(),
        nn.MaxPool2d(2),
    ]
