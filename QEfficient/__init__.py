"""QEfficient: any Hugging Face transformer as a compiled ONNX package.

    from QEfficient import QEFFAutoModelForCausalLM

    model = QEFFAutoModelForCausalLM.from_pretrained("path/or/hub-id")
    model.compile(ctx_len=512)
    print(model.generate(prompts=["Once upon a time"], generation_len=64).texts[0])

Names are imported when first used, so that importing this package is quick and needs neither torch nor transformers.
"""

import importlib
from typing import TYPE_CHECKING, Any

from QEfficient.version import __version__

if TYPE_CHECKING:
    from QEfficient.api import compile, export, transform
    from QEfficient.engine.package import LoadedPackage
    from QEfficient.engine.package import open_package as load
    from QEfficient.engine.results import GenerationResult
    from QEfficient.finetune.arguments import QEffTrainingArgs
    from QEfficient.finetune.config import QEffConfig
    from QEfficient.models.auto import (
        QEFFAutoModel,
        QEFFAutoModelForCausalLM,
        QEFFAutoModelForSequenceClassification,
    )
    from QEfficient.models.base import QEFFBaseModel, QEFFTransformersBase
    from QEfficient.models.peft import QEFFAutoPeftModelForCausalLM
    from QEfficient.targets.options import CompileOptions
    from QEfficient.transforms.onnx.base import OnnxTransform

#: Public name -> where it lives.
_PUBLIC = {
    "QEFFAutoModel": "QEfficient.models.auto:QEFFAutoModel",
    "QEFFAutoModelForCausalLM": "QEfficient.models.auto:QEFFAutoModelForCausalLM",
    "QEFFAutoModelForSequenceClassification": "QEfficient.models.auto:QEFFAutoModelForSequenceClassification",
    "QEFFAutoPeftModelForCausalLM": "QEfficient.models.peft:QEFFAutoPeftModelForCausalLM",
    "QEffConfig": "QEfficient.finetune.config:QEffConfig",
    "QEffTrainingArgs": "QEfficient.finetune.arguments:QEffTrainingArgs",
    # The class of the fine-tuning workflow; it has the package's name, as the documents it comes from do.
    "QEfficient": "QEfficient.finetune.refine:QEfficient",
    "QEFFBaseModel": "QEfficient.models.base:QEFFBaseModel",
    "QEFFTransformersBase": "QEfficient.models.base:QEFFTransformersBase",
    "CompileOptions": "QEfficient.targets.options:CompileOptions",
    "GenerationResult": "QEfficient.engine.results:GenerationResult",
    "LoadedPackage": "QEfficient.engine.package:LoadedPackage",
    "OnnxTransform": "QEfficient.transforms.onnx.base:OnnxTransform",
    "compile": "QEfficient.api:compile",
    "export": "QEfficient.api:export",
    "load": "QEfficient.engine.package:open_package",
    "transform": "QEfficient.api:transform",
}

__all__ = [
    "CompileOptions",
    "GenerationResult",
    "LoadedPackage",
    "OnnxTransform",
    "QEFFAutoModel",
    "QEFFAutoModelForCausalLM",
    "QEFFAutoModelForSequenceClassification",
    "QEFFAutoPeftModelForCausalLM",
    "QEFFBaseModel",
    "QEFFTransformersBase",
    "QEffConfig",
    "QEffTrainingArgs",
    "QEfficient",
    "__version__",
    "compile",
    "export",
    "load",
    "transform",
]


def __getattr__(name: str) -> Any:
    place = _PUBLIC.get(name)
    if place is None:
        # Not our suggestion helper: hasattr() probes must stay cheap.
        raise AttributeError(f"module 'QEfficient' has no attribute {name!r}")
    module, _, attribute = place.partition(":")
    value = getattr(importlib.import_module(module), attribute)
    # `export` is also the name of a room: bind the function before a submodule import can take the name.
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
