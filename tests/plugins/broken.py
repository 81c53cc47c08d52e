"""A task whose own code goes wrong where its study says."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor, nn

from regtune.task import Data, Storage


@dataclass
class Broken:
    fault: Literal["data", "model", "loss", "label", "rows", "memory", "none"]

    def data(self, storage: Storage) -> Data:
        if self.fault == "data":
            raise FileNotFoundError("no recordings")
        x = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
        x[0, 0] = np.nan if self.fault == "rows" else 0
        y = (x[:, 1] > 0).astype(np.int64)
        return Data(x[:30], y[:30], x[30:], y[30:], classes=2)

    def model(self, input_shape: tuple[int, ...], outputs: int) -> nn.Module:
        if self.fault == "model":
            raise ValueError("no such width")
        if self.fault == "memory":
            raise MemoryError("no memory for this width")
        return nn.Linear(*input_shape, outputs)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        if self.fault == "loss":
            raise ZeroDivisionError("nothing to divide by")
        if self.fault == "label":
            raise ValueError("unknown label 'cat\0\0' in \udcff.csv")
        return nn.functional.cross_entropy(output, target, reduction="none")
