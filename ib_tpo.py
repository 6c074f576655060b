# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.13", "transformers>=5.23", "datasets", "sympy", "tqdm"]
# ///
"""IB-TPO: Information Bottleneck Driven Tree-based Policy Optimization (arXiv 2605.28109), in one file.

    python ib_tpo.py                                         # a tiny policy on a laptop: warm start, RL, before/after
    python ib_tpo.py --sampler entropy --advantage gl        # the ablations; any field of `Config` is a flag
    python ib_tpo.py --model Qwen2.5-0.5B --dataset gsm8k    # the same code on a real model and one GPU

Marks in the comments: [P] the paper, [O] our own choice. The authors have released no code.
Shapes: B batch, T response tokens, S prompt and response tokens, V vocabulary, H hidden width. Entropies are in nats.
"""
from __future__ import annotations

import ast
import contextlib
import difflib
import functools
import hashlib
import inspect
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import unicodedata
import zlib
from collections import Counter, defaultdict, deque
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Literal, Optional

import datasets
import sympy
import torch
import yaml
from huggingface_hub import HfApi
from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, models
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import (AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, DynamicCache, GenerationConfig,
                          LogitsProcessor, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, StoppingCriteria)
from transformers.cache_utils import DynamicLayer
from transformers.hf_argparser import HfArg, HfArgumentParser
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import logging

logging.set_verbosity_error()
logging.disable_progress_bar()
datasets.disable_progress_bars()

# ---------------------------------------------------------------------------------------------------------------------
# Configuration. The defaults are for a real model; tiny_config.yaml holds what the tiny task does differently.
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Config:
    """All settings: each field is a flag and a line of a YAML file; its help says what it does."""
    # the run
    model: str = HfArg(default="tiny", help="hub name, short name (Qwen2.5-0.5B) or local folder; tiny: the tiny policy")
    config: Optional[str] = HfArg(default=None, help="YAML file of these fields; flags win (tiny: tiny_config.yaml)")
    method: Literal["ib_tpo", "grpo"] = HfArg(
        default="ib_tpo", help="sets the default of sampler and advantage: ib and gl+ib, or independent and grpo")
    max_steps: int = HfArg(default=200, help="RL steps, one batch of prompts each")
    max_tokens: int = HfArg(default=0, help="stop when this many tokens have been sampled; 0: never")
    seed: int = HfArg(default=0, help="of problems, sampling and training; the warm start is the same for every seed")
    out: Optional[str] = HfArg(default=None, help="output folder (default: the next free runs/METHOD-SEED-N)")
    resume: bool = HfArg(default=False, help="go on from OUT/state.pt")
    save_every: int = HfArg(default=50, help="steps between checkpoints")
    compare: str = HfArg(default="", help="compare: variants METHOD[+field=value...], comma-separated; trains all of them")
    seeds: int = HfArg(default=4, help="compare: seeds of each variant")
    show: bool = HfArg(default=False, help="do not train: print the tree that the policy of OUT, or the warm start, grows")
    plot: list[str] = field(default_factory=list, metadata={"help": "do not train: draw the runs in these folders, as SVG"})
    jobs: int = HfArg(default=1, help="compare: runs at a time, each in a process with its share of the cores")
    device: Literal["auto", "cpu", "cuda"] = HfArg(default="auto", help="auto: cuda where there is one")
    branching_table: int = HfArg(default=0, help="do not train: compare the samplers on this many held-out problems")
    # problems
    dataset: str = HfArg(default="gsm8k", help="gsm8k, math, chain (the tiny task), or a .jsonl, .json or .parquet file")
    question_column: str = HfArg(default="question", help="of a local file")
    answer_column: str = HfArg(default="answer", help="of a local file; a worked solution is cut to its final answer")
    prompt: str = HfArg(default="{question}\nReason step by step and put your final answer within \\boxed{}.",
                        help="what the policy is asked; {question} is replaced")
    operands: list[int] = field(default_factory=lambda: [4, 7], metadata={"help": "chain: fewest and most digits"})
    warm_steps: int = HfArg(default=1000, help="tiny policy: supervised steps before RL")
    warm_batch: int = HfArg(default=128, help="tiny policy: demonstrations a warm-start step")
    # rollout
    prompts_per_step: int = HfArg(default=16, help="prompts a step")
    max_new_tokens: int = HfArg(default=1024, help="longest response")
    generate_tokens: int = HfArg(default=131072, help="tokens (rows x longest) sampled in one generate call")
    # the tree
    sampler: Optional[Literal["ib", "independent", "random", "fixed", "entropy"]] = HfArg(
        default=None, help="where to branch: highest IB-Score, nowhere, anywhere, everywhere once, highest token entropy")
    tree: list[int] = field(default_factory=lambda: [4, 9, 1, 1], metadata={
        "help": "B0 L K B: rollouts from the root; rounds, the first included; nodes a round; continuations a node"})
    rollouts: int = HfArg(default=0, help="responses a prompt of the independent sampler; 0: as many as a tree has")
    delimiter: str = HfArg(default="\n\n", help="what a reasoning step ends with")
    step_prob: Literal["geomean", "product"] = HfArg(default="geomean", help="pi(s), of a step's token probabilities")
    beta: float = HfArg(default=5.0, help="beta: weight of what a step says about the answer in the IB-Score")
    # update
    advantage: Optional[Literal["gl+ib", "gl", "ib", "grpo"]] = HfArg(
        default=None, help="of a step: A_GL + lam A_IB, one of them, or that of its trajectories' outcomes")
    lam: float = HfArg(default=0.1, help="lambda: weight of A_IB")
    update: Literal["tree", "flat"] = HfArg(default="tree", help="a shared prefix is visited once, or once a trajectory")
    lr: float = HfArg(default=1e-6, help="AdamW learning rate")
    lr_warmup: int = HfArg(default=5, help="steps of linear learning-rate warm-up")
    updates_per_step: int = HfArg(default=1, help="optimizer steps a batch; above 1 the clip below comes into play")
    clip_low: float = HfArg(default=0.2, help="the ratio is clipped to [1 - clip_low, 1 + clip_high]")
    clip_high: float = HfArg(default=0.2, help="see clip_low")
    loss_mean = "token"  # not a field: the paper's objective is a mean over tokens
    kl: float = HfArg(default=0.001, help="weight of the k3 KL to the frozen starting policy")
    max_grad_norm: float = HfArg(default=1.0, help="gradient clipping")
    micro_tokens: int = HfArg(default=4096, help="tokens (rows x longest) in one forward and backward pass")
    gradient_checkpointing: bool = HfArg(default=False, help="recompute activations: less memory, more time")
    # evaluation
    eval_prompts: int = HfArg(default=256, help="held-out problems")
    eval_samples: int = HfArg(default=16, help="responses a problem: the n of avg@n, the k of pass@k and maj@k")

    def __post_init__(self):
        """Fill the defaults that depend on the method, and refuse settings that contradict each other."""
        self.sampler = self.sampler or ("ib" if self.method == "ib_tpo" else "independent")
        self.advantage = self.advantage or ("gl+ib" if self.method == "ib_tpo" else "grpo")
        if len(self.tree) != 4 or min(self.tree) < 1:
            fail(f"tree must be four numbers B0 L K B of at least 1, not {self.tree}")
        B0, L, K, B = self.tree
        self.rollouts = self.rollouts or B0 + (L - 1) * K * B
        for name in ("max_steps", "save_every", "prompts_per_step", "rollouts", "max_new_tokens", "generate_tokens",
                     "updates_per_step", "micro_tokens", "eval_prompts", "eval_samples", "seeds", "jobs", "warm_steps",
                     "warm_batch"):
            if getattr(self, name) < 1:
                fail(f"{name} must be at least 1, not {getattr(self, name)}")
        if 0 < self.max_tokens < self.max_new_tokens:
            fail(f"max_tokens ({self.max_tokens}) must hold a response of max_new_tokens ({self.max_new_tokens})")
        if len(self.operands) != 2 or not 2 <= self.operands[0] <= self.operands[1]:
            fail(f"operands must be two numbers, 2 <= fewest <= most, not {self.operands}")
        if self.beta <= 0:
            fail(f"beta must be above 0, not {self.beta}")
        if not self.delimiter:
            fail("delimiter must not be empty")
        if self.advantage == "grpo" and self.update == "tree" and self.updates_per_step > 1:
            fail("with advantage grpo and several updates a step each trajectory is clipped for itself: use --update flat")
        if self.prompts_per_step < WORLD:
            fail(f"prompts_per_step ({self.prompts_per_step}) must be at least the number of processes ({WORLD})")
        if "{question}" not in self.prompt:
            fail("prompt must contain {question}")
        if self.device == "cuda" and not torch.cuda.is_available():
            fail("device is cuda, but torch sees no CUDA GPU; use --device cpu")


def fail(message: str):
    """End the program with one clear line on stderr and exit code 2: for mistakes that the user can mend."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def reachable(name: str, kind: str) -> bool:
    """Whether the hub answers for a "model" or "dataset". If not, only what is cached is loaded: with no network, or
    HF_HUB_OFFLINE=1, or a wrong name, that fails at once instead of after minutes of retries.
    """
    try:
        return not Path(name).exists() and bool(HfApi().repo_info(name, repo_type=kind, timeout=10))
    except Exception:
        return False


def one_line(error: Exception) -> str:
    """An exception's message, or its name, in one short line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def parse_config(cls: type, script: str, argv: list[str]):
    """A `cls` from flags, over a YAML file, over the dataclass's defaults; fails with one line on what it cannot read.

    The file's sections `common` and `script` hold the fields; a flat file works too. Its values are turned into flags for
    the same parser, so that a mistake reads the same in both.
    """
    parser, names = HfArgumentParser(cls, allow_abbrev=False), [f.name for f in fields(cls)]
    parser.description, parser.error = (sys.modules[cls.__module__].__doc__ or "").splitlines()[0], fail

    def unknown(key):
        near = difflib.get_close_matches(key.strip("-").split("=")[0], names, 1, 0)[0]
        fail(f"unknown setting {key}; did you mean {near}?")

    given, _ = parser.parse_known_args(argv)
    path, flags = given.config or (Path(__file__).with_name("tiny_config.yaml") if given.model == "tiny" else None), []
    if path:
        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
            values = {k: v for k, v in content.items() if k not in ("common", "iiblpo", "ib_tpo")}
            values |= (content.get("common") or {}) | (content.get(script) or {})
        except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError, TypeError) as e:
            fail(f"cannot read the configuration {path} (sections of `name: value` lines): {one_line(e)}")
        for key, value in values.items():
            if key not in names:
                unknown(str(key))
            if value is not None:
                flags += [f"--{key}", *map(str, value)] if isinstance(value, list) else [f"--{key}={value}"]
    config, rest = parser.parse_args_into_dataclasses(flags + argv, return_remaining_strings=True)
    if rest:
        unknown(rest[0])
    return config


# ---------------------------------------------------------------------------------------------------------------------
# Several processes: under `torchrun` each explores its share of a step's prompts; gradients are summed, each token weighted
# as in one process. The first process makes what is made once, logs and saves. Alone, all of this does nothing.
# ---------------------------------------------------------------------------------------------------------------------

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def start_processes(config) -> None:
    """Join the processes that torchrun started; the others than the first print nothing but errors."""
    if WORLD > 1 and not torch.distributed.is_initialized():
        cuda = config.device != "cpu" and torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=2))
    if RANK:
        sys.stdout = open(os.devnull, "w")


def first_then_others(make):
    """make() in the first process, then in the others, who find what it made (a warm start, a download)."""
    result = make() if RANK == 0 else None
    if WORLD > 1:
        torch.distributed.barrier()
    return result if RANK == 0 else make()


def from_first(value):
    """The first process's value (anything that pickles)."""
    values = [value]
    if WORLD > 1:
        torch.distributed.broadcast_object_list(values, 0)
    return values[0]


def over_processes(metrics: dict, summed: tuple = ()) -> dict:
    """Metrics of all processes as one: those in `summed` are added up, the others averaged over who has them."""
    everyone = [metrics] * WORLD
    if WORLD > 1:
        torch.distributed.all_gather_object(everyone, metrics)
    found = {key: [m[key] for m in everyone if key in m] for m in everyone for key in m}
    return metrics if WORLD == 1 else {k: sum(v) / (1 if k in summed else len(v)) for k, v in found.items()}


def sum_gradients(*modules) -> None:
    """Add up the gradients of all processes, so that each takes the same optimizer step."""
    for p in (p for module in modules if WORLD > 1 for p in module.parameters()):
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        torch.distributed.all_reduce(p.grad)


# ---------------------------------------------------------------------------------------------------------------------
# Problems: the tiny task, and real data sets.
# ---------------------------------------------------------------------------------------------------------------------
# Chain arithmetic modulo 10. The prompt is "3+4*2=\n"; a response rewrites the expression one reduction a line and ends
# with the answer: "3+8\n1\n#1". The demonstrations' arithmetic is right, but their order is random, precedence ignored:
# a warm-started policy knows the arithmetic, and its uncertain tokens are the forks "which operator now?". Most problems
# have several right orders and many wrong ones; only the reward tells them apart.

DIGIT = {"+": lambda a, b: (a + b) % 10, "-": lambda a, b: (a - b) % 10, "*": lambda a, b: (a * b) % 10}


def reduce_at(terms: list, i: int) -> list:
    """Replace the operator at index i and its two digits by their result: ([3, "+", 4, "*", 2], 3) -> [3, "+", 8]."""
    return terms[:i - 1] + [DIGIT[terms[i]](terms[i - 1], terms[i + 1])] + terms[i + 2:]


def parse_chain(question: str) -> list:
    """"3+4*2=" -> [3, "+", 4, "*", 2]."""
    return [int(c) if c.isdigit() else c for c in question.rstrip("=\n")]


def chain_value(question: str) -> int:
    """The value by ordinary precedence, modulo 10: "3+4*2=" -> 1."""
    terms = parse_chain(question)
    while len(terms) > 1:
        terms = reduce_at(terms, terms.index("*") if "*" in terms else 1)
    return terms[0]


def demonstration(question: str, rng: random.Random) -> str:
    """A response whose every line reduces a randomly chosen operator: "3+4*2=" -> "7*2\\n4\\n#4" or "3+8\\n1\\n#1"."""
    terms, lines = parse_chain(question), []
    while len(terms) > 1:
        terms = reduce_at(terms, 2 * rng.randrange(len(terms) // 2) + 1)
        lines.append("".join(map(str, terms)))
    return "\n".join(lines) + f"\n#{terms[0]}"


def is_heldout(question: str) -> bool:
    """One expression in sixteen, by its checksum, belongs to the evaluation and is met nowhere else."""
    return zlib.crc32(question.encode()) % 16 == 0


def chain_questions(rng: random.Random, operands: list[int], heldout: bool, n: int) -> list[str]:
    """n different questions of one side of the held-out split, the number of digits uniform in `operands`."""
    found = {}
    while len(found) < n:
        count = rng.randint(*operands)
        text = str(rng.randrange(10)) + "".join(rng.choice("+-*") + str(rng.randrange(10)) for _ in range(count - 1)) + "="
        if is_heldout(text) == heldout:
            found[text] = None
    return list(found)


DATASETS = {  # name: hub path, subset, splits, columns
    "gsm8k": ("openai/gsm8k", "main", ["train", "test"], ("question", "answer")),
    "math": ("DigitalLearningGmbH/MATH-lighteval", None, ["train", "test"], ("problem", "solution"))}


def load_problems(config) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """The problems to train on and the `eval_prompts` held-out ones, as (question, gold answer) pairs.

    A local file has no test split: its last rows (never more than half) are held out. No question stands on both sides.
    Fails with one line where the data cannot be loaded, lacks a column, is empty, or has a row without an answer.
    """
    name, n = config.dataset, config.eval_prompts
    if name == "chain":  # the same held-out problems for every seed
        sides = (chain_questions(random.Random(config.seed), config.operands, False, 4096),
                 chain_questions(random.Random(2 ** 31), config.operands, True, n))
        return tuple([(q, str(chain_value(q))) for q in side] for side in sides)
    local = Path(name).suffix in (".jsonl", ".json", ".parquet")
    if not local and name not in DATASETS:
        fail(f"unknown dataset {name}; did you mean {difflib.get_close_matches(name, [*DATASETS, 'chain'], 1, 0)[0]}? "
             "(gsm8k, math, chain, or a .jsonl, .json or .parquet file)")
    if local and not Path(name).is_file():
        fail(f"no such file: {name}")
    path, subset, splits, columns = ("parquet" if name.endswith("parquet") else "json", None, ["train"], (
        config.question_column, config.answer_column)) if local else DATASETS[name]
    try:
        datasets.config.HF_HUB_OFFLINE |= not local and not reachable(path, "dataset")
        sides = [datasets.load_dataset(path, subset, split=s, data_files=name if local else None) for s in splits]
    except Exception as e:  # whatever a hub, a network or a parser raises, the user gets one line
        fail(f"cannot load the dataset {name}: {one_line(e)}")
    sides = [read_rows(side, *columns, name) for side in sides]
    n = min(n, len(sides[0]) // 2) if local else n
    train, heldout = (sides[0][:-n], sides[0][-n:]) if local else (sides[0], sides[1][:n])
    taken = {q for q, _ in heldout}
    train = [row for row in train if row[0] not in taken]
    if not train or not heldout:
        fail(f"the dataset {name} has too few different problems to train on and to hold out")
    return train, heldout


def read_rows(rows, question: str, answer: str, name: str) -> list[tuple[str, str]]:
    """(question, final answer) pairs of a `datasets` table, each once; fails where a column or an answer is missing."""
    for column in (question, answer):
        if column not in rows.column_names:
            fail(f"{name} has no column {column!r}, only {', '.join(rows.column_names)}; see --question_column and "
                 "--answer_column")
    pairs = {}
    for i, (q, a) in enumerate(zip(rows[question], rows[answer])):
        q, a = ("" if x is None else str(x).strip() for x in (q, a))
        if not q or not a:
            fail(f"{name}: row {i + 1} has no {answer if q else question}")
        gold = extract_answer(a) or a
        if len(gold) > 300:
            fail(f"{name}: row {i + 1} has {len(gold)} characters as its answer, and no \\boxed{{...}} or #### in them: "
                 "nothing could be graded by it")
        pairs.setdefault(q, gold)
    return list(pairs.items())


def encode_prompt(tokenizer, question: str, config) -> list[int]:
    """The prompt's token ids: the `prompt` template, inside the tokenizer's chat template where it has one."""
    text = config.prompt.replace("{question}", question)
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
        return tokenizer(text, add_special_tokens=False).input_ids
    return tokenizer(text).input_ids


# ---------------------------------------------------------------------------------------------------------------------
# Verifiable reward. A response is untrusted text: it is rewritten to plain arithmetic, parsed by `ast` without being
# evaluated, and walked over a whitelist of nodes into sympy objects whose size is bounded. [O]
# ---------------------------------------------------------------------------------------------------------------------


def extract_answer(text: str) -> str | None:
    """The last \\boxed{...} (braces may nest), else the last \\boxed 5, else what follows the last "####" or "#" on its line,
    else None.

    >>> extract_answer("so \\\\boxed{\\\\frac{1}{2}}."), extract_answer("3+8\\n1\\n#1"), extract_answer("no idea")
    ('\\\\frac{1}{2}', '1', None)
    """
    text = text.replace("\\fbox", "\\boxed")
    start = text.rfind("\\boxed{")
    if start >= 0:
        depth = 0
        for i in range(start + 6, len(text)):
            depth += (text[i] == "{") - (text[i] == "}")
            if depth == 0:
                return text[start + 7:i].strip()
    marked = re.findall(r"\\boxed\s+([^\s$.,]+)", text)
    marked = marked or re.findall(r"####[^\S\n]*([^\s#].*)", text) or re.findall(r"#[^\S\n]*([^\s#].*)", text)
    return marked[-1].strip() if marked else None


SPELLINGS = [  # LaTeX and typography to plain text, in this order
    (r"\\(?:left|right|displaystyle|[!,;: ]|quad)(?![A-Za-z])|\\[()\[\]]|\\?\$|~|\s+$|^\s+", " "),
    (r"\\[dtc]frac", r"\\frac"), ("−|–", "-"), (r"×|·|\\times|\\cdot", "*"), (r"÷|\\div", "/"),
    ("π|\\\\pi(?![A-Za-z])", " pi "), ("²", "^2"), ("³", "^3"),
    (r"\\infty|∞", " oo "), (r"\^\s*\{?\s*\\circ\s*\}?|°", ""), (r"\\%", "%"), (r"√\s*(\d+)", r"\\sqrt{\1}"),
    (r"(?<=[\d)}])\s*\\(?:text|mathrm|mbox)\s*\{[^{}]*\}(?:\s*\^\s*\{?\d\}?)?", ""),
    (r"\\(?:text|mathrm|textbf|mathbf|mbox)\s*\{([^{}]*)\}", r" \1 "),
    (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"), (r"\\frac\s*(\d)\s*\{", r"\\frac{\1}{"), (r"\\sqrt\s*(\d)", r"\\sqrt{\1}"),
    (r"(\d)\s*\\frac\s*\{(\d+)\}\s*\{(\d+)\}", r"\1 \2/\3"), (r"(?<![\d.])(\d+) +(\d+)/(\d+)(?![\d.])", r"(\1+\2/\3)"),
    (r"^\s*[A-Za-z]\s*(?:=|\\in)(?!=)", ""), (r"(\d)\s+(?!pi|oo)[A-Za-z]{2,}[A-Za-z .^/23]*$", r"\1"), (r"\.\s*$", "")]


def normalize(text: str) -> str:
    """One spelling for what is written in many: "\\dfrac{1}{2}\\text{ cm}" -> "\\frac{1}{2}"."""
    for pattern, replacement in SPELLINGS:
        text = re.sub(pattern, replacement, text)
    return " ".join(text.split())


def to_arithmetic(text: str) -> str:
    """Normalised LaTeX as a Python expression of numbers, one-letter names, pi, oo, sqrt and + - * / ** ( ).

    Raises ValueError for anything else, words among it ("listen" must not equal "silent").
    """
    if re.fullmatch(r"[-+(]*\d{1,3}(,\d{3})+(\.\d+)?", text):
        text = text.replace(",", "")
    for _ in range(20):  # innermost braces first
        before = text
        text = re.sub(r"\\frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"((\1)/(\2))", text)
        text = re.sub(r"\\sqrt\s*\[(\d)\]\s*\{([^{}]*)\}", r"((\2)^(1/\1))", text)
        text = re.sub(r"\\sqrt\s*\{([^{}]*)\}", r"(sqrt(\1))", text)
        text = re.sub(r"\^\s*\{([^{}]*)\}", r"^(\1)", text)
        if text == before:
            break
    if re.search("[A-Za-z]{3}|[^-+*/^().0-9A-Za-z ]", text.replace("sqrt", " ")):
        raise ValueError(text)
    out = []
    for token in re.findall(r"\d+(?:\.\d*)?|\.\d+|sqrt|pi|oo|[A-Za-z]|\*\*|[-+*/^().]", text):
        if out and out[-1] not in "+ - * / ** ( sqrt".split() and token not in "+ - * / ^ ** )".split():
            out.append("*")  # 2x, 3(x+1), 2 pi: an operator is implied
        if token[0].isdigit() or token[0] == ".":  # decimals as exact fractions
            whole, _, decimals = token.partition(".")
            token = f"({int(whole + decimals or 0)}/{10 ** len(decimals)})" if decimals else str(int(whole or 0))
        out.append("**" if token == "^" else token)
    return "".join(out)


def to_sympy(node: ast.AST):
    """Walk a parsed expression into sympy objects; raises ValueError outside the whitelist and its bounds."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return sympy.Integer(node.value)
    if isinstance(node, ast.Name):
        return sympy.pi if node.id == "pi" else sympy.Symbol(node.id)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        value = to_sympy(node.operand)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "sqrt" and len(node.args) == 1:
        return power(to_sympy(node.args[0]), sympy.Rational(1, 2))
    if isinstance(node, ast.BinOp):
        a, b = to_sympy(node.left), to_sympy(node.right)
        if isinstance(node.op, (ast.Add, ast.Sub, ast.Mult)):
            return a + b if isinstance(node.op, ast.Add) else a - b if isinstance(node.op, ast.Sub) else a * b
        if isinstance(node.op, ast.Div) and b != 0:
            return a / b
        if isinstance(node.op, ast.Pow):
            return power(a, b)
    raise ValueError(type(node).__name__)


def power(base, exponent):
    """base ** exponent where the result stays small: no tower of powers, no exponent or number of digits above 200."""
    if exponent.has(sympy.Pow) or base == 0 and not exponent.is_positive:
        raise ValueError("exponent")
    if exponent.is_number and (abs(exponent) > 200 or base.is_Rational
                               and abs(exponent) * max(abs(base.p), base.q).bit_length() > 700):
        raise ValueError("too large")
    if exponent.is_Rational and exponent.q > 1 and (exponent.q > 100 or base.is_Rational and
                                                    max(abs(base.p), base.q) > 10 ** 12):
        raise ValueError("too large a root")  # sympy would factor it
    return base ** exponent


@functools.lru_cache(maxsize=4096)
def parse_math(text: str):
    """The sympy value of a normalised answer, or None where it has none within the bounds."""
    if len(text) > 200 or text.count("(") + text.count("{") > 30 or re.search(r"\d{100}", text):
        return None
    try:
        return to_sympy(ast.parse(to_arithmetic(text), mode="eval").body)
    except (ValueError, SyntaxError, ArithmeticError, TypeError, AttributeError, RecursionError, MemoryError):
        return None


def same_value(a: str, b: str) -> bool:
    """Equal as mathematical values, symbols being tried at three points (with 25 digits, chance equality is out)."""
    x, y = parse_math(a), parse_math(b)
    if x is None or y is None:
        return False
    if x.is_Rational and y.is_Rational:
        return x == y
    symbols = sorted(x.free_symbols | y.free_symbols, key=str)
    for point in (1, 2, -3) if symbols else (1,):
        at = {s: sympy.Float(f"{point}.37{i}3", 30) for i, s in enumerate(symbols, 1)}
        p, q = (sympy.N(v.subs(at), 25, maxn=60) for v in (x, y))
        if not (p.is_number and q.is_number and p.is_finite and q.is_finite and abs(p - q) <= abs(p + q) * 1e-18 + 1e-40):
            return False
    return True


def split_list(text: str) -> tuple[str, list[str]]:
    """Kind of bracket and top-level elements: "[1, (2,3))" -> ("[)", ["1", "(2,3)"]); no bracket: ("", [...])."""
    text = text.replace("\\{", "⟨").replace("\\}", "⟩")
    kind = text[0] + text[-1] if len(text) > 1 and text[0] in "([⟨" and text[-1] in ")]⟩" else ""
    parts, depth, part = [], 0, ""
    for c in text[1:-1] if kind else text:
        depth += (c in "([{⟨") - (c in ")]}⟩")
        if c == "," and depth == 0:
            parts, part = parts + [part], ""
        else:
            part += c
    return ("" if kind == "⟨⟩" else kind), [p.strip() for p in parts + [part]]


@functools.lru_cache(maxsize=65536)
def verify(answer: str | None, gold: str) -> bool:
    """Whether an answer equals the gold one: as text after normalising, or as mathematics. Never raises.

    Tuples and intervals are compared element by element, brackets included; sets and bare lists in any order. A percent
    sign on one side only may mean the number or its hundredth ("20%" equals "20" and "0.2").
    """
    if answer is None or gold is None:
        return False
    if answer.strip() == gold.strip() or len(answer) > 300 or len(gold) > 300:
        return answer.strip() == gold.strip()
    try:
        a, b = normalize(answer), normalize(gold)
        if a.casefold() == b.casefold():
            return True
        if not a or not b or a.isdigit() and b.isdigit():
            return bool(a) and bool(b) and a.isascii() and b.isascii() and int(a) == int(b)
        if a.endswith("%") or b.endswith("%"):
            x, y = a.rstrip("% "), b.rstrip("% ")
            hundredth = (f"({x})/100", y) if a[-1] == "%" else (x, f"({y})/100")
            return same_value(x, y) or a[-1] != b[-1] and same_value(*hundredth)
        if same_value(a, b):
            return True
        (kind_a, left), (kind_b, right) = split_list(a), split_list(b)
        if kind_a != kind_b or len(left) != len(right) or not 1 < len(left) <= 20:
            return False
        if kind_a:
            return all(x == y or same_value(x, y) for x, y in zip(left, right))
        for x in left:
            right.remove(next(y for y in right if x == y or same_value(x, y)))
        return True
    except (StopIteration, ValueError, ArithmeticError, TypeError, AttributeError, RecursionError, NotImplementedError):
        return False


# ---------------------------------------------------------------------------------------------------------------------
# Policy: any Hugging Face causal language model; the tiny one is a Qwen2 of 0.64 M parameters, one token a character.
# ---------------------------------------------------------------------------------------------------------------------

ORGANISATIONS = {"qwen": "Qwen", "llama": "meta-llama", "smollm": "HuggingFaceTB", "olmo": "allenai", "gemma": "google"}


def load_policy(config) -> tuple[torch.nn.Module, PreTrainedTokenizerFast]:
    """The policy in fp32 on its device, and its tokenizer, padding on the left.

    Safetensors only, no remote code. The tiny policy is warm-started first, once: its folder is named by a hash of all
    that it depends on. Fails with one line where the model cannot be loaded or has no end-of-sequence token.
    """
    device = "cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu"
    name = first_then_others(lambda: warm_start(config, device)) if config.model == "tiny" else config.model
    if not Path(name).exists() and "/" not in str(name):
        organisation = ORGANISATIONS.get(re.match("[a-z]*", name.lower())[0])
        name = f"{organisation}/{name}" if organisation else name
    try:
        offline = not reachable(name, "model")
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, use_safetensors=True,
                                                     trust_remote_code=False, local_files_only=offline)
        # tokenizer.json as it is; AutoTokenizer may put the stock tokenizer of the model's family in its place
        tokenizer = PreTrainedTokenizerFast.from_pretrained(name, padding_side="left", local_files_only=offline)
    except Exception as e:  # whatever a hub, a network or a file raises, the user gets one line
        fail(f"cannot load the model {name}: {one_line(e)}")
    eos = model.generation_config.eos_token_id or tokenizer.eos_token_id  # a list for many chat models
    if eos is None:
        fail(f"the tokenizer of {name} has no end-of-sequence token, so no response would ever end")
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        fail(f"the tokenizer of {name} has more tokens ({len(tokenizer)}) than its model has embeddings")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token_id = eos[0] if isinstance(eos, list) else eos
    # A model's own defaults (top-k 20, top-p 0.8, ...) would bend the distribution that the log-probs are taken of.
    model.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=tokenizer.pad_token_id)
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    model = model.to(device).eval()
    with torch.no_grad():  # what token_logps relies on
        ids = torch.tensor([tokenizer("1+1").input_ids or [0]], device=device)
        logits, states = model(ids).logits, model.base_model(ids).last_hidden_state
        if not logits.isfinite().all():
            fail(f"the weights of {name} give logits that are not finite")
        if not logits.allclose(model.get_output_embeddings()(states), atol=1e-3):
            fail(f"{name} ({type(model).__name__}) scales or caps its logits, which is not supported")
    return model, tokenizer


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, as an ordinary fast tokenizer."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *"0123456789+-*=\n#"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", padding_side="left")


def warm_start(config, device: str) -> Path:
    """Folder of the tiny policy trained on demonstrations; made on the first call, found on later ones.

    Muon [torch.optim] on the layers' matrices takes half the steps of AdamW here; batches hold examples of like length.
    """
    depends = [config.operands, config.warm_steps, config.warm_batch, config.prompt,
               *map(inspect.getsource, (warm_start, tiny_tokenizer, chain_questions, demonstration, reduce_at, is_heldout))]
    folder = Path("runs") / f"warm_start_{hashlib.sha256(repr(depends).encode()).hexdigest()[:12]}"
    if folder.exists():
        return folder
    with torch.random.fork_rng():
        torch.manual_seed(0)
        rng, tokenizer = random.Random(0), tiny_tokenizer()
        model = Qwen2ForCausalLM(Qwen2Config(
            vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=4, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)).to(device)
        matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
        others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
        optimizers = [torch.optim.Muon(matrices, lr=0.02, weight_decay=0.0),
                      torch.optim.AdamW(others, lr=3e-3, weight_decay=0.0)]
        schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda s: min(1, (s + 1) / 50) * (1 - s / config.warm_steps))
                     for o in optimizers]
        pool = []
        bar = tqdm(range(config.warm_steps), desc="warm start", unit="step", disable=None)
        for _ in bar:
            if not pool:
                examples = [Trajectory(encode_prompt(tokenizer, q, config),
                                       tokenizer(demonstration(q, rng)).input_ids + [tokenizer.eos_token_id])
                            for q in chain_questions(rng, config.operands, False, 8 * config.warm_batch)]
                pool = micro_batches(examples, size=config.warm_batch)
                rng.shuffle(pool)
            logp, _, mask = token_logps(model, pool.pop())
            loss = -masked_mean(logp, mask)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for step in (*optimizers, *schedules):
                step.step()
            model.zero_grad()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)

        def write(path):
            model.save_pretrained(path)
            tokenizer.save_pretrained(path)

        save_atomically(folder, write)
    return folder


@dataclass(eq=False)
class Trajectory:
    """One response, or the beginning of one to go on from. While it was sampled, ln π(o_t) and H_t were recorded."""
    prompt: list[int]
    response: list[int] = field(default_factory=list)  # T token ids, the last one EOS unless cut at max_new_tokens
    logps: torch.Tensor = field(default_factory=lambda: torch.zeros(0))  # [T]
    entropy: torch.Tensor = field(default_factory=lambda: torch.zeros(0))  # [T]
    start: int = 0  # t*: response[start:] are its own tokens, those before were sampled by its parent
    z: torch.Tensor | None = None  # [Z], the latent that steers its own tokens (I²B-LPO)
    memory: tuple | None = None  # (key/value cache, its row's last hidden states [tokens, H], its row, its first column)
    group: int = 0  # which prompt of the batch
    text: str = ""
    complete: bool = True  # it ended by itself
    reward: float = 0.0
    advantage: float | torch.Tensor = 0.0  # or [T], where it differs from token to token


def token_entropy(logits: torch.Tensor) -> torch.Tensor:
    """H_t = -Σ_v p_t(v) ln p_t(v) in nats, p_t the softmax of raw logits [..., V]; returns [...]. [P]"""
    logp = logits.log_softmax(-1).clamp(min=torch.finfo(logits.dtype).min)  # 0 · ln 0 = 0
    return -(logp.exp() * logp).sum(-1)


class Recorder(LogitsProcessor):
    """Keeps ln π(o_t) and H_t, [B] a step, while `generate` samples: never [B, T, V], which at V = 151,936 is gigabytes.

    At each call `generate` shows the raw logits of the next token; which token was drawn is seen one call later.
    """

    def __init__(self):
        self.logps, self.entropy, self.scores = [], [], None

    def __call__(self, input_ids, scores):
        self.draw(input_ids[:, -1])
        parts = [(token_entropy(rows), rows.logsumexp(-1)) for rows in scores.split(max(1, 2 ** 20 // scores.shape[1]))]
        entropy, self.normalizer = (torch.cat(x) for x in zip(*parts))
        self.entropy.append(entropy)
        self.scores = scores
        return scores

    def draw(self, tokens):
        if self.scores is not None:
            self.logps.append(self.scores.gather(1, tokens[:, None]).squeeze(1) - self.normalizer)

    def finish(self, new):
        """(logps, entropy), each [B, T] on the CPU, of the sampled tokens `new` [B, T]."""
        T = new.shape[1]
        if len(self.logps) < T:
            self.draw(new[:, -1])
        return (torch.stack(x[:T], 1).cpu() for x in (self.logps, self.entropy))


def autocast(model):
    """bf16 on CUDA over fp32 master weights; nothing on the CPU."""
    return torch.autocast("cuda", torch.bfloat16) if model.device.type == "cuda" else contextlib.nullcontext()


def full_attention(model) -> bool:
    """Whether every layer keeps the keys and values of all tokens: no sliding window, no recurrence. Only then can a cache
    be moved to other rows and columns.
    """
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)


SMALL_BATCH = 16  # rows; fewer are never halved


class HalfEnded(StoppingCriteria):
    """Ends a `generate` call once half of its rows have ended: `sample` goes on with the others in a smaller batch. [O]

    Below SMALL_BATCH rows, where a forward pass hardly depends on their number, it waits for all; so it does where
    `movable` says that their cache cannot be taken along.
    """

    def __init__(self, width: int, room: torch.Tensor, stop: set[int], movable: bool):
        self.width, self.room, self.stop = width, room, torch.tensor(sorted(stop), device=room.device)
        self.enough = math.ceil(len(room) / 2) if movable and len(room) >= SMALL_BATCH else len(room)

    def __call__(self, input_ids, scores, **kwargs):
        new = input_ids[:, self.width:]
        ended = torch.isin(new, self.stop).any(1) | (self.room <= new.shape[1])
        return (ended.sum() >= self.enough).expand(len(ended))


@torch.no_grad()
def sample(model, tokenizer, starts: list[Trajectory], config, greedy=False, steer=None, keep=False) -> list[Trajectory]:
    """Go on from each of `starts` (a bare prompt, or a prefix of a response) by HF `generate`, at temperature 1 without
    truncation; returns the longer trajectories in the same order.

    A prefix with a `memory` reuses its parent's keys and values, one without is prefilled; its length counts against
    max_new_tokens. `steer(batch)` is a context manager around the generation of a batch. With `keep` the results have a
    `memory`. Rows of like length share a call, so that little is padded; `generate_tokens` bounds a call's rows x longest.
    """
    model.eval()
    result = [replace(s, start=len(s.response)) for s in starts]
    stop = model.generation_config.eos_token_id
    stop = set(stop if isinstance(stop, list) else [stop])
    lengths = [len(s.prompt) + config.max_new_tokens for s in starts]
    batches = deque(micro_batches(range(len(starts)), config.generate_tokens, lengths.__getitem__))
    movable = full_attention(model)
    while batches:
        rows = batches.popleft()
        batch, states, recorder = [result[i] for i in rows], [], Recorder()
        inputs = tokenizer.pad({"input_ids": [s.prompt + s.response for s in batch]}, return_tensors="pt").to(model.device)
        width, room = inputs["input_ids"].shape[1], [config.max_new_tokens - len(s.response) for s in batch]
        with autocast(model), contextlib.ExitStack() as stack:
            if reuse := steer or any(s.response for s in batch):
                inputs["past_key_values"] = prefix_cache(model, batch, inputs["input_ids"], inputs["attention_mask"])
            if steer:
                stack.enter_context(steer(batch))
            if keep:
                hook = model.base_model.register_forward_hook(lambda module, args, out: states.append(out.last_hidden_state))
                stack.callback(hook.remove)
            half = HalfEnded(width, torch.tensor(room, device=model.device), stop, movable)
            out = model.generate(**inputs, max_new_tokens=max(room), do_sample=not greedy, top_k=0,
                                 logits_processor=[recorder], stopping_criteria=[half], return_dict_in_generate=True)
        new, left = out.sequences[:, width:], []
        states = torch.cat(states, 1) if keep else None
        for j, (i, tokens, logp, h) in enumerate(zip(rows, new.tolist(), *recorder.finish(new))):
            s, end = result[i], next((t + 1 for t, token in enumerate(tokens) if token in stop), math.inf)
            n, first = min(end, len(tokens), room[j]), width - len(s.prompt + s.response)
            if goes_on := n < min(end, room[j]):
                left.append(i)
            if keep:  # a reused prefix brings the states of all its tokens but the last
                known = s.memory[1][:len(s.prompt + s.response) - 1] if reuse and s.memory else states[j, :0]
                seen = torch.cat([known, states[j, 0 if reuse else first:]])
            memory = (out.past_key_values, seen if keep else None, j, first) if keep or goes_on else None
            result[i] = replace(s, response=s.response + tokens[:n], logps=torch.cat([s.logps, logp[:n]]), memory=memory,
                                entropy=torch.cat([s.entropy, h[:n]]), complete=end <= room[j])
        if left:  # at once, so that the caches of one batch are all that waits
            batches.appendleft(left)
    for t, text in zip(result, tokenizer.batch_decode([t.response for t in result], skip_special_tokens=True)):
        t.text = text
    return result


def prefix_cache(model, batch: list[Trajectory], ids: torch.Tensor, mask: torch.Tensor) -> DynamicCache:
    """Keys and values of left-padded prefixes (ids, mask [B, P]) but for their last token, which `generate` feeds itself.

    They are gathered from where the parents were sampled: cached keys carry their rotation already, so moving them to
    other columns changes nothing. Where a parent has no memory the prefixes are run through the policy.
    """
    ids, mask = ids[:, :-1], mask[:, :-1]
    if not all(s.memory for s in batch):
        return model.base_model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
                                use_cache=True).past_key_values
    sources = defaultdict(list)
    for i, s in enumerate(batch):
        sources[id(s.memory[0])].append(i)
    first = mask.argmax(1)  # column of a row's first token
    result = DynamicCache(config=model.config)
    for layer in range(model.config.num_hidden_layers):
        moved = []
        for name in ("keys", "values"):
            new = None
            for members in sources.values():
                old = getattr(batch[members[0]].memory[0].layers[layer], name)  # [B', KV, columns, D]
                row, column = torch.tensor([batch[i].memory[2:] for i in members], device=ids.device).T
                columns = (torch.arange(ids.shape[1], device=ids.device) + (column - first[members])[:, None]).clamp(min=0)
                if new is None:
                    new = old.new_zeros(len(batch), old.shape[1], ids.shape[1], old.shape[3])
                heads = torch.arange(old.shape[1], device=ids.device)
                new[members] = old[row[:, None, None], heads[:, None], columns[:, None]]
            moved.append(new)
        result.update(*moved, layer)
    return result


LOGITS = 2 ** 25  # logits held at a time


def score(model, states: torch.Tensor, targets: torch.Tensor) -> list[torch.Tensor]:
    """ln π of tokens `targets` [N] at hidden states [N, H], and H_t there: two [N]. Where V is large the logits are made
    in chunks, and again in the backward pass instead of being kept.
    """
    def part(states, targets):
        logits = model.get_output_embeddings()(states).float()
        return logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1), token_entropy(logits)

    n = max(1, LOGITS // model.config.vocab_size)
    chunks = list(zip(states.split(n), targets.split(n)))
    again = functools.partial(checkpoint, part, use_reentrant=False)
    parts = [again(*c) if len(chunks) > 1 and torch.is_grad_enabled() else part(*c) for c in chunks]
    return [torch.cat(x) for x in zip(*parts)]


def token_logps(model, batch: list[Trajectory]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ln π(o_t) and H_t of a trajectory's own tokens by one differentiable pass, and their mask: three [B, T] tensors.

    Rows are padded on the right: causal attention never looks there, so no mask is needed.
    """
    ids = pad([torch.tensor(t.prompt + t.response) for t in batch]).to(model.device)  # [B, S]
    starts = torch.tensor([len(t.prompt) for t in batch], device=ids.device)
    own, end = torch.tensor([[t.start, len(t.response)] for t in batch], device=ids.device).T[..., None]
    t = torch.arange(int(end.max()), device=ids.device)
    mask = (own <= t) & (t < end)  # [B, T]
    rows, t = mask.nonzero(as_tuple=True)
    columns = starts[rows] + t  # of o_t, which is chosen by the state before it
    with autocast(model):
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # [B, S, H]
        flat = score(model, hidden[rows, columns - 1], ids[rows, columns])
    logp, entropy = (torch.zeros(mask.shape, device=ids.device).masked_scatter(mask, x) for x in flat)
    return logp, entropy, mask


def pad(rows: list[torch.Tensor]) -> torch.Tensor:
    """[T_i] tensors as one [B, T], zeros on the right."""
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def micro_batches(items, tokens: float = math.inf, length=lambda t: len(t.prompt) + len(t.response), size: int = 0):
    """Lists of like length, longest first, each of at most `tokens` (rows x longest) and, where given, `size` items."""
    batches, longest = [], 0
    for item in sorted(items, key=length, reverse=True):
        if batches and (len(batches[-1]) + 1) * longest <= tokens and len(batches[-1]) != size:
            batches[-1].append(item)
        else:
            batches.append([item])
            longest = length(item)
    return batches


# ---------------------------------------------------------------------------------------------------------------------
# Steps, and the tree that responses with common steps make.
# ---------------------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=None)
def token_text(tokenizer, token: int) -> str:
    """What one token spells; special tokens spell nothing."""
    return tokenizer.decode([token], skip_special_tokens=True)


def split_steps(token_ids: list[int], tokenizer, delimiter: str) -> list[list[int]]:
    """The steps s_1 ... s_n of a response: each ends with the token that completes a delimiter, the last with what is left
    (EOS among it). Joined, they are token_ids again. [P: "\\n\\n"]

    >>> split_steps(tokenizer("3+8\\n1\\n#1").input_ids, tokenizer, "\\n")    # spelled: ["3+8\\n", "1\\n", "#1"]
    """
    steps, text = [], None
    for token in token_ids:
        if text is None:
            steps, text = steps + [[]], ""
        steps[-1].append(token)
        text += token_text(tokenizer, token)
        if delimiter in text:
            text = None
    return steps


@dataclass(eq=False)
class Node:
    """A step s below the steps before it; the root holds the prompt q. A step sampled twice at one place is one node."""
    tokens: list[int]
    logps: torch.Tensor = field(default_factory=lambda: torch.zeros(0))  # [T] ln π_old of the step's tokens
    entropy: torch.Tensor = field(default_factory=lambda: torch.zeros(0))  # [T]
    parent: Node | None = None
    children: list[Node] = field(default_factory=list)
    visits: int = 0  # trajectories through this step
    total_reward: float = 0.0  # of these, each 0 or 1
    end: int = 0  # response tokens from q to the end of this step
    branched: list[int] = field(default_factory=list)  # the rounds in which it was chosen to branch from, 0 the first
    step_prob: str = "geomean"
    memory: tuple | None = None  # of the trajectory that came here first, see Trajectory

    @property
    def value(self) -> float:
        """p̂(a*|s): the mean reward of the trajectories through s. [P]"""
        return self.total_reward / max(1, self.visits)

    @functools.cached_property
    def confidence(self) -> float:
        """π(s): the geometric mean of its token probabilities (their product underflows with length). [O]"""
        return (self.logps.mean() if self.step_prob == "geomean" else self.logps.sum()).exp().item()

    def path(self) -> list[Node]:
        """The steps from the first to this one, without the root."""
        return self.parent.path() + [self] if self.parent else []

    def walk(self) -> list[Node]:
        """This node and all below it, depth-first: a parent before its children, a subtree in one piece."""
        return [self] + [n for child in self.children for n in child.walk()]


def insert(root: Node, steps: list[list[int]], step_logps, reward: float, step_entropy=None, memory=None) -> Node:
    """Add a trajectory (its steps, their [T] log-probs, its reward 0 or 1) to the tree and return its leaf.

    Steps that the tree has already are visited once more: their estimates are pooled [O].
    """
    path = [root]
    for i, tokens in enumerate(steps):
        parent = path[-1]
        node = next((c for c in parent.children if c.tokens == tokens), None)
        if node is None:
            node = Node(tokens, torch.as_tensor(step_logps[i]), parent=parent, end=parent.end + len(tokens),
                        step_prob=root.step_prob)
            node.entropy = torch.zeros(len(tokens)) if step_entropy is None else step_entropy[i]
            parent.children.append(node)
        path.append(node)
    for node in path:
        node.visits, node.total_reward, node.memory = node.visits + 1, node.total_reward + reward, node.memory or memory
    return path[-1]


# ---------------------------------------------------------------------------------------------------------------------
# IB-Score: where to branch.
# ---------------------------------------------------------------------------------------------------------------------
# J_IB = (β+1) H(s | q, s_<) - β H(s | a*, q, s_<), with Tsallis entropy (α = 2) estimated over sub-steps s^b at node v:  [P]
#     J_IB(v) ≈ (1+β)/B · Σ_b η₁(s^b) · η₂(s^b)
#     η₁(s) = p̂(a*|s) / p̂(a*|parent(s)) - (1 + 1/β)     information gain, from the environment
#     η₂(s) = π(s)                                         the policy's confidence in the step
# With H₂ = 1 - Σ π² and Bayes' π(s|a*) = π(s) p(a*|s) / p(a*|v) one gets β/B in front; (1+β)/B is what the paper reports.
# Neither the ranking nor the sign depends on it.                                                                       [O]


def information_gain(node: Node, beta: float) -> float:
    """η₁(s). Where the parent never led to a right answer, nor did s: the ratio counts as 1 [O]."""
    ratio = node.value / node.parent.value if node.parent.value else 1.0
    return ratio - (1 + 1 / beta)


def ib_score(node: Node, beta: float) -> float:
    """J_IB of a node with children; a child counts with its visits, as if equal steps were not one node [O].

    Raises ZeroDivisionError at a leaf, which has no sub-steps to estimate it from.
    """
    B = sum(c.visits for c in node.children)
    return (1 + beta) / B * sum(c.visits * information_gain(c, beta) * c.confidence for c in node.children)


def ib_covariance(node: Node, beta: float) -> float:
    """Cov(η₁, η₂) over the sub-steps sampled at a node: does the policy trust the steps that lead to the answer? [P]"""
    B = sum(c.visits for c in node.children)
    eta = [(c.visits / B, information_gain(c, beta), c.confidence) for c in node.children]
    mean1, mean2 = sum(w * a for w, a, _ in eta), sum(w * b for w, _, b in eta)
    return sum(w * (a - mean1) * (b - mean2) for w, a, b in eta)


def select_nodes(root: Node, k: int, sampler: str, config, rng: random.Random) -> list[Node]:
    """The k nodes to branch from: with children, and with room for more tokens. Ties go to who comes first in the tree.

    ib: highest J_IB [P]. entropy: before the step with the highest token entropy, each place once before any twice
    (as TreeRL). fixed: each place once, from the root down (as TreePO). random: any. Fewer than k candidates repeat.
    """
    candidates = [n for n in root.walk() if n.children and n.end < config.max_new_tokens]
    rng.shuffle(candidates) if sampler == "random" else candidates.sort(key={
        "ib": lambda n: -ib_score(n, config.beta),
        "entropy": lambda n: (len(n.branched), -max(c.entropy.max().item() for c in n.children)),
        "fixed": lambda n: (len(n.branched), len(n.path()))}[sampler])
    return list(itertools.islice(itertools.cycle(candidates), k))


def grow(model, tokenizer, problems, config, rng: random.Random) -> tuple[list[Node], list[Trajectory]]:
    """IBTree: a tree for each (question, gold) pair, and all sampled trajectories, whose `start` is where they branched.

    B₀ rollouts, then L - 1 times B continuations of each of the K nodes chosen; all trees grow in one `generate` a round,
    and prefixes reuse the keys and values of who sampled them. G = B₀ + (L-1)·K·B trajectories a tree [P]. The
    independent sampler makes `rollouts` of them at once.
    """
    (B0, L, K, B), trees = config.tree, config.sampler != "independent"
    roots = [Node(encode_prompt(tokenizer, q, config), step_prob=config.step_prob) for q, _ in problems]
    everything = []
    for level in range(L if trees else 1):
        starts = []
        for group, root in enumerate(roots):
            for node in select_nodes(root, K, config.sampler, config, rng) if level else [root]:
                node.branched.append(level)
                path = [root, *node.path()]  # the root's log-probs are empty
                start = Trajectory(root.tokens, [t for n in path[1:] for t in n.tokens], torch.cat([n.logps for n in path]),
                                   torch.cat([n.entropy for n in path]), memory=node.memory, group=group)
                starts += [start] * (B if level else B0 if trees else config.rollouts)
        new = sample(model, tokenizer, starts, config, keep=trees)
        judge(new, problems)
        for t in new:
            steps = split_steps(t.response, tokenizer, config.delimiter)
            lengths = [len(s) for s in steps]
            insert(roots[t.group], steps, t.logps.split(lengths), t.reward, t.entropy.split(lengths), t.memory)
            t.memory = None
        everything += new
    for node in (n for root in roots for n in root.walk()):
        node.memory = None  # the caches would otherwise sit beside the update's activations
    return roots, everything


# ---------------------------------------------------------------------------------------------------------------------
# Step-level advantages.
# ---------------------------------------------------------------------------------------------------------------------
# A_GL(s) = (p̂(a*|s) - p̂(a*|q)) / std of the G rewards        global and local, 0 where the std is 0                    [P]
# A_IB(s) = (p̂(a*|s) / p̂(a*|parent) - (1 + 1/β)) · π_old(s)
# A(s)    = A_GL(s) + λ · A_IB(s)                             for every token of s
# Over the trajectories through s, GRPO's (R - mean) / std sums up to visits · A_GL(s): at ratio 1, A_GL on the tree is GRPO
# on its trajectories. What the method changes is where the samples are taken, and λ A_IB.                              [O]


def step_advantages(root: Node, config) -> dict[Node, float]:
    """A(s) of every step of a tree, by `config.advantage`; grpo: the mean of (R - mean) / std over its trajectories.

    Rewards are 0 or 1, so that their standard deviation is sqrt(p̂(q) (1 - p̂(q))).
    """
    p, result = root.value, {}
    std = math.sqrt(p * (1 - p))
    for node in root.walk()[1:]:
        gl = (node.value - p) / std if std else 0.0
        ib = information_gain(node, config.beta) * node.confidence
        result[node] = {"grpo": gl, "gl": gl, "ib": ib, "gl+ib": gl + config.lam * ib}[config.advantage]
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Update: GRPO's clipped policy gradient, over the unique tokens of a tree.
# ---------------------------------------------------------------------------------------------------------------------


def group_advantages(rewards: torch.Tensor, groups: torch.Tensor, eps: float = 1e-4) -> torch.Tensor:
    """A_i = (R_i - mean) / (std + eps) over the responses to the same prompt; all [B]. [GRPO]

    The standard deviation is the population's, so that a group of one has advantage 0 [O].
    """
    _, index = groups.unique(return_inverse=True)
    count = torch.bincount(index).to(rewards.dtype)
    mean = torch.zeros_like(count).index_add(0, index, rewards) / count
    centred = rewards - mean[index]
    std = (torch.zeros_like(count).index_add(0, index, centred ** 2) / count).sqrt()
    return centred / (std[index] + eps)


def masked_mean(x: torch.Tensor, mask: torch.Tensor, how: str = "token") -> torch.Tensor:
    """Mean of x [B, T] where mask [B, T]: over all tokens ("token"), or of each row's mean ("sequence")."""
    if how == "token":
        return (x * mask).sum() / mask.sum()
    return ((x * mask).sum(1) / mask.sum(1)).mean()


def policy_loss(logp, old_logp, advantages, mask, config) -> tuple[torch.Tensor, dict]:
    """-mean_t min(r_t A, clip(r_t, 1 - clip_low, 1 + clip_high) A) with r_t = π(o_t) / π_old(o_t). [PPO, GRPO, DAPO]

    logp, old_logp, mask [B, T]; advantages [B], or [B, T] where they differ from token to token. Returns the scalar loss,
    the mean by `config.loss_mean`, and {"ratio", "clipped"}: the mean ratio and the share of clipped tokens.
    """
    A = advantages if advantages.ndim == 2 else advantages[:, None]
    ratio = (logp - old_logp).exp()
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    loss = masked_mean(-torch.minimum(ratio * A, clipped * A), mask, config.loss_mean)
    cut = (ratio * A > clipped * A).float()
    return loss, {"ratio": masked_mean(ratio.detach(), mask).item(), "clipped": masked_mean(cut, mask).item()}


def k3(logp: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """The k3 estimate of KL(π || π_ref) at each token: r - 1 - ln r >= 0 with r = π_ref / π. [GRPO]"""
    return (reference - logp).exp() - 1 - (reference - logp)


# A tree in one sequence: depth-first, position = depth in tokens, a token sees its ancestors and what stands before it in
# its own step, and counts as often as trajectories go through it. The gradient is that of all trajectories (`flat`), at
# the price of the unique tokens.                                                                                       [O]


def pack_tree(root: Node, advantages: dict[Node, float]) -> dict[str, torch.Tensor]:
    """One tree of S unique tokens, the prompt's among them, as a sequence.

    input_ids, position_ids [1, S]; attention_mask [1, 1, S, S] bool, row i true at what i sees; previous [S], the index of
    the token before; weights [1, S], the trajectories through a token, 0 in the prompt; advantages, logps (old) [1, S].
    """
    nodes, span, ids, depth, previous = root.walk(), {}, [], [], []
    for node in nodes:
        begin, n = len(ids), len(node.tokens)
        before = span[node.parent] if node.parent else [0, 0, 0]  # begin, own end, end of the subtree
        ids += node.tokens
        depth += range(len(root.tokens) + node.end - n if node.parent else 0, len(root.tokens) + node.end)
        previous += [max(0, before[1] - 1), *range(begin, begin + n - 1)]
        span[node] = [begin, begin + n, begin + n]
    for node in reversed(nodes[1:]):
        span[node.parent][2] = max(span[node.parent][2], span[node][2])
    length = torch.tensor([len(n.tokens) for n in nodes])

    def spread(values):  # one value a node -> one a token
        return torch.tensor(values).repeat_interleave(length)

    i = torch.arange(len(ids))
    mask = (i[None, :] <= i[:, None]) & (i[:, None] < spread([span[n][2] for n in nodes])[None, :])
    return {"input_ids": torch.tensor([ids]), "position_ids": torch.tensor([depth]), "attention_mask": mask[None, None],
            "previous": torch.tensor(previous), "weights": spread([0.0] + [float(n.visits) for n in nodes[1:]])[None],
            "advantages": spread([0.0] + [advantages[n] for n in nodes[1:]])[None],
            "logps": torch.cat([torch.zeros(len(root.tokens)), *(n.logps for n in nodes[1:])])[None]}


BLOCK = 256  # queries that attend together


def tree_attention(module, query, key, value, attention_mask, blocks=None, **kwargs):
    """sdpa attention, BLOCK queries at a time over the keys that any of them sees: most of a tree's mask is empty.

    query [1, heads, S, D], key, value [1, KV, S, D]; blocks: (indices of the keys [K], bool mask [1, 1, Q, K]) each. Without
    blocks it is sdpa attention, so that a model may keep it.
    """
    if blocks is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    keys, masks = zip(*blocks)
    sizes, rows = [len(k) for k in keys], query.split([mask.shape[2] for mask in masks], 2)
    key, value = (x.index_select(2, torch.cat(keys)).split(sizes, 2) for x in (key, value))
    parts = [sdpa_attention_forward(module, *x, **kwargs)[0] for x in zip(rows, key, value, masks)]
    return torch.cat(parts, 1), None


AttentionInterface.register("tree", tree_attention)
AttentionMaskInterface.register("tree", sdpa_mask)


def require_full_attention(model) -> None:
    """Fail where a tree cannot be packed, or a prefix's cache not be moved: sliding windows, recurrent layers."""
    if not hasattr(model.base_model, "layers") or not full_attention(model):
        fail(f"trees need a decoder with model.layers and full attention (Qwen2, Qwen3, Llama), not {type(model).__name__}; "
             "--method grpo --update flat takes it")


def tree_logps(model, packs: list[dict]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ln π and H of every token of packed trees, one after the other in one row, and their weights: three [1, S]."""
    device, blocks, offset, previous = model.device, [], 0, []
    for pack in packs:
        for rows in pack["attention_mask"][0, 0].to(device).split(BLOCK):
            keys = rows.any(0).nonzero().squeeze(1)
            blocks.append((keys + offset, rows[:, keys][None, None]))
        previous.append(pack["previous"] + offset)
        offset += len(pack["previous"])
    ids, positions, weights = (torch.cat([p[k] for p in packs], 1).to(device)
                               for k in ("input_ids", "position_ids", "weights"))
    trained = weights[0] > 0
    model.config._attn_implementation = "tree"  # and stays so: checkpointed layers run again in the backward pass
    with autocast(model):  # a mask of four dimensions is taken as it is; the blocks say what it would
        hidden = model.base_model(input_ids=ids, position_ids=positions, attention_mask=ids.new_ones(1, 1, 1, 1),
                                  use_cache=False, blocks=blocks).last_hidden_state
        flat = score(model, hidden[0, torch.cat(previous).to(device)[trained]], ids[0, trained])
    logp, entropy = (torch.zeros(weights.shape, device=device).masked_scatter(trained[None], x) for x in flat)
    return logp, entropy, weights


def flatten(root: Node, advantages: dict[Node, float], config) -> list[Trajectory]:
    """The trajectories of a tree with their tokens' advantages [T]; grpo: each its own outcome's.

    No response is the beginning of another (it ends with EOS, or at the length limit), so leaves are trajectories.
    """
    leaves = [n for n in root.walk() if not n.children for _ in range(n.visits)]
    outcome = group_advantages(torch.tensor([n.value for n in leaves]), torch.zeros(len(leaves)), eps=1e-9).tolist()
    result = []
    for leaf, A in zip(leaves, outcome):
        path = leaf.path()
        steps = [torch.full((len(n.tokens),), A if config.advantage == "grpo" else advantages[n]) for n in path]
        result.append(Trajectory(root.tokens, [t for n in path for t in n.tokens], torch.cat([n.logps for n in path]),
                                 advantage=torch.cat(steps)))
    return result


def tree_loss(model, batch: list, config, reference=None) -> tuple[torch.Tensor, dict]:
    """The loss of packed trees (`update` tree) or trajectories (flat), and its parts: clipped policy gradient + KL. [P]"""
    logps_of = tree_logps if config.update == "tree" else token_logps
    logp, entropy, weights = logps_of(model, batch)
    if config.update == "tree":
        old, A = (torch.cat([pack[k] for pack in batch], 1).to(logp.device) for k in ("logps", "advantages"))
    else:
        old, A = (pad(x).to(logp.device) for x in ([t.logps for t in batch], [t.advantage for t in batch]))
    loss, stats = policy_loss(logp, old, A, weights, config)
    stats["entropy_trained"] = masked_mean(entropy.detach(), weights).item()
    if reference is not None:
        with torch.no_grad():
            reference_logp, _, _ = logps_of(reference, batch)
        kl = masked_mean(k3(logp, reference_logp), weights)
        loss, stats["kl"] = loss + config.kl * kl, kl.item()
    return loss, stats | {"loss": loss.item()}


def update_on_trees(model, optimizer, roots: list[Node], config, reference=None) -> dict:
    """`updates_per_step` optimizer steps on a batch of trees; statistics, with the tokens of all trajectories (total) and
    those of the trees (unique).

    Trees without advantage cost no forward pass (unless a KL gives them a gradient); the mean is over the tokens of the
    rest, so that prompts that teach nothing do not dilute those that do [O]. Micro-batches add up to the gradient of the
    whole batch. A step whose loss or gradient is not finite is skipped and counted.
    """
    taught = [(root, step_advantages(root, config)) for root in roots]
    taught = [(root, A) for root, A in taught if any(A.values()) or config.kl]
    means, stats = defaultdict(float, tokens_total=0, tokens_unique=0), {"skipped": 0}
    model.train(config.gradient_checkpointing)  # the mode that switches checkpointing on; no other layer differs
    parts = [taught[i::config.updates_per_step] for i in range(config.updates_per_step)]
    for part in parts:
        nodes = [n for root, _ in part for n in root.walk()[1:]]
        tokens = {"tokens_total": sum(n.visits * len(n.tokens) for n in nodes),
                  "tokens_unique": sum(len(n.tokens) for n in nodes)}
        whole = over_processes(tokens, tuple(tokens))["tokens_total"]
        if not whole:
            continue
        if config.update == "tree":
            items, length = [pack_tree(*tree) for tree in part], lambda pack: pack["input_ids"].shape[1]
        else:
            items, length = [t for tree in part for t in flatten(*tree, config)], lambda t: len(t.prompt) + len(t.response)
        loss = 0.0
        for micro in micro_batches(items, config.micro_tokens, length):
            share = sum(x["weights"].sum().item() if config.update == "tree" else len(x.response) for x in micro) / whole
            micro_loss, extra = tree_loss(model, micro, config, reference)
            (share * micro_loss).backward()
            loss += share * extra["loss"]
            for key, value in extra.items():
                means[key] += share * value / len(parts)
        for key, value in tokens.items():
            means[key] += value
        sum_gradients(model)
        stats["grad_norm"] = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm).item()
        if math.isfinite(stats["grad_norm"]) and math.isfinite(over_processes({"loss": loss})["loss"]):
            optimizer.step()
        else:
            stats["skipped"] += 1
        optimizer.zero_grad()
    return {**over_processes(means, tuple(means)), **stats}


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation.
# ---------------------------------------------------------------------------------------------------------------------


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased pass@k from n samples of which c are right: 1 - C(n-c, k) / C(n, k). [Codex paper, arXiv 2107.03374]"""
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def distinct_n(texts: list[str], n: int) -> float:
    """Distinct-n: different n-grams of white-space words over all n-grams of the texts; 0 where there are none."""
    words = [text.split() for text in texts]
    grams = [tuple(w[i:i + n]) for w in words for i in range(len(w) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def self_bleu(texts: list[str]) -> float:
    """Self-BLEU: the mean BLEU-4 of each text against all others as its references, in [0, 1]; 1: all say the same.

    White-space words; an order without a match counts 0.1 matches, so that short texts are not all 0 (nltk's method1).
    """
    words, log_precision = [text.split() for text in texts], [0.0] * len(texts)
    for n in (1, 2, 3, 4):
        counts, of = [Counter(zip(*(w[i:] for i in range(n)))) for w in words], defaultdict(list)
        for gram, count in (item for c in counts for item in c.items()):
            of[gram].append(count)
        top = {gram: sorted(found, reverse=True) + [0] for gram, found in of.items()}
        for i, c in enumerate(counts):  # a count is clipped to the highest among the others
            hits = sum(min(count, top[gram][count == top[gram][0]]) for gram, count in c.items())
            log_precision[i] += math.log((hits or (0.1 if n > 1 else 1e-300)) / max(1, sum(c.values()))) / 4
    scores = []
    for i, w in enumerate(words):
        closest = min((len(v) for j, v in enumerate(words) if j != i), key=lambda r: (abs(r - len(w)), r))
        scores.append(math.exp(log_precision[i] + min(0.0, 1 - closest / max(1, len(w)))))
    return sum(scores) / len(scores)


def self_rouge_l(texts: list[str]) -> float:
    """Self-ROUGE-L: the mean over pairs of texts of the F1 of their longest common subsequence of white-space words."""
    words, scores = [text.split() for text in texts], []
    for a, b in itertools.combinations(words, 2):
        places, row = defaultdict(int), (1 << len(a)) - 1  # the table's row as bits, 0 where the length grows [Hyyro 2004]
        for i, word in enumerate(a):
            places[word] |= 1 << i
        for word in b:
            match = row & places[word]
            row = (row + match | row - match) & (1 << len(a)) - 1
        scores.append(2 * (len(a) - row.bit_count()) / max(1, len(a) + len(b)))
    return sum(scores) / len(scores)


def evaluate(model, tokenizer, problems, config) -> dict:
    """Greedy accuracy, and over n = `eval_samples` sampled responses a problem: pass@1 (avg@n), pass@k and maj@k with
    k = n, Distinct-1 and -4, 1 - Self-BLEU, 1 - Self-ROUGE-L, the number of different correct responses (each a mean over
    problems), and the mean length.

    Its random numbers depend on nothing but the configuration's seed and are the same before and after training.
    """
    count, problems = len(problems), problems[RANK::WORLD]
    prompts, n = [Trajectory(encode_prompt(tokenizer, q, config)) for q, _ in problems], config.eval_samples
    with torch.random.fork_rng():
        torch.manual_seed(config.seed + RANK)
        greedy = sample(model, tokenizer, prompts, config, greedy=True)
        sampled = sample(model, tokenizer, [p for p in prompts for _ in range(n)], config)
    result = defaultdict(float, greedy=sum(verify(extract_answer(t.text), a) for t, (_, a) in zip(greedy, problems)))
    for i, (_, gold) in enumerate(problems):
        texts = [t.text for t in sampled[i * n:(i + 1) * n]]
        answers = [extract_answer(text) for text in texts]
        right = [verify(a, gold) for a in answers]
        votes = Counter(a for a in answers if a is not None).most_common(1)
        result["pass@1"] += sum(right) / n
        result["pass@k"] += pass_at_k(n, sum(right), n)
        result["maj@k"] += bool(votes) and verify(votes[0][0], gold)
        result["distinct_1"] += distinct_n(texts, 1)
        result["distinct_4"] += distinct_n(texts, 4)
        if n > 1:  # diversity: 1 - similarity
            result["1-self_bleu"] += 1 - self_bleu(texts)
            result["1-self_rouge_l"] += 1 - self_rouge_l(texts)
        result["distinct_correct"] += len({text for text, r in zip(texts, right) if r})
        result["length"] += sum(len(t.response) for t in sampled[i * n:(i + 1) * n]) / n
    return {key: round(value / count, 4) for key, value in over_processes(result, tuple(result)).items()}


# ---------------------------------------------------------------------------------------------------------------------
# The run.
# ---------------------------------------------------------------------------------------------------------------------


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def save_atomically(path: Path, write) -> None:
    """`write(temporary path)`, then rename: neither a reader nor a crash ever meets half a file or half a folder. Where the
    disk is full or not to be written, one line says so and what was there before stays.
    """
    temporary, old = (path.with_name(f"{path.name}.{os.getpid()}.{kind}") for kind in ("tmp", "old.tmp"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        if path.is_dir():
            os.replace(path, old)  # a folder that is not empty cannot be replaced in one call
        os.replace(temporary, path)
    except (OSError, RuntimeError, SafetensorError) as e:  # torch and safetensors have their own words for a full disk
        fail(f"cannot write {path}: {one_line(e)}; what stood there before is untouched")
    finally:
        if old.exists() and not path.exists():
            os.replace(old, path)
        remove(temporary)
        remove(old)


def output_folder(config) -> Path:
    """OUT, or the next free runs/METHOD-SEED-N (with --resume the last used). Refuses to write over another run."""
    if RANK:
        return from_first(None)
    names = (Path(f"runs/{config.method}-{config.seed}-{n}") for n in itertools.count())
    used = list(itertools.takewhile(Path.exists, names))
    folder = Path(config.out) if config.out else next(  # a folder without a checkpoint is free
        (p for p in used if not (p / "state.pt").exists() and not config.resume),
        used[-1] if used and config.resume else Path(f"runs/{config.method}-{config.seed}-{len(used)}"))
    if config.resume and not folder.is_dir():
        fail(f"nothing to resume: there is no run in {folder}")
    if not config.resume and (folder / "state.pt").exists():
        fail(f"{folder} holds a run already; go on with --resume or choose another --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        fail(f"cannot write to the output folder {folder}: {e.strerror}")
    return from_first(folder)


def judge(trajectories: list[Trajectory], problems) -> None:
    """Reward each trajectory 1 or 0 by the gold answer of its group's problem."""
    for t in trajectories:
        t.reward = float(verify(extract_answer(t.text), problems[t.group][1]))


def rollout_metrics(trajectories: list[Trajectory]) -> dict:
    """What is logged of a step's trajectories. eff_rate: prompts whose rewards differ, the only ones that teach; pass@k: that
    have a right response; distinct_correct: different right responses a prompt; entropy: mean over sampled tokens, nats.
    """
    rewards, right = defaultdict(set), defaultdict(set)
    for t in trajectories:
        rewards[t.group].add(t.reward)
        right[t.group] |= {t.text} if t.reward else set()
    own = sum(len(t.response) - t.start for t in trajectories)
    return {"reward": sum(t.reward for t in trajectories) / len(trajectories),
            "eff_rate": sum(len(r) > 1 for r in rewards.values()) / len(rewards),
            "pass@k": sum(map(bool, right.values())) / len(rewards),
            "distinct_correct": sum(map(len, right.values())) / len(rewards),
            "entropy": sum(t.entropy[t.start:].sum().item() for t in trajectories) / own,
            "length": sum(len(t.response) for t in trajectories) / len(trajectories),
            "tokens_sampled": own, "trajectories": len(trajectories)}


def check_lengths(model, tokenizer, problems, config) -> None:
    """Fail where the longest prompt and response do not fit into the model's context."""
    longest = max(len(encode_prompt(tokenizer, q, config)) for q, _ in problems) + config.max_new_tokens
    if longest > (limit := getattr(model.config, "max_position_embeddings", longest)):
        fail(f"the longest prompt and max_new_tokens make {longest} tokens, the model's context holds {limit}")


def load_state(folder: Path, device) -> dict:
    """What state.pt of a run holds; fails with one line where there is none, or where it cannot be read."""
    try:
        return torch.load(folder / "state.pt", map_location=device, weights_only=True)
    except FileNotFoundError:
        fail(f"there is no {folder}/state.pt: no run with a checkpoint")
    except Exception as e:  # whatever unpickling raises
        fail(f"cannot read {folder}/state.pt: {one_line(e)}")


def restore(folder: Path, config, parts: dict) -> dict:
    """The state of a new run, or with --resume that of the last checkpoint, if there is one yet, whose numbers are loaded
    into `parts` (name: module or optimizer). What stands in the folder beyond the state goes. Fails where the configuration
    is another.
    """
    state = {"step": 0, "token": 0, "bad": 0, "before": None, "report": {}, "config": asdict(config)}
    if config.resume and (folder / "state.pt").exists():
        saved = load_state(folder, next(parts["model"].parameters()).device)
        free = {"resume", "out", "max_steps", "max_tokens", "save_every", "config", "compare", "seeds", "jobs"}  # may change
        other = [k for k in state["config"] if k not in free and state["config"][k] != saved["config"].get(k)]
        if other:
            fail(f"{folder} was made with another configuration: " + ", ".join(
                f"{k} {saved['config'].get(k)!r}, now {state['config'][k]!r}" for k in other))
        for name, part in parts.items():
            part.load_state_dict(saved.pop(name))
        state = saved | {"config": state["config"]}
    if RANK:
        return state
    for left in folder.glob("*.tmp"):
        remove(left)
    log = folder / "metrics.jsonl"
    lines = log.read_text().splitlines()[:state["step"]] if state["step"] else []
    save_atomically(log, lambda path: path.write_text("".join(line + "\n" for line in lines)))
    return state


def save(folder: Path, tokenizer, state: dict, parts: dict) -> None:
    """Write the checkpoint: model/ for `from_pretrained`, state.pt for --resume."""
    if RANK:
        return
    save_atomically(folder / "model", lambda path: (parts["model"].save_pretrained(path), tokenizer.save_pretrained(path)))
    save_atomically(folder / "state.pt", lambda path: torch.save(
        state | {name: part.state_dict() for name, part in parts.items()}, path))


def run_steps(config, folder: Path, tokenizer, state: dict, parts: dict, one_step) -> None:
    """Call one_step(step, rng) -> metrics until max_steps or max_tokens; log each, warm the learning rate up, save.

    Every step seeds itself from (seed, step): a resumed run needs no saved random state to go on exactly. Ctrl-C ends the
    run after the step, with a checkpoint; a second one ends it at once.
    """
    unit, total = ("token", config.max_tokens) if config.max_tokens else ("step", config.max_steps)
    bar = tqdm(total=total, initial=state[unit], desc=config.method, unit=unit, unit_scale=unit == "token",
               disable=RANK > 0 or None)
    interrupted, stop, log = [], False, folder / "metrics.jsonl"

    def interrupt(*_):
        if interrupted:
            raise KeyboardInterrupt
        interrupted.append(True)
        print("\nstopping after this step; Ctrl-C again stops at once", file=sys.stderr)

    previous = signal.signal(signal.SIGINT, interrupt)
    try:
        if not state["step"]:
            save(folder, tokenizer, state, parts)
        while state["step"] < config.max_steps and (unit == "step" or state["token"] < total) and not stop:
            step = state["step"]
            rng = random.Random(f"{config.seed} {step}")
            torch.manual_seed(rng.getrandbits(62) + RANK)
            for group in parts["optimizer"].param_groups:
                group["lr"] = config.lr * group["scale"] * min(1.0, (step + 1) / max(1, config.lr_warmup))
            metrics = over_processes(one_step(step, rng), ("tokens_sampled", "trajectories"))
            if RANK == 0:
                with log.open("a") as f:
                    f.write(json.dumps({"step": step, **metrics}) + "\n")
            bar.set_postfix({k: f"{metrics[k]:.2f}" for k in ("reward", "eff_rate", "entropy")}, refresh=False)
            bar.update(1 if unit == "step" else metrics["tokens_sampled"])
            state |= {"step": step + 1, "token": state["token"] + metrics["tokens_sampled"],
                      "bad": state["bad"] + 1 if metrics["skipped"] else 0}
            if state["bad"] == 5:
                fail(f"the loss or its gradient was not finite in 5 steps in a row (the last: step {step}); lower --lr, or "
                     f"resume from {folder}/state.pt")
            if state["step"] % config.save_every == 0:
                save(folder, tokenizer, state, parts)
            stop = any(over_processes({"stop": len(interrupted)}).values())
    except OSError as e:
        fail(f"cannot write {log}: {one_line(e)}; mend that and go on with --resume --out {folder}")
    finally:
        signal.signal(signal.SIGINT, previous)
        bar.close()
    save(folder, tokenizer, state, parts)
    if stop:
        print(f"stopped after {state['step']} steps; go on with the same command and --resume --out {folder}",
              file=sys.stderr)
        raise SystemExit(130)


def summarize(config, folder: Path, state: dict, after: dict, started: float) -> dict:
    """Write summary.json, print the before/after table, return the summary."""
    summary = {"before": state["before"], "after": after, **state["report"], "config": asdict(config),
               "seconds": round(time.time() - started, 1)}
    if RANK == 0:
        save_atomically(folder / "summary.json", lambda path: path.write_text(json.dumps(summary, indent=2) + "\n"))
    print(f"\n{config.eval_prompts} held-out problems, {config.eval_samples} samples each (k = {config.eval_samples})\n"
          f"{'':18}{'before':>9}{'after':>9}")
    for key, value in summary["before"].items():
        print(f"{key:18}{value:9.3f}{after[key]:9.3f}")
    print(f"{summary['seconds']:.0f} s; everything is in {folder}")
    return summary


def tree_metrics(roots: list[Node], trajectories: list[Trajectory], config) -> dict:
    """What is logged of a step's trees; the paper's Eff-Rate is eff_rate, its Avg-Rate reward. Cov is over forks only."""
    nodes = [n for root in roots for n in root.walk() if n.children]
    forks = [n for n in nodes if len(n.children) > 1]
    return rollout_metrics(trajectories) | {
        "ib_score": sum(ib_score(n, config.beta) for n in nodes) / max(1, len(nodes)),
        "cov": sum(ib_covariance(n, config.beta) for n in forks) / max(1, len(forks))}


def train(config: Config) -> dict:
    """Evaluate, train, evaluate again; returns the summary."""
    started = time.time()
    start_processes(config)
    torch.manual_seed(config.seed)
    problems, heldout = load_problems(config)
    folder = output_folder(config)
    model, tokenizer = load_policy(config)
    check_lengths(model, tokenizer, problems + heldout, config)
    if config.sampler != "independent" or config.update == "tree":
        require_full_attention(model)
    reference = load_policy(config)[0] if config.kl else None  # from where the run began, also when it is resumed
    optimizer = torch.optim.AdamW([{"params": list(model.parameters()), "scale": 1.0}], lr=config.lr, betas=(0.9, 0.99),
                                  weight_decay=0.0)
    parts = {"model": model, "optimizer": optimizer}
    state = restore(folder, config, parts)
    if state["before"] is None:
        state["before"] = evaluate(model, tokenizer, heldout, config)

    def one_step(step, rng):
        t0 = time.time()
        batch = rng.sample(problems, min(config.prompts_per_step, len(problems)))[RANK::WORLD]
        roots, trajectories = grow(model, tokenizer, batch, config, rng)
        t1 = time.time()
        metrics = tree_metrics(roots, trajectories, config) | update_on_trees(model, optimizer, roots, config, reference)
        return metrics | {"rollout_s": round(t1 - t0, 3), "update_s": round(time.time() - t1, 3)}

    run_steps(config, folder, tokenizer, state, parts, one_step)
    return summarize(config, folder, state, evaluate(model, tokenizer, heldout, config), started)


# ---------------------------------------------------------------------------------------------------------------------
# What looks at runs.
# ---------------------------------------------------------------------------------------------------------------------


def branching_table(config) -> dict:
    """The paper's table of branching strategies, without training: for independent rollouts (two thirds of G, and G) and
    each sampler the share of problems whose rewards differ (Eff-Rate), the mean reward (Avg-Rate), tokens a problem.
    """
    problems = load_problems(replace(config, eval_prompts=config.branching_table))[1]
    model, tokenizer = load_policy(config)
    check_lengths(model, tokenizer, problems, config)
    require_full_attention(model)
    G = config.tree[0] + (config.tree[1] - 1) * config.tree[2] * config.tree[3]
    rows = [("independent", 2 * G // 3), ("independent", G), *((s, G) for s in ("random", "fixed", "entropy", "ib"))]
    table = {}
    print(f"{len(problems)} problems{'':14}G  Eff-Rate  Avg-Rate    tokens")
    for sampler, n in rows:
        c, totals = replace(config, sampler=sampler, rollouts=n), Counter()
        rng = random.Random(config.seed)
        torch.manual_seed(config.seed)
        for i in range(0, len(problems), config.prompts_per_step):
            batch = problems[i:i + config.prompts_per_step]
            metrics = tree_metrics(*grow(model, tokenizer, batch, c, rng), c)
            totals.update({"eff_rate": metrics["eff_rate"] * len(batch), "reward": metrics["reward"] * len(batch),
                           "tokens": metrics["tokens_sampled"]})
        table[f"{sampler} {n}"] = {key: value / len(problems) for key, value in totals.items()}
        eff, reward, tokens = table[f"{sampler} {n}"].values()
        print(f"{sampler:20}{n:10}{eff:10.1%}{reward:10.1%}{tokens:10.1f}")
    return table


def compare(config, argv: list[str]) -> dict:
    """Train each variant of `compare` with seeds 0 ... `seeds` - 1, all from one warm start; returns their table.

    A variant is a method, or one with other settings: grpo, iiblpo+keep=6+kappa=0. Runs stand in OUT/VARIANT-SEED, finished
    ones are taken as they are, broken ones go on.
    """
    if WORLD > 1:
        fail("--compare starts processes of its own: run it without torchrun")
    folder, variants = Path(config.out or "runs/compare"), config.compare.split(",")
    waiting, running = [], []
    outs = {(seed, v): folder / f"{v.replace(' ', ',')}-{seed}" for seed in range(config.seeds) for v in variants}
    for (seed, variant), out in outs.items():
        method, *settings = variant.split("+")
        flags = [*argv, "--compare=", "--method", method, "--seed", str(seed), "--out", str(out)]
        for key, _, value in (s.partition("=") for s in settings):
            flags += [f"--{key}", *value.split(" ")]
        parse_config(type(config), Path(__file__).stem, flags)  # a mistake ends the program here
        if not (out / "summary.json").exists():
            waiting.append((out, flags + ["--resume"] * out.exists()))
    if waiting:
        load_policy(config)  # the warm start, once for all
    threads = str(max(1, (os.cpu_count() or 1) // config.jobs))
    bar = tqdm(total=len(outs), initial=len(outs) - len(waiting), desc="compare", unit="run")
    while waiting or running:
        while waiting and len(running) < config.jobs:
            out, flags = waiting.pop(0)
            out.mkdir(parents=True, exist_ok=True)
            with (out / "log.txt").open("a") as log:
                running.append((out, subprocess.Popen([sys.executable, __file__, *flags], stdout=log, stderr=log,
                                                      env={"OMP_NUM_THREADS": threads, **os.environ})))
        time.sleep(0.2)
        for out, process in [job for job in running if job[1].poll() is not None]:
            running.remove((out, process))
            bar.update()
            if process.returncode:
                for _, other in running:
                    other.terminate()
                last = ((out / "log.txt").read_text().splitlines() or [""])[-1]
                fail(f"{out} ended with code {process.returncode}: {last}")
    bar.close()
    return compare_runs(folder, {v: [outs[seed, v] for seed in range(config.seeds)] for v in variants})


def compare_runs(folder: Path, variants: dict[str, list[Path]]) -> dict:
    """Table of variants, each a list of its runs' folders by seed, printed and written to compare.json: mean ± standard
    error over seeds, and that of the difference to the first variant with the same seed. `last` is a run's mean over its
    last five steps.
    """
    def mean_and_error(x):
        mean = sum(x) / len(x)
        return mean, math.sqrt(sum((v - mean) ** 2 for v in x) / max(1, len(x) - 1) / len(x))

    results = {variant: [] for variant in variants}
    for variant, outs in variants.items():
        for out in outs:
            last = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()[-5:]]
            results[variant].append(json.loads((out / "summary.json").read_text())["after"] | {
                "last": {k: sum(step.get(k, 0.0) for step in last) / len(last) for k in last[-1]}})
    first = next(iter(results.values()))
    table, width = {}, max(map(len, variants)) + 2
    print(f"\n{len(first)} seeds, mean ± standard error; below, the paired difference to {next(iter(variants))}")
    print(f"{'':{width}}" + "".join(f"{key:>20}" for key in ("pass@1", "pass@k", "distinct_correct")))
    for variant, runs in results.items():
        table[variant] = {"runs": runs}
        for key in [k for k in runs[0] if k != "last"]:
            values, base = [r[key] for r in runs], [r[key] for r in first]
            table[variant][key] = {"mean ± error": mean_and_error(values),
                                   "difference ± error": mean_and_error([a - b for a, b in zip(values, base)])}
        for name, kind in ((variant, "mean ± error"), ("", "difference ± error"))[:1 + (runs is not first)]:
            cells = [table[variant][k][kind] for k in ("pass@1", "pass@k", "distinct_correct")]
            cells = ["{:{}.3f} ± {:.3f}".format(value, "" if name else "+", error) for value, error in cells]
            print(f"{name:{width}}" + "".join(f"{cell:>20}" for cell in cells))
    save_atomically(folder / "compare.json", lambda path: path.write_text(json.dumps(table, indent=1) + "\n"))
    return table


def import_pyplot():
    """matplotlib's pyplot, which only pictures need; fails with one line where it is missing."""
    try:
        from matplotlib import pyplot
    except ImportError:
        fail("--plot needs matplotlib: pip install matplotlib")
    return pyplot


def plot(config) -> dict:
    """Learning curves of the runs in the folders `plot` (a comparison's folder stands for all of its runs) over the tokens
    sampled, mean and range over runs whose names differ in the seed only, as an SVG file OUT.
    """
    pyplot = import_pyplot()
    logs = [log for folder in map(Path, config.plot)
            for log in sorted({*folder.glob("metrics.jsonl"), *folder.glob("*/metrics.jsonl")})]
    variants, bins = defaultdict(list), 25
    for log in logs:
        steps = [json.loads(line) for line in log.read_text().splitlines()]
        if steps:
            variants[re.sub(r"(-\d+)+$", "", log.parent.name)].append(steps)
    if not variants:
        fail(f"no metrics.jsonl with steps in {', '.join(config.plot)}")
    names = {"reward": "reward", "eff_rate": "Eff-Rate", "entropy": "token entropy (nats)",
             "pass@k": "pass@k (of the rollouts)", "distinct_correct": "different correct responses",
             "length": "tokens a response", "cov": "Cov(η₁, η₂)", "ib_score": "IB-Score"}
    names = {k: v for k, v in names.items() if any(k in runs[0][0] for runs in variants.values())}
    longest = max(sum(s["tokens_sampled"] for s in run) for runs in variants.values() for run in runs)
    pyplot.rcParams.update({f"{part}.color": "#808080" for part in ("text", "xtick", "ytick")} | {  # legible on light and dark
        "axes.edgecolor": "#808080", "axes.labelcolor": "#808080", "svg.hashsalt": "0", "svg.fonttype": "none",
        "font.size": 9})
    figure, axes = pyplot.subplots(2, math.ceil(len(names) / 2), figsize=(3.2 * math.ceil(len(names) / 2), 5), squeeze=False)
    for axis, key in itertools.zip_longest(axes.flat, names):
        if key is None:
            axis.set_visible(False)
            continue
        for color, (variant, runs) in zip(itertools.cycle(("#e07b39", "#3a86c8", "#3fa66b", "#b565c9", "#c9a227", "#d1495b")),
                                          variants.items()):
            curves = []  # one a run: {bin: mean}
            for run in runs:
                tokens, values = itertools.accumulate(s["tokens_sampled"] for s in run), defaultdict(list)
                for total, s in zip(tokens, run):
                    if key in s:
                        values[min(bins - 1, int(bins * total / longest))].append(s[key])
                curves.append({b: sum(v) / len(v) for b, v in values.items()})
            x = sorted(set.intersection(*map(set, curves)))
            across = [[curve[b] for curve in curves] for b in x]
            millions = [(b + 0.5) * longest / bins / 1e6 for b in x]
            axis.plot(millions, [sum(v) / len(v) for v in across], color=color, label=f"{variant} ({len(runs)})")
            axis.fill_between(millions, list(map(min, across)), list(map(max, across)), color=color, alpha=0.2, linewidth=0)
        axis.set_title(names[key], fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel("tokens sampled, millions")
    axes[0, 0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    path = Path(config.out or "runs/curves.svg")
    save_atomically(path, lambda temporary: figure.savefig(temporary, format="svg", transparent=True,
                                                           metadata={"Date": None}))
    pyplot.close(figure)
    print(f"{sum(map(len, variants.values()))} runs of {', '.join(variants)} in {path}")
    return {variant: len(runs) for variant, runs in variants.items()}


def shaded(pieces: list[str], heat: list[float], indent: int) -> str:
    """Text pieces in lines of at most 80 columns, shaded by their heat (0 to 1): as background in a terminal, as bars below
    in plain text and with NO_COLOR. What cannot be printed is a dot, the end of a line ↵.
    """
    rows, column, color = [[]], 0, sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for c, h in ((c, h) for piece, h in zip(pieces, heat) for c in piece):
        width = 2 if unicodedata.east_asian_width(c) in ("W", "F") else 1
        if column + width > 80 - indent:
            rows, column = rows + [[]], 0
        rows[-1].append((c if c.isprintable() else "↵" if c == "\n" else "·", h, width))
        column += width
    lines = []
    for row in rows:
        if color:
            colors = 231, 230, 223, 216, 209, 202
            lines.append("".join(f"\033[30;48;5;{colors[round(5 * h)]}m{c}" for c, h, _ in row) + "\033[0m")
        else:
            bars = "".join(" ▁▂▃▄▅▆▇█"[round(8 * h)] * width for _, h, width in row)
            lines += ["".join(c for c, _, _ in row), bars.rstrip()]
    return "\n".join(" " * indent + line for line in lines if line)


def show_tree(config) -> Node:
    """Print one held-out problem's tree: each step with visits, p̂, π, J_IB, its advantage A and the rounds that branched
    after it; shaded by token entropy. The policy is OUT's, or the warm start.
    """
    torch.manual_seed(config.seed)
    _, heldout = load_problems(config)
    model, tokenizer = load_policy(config)
    require_full_attention(model)
    if config.out:
        model.load_state_dict(load_state(Path(config.out), model.device)["model"])
    problem = heldout[config.seed % len(heldout)]
    (root,), _ = grow(model, tokenizer, [problem], config, random.Random(config.seed))
    A = step_advantages(root, config)
    print(f"{problem[0]}  answer {problem[1]}; β = {config.beta}, sampler {config.sampler}, advantage {config.advantage}")
    for node in root.walk():
        path = node.path()
        print(" " * min(len(path), 30) + f"visits {node.visits}  p̂ {node.value:.2f}"
              + (f"  π {node.confidence:.2f}  A {A[node]:+.2f}" if path else "")
              + (f"  J {ib_score(node, config.beta):+.2f}" if node.children else "")
              + (f"  rounds {', '.join(map(str, node.branched))}" if node.branched else ""))
        pieces = [tokenizer.decode([t]) for t in node.tokens]
        print(shaded(pieces, (node.entropy / math.log(4)).clamp(max=1).tolist() or [0.0] * len(pieces), min(len(path), 30)))
    return root


def main(argv: list[str] | None = None) -> dict:
    """The command line; returns the summary."""
    argv = sys.argv[1:] if argv is None else list(argv)
    config = parse_config(Config, "ib_tpo", argv)
    if config.compare:
        return compare(config, argv)
    if config.plot:
        return plot(config)
    return show_tree(config) if config.show else branching_table(config) if config.branching_table else train(config)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("interrupted")
