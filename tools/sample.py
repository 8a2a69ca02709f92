"""Write text with the model of an artifact, and show it as it is written.

    python tools/sample.py runs/ID "The first line"
    python tools/sample.py model.int6.ptz --tokenizer FILE --tokens 500 --top-p 0.9
    python tools/sample.py runs/ID < FILE     # each line is a prompt
    python tools/sample.py runs/ID            # so is each line that you type; Ctrl-D ends

MODEL is an artifact or the folder of a run. The results.json beside the artifact says where its
tokenizer lies; without one, --tokenizer does.

The probabilities are those that the evaluation scores: the model sees windows of EVAL_SEQ_LEN
tokens that move on by EVAL_STRIDE, from the beginning of a document. --context N makes them
shorter. MODEL_LIMIT_BYTES is taken from the environment. The exit code is 0, or 1 with one line
that says what is wrong, or 2 for unusable arguments.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

try:
    import torch
    from torch import Tensor
except ImportError as missing:
    raise SystemExit(f"error: {missing.name} is missing: pip install -r requirements.txt") from None

import train_gpt
from train_gpt import UserError

UNDECODED = "\N{REPLACEMENT CHARACTER}"  # what stands for bytes that are no character yet


# ---- The model -----------------------------------------------------------------------------------


class Window:
    """The window of a text that the model sees, as the evaluation moves it on."""

    def __init__(self, model: train_gpt.LanguageModel, length: int, stride: int) -> None:
        self.model, self.length, self.stride = model, length, stride
        self.device = next(model.parameters()).device

    @torch.inference_mode()
    def next_logits(self, tokens: list[int]) -> Tensor:
        """Return the logits (vocabulary,) of what follows a text."""
        # Where the window begins from which the evaluation scores this token.
        start = -(-max(0, len(tokens) - self.length) // self.stride) * self.stride
        window = tokens[start:]
        ids = window + [0] * (self.length - len(window))  # rotations depend on the length
        return self.model.predict(torch.tensor([ids], device=self.device))[0, len(window) - 1]


# ---- Sampling ------------------------------------------------------------------------------------


def probabilities(
    logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> Tensor:
    """Return the probabilities (vocabulary,) float64 on the CPU from which a token is drawn.

    With temperature 1 and no top-k and top-p they are those that the evaluation scores.
    """
    logits = logits.double().cpu()
    if not temperature:
        return torch.nn.functional.one_hot(logits.argmax(), len(logits)).double()
    values, order = (logits / temperature).softmax(-1).sort(descending=True)
    kept = values.cumsum(0) - values < top_p  # what is likelier has less than this together
    if top_k:
        kept[top_k:] = False
    kept[0] = True
    chosen = torch.zeros_like(values).scatter(0, order, values * kept)
    return chosen / chosen.sum()


class Writer:
    def __init__(
        self, window: Window, tokenizer: train_gpt.Tokenizer, args: argparse.Namespace
    ) -> None:
        self.window, self.tokenizer, self.args = window, tokenizer, args
        self.generator = torch.Generator()
        self.seed = self.generator.seed() if args.seed is None else args.seed
        self.written = 0  # tokens that follow the last prompt

    def encode(self, prompt: str) -> list[int]:
        """Return the tokens of a document that begins with the prompt."""
        model = self.tokenizer.model
        begin = [model.bos_id()] if model.bos_id() >= 0 else []
        tokens = begin + model.encode(prompt)
        if not tokens:
            problem = "this tokenizer has no token for the beginning of a text"
            raise UserError(f"{problem}; give a prompt")
        return tokens

    def tokens(self, prompt: list[int]) -> Iterator[int]:
        """Yield tokens that follow the prompt, until the document ends."""
        self.generator.manual_seed(self.seed)  # one prompt does not depend on the others
        text = list(prompt)
        self.written = 0
        for _ in range(self.args.tokens):
            logits = self.window.next_logits(text)
            chances = probabilities(logits, self.args.temperature, self.args.top_k, self.args.top_p)
            token = torch.multinomial(chances, 1, generator=self.generator).item()
            if self.tokenizer.is_control[token]:
                return
            text.append(token)
            self.written += 1
            yield token

    def pieces(self, prompt: str) -> Iterator[str]:
        """Yield the continuation of a prompt as it is written, in whole characters."""
        tokens = self.encode(prompt)
        decode = self.tokenizer.model.decode
        shown = decode(tokens)
        for token in self.tokens(tokens):
            tokens.append(token)
            text = decode(tokens)
            if not text.endswith(UNDECODED):
                yield text[len(shown) :]
                shown = text
        yield decode(tokens)[len(shown) :]

    def show(self, prompt: str) -> None:
        print(prompt, end="", flush=True)
        began = time.perf_counter()
        for piece in self.pieces(prompt):
            print(piece, end="", flush=True)
        speed = self.written / (time.perf_counter() - began)
        print(flush=True)
        print(f"[{self.written} of {self.args.tokens} tokens, {speed:.1f}/s]", file=sys.stderr)


@contextlib.contextmanager
def open_writer(args: argparse.Namespace) -> Iterator[Writer]:
    """Within, there is a writer with the model of MODEL."""
    path = str(args.model / "model.int6.ptz" if args.model.is_dir() else args.model)
    blob = train_gpt.read_file("MODEL", path)
    how = {name: text for name, text in os.environ.items() if name == "MODEL_LIMIT_BYTES"}
    how |= {"EVAL_ONLY": "1", "MODEL_PATH": path, "DEVICE": args.device}
    h = train_gpt.settings_from_artifact(train_gpt.load_settings(how), blob)
    length = args.context or h.eval_seq_len
    stride = min(length, h.eval_stride)
    # No table of rotations may be of another length: the base depends on it.
    h = dataclasses.replace(h, eval_seq_len=length, train_seq_len=length, eval_stride=stride)
    name = args.tokenizer or train_gpt.locations_beside(path).get("tokenizer_path")
    if not name:
        problem = f"no results.json beside {path} says where the tokenizer lies"
        raise UserError(f"{problem}; name it with --tokenizer")
    tokenizer = train_gpt.Tokenizer(name, h.vocab_size)
    header, _ = train_gpt.read_header(blob)
    if tokenizer.sha256 != header.get("tokenizer"):
        raise UserError(f"{name} is not the tokenizer of the artifact; name it with --tokenizer")
    with train_gpt.Distributed(h) as dist:
        model = train_gpt.model_from_artifact(h, blob, dist)
        yield Writer(Window(model, length, stride), tokenizer, args)


# ---- Command -------------------------------------------------------------------------------------


def read_prompts() -> Iterable[str]:
    """Yield the lines of the standard input. UserError if it is no text."""
    if sys.stdin.isatty():
        print("Each line is the beginning of a text. Ctrl-D ends.", file=sys.stderr)
    for line in sys.stdin.buffer:
        try:
            prompt = line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError:
            raise UserError("the standard input is not UTF-8 text") from None
        if prompt.strip():
            yield prompt


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="sample.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL", help="artifact, or the folder of a run")
    add("prompt", nargs="?", metavar="PROMPT", help="beginning of the text")
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
    }
    for problem, is_one in problems.items():
        if is_one:
            parser.error(problem)
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    try:
        prompts = read_prompts() if args.prompt is None else [args.prompt]
        with open_writer(args) as writer:
            for prompt in prompts:
                writer.show(prompt)
    except UserError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 1
    except BrokenPipeError:  # as in `sample.py ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
