"""What `HSIVIConfig.check` refuses, in one line."""

import pytest

from hsivi_diffusers import HSIVIConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        # choices
        ({"objective": "kl"}, "objective='kl' is unknown: choose one of 'SM', 'KL'"),
        ({"scoring": "Between"}, "scoring='Between' is unknown: choose one of 'own', 'random', 'between'"),
        ({"lr_scheduler": "piecewise_constant"}, "lr_scheduler=piecewise_constant: give one of linear, cosine"),
        # ranges
        ({"num_inference_steps": []}, r"num_inference_steps=\[\]: give one number of steps of at least 1"),
        ({"num_inference_steps": 0}, r"num_inference_steps=\[0\]: give one number of steps of at least 1"),
        ({"num_inference_steps": [2, 0]}, r"num_inference_steps=\[0, 2\]: give one number of steps of at least 1"),
        ({"num_inference_steps": [2, 4, 2]}, r"=\[2, 2, 4\]: .*several that differ, such as 1 2 4 8"),
        *(
            ({name: 0}, f"{name}=0: give a number of at least 1")
            for name in ("max_train_steps", "train_batch_size", "critic_updates", "gradient_accumulation_steps")
        ),
        ({"max_sequence_length": -3}, "max_sequence_length=-3: give a number of at least 1"),
        *(({name: 0}, f"{name}=0: give a") for name in ("checkpointing_steps", "checkpoints_total_limit")),
        *(({name: -1.0}, f"{name}=-1.0: give a number above 0") for name in ("learning_rate", "critic_learning_rate")),
        *(
            ({name: -3}, f"{name}=-3: give a number from 0 on")
            for name in ("lr_warmup_steps", "level_min", "num_pairs")
        ),
        *(({name: 1.0}, f"{name}=1.0: give a number from 0 to below 1") for name in ("ema_decay", "adam_beta1")),
        ({"validation_steps": -1}, "validation_steps=-1: give a number of at least 1, or 0 for no images"),
        ({"max_grad_norm": 0.0}, "max_grad_norm=0.0: give a number above 0, or leave it out"),
        ({"noise_eta": 1.5}, "noise_eta=1.5: give a number from 0 to 1"),
        ({"noise_eta": -0.1}, "noise_eta=-0.1: give a number from 0 to 1"),
        *(({"seed": seed}, f"seed={seed}: give a whole number from 0 to 4,294,967,295") for seed in (-3, 2**32)),
        ({"lora_rank": -1}, "lora_rank=-1: give a number from 0 on, or leave it out"),
        ({"guidance_scale": [2.0, 2.0]}, r"guidance_scale=\[2.0, 2.0\]: give numbers from 0 on that differ"),
        ({"guidance_scale": -1.0}, "guidance_scale=-1.0: give numbers from 0 on that differ, 1 for none"),
        ({"guidance_scale": float("nan")}, "guidance_scale=nan: give numbers from 0 on"),
        *(
            ({"class_shares": shares}, "class_shares=.*: give a number from 0 on for each class, not all 0")
            for shares in ([1e38, 1.0], [float("inf"), 1.0], [float("nan"), 1.0], [-1.0, 2.0], [0.0, 0.0])
        ),
        ({"critic_first": -1}, "critic_first=-1: give a number of updates from 0 to below max_train_steps=1000"),
        ({"critic_first": 1000}, "critic_first=1000: give a number of updates from 0 to below max_train_steps=1000"),
        ({"lr_warmup_steps": 1001}, "lr_warmup_steps=1001: give a number of updates up to max_train_steps=1000"),
        ({"max_train_steps": 60, "lr_warmup_steps": 61}, "lr_warmup_steps=61: .* up to max_train_steps=60"),
        # together
        ({"prompts": "nowhere.txt"}, "prompts='nowhere.txt' is no file"),
        ({"prompts": ["a"]}, "guidance_scale is missing: with prompts give one, such as 4.5, or 1 for none"),
        (
            {"prompts": ["a"], "guidance_scale": 1.0, "class_shares": [1.0, 2.0]},
            "2 numbers for 1 prompts: give as many",
        ),
        ({"decay_guidance": False}, "decay_guidance=False has no effect without a guidance_scale other than 1"),
        ({"decay_guidance": False, "guidance_scale": 1.0}, "decay_guidance=False has no effect"),
        ({"negative_prompt": "blurry"}, "negative_prompt='blurry' has no effect without prompts and a guidance_scale"),
        *(
            (
                {**given, "negative_prompt": "x"},
                "negative_prompt='x' has no effect without prompts and a guidance_scale",
            )
            for given in ({"guidance_scale": 3.0}, *({"prompts": ["a"], "guidance_scale": of} for of in (1.0, [1.0])))
        ),
        ({"prompts": "nowhere.txt", "guidance_scale": 2.0}, "prompts='nowhere.txt' is no file"),
        ({"num_pairs": 8, "noise_scale_type": "per_pixel"}, "'per_pixel' has nothing to learn from pairs"),
        (
            {"preset": "one_call"},
            r"preset=.one_call. with num_inference_steps=\[5\]: it is for 1 step: leave the preset",
        ),
        ({"noise_cutoff": 8.0}, "noise_cutoff=8.0 is of one step: leave it out, or set num_inference_steps to 1"),
        ({"noise_cutoff": -1.0, "num_inference_steps": 1}, "noise_cutoff=-1.0: give a number above 0, or leave it out"),
        ({"objective": "SM"}, "scoring='between' with objective='SM': .* set objective to 'KL', or scoring to 'random"),
        ({"preset": "paper", "noise_eta": 0.0}, "noise_eta=0, and outputs without noise have no score"),
        ({"noise_eta": 0.0, "scoring": "own"}, "noise_eta=0, and outputs without noise have no score: set objective"),
        (
            {"noise_eta": 0.0, "noise_scale_type": "per_pixel"},
            "noise_eta=0 leaves noise_scale_type='per_pixel' nothing",
        ),
        ({"preset": "paper", "level_min": 20}, "level_min=20 has no effect with scoring='own'"),
    ],
)
def test_what_cannot_run_is_refused(settings, message):
    with pytest.raises(ValueError, match=message) as refused:
        HSIVIConfig(**settings).check()
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"max_train_steps": 5},  # whose usual warm-up is longer
        {"max_train_steps": 60, "lr_warmup_steps": 60},
        {"class_shares": [1e20, 0.0, 1.0]},
        {"prompts": ["a", "b"], "guidance_scale": [1.0, 4.5], "class_shares": [1.0, 2.0], "negative_prompt": "c"},
        {"prompts": "default", "guidance_scale": 4.5, "class_shares": [1.0] * 3000},
        {"noise_eta": 0.0},
        {"preset": "paper", "scoring": "random", "level_min": 20},
    ],
)
def test_what_can_run_is_accepted(settings):
    HSIVIConfig(**settings).check()
