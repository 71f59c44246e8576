"""Pipelines of rectified-flow transformers of random weights, small enough for any test."""

import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    ChromaPipeline,
    ChromaTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
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
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralVisionConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
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
        in_channels=16,
        out_channels=16,
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
        transformer=transformer, scheduler=scheduler, vae=make_vae(16), **encoders, **tokenizers
    )


def make_flux(**settings):
    sizes = {"in_channels": 16, "num_layers": 1, "num_single_layers": 1, "joint_attention_dim": WIDTH}
    heads = {"attention_head_dim": 8, "num_attention_heads": 2, "axes_dims_rope": (2, 2, 4)}
    sizes |= {"pooled_projection_dim": WIDTH, "guidance_embeds": True, **settings}
    transformer = FluxTransformer2DModel(**sizes, **heads)
    encoders = {"text_encoder": make_clip(), "text_encoder_2": make_t5()}
    tokenizers = {"tokenizer": make_tokenizer(), "tokenizer_2": make_tokenizer()}
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return FluxPipeline(transformer=transformer, scheduler=scheduler, vae=make_vae(), **encoders, **tokenizers)


def make_chroma():
    sizes = {"in_channels": 16, "num_layers": 1, "num_single_layers": 1, "joint_attention_dim": WIDTH}
    heads = {"attention_head_dim": 8, "num_attention_heads": 2, "axes_dims_rope": (2, 2, 4)}
    approximator = {"approximator_num_channels": 8, "approximator_hidden_dim": 16, "approximator_layers": 1}
    transformer = ChromaTransformer2DModel(**sizes, **heads, **approximator)
    parts = {"text_encoder": make_t5(), "tokenizer": make_tokenizer(), "vae": make_vae()}
    return ChromaPipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), **parts
    )


def make_qwen():
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(2, 2, 4),
    )
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[-0.7, 0.1, 0.4, 0.0],
        latents_std=[2.8, 1.4, 2.3, 1.0],
    )
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_shift=0.9, shift_terminal=0.02)
    return QwenImagePipeline(scheduler, vae.eval(), make_qwen_encoder(), make_tokenizer(), transformer)


def make_qwen_encoder():
    sizes = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 2, "vocab_size": len(WORDS)}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": WIDTH}
    config = Qwen2_5_VLConfig(text_config={**sizes, **heads, **rope, **tokens}, vision_config=vision)
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def make_flux2_vae():
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
    )
    torch.nn.init.uniform_(vae.bn.running_mean, -1, 1)
    torch.nn.init.uniform_(vae.bn.running_var, 0.5, 2)
    return vae.eval()


def make_flux2_transformer(**settings):
    sizes = {"in_channels": 16, "num_layers": 1, "num_single_layers": 2, "joint_attention_dim": 3 * WIDTH}
    heads = {"attention_head_dim": 8, "num_attention_heads": 2, "axes_dims_rope": (2, 2, 2, 2)}
    return Flux2Transformer2DModel(**sizes, **heads, timestep_guidance_channels=16, **settings)


def decoder_sizes(layers):
    """The pipelines of FLUX.2 take hidden states of three layers of a language model, by number."""
    sizes = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": layers, "head_dim": 8}
    return {**sizes, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": len(WORDS), "pad_token_id": 0}


def make_flux2(**settings):
    vision = PixtralVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=32, patch_size=16
    )
    encoder = Mistral3Config(vision_config=vision, text_config=MistralConfig(**decoder_sizes(30)), image_token_index=3)
    tokenizer = make_tokenizer()  # of a PixtralProcessor, which needs torchvision
    tokenizer.chat_template = "{% for message in messages %}{{ message.content[0].text }} {% endfor %}"
    return Flux2Pipeline(
        transformer=make_flux2_transformer(**settings),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=make_flux2_vae(),
        text_encoder=Mistral3ForConditionalGeneration(encoder).eval(),
        tokenizer=tokenizer,
    )


def make_klein(**settings):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }} {% endfor %}"
    return Flux2KleinPipeline(
        transformer=make_flux2_transformer(guidance_embeds=False),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=make_flux2_vae(),
        text_encoder=Qwen3ForCausalLM(Qwen3Config(**decoder_sizes(27))).eval(),
        tokenizer=tokenizer,
        **settings,
    )


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
    "chroma": make_chroma,
    "qwen": make_qwen,
    "flux2": make_flux2,
    "klein": make_klein,
    "auraflow": make_auraflow,
    "sana": make_sana,
    "lumina2": make_lumina2,
    "zimage": make_zimage,
}
# Their pipelines send no `mu` to the scheduler, which so can have no shift that depends on the size.
OF_ANY_SIZE = ("auraflow", "sana")


def size_of(pipeline):
    """Height and width of images of 8 x 12 latents.

    The pipeline of Sana takes multiples of 32 alone, that of Lumina 2 has 8 pixels a latent, whatever its VAE has.
    """
    return [64, 96] if isinstance(pipeline, SanaPipeline | Lumina2Pipeline) else [16, 24]


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
