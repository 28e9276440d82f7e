"""Fine-tuning through a compiled ONNX training step: configuration, data, step, trainer.

Names are imported when first used, so that importing this package needs neither torch nor transformers.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from QEfficient.finetune.arguments import QEffTrainingArgs
    from QEfficient.finetune.arguments import QEffTrainingArgs as QEffTrainingArguments
    from QEfficient.finetune.compiled_step import CompiledStep
    from QEfficient.finetune.config import QEffConfig
    from QEfficient.finetune.data.named import register_dataset
    from QEfficient.finetune.data_functions import (
        device_aware_data_loading,
        get_custom_data_collator,
        get_dataloader_kwargs,
        get_longest_seq_length,
        get_preprocessed_dataset,
        padding_dataset,
    )
    from QEfficient.finetune.data_manager import QEffDataManager
    from QEfficient.finetune.dataset_config import generate_dataset_config
    from QEfficient.finetune.model_manager import QEffModelManager
    from QEfficient.finetune.native import PackageTrainer
    from QEfficient.finetune.onnx_utils import ONNXModel
    from QEfficient.finetune.qaic_utils import QAICCompiler, QAICLoader
    from QEfficient.finetune.refine import QEfficient
    from QEfficient.finetune.step_package import StepOptions
    from QEfficient.finetune.step_session import StepSession
    from QEfficient.finetune.trainer import QEffTrainer

#: Public name -> where it lives.
_PUBLIC = {
    "CompiledStep": "QEfficient.finetune.compiled_step:CompiledStep",
    "PackageTrainer": "QEfficient.finetune.native:PackageTrainer",
    "QAICCompiler": "QEfficient.finetune.qaic_utils:QAICCompiler",
    "QAICLoader": "QEfficient.finetune.qaic_utils:QAICLoader",
    "ONNXModel": "QEfficient.finetune.onnx_utils:ONNXModel",
    "QEffModelManager": "QEfficient.finetune.model_manager:QEffModelManager",
    "QEffTrainer": "QEfficient.finetune.trainer:QEffTrainer",
    "QEfficient": "QEfficient.finetune.refine:QEfficient",
    "StepOptions": "QEfficient.finetune.step_package:StepOptions",
    "StepSession": "QEfficient.finetune.step_session:StepSession",
    "QEffConfig": "QEfficient.finetune.config:QEffConfig",
    "QEffDataManager": "QEfficient.finetune.data_manager:QEffDataManager",
    "QEffTrainingArgs": "QEfficient.finetune.arguments:QEffTrainingArgs",
    "QEffTrainingArguments": "QEfficient.finetune.arguments:QEffTrainingArgs",
    "device_aware_data_loading": "QEfficient.finetune.data_functions:device_aware_data_loading",
    "generate_dataset_config": "QEfficient.finetune.dataset_config:generate_dataset_config",
    "get_custom_data_collator": "QEfficient.finetune.data_functions:get_custom_data_collator",
    "get_dataloader_kwargs": "QEfficient.finetune.data_functions:get_dataloader_kwargs",
    "get_longest_seq_length": "QEfficient.finetune.data_functions:get_longest_seq_length",
    "get_preprocessed_dataset": "QEfficient.finetune.data_functions:get_preprocessed_dataset",
    "padding_dataset": "QEfficient.finetune.data_functions:padding_dataset",
    "register_dataset": "QEfficient.finetune.data.named:register_dataset",
}

__all__ = [
    "CompiledStep",
    "ONNXModel",
    "PackageTrainer",
    "QAICCompiler",
    "QAICLoader",
    "QEffConfig",
    "QEffDataManager",
    "QEffModelManager",
    "QEffTrainer",
    "QEffTrainingArgs",
    "QEffTrainingArguments",
    "QEfficient",
    "StepOptions",
    "StepSession",
    "device_aware_data_loading",
    "generate_dataset_config",
    "get_custom_data_collator",
    "get_dataloader_kwargs",
    "get_longest_seq_length",
    "get_preprocessed_dataset",
    "padding_dataset",
    "register_dataset",
]


def __getattr__(name: str) -> Any:
    place = _PUBLIC.get(name)
    if place is None:
        raise AttributeError(f"module 'QEfficient.finetune' has no attribute {name!r}")
    module, _, attribute = place.partition(":")
    value = getattr(importlib.import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
