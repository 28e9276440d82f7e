"""Compile options: one validated dataclass for every target."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from QEfficient.errors import OptionError
from QEfficient.suggest import did_you_mean

#: Options that shape only a Cloud AI binary. Other targets record them and say so once.
CLOUD_ONLY = (
    "num_cores",
    "num_devices",
    "device_group",
    "mxfp6_matmul",
    "mxint8_kv_cache",
    "mos",
    "aic_enable_depth_first",
    "allow_mxint8_mdp_io",
)

#: How matrices can be stored.
WEIGHTS = ("fp32", "int8", "int4", "mixed")
#: Group sizes that ONNX Runtime's kernels take.
GROUP_SIZES = (16, 32, 64, 128, 256)

#: Spellings people use for an option of another name (lesson: a swallowed `mxfp6=True` compiled without MXFP6).
ALIASES = {
    "mxfp6": "mxfp6_matmul",
    "mxint8": "mxint8_kv_cache",
    "prompt_len": "prefill_seq_len",
    "max_seq_len": "ctx_len",
    "context_length": "ctx_len",
    "mdp_ts_num_devices": "num_devices",
    "aic_num_cores": "num_cores",
    "precision": "weights",
    "quantization": "weights",
    "bits": "weights",
    "block_size": "group_size",
}


@dataclass(frozen=True)
class CompileOptions:
    """What ``compile()`` can be asked for.

    ``None`` means "the target's default"; a target fills those in before the cache key is computed, so that two
    spellings of one meaning share one package. Lengths are in tokens.

    Attributes:
        target: ``host`` (ONNX Runtime on this machine) or ``qaic`` (Cloud AI 100).
        batch_size: rows per call; on the host None means any number.
        full_batch_size: slots of a continuously batched package; adds the ``batch_index`` input.
        kv_cache_batch_size: rows of KV state when there are more than slots; at least ``full_batch_size``.
        prefill_seq_len: most prompt tokens fed in one step; longer prompts are fed in chunks.
        ctx_len: capacity of the KV state, prompt and generated tokens together.
        seq_len: compiled input length(s) of an encoder; None means any length up to the model's maximum.
        weights: how matrices are stored: ``fp32`` as in the checkpoint and computed in float32, ``int8``, ``int4``, or
            ``mixed``, int4 with those matrices in int8 that lose most. Host only.
        group_size: inputs that share a scale in ``int4`` and ``mixed``: 16, 32, 64, 128 or 256. Smaller is more exact,
            larger is faster. None takes the host's default.
        fuse: let the host replace parts of the graph by larger operators; False runs the exported graph as it is.
        prepack: keep quantized matrices also in the layout the host's kernels read: the package is larger by about its
            quantized matrices, opens sooner, and processes that run it share their memory.
        num_cores, num_devices, device_group, mxfp6_matmul, mxint8_kv_cache, mos, aic_enable_depth_first,
            allow_mxint8_mdp_io: Cloud AI 100 only; recorded, but without effect on the host.
        dry_run: write what a target's compiler takes without compiling, for a target whose SDK is not here. Such a
            package cannot be loaded.
    """

    target: str = "host"
    batch_size: int | None = None
    full_batch_size: int | None = None
    kv_cache_batch_size: int | None = None
    prefill_seq_len: int | None = None
    ctx_len: int | None = None
    seq_len: tuple[int, ...] | None = None
    weights: str = "fp32"
    group_size: int | None = None
    fuse: bool = True
    prepack: bool = True
    num_cores: int | None = None
    num_devices: int | None = None
    device_group: tuple[int, ...] | None = None
    mxfp6_matmul: bool = False
    mxint8_kv_cache: bool = False
    mos: int | None = None
    aic_enable_depth_first: bool = False
    allow_mxint8_mdp_io: bool = False
    dry_run: bool = False

    @classmethod
    def from_kwargs(cls, **kwargs: Any) -> CompileOptions:
        """Builds options from user keywords; an unknown one is an OptionError that names the nearest."""
        known = {f.name for f in dataclasses.fields(cls)}
        for name in kwargs:
            if name in known:
                continue
            hint = f" Did you mean {ALIASES[name]!r}?" if name in ALIASES else did_you_mean(name, known)
            raise OptionError(f"compile() has no option {name!r}.{hint}")
        for name in ("seq_len", "device_group"):
            value = kwargs.get(name)
            if isinstance(value, int) and not isinstance(value, bool):
                kwargs[name] = (value,)
            elif isinstance(value, list | tuple):
                kwargs[name] = tuple(value)
        return cls(**kwargs)

    def __post_init__(self) -> None:
        for name in ("batch_size", "full_batch_size", "kv_cache_batch_size", "prefill_seq_len", "ctx_len"):
            _positive(name, getattr(self, name))
        for name in ("num_cores", "num_devices"):
            _positive(name, getattr(self, name))
        for field in dataclasses.fields(self):
            if isinstance(field.default, bool) and not isinstance(getattr(self, field.name), bool):
                raise OptionError(f"{field.name} must be True or False, got {getattr(self, field.name)!r}.")
        self._check_weights()
        if not isinstance(self.target, str):
            raise OptionError(f"target must be a name such as 'host', got {self.target!r}.")
        if self.mos is not None and (isinstance(self.mos, bool) or not isinstance(self.mos, int)):
            raise OptionError(f"mos must be an integer, got {self.mos!r}.")
        if self.seq_len is not None:
            if not isinstance(self.seq_len, tuple) or not self.seq_len:
                raise OptionError(f"seq_len must be an int or a non-empty list of ints, got {self.seq_len!r}.")
            for value in self.seq_len:
                _positive("seq_len", value)
            object.__setattr__(self, "seq_len", tuple(sorted(set(self.seq_len))))
        if self.device_group is not None:
            if not isinstance(self.device_group, tuple) or not self.device_group:
                raise OptionError(f"device_group must be a non-empty list of device ids, got {self.device_group!r}.")
            if self.num_devices is not None and self.num_devices != len(self.device_group):
                raise OptionError(
                    f"num_devices={self.num_devices} contradicts device_group with {len(self.device_group)} devices: "
                    "give one of them."
                )
        if self.full_batch_size is not None and self.batch_size not in (None, 1):
            raise OptionError(
                f"batch_size={self.batch_size} and full_batch_size={self.full_batch_size} exclude each other: "
                "use full_batch_size alone for continuous batching."
            )
        if self.kv_cache_batch_size is not None:
            if self.full_batch_size is None:
                raise OptionError("kv_cache_batch_size needs full_batch_size: it counts KV rows beyond the slots.")
            if self.kv_cache_batch_size < self.full_batch_size:
                raise OptionError(
                    f"kv_cache_batch_size={self.kv_cache_batch_size} is less than "
                    f"full_batch_size={self.full_batch_size}: every slot needs a KV row."
                )
        if self.ctx_len is not None and self.prefill_seq_len is not None and self.prefill_seq_len > self.ctx_len:
            raise OptionError(
                f"prefill_seq_len={self.prefill_seq_len} is larger than ctx_len={self.ctx_len}: lower one or raise "
                "the other."
            )
        if self.seq_len is not None and (self.ctx_len is not None or self.prefill_seq_len is not None):
            raise OptionError("seq_len is for encoders, ctx_len and prefill_seq_len for causal models: give one kind.")

    def _check_weights(self) -> None:
        if self.weights not in WEIGHTS:
            hint = did_you_mean(self.weights, WEIGHTS) if isinstance(self.weights, str) else ""
            raise OptionError(f"weights must be one of {', '.join(WEIGHTS)}, got {self.weights!r}.{hint}")
        if self.group_size is not None:
            if not isinstance(self.group_size, int) or self.group_size not in GROUP_SIZES:
                raise OptionError(f"group_size must be one of {GROUP_SIZES}, got {self.group_size!r}.")
            if self.weights not in ("int4", "mixed"):
                raise OptionError(f"group_size goes with weights='int4' or 'mixed', not {self.weights!r}.")

    def replace(self, **changes: Any) -> CompileOptions:
        return dataclasses.replace(self, **changes)

    def to_json(self) -> dict[str, Any]:
        """The fields, for manifests and cache keys. Only a dry run says that it is one: others are not different."""
        values = dataclasses.asdict(self)
        if not self.dry_run:
            del values["dry_run"]
        return values

    def cloud_only_set(self) -> list[str]:
        """Names of the options set here that only a Cloud AI target acts on."""
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        return [name for name in CLOUD_ONLY if getattr(self, name) != defaults[name]]


def _positive(name: str, value: object) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise OptionError(f"{name} must be an integer, got {value!r}.")
    if value < 1:
        raise OptionError(f"{name} must be at least 1, got {value}.")
