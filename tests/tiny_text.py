"""Text-to-image pipelines of random weights, small enough for any test: Stable Diffusion, SDXL and PixArt.

And SDXL as Playground 2.5 has it: of EDM, and with latents that have a mean and a standard deviation.
"""

import torch
from diffusers import (
    DDIMScheduler,
    EDMDPMSolverMultistepScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from tiny_dit import make_vae

WORDS = ["[pad]", "[start]", "[end]", "[unk]", "a", "red", "green", "blue", "cat", "dog", "star", "blurry"]
PROMPTS = ["a red cat", "a green dog", "a blue star"]
LENGTH, WIDTH = 8, 16  # tokens of a prompt; numbers of the embedding of one
MIDDLE = {"mid_block_type": "UNetMidBlock2DCrossAttn"}  # of a UNet, which has none where this is not given


def make_tokenizer():
    words = Tokenizer(WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="[unk]"))
    words.pre_tokenizer = Whitespace()
    words.post_processor = TemplateProcessing(single="[start] $A [end]", special_tokens=[("[start]", 1), ("[end]", 2)])
    special = {"pad_token": "[pad]", "bos_token": "[start]", "eos_token": "[end]", "unk_token": "[unk]"}
    return PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=LENGTH, **special)


def make_scheduler():
    """Of Stable Diffusion."""
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return DDIMScheduler(**betas, clip_sample=False, set_alpha_to_one=False, steps_offset=1)


def make_clip(kind=CLIPTextModel):
    sizes = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "projection_dim": WIDTH, "num_hidden_layers": 2}
    tokens = {"vocab_size": len(WORDS), "max_position_embeddings": LENGTH, "eos_token_id": 2}
    return kind(CLIPTextConfig(**sizes, **tokens, bos_token_id=1, pad_token_id=0, num_attention_heads=2)).eval()


def make_unet(width=WIDTH, channels=2, **settings):
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=width,
        **{"mid_block_type": None, **settings},
    ).eval()


def make_sd(channels=2, **of_unet):
    parts = {"vae": make_vae(channels), "text_encoder": make_clip(), "tokenizer": make_tokenizer()}
    parts["unet"] = make_unet(channels=channels, **of_unet)
    none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return StableDiffusionPipeline(**parts, scheduler=make_scheduler(), **none)


def make_sdxl(channels=2, **of_unet):
    unet = make_unet(
        2 * WIDTH,
        channels,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + WIDTH,
        **of_unet,
    )
    encoders = {"text_encoder": make_clip(), "text_encoder_2": make_clip(CLIPTextModelWithProjection)}
    tokenizers = {"tokenizer": make_tokenizer(), "tokenizer_2": make_tokenizer()}
    parts = {"vae": make_vae(channels), "unet": unet, "scheduler": make_scheduler()}
    return StableDiffusionXLPipeline(**parts, **encoders, **tokenizers)


def make_playground():
    pipeline = make_sdxl(channels=4)
    pipeline.scheduler = EDMDPMSolverMultistepScheduler()
    latents = {"latents_mean": [-1.6, 1.9, -1.4, 2.5], "latents_std": [8.5, 5.9, 6.5, 5.2], "scaling_factor": 0.5}
    pipeline.vae.register_to_config(**latents)
    return pipeline


def make_pixart():
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=2,
        out_channels=4,  # with a learned variance
        num_layers=2,
        cross_attention_dim=WIDTH,
        sample_size=8,
        caption_channels=WIDTH,
        use_additional_conditions=False,
    ).eval()
    sizes = {"d_model": WIDTH, "d_kv": 8, "d_ff": WIDTH, "num_layers": 2, "num_heads": 2}
    encoder = T5EncoderModel(T5Config(vocab_size=len(WORDS), pad_token_id=0, eos_token_id=2, **sizes)).eval()
    return PixArtAlphaPipeline(make_tokenizer(), encoder, make_vae(), transformer, make_scheduler())


KINDS = {"sd": make_sd, "sdxl": make_sdxl, "pixart": make_pixart}


def make_text(kind, **of_unet):
    """The weights do not depend on the order of the tests; those that start at 0 in diffusers are random too."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = make_playground() if kind == "playground" else KINDS[kind](**of_unet)
        for part in (pipeline.components.get("unet"), pipeline.components.get("transformer")):
            for parameter in part.parameters() if part else ():
                if not parameter.any():
                    torch.nn.init.normal_(parameter, std=0.05)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
