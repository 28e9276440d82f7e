"""What compiling for a Cloud AI card may be asked for: defaults filled in, contradictions refused in one sentence."""

from __future__ import annotations

from QEfficient.errors import OptionError
from QEfficient.suggest import did_you_mean
from QEfficient.targets.options import CompileOptions
from QEfficient.targets.qaic_partition import devices_of
from QEfficient.targets.qaic_sdk import PROFILES

#: Cores of one SoC of a Cloud AI 100 Ultra card; a Standard card has 14.
MAX_CORES = 16
#: SoCs that can exchange data directly.
MAX_DEVICES = 16
#: Prompt tokens per step when nothing is asked for. Every prompt is padded to a multiple of it, so it is short.
DEFAULT_PREFILL = 32
HARDWARE = ("ai100", "ai200")


def normalise(options: CompileOptions, target: str) -> CompileOptions:
    """Fills in the defaults of a Cloud AI target, so that equal meanings have equal cache keys.

    Raises:
        OptionError: an option is out of range, not for this target, or contradicts another one.
    """
    if options.weights != "fp32":
        raise OptionError(
            f"weights={options.weights!r} is for the host; on Cloud AI 100 mxfp6_matmul=True compresses weights."
        )
    if options.qnn_config is not None and target != "qnn":
        raise OptionError("qnn_config is for the QNN toolchain: pass target='qnn', or leave it out.")
    cores = options.num_cores or MAX_CORES
    if cores > MAX_CORES:
        raise OptionError(f"num_cores={cores} is more than the {MAX_CORES} cores of a Cloud AI 100 device: lower it.")
    # efficient-transformers writes -1 for "the compiler decides".
    mos = None if options.mos == -1 else options.mos
    if mos is not None and not 1 <= mos <= cores:
        raise OptionError(f"mos={mos} is not between 1 and the {cores} cores: change it, or leave it out.")
    if mos is not None and mos & (mos - 1) and mos != cores:
        raise OptionError(f"mos={mos} is no power of two: pass 1, 2, 4, 8 or the number of cores, or leave it out.")
    prefill = options.prefill_seq_len
    if options.ctx_len is not None:
        prefill = prefill or min(DEFAULT_PREFILL, options.ctx_len)
    _check_forms(options)
    return options.replace(
        target=target,
        batch_size=options.batch_size or 1,
        num_cores=cores,
        num_devices=_devices(options),
        mos=mos,
        prefill_seq_len=prefill,
        mdp_num_partitions=None if options.mdp_num_partitions == 1 else options.mdp_num_partitions,
        aic_hw_version=options.aic_hw_version or "ai100",
    )


def _devices(options: CompileOptions) -> int:
    group = options.device_group
    if group is not None and len(set(group)) < len(group):
        raise OptionError(f"device_group={list(group)} names a device twice: name each once.")
    devices = options.num_devices or len(group or (0,))
    if devices > MAX_DEVICES:
        raise OptionError(
            f"{devices} devices are more than the {MAX_DEVICES} that one model can be spread over: use fewer."
        )
    own = options.mdp_load_partition_config
    stages = options.mdp_num_partitions
    if own is not None and stages is not None:
        raise OptionError("mdp_load_partition_config and mdp_num_partitions exclude each other: give one of them.")
    if own is not None and options.mdp_dump_partition_config:
        raise OptionError("mdp_load_partition_config and mdp_dump_partition_config exclude each other: give one.")
    if own is not None:
        named = devices_of(own, options.num_cores or MAX_CORES)
        if (options.num_devices is not None or group is not None) and named != devices:
            raise OptionError(
                f"mdp_load_partition_config is for {named} devices, and {devices} are asked for: leave out num_devices "
                "and device_group, or change the file."
            )
        devices = named
    if stages is not None and devices % stages:
        raise OptionError(
            f"{devices} devices cannot be shared evenly by mdp_num_partitions={stages} stages: make one a multiple of "
            "the other."
        )
    if options.allow_mxint8_mdp_io and devices == 1:
        raise OptionError("allow_mxint8_mdp_io compresses traffic between devices, and there is one: pass num_devices.")
    return devices


def _check_forms(options: CompileOptions) -> None:
    hardware, profile = options.aic_hw_version, options.sdk_profile
    if hardware is not None and hardware not in HARDWARE:
        raise OptionError(
            f"aic_hw_version must be ai100 or ai200, got {hardware!r}.{did_you_mean(str(hardware), HARDWARE)}"
        )
    if profile is not None and profile not in PROFILES:
        raise OptionError(
            f"sdk_profile must be one of {', '.join(PROFILES)}, got {profile!r}.{did_you_mean(str(profile), PROFILES)}"
        )
    if hardware == "ai200" and profile not in (None, "current"):
        raise OptionError(f"aic_hw_version='ai200' needs the forms of a current SDK, not sdk_profile={profile!r}.")
    if profile == "legacy" and options.use_onnx_subfunctions:
        raise OptionError("use_onnx_subfunctions needs a current SDK, not sdk_profile='legacy'.")
    lists = options.comp_ctx_lengths_prefill is not None or options.comp_ctx_lengths_decode is not None
    if (lists or options.ccl_enabled) and len(options.num_speculative_tokens or ()) > 1:
        raise OptionError(
            "a list of num_speculative_tokens and compute context lengths exclude each other: give one number, or "
            "leave out comp_ctx_lengths and ccl_enabled."
        )
    if options.prefill_only is True and options.num_speculative_tokens is not None:
        raise OptionError(
            "num_speculative_tokens is for decoding, which prefill_only=True leaves out: drop one of them."
        )
    if options.kv_cache_batch_size is not None and options.full_batch_size is None:
        raise OptionError("kv_cache_batch_size needs full_batch_size: it counts KV rows beyond the slots.")
