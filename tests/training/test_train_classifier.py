import re
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from sklearn.neural_network import MLPClassifier

from hsivi_diffusers.evaluation.classifier import ImageClassifier
from hsivi_diffusers.evaluation.images import load_images
from training.benchmarks.images import train_classifier
from training.benchmarks.images.spaces import DenseFeatures

ASSETS = Path(__file__).parents[2] / "assets"


def train(folder, *arguments):
    train_classifier.main(["--max_train_steps=3", "--train_batch_size=8", f"--output_dir={folder}", *arguments])
    return ImageClassifier.from_pretrained(folder)


@pytest.fixture
def shades(tmp_path):
    """A folder of 20 images, with one subfolder per class."""
    for number in range(20):
        kind = tmp_path / "data" / ("dark", "light", "middle")[number % 3]
        kind.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 10 * number).save(kind / f"{number}.png")
    return f"--train_data={tmp_path / 'data'}"


def test_a_run_is_a_function_of_its_seed(shades, tmp_path, same_tensors, capsys):
    """And learns the classes of the subfolders."""
    models = [train(tmp_path / str(run), shades, f"--seed={seed}") for run, seed in enumerate([0, 0, 1])]
    first, again, other = (model.state_dict() for model in models)
    assert same_tensors(first, again)
    assert not same_tensors(first, other)
    assert models[0].config.num_classes == 3
    assert "accuracy on 4 held-out images of " in capsys.readouterr().out


def test_it_learns_and_prints_the_accuracy_on_the_digits_held_out(tmp_path, capsys):
    settings = ["--max_train_steps=80", "--train_batch_size=64", "--learning_rate=1e-2"]
    model = train(tmp_path / "classifier", *settings)
    count, accuracy = re.fullmatch(
        r"accuracy on (\d+) held-out images of digits: ([\d.]+)\n", capsys.readouterr().out
    ).groups()
    assert int(count) == 1797 // 5
    assert float(accuracy) > 0.7

    torch.manual_seed(0)
    held_out = torch.randperm(1797)[: 1797 // 5]
    images, labels = load_images("digits", resolution=8, channels=1)
    with torch.no_grad():
        right = model.logits(images[held_out].float() / 255).argmax(1) == labels[held_out]
    assert float(accuracy) == pytest.approx(right.float().mean().item(), abs=6e-4)


def test_images_without_labels_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(train_classifier, "load_images", lambda *given: (torch.zeros(2, 1, 8, 8), None))
    with pytest.raises(ValueError, match="--train_data cats has no labels: give a folder with one subfolder per class"):
        train(tmp_path, "--train_data=cats")


def test_a_family_is_on_one_side_of_the_split():
    families = torch.randint(50, (300,))
    families[:50] = torch.arange(50)
    held_out, rest = train_classifier.split(families)
    assert sorted([*held_out.tolist(), *rest.tolist()]) == list(range(300))
    assert len(families[held_out].unique()) == 10
    assert not {*families[held_out].tolist()} & {*families[rest].tolist()}


@pytest.mark.parametrize("halvings", [0, 2])
@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 16)])
def test_features_and_logits_have_the_shape_of_the_config(channels, size, halvings):
    model = ImageClassifier(channels=channels, num_classes=4, num_features=8, num_halvings=halvings)
    images = torch.rand(2, channels, size, size)
    assert model(images).shape == (2, model.num_features) == (2, 8)
    assert model.logits(images).shape == (2, 4)
    torch.testing.assert_close(model.logits(images), model.head(model(images)))


def test_the_features_of_the_mlp_are_the_last_hidden_layer_of_that_of_scikit_learn(monkeypatch):
    """What scikit-learn makes of them by its output layer are its probabilities."""
    models, fit = [], MLPClassifier.fit
    monkeypatch.setattr(MLPClassifier, "fit", lambda model, *given: models.append(model) or fit(model, *given))
    images, labels = torch.rand(60, 1, 8, 8), torch.arange(60) % 3
    dense = DenseFeatures(64)
    dense.load_state_dict(train_classifier.fit_mlp(images, labels))
    (model,) = models
    weight, bias = (torch.tensor(each[-1]).float() for each in (model.coefs_, model.intercepts_))
    with torch.no_grad():
        shares = (dense(images) @ weight + bias).softmax(1)
    wanted = torch.from_numpy(model.predict_proba(images.flatten(1).numpy())).float()
    torch.testing.assert_close(shares, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "channels", "size"), [("digits", 1, 8), ("fashion", 1, 32), ("emoji", 3, 32)])
def test_the_classifiers_in_assets_load_and_are_those_of_their_configs(name, channels, size):
    model = ImageClassifier.from_pretrained(ASSETS / f"{name}_classifier")
    assert model(torch.rand(2, channels, size, size)).shape == (2, model.config.num_features)
    path = ASSETS.parent / "training" / "configs" / f"{name}_classifier.yaml"
    if path.exists():
        settings = yaml.safe_load(path.read_text())
        assert settings["output_dir"] == f"assets/{name}_classifier"
        assert {key: settings[key] for key in ("channels", "num_features", "num_halvings")}.items() <= {
            **model.config
        }.items()
