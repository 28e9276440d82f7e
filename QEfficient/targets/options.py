"""Compile options: one validated dataclass for every target."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from QEfficient.errors import OptionError
from QEfficient.suggest import did_you_mean
from QEfficient.targets.given_file import GIVEN_FILES, NORMS, read_given
from QEfficient.targets.qaic_flags import FLAGS, check_flag, in_table_order

#: Options that shape only a Cloud AI binary. Other targets record them and say so once.
CLOUD_ONLY = (
    "num_cores", "num_devices", "device_group", "mxfp6_matmul", "mxint8_kv_cache", "mos", "aic_enable_depth_first",
    "allow_mxint8_mdp_io",
)  # fmt: skip
#: Likewise, and left out of manifests and cache keys where they are not set.
_SPARSE_CLOUD = (
    "prefill_only", "num_speculative_tokens", "ccl_enabled", "comp_ctx_lengths_prefill", "comp_ctx_lengths_decode",
    "aic_hw_version", "sdk_profile", "mdp_num_partitions", "mdp_load_partition_config", "mdp_dump_partition_config",
    "node_precision_info", "use_onnx_subfunctions", "qnn_config", "compiler_flags", "compile_timeout",
)  # fmt: skip
_SPARSE = ("dry_run", "simulate", *_SPARSE_CLOUD)
#: What the host can compute as a card would, and which of a card's options have an effect then.
SIMULATED = ("qaic",)
_EFFECT_IN_SIMULATION = ("mxfp6_matmul", "mxint8_kv_cache", "node_precision_info")
#: One number means a list of one.
_LISTS = ("seq_len", "device_group", "num_speculative_tokens", "comp_ctx_lengths_prefill", "comp_ctx_lengths_decode")

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
    "mdp_ts_num_partitions": "mdp_num_partitions",
    "timeout": "compile_timeout",
    "hw_version": "aic_hw_version",
    "precision": "weights",
    "quantization": "weights",
    "bits": "weights",
    "block_size": "group_size",
    "simulation": "simulate",
}


@dataclass(frozen=True)
class CompileOptions:
    """What ``compile()`` can be asked for.

    ``None`` means "the target's default"; a target fills those in before the cache key is computed, so that two
    spellings of one meaning share one package. Lengths are in tokens.

    Attributes:
        target: ``host`` (ONNX Runtime on this machine), ``qaic`` (Cloud AI 100) or ``qnn`` (the same card through the
            QNN toolchain; ``enable_qnn=True`` is another spelling).
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
        simulate: ``qaic`` lets the host compute with the card's graph and number formats, to see what they cost before
            there is a card: float16, with ``mxfp6_matmul`` MXFP6 weights, with ``mxint8_kv_cache`` MXINT8 keys and
            values. Host only, and slower than a package for the host.
        num_cores, num_devices, device_group, mxfp6_matmul, mxint8_kv_cache, mos, aic_enable_depth_first,
            allow_mxint8_mdp_io: Cloud AI 100 only; recorded, but without effect on the host unless it simulates.
        prefill_only: True compiles the prompt's sizes alone, False those of decoding alone, None both. Cloud AI only,
            as is everything up to ``compile_timeout``.
        num_speculative_tokens: tokens a draft proposes per step (one number, or a list with a size set each): the graph
            gets ``num_logits_to_keep`` and returns a row of logits for each and one more.
        ccl_enabled, comp_ctx_lengths_prefill, comp_ctx_lengths_decode: context lengths to compute with, so that a short
            context costs little: automatic, or lists. The last value of a list is the context itself.
        aic_hw_version: ``ai100`` or ``ai200``; None is ``ai100``.
        sdk_profile: the forms of an SDK release, ``legacy``, ``1.21`` or ``current``; None: of the SDK found.
        mdp_num_partitions: pipeline stages; the devices are shared out evenly.
        mdp_load_partition_config: a partition file of the user's (path or its content); nothing is generated then.
        mdp_dump_partition_config: let the compiler write ``mdp_dump.json`` with its node names.
        node_precision_info: a node precision file (path or content), or ``"norms"`` for one that keeps normalisations
            of this graph in float32.
        use_onnx_subfunctions: let the compiler keep local functions as units.
        qnn_config: the user's QNN configuration (path or content), for ``target="qnn"``.
        compiler_flags: further documented flags of the compiler, see ``targets/qaic_flags.py``; `from_kwargs` takes
            them by name (``ols=2``).
        compile_timeout: seconds the vendor's compiler may take; None is no limit. Not part of a package's identity.
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
    simulate: str | None = None
    num_cores: int | None = None
    num_devices: int | None = None
    device_group: tuple[int, ...] | None = None
    mxfp6_matmul: bool = False
    mxint8_kv_cache: bool = False
    mos: int | None = None
    aic_enable_depth_first: bool = False
    allow_mxint8_mdp_io: bool = False
    prefill_only: bool | None = None
    num_speculative_tokens: tuple[int, ...] | None = None
    ccl_enabled: bool = False
    comp_ctx_lengths_prefill: tuple[int, ...] | None = None
    comp_ctx_lengths_decode: tuple[int, ...] | None = None
    aic_hw_version: str | None = None
    sdk_profile: str | None = None
    mdp_num_partitions: int | None = None
    mdp_load_partition_config: Mapping[str, Any] | None = None
    mdp_dump_partition_config: bool = False
    node_precision_info: Mapping[str, Any] | str | None = None
    use_onnx_subfunctions: bool = False
    qnn_config: Mapping[str, Any] | None = None
    compiler_flags: tuple[tuple[str, Any], ...] = ()
    compile_timeout: int | None = None
    dry_run: bool = False

    @classmethod
    def from_kwargs(cls, **kwargs: Any) -> CompileOptions:
        """Builds options from user keywords; an unknown one is an OptionError that names the nearest."""
        known = {f.name for f in dataclasses.fields(cls)}
        _take_enable_qnn(kwargs)
        flags = {name: kwargs.pop(name) for name in list(kwargs) if name in FLAGS}
        for name in kwargs:
            if name in known:
                continue
            hint = f" Did you mean {ALIASES[name]!r}?" if name in ALIASES else did_you_mean(name, [*known, *FLAGS])
            raise OptionError(f"compile() has no option {name!r}.{hint}")
        if flags:
            kwargs["compiler_flags"] = (*kwargs.get("compiler_flags", ()), *flags.items())
        for name in GIVEN_FILES:
            if kwargs.get(name) is not None:
                kwargs[name] = read_given(name, kwargs[name])
        for name in _LISTS:
            value = kwargs.get(name)
            if isinstance(value, int) and not isinstance(value, bool):
                kwargs[name] = (value,)
            elif isinstance(value, list | tuple):
                kwargs[name] = tuple(value)
        return cls(**kwargs)

    def __post_init__(self) -> None:
        for name in ("batch_size", "full_batch_size", "kv_cache_batch_size", "prefill_seq_len", "ctx_len"):
            _positive(name, getattr(self, name))
        for name in ("num_cores", "num_devices", "mdp_num_partitions", "compile_timeout"):
            _positive(name, getattr(self, name))
        self._check_cloud()
        for field in dataclasses.fields(self):
            if isinstance(field.default, bool) and not isinstance(getattr(self, field.name), bool):
                raise OptionError(f"{field.name} must be True or False, got {getattr(self, field.name)!r}.")
        self._check_weights()
        self._check_simulation()
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
            for value in self.device_group:
                if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                    raise OptionError(f"device_group holds device ids, whole numbers from 0, got {value!r}.")
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

    def _check_cloud(self) -> None:
        if self.prefill_only is not None and not isinstance(self.prefill_only, bool):
            raise OptionError(f"prefill_only must be True, False or None, got {self.prefill_only!r}.")
        for name, least in (
            ("num_speculative_tokens", 0),
            ("comp_ctx_lengths_prefill", 1),
            ("comp_ctx_lengths_decode", 1),
        ):
            values = getattr(self, name)
            if values is None:
                continue
            if not isinstance(values, tuple) or not values:
                raise OptionError(f"{name} must be a whole number or a non-empty list of them, got {values!r}.")
            for value in values:
                if isinstance(value, bool) or not isinstance(value, int) or value < least:
                    raise OptionError(f"{name} holds whole numbers of at least {least}, got {value!r}.")
            object.__setattr__(self, name, tuple(sorted(set(values))))
        flags = tuple((name, check_flag(name, value)) for name, value in self.compiler_flags)
        object.__setattr__(self, "compiler_flags", in_table_order(flags))

    def _check_weights(self) -> None:
        if self.weights not in WEIGHTS:
            hint = did_you_mean(self.weights, WEIGHTS) if isinstance(self.weights, str) else ""
            raise OptionError(f"weights must be one of {', '.join(WEIGHTS)}, got {self.weights!r}.{hint}")
        if self.group_size is not None:
            if not isinstance(self.group_size, int) or self.group_size not in GROUP_SIZES:
                raise OptionError(f"group_size must be one of {GROUP_SIZES}, got {self.group_size!r}.")
            if self.weights not in ("int4", "mixed"):
                raise OptionError(f"group_size goes with weights='int4' or 'mixed', not {self.weights!r}.")

    def _check_simulation(self) -> None:
        if self.simulate is None:
            return
        if self.simulate not in SIMULATED:
            hint = did_you_mean(self.simulate, SIMULATED) if isinstance(self.simulate, str) else ""
            raise OptionError(f"simulate must be {' or '.join(map(repr, SIMULATED))}, got {self.simulate!r}.{hint}")
        if self.target != "host":
            raise OptionError(
                f"simulate={self.simulate!r} lets the host compute as the card would: pass target='host' with it, or "
                f"leave it out to compile for {self.target}."
            )
        if self.weights != "fp32":
            raise OptionError(
                f"simulate={self.simulate!r} and weights={self.weights!r} exclude each other: on the card weights are "
                "float16 or, with mxfp6_matmul=True, MXFP6."
            )
        if self.node_precision_info is not None and self.node_precision_info != NORMS:
            raise OptionError(
                f"simulate={self.simulate!r} knows node_precision_info={NORMS!r} only: leave the file out."
            )

    def replace(self, **changes: Any) -> CompileOptions:
        return dataclasses.replace(self, **changes)

    def to_json(self) -> dict[str, Any]:
        """The fields, for manifests; those of Cloud AI that came later only where they are set."""
        values = dataclasses.asdict(self)
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        for name in _SPARSE:
            if values[name] == defaults[name]:
                del values[name]
        return values

    def identity(self) -> dict[str, Any]:
        """What a package's cache key covers: `to_json` without what decides only how long compiling may take."""
        return {name: value for name, value in self.to_json().items() if name != "compile_timeout"}

    def cloud_only_set(self) -> list[str]:
        """Names of the options set here that only a Cloud AI target acts on, and the host in simulation does not."""
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        names = [name for name in (*CLOUD_ONLY, *_SPARSE_CLOUD) if getattr(self, name) != defaults[name]]
        return [name for name in names if self.simulate is None or name not in _EFFECT_IN_SIMULATION]


def _take_enable_qnn(kwargs: dict[str, Any]) -> None:
    """``enable_qnn=True``, the spelling of efficient-transformers, is ``target="qnn"``."""
    enable = kwargs.pop("enable_qnn", False)
    if not isinstance(enable, bool):
        raise OptionError(f"enable_qnn must be True or False, got {enable!r}; qnn_config takes a configuration file.")
    if enable:
        if kwargs.get("target", "qnn") not in ("qaic", "qnn"):
            raise OptionError(f"enable_qnn=True contradicts target={kwargs['target']!r}: pass target='qnn'.")
        kwargs["target"] = "qnn"


def _positive(name: str, value: object) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise OptionError(f"{name} must be an integer, got {value!r}.")
    if value < 1:
        raise OptionError(f"{name} must be at least 1, got {value}.")
