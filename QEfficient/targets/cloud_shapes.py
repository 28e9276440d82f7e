"""The sizes a Cloud AI package is compiled for: one specialization for each kind of step, exact in every dimension."""

from __future__ import annotations

from collections.abc import Sequence

from QEfficient.errors import OptionError
from QEfficient.targets.manifest import DimRange, Specialization
from QEfficient.targets.options import CompileOptions

ENCODERS = {"feature-extraction": "Embedding", "text-classification": "SeqClassification"}
#: The compiler takes no compute context length in both lists, so the decode list and the context are so much longer.
DISJOINT = 32
#: Automatic lists: (largest context, first decode value, first prefill value), doubled up to the context.
_AUTOMATIC = ((32 << 10, 4096, 4000), (64 << 10, 8192, 8000), (None, 16384, 16000))
_FEW, _MANY = 5, 10
#: The first value of the one list there is when prompts come token by token.
_FIRST_SHARED = 4096


def specializations(options: CompileOptions, task: str) -> tuple[Specialization, ...]:
    """The shape sets for completed and normalised options, in the order the compiler gets them.

    A training step also fixes ``rows``, the places whose next token is predicted: every column but the first of every
    row, which is the most a batch can have. A batch with fewer fills up with rows of weight 0.

    Raises:
        OptionError: an option does not fit the task, or a length is missing.
    """
    causal = task == "text-generation"
    for field in ("mxint8_kv_cache", "prefill_only", "num_speculative_tokens", "ccl_enabled",
                  "comp_ctx_lengths_prefill", "comp_ctx_lengths_decode"):  # fmt: skip
        if getattr(options, field) not in (None, False) and not causal:
            raise OptionError(f"{field} is for causal models: this one keeps no keys and values.")
    rows = options.batch_size or 1
    if task == "training":
        if options.seq_len is None or len(options.seq_len) > 1:
            raise OptionError("a training step for Cloud AI 100 has one exact length: pass a single seq_len.")
        (length,) = options.seq_len
        return (_exact("Train", batch_size=rows, seq_len=length, rows=max(1, rows * (length - 1))),)
    if task in ENCODERS:
        if not options.seq_len:
            raise OptionError("an encoder for Cloud AI 100 has exact lengths: pass seq_len.")
        return _numbered([_exact(ENCODERS[task], batch_size=rows, seq_len=length) for length in options.seq_len])
    return _causal(options)


def _causal(options: CompileOptions) -> tuple[Specialization, ...]:
    if options.ctx_len is None or options.prefill_seq_len is None:
        raise OptionError("a causal package needs ctx_len and prefill_seq_len.")
    prompt, rows = options.prefill_seq_len, options.batch_size or 1
    prompt_windows, answer_windows, capacity = context_windows(options)
    shared, prompts = {"ctx_len": capacity}, rows
    if options.full_batch_size is not None:
        # Prompts come in one at a time, answers grow in all slots together.
        shared["full_batch_size"] = options.kv_cache_batch_size or options.full_batch_size
        rows = options.full_batch_size
        prompts = rows if prompt == 1 else 1
    drafts = options.num_speculative_tokens
    kept = {} if drafts is None else {"num_logits_to_keep": 1}
    if drafts is not None and max(drafts) >= options.ctx_len:
        raise OptionError(
            f"num_speculative_tokens={max(drafts)} and one more token do not fit ctx_len={options.ctx_len}: lower it."
        )

    prefill = [
        _exact("Prefill", batch_size=prompts, seq_len=prompt, **shared, **window, **kept) for window in prompt_windows
    ]
    decode = [
        _exact(
            "Decode",
            batch_size=rows,
            seq_len=count,
            **shared,
            **window,
            **({"num_logits_to_keep": count} if kept else {}),
        )
        for count in ([k + 1 for k in drafts] if drafts is not None else [1])
        for window in answer_windows
    ]
    if options.prefill_only is True:
        return _numbered(prefill)
    if options.prefill_only is False:
        return _numbered(decode)
    # Two entries of equal sizes could not be told apart: a prompt of one token is a decoding step.
    decode = [entry for entry in decode if all(entry.symbols != other.symbols for other in prefill)]
    return (*_numbered(prefill), *_numbered(decode))


def file_symbols(specialization: Specialization, options: CompileOptions) -> dict[str, int]:
    """The sizes as ``specializations.json`` has them: with ``full_batch_exec_size``, which no graph input uses.

    efficient-transformers writes it for the prompts of a continuously batched package.
    """
    sizes = {name: size.exact or 0 for name, size in specialization.symbols.items()}
    if options.full_batch_size is None or "full_batch_size" not in sizes:
        return sizes
    alone = options.prefill_only is False and options.prefill_seq_len == 1
    if specialization.name.startswith("Prefill") or alone:
        sizes["full_batch_exec_size"] = sizes["batch_size"]
    return sizes


def context_windows(options: CompileOptions) -> tuple[list[dict[str, int]], list[dict[str, int]], int]:
    """Compute context lengths of prompts and of answers, as symbols, and the slots of the KV state.

    The last value of either list is the whole context, so that some window always covers the largest position. As the
    compiler takes no value in both lists, the answers' last value and the state are 32 slots longer than asked for.

    Raises:
        OptionError: a value is beyond the context, or stands in both lists.
    """
    assert options.ctx_len is not None
    context, prompts, answers = options.ctx_len, options.comp_ctx_lengths_prefill, options.comp_ctx_lengths_decode
    if prompts is None and answers is None and not options.ccl_enabled:
        return [{}], [{}], context
    if options.prefill_seq_len == 1:  # one list serves both, nothing can clash
        own, steps = answers or prompts, _steps(context, _FIRST_SHARED, _MANY)
        shared = _up_to(own, context, "comp_ctx_lengths") if own else _automatic(context, _FIRST_SHARED, steps)
        return _symbols(shared), _symbols(shared), context
    first_decode, first_prefill = next((d, p) for most, d, p in _AUTOMATIC if most is None or context <= most)
    steps = _steps(context, first_decode, _FEW)
    before, after = _automatic(context, first_prefill, steps), _automatic(context, first_decode, steps)
    if prompts is not None:
        before = _up_to(prompts, context, "comp_ctx_lengths_prefill")
    if answers is not None:
        after = _up_to(answers, context, "comp_ctx_lengths_decode")
    if options.prefill_only is not None:
        return _symbols(before), _symbols(after), context
    after[-1] = context + DISJOINT
    both = sorted(set(before) & set(after))
    if both:
        raise OptionError(
            f"comp_ctx_lengths_prefill and comp_ctx_lengths_decode both have {both[0]}, and the compiler takes no "
            "value twice: change it in one of them."
        )
    return _symbols(before), _symbols(after), context + DISJOINT


def _up_to(values: Sequence[int], context: int, option: str) -> list[int]:
    if max(values) > context:
        raise OptionError(f"{option} has {max(values)}, which is more than ctx_len={context}: lower it.")
    return [*(value for value in values if value < context), context]


def _automatic(context: int, first: int, steps: int) -> list[int]:
    return [*(first << step for step in range(steps)), context]


def _steps(context: int, first: int, most: int) -> int:
    """How many values an automatic list has before the context itself: ``first``, doubled while it is shorter."""
    return sum(first << step < context for step in range(most - 1)) if context > 4096 else 0


def _symbols(values: Sequence[int]) -> list[dict[str, int]]:
    return [{"comp_ctx_lengths": value} for value in values]


def _exact(name: str, **sizes: int) -> Specialization:
    return Specialization(name, {symbol: DimRange.exactly(size) for symbol, size in sizes.items()})


def _numbered(entries: Sequence[Specialization]) -> tuple[Specialization, ...]:
    """Equal names get ``_0``, ``_1``, … in order."""
    if len(entries) == 1:
        return tuple(entries)
    return tuple(Specialization(f"{entry.name}_{i}", entry.symbols) for i, entry in enumerate(entries))
