"""Few-step sampling of pretrained diffusion models by hierarchical semi-implicit variational inference.

Names are imported on first use, so that `hsivi_diffusers.vi` loads torch alone.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .share.registration import register

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline as DiffusionPipeline
    from diffusers import ModelMixin as ModelMixin
    from diffusers import SchedulerMixin as SchedulerMixin

    from .distillation.config import HSIVIConfig as HSIVIConfig
    from .distillation.game import StudentCritic as StudentCritic
    from .distillation.game import StudentLayers as StudentLayers
    from .distillation.game import TeacherBridge as TeacherBridge
    from .distillation.trainer import HSIVITrainer as HSIVITrainer
    from .modeling_hsivi import HSIVINoiseScale as HSIVINoiseScale
    from .pipeline_hsivi import HSIVIPipeline as HSIVIPipeline
    from .scheduling_hsivi import HSIVIScheduler as HSIVIScheduler
    from .scheduling_hsivi import HSIVISchedulerOutput as HSIVISchedulerOutput
    from .share.push import push as push
    from .teachers.loading import load_teacher as load_teacher
    from .teachers.teacher import Teacher as Teacher

__version__ = "0.3.0"

# Each name with its module. A new name needs a line here and one above, for type checkers.
_MODULES = {
    # diffusers looks up the base classes of a saved component in this namespace; without them loading fails.
    "DiffusionPipeline": "diffusers",
    "ModelMixin": "diffusers",
    "SchedulerMixin": "diffusers",
    "HSIVIConfig": ".distillation.config",
    "HSIVINoiseScale": ".modeling_hsivi",
    "HSIVIPipeline": ".pipeline_hsivi",
    "HSIVIScheduler": ".scheduling_hsivi",
    "HSIVISchedulerOutput": ".scheduling_hsivi",
    "HSIVITrainer": ".distillation.trainer",
    "Teacher": ".teachers.teacher",
    "TeacherBridge": ".distillation.game",
    "StudentCritic": ".distillation.game",
    "StudentLayers": ".distillation.game",
    "load_teacher": ".teachers.loading",
    "push": ".share.push",
}

__all__ = [name for name in _MODULES if name != "HSIVITrainer"]  # `import *` works without the extra `train`


def __getattr__(name: str) -> Any:
    if name == "vi":
        return importlib.import_module(".vi", __name__)
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(_MODULES[name], __name__)
    except ModuleNotFoundError as error:
        extra = f'{name} needs {error.name}, which is missing: pip install "hsivi-diffusers[train]"'
        raise ImportError(extra, name=error.name) from error
    value = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})


register(__name__)
