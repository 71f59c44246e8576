import re

import pytest
import torch

import train_classifier
from classifier import ImageClassifier
from images import load_images


def train(folder, *arguments):
    train_classifier.main(["--max_train_steps=3", "--train_batch_size=8", f"--output_dir={folder}", *arguments])
    return ImageClassifier.from_pretrained(folder)


def test_a_run_is_a_function_of_its_seed(tmp_path, same_tensors):
    weights = [train(tmp_path / str(run), f"--seed={seed}").state_dict() for run, seed in enumerate([0, 0, 1])]
    assert same_tensors(weights[0], weights[1])
    assert not same_tensors(weights[0], weights[2])


def test_it_learns_and_prints_the_accuracy_on_the_digits_held_out(tmp_path, capsys):
    settings = ["--max_train_steps=150", "--train_batch_size=64", "--learning_rate=1e-2"]
    model = train(tmp_path / "classifier", *settings)
    count, accuracy = re.fullmatch(r"accuracy on (\d+) held-out digits: ([\d.]+)\n", capsys.readouterr().out).groups()
    assert int(count) == 1797 // 5
    assert float(accuracy) > 0.7

    torch.manual_seed(0)
    held_out = torch.randperm(1797)[: 1797 // 5]
    images, labels = load_images("digits", resolution=8, channels=1)
    with torch.no_grad():
        right = model.logits(images[held_out].float() / 255).argmax(1) == labels[held_out]
    assert float(accuracy) == pytest.approx(right.float().mean().item(), abs=6e-4)


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 16)])
def test_features_and_logits_have_the_shape_of_the_config(channels, size):
    model = ImageClassifier(channels=channels, num_classes=4, num_features=6)
    images = torch.rand(2, channels, size, size)
    assert model(images).shape == (2, model.num_features) == (2, 6)
    assert model.logits(images).shape == (2, 4)
    torch.testing.assert_close(model.logits(images), model.head(model(images)))


def test_a_filled_output_folder_is_refused_unless_overwritten(tmp_path):
    (tmp_path / "precious").touch()
    with pytest.raises(ValueError, match="is not empty"):
        train(tmp_path)
    assert train(tmp_path, "--overwrite_output_dir").config.num_classes == 10


def test_help(check_help):
    check_help(train_classifier.main, "training")
