"""PyTorch transforms: what all architectures share (cache, mask, attention, scans, heads), changed before export.

Nothing here is written for one architecture. transformers dispatches masks, attention and experts by name and factors
the sequence kernels of state-space layers into functions of fixed names; these modules provide our implementations
and `patching.patched` installs them for the duration of one trace.
"""
