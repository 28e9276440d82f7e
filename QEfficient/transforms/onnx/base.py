"""What an ONNX transform is: one class with a name, parameters that enter the cache key, and `apply`."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import onnx_ir as ir


@dataclass(frozen=True)
class TransformResult:
    """What a transform did: whether it changed the model, and facts worth writing into the manifest."""

    modified: bool
    facts: dict[str, Any] = field(default_factory=dict)


class OnnxTransform(ABC):
    """Base of all ONNX transforms.

    Subclasses are usually frozen dataclasses: their fields are the parameters; of any other class they are the
    instance's attributes. ``name`` is the class's own when not given. ``version`` goes up when the same parameters
    produce another graph.

    Example:
        >>> @dataclass(frozen=True)
        ... class RenameProducer(OnnxTransform):
        ...     name: ClassVar[str] = "RenameProducer"
        ...     producer: str = "me"
        ...     def apply(self, model, workspace):
        ...         model.producer_name = self.producer
        ...         return TransformResult(modified=True)
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    #: Whether `apply` may add or remove graph inputs and outputs. The queue refuses that of any other transform,
    #: because a package's interface is fixed before it runs.
    changes_interface: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not hasattr(cls, "name"):
            cls.name = cls.__name__

    def parameters(self) -> dict[str, Any]:
        """JSON-ready parameters; part of the cache key and of the manifest."""
        return dataclasses.asdict(self) if dataclasses.is_dataclass(self) else dict(vars(self))

    def identity(self) -> dict[str, Any]:
        """Everything that decides what this transform does to a given model."""
        return {"name": self.name, "version": self.version, "parameters": self.parameters()}

    @abstractmethod
    def apply(self, model: ir.Model, workspace: Path) -> TransformResult:
        """Changes ``model`` in place.

        Args:
            model: weights are `QEfficient.onnx_io.FileTensor`; read them one at a time.
            workspace: an empty directory that lives until the package is written, for new weight files
                (`QEfficient.onnx_io.store_tensors`).

        Raises:
            TransformError: the model does not fit this transform.
        """
