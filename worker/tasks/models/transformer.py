"""A small vision transformer.

A. Dosovitskiy et al., An Image is Worth 16x16 Words, ICLR 2021, arXiv 2010.11929, in the plain form
of L. Beyer, X. Zhai and A. Kolesnikov, arXiv 2205.01580: fixed position embeddings of sines and
cosines, and the mean over all tokens in place of a token for the class.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from regtune.errors import InvalidData
from regtune.spec import VitTinySettings
from worker.tasks.models.layers import check_images

_LONGEST_WAVE = 10_000.0


def vit_tiny(settings: Mapping[str, Any], input_shape: tuple[int, ...], outputs: int) -> nn.Module:
    """Build a vision transformer on square patches.

    Settings: ``VitTinySettings``. Raises InvalidData for rows that are no images, or that patches
    of this size do not fill.
    """
    asked = VitTinySettings.model_validate(settings)
    channels, height, width = check_images("vit_tiny", input_shape)
    if height % asked.patch or width % asked.patch:
        raise InvalidData(
            f"task.patch: images of {height} × {width} do not divide into patches of "
            f"{asked.patch} × {asked.patch}"
        )
    return VisionTransformer(asked, channels, height // asked.patch, width // asked.patch, outputs)


class VisionTransformer(nn.Module):
    """From images ``(B, channels, height, width)`` to outputs; T tokens of D features between."""

    positions: Tensor

    def __init__(
        self, asked: VitTinySettings, channels: int, rows: int, columns: int, outputs: int
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, asked.width, asked.patch, stride=asked.patch)
        self.register_buffer("positions", _positions(rows, columns, asked.width))
        self.dropout = nn.Dropout()
        self.blocks = nn.Sequential(*(Block(asked) for _ in range(asked.depth)))
        self.norm = nn.LayerNorm(asked.width)
        self.head = nn.Linear(asked.width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Return outputs ``(B, outputs)``."""
        tokens_BTD = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        tokens_BTD = self.norm(self.blocks(self.dropout(tokens_BTD)))
        outputs: Tensor = self.head(tokens_BTD.mean(1))
        return outputs


class Block(nn.Module):
    """Attention and an MLP, each behind a layer norm and added to what came in."""

    def __init__(self, asked: VitTinySettings) -> None:
        super().__init__()
        hidden = asked.width * asked.mlp_ratio
        self.attention = nn.Sequential(
            nn.LayerNorm(asked.width), Attention(asked.width, asked.heads), nn.Dropout()
        )
        self.mlp = nn.Sequential(
            nn.LayerNorm(asked.width),
            nn.Linear(asked.width, hidden),
            nn.GELU(),
            nn.Dropout(),
            nn.Linear(hidden, asked.width),
            nn.Dropout(),
        )

    def forward(self, tokens_BTD: Tensor) -> Tensor:
        """Map tokens to tokens."""
        tokens_BTD = tokens_BTD + self.attention(tokens_BTD)
        mixed: Tensor = tokens_BTD + self.mlp(tokens_BTD)
        return mixed


class Attention(nn.Module):
    """Self-attention by plain matrix products, with dropout of what a token attends to."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.dropout = nn.Dropout()
        self.out = nn.Linear(width, width)

    def forward(self, tokens_BTD: Tensor) -> Tensor:
        """Map tokens to tokens; H heads of F features."""
        qkv_BT3HF = self.qkv(tokens_BTD).unflatten(2, (3, self.heads, -1))
        query_BHTF, key_BHTF, value_BHTF = qkv_BT3HF.permute(2, 0, 3, 1, 4)
        scores_BHTT = query_BHTF @ key_BHTF.transpose(-2, -1) * query_BHTF.shape[-1] ** -0.5
        attended_BHTF = self.dropout(scores_BHTT.softmax(-1)) @ value_BHTF
        out: Tensor = self.out(attended_BHTF.transpose(1, 2).flatten(2))
        return out


def _positions(rows: int, columns: int, width: int) -> Tensor:
    """Return embeddings of the places of a grid, a row after the other: ``(T, width)``."""
    frequency = _LONGEST_WAVE ** -(torch.arange(width // 4) / max(1, width // 4 - 1))
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    angles = [place.flatten()[:, None] * frequency for place in (x, y)]
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)
