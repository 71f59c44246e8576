import re
import sys

import pytest
import torch

from hsivi_diffusers.vi.inference_data import inference_data, load_arviz


def test_variables_keep_names_shapes_and_numbers_as_one_chain():
    pytest.importorskip("arviz")
    samples = {"mu": torch.randn(5), "theta": torch.randn(5, 2, 3)}
    data = inference_data(samples, {"lp": torch.arange(5.0)}, {"pareto_k": 0.25})
    assert dict(data.posterior.sizes) == {"chain": 1, "draw": 5, "theta_dim_0": 2, "theta_dim_1": 3}
    for name, value in samples.items():
        assert torch.equal(torch.tensor(data.posterior[name].values[0]), value)
    assert data.sample_stats["lp"].values.tolist() == [[0, 1, 2, 3, 4]]
    assert data.sample_stats.attrs["pareto_k"] == 0.25
    assert data.posterior.attrs["inference_library"] == "hsivi_diffusers"


def test_without_statistics_there_is_no_such_group():
    pytest.importorskip("arviz")
    assert inference_data({"x": torch.zeros(3, 2)}, {}, {}).groups() == ["posterior"]


def test_a_missing_package_is_refused_in_one_line_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "arviz", None)
    message = 'to_arviz needs arviz, which is missing: pip install "hsivi-diffusers[inference]"'
    with pytest.raises(ImportError, match=f"^{re.escape(message)}$"):
        load_arviz()
