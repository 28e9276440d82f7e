"""Train the small demo language model (LLaMA architecture, ~4.7 M parameters) on GSM8K, from nothing.

The result is an ordinary Hugging Face folder (bf16 safetensors, tokenizer with a chat template, model card,
metrics.json), small enough to ship: the export, packaging and serving examples get a real causal language
model without any download. It writes arithmetic word problems; it is no problem solver.
"""

import argparse
import copy
import hashlib
import json
import math
import os
import platform
import random
import re
import time
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # repeatable cuBLAS; set before CUDA starts
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing below needs the network

import safetensors
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

EOS, PAD = "<|endoftext|>", "<|pad|>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'Question: ' + message['content'] | trim + '\\nAnswer:' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] | trim + eos_token }}"
    "{% endif %}{% endfor %}"
)
DEFAULT_SAMPLES = [
    "Question:",
    "Question: Tom has 3 boxes with 4 apples in each box. He eats 2. How many apples are left?\nAnswer:",
    "Question: Anna earns $8 an hour. She works 5 hours a day for 6 days. How much does she earn?\nAnswer:",
]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        epilog="Quick check on a CPU (about a minute): --limit 200 --max-steps 10 --answers 8",
    )
    add = parser.add_argument
    add("--train", type=Path, required=True, help="GSM8K train.jsonl: one {question, answer} object a line")
    add("--test", type=Path, required=True, help="GSM8K test.jsonl: held out, to choose and to measure")
    add("--output", type=Path, required=True, help="folder to write the model to (made if missing)")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: CUDA where there is one")
    add(
        "--autocast",
        choices=["bf16", "off"],
        default="bf16",
        help="precision of the matrix products in training",
    )
    add("--epochs", type=float, default=6, help="passes over the training problems")
    add("--max-steps", type=int, default=0, help="train this many steps, whatever --epochs says (0: off)")
    add("--stop-after", type=int, default=0, help="stop after this many steps of the schedule (0: finish it)")
    add("--init-from", type=Path, help="start from the weights of an earlier run's output, with a fresh schedule")
    add("--max-minutes", type=float, default=0, help="stop training after this long (0: no limit)")
    add("--limit", type=int, default=0, help="use the first N problems of each file, for a trial (0: all)")
    add("--batch", type=int, default=16, help="rows of --context tokens in one step")
    add("--context", type=int, default=512, help="tokens in a row, and the model's longest input")
    add("--lr", type=float, default=2e-3, help="peak learning rate")
    add("--warmup", type=int, default=150, help="steps of linear warm-up, at most a tenth of the run")
    add("--weight-decay", type=float, default=0.1, help="AdamW decay of the matrices (not of the norms)")
    add("--dropout", type=float, default=0.05, help="dropout on the embedding and both residual branches")
    add("--clip", type=float, default=1.0, help="gradient norm limit")
    add("--eval-every", type=int, default=200, help="steps between held-out evaluations")
    add("--vocab", type=int, default=2048, help="tokenizer entries, bytes and special tokens included")
    add("--hidden", type=int, default=256, help="hidden size")
    add("--layers", type=int, default=6, help="decoder layers")
    add("--heads", type=int, default=8, help="attention heads; half as many key/value heads (GQA)")
    add("--intermediate", type=int, default=640, help="MLP size")
    add("--answers", type=int, default=100, help="held-out problems to answer greedily and score at the end")
    add("--sample", action="append", metavar="PROMPT", help="prompt to continue at the end; may be repeated")
    add("--seed", type=int, default=1234, help="seed of the weights, the order of the data and the dropout")
    add("--threads", type=int, default=0, help="CPU threads (0: PyTorch's own choice)")
    return parser.parse_args()


def read_documents(path: Path, limit: int) -> list[str]:
    """The problems of a GSM8K file as plain text, without the <<48/2=24>> calculator annotations."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    pairs = [(r["question"].strip(), re.sub(r"<<[^>]*>>", "", r["answer"]).strip()) for r in records]
    return [f"Question: {question}\nAnswer: {answer}" for question, answer in pairs[: limit or None]]


def train_tokenizer(texts: list[str], vocab: int, context: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: it covers any text, and spells every number digit by digit."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[EOS, PAD], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{EOS} $A", pair=f"{EOS} $A $B", special_tokens=[(EOS, tokenizer.token_to_id(EOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=EOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=context,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def encode(tokenizer, texts: list[str], context: int) -> list[list[int]]:
    """Token ids of each document with its end marker; those that do not fit the context are left out."""
    encoded = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    return [[*e.ids, tokenizer.eos_token_id] for e in encoded if len(e.ids) + 2 <= context]


def pack(documents: list[list[int]], rng: random.Random, context: int, bos: int, pad: int) -> torch.Tensor:
    """Shuffle documents and pack them whole into rows: `bos doc eos doc eos ... pad`. None is ever cut."""
    rows, open_rows = [], []
    for document in rng.sample(documents, len(documents)):
        row = next((row for row in open_rows if len(row) + len(document) <= context), None)
        if row is None:
            row = [bos]
            rows.append(row)
            open_rows.append(row)
        row.extend(document)
        open_rows = sorted(open_rows, key=len, reverse=True)[max(0, len(open_rows) - 64) :]
    rng.shuffle(rows)
    return torch.tensor([row + [pad] * (context - len(row)) for row in rows])


def make_model(args: argparse.Namespace, tokenizer) -> LlamaForCausalLM:
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=max(1, args.heads // 2),
        head_dim=args.hidden // args.heads,
        max_position_embeddings=args.context,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=200,
    )
    return model


def add_dropout(model: LlamaForCausalLM, rate: float) -> None:
    """LLaMA has no residual dropout: hooks add it while training, and leave no trace in what is saved."""
    branches = [layer.self_attn.o_proj for layer in model.model.layers]
    branches += [layer.mlp.down_proj for layer in model.model.layers]
    for module in [model.model.embed_tokens, *branches]:
        module.register_forward_hook(lambda m, _, out: F.dropout(out, rate, training=m.training))


def token_loss(model, rows: torch.Tensor, pad: int, reduction: str) -> torch.Tensor:
    """Next-token cross entropy in nats. Padding follows the text, so a causal model needs no mask for it."""
    logits = model(input_ids=rows, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten(), ignore_index=pad, reduction=reduction)


@torch.no_grad()
def evaluate(model, documents: list[list[int]], bos: int, pad: int, batch: int = 32) -> float:
    """Summed loss in nats, every document scored on its own from the start token to its end marker."""
    was_training, total = model.training, 0.0
    model.eval()
    ordered = sorted(documents, key=len)
    for start in range(0, len(ordered), batch):
        part = ordered[start : start + batch]
        width = max(map(len, part))
        rows = torch.tensor([[bos, *ids] + [pad] * (width - len(ids)) for ids in part])
        total += token_loss(model, rows.to(model.device), pad, "sum").item()
    model.train(was_training)
    return total


def save(model, tokenizer, output: Path) -> None:
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(output)
    tokenizer.save_pretrained(output, save_jinja_files=False)


def train(args, model, tokenizer, documents, heldout, device) -> dict:
    """Train, evaluate every --eval-every steps, and keep the best checkpoint so far in the output folder."""
    bos, pad, rng = tokenizer.bos_token_id, tokenizer.pad_token_id, random.Random(args.seed)
    rows = pack(documents, rng, args.context, bos, pad)
    steps_per_epoch = math.ceil(len(rows) / args.batch)
    steps = args.max_steps or max(1, round(args.epochs * steps_per_epoch))
    warmup = max(1, min(args.warmup, steps // 10))
    print(f"{len(rows)} rows, {(rows != pad).float().mean():.1%} full; {steps_per_epoch} steps an epoch")
    print(f"training for {steps} steps ({steps / steps_per_epoch:.1f} epochs) on {device}", flush=True)

    decayed = {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": args.weight_decay}
    others = {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0}
    optimizer = torch.optim.AdamW([decayed, others], lr=args.lr, betas=(0.9, 0.98), fused=device.type == "cuda")

    def learning_rate(step: int) -> float:  # linear warm-up, then a cosine down to 2 % of the peak
        if step < warmup:
            return args.lr * (step + 1) / warmup
        progress = (step - warmup) / max(1, steps - warmup)
        return args.lr * (0.02 + 0.98 * (1 + math.cos(math.pi * progress)) / 2)

    history, best, best_step, position, tokens, running, count = [], math.inf, 0, 0, 0, 0.0, 0
    started, evaluating = time.monotonic(), 0.0
    model.train()
    for step in range(1, steps + 1):
        if position >= len(rows):
            rows, position = pack(documents, rng, args.context, bos, pad), 0
        batch = rows[position : position + args.batch].to(device)
        position += args.batch
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step - 1)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.autocast == "bf16"):
            loss = token_loss(model, batch, pad, "mean")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        running, count, tokens = running + loss.detach(), count + 1, tokens + batch.numel()

        seconds = time.monotonic() - started
        out_of_time = 0 < args.max_minutes * 60 < seconds or step == args.stop_after
        last = step == steps or out_of_time
        if step % 20 == 0 or step == 1:
            speed, left = tokens / (seconds - evaluating), seconds / step * (steps - step) / 60
            print(
                f"step {step:5d}/{steps}  epoch {step / steps_per_epoch:5.2f}  loss {running / count:.4f}  "
                f"lr {learning_rate(step - 1):.1e}  {speed:,.0f} tokens/s  {left:.1f} min left",
                flush=True,
            )
        if step % args.eval_every == 0 or last:
            before = time.monotonic()
            loss = evaluate(model, heldout, bos, pad) / sum(map(len, heldout))
            history.append({"step": step, "train_loss": float(running / count), "heldout_loss": loss})
            mark, running, count = "", 0.0, 0
            if loss < best:
                best, best_step, mark = loss, step, "  <- best so far, saved"
                save(model, tokenizer, args.output)
            print(f"step {step:5d}/{steps}  held-out loss {loss:.4f}{mark}", flush=True)
            evaluating += time.monotonic() - before
        if last:
            break
    if out_of_time and step < steps:
        print(f"stopped after {step} of {steps} steps, as asked", flush=True)
    if not best_step:
        raise SystemExit("training diverged: the held-out loss was never a number")
    return {
        "steps_planned": steps,
        "steps_run": step,
        "epochs_run": round(step / steps_per_epoch, 3),
        "best_step": best_step,
        "tokens_per_second": round(tokens / (time.monotonic() - started - evaluating)),
        "train_seconds": round(time.monotonic() - started, 1),
        "history": history,
    }


@torch.no_grad()
def generate(model, tokenizer, prompts: list[str], **options) -> list[str]:
    """What the model writes after each prompt, up to its end marker."""
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
    output = model.generate(**inputs.to(model.device), **options)[:, inputs["input_ids"].shape[1] :]
    return tokenizer.batch_decode(output, skip_special_tokens=True)


def score_answers(model, tokenizer, texts: list[str], batch: int = 50) -> int:
    """How many problems the model answers correctly: greedy, and the number after #### must match exactly."""
    right = 0
    for start in range(0, len(texts), batch):
        part = texts[start : start + batch]
        prompts = [text.split("\nAnswer:")[0] + "\nAnswer:" for text in part]
        replies = generate(model, tokenizer, prompts, do_sample=False)
        for text, reply in zip(part, replies, strict=True):
            wanted, got = (s.partition("####")[2].strip().replace(",", "") for s in (text, reply))
            right += bool(got) and got == wanted
    return right


def write_card(output: Path, metrics: dict) -> None:
    """The model card: model_card.md with its blanks filled in from the metrics of this run."""
    parts = [f"```text\n{s['prompt']}{s['completion']}\n```" for s in metrics["samples"]]
    template = (Path(__file__).parent / "model_card.md").read_text(encoding="utf-8").replace("\\\n", "")
    before = metrics["earlier_run"]
    lineage = (
        f"They continue an earlier run of {before['steps_run']} steps ({before['epochs_run']} epochs), whose arguments "
        "and loss curve are in `metrics.json` too."
        if before
        else "They start from random weights."
    )
    card = template.format(**metrics, sample_text="\n\n".join(parts), lineage=lineage)
    (output / "README.md").write_text(card, encoding="utf-8")


def earlier_run(folder: Path | None) -> dict | None:
    """What the run whose weights this one started from wrote about itself: its arguments, steps and loss curve."""
    if folder is None:
        return None
    path = folder / "metrics.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {key: known.get(key) for key in ("arguments", "steps_run", "epochs_run", "history", "seed")}


def measure(args, result, documents, selecting, unseen, test_texts, device) -> None:
    """Measures what a user of the folder will get, the saved bf16 weights and tokenizer; writes metrics and card."""
    test = [*selecting, *unseen]
    train_tokens = sum(map(len, documents))
    tokenizer = AutoTokenizer.from_pretrained(args.output)
    model = AutoModelForCausalLM.from_pretrained(args.output, dtype=torch.float32).to(device).eval()

    def summary(losses: list[float], part: list[list[int]]) -> dict:
        loss, scored = sum(losses), sum(map(len, part))
        size = sum(len(tokenizer.decode(ids[:-1]).encode()) for ids in part)
        numbers = {"loss": loss / scored, "perplexity": math.exp(loss / scored)}
        numbers["bits_per_byte"] = loss / math.log(2) / size
        return {"problems": len(part), "tokens": scored, "bytes": size, **numbers}

    losses = [evaluate(model, part, tokenizer.bos_token_id, tokenizer.pad_token_id) for part in (selecting, unseen)]
    metrics = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "weights_bytes": (args.output / "model.safetensors").stat().st_size,
        "test": summary(losses, test),
        "test_unselected": summary(losses[1:], unseen),
        **result,
    }
    numbers = metrics["test"]
    print(
        f"saved weights, {numbers['problems']} held-out problems: loss {numbers['loss']:.4f}, "
        f"perplexity {numbers['perplexity']:.2f}, {numbers['bits_per_byte']:.4f} bits per byte",
        flush=True,
    )
    asked = test_texts[: args.answers]
    metrics["answers"] = {"asked": len(asked), "right": score_answers(model, tokenizer, asked)}
    print(f"right final number: {metrics['answers']['right']} of {len(asked)} held-out problems", flush=True)
    metrics["samples"] = []
    for prompt in args.sample or DEFAULT_SAMPLES:
        torch.manual_seed(args.seed)
        text = generate(model, tokenizer, [prompt], do_sample=True, temperature=0.7, top_k=40)[0]
        metrics["samples"].append({"prompt": prompt, "completion": text})
        print(f"--- sample\n{prompt}{text}", flush=True)
    hardware = f"CPU, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name()
    metrics |= {
        "seed": args.seed,
        "device": hardware,
        "versions": {
            "python": platform.python_version(),
            **{m.__name__: m.__version__ for m in (torch, transformers, tokenizers, safetensors)},
        },
        "architecture": {
            **{key: getattr(args, key) for key in ("hidden", "layers", "heads", "intermediate", "context")},
            "kv_heads": model.config.num_key_value_heads,
            "vocab": len(tokenizer),
        },
        "data": {
            "train_sha256": hashlib.sha256(args.train.read_bytes()).hexdigest(),
            "test_sha256": hashlib.sha256(args.test.read_bytes()).hexdigest(),
            "train_problems": len(documents),
            "train_tokens": train_tokens,
        },
        "arguments": {k: v for k, v in vars(args).items() if k not in ("train", "test", "output", "init_from")},
        "earlier_run": earlier_run(args.init_from),
    }
    (args.output / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    write_card(args.output, metrics)
    print(f"wrote {args.output}: " + ", ".join(sorted(p.name for p in args.output.iterdir())))


def main() -> None:
    args = parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    name = args.device if args.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # it costs time, and nothing here needs it
    transformers.utils.logging.disable_progress_bar()
    args.output.mkdir(parents=True, exist_ok=True)

    train_texts, test_texts = read_documents(args.train, args.limit), read_documents(args.test, args.limit)
    tokenizer = train_tokenizer(train_texts, args.vocab, args.context)
    for text in test_texts[:100]:
        if tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) != text:
            raise SystemExit(f"the tokenizer does not give this text back: {text!r}")
    documents, test = (encode(tokenizer, texts, args.context) for texts in (train_texts, test_texts))
    dropped = len(train_texts) - len(documents), len(test_texts) - len(test)
    train_tokens = sum(map(len, documents))
    print(f"{len(documents)} training problems, {train_tokens:,} tokens; {len(test)} held-out problems")
    print(f"too long for the context and left out: {dropped[0]} training, {dropped[1]} held-out problems")

    model = make_model(args, tokenizer).to(device)
    if args.init_from:
        model.load_state_dict(AutoModelForCausalLM.from_pretrained(args.init_from, dtype=torch.float32).state_dict())
    add_dropout(model, args.dropout)
    parameters = sum(p.numel() for p in model.parameters())  # tied embeddings are counted once
    print(f"{parameters:,} parameters, {parameters * 2 / 1e6:.1f} MB in bf16", flush=True)
    selecting, unseen = test[::2], test[1::2]  # only the first half has a say in which checkpoint is kept
    result = train(args, model, tokenizer, documents, selecting, device)
    measure(args, result, documents, selecting, unseen, test_texts, device)


if __name__ == "__main__":
    main()
