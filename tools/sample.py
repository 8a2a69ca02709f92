"""Write text with the model of an artifact, and show it as it is written.

    python tools/sample.py runs/ID "The first line"
    python tools/sample.py model.int6.ptz --tokenizer FILE --tokens 500 --top-p 0.9
    python tools/sample.py runs/ID --prompts FILE         # each line of FILE is a prompt
    python tools/sample.py runs/ID                        # asks for prompts; Ctrl-D ends

MODEL is an artifact or the folder of a run. How it was evaluated, and where its tokenizer lies, is
read from the train.log beside it; without one, --tokenizer says where. Without a prompt and without
a terminal, the prompt is read from the standard input.

The probabilities are those that the evaluation scores: the model sees windows of EVAL_SEQ_LEN
tokens that move on by EVAL_STRIDE, from the beginning of a document. --context N makes them
shorter. The exit code is 0, or 1 with one line that says what is wrong, or 2 for unusable
arguments.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

try:
    import check
    import torch
    from torch import Tensor
except ImportError as missing:
    raise SystemExit(f"error: {missing.name} is missing: pip install -r requirements.txt") from None

import train_gpt
from train_gpt import UserError

ARTIFACT = "model.int6.ptz"
UNDECODED = "\N{REPLACEMENT CHARACTER}"  # what stands for bytes that are no character yet


# ---- The model -----------------------------------------------------------------------------------


def fold_adapters(model: train_gpt.LanguageModel, dtype: torch.dtype) -> None:
    """Compute W + ΔW of every map once: it does not change from token to token."""
    for module in model.modules():
        if isinstance(module, train_gpt.Linear):
            weight = train_gpt.merge_weights([module.parts(dtype)])
            folded = train_gpt.MapParts(weight, weight[:, :0], weight[:0])
            module.parts = lambda dtype, folded=folded: folded


class Window:
    """The window that a model sees, with the keys and values of the tokens that it has read.

    The model's own forward pass reads each token once. Only what it knows of earlier tokens comes
    from here: keys and values, the tokens that its embedding depends on, and the position.
    """

    def __init__(self, model: train_gpt.LanguageModel, length: int, stride: int) -> None:
        self.model, self.length, self.stride = model, length, stride
        self.device = next(model.parameters()).device
        self.threads = torch.get_num_threads()
        for module in model.modules():
            if isinstance(module, train_gpt.GPT):
                module.embed_tokens = self.with_earlier_tokens(module.embed_tokens)
                module.rotary = self.at_position(module.rotary(length))
            if isinstance(module, train_gpt.Attention):
                module.attend = self.with_earlier_keys(module.attend)
        self.clear(0)

    def clear(self, start: int = 0) -> None:
        """Forget everything; the window begins at this token of the text."""
        self.start = start
        self.read: list[int] = []  # the tokens whose keys and values are known
        self.keys_and_values: list[tuple[Tensor, Tensor]] = []  # by turn
        self.turn = 0  # how often attention ran in this forward pass

    def with_earlier_tokens(self, embed: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return `embed_tokens` that knows the two tokens before.

        Smear mixes in the position before, and that one has the bigram of its own predecessor.
        """

        def embed_tokens(ids: Tensor, streaming: bool) -> Tensor:
            earlier = ids.new_tensor([self.read[-2:]])
            return embed(torch.cat([earlier, ids], 1), streaming)[:, earlier.size(1) :]

        return embed_tokens

    def at_position(self, table: Tensor) -> Callable[[int], Tensor]:
        """Return `rotary` whose first position is that after the tokens that were read."""

        def rotary(count: int) -> Tensor:
            return table[:, len(self.read) : len(self.read) + count + 1]

        return rotary

    def with_earlier_keys(self, attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return `attend` that also attends to the tokens that were read."""

        def attend_to_all(q: Tensor, k: Tensor, v: Tensor, context: Any) -> Tensor:
            if self.read:
                earlier_k, earlier_v = self.keys_and_values[self.turn]
                k, v = torch.cat([earlier_k, k], 1), torch.cat([earlier_v, v], 1)
            self.keys_and_values[self.turn : self.turn + 1] = [(k, v)]
            self.turn += 1
            return attend(q, k, v, context)

        return attend_to_all

    def begin(self, count: int) -> int:
        """Return where the window begins from which the evaluation scores token number `count`."""
        steps = -(-max(0, count - self.length) // self.stride)
        return steps * self.stride

    @torch.inference_mode()
    def next_logits(self, tokens: list[int]) -> Tensor:
        """Return the logits (vocabulary,) of what follows a text that goes on from the last one."""
        start = self.begin(len(tokens))
        if start != self.start:
            self.clear(start)
        new = tokens[start + len(self.read) :]
        self.turn = 0
        ids = torch.tensor([new], device=self.device)
        # One token is too little work to share out: threads would only wait for each other.
        torch.set_num_threads(1 if len(new) == 1 else self.threads)
        logits = self.model.predict(ids, 1)
        self.read += new
        return logits[0, -1]


# ---- Sampling ------------------------------------------------------------------------------------


class Sampling(NamedTuple):
    """How a token is chosen."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the probabilities (vocabulary,) float64 on the CPU from which a token is drawn.

        With temperature 1 and no top-k and top-p they are those that the evaluation scores.
        """
        logits = logits.double().cpu()
        if not self.temperature:
            return torch.nn.functional.one_hot(logits.argmax(), len(logits)).double()
        values, order = (logits / self.temperature).softmax(-1).sort(descending=True)
        before = values.cumsum(0) - values
        kept = before < self.top_p
        if self.top_k:
            kept[self.top_k :] = False
        kept[0] = True
        chosen = torch.zeros_like(values).scatter(0, order, values * kept)
        return chosen / chosen.sum()


class Writer:
    """A model that continues texts."""

    def __init__(
        self, window: Window, tokenizer: train_gpt.Tokenizer, sampling: Sampling, seed: int | None
    ) -> None:
        self.window, self.tokenizer, self.sampling = window, tokenizer, sampling
        self.generator = torch.Generator()
        self.seed = self.generator.seed() if seed is None else seed

    def encode(self, prompt: str) -> list[int]:
        """Return the tokens of a document that begins with the prompt."""
        model = self.tokenizer.model
        begin = [model.bos_id()] if model.bos_id() >= 0 else []
        tokens = begin + model.encode(prompt)
        if not tokens:
            raise UserError(
                "this tokenizer has no token for the beginning of a text; give a prompt"
            )
        return tokens

    def tokens(self, prompt: list[int], count: int) -> Iterator[int]:
        """Yield tokens that follow the prompt, until the document ends."""
        self.window.clear()
        self.generator.manual_seed(self.seed)  # one prompt does not depend on the others
        text = list(prompt)
        for _ in range(count):
            logits = self.window.next_logits(text)
            probabilities = self.sampling.probabilities(logits)
            token = torch.multinomial(probabilities, 1, generator=self.generator).item()
            if self.tokenizer.is_control[token]:
                return
            text.append(token)
            yield token

    def pieces(self, prompt: str, count: int) -> Iterator[str]:
        """Yield the continuation of a prompt as it is written, in whole characters."""
        tokens = self.encode(prompt)
        decode = self.tokenizer.model.decode
        shown = decode(tokens)
        for token in self.tokens(list(tokens), count):
            tokens.append(token)
            text = decode(tokens)
            if not text.endswith(UNDECODED):
                yield text[len(shown) :]
                shown = text
        yield decode(tokens)[len(shown) :]

    def show(self, prompt: str, count: int) -> None:
        """Print a prompt and its continuation, and how fast that was."""
        print(prompt, end="", flush=True)
        began = time.perf_counter()
        written = -1  # the last piece is what was left
        try:
            for piece in self.pieces(prompt, count):
                print(piece, end="", flush=True)
                written += 1
        finally:
            print(flush=True)
        seconds = time.perf_counter() - began
        speed = f"{written / seconds:.1f} tokens/s"
        print(f"[{written} of {count} tokens, {speed}]", file=sys.stderr, flush=True)


# ---- What lies beside the artifact ---------------------------------------------------------------


def find_artifact(path: Path) -> Path:
    """Return the artifact that a path names. UserError if there is none."""
    if not path.is_dir():
        return path
    artifact = path / ARTIFACT
    if not artifact.exists():
        is_run = (path / "train.log").exists()
        why = "the run is still going, or was stopped" if is_run else "it is not a run's folder"
        raise UserError(f"{path} has no {ARTIFACT}: {why}")
    return artifact


def run_settings(artifact: Path) -> dict[str, str]:
    """Return the settings of the artifact's run, from the log beside it; empty without a log."""
    with contextlib.suppress(check.CannotCheck):
        return check.Submission(artifact.parent, check.Options()).settings
    return {}


def whole_number(settings: dict[str, str], name: str, default: int) -> int:
    """Return a setting that is a positive number, or the default without one."""
    text = settings.get(name, "")
    return int(text) if text.isdecimal() and int(text) else default


def tokenizer_paths(settings: dict[str, str]) -> Iterator[Path]:
    """Yield where the tokenizer of a run may lie: by the manifest of its data, then by its log."""
    for base in (Path(), ROOT):
        folder = base / settings.get("DATA_PATH", "")
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            yield folder / json.loads((folder / "manifest.json").read_bytes())["tokenizer"]
        if settings.get("TOKENIZER_PATH"):
            yield base / settings["TOKENIZER_PATH"]


def find_tokenizer(
    given: str, settings: dict[str, str], sha256: str, vocab_size: int
) -> train_gpt.Tokenizer:
    """Return the tokenizer of an artifact. UserError if it is not there or is another one."""
    paths = [Path(given)] if given else list(tokenizer_paths(settings))
    existing = [path for path in paths if given or path.is_file()]
    if not existing:
        tried = ", ".join(map(str, paths)) or "there is no train.log beside the artifact"
        raise UserError(f"the tokenizer is not found ({tried}); name it with --tokenizer")
    for path in existing:
        tokenizer = train_gpt.Tokenizer(str(path), vocab_size)
        if tokenizer.sha256 == sha256:
            return tokenizer
    raise UserError(f"{existing[0]} is not the tokenizer of the artifact; name it with --tokenizer")


@contextlib.contextmanager
def open_writer(args: argparse.Namespace) -> Iterator[Writer]:
    """Within, there is a writer with the model of MODEL."""
    path = find_artifact(args.model)
    with train_gpt.untrusted_input(f"MODEL {path}"):
        blob = path.read_bytes()
    run = run_settings(path)
    length = args.context or whole_number(run, "EVAL_SEQ_LEN", 1024)
    settings = {
        "eval_only": 1,
        "model_path": str(path),
        "device": args.device,
        "dtype": run.get("DTYPE", "auto"),
        "eval_seq_len": length,  # it decides the rotations
        "train_seq_len": length,
        "eval_stride": min(length, whole_number(run, "EVAL_STRIDE", 64)),
    }
    h = train_gpt.settings_from_artifact(train_gpt.load_settings({}, **settings), blob)
    header, _ = train_gpt.read_artifact(blob)
    tokenizer = find_tokenizer(args.tokenizer, run, header.get("tokenizer", ""), h.vocab_size)
    with train_gpt.Distributed(h) as dist:
        model = train_gpt.model_from_artifact(h, blob, dist)
        with torch.inference_mode():
            fold_adapters(model, train_gpt.resolve_dtype(h, dist.on_cuda))
        window = Window(model, length, h.eval_stride)
        sampling = Sampling(args.temperature, args.top_k, args.top_p)
        yield Writer(window, tokenizer, sampling, args.seed)


# ---- Command -------------------------------------------------------------------------------------


def read_text(path: Path | None) -> str:
    """Return the text of a file, or of the standard input. UserError if it is no text."""
    name = str(path) if path else "the standard input"
    try:
        content = path.read_bytes() if path else sys.stdin.buffer.read()
        text = content.decode("utf-8")
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{name} is not UTF-8 text") from None
    if "\0" in text:
        raise UserError(f"{name} is not text")
    return text


def read_prompts(args: argparse.Namespace) -> list[str] | None:
    """Return the prompts, or None to ask for them."""
    if args.prompts:
        lines = [line for line in read_text(args.prompts).splitlines() if line.strip()]
        if not lines:
            raise UserError(f"{args.prompts} has no prompt")
        return lines
    if args.prompt is not None:
        return [args.prompt]
    return None if sys.stdin.isatty() else [read_text(None).removesuffix("\n")]


def ask(writer: Writer, count: int) -> None:
    """Continue what a person types, until Ctrl-D. Ctrl-C ends a text."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives `input` a history
    print("Type the beginning of a text. Ctrl-C ends a text, Ctrl-D the program.", file=sys.stderr)
    while True:
        try:
            prompt = input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        with contextlib.suppress(KeyboardInterrupt):
            writer.show(prompt, count)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Return the options of a command line."""
    parser = argparse.ArgumentParser(
        prog="sample.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL", help="artifact, or the folder of a run")
    add("prompt", nargs="?", metavar="PROMPT", help="beginning of the text")
    add("--prompts", type=Path, metavar="FILE", help="a prompt in each line")
    add("--tokens", type=int, default=200, help="tokens to write at most (default 200)")
    add("--temperature", type=float, default=1.0, help="0 takes the likeliest token (default 1)")
    add("--top-k", type=int, default=0, help="choose among K tokens; 0: all (default)")
    add("--top-p", type=float, default=1.0, help="among the likeliest that have this probability")
    add("--seed", type=int, help="the same seed gives the same text (default: a random one)")
    add("--context", type=int, metavar="N", help="tokens that the model sees (default: the run's)")
    add("--tokenizer", default="", metavar="FILE", help="SentencePiece model of the artifact")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default auto)")
    args = parser.parse_args(arguments)
    problems = {
        "--tokens must be at least 1": args.tokens < 1,
        "--temperature must not be negative": not 0 <= args.temperature < float("inf"),
        "--top-k must not be negative": args.top_k < 0,
        "--top-p must be over 0 and at most 1": not 0 < args.top_p <= 1,
        "--context must be from 1 to 1,048,576": args.context is not None
        and not 1 <= args.context <= 2**20,
        "PROMPT and --prompts are two sources": args.prompts and args.prompt is not None,
    }
    for problem, is_one in problems.items():
        if is_one:
            parser.error(problem)
    return args


def sample(args: argparse.Namespace) -> None:
    """Write texts as the options ask for."""
    prompts = read_prompts(args)
    with open_writer(args) as writer:
        if prompts is None:
            ask(writer, args.tokens)
            return
        for i, prompt in enumerate(prompts):
            if i:
                print("\n---\n")
            writer.show(prompt, args.tokens)


def main(arguments: list[str] | None = None) -> int:
    """Run the tool; return the exit code."""
    args = parse(arguments)
    try:
        sample(args)
    except UserError as error:
        text = " ".join(str(error).split())
        print(f"error: {text}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # as in `sample.py ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
