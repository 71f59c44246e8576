"""Trains a small text-to-image teacher on scenes, and saves it as a stock StableDiffusion3Pipeline.

    python -m training.benchmarks.scenes.train_teacher --config training/configs/scenes_teacher.yaml

An SD3Transformer2DModel of the latents of `train_vae`, two CLIP text encoders and a T5 encoder learn together the
velocity noise - x_0 of rectified flow (Liu et al. 2022, arXiv 2209.03003), at noise levels sigma whose logit is normal
(Esser et al. 2024, arXiv 2403.03206). Some captions are replaced by "", for classifier-free guidance (Ho and Salimans
2022, arXiv 2207.12598). A token is a word of the captions. It is one process, a run is a function of its seed, and one
that is stopped continues with --resume_from_checkpoint latest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from hsivi_diffusers.commands.options import parse_options, run_command
from hsivi_diffusers.runs.options import option
from hsivi_diffusers.runs.output import Output

from ..images.scene_set import LONGEST
from ..images.scenes import GROUNDS, NAMES, RELATIONS, encode, make_scenes
from ..images.train_teacher import drop
from ..images.training_loop import Training, claimed_alone, fit

CLIP, T5 = ("text_encoder", "text_encoder_2"), "text_encoder_3"
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
WRITTEN = ("model_index.json", "transformer", "vae", *CLIP, T5, *TOKENIZERS, "scheduler")
SPECIAL = ["[pad]", "[start]", "[unknown]", "[end]"]  # an [end] with the number 2 would have another meaning to CLIP
WORDS = sorted({*" ".join([*NAMES, *RELATIONS, *GROUNDS, "a an on"]).split()})


@dataclass
class Text:
    _group = "text and latents"
    vae: str | None = option(None, "folder of the autoencoder, by train_vae")
    init_from: str | None = option(None, "teacher to go on from, a folder; by default its networks are new")
    num_scenes: int = option(65_536, "scenes to train on")
    width: int = option(160, "width of the transformer, a multiple of 32")
    num_layers: int = option(5, "its layers")
    text_width: int = option(64, "width of a CLIP encoder, half of that of the T5 encoder")
    text_layers: int = option(3, "layers of an encoder")
    caption_dropout: float = option(0.1, "share of the captions that are replaced by nothing")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a tokenizer that knows the words of captions, and has room for one."""
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[unknown]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = Lowercase(), Whitespace()
    ends = [(word, vocabulary[word]) for word in ("[start]", "[end]")]
    tokenizer.post_processor = TemplateProcessing(single="[start] $A [end]", special_tokens=ends)
    names = {"pad_token": "[pad]", "bos_token": "[start]", "eos_token": "[end]", "unk_token": "[unknown]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=LONGEST, **names)


def make_networks(options: Text, vae: AutoencoderKL, num_words: int) -> nn.ModuleDict:
    """Makes the transformer, and the text encoders that are trained along."""
    size = vae.config.sample_size // 2 ** (len(vae.config.block_out_channels) - 1)
    transformer = SD3Transformer2DModel(
        sample_size=size,
        in_channels=vae.config.latent_channels,
        out_channels=vae.config.latent_channels,
        num_layers=options.num_layers,
        attention_head_dim=32,
        num_attention_heads=options.width // 32,
        caption_projection_dim=options.width,
        joint_attention_dim=2 * options.text_width,
        pooled_projection_dim=2 * options.text_width,
        pos_embed_max_size=size // 2,
        qk_norm="rms_norm",
    )
    sizes: dict[str, Any] = {"hidden_size": options.text_width, "projection_dim": options.text_width}
    sizes |= {"intermediate_size": 4 * options.text_width, "num_attention_heads": 4, "vocab_size": num_words}
    sizes |= {"num_hidden_layers": options.text_layers, "max_position_embeddings": LONGEST}
    sizes |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 3}
    encoders: dict[str, nn.Module] = {name: CLIPTextModelWithProjection(CLIPTextConfig(**sizes)) for name in CLIP}
    width = 2 * options.text_width
    sizes = {"d_model": width, "d_ff": 2 * width, "d_kv": width // 4, "num_heads": 4, "vocab_size": num_words}
    sizes |= {"num_layers": options.text_layers, "feed_forward_proj": "gated-gelu", "dropout_rate": 0.0}
    encoders[T5] = T5EncoderModel(T5Config(**sizes, pad_token_id=0, eos_token_id=3))
    return nn.ModuleDict({"transformer": transformer, **encoders})


def load_networks(folder: str) -> nn.ModuleDict:
    """Loads the networks of a teacher."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, vae=None)
    return nn.ModuleDict({name: getattr(pipeline, name) for name in ("transformer", *CLIP, T5)})


def make_pipeline(
    vae: AutoencoderKL, tokenizer: PreTrainedTokenizerFast, networks: nn.ModuleDict
) -> StableDiffusion3Pipeline:
    """Puts the parts together."""
    tokenizers = dict.fromkeys(TOKENIZERS, tokenizer)
    return StableDiffusion3Pipeline(vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(), **tokenizers, **networks)


def embed(networks: nn.ModuleDict, tokens: Tensor) -> dict[str, Tensor]:
    """What the transformer is given of tokens (B, L), as the pipeline makes it."""
    found = [networks[name](tokens, output_hidden_states=True) for name in CLIP]
    states = torch.cat([each.hidden_states[-2] for each in found], dim=-1)
    pooled = torch.cat([each.text_embeds for each in found], dim=-1)
    states = torch.cat([states, networks[T5](tokens).last_hidden_state], dim=1)
    return {"encoder_hidden_states": states, "pooled_projections": pooled}


def main(args: list[str] | None = None) -> None:
    options, training, run = parse_options([Text, Training, Output], __doc__ or "", args=args)
    if not options.vae:
        raise ValueError("--vae is missing: give the folder of an autoencoder, by training.benchmarks.scenes.train_vae")
    with claimed_alone(run, training.seed) as accelerator:
        device = accelerator.device
        vae = AutoencoderKL.from_pretrained(options.vae).to(device).eval()
        tokenizer = make_tokenizer()
        start = options.init_from
        networks = load_networks(start) if start else make_networks(options, vae, len(tokenizer))
        images, scenes = make_scenes(options.num_scenes, training.seed)
        texts = ["", *(scene.caption for scene in scenes)]  # the first one replaces those that are dropped
        tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids.to(device)
        with accelerator.autocast():
            mean, std = encode(vae, images)
        frames = FlowMatchEulerDiscreteScheduler().config.num_train_timesteps

        def loss(networks: nn.ModuleDict) -> Tensor:
            row = torch.randint(len(mean), (training.train_batch_size,), device=device)
            clean = mean[row].float() + std[row].float() * torch.randn(mean[row].shape, device=device)
            noise, sigma = torch.randn_like(clean), torch.randn(len(clean), device=device).sigmoid()
            noisy = clean + sigma[:, None, None, None] * (noise - clean)
            with accelerator.autocast():
                text = embed(networks, tokens[drop(row + 1, options.caption_dropout, 0)])
                velocity = networks["transformer"](noisy, timestep=frames * sigma, **text).sample
            return mse_loss(velocity.float(), noise - clean)

        networks = fit(run, accelerator, training, [options], WRITTEN, loss, networks=networks)
        make_pipeline(vae, tokenizer, networks).save_pretrained(str(run.output_dir))


if __name__ == "__main__":
    run_command(main)
