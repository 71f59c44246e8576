"""Trains a small text-to-image teacher on captioned emoji, and saves it as a stock StableDiffusionPipeline.

    python -m training.benchmarks.text.train_text_teacher --config training/configs/emoji_text.yaml

A UNet2DConditionModel of the latents of `train_vae` and a CLIPTextModel learn together to predict the velocity alpha
noise - sigma x_0 (Salimans and Ho 2022, arXiv 2202.00512) on the clock of Stable Diffusion. Some captions are replaced
by "", for classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598), and those of `hold_out` are not trained. A
prompt is a caption, or a word that several of them share (`captions.pair`); a token is a word of the captions. It is
one process, a run is a function of its seed, and one that is stopped continues with --resume_from_checkpoint latest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from hsivi_diffusers import HSIVIScheduler
from hsivi_diffusers.commands.options import parse_options, run_command
from hsivi_diffusers.evaluation.images import to_model_range
from hsivi_diffusers.runs.options import option
from hsivi_diffusers.runs.output import Output

from ..images.captions import encode, load_captioned, pair
from ..images.train_teacher import drop, target
from ..images.training_loop import Training, claimed_alone, fit

WRITTEN = ("model_index.json", "unet", "vae", "text_encoder", "tokenizer", "scheduler")
SPECIAL = ["[pad]", "[start]", "[end]", "[unknown]"]
CLOCK = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@dataclass
class Text:
    _group = "text and latents"
    vae: str | None = option(None, "folder of the autoencoder, by train_vae")
    init_from: str | None = option(None, "teacher to go on from, a folder; by default UNet and text encoder are new")
    block_out_channels: list[int] = option([48, 96, 128], "width of each level of the UNet; all but the first attend")
    text_width: int = option(128, "width of the text encoder")
    text_layers: int = option(2, "its layers")
    tokens: int = option(24, "tokens of a caption, longer ones are cut")
    caption_dropout: float = option(0.1, "share of the captions that are replaced by nothing")


def make_tokenizer(captions: Sequence[str], tokens: int) -> PreTrainedTokenizerFast:
    """Returns a tokenizer that knows the words of captions."""
    split = Whitespace()
    words = sorted({word for caption in captions for word, _ in split.pre_tokenize_str(caption.lower())})
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=SPECIAL[3]))
    tokenizer.normalizer, tokenizer.pre_tokenizer = Lowercase(), split
    ends = [(SPECIAL[1], 1), (SPECIAL[2], 2)]
    tokenizer.post_processor = TemplateProcessing(single=f"{SPECIAL[1]} $A {SPECIAL[2]}", special_tokens=ends)
    names = ("pad_token", "bos_token", "eos_token", "unk_token")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=tokens, **dict(zip(names, SPECIAL, strict=True))
    )


def make_networks(options: Text, vae: AutoencoderKL, num_words: int) -> nn.ModuleDict:
    """Makes the UNet, and the text encoder that is trained along."""
    levels, width = len(options.block_out_channels), options.text_width
    unet = UNet2DConditionModel(
        sample_size=vae.config.sample_size // 2 ** (len(vae.config.block_out_channels) - 1),
        in_channels=vae.config.latent_channels,
        out_channels=vae.config.latent_channels,
        block_out_channels=tuple(options.block_out_channels),
        down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * (levels - 1)),
        up_block_types=(*["CrossAttnUpBlock2D"] * (levels - 1), "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=4,
        cross_attention_dim=width,
    )
    sizes: dict[str, Any] = {"hidden_size": width, "intermediate_size": 4 * width, "projection_dim": width}
    sizes |= {"num_hidden_layers": options.text_layers, "num_attention_heads": 4, "vocab_size": num_words}
    sizes |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": options.tokens}
    return nn.ModuleDict({"unet": unet, "text_encoder": CLIPTextModel(CLIPTextConfig(**sizes))})


def load_networks(folder: str, tokenizer: PreTrainedTokenizerFast) -> nn.ModuleDict:
    """Loads UNet and text encoder of a teacher.

    Raises:
        ValueError: It has other words than the tokenizer.
    """
    if PreTrainedTokenizerFast.from_pretrained(folder, subfolder="tokenizer").get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"--init_from {folder} has other words than these captions: name another, or leave it out")
    parts = {"unet": UNet2DConditionModel, "text_encoder": CLIPTextModel}
    return nn.ModuleDict({name: part.from_pretrained(folder, subfolder=name) for name, part in parts.items()})


def make_pipeline(
    vae: AutoencoderKL, tokenizer: PreTrainedTokenizerFast, networks: nn.ModuleDict
) -> StableDiffusionPipeline:
    """Puts the parts together, with the scheduler of Stable Diffusion."""
    stock = DDIMScheduler(
        **CLOCK, prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )
    none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return StableDiffusionPipeline(vae=vae, tokenizer=tokenizer, scheduler=stock, **networks, **none)


def main(args: list[str] | None = None) -> None:
    options, training, run = parse_options([Text, Training, Output], __doc__ or "", args=args)
    if not options.vae:
        raise ValueError("--vae is missing: give the folder of an autoencoder, by training.benchmarks.text.train_vae")
    with claimed_alone(run, training.seed) as accelerator:
        device = accelerator.device
        vae = AutoencoderKL.from_pretrained(options.vae).to(device).eval()
        images, captions = load_captioned(vae.config.sample_size)
        prompts, rows, numbers = pair(captions)
        tokenizer = make_tokenizer(captions, options.tokens)
        start = options.init_from
        networks = load_networks(start, tokenizer) if start else make_networks(options, vae, len(tokenizer))
        texts = ["", *prompts]  # the first one replaces those that are dropped
        tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids.to(device)
        mean, std = encode(vae, to_model_range(images).to(device))
        schedule = HSIVIScheduler(**CLOCK, prediction_type="v_prediction")

        def loss(networks: nn.ModuleDict) -> Tensor:
            chosen = torch.randint(len(rows), (training.train_batch_size,))
            row, number = rows[chosen].to(device), numbers[chosen].to(device)
            clean = mean[row] + std[row] * torch.randn_like(mean[row])
            noise, level = torch.randn_like(clean), torch.randint(len(schedule), (len(clean),), device=device)
            with accelerator.autocast():
                states = networks["text_encoder"](tokens[drop(number + 1, options.caption_dropout, 0)])[0]
                velocity = networks["unet"](schedule.diffuse(clean, noise, level), level, states).sample
            return mse_loss(velocity.float(), target(schedule, clean, noise, level))

        networks = fit(run, accelerator, training, [options], WRITTEN, loss, networks=networks)
        make_pipeline(vae, tokenizer, networks).save_pretrained(str(run.output_dir))


if __name__ == "__main__":
    run_command(main)
