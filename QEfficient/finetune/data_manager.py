"""``QEffDataManager``: from a configuration to tokenized rows, an audit of their labels, and batches."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from blake3 import blake3

from QEfficient.errors import InputError, OptionError
from QEfficient.finetune.config import QEffConfig
from QEfficient.finetune.data import collate as collating
from QEfficient.finetune.data import loader as loading
from QEfficient.finetune.data.audit import LabelAudit
from QEfficient.finetune.data.batching import BatchOrder
from QEfficient.finetune.data.chat import with_template
from QEfficient.finetune.data.collate import Batch
from QEfficient.finetune.data.examples import Conversation, Example, Exchange
from QEfficient.finetune.data.files import Rows
from QEfficient.finetune.data.load import load_rows
from QEfficient.finetune.data.loader import BatchLoader
from QEfficient.finetune.data.mixed import Prepared, mixed
from QEfficient.finetune.data.mixing import MixedRows, SingleRows
from QEfficient.finetune.data.mixture import naming, source_config
from QEfficient.finetune.data.packing import PackedRows
from QEfficient.finetune.data.pairs import PREFERENCE, PairRows
from QEfficient.finetune.data.prepare import Preparation
from QEfficient.finetune.data.sources import Source
from QEfficient.finetune.data.stream import StreamRows
from QEfficient.finetune.data.stream_loader import StreamLoader
from QEfficient.finetune.data.stream_prepare import open_beginning
from QEfficient.finetune.data.token_rows import TokenRows
from QEfficient.finetune.data.tokens import TextEncoder
from QEfficient.finetune.methods.facts import METHODS
from QEfficient.progress import Progress, silent
from QEfficient.store.digest import json_digest
from QEfficient.store.home import cache_home
from QEfficient.store.store import ArtifactStore

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from QEfficient.finetune.arguments import QEffTrainingArgs
    from QEfficient.finetune.methods.teacher import Teacher

logger = logging.getLogger("QEfficient.finetune")

#: Part of every key: changes when the same rows would be encoded differently.
ENCODING_VERSION = 1
KIND = "dataset"

#: What training rows are.
TrainRows: TypeAlias = SingleRows | PackedRows | StreamRows


class QEffDataManager:
    """Prepares the data of a run.

    Args:
        config: what is tuned and on which data.
        tokenizer: the model's tokenizer; left as it is.
        custom_dataset_class: a class or object with ``load_data``, and optionally ``preprocess`` and ``split``.
        args: training arguments; their ``max_ctx_len``, ``data_seed``, ``train_sampling_strategy`` and
            ``dataloader_drop_last`` count here.
        cache_home_dir: the cache; None means ``$QEFF_HOME`` or the user's cache directory.

    Attributes:
        tokenizer: with the chat template of the configuration; what belongs beside the tuned model.
        pad_token_id: what fills batches.
        audit: the label audit, after ``prepare_dataset``.
        label_names: label name -> class id, for classification; else None.

    Raises:
        OptionError: a contradiction between ``config`` and ``args``, or an unknown chat template.
    """

    def __init__(
        self,
        config: QEffConfig,
        tokenizer: PreTrainedTokenizerBase,
        custom_dataset_class: Any = None,
        args: QEffTrainingArgs | None = None,
        *,
        cache_home_dir: str | Path | None = None,
    ) -> None:
        self.config = config.with_arguments(args)
        self.tokenizer = with_template(tokenizer, self.config.chat_template)
        self.args = args
        self._custom = custom_dataset_class
        self._home = None if cache_home_dir is None else Path(cache_home_dir)
        self._fingerprint = ""
        self._joiner = ""
        self.notes: list[str] = list(self.config.notices())
        self.pad_token_id = self._choose_padding()
        self.audit: LabelAudit | None = None
        self.label_names: dict[str, int] | None = None

    @property
    def fingerprint(self) -> str:
        """The key of the prepared data; empty before ``prepare_dataset``."""
        return self._fingerprint

    def _choose_padding(self) -> int:
        tokenizer = self.tokenizer
        if tokenizer.pad_token_id is not None:
            return int(tokenizer.pad_token_id)
        for name in ("eos_token", "unk_token", "bos_token"):
            if (found := getattr(tokenizer, f"{name}_id", None)) is not None:
                self.notes.append(
                    f"the tokenizer has no padding token, so its {name} pads: padding is never attended to nor trained."
                )
                return int(found)
        return 0

    def prepare_dataset(self, progress: Progress = silent) -> tuple[Any, Any]:
        """Loads, splits, encodes and audits the data; the second call with the same content reads the cache.

        Returns:
            (training rows, evaluation rows or None): `TokenRows`, indexable, with ``lengths`` in tokens. With
            ``packing`` the training rows are `PackedRows`, with ``streaming`` `StreamRows`, which `get_dataloader`
            reads; for methods that compare answers both are `PairRows`, with ``datasets`` `MixedRows`.

        Raises:
            InputError: missing, malformed or empty data, rows of mixed types, answers that do not fit into
                ``max_ctx_len``, no trained token.
            OptionError: a format, column or split that does not exist, or a tokenizer without an end token or
                template.
        """
        progress("reading data", 0, 0)
        if self.config.streaming:
            return self._streamed(progress)
        train: SingleRows
        evaluation: SingleRows | None
        if self.config.datasets is None:
            found = self._prepared(self.config, progress)
            train, evaluation, audit = found.train, found.evaluation, found.audit
            self._fingerprint, self._joiner = found.key, found.joiner
        else:
            train, evaluation, audit = self._mixed(progress)
        audit.notes = [*self.notes, *audit.notes]
        self.label_names = audit.classes
        self.audit = audit
        if not self.config.packing:
            return train, evaluation
        packed = PackedRows(train, self.config.max_ctx_len)
        audit.splits["train"].packed_rows = len(packed)
        return packed, evaluation

    def _mixed(self, progress: Progress) -> tuple[MixedRows, MixedRows | None, LabelAudit]:
        """The rows of all ``datasets``; every source is prepared, and cached, by itself."""
        config = self.config
        assert config.datasets is not None
        if self._custom is not None:
            raise OptionError("datasets lists the sources, so a custom dataset class has no place: give one of them.")
        sources = []
        for place in range(len(config.datasets)):
            with naming(place):
                sources.append(self._prepared(source_config(config, place), progress))
        found = mixed(sources, config)
        weights = [item.get("weight") for item in config.datasets]
        how = [weights, config.mixing, config.mixing_temperature, config.mixing_rows, config.seed]
        self._fingerprint = json_digest({"sources": [source.key for source in sources], "mixing": how})
        self._joiner = sources[0].joiner
        if not getattr(self.tokenizer, "chat_template", None) and len({source.joiner for source in sources}) > 1:
            found[2].notes.append("the sources join prompt and answer differently: generate asks as the first does.")
        return found

    def _prepared(self, config: QEffConfig, progress: Progress) -> Prepared:
        """One source, from the cache where it was prepared before."""
        return self._encoded(config, load_rows(config, self.tokenizer, self._custom), progress)[0]

    def _encoded(self, config: QEffConfig, source: Source, progress: Progress) -> tuple[Prepared, Preparation]:
        """Rows that were read, as tokens."""
        teacher = self._teacher()
        preparation = Preparation(config, self.tokenizer, source, None if teacher is None else self._asking(teacher))
        key = self._key(source, preparation, teacher)
        store = ArtifactStore(cache_home(self._home))

        def build(directory: Path) -> None:
            preparation.run(progress)
            preparation.save(directory)

        found = store.build(KIND, key, build, label=f"tokenized data of {source.name}")
        train, evaluation, audit = Preparation.load(found)
        held = None if evaluation is None else self._units(evaluation)
        return Prepared(self._units(train), held, audit, key, preparation.joiner), preparation

    def _streamed(self, progress: Progress) -> tuple[StreamRows, SingleRows | None]:
        """Training rows that are read while training, and evaluation rows, which are read now."""
        if self._custom is not None:
            raise OptionError("a custom dataset class gives all rows at once: leave streaming out, or stream a file.")
        opened = open_beginning(self.config)
        found, preparation = self._encoded(self.config, opened.source, progress)
        rows = StreamRows(opened, preparation, found.train, found.audit.classes)
        self._fingerprint = json_digest({"beginning": found.key, "stream": rows.identity})
        self._joiner = found.joiner
        self.audit, self.label_names = found.audit, found.audit.classes
        self.audit.notes = [*self.notes, *self.audit.notes]
        self.audit.first_rows = len(opened.source.train) - (opened.source.held or 0)
        if isinstance(rows.sample, PackedRows):
            self.audit.splits["train"].packed_rows = len(rows.sample)
        return rows, found.evaluation

    def _units(self, rows: TokenRows) -> Any:
        """What the method takes one of: a row, or a pair of rows."""
        if METHODS[self.config.method].rows is None:
            return rows
        return (
            PairRows(rows, PREFERENCE) if rows.desirable is None else PairRows.of_judged(rows, self.config.max_ctx_len)
        )

    def _teacher(self) -> Teacher | None:
        """The model that answers the prompts of the data in its place, if one does."""
        if not self.config.asks_teacher:
            return None
        from QEfficient.finetune.methods.build import teacher_of

        return teacher_of(self.config, self._home)

    def _asking(self, teacher: Teacher) -> Callable[[Sequence[Example], Progress], list[Example | None]]:
        return lambda examples, progress: teacher.answers(examples, self.config.max_ctx_len, self._home, progress)

    def _key(self, source: Source, preparation: Preparation, teacher: Teacher | None) -> str:
        import tokenizers
        import transformers

        return json_digest(
            {
                "version": ENCODING_VERSION,
                "train": rows_digest(source.train),
                "evaluation": None if source.evaluation is None else rows_digest(source.evaluation),
                "source": source.name,
                "tokenizer": tokenizer_digest(self.tokenizer),
                "options": preparation.identity(),
                "libraries": [transformers.__version__, tokenizers.__version__],
                **({} if teacher is None else {"teacher": teacher.identity()}),
            }
        )

    def get_dataloader(
        self,
        dataset: loading.Rows | StreamRows,
        batch_size: int,
        shuffle: bool = True,
        *,
        rank: int = 0,
        world_size: int = 1,
        padding_side: str = "right",
        pad_to_multiple_of: int | None = None,
        pad_to_length: int | None = None,
    ) -> BatchLoader | StreamLoader:
        """Batches of a data set; iterable again and again, one epoch each time.

        The order is a function of (seed, epoch): ``args.data_seed`` if given, else the configuration's seed. With
        ``args.train_sampling_strategy="group_by_length"`` rows of like length share batches, with ``"sequential"``
        nothing is shuffled. A short last batch is kept unless ``args.dataloader_drop_last``.

        Args:
            dataset: what ``prepare_dataset`` returned.
            batch_size: rows of a batch.
            shuffle: False for evaluation; then the three arguments above do not count.
            rank, world_size: of this process, in a distributed run.
            padding_side, pad_to_multiple_of, pad_to_length: as in ``collate``.

        Raises:
            OptionError: a number out of range.
        """
        strategy = getattr(self.args, "train_sampling_strategy", "random") if shuffle else "sequential"
        seed = getattr(self.args, "data_seed", None)
        chosen = self.config.seed if seed is None else seed
        drop_last = shuffle and bool(getattr(self.args, "dataloader_drop_last", False))
        pad = functools.partial(
            collating.collate,
            pad_token_id=self.pad_token_id,
            padding_side=padding_side,
            pad_to_multiple_of=pad_to_multiple_of,
            pad_to_length=pad_to_length,
        )
        if isinstance(dataset, StreamRows):
            return StreamLoader(
                dataset,
                batch_size,
                pad,
                self._fingerprint,
                seed=chosen,
                shuffle=strategy != "sequential",
                drop_last=drop_last,
                rank=rank,
                world_size=world_size,
            )
        order = BatchOrder(
            len(dataset),
            batch_size,
            chosen,
            shuffle=strategy != "sequential",
            lengths=dataset.lengths if strategy == "group_by_length" else None,
            drop_last=drop_last,
            rank=rank,
            world_size=world_size,
        )
        return BatchLoader(dataset, order, pad, self._fingerprint)

    @staticmethod
    def collate(
        rows: Sequence[Mapping[str, Any]],
        *,
        pad_token_id: int = 0,
        padding_side: str = "right",
        pad_to_multiple_of: int | None = None,
        pad_to_length: int | None = None,
    ) -> Batch:
        """Pads rows to one batch of arrays; see ``QEfficient.finetune.data.collate.collate``."""
        return collating.collate(
            rows,
            pad_token_id=pad_token_id,
            padding_side=padding_side,
            pad_to_multiple_of=pad_to_multiple_of,
            pad_to_length=pad_to_length,
        )

    def prompt_ids(self, prompt: str | Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids that ask the tuned model ``prompt`` in the form it was trained on.

        Args:
            prompt: a text, or chat messages.

        Raises:
            InputError: an empty prompt, or messages the template refuses.
        """
        if not prompt:
            raise InputError("The prompt is empty: pass a text or messages.")
        encoder = Preparation.encoder(self.config, self.tokenizer)
        if isinstance(prompt, str):
            return encoder.prompt_ids(Exchange(prompt, "", joiner=self._joiner))
        return encoder.prompt_ids(Conversation(tuple(dict(message) for message in prompt)))

    def write_report(self, output_dir: str | Path) -> Path:
        """Writes the audit as ``data_report.json`` into a directory; returns the path."""
        if self.audit is None:
            raise InputError("There is no data report before prepare_dataset(): call it first.")
        return self.audit.write(Path(output_dir) / "data_report.json")


def rows_digest(rows: Rows) -> str:
    """The BLAKE3 digest (64 hex digits) of rows, order included."""
    hasher = blake3()
    for index in range(len(rows)):
        hasher.update(json.dumps(rows[index], sort_keys=True, default=_plain).encode())
        hasher.update(b"\n")
    return hasher.hexdigest()


def _plain(value: Any) -> Any:
    detach = getattr(value, "detach", None)
    if callable(detach):
        value = detach().cpu().numpy()
    if callable(tolist := getattr(value, "tolist", None)):
        return [type(value).__name__, str(getattr(value, "dtype", "")), tolist()]
    return [type(value).__name__, str(value)]


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """The BLAKE3 digest (64 hex digits) of what decides a tokenizer's ids: vocabulary, rules, template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        # Padding and truncation are set by callers and put back into the file format.
        rules = json.loads(backend.to_str())
        rules.pop("padding", None)
        rules.pop("truncation", None)
        body: Any = rules
    else:
        body = {"vocabulary": tokenizer.get_vocab(), "class": type(tokenizer).__qualname__}
    hasher = blake3(json.dumps(body, sort_keys=True, default=str).encode())
    rest = {
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "template": getattr(tokenizer, "chat_template", None),
        "probe": TextEncoder(tokenizer).opening,
    }
    hasher.update(json.dumps(rest, sort_keys=True, default=str).encode())
    return hasher.hexdigest()
