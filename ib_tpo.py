# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.13", "transformers>=5.23", "datasets", "sympy", "tqdm"]
# ///
"""IB-TPO: Information Bottleneck Driven Tree-based Policy Optimization (arXiv 2605.28109).

    python ib_tpo.py                                         # a tiny policy, on a laptop
    python ib_tpo.py --sampler entropy --out runs/entropy    # an ablation; settings are flags
    python ib_tpo.py --model Qwen2.5-0.5B --out runs/qwen    # a real model, on one GPU

Left out: vLLM, sharding, rewards other than right or wrong, and the paper's top-p 0.95 and
temperature 0.7 (so that what is recorded is the sampling distribution). Ours: the packed update.

Marks: [P] the paper, [O] our own choice; others name a source. Shapes: B rows, T response tokens,
S tokens of a packed tree, V vocabulary, H width. Entropies and log-probabilities are in nats.
"""
import contextlib
import copy
import functools
import json
import math
import operator
import os
import random
import re
import sys
import tempfile
import time
import zlib
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import datasets
import mpmath
import pandas
import torch
import transformers
import yaml
from tokenizers import Tokenizer, decoders, models
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers.hf_argparser import HfArg, HfArgumentParser

torch.backends.cuda.enable_cudnn_sdp(False)  # NaN gradients under masks [pytorch#196678]
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
datasets.disable_progress_bars()


def setting(default, help):
    """A field of Config: its default and what it does."""
    return HfArg(default=default, help=help)


@dataclass
class Config:
    """All settings: a flag each, and a line of a YAML file. The defaults are for a real model."""
    # the run
    model: str = setting("tiny", "hub name (Qwen2.5-0.5B), folder, or tiny")
    method: Literal["ib_tpo", "grpo"] = setting("ib_tpo", "grpo: no tree, outcome advantages")
    max_steps: int = setting(200, "training steps")
    max_tokens: int = setting(0, "stop when so many tokens have been sampled; 0: never")
    seed: int = setting(0, "of problems and sampling")
    out: str = setting("", "the run's folder (runs/METHOD-SEED)")
    resume: bool = setting(False, "go on from the run's last checkpoint")
    save_every: int = setting(50, "steps between checkpoints")
    show: bool = setting(False, "do not train: print the tree of a problem")
    # problems
    dataset: str = setting("gsm8k", "gsm8k, math, chain, or a .jsonl, .json or .parquet file")
    prompt: str = setting("{question}\nReason step by step and put your final answer within "
                          "\\boxed{}.", "what the policy is asked")
    operands: list[int] = HfArg(default_factory=[4, 7].copy, help="chain: fewest and most digits")
    habit: float = setting(0.75, "chain: share of lines that do the leftmost operator by habit")
    warm_steps: int = setting(1000, "tiny: supervised steps before RL")
    # the tree
    prompts_per_step: int = setting(16, "prompts a step, a tree each")
    tree: list[int] = HfArg(
        default_factory=[4, 9, 1, 1].copy, help="B0 L K B: rollouts from the root; rounds, the "
        "first one included; nodes a round; continuations a node")
    sampler: Literal["ib", "random", "fixed", "entropy", "independent"] = setting(
        "ib", "where to branch: highest IB-Score, anywhere, everywhere once, entropy, nowhere")
    rollouts: int = setting(0, "responses a prompt of the independent sampler; 0: as a tree has")
    max_new_tokens: int = setting(1024, "longest response")
    generate_tokens: int = setting(131072, "rows x (prompt + tokens to come, no prefix) of a call")
    delimiter: str = setting("\n\n", "what a reasoning step ends with")
    beta: float = setting(5.0, "beta: weight of what a step says about the answer")
    # update
    advantage: Literal["gl+ib", "gl", "ib", "grpo"] = setting("gl+ib", "A_GL + lam A_IB, or less")
    lam: float = setting(0.1, "lambda: weight of A_IB")
    lr: float = setting(1e-6, "AdamW's learning rate")
    updates_per_step: int = setting(1, "steps a batch; at 1 hardly a ratio is clipped")
    clip_low: float = setting(0.2, "the ratio is clipped to [1 - clip_low, ...")
    clip_high: float = setting(0.2, "... 1 + clip_high]")
    kl: float = setting(0.001, "weight of the k3 KL to the frozen starting policy")
    max_grad_norm: float = setting(1.0, "gradients are clipped to this norm")
    micro_tokens: int = setting(4096, "tokens of one training pass, but a tree at least")
    # evaluation
    eval_prompts: int = setting(256, "held-out problems")
    eval_samples: int = setting(16, "responses a problem: the k of pass@k and maj@k")
    eval_every: int = setting(0, "steps between further evaluations; 0: before and after only")

    MAY_BE_0 = ["max_tokens", "seed", "eval_every", "rollouts"]  # other integers may not
    SHARES = ["habit", "clip_low"]  # 1 at most

    def check(self):
        """What the method implies, and what else must hold."""
        if self.method == "grpo":
            self.sampler, self.advantage = "independent", "grpo"
        if len(self.tree) != 4 or not self.delimiter or self.beta == 0:
            fail("tree must be four numbers B0 L K B, delimiter not empty and beta above 0")


@dataclass(eq=False)
class Trajectory:
    """A problem, with a response or the beginning of one."""
    prompt: list[int]
    question: str = ""
    gold: str = ""  # its right answer
    group: int = 0  # which of the step's problems it is
    response: list[int] = field(default_factory=list)  # T tokens, the last EOS unless cut
    logps: torch.Tensor = torch.zeros(0)  # [T] ln π_old(o_t), as it was sampled
    entropy: torch.Tensor = torch.zeros(0)  # [T] H_t, likewise
    start: int = 0  # where it left its parent (0: none): response[start:] are its own tokens
    text: str = ""
    complete: bool = True  # it ended by itself
    reward: float = 0.0
    advantage: float = 0.0

    def __len__(self):
        return len(self.prompt) + len(self.response)


# ==== IBTree: steps and how they grow
#   [P] p̂(a*|s) = mean reward of the trajectories through step s
#   [P] B₀ rollouts, then L - 1 rounds: B continuations of each of the K nodes of highest IB-Score
#   G = B₀ + (L - 1) K B trajectories a tree

@dataclass(eq=False)
class Node:
    """A step s below those before it; the root holds the prompt q. Equal siblings are one [O]."""
    tokens: list[int]
    logps: torch.Tensor = torch.zeros(0)  # [T] ln π_old of the step's tokens
    entropy: torch.Tensor = torch.zeros(0)  # [T]
    parent: "Node" = None
    children: list["Node"] = field(default_factory=list)
    visits: int = 0  # trajectories through this step
    total_reward: float = 0.0  # of these, each 0 or 1
    end: int = 0  # response tokens from q to the end of this step
    branched: int = 0  # how often it was branched from

    @property
    def value(self):
        """p̂(a*|s): the mean reward of the trajectories through s. [P]"""
        return self.total_reward / max(1, self.visits)

    @property
    def confidence(self):
        """η₂ = π(s), the geometric mean of its token probabilities (the product underflows). [O]"""
        return self.logps.mean().exp().item()

    def path(self):
        """The steps from the first to this one, without the root."""
        nodes, node = [], self
        while node.parent:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]

    def walk(self):
        """This node and all below it, depth-first: a subtree in one piece."""
        nodes, waiting = [], [self]
        while waiting:
            nodes.append(waiting.pop())
            waiting += reversed(nodes[-1].children)
        return nodes

def split_steps(token_ids, tokenizer, delimiter):
    """The steps s_1 ... s_n of a response, lists of tokens: each ends with the token that completes
    a delimiter [P: "\\n\\n"], the last holds the rest. "3+8\\n1\\n#1" -> "3+8\\n", "1\\n", "#1".
    """
    texts = {token: tokenizer.decode(token, skip_special_tokens=True) for token in set(token_ids)}
    steps, text = [], delimiter  # as if a step had just ended
    for token in token_ids:
        if delimiter in text:
            steps.append([])
            text = ""
        steps[-1].append(token)
        text += texts[token]
    return steps

def insert(root, steps, step_logps, reward, step_entropy=None):
    """Add a trajectory (its steps, their [T] log-probs, its reward 0 or 1); returns its leaf.

    Steps that the tree has already are visited once more: their estimates are pooled [O].
    """
    path = [root]
    for i, tokens in enumerate(steps):
        parent = path[-1]
        child = next((node for node in parent.children if node.tokens == tokens), None)
        if child is None:
            end = parent.end + len(tokens)
            child = Node(tokens, torch.as_tensor(step_logps[i]), parent=parent, end=end)
            if step_entropy is not None:
                child.entropy = step_entropy[i]
            parent.children.append(child)
        path.append(child)
    for node in path:
        node.visits += 1
        node.total_reward += reward
    return path[-1]

def grow(model, tokenizer, problems, config, rng):
    """IBTrees of a batch of problems: ({group: root}, all trajectories that were sampled). [P]

    All trees grow in one `sample` a round, from prompt and prefix, which is prefilled again.
    """
    B0, L, K, B = config.tree
    roots = {t.group: Node(t.prompt, branched=1) for t in problems}  # by B₀ rollouts
    if config.sampler == "independent":  # a single round
        B0, L = config.rollouts or B0 + (L - 1) * K * B, 1
    trajectories, begun = [], problems * B0
    for turn in range(L):
        if turn > 0:
            begun = []
            for t in problems:
                for node in select_nodes(roots[t.group], K, config.sampler, config, rng):
                    node.branched += 1
                    begun += [go_on_from(node, t)] * B
        new = sample(model, tokenizer, begun, config)
        judge(new, config)
        for t in new:
            steps = split_steps(t.response, tokenizer, config.delimiter)
            lengths = [len(step) for step in steps]
            logps, entropy = t.logps.split(lengths), t.entropy.split(lengths)
            insert(roots[t.group], steps, logps, t.reward, entropy)
        trajectories += new
    return roots, trajectories

def go_on_from(node, problem):
    """The trajectory of a problem that ends with a node's step, to be gone on from."""
    path = node.path()
    return replace(problem, response=[token for step in path for token in step.tokens],
                   logps=torch.cat([problem.logps, *[step.logps for step in path]]),
                   entropy=torch.cat([problem.entropy, *[step.entropy for step in path]]))

# ==== IB-Score: where to branch
#   [P] J_IB(v) ≈ (1+β)/B Σ_b η₁(s_b) η₂(s_b), over the B sub-steps s_b sampled at v
#   [P] information gain η₁(s) = p̂(a*|s) / p̂(a*|parent) - (1 + 1/β),  confidence η₂(s) = π(s)
# Why: J_IB(v) = (1+β) H(s|v) - β H(s|a*,v), each H a mean of 1 - π over s ~ π(s|v), so that
#   H(s|v) = 1 - Σ_s π(s)²,  and by Bayes  H(s|a*,v) = 1 - Σ_s π(s)² p(a*|s) / p(a*|v)
#   J_IB(v) = 1 + β Σ_s π(s)² η₁(s) ≈ 1 + β/B Σ_b η₁ η₂, π(s) a product of token probabilities
# The paper drops the 1 and has (1+β)/B: the same ranking.
# Where p̂ = p̂(parent), as when all are right or wrong, η₁ = -1/β: confident steps grow rarer.

def information_gain(node, beta):
    """η₁(s). Where the parent never led to a right answer the ratio counts as 1 [O]."""
    ratio = 1.0
    if node.parent.value > 0:
        ratio = node.value / node.parent.value
    return ratio - (1 + 1 / beta)

def ib_score(node, beta):
    """J_IB of a node with children. A child counts with all its visits [O], also those of
    trajectories that were branched from further down.
    """
    B = sum(s.visits for s in node.children)
    return (1 + beta) / B * sum(s.visits * information_gain(s, beta) * s.confidence
                                for s in node.children)

def ib_covariance(node, beta):
    """Cov(η₁, η₂) over a node's sub-steps, by visits; under GRPO it falls to zero. [P]"""
    visits = torch.tensor([s.visits for s in node.children])
    eta = torch.tensor([[information_gain(s, beta), s.confidence] for s in node.children])
    return torch.cov(eta.T, correction=0, fweights=visits)[0, 1].item()

def select_nodes(root, k, sampler, config, rng):
    """The k nodes to branch from, which have children and room behind them; if fewer, they repeat.

    ib: highest J_IB [P]; entropy: before the step with the highest token entropy, each place once
    before any twice (as TreeRL); fixed: each place once, from the root down (as TreePO); random.
    """
    nodes = [n for n in root.walk() if n.children and n.end < config.max_new_tokens]
    if sampler == "ib":
        nodes.sort(key=lambda n: -ib_score(n, config.beta))
    elif sampler == "entropy":
        nodes.sort(key=lambda n: (n.branched, -max(s.entropy.max().item() for s in n.children)))
    elif sampler == "fixed":
        nodes.sort(key=lambda n: (n.branched, len(n.path())))
    else:
        rng.shuffle(nodes)
    return (nodes * k)[:k]

# ==== Step-level advantages
#   [P] A_GL(s) = (p̂(a*|s) - p̂(a*|q)) / std of the G rewards, 0 where that is 0
#   [P] A_IB(s) = η₁(s) η₂(s), of π_old;  A(s) = A_GL(s) + λ A_IB(s)
# Summed over the trajectories through s, GRPO's (R - mean)/std is visits x A_GL(s): at ratio 1,
# A_GL on the tree is GRPO on its trajectories. New is where samples are taken, and λ A_IB. [O]

def step_advantages(root, config):
    """{step: A(s)} of a tree, by config.advantage. grpo: (R - mean)/(std + 1e-4), the mean over its
    trajectories, which is A_GL but for the 1e-4.
    """
    result = {}
    std = math.sqrt(root.value * (1 - root.value))  # of rewards 0 and 1
    for node in root.walk()[1:]:
        global_local = (node.value - root.value) / max(std, 1e-9)
        bottleneck = information_gain(node, config.beta) * node.confidence
        kinds = {"gl+ib": global_local + config.lam * bottleneck, "gl": global_local,
                 "ib": bottleneck, "grpo": (node.value - root.value) / (std + 1e-4)}
        result[node] = kinds[config.advantage]
    return result

# ==== Update on packed trees
#   [P] L = -mean_t min(r_t A, clip(r_t) A) + 0.001 KL, over all G trajectories; r_t <= 3 [O]
# A step that trajectories share is run once: the tree lies depth-first in one sequence, a token
# sees its ancestors and itself, its position is its depth, and its weight in the mean is the
# number of trajectories through it. The gradient is that of G separate rows [O].

def policy_loss(logp, old_logp, advantages, mask, config):
    """-mean_t min(min(r_t, 3) A, clip(r_t, 1 - clip_low, 1 + clip_high) A), r_t = π / π_old. [GRPO]

    logp, old_logp, mask (or weights of tokens): [B, T]; advantages: [B] or [B, T]. The mean is over
    all tokens [DAPO]; the 3: [arXiv 1912.09729]. Also the mean ratio and the share of tokens cut.
    """
    if advantages.ndim == 1:
        advantages = advantages[:, None]
    ratio = (logp - old_logp).exp()
    bounded = ratio.clamp(max=3.0)  # where A < 0, too, no token outweighs a batch
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    objective = torch.minimum(bounded * advantages, clipped * advantages)
    cut = objective != ratio * advantages
    tokens = mask.sum()
    stats = {"ratio": (ratio * mask).sum() / tokens, "clipped": (cut * mask).sum() / tokens}
    return -(objective * mask).sum() / tokens, stats

def pack_tree(root, advantages):
    """One tree of S tokens, the prompt's among them, a step once. [S]: input_ids, previous (index
    of the token before), weights (prompt: 0), advantages, logps (old); attention_mask: [S, S].
    """
    nodes = root.walk()
    last = {}  # node: index of its last token
    S = sum(len(node.tokens) for node in nodes)
    mask = torch.zeros(S, S, dtype=torch.bool)
    previous = torch.arange(S) - 1
    begin = 0
    for node in nodes:
        end = begin + len(node.tokens)
        if node.parent:
            previous[begin] = last[node.parent]
            mask[begin:end] = mask[last[node.parent]]  # it sees what its parent sees
        mask[begin:end, begin:end] = torch.ones(end - begin, end - begin).tril().bool()
        last[node] = end - 1
        begin = end
    lengths = torch.tensor([len(node.tokens) for node in nodes])
    visits = torch.tensor([0.0] + [float(node.visits) for node in nodes[1:]])
    A = torch.tensor([0.0] + [advantages[node] for node in nodes[1:]])
    logps = [torch.zeros(len(root.tokens))] + [node.logps for node in nodes[1:]]
    return {"input_ids": torch.tensor([token for node in nodes for token in node.tokens]),
            "previous": previous.clamp(min=0), "weights": visits.repeat_interleave(lengths),
            "advantages": A.repeat_interleave(lengths), "logps": torch.cat(logps),
            "attention_mask": mask}

def tree_logps(model, packs):
    """ln π of the tokens of packed trees (of prompts: 0), and their weights: two [B, S]."""
    ids = pad([pack["input_ids"] for pack in packs]).to(DEVICE)
    previous = pad([pack["previous"] for pack in packs]).to(DEVICE)
    weights = pad([pack["weights"] for pack in packs]).to(DEVICE)
    mask = torch.eye(ids.shape[1], dtype=torch.bool).repeat(len(packs), 1, 1)  # padding sees itself
    for square, pack in zip(mask, packs):
        S = len(pack["input_ids"])
        square[:S, :S] = pack["attention_mask"]
    mask = mask.to(DEVICE)
    with autocast():
        states = model.base_model(input_ids=ids, attention_mask=mask[:, None], use_cache=False,
                                  position_ids=mask.sum(-1) - 1).last_hidden_state
        row, column = (weights > 0).nonzero(as_tuple=True)
        logp, _ = score(model, states[row, previous[row, column]], ids[row, column])
    zeros = torch.zeros(ids.shape, device=DEVICE)
    return zeros.index_put((row, column), logp), weights

def k3(logp, reference):
    """The k3 estimate of KL(π || π_ref) at each token: r - 1 - ln r >= 0, r = π_ref / π. [GRPO]"""
    return (reference - logp).exp() - 1 - (reference - logp)

def update_on_trees(model, optimizer, roots, config, reference=None):
    """`updates_per_step` optimizer steps on a list of trees; statistics, means over all tokens.

    Trees without advantage are skipped, in the mean too [O], unless a KL has a say.
    Micro-batches, and processes, add up to the gradient of the whole batch.
    """
    packs = []
    for root in roots:
        advantages = step_advantages(root, config)
        if any(advantages.values()) or config.kl > 0:
            packs.append(pack_tree(root, advantages))
    stats, norm = Counter(loss=0, tokens_trained=0, tokens_unique=0), 0.0
    for i in range(config.updates_per_step):
        part = packs[i::config.updates_per_step]
        tokens = sum(gather([sum(pack["weights"].sum().item() for pack in part)]))
        for rows in micro_batches([len(pack["input_ids"]) for pack in part], config.micro_tokens):
            micro = [part[row] for row in rows]
            logp, weights = tree_logps(model, micro)
            old = pad([pack["logps"] for pack in micro]).to(DEVICE)
            advantages = pad([pack["advantages"] for pack in micro]).to(DEVICE)
            loss, found = policy_loss(logp, old, advantages, weights, config)
            if config.kl > 0:
                with torch.no_grad():
                    reference_logp, _ = tree_logps(reference, micro)
                found["kl"] = (k3(logp, reference_logp) * weights).sum() / weights.sum()
                loss = loss + config.kl * found["kl"]
            share_of_tokens = weights.sum() / tokens
            (share_of_tokens * loss).backward()
            for name, value in {"loss": loss, **found}.items():
                stats[name] += (share_of_tokens * value).item() / config.updates_per_step
            stats["tokens_trained"] += weights.sum().item()
            stats["tokens_unique"] += (weights > 0).sum().item()
        if tokens > 0:
            norm = take_step(model, optimizer, config)
    total = pandas.DataFrame(gather([stats])).sum().to_dict()
    return {**total, "grad_norm": norm}

# ==== The training step

def training_step(model, tokenizer, optimizer, reference, problems, config, step):
    """One step of the method; returns its line of metrics.jsonl."""
    # 1. random numbers of the step's own, so that a resumed run has the very same ones
    rng = random.Random(f"{config.seed} {step}")
    torch.manual_seed(rng.getrandbits(62) + RANK)
    began = time.time()

    # 2. grow a tree for each prompt
    batch = rng.sample(problems, min(config.prompts_per_step, len(problems)))
    roots, trajectories = grow(model, tokenizer, share(batch), config, rng)

    # 3. advantages of their steps, and the policy gradient
    grown = time.time()
    stats = update_on_trees(model, optimizer, list(roots.values()), config, reference)

    # 4. log
    nodes = [node for root in roots.values() for node in root.walk() if node.children]
    scores = gather([ib_score(node, config.beta) for node in nodes])
    covs = gather([ib_covariance(node, config.beta) for node in nodes if len(node.children) > 1])
    metrics = {"ib_score": sum(scores) / len(scores), "cov": sum(covs) / max(1, len(covs)),
               "rollout_s": grown - began, "update_s": time.time() - grown}
    return rollout_metrics(trajectories) | stats | metrics


# ====
# What only IB-TPO needs

def prepare(model, config):
    """The reference policy of the KL, or nothing without one."""
    kinds = set(getattr(model.config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"} or getattr(model.config, "sliding_window", None):
        fail(f"packed trees need full attention; {type(model).__name__} has a window or {kinds}")
    if config.kl == 0:
        return torch.nn.ModuleList()
    return copy.deepcopy(model).requires_grad_(False)

def show(config):
    """Print the tree of a held-out problem; after a run, with --model RUN/model."""
    model, tokenizer = load_policy(config)
    heldout = encode(load_problems(config)[1], model, tokenizer, config)
    torch.manual_seed(config.seed)
    problem = heldout[config.seed % len(heldout)]
    roots, _ = grow(model, tokenizer, [problem], config, random.Random(config.seed))
    root = roots[0]
    A = step_advantages(root, config)
    print(f"{problem.question}  answer {problem.gold}; visits, p̂, and of a step π, A, of a node J")
    for node in root.walk():
        line = f"{node.visits:3} {node.value:.2f}"
        if node.parent:
            line += f" π {node.confidence:.2f} A {A[node]:+.2f}"
        if node.children:
            line += f" J {ib_score(node, config.beta):+.2f}"
        text = tokenizer.decode(node.tokens).replace("\n", "↵")
        print(f"{line:36}" + "  " * min(len(node.path()), 20) + text)
    return root


# ==== Supporting code, which any such script needs: the same words in both

RANK = int(os.environ.get("RANK", 0))  # torchrun sets both
WORLD = int(os.environ.get("WORLD_SIZE", 1))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LOGITS = 2 ** 25  # logits held at a time
HUB = {"gsm8k": ("openai/gsm8k", "main"), "math": ("DigitalLearningGmbH/MATH-lighteval",)}
autocast = functools.partial(torch.autocast, DEVICE, torch.bfloat16, enabled=DEVICE == "cuda")
pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)  # [T_i] -> [B, T]

def token_entropy(logits):
    """H_t = -Σ_v p_t(v) ln p_t(v), p_t the softmax of raw logits [..., V]; returns [...]."""
    logp = logits.log_softmax(-1).clamp(min=torch.finfo(logits.dtype).min)  # 0 ln 0 = 0
    return -(logp.exp() * logp).sum(-1)

def sample(model, tokenizer, begun, config, greedy=False, steer=None):
    """Go on from each trajectory of `begun`, a prompt or a prefix, at temperature 1; in order.

    steer(rows, column): a context manager for going on from those rows, behind that column.
    """
    def draw(_, logits):  # the next token is drawn and noted here; `generate` is left no choice
        logp = logits.log_softmax(-1)
        token = logp.argmax(-1, keepdim=True)
        if not greedy:
            token = torch.multinomial(logp.exp(), 1)
        noted.append(torch.cat([logp.gather(1, token), token_entropy(logits)[:, None]], 1))
        return torch.full_like(logits, -math.inf).scatter(1, token, 0.0)

    results = list(begun)
    room = [config.max_new_tokens - len(t.response) for t in begun]
    # rows that may go on for long share a call: it lasts as long as its longest
    longest = [len(t.prompt) + n for t, n in zip(begun, room)]
    for rows in micro_batches(longest, config.generate_tokens):
        ids = [begun[row].prompt + begun[row].response for row in rows]
        inputs = tokenizer.pad({"input_ids": ids}, return_tensors="pt").to(DEVICE)  # on the left
        width, noted = inputs["input_ids"].shape[1], []
        with autocast(), steer(rows, width - 1) if steer else contextlib.nullcontext():
            ids = model.generate(**inputs, max_new_tokens=max(room[row] for row in rows),
                                 logits_processor=[draw])
        for row, new, notes in zip(rows, ids[:, width:].tolist(), torch.stack(noted, 1).cpu()):
            t, eos = begun[row], model.generation_config.eos_token_id
            ends = [n for n, token in enumerate(new[:room[row]], 1) if token in eos]
            n = min(ends, default=room[row])
            response = t.response + new[:n]
            results[row] = replace(
                t, response=response, start=len(t.response), complete=bool(ends),
                text=tokenizer.decode(response, skip_special_tokens=True),
                logps=torch.cat([t.logps, notes[:n, 0]]),
                entropy=torch.cat([t.entropy, notes[:n, 1]]))
    return results

def score(model, states, targets):
    """ln π of tokens `targets` [N] at hidden states [N, H], and H_t there: [2, N]."""
    def part(states, targets):
        logits = model.get_output_embeddings()(states).float()
        logp = logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
        return torch.stack([logp, token_entropy(logits)])

    # logits are made in chunks, and again in the backward pass: all at once they are gigabytes
    size = max(1, LOGITS // model.get_output_embeddings().weight.shape[0])
    chunks = zip(states.split(size), targets.split(size))
    return torch.cat([checkpoint(part, *chunk, use_reentrant=False) for chunk in chunks], 1)

def micro_batches(lengths, tokens):
    """Lists of indices, like lengths together: `tokens` at most (items x longest), or one item."""
    batches = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches

def take_step(model, optimizer, config):
    """An optimizer step by the gradients of all processes; returns their norm before clipping."""
    for p in model.parameters():
        if WORLD > 1:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            torch.distributed.all_reduce(p.grad)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm).item()
    if not math.isfinite(norm):
        fail("the gradient is not finite, --resume will not help: begin anew with a lower --lr")
    optimizer.step()
    optimizer.zero_grad()
    return norm

def gather(items):
    """The items of all processes in one list."""
    lists = [items] * WORLD
    if WORLD > 1:
        torch.distributed.all_gather_object(lists, items)
    return sum(lists, [])

def share(problems):
    """What this process explores of a batch of problems, numbered by their place in it."""
    return [replace(t, group=i) for i, t in enumerate(problems)][RANK::WORLD]

def load_policy(config):
    """The policy in fp32, and its tokenizer, which pads on the left."""
    name = config.model
    if name == "tiny":
        name = warm_start(config)
        gather([])  # the other processes wait for the first
    elif name.startswith("Qwen") and not Path(name).exists():
        name = "Qwen/" + name.removeprefix("Qwen/")
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.float32, use_safetensors=True, trust_remote_code=False).to(DEVICE)
        # tokenizer.json as it is: AutoTokenizer may put the family's stock tokenizer in its place
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(name, padding_side="left")
    except Exception as e:  # whatever a hub, a network or a file raises
        fail(f"cannot load the model {name}: {e}")
    eos = model.generation_config.eos_token_id or tokenizer.eos_token_id
    if eos is None:
        fail(f"{name} has no end-of-sequence token: no response would ever end")
    eos = list(eos) if isinstance(eos, list) else [eos]  # many chat models have several
    if tokenizer.chat_template:  # what ends a turn ends a response, also of a base model
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
        rest = tokenizer.apply_chat_template(turns, tokenize=False).rpartition("!")[2]
        ids = tokenizer(rest, add_special_tokens=False).input_ids
        eos += [token for token in ids[:1] if token in tokenizer.added_tokens_decoder]
    # a model's own defaults (top-k 20, ...) would bend the distribution that ln π is taken of
    model.generation_config = transformers.GenerationConfig(eos_token_id=eos, pad_token_id=eos[0])
    tokenizer.pad_token_id = eos[0]
    with torch.no_grad():
        out = model(torch.tensor([eos], device=DEVICE), output_hidden_states=True)
    if not out.logits.allclose(model.get_output_embeddings()(out.hidden_states[-1]), atol=1e-3):
        fail(f"{name} scales or caps its logits, or has none that are finite: not supported")
    return model.eval(), tokenizer  # for good: dropout would bend the ratios

def load_problems(config):
    """(question, gold) pairs to train on, and held-out ones: of a file the last, at most half."""
    name, n = config.dataset, config.eval_prompts
    if name == "chain":
        train = chain_questions(random.Random(config.seed), config.operands, False, 4096)
        heldout = chain_questions(random.Random(-1), config.operands, True, n)
        return [(q, chain_value(q)) for q in train], [(q, chain_value(q)) for q in heldout]
    try:
        if name in HUB:
            tables = datasets.load_dataset(*HUB[name])
            tables["test"] = tables["test"].shuffle(seed=0)  # MATH's is sorted by subject
        else:
            kind = Path(name).suffix[1:].replace("jsonl", "json")
            rows = datasets.load_dataset(kind, data_files=name, split="train")
            tables = rows.train_test_split(min(n, len(rows) // 2), shuffle=False)
        train, heldout = read_rows(tables["train"], name), read_rows(tables["test"], name)[:n]
    except Exception as e:  # whatever a hub, a network or a parser raises
        fail(f"cannot load the dataset {name}: {e!r}")
    known = dict(heldout)
    train = [pair for pair in train if pair[0] not in known]
    if len(train) < WORLD:
        fail(f"{name} has {len(train)} problems that are not held out, for {WORLD} processes")
    return train, heldout

def read_rows(table, name):
    """(question, final answer) of each row of a `datasets` table."""
    pairs = []
    for row in table:
        question = row.get("problem", row.get("prompt", row.get("question")))
        answer = row.get("answer", row.get("solution"))
        gold = extract_answer(str(answer))
        if gold == "":
            continue  # two of MATH's solutions end in an empty box
        gold = gold or str(answer).strip()
        asked = type(question) is str and question and answer is not None
        if not asked or not 0 < len(gold) <= MAX_LENGTH:
            fail(f"{name} needs in each row a question (or problem, prompt) and an answer (or "
                 f"solution) of at most {MAX_LENGTH} characters, unlike {row}")
        pairs.append((question, gold))
    return pairs

def encode(pairs, model, tokenizer, config):
    """Problems with their prompts, in the tokenizer's chat template where it has one."""
    problems = []
    for question, gold in pairs:
        text = config.prompt.replace("{question}", question)
        if tokenizer.chat_template:
            chat = [{"role": "user", "content": text}]
            ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False,
                                                enable_thinking=False)  # Qwen3's thoughts are long
        else:
            ids = tokenizer(text).input_ids
        problems.append(Trajectory(ids, question, gold))
    longest = max(len(t.prompt) for t in problems) + config.max_new_tokens
    if longest > getattr(model.config, "max_position_embeddings", longest):
        fail(f"the longest prompt and max_new_tokens make {longest} tokens, too many for the model")
    return problems

# The tiny task: for "3+4*2=" a response does one operator a line, modulo 10, and ends with the
# answer: "3+8\n1\n#1". Demonstrations have each line right, but by habit do the leftmost operator:
# so the policy knows arithmetic, and seldom tries the order that precedence asks for.

def reduce_at(expression, i):
    """Do the operator at index i, modulo 10: ("3+4*2", 3) -> "3+8"."""
    a, b = int(expression[i - 1]), int(expression[i + 1])
    value = {"+": a + b, "-": a - b, "*": a * b}[expression[i]] % 10
    return f"{expression[:i - 1]}{value}{expression[i + 2:]}"

def chain_value(question):
    """The value by ordinary precedence, modulo 10: "3+4*2=" -> "1"."""
    expression = question.rstrip("=")
    while len(expression) > 1:
        expression = reduce_at(expression, max(1, expression.find("*")))
    return expression

def is_sound(text, gold):
    """Whether every line has the value `gold`: a wrong order may be right in the end, by luck."""
    lines = text.split("\n")[:-1]
    return all(re.fullmatch(r"[0-9]([-+*][0-9])*", x) and chain_value(x) == gold for x in lines)

def demonstration(question, rng, habit):
    """A response that reduces the leftmost operator, by habit, or any: "7*2\\n4\\n#4"."""
    expression, response = question.rstrip("="), ""
    while len(expression) > 1:
        at = 1
        if rng.random() >= habit:
            at = 2 * rng.randrange(len(expression) // 2) + 1
        expression = reduce_at(expression, at)
        response += expression + "\n"
    return response + "#" + expression

def chain_questions(rng, operands, heldout, n):
    """n different questions. One in sixteen, by its checksum, is held out."""
    found = {}
    for _ in range(32 * n + 10_000):
        question = str(rng.randrange(10))
        for _ in range(rng.randint(*operands) - 1):
            question += rng.choice("+-*") + str(rng.randrange(10))
        if (zlib.crc32(question.encode()) % 16 == 0) == heldout:
            found[question + "="] = True
        if len(found) == n:
            return list(found)
    fail(f"there are not {n} problems with --operands {operands}, only {len(found)}")

def tiny_tokenizer():
    """One token a character, as an ordinary fast tokenizer."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *"0123456789+-*=\n#"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", padding_side="left")

def warm_start(config):
    """The folder of a Qwen2 of 0.64 M parameters that has learnt demonstrations, made once."""
    low, high = config.operands
    folder = Path(f"runs/warm_start-habit-{config.habit}-{low}-{high}-{config.warm_steps}")
    if RANK > 0 or folder.exists():
        return folder
    torch.manual_seed(0)
    tokenizer, rng = tiny_tokenizer(), random.Random(0)
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=512,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=1, pad_token_id=0)).to(DEVICE)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim == 1 or "embed" in name]
    muon = torch.optim.Muon(matrices, weight_decay=0.0)  # takes half the steps of AdamW here
    adam = torch.optim.AdamW(others, weight_decay=0.0)
    for step in tqdm(range(config.warm_steps), "warm start", disable=None):
        digits = rng.randint(low, high)  # one length a batch: nothing to pad
        questions = chain_questions(rng, [digits, digits], False, 64)
        pairs = [(question, demonstration(question, rng, config.habit)) for question in questions]
        problems = encode(pairs, model, tokenizer, config)  # whose `gold` is a demonstration
        ids = torch.tensor([t.prompt + tokenizer(t.gold).input_ids + [1] for t in problems])
        labels = ids.clone()
        labels[:, :len(problems[0].prompt)] = -100
        model(ids.to(DEVICE), labels=labels.to(DEVICE)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        pace = min(1, (step + 1) / 50) * (1 - step / config.warm_steps)
        for optimizer, lr in (muon, 0.02), (adam, 0.003):
            optimizer.param_groups[0]["lr"] = lr * pace
            optimizer.step()
            optimizer.zero_grad()
    save_atomically(folder, model.save_pretrained, tokenizer.save_pretrained)
    return folder

def own_tokens(trajectories):
    """How many tokens they sampled themselves, those of their parents not counted."""
    return sum(len(t.response) - t.start for t in trajectories)

def group_advantages(rewards, groups, eps=1e-4):
    """(R - mean) / (std + eps) over the responses to the same prompt; all [B]. [GRPO]

    The standard deviation is the population's, so that a group of one has advantage 0 [O].
    """
    advantages = torch.zeros_like(rewards)
    for g in groups.unique():
        own = rewards[groups == g]
        advantages[groups == g] = (own - own.mean()) / (own.std(correction=0) + eps)
    return advantages

def judge(trajectories, config):
    """Reward each trajectory with 1 or 0, by its gold answer."""
    for t in trajectories:
        answer = extract_answer(t.text)
        if config.dataset == "chain":
            t.reward = float(answer == t.gold)  # a digit: an expression of its value is no answer
        else:
            t.reward = float(verify(answer, t.gold))

MAX_LENGTH = 300  # characters; a longer answer is wrong, which bounds every stage below [O]
REALS = mpmath.mp.clone()
REALS.dps = 300  # digits that are calculated; 200 of them are compared [O]

def find_answer(text):
    r"""Return a response's answer and where its marker begins: "so #### **5**" -> ("5", 3).

    That is the last "\boxed{5}", else "\boxed 5", "#### 5" or "#5", else (None, len(text)).
    """
    def last(pattern):
        return max(re.finditer(pattern, text), key=re.Match.start, default=None)
    box, depth = last(r"\\f?box(?:ed)?\s*\{"), 0
    for brace in re.compile("[{}]").finditer(text, box.end() - 1) if box else []:
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return text[box.end():brace.start()].strip(), box.start()
    found = last(r"\\boxed\s+([^\s$]*[^\s$.,])") or last(r"(?<!#)####[^\S\n]*([^\s#].*)")
    found = found or last(r"(?<!#)#([^\s#].*)")  # "# Check" and "### Check" are headings
    return (found[1].split(" #")[0].strip("* \t\r"), found.start()) if found else (None, len(text))

def extract_answer(text):
    r"""Return a response's answer, or None: "3+8\n1\n#1" -> "1"."""
    return find_answer(text)[0]

READ_AS = dict(pair.split("=>") for pair in r"""\left=> \right=> \displaystyle=> °=> \quad=>~
    \dfrac=>\frac \tfrac=>\frac \cfrac=>\frac sqrt=>\sqrt √=>\sqrt~ pi=>\pi π=>\pi~ ²=>^2 **=>^
    −=>- –=>- ‑=>- ×=>* ·=>* \times=>* \cdot=>* million=>*10^6 ±=>\pm~ \leq=>\le ≤=>\le~ <==>\le~
    \geq=>\ge ≥=>\ge~ >==>\ge~ \neq=>\ne \lt=>< \gt=>> ∞=>\infty~ infinity=>\infty &=>, ;=>, or=>,
    and=>, ∪=>, \cup=>, \varnothing=>\emptyset \\=>),( \%=>% percent=>% pct=>%""".split())
SPELLINGS = [  # patterns and what replaces them, in this order
    (r"\\(?:text|math|mbox|bold)\w*\s*\{([^{}]*)\}", r" \1 "),  # 5\text{ cm} -> 5 cm
    (r"(?<=\d) ?(?:,\\!|\\,|\{ ?, ?\}) ?(?=\d{3})", ""),  # 1{,}000 -> 1000
    (r"\\?[A-Za-z]+|\*\*|[<>]=|\\[%\\]|[^\w .]|[²π]", lambda sign: READ_AS.get(sign[0], sign[0])),
    (r"\\(begin|end)\{\w*matrix\}", lambda end: "((" if end[1] == "begin" else "))"),
    (r"(?:\\[,;:! ()\[\]]|(?<!\\)\$|~|\s)+", " "),  # $x\ y$ -> x y
    (r"^ ?(-?)\\\$(.*?)(?: dollars)?[ .]*$", r"\1\2 dollars"),  # \$5 -> 5 dollars
    (r"(?<![^,])([^,]*)\\pm([^,]*)", r"\1+\2,\1-\2"),  # 1\pm2 -> 1+2,1-2
    (r"(?<![^(\[,=]) *\+|\\[${}]|\^ ?\{?\\circ\}?|[. ]+$|^ +|, *(?=,)", ""),  # \{90^\circ\}. -> 90
    (r"(?<![\w.)}!])(1?\d)!", lambda n: str(math.factorial(int(n[1])))),  # 3! -> 6
    (r"(?:^|= ?)-?\d{1,3}([ ,])\d{3}(?:\1\d{3})*(?![\d,/])", lambda n: re.sub("[ ,]", "", n[0])),
    (r"(?<![\w.^/)}])(\d+)( ?\\frac ?\{?\d+\}? ?\{?\d+\}?| \d+/\d+)", r"(\1+\2)")]  # 2 1/2 is 2+1/2
WORD = (r"(?:(?!(?:two|three|four|five|six|seven|eight|nine|ten|dozen|hundred|thousand|\w*illion|"
        r"hal[fv]|third|quarter|time|squared|cubed|plus|minus|more|less|not|wrong)e?s?\b)"
        r"[A-Za-z]{3,}|[ckm]?m|k?g|[Lsh]|of|sq|ft|in|lb|oz)")  # a word of a unit, but of no number
NAME = r"\|?\\?[A-Za-z]+(?:_\w|_\{[^{}]*\})?(?:\([A-Za-z]\))?\|?|\([A-Za-z, ]+\)"
ITEM = re.compile(rf"(?:({NAME}) ?(?:=|\\in\b)(?=[^=]*$) *)?(.*?)(?:(?:(?<=[\d)}}])|(?<=pi)) ?(%|"
                  rf"(?:(?<= )|(?=[ckm]m\b|kg)){WORD}(?:[ /]{WORD})*(?: ?\^ ?\{{?[23]\}}?)?) *)?")
TOKEN = re.compile(r"(?a)(?<=frac)\d|(?<=frac )\d|(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d\d?)?|"
                   r"\\sqrt\[\d+\]|(?<![A-Za-z\\])(?!no|on|ln)[a-z](?=[a-z]\b)|\\?[A-Za-z]+|\S")
PRODUCT = r"(?<=[\w)}])(?<!sqrt|frac)(?<!frac \w) (?=[A-Za-z]|\((?! [\d.]+ \))|\\(?:pi|sqrt|frac))"
OPERATORS = {  # how tightly each binds, and how tightly what stands on its right must bind
    "+": (1, 2, operator.add), "-": (1, 2, operator.sub), "*": (2, 3, operator.mul),
    "/": (2, 3, operator.truediv),  # below mpf() refuses letters, as their roots have two signs
    "^": (4, 4, lambda x, n: (x if REALS.isint(n) else REALS.mpf(x)) ** n)}

def operand(tokens):
    """Take a number, letter, bracket, fraction or root off `tokens`: ["2", "+", "3"] -> 2."""
    token = tokens.pop(0)
    if token == "-":
        return -expression(tokens, 3)
    if token in ("(", "{"):
        value = expression(tokens)
        if tokens.pop(0) in (")", "}"):
            return value
    if token == r"\frac":
        return operand(tokens) / operand(tokens)
    if token.startswith(r"\sqrt"):
        return REALS.mpf(operand(tokens)) ** (1 / REALS.mpf(token[6:-1] or 2))
    if token == r"\pi":
        return +REALS.pi
    if re.fullmatch("[A-Za-z]", token):  # a fixed complex value, so that polynomials compare
        return REALS.mpc(*map(random.Random(token).uniform, (0.7, 0.7), (1.4, 1.4)))
    return REALS.mpf(re.match("[.0-9].*|", token)[0])  # ValueError where it is no number

def expression(tokens, least=1):
    """Take off `tokens` what binds at `least` so tightly: of 2*3+1 all at 1, but 2*3 at 2."""
    value = operand(tokens)
    while OPERATORS.get(tokens[0], [0])[0] >= least:
        _, right, operate = OPERATORS[tokens.pop(0)]
        value = operate(value, expression(tokens, right))
    largest = 200 if least == 4 else 1e80  # exponents are small, so that 200 digits are right
    if value and not 1 / largest <= abs(value) <= largest:
        raise ValueError("too large or too near to zero")
    return value

def split_list(text):
    """Split at commas outside of brackets: "1,(2,3)" -> ["1", "(2,3)"]."""
    marked, depth = "", 0
    for sign in text:
        depth += (sign in "([{") - (sign in ")]}")
        marked += "\n" if sign == "," and depth == 0 else sign
    return [part.strip() for part in marked.split("\n")]

@functools.lru_cache(maxsize=8192)
def value_of(text):
    r"""Return a canonical text: "(1,\frac12)" -> "(1.0,0.5)", "No answer" -> "no answer"."""
    parts = split_list(text[1:-1])
    if len(parts) > 1 and text[0] in "([" and text[-1] in ")]":
        return text[0] + ",".join(map(value_of, parts)) + text[-1]
    words = " ".join(TOKEN.findall(text))
    tokens = re.sub(PRODUCT, " * ", words).split() + [""]
    with contextlib.suppress(ValueError, TypeError, ArithmeticError, IndexError, RecursionError):
        value = expression(tokens)
        if tokens == [""]:
            return REALS.nstr(REALS.chop(value), 200)
    words = re.sub(r"\{ (\S+) \}", r"\1", words)
    return words.lower() if re.fullmatch("[A-Za-z]{2,}|[A-Za-z]+( [A-Za-z]+)+", words) else words

def read(text, hundredths):
    r"""Return values, names and units: "x=5 cm" -> (["5.0"], [("x", "5.0")], ["cm"])."""
    for pattern, replacement in SPELLINGS:
        text = re.sub(pattern, replacement, text)
    values, names, units = [], [], set()
    for part in split_list(text):
        name, value, unit = ITEM.fullmatch(part).groups()
        values.append(value_of(f"({value})/100" if unit == "%" and hundredths else value))
        names.append(name and (name, values[-1]))
        units.add(unit and re.sub(r"[ {}]|s$", "", unit))
    return sorted(values), sorted(filter(None, names)), sorted(filter(None, units))

def verify(answer, gold):
    """Return whether two answers are equal: "5 cm" is "5" but not "5 kg", "50%" is 50 and 0.5."""
    if answer is None or max(len(answer), len(gold)) > MAX_LENGTH:
        return False
    for hundredths in (False, True):
        (values, *labels), (golds, *others) = read(answer, hundredths), read(gold, hundredths)
        clash = any(a and b and a != b for a, b in zip(labels, others))
        if values == golds and not clash and re.search(r"\w", str(values)):
            return True
    return False

def pass_at_k(n, c, k):
    """Unbiased pass@k of n samples, c of them right: 1 - C(n-c, k) / C(n, k). [arXiv 2107.03374]"""
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)

def distinct_n(texts, n):
    """Distinct-n: different n-grams of words over all n-grams of the texts; 0 if there are none."""
    grams = []
    for text in texts:
        words = text.split()
        grams += [tuple(words[i:i + n]) for i in range(len(words) - n + 1)]
    return len(set(grams)) / max(1, len(grams))

def evaluate(model, tokenizer, problems, config, file=None):
    """Means over problems: greedy accuracy; of k = eval_samples responses pass@1, pass@k, maj@k (by
    the answers' texts), Distinct-1 and -4, different right ones, length; the chain's sound ones.
    """
    torch.manual_seed(config.seed + RANK)
    k = config.eval_samples
    greedy = gather(sample(model, tokenizer, share(problems), config, greedy=True))
    sampled = gather(sample(model, tokenizer, share(problems) * k, config))
    judge(greedy + sampled, config)
    sampled.sort(key=lambda t: t.group)
    sums = Counter(greedy=sum(t.reward for t in greedy))
    for i in range(0, len(sampled), k):
        batch = sampled[i:i + k]
        texts = [t.text for t in batch]
        right = [t.text for t in batch if t.reward]
        votes = Counter(filter(None, map(extract_answer, texts)))
        sums["pass@1"] += len(right) / k
        sums["pass@k"] += pass_at_k(k, len(right), k)
        sums["maj@k"] += max(votes, key=votes.get, default=None) in map(extract_answer, right)
        sums["distinct_1"] += distinct_n(texts, 1)
        sums["distinct_4"] += distinct_n(texts, 4)
        sums["distinct_correct"] += len(set(right))
        sums["length"] += own_tokens(batch) / k
        if config.dataset == "chain":
            sound = [text for text in right if is_sound(text, batch[0].gold)]
            sums["sound@1"] += len(sound) / k
            sums["sound@k"] += pass_at_k(k, len(sound), k)
            sums["distinct_sound"] += len(set(sound))
    if file:
        save_lines(file, [{"question": t.question, "answer": t.gold, "response": t.text,
                           "reward": t.reward} for t in sampled])
    return {name: value / len(problems) for name, value in sums.items()}

def rollout_metrics(trajectories):
    """What is logged of a step: shares of problems, means over responses or tokens, counts."""
    trajectories = gather(trajectories)
    tokens, count = own_tokens(trajectories), len(trajectories)
    groups = {t.group for t in trajectories}
    found = {(t.group, t.reward) for t in trajectories}  # a problem of both is there twice
    right = {(t.group, t.text) for t in trajectories if t.reward}
    entropy = sum(t.entropy[t.start:].sum().item() for t in trajectories)
    return {"reward": sum(t.reward for t in trajectories) / count, "entropy": entropy / tokens,
            "eff_rate": len(found) / len(groups) - 1, "distinct_correct": len(right) / len(groups),
            "pass@k": len({group for group, _ in right}) / len(groups),
            "tokens_sampled": tokens, "trajectories": count}

def fail(message):
    """End the program with one clear line and exit code 2: for mistakes that a user can mend."""
    print("error:", " ".join(message.split())[:500], file=sys.stderr)
    raise SystemExit(2)

def parse_config(script, argv):
    """A Config from flags, over a YAML file (sections `common` and `script`), over the defaults."""
    parser = HfArgumentParser(Config, allow_abbrev=False, description=__doc__.splitlines()[0])
    parser.add_argument("--config", help="YAML file (tiny_config.yaml without --model); flags win")
    parser.error = fail
    given, _ = parser.parse_known_args(argv)
    if given.config or given.model == "tiny":
        file = Path(given.config or Path(__file__).with_name("tiny_config.yaml"))
        try:
            content = yaml.safe_load(file.read_text(encoding="utf-8"))
            settings = content["common"] | content[script]
        except Exception as e:
            fail(f"cannot read {file}, of sections common and {script}: {e!r}")
        for name, value in settings.items():  # as flags, so that one parser reads both
            values = value if isinstance(value, list) else [value]
            argv = [f"--{name}", *map(str, values)] + argv
    config = parser.parse_args(argv, Config())
    for name, value in asdict(config).items():
        for x in value if isinstance(value, list) else [value]:
            low = 1 if type(x) is int and name not in Config.MAY_BE_0 else 0
            high = 1 if name in Config.SHARES else 10 ** 12
            if type(x) in (int, float) and not low <= x <= high:  # nan is not, either
                fail(f"{name} must be from {low} to {high}, not {x}")
    if "{question}" not in config.prompt:
        fail("prompt must contain {question}")
    if len(config.operands) != 2 or config.operands[0] > config.operands[1]:
        fail("operands must be the fewest and the most digits")
    if config.model == "tiny" and config.dataset != "chain":
        fail(f"the tiny policy knows only digits: --dataset {config.dataset} needs a --model")
    if config.prompts_per_step < WORLD:
        fail(f"prompts_per_step must not be below the number of processes, {WORLD}")
    config.check()
    return config

def save_atomically(path, *writers):
    """Write beside `path`, then rename: nobody ever meets half a file or folder."""
    if RANK > 0:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(suffix=".tmp", dir=path.parent) as temporary:
            new = Path(temporary, path.name)
            for write in writers:
                write(new)
            if path.is_dir():
                path.replace(Path(temporary, "old"))  # it goes when `temporary` does
            new.replace(path)
    except Exception as e:  # whatever a disk or a library raises
        fail(f"cannot write {path}: {e}")

def save_lines(path, rows):
    """Write a JSON line a row."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    save_atomically(path, lambda new: new.write_text(text))

def load_state(folder, config, parts):
    """What state.pt holds besides the `parts` (name: module or optimizer), which are restored."""
    may_differ = ("resume", "out", "max_steps", "max_tokens", "save_every", "eval_every",
                  "micro_tokens", "generate_tokens")
    state = torch.load(folder / "state.pt", map_location=DEVICE, weights_only=True)
    for name, value in asdict(config).items():
        if name not in may_differ and state["config"].get(name) != value:
            fail(f"{folder} was made with {name} {state['config'].get(name)!r}, not {value!r}")
    for name, part in parts.items():
        part.load_state_dict(state.pop(name))
    return state

def run_folder(config):
    """The folder of the run: a new one, or with --resume the one that is there."""
    folder = Path(config.out or f"runs/{config.method}-{config.seed}")
    if config.resume and not folder.exists():
        fail(f"there is no run in {folder} to resume")
    if folder.exists() and not config.resume:
        fail(f"{folder} exists: choose another --out, or go on with --resume")
    save_atomically(folder.parent / ".writable", Path.touch)  # fails now, if it must
    (folder.parent / ".writable").unlink(missing_ok=True)
    return folder

def save_state(folder, state, parts):
    """Write state.pt, all that --resume needs."""
    tensors = {name: part.state_dict() for name, part in parts.items()}
    save_atomically(folder / "state.pt", lambda new: torch.save(state | tensors, new))

def train(config):
    """Evaluate, train, evaluate again; returns the summary."""
    began = time.time()
    folder = run_folder(config)
    pairs = load_problems(config)
    model, tokenizer = load_policy(config)
    problems, heldout = [encode(side, model, tokenizer, config) for side in pairs]
    extra = prepare(model, config)  # latents or a reference
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0.0)
    parts = {"model": model, "optimizer": optimizer, "extra": extra}
    if (folder / "state.pt").exists():
        state = load_state(folder, config, parts)
    else:
        before = evaluate(model, tokenizer, heldout, config)
        state = {"config": asdict(config), "log": [], "before": before}
    log = state["log"]  # one list: what is appended is saved
    tokens = sum(line["tokens_sampled"] for line in log)
    while len(log) < config.max_steps and tokens < (config.max_tokens or math.inf):
        step = len(log)
        if step % config.save_every == 0:
            save_state(folder, state, parts)
        optimizer.param_groups[0]["lr"] = config.lr * min(1.0, (step + 1) / 20)  # warm-up
        metrics = training_step(model, tokenizer, optimizer, extra, problems, config, step)
        if config.eval_every and (step + 1) % config.eval_every == 0:
            found = evaluate(model, tokenizer, heldout, config)
            metrics |= {f"eval_{name}": value for name, value in found.items()}
        log.append({"step": step, **metrics})
        save_lines(folder / "metrics.jsonl", log)
        tokens += metrics["tokens_sampled"]
        shown = [f"{name} {metrics[name]:.2f}" for name in ("reward", "eff_rate", "entropy")]
        print(f"step {step + 1}, {tokens:,} tokens:", *shown, flush=True)
    save_state(folder, state, parts)

    after = evaluate(model, tokenizer, heldout, config, folder / "samples.jsonl")
    summary = {"before": state["before"], "after": after, "config": asdict(config),
               "seconds": time.time() - began}
    save_lines(folder / "summary.json", [summary])
    save_atomically(folder / "model", model.save_pretrained, tokenizer.save_pretrained)
    print_table(folder, summary)
    return summary

def print_table(folder, summary):
    """Before and after training, and what GRPO got with this seed where such a run is at hand."""
    config = summary["config"]
    table = pandas.DataFrame({"before": summary["before"], "after": summary["after"]})
    grpo = folder.with_name(f"grpo-{config['seed']}") / "summary.json"
    if grpo.exists() and grpo.parent != folder:
        other = json.loads(grpo.read_text())
        alike = ("model", "dataset", "operands", "habit", "warm_steps", "max_steps", "max_tokens",
                 "eval_prompts", "eval_samples")
        if all(other["config"][name] == config[name] for name in alike):
            table["GRPO's"] = pandas.Series(other["after"])
    elif config["method"] != "grpo":
        print(f"\nto compare: this with --method grpo --out {grpo.parent}, then this with --resume")
    print(f"\n{table.round(3)}\n{summary['seconds']:.0f} s; everything is in {folder}")

def main(argv=None):
    """The command line; returns the run's summary."""
    config = parse_config(Path(__file__).stem, sys.argv[1:] if argv is None else argv)
    if WORLD > 1 and not torch.distributed.is_initialized():
        if DEVICE == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group()
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")
    if config.show:
        return show(config)
    return train(config)

if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal may know no Greek
    try:
        main()
        sys.stdout.flush()
        if WORLD > 1:
            torch.distributed.destroy_process_group()
    except KeyboardInterrupt:
        sys.exit("interrupted: --resume goes on from the last checkpoint")
    except BrokenPipeError:  # as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
