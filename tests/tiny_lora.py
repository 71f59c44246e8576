"""LoRAs of random weights in the notations of published ones.

Those of LCM-LoRA and DMD2 have kohya's names, rank 64 and an alpha, of DMD2 8, on the modules of our adapter
(`get_module_kohya_state_dict` of diffusers' example train_lcm_distill_lora_sd_wds.py; main/sdxl/extract_lora_module.py
of github.com/tianweiy/DMD2). That of Hyper-SD for FLUX has diffusers' names and further modules, such as
norm_out.linear (github.com/invoke-ai/InvokeAI, issue 8415).
"""

import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file

from hsivi_diffusers import load_teacher
from hsivi_diffusers.teachers.adapters import in_file


def write_lora(pipeline, path, rank, further=(), alpha=8.0, ranks=None):
    """Writes a LoRA for the network of a pipeline, with kohya's names where diffusers reads those.

    Args:
        pipeline: Of diffusers.
        path: Of the file, which is returned.
        rank: Of most modules.
        further: Modules beside those of our adapter.
        alpha: Of all modules, where the names are kohya's.
        ranks: By the ends of names of modules, of others.
    """
    teacher = load_teacher(pipeline)
    network, targets = teacher.network, [*teacher.adapter.targets, *further]
    network.add_adapter(LoraConfig(r=rank, target_modules=targets, rank_pattern=ranks or {}))
    weights = {name: torch.randn_like(each) / 4 for name, each in get_peft_model_state_dict(network).items()}
    weights = in_file(weights, teacher.adapter.prefix)
    weights |= {name: torch.tensor(alpha) for name in weights if name.endswith(".alpha")}
    save_file(weights, path)
    return path
