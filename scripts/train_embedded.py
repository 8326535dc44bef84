"""Make the embedded model: its tokenizer, its sample texts and the network itself.

Three sub-commands, run in this order, fill one folder (by default `was_fx/embedded`):

    python scripts/train_embedded.py tokenizer --text DIR
    python scripts/train_embedded.py texts     --text DIR
    python scripts/train_embedded.py train     --text DIR --seconds 75

DIR holds `books.{train,valid,test}.txt.xz`: prose, one blank line between paragraphs, two between books.
`train` wants a CUDA device; on a CPU it runs too (`--steps 20 --batch 2` is a smoke test).
"""

from __future__ import annotations

import argparse
import copy
import json
import lzma
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOS = "<|begin|>", "<|end|>"
BOS_ID, EOS_ID = 0, 1
VOCABULARY = 4096
POSITIONS = 1024
PARAGRAPH, BOOK = "\n\n", "\n\n\n"
# Words with their leading space, digits by threes, punctuation with the line breaks that follow it, so that a
# paragraph's end is one token. No piece reaches across a book's end: books can be encoded one by one.
PIECES = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BOS_SHARE = 0.1  # of the training windows start with BOS, so that a prompt with and without it is familiar
WARMUP = 0.02  # of the run
DEFAULT_OUT = Path(__file__).resolve().parent.parent / "was_fx" / "embedded"

IGNORED = -100  # as a label
Nats = Callable[[LlamaForCausalLM, Tensor, Tensor], Tensor]


def read_books(folder: Path, split: str) -> list[str]:
    """The books of one split, without the blank lines between them."""
    with lzma.open(folder / f"books.{split}.txt.xz", "rt", encoding="utf-8", newline="") as file:
        return [book.strip("\n") for book in file.read().split(BOOK)]


def write_files(out: Path, save: Callable[[Path], object]) -> None:
    """Let `save` write into a temporary folder, then move each file into `out` in one step."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".partial-") as partial:
        save(Path(partial))
        for file in sorted(Path(partial).iterdir()):
            file.chmod(0o644)
            file.replace(out / file.name)


def train_tokenizer(books: list[str]) -> Tokenizer:
    """A byte-level BPE: any text can be encoded, and decoding gives back the same characters."""
    tokenizer = Tokenizer(models.BPE())
    pieces = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pieces, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    paragraphs = (paragraph + PARAGRAPH for book in books for paragraph in book.split(PARAGRAPH))
    tokenizer.train_from_iterator(paragraphs, trainer)
    return tokenizer


def make_tokenizer(args: argparse.Namespace) -> None:
    """Train on the training books only and save the files that AutoTokenizer reads."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=train_tokenizer(read_books(args.text, "train")),
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
    )
    if (tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer)) != (BOS_ID, EOS_ID, VOCABULARY):
        raise RuntimeError(f"{len(tokenizer)} tokens, or special tokens elsewhere than at 0 and 1")
    write_files(args.out, tokenizer.save_pretrained)


def excerpt(book: str, size: int) -> str:
    """Whole paragraphs from the middle of a book, `size` bytes or a paragraph more."""
    paragraphs = book.split(PARAGRAPH)
    first, taken = len(paragraphs) // 2, 0
    for last in range(first, len(paragraphs)):
        taken += len((paragraphs[last] + PARAGRAPH).encode())
        if taken >= size:
            break
    return PARAGRAPH.join(paragraphs[first : last + 1])


def make_texts(args: argparse.Namespace) -> None:
    """Cut about `--bytes` bytes for each sample text, spread evenly over up to eight books of its split."""
    for name, split in {"calibration": "train", "validation": "valid", "test": "test"}.items():
        books = read_books(args.text, split)
        count = min(8, len(books))
        chosen = [books[i * len(books) // count] for i in range(count)]
        text = BOOK.join(excerpt(book, args.bytes // count) for book in chosen) + "\n"
        write_files(args.out, lambda folder, n=name, t=text: (folder / f"{n}.txt").write_bytes(t.encode()))


def build_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=POSITIONS,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=EOS_ID,
    )
    return LlamaForCausalLM(config)


def encode(tokenizer: Tokenizer, books: list[str]) -> Tensor:
    """One stream of token ids: every book between BOS and EOS."""
    ids: list[Tensor] = []
    for start in range(0, len(books), 16):
        for encoded in tokenizer.encode_batch_fast(books[start : start + 16]):
            ids.append(torch.tensor([BOS_ID, *encoded.ids, EOS_ID], dtype=torch.int32))
    return torch.cat(ids)


def windows(ids: Tensor, context: int, offset: int = 0) -> Tensor:
    """[n, context + 1]: consecutive windows that share one token, so that each token is predicted once."""
    return ids[offset:].unfold(0, context + 1, context)


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().flatten(0, 1), y.flatten(), reduction="sum", ignore_index=IGNORED)


def nats_sum(model: LlamaForCausalLM, x: Tensor, y: Tensor) -> Tensor:
    """Summed cross-entropy of `y` after `x`.

    The blocks are called without a mask, so that attention takes its causal flash kernel; under torch.compile
    transformers would build the full mask instead.
    """
    with torch.autocast(x.device.type, torch.bfloat16):
        body = model.model
        hidden = body.embed_tokens(x)
        rotary = body.rotary_emb(hidden, torch.arange(x.shape[1], device=x.device)[None])
        for block in body.layers:
            hidden = block(hidden, position_embeddings=rotary)
        logits = model.lm_head(body.norm(hidden))
    return cross_entropy(logits, y)


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, nats: Nats, rows: Tensor, batch: int) -> float:
    """Mean nats per token over all windows; the last batch is filled up with ignored rows."""
    total = torch.zeros((), device=rows.device)
    for part in rows.split(batch):
        x, y = part[:, :-1].long(), part[:, 1:].long()
        missing = batch - len(part)
        total += nats(model, F.pad(x, (0, 0, 0, missing)), F.pad(y, (0, 0, 0, missing), value=IGNORED))
    return total.item() / (rows.shape[0] * (rows.shape[1] - 1))


def batches(ids: Tensor, context: int, batch: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless epochs: windows from a random offset in random order, the short last batch left out."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        rows = windows(ids, context, int(torch.randint(context, (), generator=generator)))
        order = torch.randperm(len(rows), generator=generator).to(ids.device)
        marked = (torch.rand(len(rows), generator=generator) < BOS_SHARE).to(ids.device)
        for chosen in order[: len(order) // batch * batch].split(batch):
            part = rows[chosen].long()
            x = part[:, :-1].clone()
            x[:, 0] = torch.where(marked[chosen], BOS_ID, x[:, 0])
            yield x, part[:, 1:]


def make_optimizer(model: LlamaForCausalLM, lr: float, decay: float) -> torch.optim.Optimizer:
    """AdamW that decays matrices and leaves the norms alone."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


def fit(
    model: LlamaForCausalLM, nats: Nats, train: Tensor, valid: Tensor, args: argparse.Namespace
) -> list[dict[str, float]]:
    """Train until the time or the steps are used up; keep the checkpoint with the best validation loss."""
    optimizer = make_optimizer(model, args.lr, args.weight_decay)
    data = batches(train, args.context, args.batch, args.seed)
    per_step = args.batch * args.context
    history: list[dict[str, float]] = []
    best = math.inf
    for _ in range(2):  # compile both graphs before the clock starts
        (nats(model, *next(data)) / per_step).backward()
        optimizer.zero_grad()
        evaluate(model, nats, valid[: args.batch], args.batch)
    start, step, progress = time.monotonic(), 0, 0.0
    while progress < 1:
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(progress / WARMUP, (1 - progress) / (1 - WARMUP))
        loss = nats(model, *next(data)) / per_step
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        progress = min(1.0, max((time.monotonic() - start) / args.seconds, step / args.steps))
        if step % args.eval_every == 0 or progress == 1:
            now = {"step": step, "epoch": step * per_step / len(train), "train": loss.item()}
            now["valid"] = evaluate(model, nats, valid, args.batch)
            now["seconds"] = time.monotonic() - start
            history.append(now)
            print({key: round(value, 4) for key, value in now.items()}, flush=True)
            if now["valid"] < best:
                best = now["valid"]
                write_files(args.out, copy.deepcopy(model).to(torch.bfloat16).save_pretrained)
    return history


def make_model(args: argparse.Namespace) -> None:
    """Train, reload what was saved, and measure that on the validation and the test books."""
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = Tokenizer.from_file(str(args.out / "tokenizer.json"))
    books = {split: read_books(args.text, split) for split in ("train", "valid", "test")}
    ids = {split: encode(tokenizer, books[split]).to(device) for split in books}
    model = build_model().to(device)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters} parameters; tokens:", {split: len(part) for split, part in ids.items()}, flush=True)
    nats = torch.compile(nats_sum, dynamic=False) if device.type == "cuda" else nats_sum
    history = fit(model, nats, ids["train"], windows(ids["valid"], args.context), args)
    saved = AutoModelForCausalLM.from_pretrained(args.out, dtype=torch.bfloat16).to(device).eval()
    own_forward: Nats = lambda net, x, y: cross_entropy(net(x, use_cache=False).logits, y)  # noqa: E731
    results = {}
    for split in ("valid", "test"):
        loss = evaluate(saved, own_forward, windows(ids[split], args.context), args.batch)
        size = sum(len(book.encode()) for book in books[split])
        bits = loss / math.log(2) * len(ids[split]) / size
        results[split] = {"nats_per_token": loss, "bits_per_byte": bits, "perplexity": math.exp(loss)}
    best = min(entry["valid"] for entry in history)
    report = {"parameters": parameters, "saved": results, "best_valid_in_training": best, "history": history}
    if args.history:
        args.history.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(results, indent=1))
    again = results["valid"]["nats_per_token"]
    if abs(again - best) > 0.01:
        raise RuntimeError(f"the reloaded model has {again:.4f} nats/token, the trained one had {best:.4f}")


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(required=True)
    for name, function in {"tokenizer": make_tokenizer, "texts": make_texts, "train": make_model}.items():
        command = commands.add_parser(name, help=function.__doc__)
        command.set_defaults(function=function)
        command.add_argument("--text", type=Path, required=True, help="folder of books.*.txt.xz")
        command.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder to fill")
        if name == "texts":
            command.add_argument("--bytes", type=int, default=200_000, help="size of each text")
        if name == "train":
            command.add_argument("--seconds", type=float, default=75, help="time; drives the schedule")
            command.add_argument("--steps", type=int, default=10**9, help="stop after so many steps at most")
            command.add_argument("--batch", type=int, default=64, help="windows a step")
            command.add_argument("--context", type=int, default=POSITIONS, help="tokens a window")
            command.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
            command.add_argument("--weight-decay", type=float, default=0.1)
            command.add_argument("--eval-every", type=int, default=500, help="steps between validations")
            command.add_argument("--seed", type=int, default=1)
            command.add_argument("--history", type=Path, help="JSON file for the losses (default: none)")
    args = parser.parse_args()
    args.function(args)


if __name__ == "__main__":
    main()
