import re
import sys

import pytest

from training.benchmarks.images import bench_plan


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_it_compares_the_plan_with_the_peak_of_an_update(text_teachers, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a red cat")
    given = ["--train_batch_size=1", "--num_inference_steps=2", "--guidance_scale=2"]
    given += [f"--prompts={tmp_path / 'prompts.txt'}"]
    bench_plan.main([f"--pretrained_teacher_model={text_teachers('sd')}", *given, "--critic_updates=1"])
    told = re.fullmatch(r"planned (\d+), measured (\d+) MiB, ratio (\d\.\d\d)\n", capsys.readouterr().out)
    planned, measured, ratio = map(float, told.groups())
    assert 50 < measured < 8000
    assert ratio == pytest.approx(planned / measured, abs=0.01)
