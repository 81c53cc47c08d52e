"""Two tones, heard through noise: which frequencies are they?

None of regtune's own tasks does this: sequences, a 1-D convolution, two targets a row, and a loss
and a score of its own.
"""

from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn
from torch.nn.functional import huber_loss

from regtune.task import Data, Storage

LENGTH = 64
LOWEST, HIGHEST = 2.0, 14.0
CLOSE = 1.0


@dataclass
class Waves:
    """Hear the frequencies of two tones, the lower one first, in a short noisy recording."""

    recordings: int = 400
    noise: float = 0.5
    width: int = 16

    def data(self, storage: Storage) -> Data:
        """Return recordings of one channel, and their two frequencies: the same at every call."""
        random = np.random.default_rng(0)
        rows = self.recordings + 1000  # the test is never short of rows
        frequency = np.sort(random.uniform(LOWEST, HIGHEST, (rows, 2)), axis=1)
        phase = random.uniform(0, 2 * np.pi, (rows, 2, 1))
        time = np.linspace(0, 2 * np.pi, LENGTH, endpoint=False)
        heard = np.sin(frequency[:, :, None] * time + phase).sum(axis=1, keepdims=True)
        x = (heard + random.normal(0, self.noise, heard.shape)).astype(np.float32)
        y = frequency.astype(np.float32)
        n = self.recordings
        return Data(x[:n], y[:n], x[n:], y[n:], classes=None)

    def model(self, input_shape: tuple[int, ...], outputs: int) -> nn.Module:
        """Return a convolution over time, from ``(rows, 1, time)`` to ``(rows, 2)``."""
        channels, width = input_shape[0], self.width
        return nn.Sequential(
            nn.Conv1d(channels, width, 9, padding=4),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.MaxPool1d(2),
            nn.Conv1d(width, width, 9, padding=4),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(),
            nn.Linear(width * LENGTH // 2, 2),
        )

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the Huber loss of each row, over both frequencies."""
        return huber_loss(output, target, reduction="none").mean(1)

    def score(self, output: Tensor, target: Tensor) -> Tensor:
        """Return 1 for each row whose frequencies are both close, and 0 for the others."""
        return ((output - target).abs() < CLOSE).all(1).to(output)
