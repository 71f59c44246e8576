"""Pipelines of rectified-flow transformers of random weights, small enough for any test."""

import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderDC,
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import (
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
)

from tiny_text import WIDTH, WORDS, make_clip, make_tokenizer


def make_vae(channels=4, blocks=2, **settings):
    """With 2 blocks latents of channels x 8 x 8 are images of 16x16, with 4 of 64x64."""
    return AutoencoderKL(
        block_out_channels=(8,) * blocks,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
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


def make_auraflow():
    transformer = AuraFlowTransformer2DModel(
        sample_size=8,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        caption_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=64,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.73)
    return AuraFlowPipeline(make_plain_tokenizer(), make_t5(), make_vae(), transformer, scheduler)


def make_plain_tokenizer():
    """Without types of tokens, which the encoders of language models do not take."""
    tokenizer = make_tokenizer()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    return tokenizer


def sizes_of_language_model():
    sizes = {"vocab_size": len(WORDS), "hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    return {**sizes, **heads, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def make_sana():
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=8,  # with a learned variance
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=WIDTH,
        sample_size=8,
        timestep_scale=0.5,
    )
    vae = AutoencoderDC(
        latent_channels=4,
        encoder_block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        encoder_layers_per_block=(1,) * 4,
        decoder_layers_per_block=(1,) * 4,
        encoder_qkv_multiscales=((),) * 4,
        decoder_qkv_multiscales=((),) * 4,
        scaling_factor=1.5,
    ).eval()
    encoder = Gemma2Model(Gemma2Config(**sizes_of_language_model())).eval()
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return SanaPipeline(make_plain_tokenizer(), encoder, vae, transformer, scheduler)


def make_lumina2():
    transformer = Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=16,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=8,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(300, 16, 16),
        cap_feat_dim=WIDTH,
    )
    encoder = Gemma2Model(Gemma2Config(**sizes_of_language_model())).eval()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=6.0)
    return Lumina2Pipeline(transformer, scheduler, make_vae(blocks=4), encoder, make_plain_tokenizer())


def make_zimage():
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=16,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        axes_dims=(4, 2, 2),
        axes_lens=(576, 16, 16),
    )
    tokenizer = make_plain_tokenizer()
    # The network pads to multiples of 32 tokens: prompts of three words become 64, those of one become 32.
    tokenizer.chat_template = "{{ 'a ' * 28 }}{{ messages[0]['content'] }}"
    encoder = Qwen3Model(Qwen3Config(**sizes_of_language_model())).eval()
    return ZImagePipeline(FlowMatchEulerDiscreteScheduler(shift=6.0), make_vae(), encoder, tokenizer, transformer)


FLOWS = {
    "sd3": make_sd3,
    "flux": make_flux,
    "auraflow": make_auraflow,
    "sana": make_sana,
    "lumina2": make_lumina2,
    "zimage": make_zimage,
}
# Height and width of images of 8 x 12 latents: the pipeline of Sana takes multiples of 32 alone, that of Lumina 2 has
# 8 pixels for each latent, whatever its VAE has.
SIZES = {"sana": [64, 96], "lumina2": [64, 96]}
USUAL_SIZE = [16, 24]
# Their pipelines send no `mu` to the scheduler, which so can have no shift that depends on the size.
OF_ANY_SIZE = ("auraflow", "sana")


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
