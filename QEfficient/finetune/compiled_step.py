"""CompiledStep: a compiled training package as a torch module, so that any PyTorch optimizer or trainer drives it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import nn

from QEfficient.errors import InputError, OptionError, QEfficientError
from QEfficient.finetune.step_model import StepModel, from_module
from QEfficient.finetune.step_package import StepOptions, StepPackages, build_step
from QEfficient.finetune.step_session import StepResult, StepSession
from QEfficient.progress import bar
from QEfficient.store.home import cache_home
from QEfficient.store.store import ArtifactStore

#: File names of what LoRA's scaling multiplies.
_FACTOR = re.compile(r"\.lora_(?:embedding_)?[AB](?:\.weight)?$")


class _Gradients(torch.autograd.Function):
    """Ties the loss of a session call to the parameters, whose gradients the same call computed."""

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor, gradients: list[torch.Tensor], *parameters: nn.Parameter) -> torch.Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # The product is new memory: the session reuses its buffers.
        return None, None, *(gradient * upstream[0] for gradient in ctx.gradients)


class CompiledStep(nn.Module):
    """The training step of a model as a module.

    Its parameters carry the names the wrapped model gives them and live in torch; the frozen weights live in the
    package only. ``forward`` runs the compiled forward and backward pass, ``loss.backward()`` hands the gradients over,
    so that optimizers, clipping, accumulation, schedulers, Accelerate and ``DistributedDataParallel`` work unchanged.
    Dropout is off: the step is a deterministic function of its inputs.

    Example:
        >>> step = CompiledStep.from_model(peft_model)
        >>> optimizer = torch.optim.AdamW(step.parameters(), lr=1e-4)
        >>> loss = step(input_ids, attention_mask, labels)
        >>> loss.backward()
        >>> optimizer.step()
    """

    def __init__(self, model: StepModel, packages: StepPackages, *, threads: int | None = None) -> None:
        super().__init__()
        self.config, self.peft_config, self.adapter = model.config, model.peft_config, model.adapter
        self.own_config = model.own_config
        self.packages, self.file_names, self.facts = packages, model.file_names, model.facts
        self._scaling, self._threads = model.scaling, threads
        for name, parameter in model.trained.items():
            _register(self, name, parameter)
        self._names = list(model.trained)
        self._train = self._open(packages.train)
        self._evaluate: StepSession | None = None
        self.is_classifier = self._train.is_classifier
        #: The last call's full result, for losses that need log-probabilities. Its gradients are overwritten later.
        self.last: StepResult | None = None

    @classmethod
    def from_model(
        cls,
        model: Any,
        target: str = "host",
        *,
        trainable: Sequence[str] | None = None,
        options: StepOptions | None = None,
        threads: int | None = None,
        cache_home_dir: str | Path | None = None,
        progress: bool | None = None,
    ) -> Self:
        """Captures and compiles the step of a transformers or PEFT model, or finds it in the cache.

        Args:
            model: what has ``requires_grad`` trains; its weights are copied, the model itself is not changed.
            target: where the step runs; ignored when ``options`` are given.
            trainable: patterns of parameter names to train instead.
            options: sizes, memory levers and transforms.
            threads: threads of the session; None uses every core.
            cache_home_dir: cache root, instead of ``QEFF_HOME`` or the user cache directory.
            progress: show a progress bar; None shows one on a terminal.

        Raises:
            UnsupportedModelError, ExportError, TransformError, OptionError: as their names say.
        """
        described = from_module(model, trainable)
        chosen = options if options is not None else StepOptions(target=target)
        store = ArtifactStore(cache_home(Path(cache_home_dir) if cache_home_dir is not None else None))
        with bar(f"building the training step of {described.name}", progress) as report:
            packages = build_step(described, chosen, store, report)
        return cls(described, packages, threads=threads)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        weights: torch.Tensor | None = None,
        *,
        position_ids: torch.Tensor | None = None,
        normaliser: float | torch.Tensor | None = None,
        **teacher: torch.Tensor,
    ) -> torch.Tensor:
        """Minus the weighted sum of the labels' log-probabilities, as a 0-d float32 tensor.

        Args:
            input_ids: int64 [batch, seq].
            attention_mask: [batch, seq]; 0 = padding, k >= 1 = k-th packed segment.
            labels: int64 [batch, seq] in HF's convention (-100 = not trained, shifted inside), or [batch] for a
                classifier.
            weights: float [batch, seq] (or [batch]), weight of each label's log-probability. None: all equal, and
                the loss is the mean over the trained labels.
            position_ids: [batch, seq]; None counts from 0 in every segment.
            normaliser: divides the weights, such as the trained tokens of a whole accumulation window.
            **teacher: ``teacher_ids``, ``teacher_logprobs``, ``teacher_weights`` for a step with ``teacher_top``.

        Raises:
            InputError: a wrong shape or dtype, or every label is masked.
        """
        if labels is None:
            raise InputError("a training step needs labels.")
        unknown = set(teacher) - {"teacher_ids", "teacher_logprobs", "teacher_weights"}
        if unknown:
            raise InputError(f"a training step takes no {sorted(unknown)[0]!r}.")
        named = dict(
            input_ids=input_ids, attention_mask=attention_mask, labels=labels, weights=weights,
            position_ids=position_ids, **teacher,
        )  # fmt: skip
        batch = {name: _array(value) for name, value in named.items() if value is not None}
        divisor = None if normaliser is None else float(normaliser)
        parameters = self._parameters_in_order()
        if not torch.is_grad_enabled() or not any(p.requires_grad for p in parameters):
            self.last = self._evaluator().run(batch, divisor)
            return torch.tensor(self.last.loss)
        self._bind(self._train)
        self.last = self._train.run(batch, divisor)
        found = self.last.gradients
        gradients = [torch.from_numpy(found[self.file_names[name]]) for name in self._names]
        return _Gradients.apply(torch.tensor(self.last.loss), gradients, *parameters)

    def logprobs(self, batch: Mapping[str, Any], *, adapter: bool = True) -> np.ndarray:
        """Log-probabilities of the trained labels, float32 [batch, seq]; runs no backward pass.

        Args:
            batch: as for `forward`, tensors or arrays.
            adapter: False switches the adapter off for this call, which makes the base model the reference.

        Raises:
            OptionError: there is no adapter, or it trains more than LoRA factors, so it cannot be switched off.
        """
        arrays = {name: _array(value) for name, value in batch.items()}
        if not adapter:
            self._check_switchable()
        session = self._evaluator()
        if adapter or self._scaling is None:
            return session.run(arrays, 1.0).logprobs
        session.set_parameters({"lora_scaling": np.zeros_like(self._scaling)})
        try:
            return session.run(arrays, 1.0).logprobs
        finally:
            session.set_parameters({"lora_scaling": self._scaling})

    @property
    def can_switch_off(self) -> bool:
        """Whether the adapter can be left out of a call, which leaves the base model."""
        return self.adapter is not None and self._outside_of_lora() is None

    def _outside_of_lora(self) -> str | None:
        """A tensor that trains and is no factor of LoRA; None where there is none."""
        # A scaling of 0 takes out nothing but B A: DoRA's magnitudes would stay.
        return next((name for name in map(self.file_names.get, self._names) if not _FACTOR.search(str(name))), None)

    def _check_switchable(self) -> None:
        if not self.can_switch_off:
            reason = (
                "there is no adapter" if self.adapter is None else f"{self._outside_of_lora()} trains outside of LoRA"
            )
            raise OptionError(
                f"the base model's log-probabilities cannot be had from this step, because {reason}: compute them "
                "before training and keep them."
            )

    def file_tensors(self) -> dict[str, np.ndarray]:
        """Copies of the trained tensors by their names in files."""
        named = dict(self.named_parameters())
        return {self.file_names[name]: _array(named[name]).copy() for name in self._names}

    def save_kit(self, directory: str | Path) -> Path:
        """Writes what `QEfficient.finetune.native.PackageTrainer` trains without torch: packages, optimizer, start.

        Raises:
            OptionError: the directory exists and is not empty.
        """
        from QEfficient.finetune.native import EVALUATE, OPTIMIZER, TRAIN, write_kit
        from QEfficient.finetune.optimizer_graph import adamw_graph
        from QEfficient.finetune.trainer import adapter_settings
        from QEfficient.models.base import check_destination
        from QEfficient.onnx_io import save_model
        from QEfficient.store.files import remove_tree

        destination = Path(directory)
        check_destination(destination)
        place = destination.with_name(f".saving-{destination.name}")
        if place.exists():
            remove_tree(place)
        place.mkdir(parents=True)
        tensors = self.file_tensors()
        if self._scaling is not None:
            tensors["lora_scaling"] = self._scaling
        packages = {TRAIN: self.packages.train, EVALUATE: self.packages.evaluate}
        write_kit(place, packages, tensors, None if self.adapter is None else adapter_settings(self))
        save_model(adamw_graph(), place / OPTIMIZER)
        if destination.exists():
            destination.rmdir()
        place.replace(destination)
        return destination

    def close(self) -> None:
        """Frees the sessions' memory."""
        self._train.close()
        if self._evaluate is not None:
            self._evaluate.close()

    def _evaluator(self) -> StepSession:
        if self._evaluate is None:
            self._evaluate = self._open(self.packages.evaluate)
        self._bind(self._evaluate)
        return self._evaluate

    def _open(self, package: Path) -> StepSession:
        session = StepSession(package, verify=False, threads=self._threads)
        if self._scaling is not None:
            session.set_parameters({"lora_scaling": self._scaling})
        return session

    def _bind(self, session: StepSession) -> None:
        """Shows the session the parameters' memory. They may have moved (``.data`` assigned), so every time."""
        named = dict(self.named_parameters())
        session.set_parameters({self.file_names[name]: _array(named[name]) for name in self._names})

    def _parameters_in_order(self) -> list[nn.Parameter]:
        named = dict(self.named_parameters())
        return [named[name] for name in self._names]


def _register(root: nn.Module, dotted: str, parameter: nn.Parameter) -> None:
    """Registers a parameter under a dotted name through plain modules, as state dicts expect."""
    *path, leaf = dotted.split(".")
    place = root
    for part in path:
        if part not in place._modules:
            place.add_module(part, nn.Module())
        place = place.get_submodule(part)
    place.register_parameter(leaf, parameter)


def _array(tensor: Any) -> np.ndarray:
    """A numpy view of a tensor on the CPU."""
    if not isinstance(tensor, torch.Tensor):
        return np.asarray(tensor)
    if tensor.device.type != "cpu":
        raise QEfficientError(f"a compiled step reads tensors on the CPU, got one on {tensor.device}: keep it there.")
    array: np.ndarray = tensor.detach().numpy()
    return array
