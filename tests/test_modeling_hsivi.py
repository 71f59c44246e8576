import pytest
import torch

from hsivi_diffusers import HSIVINoiseScale


def test_it_starts_at_one_and_is_the_exponential_of_its_parameter():
    noise_scale = HSIVINoiseScale(sample_shape=(1, 8, 8))
    assert torch.equal(noise_scale(), torch.ones(1, 1, 8, 8))
    with torch.no_grad():
        noise_scale.log_scale.fill_(-1.0)
    torch.testing.assert_close(noise_scale(), torch.full((1, 1, 8, 8), 0.36787944))


def test_it_survives_saving_as_safetensors(tmp_path):
    noise_scale = HSIVINoiseScale(sample_shape=(3, 4, 5))
    torch.nn.init.normal_(noise_scale.log_scale)
    noise_scale.save_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors", ".py"}
    assert torch.equal(HSIVINoiseScale.from_pretrained(tmp_path)(), noise_scale())


@pytest.mark.parametrize("shape", [(), (3, 0, 8), (3, 8.5, 8)])
def test_shapes_that_are_none_are_refused(shape):
    with pytest.raises(ValueError, match="give positive integers"):
        HSIVINoiseScale(sample_shape=shape)


def test_it_writes_no_pickle(tmp_path):
    with pytest.raises(ValueError, match="would write pickles"):
        HSIVINoiseScale(sample_shape=(1, 8, 8)).save_pretrained(tmp_path, safe_serialization=False)
    assert not list(tmp_path.iterdir())
