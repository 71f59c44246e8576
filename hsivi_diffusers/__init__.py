"""Few-step sampling of pretrained diffusion models by hierarchical semi-implicit variational inference."""

# diffusers looks the base classes of a saved component up in this namespace: without them, loading fails.
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin

from .distillation import TeacherBridge, UNetCritic, UNetLayers, load_teacher
from .modeling_hsivi import HSIVINoiseScale
from .pipeline_hsivi import HSIVIPipeline
from .scheduling_hsivi import HSIVIScheduler, HSIVISchedulerOutput

__version__ = "0.1.0"

__all__ = [
    "DiffusionPipeline",
    "HSIVINoiseScale",
    "HSIVIPipeline",
    "HSIVIScheduler",
    "HSIVISchedulerOutput",
    "ModelMixin",
    "SchedulerMixin",
    "TeacherBridge",
    "UNetCritic",
    "UNetLayers",
    "load_teacher",
]
