"""Pipelines of rectified-flow transformers of random weights, small enough for any test."""

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import CLIPTextModelWithProjection, T5Config, T5EncoderModel

from tiny_text import WIDTH, WORDS, make_clip, make_tokenizer


def make_vae(channels=4, **settings):
    """Latents of channels x 8 x 8 are images of 16x16."""
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=4,
        scaling_factor=1.5,
        shift_factor=0.1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        **settings,
    ).eval()


def make_t5(width=WIDTH):
    sizes = {"d_model": width, "d_kv": 8, "d_ff": WIDTH, "num_layers": 2, "num_heads": 2}
    return T5EncoderModel(T5Config(vocab_size=len(WORDS), pad_token_id=0, eos_token_id=2, **sizes)).eval()


def make_sd3():
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=16,
    )
    clip = CLIPTextModelWithProjection
    encoders = {"text_encoder": make_clip(clip), "text_encoder_2": make_clip(clip)}
    encoders["text_encoder_3"] = make_t5(2 * WIDTH)
    tokenizers = {name: make_tokenizer() for name in ("tokenizer", "tokenizer_2", "tokenizer_3")}
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return StableDiffusion3Pipeline(
        transformer=transformer, scheduler=scheduler, vae=make_vae(), **encoders, **tokenizers
    )


def make_flux(**settings):
    sizes = {"in_channels": 16, "num_layers": 1, "num_single_layers": 1, "joint_attention_dim": WIDTH}
    heads = {"attention_head_dim": 8, "num_attention_heads": 2, "axes_dims_rope": (2, 2, 4)}
    transformer = FluxTransformer2DModel(
        **sizes, **heads, pooled_projection_dim=WIDTH, **{"guidance_embeds": True, **settings}
    )
    encoders = {"text_encoder": make_clip(), "text_encoder_2": make_t5()}
    tokenizers = {"tokenizer": make_tokenizer(), "tokenizer_2": make_tokenizer()}
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return FluxPipeline(transformer=transformer, scheduler=scheduler, vae=make_vae(), **encoders, **tokenizers)


FLOWS = {"sd3": make_sd3, "flux": make_flux}


def make_flow(kind, **scheduler):
    """The weights do not depend on the order of the tests; those that start at 0 in diffusers are random too."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = FLOWS[kind]()
        for parameter in pipeline.transformer.eval().parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.05)
    if scheduler:
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler(**scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
