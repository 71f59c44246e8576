"""Few-step sampling of pretrained diffusion models by hierarchical semi-implicit variational inference."""

import sys

import diffusers

# diffusers looks the base classes of a saved component up in this namespace: without them, loading fails.
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin

from .distillation.bridge import TeacherBridge
from .distillation.denoisers import load_teacher
from .distillation.student import LayerNoiseScale, UNetCritic, UNetLayers
from .hub import push
from .modeling_hsivi import HSIVINoiseScale
from .pipeline_hsivi import HSIVIPipeline
from .scheduling_hsivi import HSIVIScheduler, HSIVISchedulerOutput

__version__ = "0.1.0"

# Where diffusers looks up the names of a saved pipeline: "hsivi_diffusers" among its own pipeline modules, the class of
# the pipeline in its namespace. Without these, DiffusionPipeline.from_pretrained and every repo of the Hub are refused.
diffusers.pipelines.hsivi_diffusers = sys.modules[__name__]
diffusers.HSIVIPipeline = HSIVIPipeline

__all__ = [
    "DiffusionPipeline",
    "HSIVINoiseScale",
    "HSIVIPipeline",
    "HSIVIScheduler",
    "HSIVISchedulerOutput",
    "LayerNoiseScale",
    "ModelMixin",
    "SchedulerMixin",
    "TeacherBridge",
    "UNetCritic",
    "UNetLayers",
    "load_teacher",
    "push",
]
