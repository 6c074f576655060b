# /// script
# requires-python = ">=3.10"
# dependencies = ["torch==2.13.0", "transformers==5.24.0", "datasets", "sympy", "tqdm"]
# ///
"""IB-TPO: Information Bottleneck Driven Tree-based Policy Optimization (arXiv 2605.28109).

    python ib_tpo.py                                        # a tiny policy, on a laptop
    python ib_tpo.py --sampler entropy --out runs/entropy   # the same, branching elsewhere
    python ib_tpo.py --model Qwen2.5-0.5B                   # a real model, on one GPU

Every field of `Config` is a flag. A `training_step` does this:
1. Sample a few rollouts per prompt, and split them into reasoning steps: `sample`, `split_steps`.
2. Insert them into a tree, which counts how often each step led to a right answer: `insert`.
3. Round by round, sample on from the nodes of highest IB-Score: `grow`, `select_nodes`, `ib_score`.
4. Give each step its advantage, from that tree: `step_advantages`.
5. Take a clipped policy-gradient step on the packed trees: `pack_tree`, `update_on_trees`.

The sections, in order:
    Config. Trajectory. The tree. The IB-Score. Advantages. The update. The training step. The run
    The reference policy; log-probabilities of packed trees; the self-check; --show
    Supporting code, repeated word for word in iiblpo.py: sampling, the policy, problems, the tiny
    task, the verifier, evaluation, files
Read as far as "The run", and look up the rest, such as `sample` or DEVICE, when needed.

Left out: vLLM, sharded models, rewards other than right or wrong. The paper samples at temperature
0.7, top-p 0.95, top-k 20, up to 2k tokens, and trains on DAPO-Math-17K. Here it is temperature 1
without truncation, so that ln π is the policy's own. Defaults: 1,024 tokens, and GSM8K. [O]

Marks: [P] the paper's abstract and figures, and others' detailed notes on its text, because we
could not read that; [O] our own choice. Other marks name their source.
Shapes: B rows, T tokens of a response or of a step, S tokens of a packed tree, V vocabulary,
H width. In the section on trees, B₀, L, K, B are the numbers of `Config.tree`. Log-probabilities
and the entropy H_t are in nats.
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
import types
import zlib
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Literal

import datasets
import huggingface_hub  # installed with transformers
import mpmath  # installed with sympy
import pandas  # installed with datasets
import torch
import transformers
import yaml  # installed with transformers
from tokenizers import Tokenizer, decoders, models
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers.hf_argparser import HfArg, HfArgumentParser
from transformers.masking_utils import sdpa_mask
from transformers.modeling_layers import GradientCheckpointingLayer

torch.backends.cuda.enable_cudnn_sdp(False)  # NaN gradients under masks [pytorch#196678]
os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"  # do not ask the hub to convert weights
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
datasets.disable_progress_bars()
huggingface_hub.utils.enable_progress_bars()  # for downloads, the one library step that takes long


def setting(default, help, allowed=None):
    """Return a field of `Config`.

    `allowed`, such as "0..1" or "1..", is the range of its numbers: --help prints it after the
    flag, and `parse_config` checks it.
    """
    metadata = {"metavar": allowed} if allowed else None
    if isinstance(default, list):
        return HfArg(default_factory=default.copy, help=help, metadata=metadata)
    return HfArg(default=default, help=help, metadata=metadata)


@dataclass
class Config:
    """All settings. Each is a command-line flag, and can be set in a YAML file, too.

    The defaults are for a real model. For the tiny one, tiny_config.yaml replaces them.
    """
    # The run
    model: str = setting("tiny", "a name of the hub such as Qwen2.5-0.5B, a folder, or tiny")
    method: Literal["ib_tpo", "grpo"] = setting(
        "ib_tpo", "the method, or the baseline: independent rollouts, GRPO's advantage")
    max_steps: int = setting(200, "largest number of training steps", "1..")
    max_tokens: int = setting(0, "sampled tokens after which the run stops (0: no limit)", "0..")
    seed: int = setting(0, "seed of problems and sampling", "0..")
    out: str = setting("", "folder of the run (by default runs/METHOD-MODEL-SEED)")
    resume: bool = setting(False, "go on from the run's last checkpoint")
    save_every: int = setting(10, "steps between checkpoints", "1..")
    show: bool = setting(False, "print the tree of one problem, and do not train")
    # Problems
    dataset: str = setting("gsm8k", "chain (the tiny task), gsm8k, math, dapo, owner/name or "
                           "owner/name:config of the hub, or a .jsonl, .json or .parquet file")
    eval_dataset: str = setting("", "another data set to evaluate on: math500, aime24, aime25, "
                                "olympiadbench, or as above")
    prompt: str = setting("{question}\nReason step by step and put your final answer within "
                          "\\boxed{}.", "what the policy is asked, with {question} in it")
    operands: list[int] = setting([4, 7], "chain: fewest and most digits of a problem", "2..")
    habit: float = setting(0.75, "chain: chance that a demonstrated line reduces the leftmost "
                           "operator by habit", "0..1")
    warm_steps: int = setting(1000, "tiny: supervised steps before reinforcement learning", "1..")
    # The tree
    prompts_per_step: int = setting(16, "prompts per step, with a tree each", "1..")
    tree: list[int] = setting([4, 9, 1, 1], "B0 L K B: B0 rollouts, then L - 1 rounds of B "
                              "continuations of each of the K best nodes", "1..")
    sampler: Literal["ib", "random", "fixed", "entropy", "independent"] = setting(
        "ib", "where to branch. ib: highest IB-Score; random: anywhere; fixed: the shallowest "
        "nodes; entropy: where a child's token has the highest H_t; independent: nowhere")
    rollouts: int = setting(0, "responses per prompt of the independent sampler (0: as many as a "
                            "tree has)", "0..")
    max_new_tokens: int = setting(1024, "tokens of the longest response", "1..")
    generate_tokens: int = setting(131072, "largest generate call, in tokens: rows x (prompt + "
                                   "tokens still to sample)", "1..")
    delimiter: str = setting("\n\n", "what a reasoning step ends with")
    beta: float = setting(5.0, "beta: weight of what a step says about the answer", "0.001..")
    # Update
    advantage: Literal["gl+ib", "gl", "ib", "grpo", "treerl"] = setting(
        "gl+ib", "gl+ib: A_GL + lam A_IB; gl, ib: one of the two; grpo, treerl: those of baselines")
    lam: float = setting(0.1, "lambda: weight of A_IB", "0..")
    lr: float = setting(1e-6, "highest learning rate of AdamW; it falls to 0", "0..")
    updates_per_step: int = setting(1, "minibatches per batch, one optimizer step each; with 1, "
                                    "all ratios are 1", "1..")
    clip_low: float = setting(0.2, "lower clip: the ratio is clipped at 1 - clip_low", "0..1")
    clip_high: float = setting(0.2, "upper clip: at 1 + clip_high", "0..2")
    kl: float = setting(0.001, "weight of the KL to the frozen starting policy", "0..")
    max_grad_norm: float = setting(1.0, "norm to which the gradient is clipped", "0.001..")
    micro_tokens: int = setting(4096, "largest training pass, in tokens; a larger tree is a pass "
                                "of its own", "1..")
    recompute: bool = setting(True, "run layers again in the backward pass, to save memory")
    # Evaluation
    eval_prompts: int = setting(256, "held-out problems", "1..")
    eval_samples: int = setting(16, "responses per held-out problem", "1..")
    eval_every: int = setting(0, "steps between evaluations (0: only before and after)", "0..")

    def check(self):
        """Set what the method implies; end the program where settings contradict each other."""
        if self.method == "grpo":
            self.sampler, self.advantage = "independent", "grpo"
        if len(self.tree) != 4:
            fail("tree must be four numbers, B0 L K B")
        self.delimiter = self.delimiter.replace(r"\n", "\n")  # as one types it in a shell
        if not self.delimiter:
            fail("delimiter must not be empty")
        if "{question}" not in self.prompt:
            fail("prompt must contain {question}")
        if len(self.operands) != 2 or self.operands[0] > self.operands[1]:
            fail("operands must be the fewest and the most digits")
        if self.dataset == "chain" and self.eval_dataset:
            fail("the chain task has held-out problems of its own: leave out --eval_dataset")
        if self.model == "tiny" and self.dataset != "chain":
            fail(f"the tiny policy knows only digits: --dataset {self.dataset} needs a --model")
        if self.prompts_per_step < WORLD:
            fail(f"prompts_per_step must not be below the number of processes, {WORLD}")


@dataclass(eq=False)  # compared and hashed by identity, not by content
class Trajectory:
    """A problem and a response to it, which is empty until something is sampled."""
    prompt: list[int]
    question: str = ""
    gold: str = ""  # its right answer
    group: int = 0  # the number of its problem in the batch, set by `shard`
    response: list[int] = field(default_factory=list)  # T tokens; the last is EOS unless cut off
    logps: torch.Tensor = torch.zeros(0)  # [T] ln π_old of each token o_t, recorded in sampling
    entropy: torch.Tensor = torch.zeros(0)  # [T] H_t, of the distribution that o_t was drawn from
    start: int = 0  # response[:start] was given to it, and response[start:] it sampled itself
    text: str = ""
    complete: bool = True  # it ended by itself
    reward: float = 0.0

    def __len__(self):
        return len(self.prompt) + len(self.response)


# ==== IBTree: a tree of reasoning steps
# A node is a step. Trajectories that begin with the same steps share nodes.
#   p̂(a*|s) = mean reward of the trajectories through step s; a* is the right answer         [P]
#   B₀ rollouts, then L - 1 rounds: B continuations of each of the K nodes of highest IB-Score  [P]
#   G = B₀ + (L - 1) K B trajectories; siblings of the same tokens are one node              [O]

@dataclass(eq=False)  # compared and hashed by identity, so that it can be a key of a dict
class Node:
    """A step s, whose ancestors are the steps before it. The root's tokens are the prompt q."""
    tokens: list[int]
    logps: torch.Tensor = torch.zeros(0)  # [T] ln π_old of the step's tokens
    entropy: torch.Tensor = torch.zeros(0)  # [T]
    parent: "Node" = None
    children: list["Node"] = field(default_factory=list)
    visits: int = 0  # trajectories through this step
    drawn: int = 0  # of these, those that sampled it; the others had it in their prefix
    total_reward: float = 0.0  # summed over the visits, each 0 or 1
    end: int = 0  # number of response tokens up to the end of this step
    branched: int = 0  # how often it was branched from

    @property
    def value(self):
        """Return p̂(a*|s), the mean reward of the trajectories through s. [P]"""
        return self.total_reward / max(1, self.visits)  # p̂

    @property
    def confidence(self):
        """Return η₂ of the IB-Score: the geometric mean of the step's token probabilities. [O]

        The paper has their product, near 0 for long steps, and in A_IB takes π_ref's probabilities.
        """
        return self.logps.mean().exp().item()  # η₂

    def path(self):
        """Return the steps from the first to this one, without the root."""
        nodes, node = [], self
        while node.parent:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]

    def walk(self):
        """Return this node and its descendants in depth-first order."""
        nodes, waiting = [], [self]
        while waiting:
            nodes.append(waiting.pop())
            waiting += reversed(nodes[-1].children)
        return nodes

def split_steps(token_ids, tokenizer, delimiter):
    """Return the steps s_1 ... s_n of a response, lists of tokens.

    A step ends with the token that completes a delimiter, in the paper "\\n\\n". [P] What follows
    the last delimiter is the last step. More blank lines begin the next step. [O]
    In the tiny task, where the delimiter is "\\n", "3+8\\n1\\n#1" -> "3+8\\n", "1\\n", "#1".
    """
    texts = {token: tokenizer.decode(token, skip_special_tokens=True) for token in set(token_ids)}
    steps, text = [[]], ""
    for token in token_ids:
        steps[-1].append(token)
        text = (text + texts[token]).lstrip()  # leading blank lines end no step
        if delimiter in text:
            steps.append([])
            text = ""
    return [step for step in steps if step]  # a final delimiter leaves an empty one

def insert(root, steps, step_logps, reward, step_entropy=None, start=0):
    """Add a trajectory to its tree; return its leaf.

    steps: lists of tokens; step_logps, step_entropy: a tensor [T] per step; reward: 0 or 1. Steps
    that begin before token `start` of the response were in the trajectory's prefix.
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
        if parent.end >= start:  # the step was sampled by this trajectory
            child.drawn += 1
        path.append(child)
    for node in path:
        node.visits += 1
        node.total_reward += reward
    return path[-1]

def prefix_at(node, problem):
    """Return a trajectory whose response is the steps down to a node, to be continued."""
    path = node.path()
    # cat([]) fails, and the root's path is [], so the problem's own empty tensors come first
    return replace(problem, response=[token for step in path for token in step.tokens],
                   logps=torch.cat([problem.logps, *[step.logps for step in path]]),
                   entropy=torch.cat([problem.entropy, *[step.entropy for step in path]]))

def extend_trees(model, tokenizer, roots, prefixes, config):
    """Sample continuations of the prefixes, insert them into their trees, and return them."""
    new = sample(model, tokenizer, prefixes, config)
    assign_rewards(new, config)
    for t in new:
        steps = split_steps(t.response, tokenizer, config.delimiter)
        lengths = [len(step) for step in steps]
        logps, entropy = t.logps.split(lengths), t.entropy.split(lengths)
        insert(roots[t.group], steps, logps, t.reward, entropy, t.start)
    return new

def grow(model, tokenizer, problems, config, rng):
    """Grow an IBTree per problem; return ({group: root}, all trajectories that were sampled). [P]

    Each round is one `sample` call for all trees. No KV cache is kept from round to round. [O]
    """
    B0, L, K, B = config.tree
    if config.sampler == "independent":  # by default as many rollouts as a tree has
        B0 = config.rollouts or B0 + (L - 1) * K * B
        L = 1
    roots = {t.group: Node(t.prompt, branched=1) for t in problems}  # by the B₀ rollouts
    trajectories = extend_trees(model, tokenizer, roots, problems * B0, config)
    for _ in range(L - 1):
        prefixes = []
        for t in problems:
            for node in select_nodes(roots[t.group], K, config.sampler, config, rng):
                node.branched += 1
                prefixes += [prefix_at(node, t)] * B
        trajectories += extend_trees(model, tokenizer, roots, prefixes, config)
    return roots, trajectories

# ==== IB-Score: where to branch
# s is a child of node v. s_b, b = 1 ... n, is the child that the b-th trajectory sampled at v, so a
# child may occur several times. Trajectories that had the child in their prefix do not count.
#   information gain  η₁(s) = p̂(a*|s) / p̂(a*|v) - (1 + 1/β)                            [P]
#   confidence        η₂(s) = π(s), short for π(s|v); see `Node.confidence`            [P]
#   (1) J_IB(v) = (1+β) H(s|v) - β H(s|a*,v), with Tsallis-2 (Gini) entropies H        [P]
#               = H(s|v) + β (H(s|v) - H(s|a*,v)): diversity, and β times what s tells of a*
#   (2) J_IB(v) ≈ (1+β)/n Σ_b η₁(s_b) η₂(s_b)                                          [P]
# From (1) with the Gini entropy H(s|a*,v) = 1 - Σ_s π(s|a*,v)², (2) does not follow. With the
# cross term H× in its place, J_IB ≈ 1 + β/n Σ_b η₁(s_b) η₂(s_b), which ranks nodes as (2) does: [O]
#   H(s|v)     = 1 - Σ_s π(s)²,                     the mean of 1 - π(s) over s ~ π(s|v)
#   H×(s|a*,v) = 1 - Σ_s π(s|a*,v) π(s)
#              = 1 - Σ_s π(s)² p(a*|s) / p(a*|v),   by Bayes
#   J_IB(v)    = 1 - Σ_s π² (1 + β - β p(a*|s) / p(a*|v)) = 1 + β Σ_s π η₁ η₂ ≈ 1 + β/n Σ_b η₁ η₂
# In the code π(s) is a geometric mean, so this only motivates (2).
# How to read the score: as long as no node below v was branched from, p̂(a*|v) is the mean of
# p̂(a*|s_b). Then the mean η₁ is -1/β, and J_IB(v) = (1+β) (Cov(η₁, η₂) - mean η₂ / β). So it is
# high where the confident children are better than the others. It is also high where confidence is
# low, and the more so the smaller β is. With one child, or if all or none are right, Cov is 0.

def information_gain(node, beta):
    """Return η₁(s). If no trajectory through the parent was right, the ratio counts as 1. [O]"""
    ratio = node.value / node.parent.value if node.parent.value > 0 else 1.0
    return ratio - (1 + 1 / beta)  # η₁

def etas(node, beta):
    """Return η₁(s_b) and η₂(s_b), two lists [n] with `drawn` entries per child."""
    children = [s for s in node.children for _ in range(s.drawn)]  # s_1 ... s_n
    return [information_gain(s, beta) for s in children], [s.confidence for s in children]

def ib_score(node, beta):
    """Return J_IB of a node with children."""
    gain, confidence = etas(node, beta)
    return (1 + beta) / len(gain) * sum(map(operator.mul, gain, confidence))  # J_IB

def ib_covariance(node, beta):
    """Return Cov(η₁, η₂) over s_b. In the paper it falls to zero in GRPO's runs. [P]"""
    gain, confidence = etas(node, beta)
    n = len(gain)
    product = sum(map(operator.mul, gain, confidence)) / n
    return product - sum(gain) / n * sum(confidence) / n  # Cov

def select_nodes(root, k, sampler, config, rng):
    """Return the k nodes to branch from; a node must have children.

        ib       those of highest J_IB                                                         [P]
        random   any, as RandTree does                                                         [P]
        entropy  least often branched from, then with the token of highest H_t in a child      [O]
        fixed    least often branched from, then shallowest                                    [O]

    The paper compares with RandTree, EPTree and TreePO. EPTree branches at the token of highest
    -ln π, inside a step, TreePO after every so many tokens. `entropy` and `fixed` stand for these.
    In a tree of fewer than k nodes, nodes repeat.
    """
    nodes = [n for n in root.walk() if n.children]
    if sampler == "ib":
        nodes.sort(key=lambda n: -ib_score(n, config.beta))
    elif sampler == "entropy":
        nodes.sort(key=lambda n: (n.branched, -max(s.entropy.max().item() for s in n.children)))
    elif sampler == "fixed":
        nodes.sort(key=lambda n: (n.branched, len(n.path())))
    else:
        rng.shuffle(nodes)
    return (nodes * k)[:k]

# ==== Step-level advantages, global and local (GL)
#   A_GL(s) = (p̂(a*|s) - p̂(a*|q)) / std of the G rewards; A_GL = 0 if std = 0      [P]
#   A_IB(s) = η₁(s) η₂(s)                                                          [P]
#             the paper has π_ref in η₂; here it is the policy that sampled        [O]
#   A(s) = A_GL(s) + λ A_IB(s); A_GL compares s with the tree, A_IB with its parent  [P]
# λ A_IB = λ (p̂(a*|s) / p̂(a*|parent) - 1) π(s) - (λ/β) π(s): a reward for steps that raise p̂, and
# a price on confidence, λ/β, which is 0.02 at the paper's λ = 0.1 and β = 5. If all or no responses
# are right, A(s) is -(λ/β) π(s). Were π(s) the probability of s, the price would, in a tree
# without branches, act as a bonus of λ/(2β) on the Gini entropy 1 - Σ_s π(s)². [O]
# Summed over the trajectories through s, GRPO's (R - mean)/std is visits x A_GL(s). So at
# π_θ = π_old, A_GL on the tree is GRPO on its trajectories. But p̂ and the visits are biased,
# because the score picks the nodes to continue by how trajectories ended. [O]

def step_advantage(node, root, config):
    """Return A(s) of the kind that config.advantage names.

    `grpo` is A_GL with std + 1e-4. `treerl` is TreeRL's advantage [arXiv 2506.11902].
    """
    above_root = node.value - root.value
    std = math.sqrt(root.value * (1 - root.value))  # of G rewards of 0 or 1 with this mean
    if config.advantage == "grpo":
        return above_root / (std + 1e-4)
    if config.advantage == "treerl":
        return (above_root + node.value - node.parent.value) / math.sqrt(node.visits)
    a_gl = above_root / max(std, 1e-9)  # A_GL
    a_ib = information_gain(node, config.beta) * node.confidence  # A_IB
    return {"gl": a_gl, "ib": a_ib, "gl+ib": a_gl + config.lam * a_ib}[config.advantage]  # A(s)

def step_advantages(root, config):
    """Return {step: A(s)} of a tree."""
    return {step: step_advantage(step, root, config) for step in root.walk()[1:]}

# ==== Update on packed trees
#   loss = -mean_t min(r_t A, clip(r_t) A) + kl · KL, with kl = 0.001                        [P]
#          the KL is estimated by k3 = ρ - 1 - ln ρ, ρ = π_ref / π_θ                         [GRPO]
#          mean_t is over all tokens of all trees' trajectories, so that a shared token counts
#          once for each of them; r_t = π_θ / π_old is bounded by 3 where A < 0              [O]
# Steps that trajectories share are run once. The tree lies depth-first in one sequence. There a
# token sees its ancestors and itself. Its position is that in its trajectories, and its weight is
# their number. The gradient is that of separate rows with the advantages A(s). [O]

def policy_loss(logp, old_logp, advantages, mask, config):
    """Return -mean_t min(min(r_t, 3) A, clip(r_t) A), the mean ratio, and the share clipped.

    logp, old_logp: [B, T]; advantages: [B, T], or [B] if responses have one; mask: [B, T], tokens
    to average, or weights. If A > 0, the clip bounds r_t from above. If A < 0, it bounds r_t from
    below, and the dual clip, 3, from above [arXiv 1912.09729]. Beyond, the gradient is 0.
    """
    if advantages.ndim == 1:
        advantages = advantages[:, None]
    ratio = (logp - old_logp).clamp(max=20).exp()  # r_t; exp(89) would make a NaN gradient
    clip = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    terms = torch.min(ratio.clamp(max=3) * advantages, clip * advantages)
    clipped = terms != ratio * advantages
    tokens = mask.sum()
    stats = {"ratio": (ratio * mask).sum() / tokens, "clipped": (clipped * mask).sum() / tokens}
    return -(terms * mask).sum() / tokens, stats

def pack_tree(root, advantages):
    """Pack a tree into one sequence of S tokens: the prompt, then every step exactly once.

    Return a dict of input_ids and these tensors, all [S]:
        previous    index of the token before it in its trajectory, whose state predicts it
        weights     number of trajectories through it, 0 for the prompt
        advantages  A(s) of its step, 0 for the prompt
        logps       ln π_old, 0 for the prompt

    If a prompt q has the children a and b, and a has the child c, each of one token, then
        q a c b     is the sequence: depth first
        - 0 1 0     is `previous`, so that q sees q; a sees q a; c sees q a c; b sees q b
        0 1 2 1     are the positions that `tree_logps` gives them
    """
    nodes = root.walk()
    last = {}  # node: index of its last token
    previous = torch.arange(sum(len(node.tokens) for node in nodes)) - 1  # right within a step
    begin = 0
    for node in nodes:
        if node.parent:
            previous[begin] = last[node.parent]  # where a step begins
        begin += len(node.tokens)
        last[node] = begin - 1
    lengths = torch.tensor([len(node.tokens) for node in nodes])
    steps = nodes[1:]  # without the root, whose prompt has weight, advantage and ln π 0
    weights = torch.tensor([0.0] + [float(step.visits) for step in steps])
    A = torch.tensor([0.0] + [advantages[step] for step in steps])
    return {"input_ids": torch.tensor([token for node in nodes for token in node.tokens]),
            "previous": previous.clamp(min=0),  # the first token of the prompt has none before it
            "weights": weights.repeat_interleave(lengths),
            "advantages": A.repeat_interleave(lengths),
            "logps": torch.cat([torch.zeros(len(root.tokens))] + [step.logps for step in steps])}

def k3(logp, reference):
    """Return the k3 estimate of KL(π || π_ref) per token: ρ - 1 - ln ρ, ρ = π_ref / π. [GRPO]

    Its mean over samples of π is KL(π || π_ref). But its gradient at fixed samples of π is, on
    average, that of KL(π_ref || π). GRPO accepts this, and so do we.
    """
    return (reference - logp).exp() - 1 - (reference - logp)  # k3

def trees_loss(model, packs, config, reference):
    """Return the loss, a mean over the tokens of all trajectories of the trees, and other means.

    `sampling_gap` is |ln π - ln π_old|, mere rounding until the batch's first optimizer step.
    """
    batch = stack_packs(packs)
    old, weights = batch["logps"], batch["weights"]
    logp = tree_logps(model, batch)  # [B, S]
    loss, means = policy_loss(logp, old, batch["advantages"], weights, config)
    means["sampling_gap"] = ((logp - old).abs() * weights).sum() / weights.sum()
    if config.kl > 0:
        with torch.no_grad():
            reference_logp = tree_logps(reference, batch)
        means["policy_kl"] = (k3(logp, reference_logp) * weights).sum() / weights.sum()
        loss = loss + config.kl * means["policy_kl"]
    return loss, means

def update_on_trees(model, optimizer, roots, config, reference=None):
    """Take `updates_per_step` optimizer steps on a list of trees; return means over tokens.

    Without A_IB, a tree whose responses are all right or all wrong has advantages of 0. It is run
    only if there is a KL. Its tokens count in the loss's mean all the same.
    """
    packs = [pack_tree(root, step_advantages(root, config)) for root in roots]
    sums = Counter(loss=0, tokens_trained=0, tokens_unique=0)  # logged even if nothing is trained
    norm = 0.0
    for i in range(config.updates_per_step):
        minibatch = packs[i::config.updates_per_step]
        tokens = sum(gather([trajectory_tokens(minibatch)]))  # of all processes
        if config.kl == 0:
            minibatch = [pack for pack in minibatch if pack["advantages"].any()]
        sizes = [len(pack["input_ids"]) for pack in minibatch]
        for rows in progress(micro_batches(sizes, config.micro_tokens), "update"):
            micro = [minibatch[row] for row in rows]
            with recompute_layers(model, config):
                loss, means = trees_loss(model, micro, config, reference)
            trained = trajectory_tokens(micro)
            share_of_tokens = trained / tokens
            (share_of_tokens * loss).backward()  # the micro-batches add up to the minibatch's mean
            sums["loss"] += share_of_tokens * loss.item() / config.updates_per_step
            sums["tokens_unique"] += sum((pack["weights"] > 0).sum().item() for pack in micro)
            add_means(sums, means, trained)
        if sum(gather([len(minibatch)])) > 0:  # else AdamW would step by its momentum alone
            norm = take_step(model, optimizer, config)
    return total_means(sums) | {"grad_norm": norm}

# ==== The training step

def training_step(model, tokenizer, optimizer, reference, problems, config, step):
    """Do one step of the method; return its line of metrics.jsonl."""
    # Seeded by the run's seed and the step only, so that a resumed run draws the same numbers
    rng = random.Random(f"{config.seed} {step}")
    torch.manual_seed(rng.getrandbits(62) + RANK)
    began = time.time()

    # 1 to 3: grow a tree for each prompt
    batch = rng.sample(problems, min(config.prompts_per_step, len(problems)))
    roots, trajectories = grow(model, tokenizer, shard(batch), config, rng)

    # 4 and 5: advantages of the steps, and the update
    grown = time.time()
    metrics = update_on_trees(model, optimizer, list(roots.values()), config, reference)
    metrics |= {"rollout_s": grown - began, "update_s": time.time() - grown}

    # Log. The sampler chose the prefixes of a tree's trajectories, so their mean reward does not
    # measure the policy: compare samplers by evaluations
    if step % 10 == 0:
        print_response(trajectories[0])
    nodes = [node for root in roots.values() for node in root.walk() if node.children]
    scores = gather([ib_score(node, config.beta) for node in nodes])
    covs = gather([ib_covariance(node, config.beta) for node in nodes if len(node.children) > 1])
    metrics |= {"ib_score": sum(scores) / len(scores), "cov": sum(covs) / max(1, len(covs))}
    return rollout_metrics(trajectories) | metrics

# ==== The run, the same in both scripts

def set_up(config):
    """Load all that a run works with, and evaluate a new run before it trains."""
    run = types.SimpleNamespace(began=time.time(), folder=run_folder(config))
    print_machine()
    training, heldout = load_problems(config)
    run.model, run.tokenizer = load_policy(config)
    run.problems = encode(training, run.model, run.tokenizer, config)
    run.heldout = encode(heldout, run.model, run.tokenizer, config)
    run.auxiliary = prepare(run.model, config)  # iiblpo.py's latents, ib_tpo.py's reference
    check_policy(run.model, run.tokenizer, run.auxiliary, run.problems, config)
    run.optimizer = torch.optim.AdamW(
        run.model.parameters(), lr=config.lr, betas=(0.9, 0.99), weight_decay=0.0,
        fused=DEVICE == "cuda")  # a fused step makes no copies of the weights
    run.parts = {"model": run.model, "optimizer": run.optimizer}
    # Checkpoints hold what a run has learnt, latents included, not ib_tpo.py's frozen reference
    if any(weight.requires_grad for weight in run.auxiliary.parameters()):
        run.parts["auxiliary"] = run.auxiliary
    if config.resume:
        run.state = load_state(run.folder, config, run.parts)
    else:
        before = evaluate(run.model, run.tokenizer, run.heldout, config)
        run.state = {"config": asdict(config), "log": [], "before": before}
    return run

def train(config):
    """Set up, train until the budget is spent, and evaluate; return the summary."""
    run = set_up(config)
    model, tokenizer, log = run.model, run.tokenizer, run.state["log"]
    tokens = sum(line["tokens_sampled"] for line in log)
    run.done = done_before = share_done(len(log), tokens, config)
    began = time.time()
    while run.done < 1:
        step = len(log)
        if step % config.save_every == 0:
            save_state(run.folder, run.state, run.parts)
        set_schedule(run, config)  # the learning rate, and in iiblpo.py γ
        metrics = {"step": step} | training_step(model, tokenizer, run.optimizer, run.auxiliary,
                                                 run.problems, config, step)
        if config.eval_every and (step + 1) % config.eval_every == 0:
            found = evaluate(model, tokenizer, run.heldout, config)
            metrics |= {f"eval_{name}": value for name, value in found.items()}
        log.append(metrics)
        save_lines(run.folder / "metrics.jsonl", log)
        tokens += metrics["tokens_sampled"]
        run.done = share_done(len(log), tokens, config)
        whole = (time.time() - began) / (run.done - done_before)  # seconds of a run at this speed
        left = whole * max(0, 1 - run.done)
        print_step(metrics, config, tokens, left)
    save_state(run.folder, run.state, run.parts)

    after = evaluate(model, tokenizer, run.heldout, config, run.folder / "samples.jsonl")
    summary = {"before": run.state["before"], "after": after, "config": asdict(config),
               "seconds": time.time() - run.began}
    save_lines(run.folder / "summary.json", [summary])
    save_policy(run.folder / "model", model, tokenizer)
    print_table(run.folder, summary)
    return summary

# ==== The reference policy, log-probabilities of packed trees, the self-check, --show

def prepare(model, config):
    """Return the reference policy of the KL, or an empty module if there is no KL.

    End the program with a one-line message if the model would not respect a tree's attention mask.
    """
    settings = model.config.to_dict()
    kinds = set(settings.get("layer_types") or ["full_attention"])
    if settings.get("sliding_window"):
        kinds.add("sliding_attention")
    if kinds != {"full_attention"}:
        fail(f"packed trees need full attention, but {type(model).__name__} has the layer types "
             f"{', '.join(sorted(kinds))}")
    if config.kl == 0:
        return torch.nn.ModuleList()
    return copy.deepcopy(model).requires_grad_(False)

def set_schedule(run, config):
    """Let the learning rate rise for 20 steps and then fall to 0. [O]"""
    step = len(run.state["log"])
    run.optimizer.param_groups[0]["lr"] = config.lr * min((step + 1) / 20, 1 - run.done)

def check_policy(model, tokenizer, reference, problems, config):
    """Compare the ln π recorded in sampling with that of a row alone and of a packed tree. [O]

    If they differ, as in models that do not heed positions and masks (ALiBi, local attention), the
    program ends with a one-line message. The reference begins as a copy, so it needs no check.
    """
    torch.manual_seed(config.seed)
    ordered = sorted(problems, key=len)  # two short and two long prompts, so that there is padding
    few = [replace(t, group=i) for i, t in enumerate(ordered[:2] + ordered[-2:])]
    small = replace(config, tree=[2, 2, 1, 1], sampler="random",
                    max_new_tokens=min(CHECK_TOKENS, config.max_new_tokens))
    roots, trajectories = grow(model, tokenizer, few, small, random.Random(config.seed))
    alone, packed = [], []
    try:
        with torch.no_grad():
            for t in trajectories:
                alone.append(row_logps(model, t) - t.logps[t.start:])
            for root in roots.values():
                batch = stack_packs([pack_tree(root, dict.fromkeys(root.walk(), 0.0))])
                gap = tree_logps(model, batch) - batch["logps"]
                packed.append(gap[batch["weights"] > 0].cpu())
    except (TypeError, ValueError) as e:
        fail(f"{type(model).__name__} takes no packed trees: {e}")
    report_gaps({"a row alone": torch.cat(alone), "a packed tree": torch.cat(packed)})

def stack_packs(packs):
    """Return packed trees as one batch: their tensors padded to [B, S], and which token sees which.

    The latter is attention_mask, bool [B, S, S]. A token sees itself and all that the token before
    it sees. Padding sees only itself: if it saw nothing, it would be NaN.
    """
    batch = {name: pad([pack[name] for pack in packs]).to(DEVICE) for name in packs[0]}
    mask = torch.eye(batch["input_ids"].shape[1], dtype=torch.bool).repeat(len(packs), 1, 1)
    for sees, pack in zip(mask, packs):  # a view: writing to it writes to mask
        for i, before in enumerate(pack["previous"].tolist()):
            sees[i] |= sees[before]
    return batch | {"attention_mask": mask.to(DEVICE)}

def tree_logps(model, batch):
    """Return ln π of the tokens of stacked trees, 0 of prompts and padding, [B, S]."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with autocast():
        states = model.base_model(input_ids=ids, attention_mask=mask[:, None], use_cache=False,
                                  position_ids=mask.sum(-1) - 1).last_hidden_state
        row, column = (batch["weights"] > 0).nonzero(as_tuple=True)
        predictors = states[row, batch["previous"][row, column]]
        logp, _ = head_logps(model, predictors, ids[row, column])
    return torch.zeros(ids.shape, device=DEVICE).index_put((row, column), logp)

def trajectory_tokens(packs):
    """Return the number of tokens of all trajectories; one that n of them share counts n times."""
    return sum(pack["weights"].sum().item() for pack in packs)

def show(config):
    """Print the tree of a held-out problem.

    To see a trained policy, give --model RUN/model, and if it is tiny --config tiny_config.yaml.
    """
    _, heldout = load_problems(config)  # before the model: a mistyped name fails at once
    model, tokenizer = load_policy(config)
    heldout = encode(heldout, model, tokenizer, config)
    torch.manual_seed(config.seed)
    problem = heldout[config.seed % len(heldout)]
    roots, _ = grow(model, tokenizer, [problem], config, random.Random(config.seed))
    root = roots[0]
    A = step_advantages(root, config)
    print(f"{problem.question}  answer {problem.gold}\n"
          "visits, p̂, then η₂ and A of a step, and J of a node with children")
    for node in root.walk():
        line = f"{node.visits:3} {node.value:.2f}"
        if node.parent:
            line += f" η₂ {node.confidence:.2f} A {A[node]:+.2f}"
        if node.children:
            line += f" J {ib_score(node, config.beta):+.2f}"
        text = tokenizer.decode(node.tokens).replace("\n", "↵")
        print(f"{line:36}" + "  " * min(len(node.path()), 20) + text)
    return root

# ==== Supporting code: the same in both scripts, but for --probe_heads in `main`

RANK = int(os.environ.get("RANK", 0))  # torchrun sets RANK and WORLD_SIZE
WORLD = int(os.environ.get("WORLD_SIZE", 1))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Cards before Ampere, such as Colab's T4, only emulate bf16, which is slow: they compute in fp32.
BF16 = DEVICE == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
LOGITS = 2 ** 25  # the most logits that are held at a time
CHECK_TOKENS = 128  # the longest response of the self-check
HUB = {  # "repository:configuration" of each name; its columns [and a project that reads them]
    "gsm8k": "openai/gsm8k:main",  # question, answer [verl: gsm8k.py]
    "math": "DigitalLearningGmbH/MATH-lighteval",  # problem, solution [verl: math_dataset.py]
    "dapo": "open-r1/DAPO-Math-17k-Processed:en",  # prompt, solution [NeMo-RL: dapo_math.py]
    "math500": "HuggingFaceH4/MATH-500",  # problem, answer [lighteval: math_500.py]
    "aime24": "HuggingFaceH4/aime_2024",  # problem, answer [lighteval: aime.py]
    "aime25": "math-ai/aime25",  # problem, answer [lm-evaluation-harness: aime25.yaml]
    "olympiadbench":  # question, final_answer as a list [evalscope: olympiad_bench_adapter.py]
        "Hothan/OlympiadBench:OE_TO_maths_en_COMP"}
autocast = functools.partial(torch.autocast, DEVICE, torch.bfloat16, enabled=BF16)
pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)  # [T_i] -> [B, T]
# Progress bars appear after five seconds. In a log file they move every 20 seconds.
progress = functools.partial(tqdm, delay=5, mininterval=0.1 if sys.stderr.isatty() else 20,
                             leave=False, disable=RANK > 0)

def visible_mask(*args, **kwargs):
    """Return transformers' attention mask, in which a query that would see nothing sees all keys.

    Queries at left padding see only padding, which is masked. CUDA answers NaN there, and by the
    next layer the NaN reaches real tokens [transformers#47651]. What padding sees has no effect.
    """
    mask = sdpa_mask(*args, **kwargs)  # [B, 1, Q, C], or None where it is merely causal
    return mask if mask is None else mask | ~mask.any(-1, keepdim=True)

transformers.AttentionMaskInterface.register("sdpa", visible_mask)

class Recorder(transformers.LogitsProcessor):
    """Draw each token of one `generate` call, and record its ln π and its entropy H_t.

    `generate` would tell ln π only by handing back all logits, [T, B, V]. So the token is drawn
    here, and the logits that are handed on allow only this token.
    """

    def __init__(self, greedy, bar):
        self.greedy = greedy
        self.bar = bar
        self.records = []  # of each token [B, 2]: ln π(o_t) and H_t

    def __call__(self, input_ids, logits):
        logp = logits.log_softmax(-1)  # [B, V]
        if self.greedy:
            token = logp.argmax(-1, keepdim=True)  # [B, 1]
        else:
            token = torch.multinomial(logp.exp(), 1)  # [B, 1]
        entropy = token_entropy(logits)[:, None]
        self.records.append(torch.cat([logp.gather(1, token), entropy], 1))
        self.bar.update()
        return torch.full_like(logits, -math.inf).scatter(1, token, 0.0)

def cut_at_end(tokens, room, eos):
    """Return the tokens up to the first EOS, or the first `room`; and whether EOS came.

    cut_at_end([5, 6, 1, 0], room=9, eos=[1]) -> ([5, 6, 1], True)
    """
    for length, token in enumerate(tokens[:room], 1):
        if token in eos:
            return tokens[:length], True
    return tokens[:room], False

def token_entropy(logits):
    """Return H_t = -Σ_v p_t(v) ln p_t(v); p_t is the softmax of logits: [..., V] -> [...]."""
    logp = logits.log_softmax(-1).clamp(min=torch.finfo(logits.dtype).min)  # 0 ln 0 = 0
    return -(logp.exp() * logp).sum(-1)  # H_t

def sample(model, tokenizer, prefixes, config, greedy=False, steer=None):
    """Sample a continuation of each trajectory in `prefixes`; return them in the same order.

    Tokens are drawn at temperature 1 without truncation, so that ln π_old is the log-probability
    they were drawn with. [O] Rows are generated in several calls. Where iiblpo.py has latents,
    steer(rows, first) returns a context in which these rows are steered from column `first` on.
    """
    results = list(prefixes)
    eos = model.generation_config.eos_token_id
    rooms = [config.max_new_tokens - len(t.response) for t in prefixes]
    # Rows of similar size are in one call, because a call runs until its longest row ends
    sizes = [len(t.prompt) + room for t, room in zip(prefixes, rooms)]
    calls = micro_batches(sizes, config.generate_tokens)
    bar = progress(desc="sampling", total=sum(max(rooms[row] for row in rows) for rows in calls))
    for rows in calls:
        ids = [torch.tensor(prefixes[row].prompt + prefixes[row].response) for row in rows]
        ids = pad(ids, padding_value=-1, padding_side="left").to(DEVICE)  # [B, width]
        width = ids.shape[1]
        recorder = Recorder(greedy, bar)
        steering = steer(rows, width - 1) if steer else contextlib.nullcontext()
        with autocast(), steering:
            ids = model.generate(ids.clamp(min=0), attention_mask=(ids >= 0).long(),
                                 max_new_tokens=max(rooms[row] for row in rows),
                                 logits_processor=[recorder])
        records = torch.stack(recorder.records, 1).cpu()  # [B, T, 2]
        for row, tokens, record in zip(rows, ids[:, width:].tolist(), records):
            t = prefixes[row]
            tokens, complete = cut_at_end(tokens, rooms[row], eos)
            response = t.response + tokens
            logp, entropy = record[:len(tokens)].T
            results[row] = replace(
                t, response=response, start=len(t.response), complete=complete,
                text=tokenizer.decode(response, skip_special_tokens=True),
                logps=torch.cat([t.logps, logp]), entropy=torch.cat([t.entropy, entropy]))
    bar.close()
    return results

def head_logps(model, states, targets):
    """Return ln π of the tokens `targets` [N] at hidden states [N, H], and H_t there: [2, N].

    Logits are made in chunks, and again in the backward pass: all at once they take gigabytes.
    """
    def score_chunk(states, targets):
        logits = model.get_output_embeddings()(states).float()  # [n, V]
        logp = logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
        return torch.stack([logp, token_entropy(logits)])

    size = max(1, LOGITS // model.get_output_embeddings().weight.shape[0])
    chunks = zip(states.split(size), targets.split(size))
    return torch.cat([checkpoint(score_chunk, *chunk, use_reentrant=False) for chunk in chunks], 1)

@contextlib.contextmanager
def recompute_layers(model, config):
    """In the block, store only each layer's input for the backward pass, which runs it again.

    Without `config.recompute`, do nothing. The checkpointing of transformers is not used, because
    it needs training mode, where dropout would change ln π.
    """
    layers = [x for x in model.modules()
              if config.recompute and isinstance(x, GradientCheckpointingLayer)]
    for layer in layers:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)  # forward is again the method of its class

def full_precision(head, states):
    """Return the logits of an output layer in fp32, also where the rest of the model is in bf16.

    bf16 rounds a logit of 20 to steps of 0.125, and so ln π would differ between two passes. [O]
    """
    with torch.autocast(DEVICE, enabled=False):
        return type(head).forward(head, states.float())

def row_logps(model, t):
    """Return ln π of a trajectory's own tokens, [T - start], by a plain pass of its row alone."""
    ids = torch.tensor([t.prompt + t.response], device=DEVICE)
    begin = len(t.prompt) + t.start
    with autocast():
        logits = model(ids).logits[0, begin - 1:-1].float()
    return logits.log_softmax(-1).gather(1, ids[0, begin:, None])[:, 0].cpu()

def report_gaps(gaps):
    """Print the largest of each kind of gap in ln π, {kind: [N]}; end the program if one is large.

    In fp32, rounding makes less than 0.001 nats, and the smallest fault that was seen made 0.07. In
    bf16, rounding typically makes 0.02 per token and at most 0.2 in hundreds of tokens, and wrong
    masks or positions make 2 to 3. The bounds lie between. [O]
    """
    bound = 0.5 if BF16 else 0.01
    largest = {what: gap.abs().nan_to_num(nan=math.inf).max().item() for what, gap in gaps.items()}
    found = ", ".join(f"{what} {gap:.2g}" for what, gap in largest.items())
    print(f"self-check: ln π of sampling and of training differ by {found} nats", flush=True)
    if max(largest.values()) > bound:
        fail(f"ln π of sampling and of training differ by {found} nats, where rounding explains "
             f"{bound}: the script does not fit this model or this release of transformers")

def micro_batches(lengths, tokens):
    """Group the indices of rows so that in each group, rows x longest row is at most `tokens`.

    A row that is longer is a group of its own. micro_batches([5, 9, 4], 10) -> [[1], [0, 2]]
    """
    batches = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):  # a group's longest is first
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches

def take_step(model, optimizer, config):
    """Take an optimizer step by the sum of all processes' gradients; return its unclipped norm."""
    for p in model.parameters():
        if WORLD > 1:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            torch.distributed.all_reduce(p.grad)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm).item()
    if not math.isfinite(norm):
        fail("the gradient is not finite: start again with a lower --lr (--resume would repeat it)")
    optimizer.step()
    optimizer.zero_grad()
    return norm

def add_means(sums, means, tokens):
    """Add a micro-batch's means, weighted by its number of tokens, to the running sums."""
    for name, value in means.items():
        sums[name] += value.item() * tokens
    sums["tokens_trained"] += tokens

def total_means(sums):
    """Return the means over all trained tokens, those of other processes included.

    Names that begin with "tokens" are counts, and stay sums. So does the loss, whose parts add up.
    """
    total = pandas.DataFrame(gather([sums])).sum().to_dict()
    for name in total:
        if name != "loss" and not name.startswith("tokens"):
            total[name] /= max(1, total["tokens_trained"])
    return total

def gather(items):
    """Return the items of all processes in one list."""
    lists = [items] * WORLD
    if WORLD > 1:
        torch.distributed.all_gather_object(lists, items)
    return sum(lists, [])

def shard(problems):
    """Return this process's part of a batch of problems, numbered by their places in the batch."""
    return [replace(t, group=i) for i, t in enumerate(problems)][RANK::WORLD]

def load_policy(config):
    """Return the policy, in fp32 and without dropout, and its tokenizer.

    End the program with a one-line message where they cannot be loaded or used.
    """
    name = config.model
    if name == "tiny":
        name = warm_start(config)
        gather([])  # a barrier: the other processes wait for the first
    elif name.startswith("Qwen") and not Path(name).exists():
        name = "Qwen/" + name.removeprefix("Qwen/")
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.float32, use_safetensors=True, trust_remote_code=False).to(DEVICE)
        # This reads tokenizer.json as it is. AutoTokenizer may choose the model family's class.
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(name)
    except Exception as e:  # whatever a hub, a network or a file raises
        fail(f"cannot load the model {name}: {with_cause(e)}")
    eos = end_tokens(model, tokenizer)
    if not eos:
        fail(f"{name} has no end-of-sequence token: no response would ever end")
    # A model's own defaults (top-k 20, ...) would make sampling differ from the recorded ln π.
    model.generation_config = transformers.GenerationConfig(eos_token_id=eos, pad_token_id=eos[0])
    head = model.get_output_embeddings()
    with torch.no_grad():
        out = model(torch.tensor([eos], device=DEVICE), output_hidden_states=True)
        if not out.logits.allclose(head(out.hidden_states[-1]), atol=1e-3):
            fail(f"{name} scales or caps its logits, or has none that are finite: not supported")
    head.forward = types.MethodType(full_precision, head)
    return model.eval(), tokenizer  # with dropout, training would compute another ln π

def with_cause(error):
    """Return an exception's message, and the first cause in its chain if it has one."""
    cause = error
    while cause.__cause__ or cause.__context__:
        cause = cause.__cause__ or cause.__context__
    return repr(error) if cause is error else f"{str(error)[:300]} (it began with {cause!r})"

def end_tokens(model, tokenizer):
    """Return the ids of the tokens that end a response, each once; [] if there are none."""
    eos = model.generation_config.eos_token_id
    if eos is None:
        eos = tokenizer.eos_token_id
    if type(eos) is not list:  # many chat models have several
        eos = [] if eos is None else [eos]
    if tokenizer.chat_template:
        # The token that ends a chat turn ends a response, too, even if only the template names it.
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
        rest = apply_template(tokenizer, turns, tokenize=False).rpartition("!")[2]  # after "!"
        ids = tokenizer(rest, add_special_tokens=False).input_ids
        eos = eos + [token for token in ids[:1] if token in tokenizer.added_tokens_decoder]
    return list(dict.fromkeys(eos))

def apply_template(tokenizer, messages, **options):
    """Return what the chat template makes of messages, [{"role": ..., "content": ...}, ...].

    Templates that print the date always get the same one: a run resumed on another day must have
    the same prompts. Qwen3's thinking is off, because it would not fit into a response.
    """
    date = "{% macro strftime_now(form) %}01 Jan 2026{% endmacro %}"
    try:
        template = date + tokenizer.get_chat_template()
        return tokenizer.apply_chat_template(messages, chat_template=template, return_dict=False,
                                             enable_thinking=False, **options)
    except Exception as e:  # a template is a program, and may raise whatever it likes
        fail(f"the model's chat template cannot be used: {with_cause(e)}")

def load_problems(config):
    """Return the problems to train on and the held-out ones, two lists of (question, gold).

    Held-out problems: `eval_prompts` of `eval_dataset`, else of the data set's test split, else the
    last ones of its training split, at most half. End the program with a one-line message if
    loading fails.
    """
    name, n = config.dataset, config.eval_prompts
    if name == "chain":
        rng = random.Random(f"train {config.seed}")
        train = chain_questions(rng, config.operands, heldout=False, n=4096)
        heldout = chain_questions(random.Random("held out"), config.operands, heldout=True, n=n)
        return [(q, chain_value(q)) for q in train], [(q, chain_value(q)) for q in heldout]
    try:
        tables = load_tables(name)
        train = tables.get("train", next(iter(tables.values())))
        if config.eval_dataset:
            name = config.eval_dataset
            tables = load_tables(name)
            test = tables.get("test", next(iter(tables.values()))).shuffle(seed=0)
        elif "test" in tables:
            test = tables["test"].shuffle(seed=0)  # it may be sorted by subject
        else:
            split = train.train_test_split(min(n, len(train) // 2), shuffle=False)
            train, test = split["train"], split["test"]
        heldout = read_rows(test, name)[:n]
        known = dict(heldout)  # a question that is in both is not trained on
        train = [pair for pair in read_rows(train, config.dataset) if pair[0] not in known]
    except Exception as e:  # whatever a hub, a network or a parser raises
        fail(f"cannot load the dataset {name}: {with_cause(e)}")
    if min(len(train), len(heldout)) < WORLD:
        fail(f"{config.dataset} has {len(train)} problems that are not held out and {len(heldout)} "
             f"that are, for {WORLD} processes")
    return train, heldout

def load_tables(name):
    """Return the tables of a data set by the names of its splits, from a file or from the hub."""
    kind = Path(name).suffix[1:].replace("jsonl", "json")
    if kind in ("json", "parquet"):
        return datasets.load_dataset(kind, data_files=name)
    repository, _, subset = HUB.get(name, name).partition(":")
    if "/" not in repository:
        fail(f"there is no data set {name}: name one of {', '.join(HUB)}, owner/name or "
             f"owner/name:config of the hub, or a file that ends in .jsonl, .json or .parquet")
    return datasets.load_dataset(repository, subset or None)

def read_rows(table, name):
    """Return (question, gold) of each row of a table.

    Rows with an empty box for an answer are left out, as two of MATH's are. Other rows without a
    question or an answer end the program with a one-line message.
    """
    pairs = []
    for row in table:
        columns = {column.lower(): value for column, value in row.items()}
        question, gold = question_of(columns), gold_of(columns)
        if gold == "":
            continue
        if not question or gold is None or len(gold) > MAX_LENGTH:
            fail(f"{name} needs in each row a question (or problem, prompt) and an answer (or "
                 f"final_answer, solution) of at most {MAX_LENGTH} characters, unlike {row}")
        pairs.append((question, gold))
    return pairs

def first_of(columns, *names):
    """Return the value of the first of these columns that has one, or None."""
    return next((columns[name] for name in names if columns.get(name) is not None), None)

def question_of(columns):
    """Return the question of a row, or None. Of chat messages it is the user's last one."""
    question = first_of(columns, "question", "problem", "prompt")
    if type(question) is list:
        said = [x.get("content") for x in question if type(x) is dict and x.get("role") == "user"]
        question = said[-1] if said else None
    if type(question) is not str:
        return None
    # DAPO-Math-17K wraps its problems in words of its own, which ask for another form of answer.
    return re.sub(r"^Solve the following math problem step by step\. The last line .*\n\n|"
                  r"\n\nRemember to put your answer on its own line .*$", "", question)

def gold_of(columns):
    """Return the final answer of a row, or None if no response could ever match it.

    A list of one answer is that answer. Longer lists, dictionaries, dates and NaN give None.
    """
    nested = columns.get("reward_model")
    truth = nested.get("ground_truth") if type(nested) is dict else None
    gold = first_of({**columns, "truth": truth}, "answer", "final_answer", "truth", "solution")
    while type(gold) is list and len(gold) == 1:
        gold = gold[0]
    if type(gold) not in (str, int, float) or gold != gold:
        return None
    answer = extract_answer(str(gold))  # "" if it is an empty box
    return (str(gold).strip() or None) if answer is None else answer

def encode(pairs, model, tokenizer, config):
    """Return problems with their prompts, in the tokenizer's chat template where it has one."""
    problems = []
    for question, gold in pairs:
        text = config.prompt.replace("{question}", question)
        if tokenizer.chat_template:
            chat = [{"role": "user", "content": text}]
            ids = apply_template(tokenizer, chat, add_generation_prompt=True)
        else:
            ids = tokenizer(text).input_ids
            while ids[-1] == tokenizer.eos_token_id:
                ids.pop()  # some tokenizers end every text with EOS
        problems.append(Trajectory(ids, question, gold))
    longest = max(len(t.prompt) for t in problems) + config.max_new_tokens
    if longest > getattr(model.config, "max_position_embeddings", longest):
        fail(f"the longest prompt and max_new_tokens make {longest} tokens, too many for the model")
    return problems

# The tiny task: a response to "3+4*2=" reduces one operator per line, modulo 10, and ends with the
# answer: "3+8\n1\n#1". Every line of a demonstration is correct arithmetic, but most reduce the
# leftmost operator, by habit. So the policy knows arithmetic, but seldom follows precedence.

def reduce_at(expression, i):
    """Return the expression with the operator at index i done modulo 10: ("3+4*2", 3) -> "3+8"."""
    a, b = int(expression[i - 1]), int(expression[i + 1])
    value = {"+": a + b, "-": a - b, "*": a * b}[expression[i]] % 10
    return f"{expression[:i - 1]}{value}{expression[i + 2:]}"

def chain_value(question):
    """Return the value by ordinary precedence, modulo 10: "3+4*2=" -> "1"."""
    expression = question.rstrip("=")
    while len(expression) > 1:
        expression = reduce_at(expression, max(1, expression.find("*")))  # -1 if there is no *
    return expression

def is_sound(question, text):
    """Return whether each line is a valid reduction of the one before, from question to answer.

    A reduction is valid if it keeps the value. "3+8\\n1\\n#1" is the only sound response to
    "3+4*2="; "#1" alone is right, but not sound.
    """
    expression = question.rstrip("=")
    *lines, answer = text.split("\n")
    for line in lines:
        reductions = [reduce_at(expression, i) for i in range(1, len(expression), 2)]
        if line not in reductions or chain_value(line) != chain_value(expression):
            return False
        expression = line
    return answer == "#" + expression

def demonstration(question, rng, habit):
    """Return a response; at rate `habit` a line reduces the leftmost operator, else any one."""
    expression, response = question.rstrip("="), ""
    while len(expression) > 1:
        at = 1
        if rng.random() >= habit:
            at = 2 * rng.randrange(len(expression) // 2) + 1
        expression = reduce_at(expression, at)
        response += expression + "\n"
    return response + "#" + expression

def chain_questions(rng, operands, heldout, n):
    """Return n different questions; held out are those whose checksum is a multiple of 16."""
    found = {}
    for _ in range(32 * n + 10_000):  # if so many do not give n, there are too few
        question = str(rng.randrange(10))
        for _ in range(rng.randint(*operands) - 1):
            question += rng.choice("+-*") + str(rng.randrange(10))
        if (zlib.crc32(question.encode()) % 16 == 0) == heldout:
            found[question + "="] = True
        if len(found) == n:
            return list(found)
    fail(f"there are not {n} problems with --operands {operands}, only {len(found)}")

def tiny_tokenizer():
    """Return an ordinary fast tokenizer with one token per character."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *"0123456789+-*=\n#"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", padding_side="left")

def warm_start(config):
    """Return the folder of a Qwen2 of 0.64 M parameters that has learnt demonstrations."""
    low, high = config.operands
    shape = dict(hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4,
                 num_key_value_heads=4, max_position_embeddings=512, tie_word_embeddings=True)
    # Made once per recipe: the folder's name holds a checksum of it
    recipe = [config.habit, config.operands, config.warm_steps, config.prompt, shape]
    folder = Path(f"runs/warm_start-{zlib.crc32(json.dumps(recipe).encode()):08x}")
    if RANK > 0 or folder.exists():
        return folder
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    rng = random.Random("warm start")
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(
        vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=1, pad_token_id=0,
        **shape)).to(DEVICE)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim == 1 or "embed" in name]
    muon = torch.optim.Muon(matrices, weight_decay=0.0)  # needs half as many steps as AdamW here
    adam = torch.optim.AdamW(others, weight_decay=0.0)
    for step in progress(range(config.warm_steps), "warm start"):
        digits = rng.randint(low, high)  # one length a batch: nothing to pad
        questions = chain_questions(rng, [digits, digits], False, 64)
        pairs = [(question, demonstration(question, rng, config.habit)) for question in questions]
        problems = encode(pairs, model, tokenizer, config)  # here `gold` is a demonstration
        end = [tokenizer.eos_token_id]
        ids = torch.tensor([t.prompt + tokenizer(t.gold).input_ids + end for t in problems])
        labels = ids.clone()
        labels[:, :len(problems[0].prompt)] = -100
        model(ids.to(DEVICE), labels=labels.to(DEVICE)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        ramp = min(1, (step + 1) / 50) * (1 - step / config.warm_steps)  # up, then down to 0
        for optimizer, lr in (muon, 0.02), (adam, 0.003):
            optimizer.param_groups[0]["lr"] = lr * ramp
            optimizer.step()
            optimizer.zero_grad()
    save_policy(folder, model, tokenizer)
    return folder

def own_tokens(trajectories):
    """Return how many tokens the trajectories sampled themselves, without their prefixes."""
    return sum(len(t.response) - t.start for t in trajectories)

def assign_rewards(trajectories, config):
    """Write the reward of each trajectory: 1 where its answer is the gold answer, else 0."""
    for t in trajectories:
        answer = extract_answer(t.text)
        if config.dataset == "chain":
            t.reward = float(answer == t.gold)  # the digit itself, no expression of equal value
        else:
            t.reward = float(verify(answer, t.gold))

MAX_LENGTH = 300  # characters; a longer answer is wrong, so that parsing takes little time [O]
REALS = mpmath.mp.clone()
REALS.dps = 300  # digits that are calculated; 200 of them are compared [O]

def find_answer(text):
    r"""Return a response's answer and where its marker begins: "so #### **5**" -> ("5", 3).

    That is the last "\boxed{5}", else "\boxed 5", "#### 5" or "#5", else (None, len(text)).
    """
    def last(pattern):
        matches = list(re.finditer(pattern, text))
        return matches[-1] if matches else None

    box = last(r"\\f?box(?:ed)?\s*\{")
    if box:
        depth = 0
        for brace in re.compile("[{}]").finditer(text, box.end() - 1):
            depth += 1 if brace[0] == "{" else -1
            if depth == 0:
                return text[box.end():brace.start()].strip(), box.start()
    found = last(r"\\boxed\s+([^\s$]*[^\s$.,])") or last(r"(?<!#)####[^\S\n]*([^\s#].*)")
    found = found or last(r"(?<!#)#([^\s#].*)")  # "# Check" and "### Check" are headings
    if not found:
        return None, len(text)
    answer = found[1].split(" #")[0]  # up to another marker in the same line
    return answer.strip("* \t\r"), found.start()

def extract_answer(text):
    r"""Return a response's answer, or None: "3+8\n1\n#1" -> "1"."""
    return find_answer(text)[0]

# To compare answers, `read` takes these stages, shown on x = 2\dfrac12\text{ cm}:
#   SPELLINGS, READ_AS    one spelling for all           x = (2+\frac12) cm
#   NAMED, MEASURED       the parts of each list item    name x, value (2+\frac12), unit cm
#   TOKEN, PRODUCT        the tokens of a value          ( 2 + \frac 1 2 )
#   OPERATORS             `expression` calculates it     2.5
# READ_AS holds pairs from=>to, between blanks, so ~ stands for a blank: by <==>\le~ the sign <= is
# read as \le. Rows of a matrix become tuples: \begin{matrix}1&2\\3&4... -> ((1,2),(3,4))
READ_AS = dict(pair.split("=>") for pair in r"""\left=> \right=> \displaystyle=> °=> \quad=>~
    \dfrac=>\frac \tfrac=>\frac \cfrac=>\frac sqrt=>\sqrt √=>\sqrt~ pi=>\pi π=>\pi~ ²=>^2 **=>^
    −=>- –=>- ‑=>- ×=>* ·=>* \times=>* \cdot=>* million=>*10^6 ±=>\pm~ \leq=>\le ≤=>\le~ <==>\le~
    \geq=>\ge ≥=>\ge~ >==>\ge~ \neq=>\ne \lt=>< \gt=>> ∞=>\infty~ infinity=>\infty &=>, ;=>, or=>,
    and=>, ∪=>, \cup=>, \varnothing=>\emptyset \\=>),( \%=>% percent=>% pct=>%
    seconds=>s""".split())
SPELLINGS = [  # patterns and what replaces them, in this order
    (r"\\(?:text|math|mbox|bold)\w*\s*\{([^{}]*)\}", r" \1 "),  # 5\text{ cm} -> 5 cm
    (r"(?<=\d) ?(?:,\\!|\\,|\{ ?, ?\}) ?(?=\d{3})", ""),  # 1{,}000 -> 1000
    # Each word and sign, as READ_AS spells it: \dfrac -> \frac, × -> *
    (r"\\?[A-Za-z]+|\*\*|[<>]=|\\[%\\]|[^\w .]|[²π]", lambda sign: READ_AS.get(sign[0], sign[0])),
    (r"\\(begin|end)\{\w*matrix\}", lambda end: "((" if end[1] == "begin" else "))"),
    (r"(?:\\[,;:! ()\[\]]|(?<!\\)\$|~|\s)+", " "),  # $x\ y$ -> x y
    (r"^ ?(-?)\\\$(.*?)(?: dollars)?[ .]*$", r"\1\2 dollars"),  # \$5 -> 5 dollars
    (r"(?<![^,])([^,]*)\\pm([^,]*)", r"\1+\2,\1-\2"),  # 1\pm2 -> 1+2,1-2
    (r"(?<![^(\[,=]) *\+", ""),  # +5 -> 5, (+5 -> (5, and likewise after [ , =
    (r"\\[${}]|\^ ?\{?\\circ\}?", ""),  # \{90^\circ\} -> 90
    (r"[. ]+$|^ +|, *(?=,)", ""),  # 1,,2. -> 1,2
    (r"(?<![\w.)}!])(1?\d)!", lambda n: str(math.factorial(int(n[1])))),  # 3! -> 6
    # 1,000 or 1 000 -> 1000, only as a whole answer or after "="
    (r"(?:^|= ?)-?\d{1,3}([ ,])\d{3}(?:\1\d{3})*(?![\d,/])", lambda n: re.sub("[ ,]", "", n[0])),
    (r"(?<![\w.^/)}])(\d+)( ?\\frac ?\{?\d+\}? ?\{?\d+\}?| \d+/\d+)", r"(\1+\2)")]  # 2 1/2 is 2+1/2
# Words that change the value are no units: "5 tenths" is not 5. [eths]* is an ending: th, ths, s
NUMBER_WORD = (r"(?:two|three|four|five|six|seven|eight|nine|ten|dozen|hundred|thousand|\w*illion|"
               r"hal[fv]|third|quarter|time|squared|cubed|plus|minus|more|less|not|wrong)[eths]*\b")
UNIT_WORD = rf"(?:(?!{NUMBER_WORD})[A-Za-z]{{3,}}|[ckm]?m|k?g|[Lsh]|of|sq|ft|in|lb|oz)"
NAME = r"\|?\\?[A-Za-z]+(?:_\w|_\{[^{}]*\})?(?:\([A-Za-z]\))?\|?|\([A-Za-z, ]+\)"  # x_1, f(x), |x|
# "x = 5 cm^2" -> "x", "5 cm^2"; the name is before the last = or \in
NAMED = re.compile(rf"(?:({NAME}) ?(?:=|\\in\b)(?=[^=]*$) *)?(.*)")
# "5 cm^2" -> "5", "cm^2". A unit has a blank before it, except %, cm, km, mm, kg: "5%", "5km/h"
MEASURED = re.compile(r"(.*?)(?:(?:(?<=[\d)}])|(?<=pi)) ?"  # it is behind a digit, a bracket or pi
                      rf"(%|(?:(?<= )|(?=[ckm]m\b|kg)){UNIT_WORD}(?:[ /]{UNIT_WORD})*"
                      r"(?: ?\^ ?\{?[23]\}?)?) *)?")  # its power
TOKEN = re.compile(r"(?a)(?<=frac)\d|(?<=frac )\d|"  # digits of \frac12, one by one
                   r"(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d\d?)?|\\sqrt\[\d+\]|"  # numbers and roots
                   r"(?<![A-Za-z\\])(?!no|on|ln)[a-z](?=[a-z]\b)|"  # xy -> x y, unlike no, on, ln
                   r"\\?[A-Za-z]+|\S")  # words and other signs
# The blanks that mean "times", as in x y, 2 \pi and 2 ( x ), but not in \frac 1 2 or 6 ( 7 )
PRODUCT = (r"(?<=[\w)}])(?<!sqrt|frac)(?<!frac \w) "
           r"(?=[A-Za-z]|\((?! [\d.]+ \))|\\(?:pi|sqrt|frac))")
OPERATORS = {  # how tightly each binds, and how tightly what stands on its right must bind
    "+": (1, 2, operator.add), "-": (1, 2, operator.sub), "*": (2, 3, operator.mul),
    "/": (2, 3, operator.truediv),
    # A letter is a complex number (see `operand`), for which mpf() raises TypeError. So x^(1/2),
    # which has two values, is not calculated, and `value_of` compares it as text
    "^": (4, 4, lambda x, n: (x if REALS.isint(n) else REALS.mpf(x)) ** n)}

def operand(tokens):
    """Take a number, letter, bracket, fraction or root off `tokens`: ["2", "+", "3"] -> 2."""
    token = tokens.pop(0)
    if token == "-":
        return -expression(tokens, 3)  # -2^2 is -(2^2), but -2*3 is (-2)*3
    if token in ("(", "{"):
        value = expression(tokens)
        if tokens.pop(0) not in (")", "}"):
            raise ValueError("a bracket is not closed")
        return value
    if token == r"\frac":
        return operand(tokens) / operand(tokens)
    if token.startswith(r"\sqrt"):
        return REALS.mpf(operand(tokens)) ** (1 / REALS.mpf(token[6:-1] or 2))
    if token == r"\pi":
        return +REALS.pi
    if re.fullmatch("[A-Za-z]", token):  # a fixed complex value: equal polynomials are equal
        rng = random.Random(token)
        return REALS.mpc(rng.uniform(0.7, 1.4), rng.uniform(0.7, 1.4))
    if token[:1] not in set(".0123456789"):
        raise ValueError(f"{token!r} begins no operand")
    return REALS.mpf(token)

def expression(tokens, least=1):
    """Take an expression off `tokens`, up to the first operator that binds less than `least`.

    From 2*3+1 it takes all if `least` is 1, and 2*3 if it is 2.
    """
    value = operand(tokens)
    while OPERATORS.get(tokens[0], [0])[0] >= least:
        _, right, operate = OPERATORS[tokens.pop(0)]
        value = operate(value, expression(tokens, right))
    # Exponents (`least` is 4) stay below 200, others below 1e80, so that 200 digits are right
    largest = 200 if least == 4 else 1e80
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
    r"""Return an answer in a form to compare: "(1,\frac12)" -> "(1.0,0.5)", "No" -> "no"."""
    parts = split_list(text[1:-1])
    if len(parts) > 1 and text[0] in "([" and text[-1] in ")]":
        return text[0] + ",".join(map(value_of, parts)) + text[-1]
    words = " ".join(TOKEN.findall(text))
    tokens = re.sub(PRODUCT, " * ", words).split() + [""]  # "" is the end
    with contextlib.suppress(ValueError, TypeError, ArithmeticError, IndexError, RecursionError):
        value = expression(tokens)
        if tokens == [""]:  # all was read
            return REALS.nstr(REALS.chop(value), 200)
    # No number: compare as text, words in lower case, single letters as they are
    words = re.sub(r"\{ (\S+) \}", r"\1", words)  # \R^{n} is \R^n
    return words.lower() if re.fullmatch("[A-Za-z]{2,}|[A-Za-z]+( [A-Za-z]+)+", words) else words

def read(text, hundredths):
    r"""Return an answer's values, names and units: "x=5 cm" -> (["5.0"], [("x", "5.0")], ["cm"]).

    A percentage counts as hundredths if `hundredths` is set, else as its number.
    """
    for pattern, replacement in SPELLINGS:
        text = re.sub(pattern, replacement, text)
    values, names, units = [], [], set()
    for part in split_list(text):
        name, rest = NAMED.fullmatch(part).groups()
        value, unit = MEASURED.fullmatch(rest).groups()
        values.append(value_of(f"({value})/100" if unit == "%" and hundredths else value))
        if name:
            names.append((name, values[-1]))
        if unit:
            units.add(re.sub(r"[ {}]|(?<=\w)s$", "", unit))  # lbs is lb, but s stays s
    return sorted(values), sorted(names), sorted(units)

def verify(answer, gold):
    """Return whether two answers are equal: "5 cm" is "5" but not "5 kg", "50%" is 50 and 0.5."""
    if answer is None or max(len(answer), len(gold)) > MAX_LENGTH:
        return False
    for hundredths in (False, True):
        values, names, units = read(answer, hundredths)
        gold_values, gold_names, gold_units = read(gold, hundredths)
        names_differ = names and gold_names and names != gold_names
        units_differ = units and gold_units and units != gold_units
        if values == gold_values and not names_differ and not units_differ:
            return re.search(r"\w", str(values)) is not None  # dots alone are no answer
    return False

def pass_at_k(n, c, k):
    """Return the unbiased pass@k of n samples, c of them right. [arXiv 2107.03374]

    It is 1 - C(n-c, k) / C(n, k): the chance that k of them, drawn at random, are not all wrong.
    """
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)

def distinct_n(texts, n):
    """Return how many of the texts' word n-grams are different, as a share of all; 0 if none."""
    grams = []
    for text in texts:
        words = text.split()
        grams += [tuple(words[i:i + n]) for i in range(len(words) - n + 1)]
    return len(set(grams)) / max(1, len(grams))

def problem_metrics(responses, config):
    """Return the metrics of a problem's n responses, whose rewards are set.

    pass@k: the chance that at least one of k responses is right; sound@k likewise. maj@n: whether
    the most frequent answer is right. distinct_1, distinct_4: the share of n-grams that are
    different. distinct_correct: how many different right responses there are.
    """
    n = len(responses)
    right = [t.text for t in responses if t.reward]
    votes = Counter(filter(None, [extract_answer(t.text) for t in responses]))
    winner = max(votes, key=votes.get, default=None)
    metrics = {f"maj@{n}": float(winner in map(extract_answer, right))}  # some right one says it
    texts = [t.text for t in responses]
    metrics |= {"distinct_1": distinct_n(texts, 1), "distinct_4": distinct_n(texts, 4),
                "distinct_correct": len(set(right)), "length": own_tokens(responses) / n}
    kinds = {"pass": right}
    if config.dataset == "chain":
        kinds["sound"] = [text for text in right if is_sound(responses[0].question, text)]
        metrics["distinct_sound"] = len(set(kinds["sound"]))
    for kind, passed in kinds.items():
        for k in sorted({1, 4, 16, n}):
            if k <= n:
                metrics[f"{kind}@{k}"] = pass_at_k(n, len(passed), k)
    return metrics

def evaluate(model, tokenizer, problems, config, file=None):
    """Return greedy accuracy and the mean of `problem_metrics` over problems; write the samples."""
    torch.manual_seed(config.seed + RANK)
    k = config.eval_samples
    greedy = gather(sample(model, tokenizer, shard(problems), config, greedy=True))
    sampled = gather(sample(model, tokenizer, shard(problems) * k, config))
    assign_rewards(greedy + sampled, config)
    sampled.sort(key=lambda t: t.group)
    groups = [sampled[i:i + k] for i in range(0, len(sampled), k)]
    means = pandas.DataFrame([problem_metrics(group, config) for group in groups]).mean().to_dict()
    if file:
        save_lines(file, [{"question": t.question, "answer": t.gold, "response": t.text,
                           "reward": t.reward} for t in sampled])
    return {"greedy": sum(t.reward for t in greedy) / len(greedy)} | means

def pass_rates(trajectories):
    """Return {problem: the mean reward of its responses}."""
    rewards = defaultdict(list)
    for t in trajectories:
        rewards[t.group].append(t.reward)
    return {group: sum(found) / len(found) for group, found in rewards.items()}

def rollout_metrics(trajectories):
    """Return what is logged of a step's responses: shares, counts, and mean entropy per token."""
    trajectories = gather(trajectories)
    count, tokens = len(trajectories), own_tokens(trajectories)
    sums = Counter()
    for t in trajectories:
        sums["reward"] += t.reward
        sums["cut"] += not t.complete
        sums["answered"] += extract_answer(t.text) is not None
        sums["entropy"] += t.entropy[t.start:].sum().item()
    right = {(t.group, t.text) for t in trajectories if t.reward}
    rates = list(pass_rates(trajectories).values())
    return {"reward": sums["reward"] / count, "entropy": sums["entropy"] / tokens,
            "eff_rate": 1 - (rates.count(0) + rates.count(1)) / len(rates),
            "solved": 1 - rates.count(0) / len(rates), "distinct_correct": len(right) / len(rates),
            "cut": sums["cut"] / count, "answered": sums["answered"] / count,
            "tokens_sampled": tokens, "trajectories": count}

def fail(message):
    """End the program with one clear line and exit code 2: for mistakes that a user can mend."""
    print("error:", " ".join(message.split())[:500], file=sys.stderr)
    raise SystemExit(2)

def parse_config(script, argv):
    """Return a Config from flags, which win over a YAML file, which wins over the defaults.

    Only the sections `common` and `script` of the file are read. Ends the program at a mistake.
    """
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
        for name, value in settings.items():  # as flags before the given ones: the last one wins
            values = value if isinstance(value, list) else [value]
            argv = [f"--{name}", *map(str, values)] + argv
    config = parser.parse_args(argv, namespace=Config())
    for option in fields(config):
        low, _, high = option.metadata.get("metavar", "").partition("..")
        value = getattr(config, option.name)
        for number in value if isinstance(value, list) else [value]:
            if low and not float(low) <= number <= float(high or 1e12):  # also catches nan
                fail(f"{option.name} must be from {low} to {high or '1e12'}, not {number}")
    config.check()
    return config

def save_atomically(path, write):
    """Let `write` make a file or folder beside `path`, then rename it: it is never half written.

    End the program with a one-line message if the disk refuses.
    """
    if RANK > 0:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(suffix=".tmp", dir=path.parent) as temporary:
            new = Path(temporary, path.name)
            write(new)
            if path.is_dir():  # a rename replaces a file, but not a folder
                path.replace(Path(temporary, "old"))
            new.replace(path)
    except Exception as e:  # whatever a disk or a library raises
        fail(f"cannot write {path}: {e}")

def save_policy(folder, model, tokenizer):
    """Save the policy and its tokenizer, for `from_pretrained`."""
    def write(new):
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)

    save_atomically(folder, write)

def save_lines(path, rows):
    """Write one line of JSON per row."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    save_atomically(path, lambda new: new.write_text(text, encoding="utf-8"))

def folder_of(config):
    """Return the folder of a run, by default one that names its method, model and seed."""
    return Path(config.out or f"runs/{config.method}-{Path(config.model).name}-{config.seed}")

def load_state(folder, config, parts):
    """Restore the `parts`, {name: module or optimizer}, from state.pt; return what else it holds.

    End the program with a one-line message if it is damaged or was made with other settings.
    """
    may_differ = ("resume", "out", "max_steps", "max_tokens", "save_every", "eval_every",
                  "micro_tokens", "generate_tokens", "recompute")
    try:
        state = torch.load(folder / "state.pt", map_location=DEVICE, weights_only=True)
    except Exception as e:  # whatever a damaged file raises
        fail(f"cannot read {folder / 'state.pt'}: {e!r}")
    for name, value in asdict(config).items():
        if name not in may_differ and state["config"].get(name) != value:
            fail(f"{folder} was made with {name} {state['config'].get(name)!r}, not {value!r}")
    for name, part in parts.items():
        part.load_state_dict(state.pop(name))
    return state

def run_folder(config):
    """Return the folder of the run: a new one, or with --resume the one that is there."""
    folder = folder_of(config)
    if config.resume and not (folder / "state.pt").exists():
        fail(f"there is no run in {folder} to resume: start one without --resume, in a new --out")
    if folder.exists() and not config.resume:
        fail(f"{folder} exists: choose another --out, or go on with --resume")
    save_atomically(folder.parent / ".writable", Path.touch)  # better to fail now than in an hour
    (folder.parent / ".writable").unlink(missing_ok=True)
    return folder

def save_state(folder, state, parts):
    """Write state.pt, all that --resume needs."""
    tensors = {name: part.state_dict() for name, part in parts.items()}
    save_atomically(folder / "state.pt", lambda new: torch.save(state | tensors, new))

def print_machine():
    """Print which device and number format are used, and why a GPU may not be."""
    if DEVICE == "cuda":
        numbers = "bf16 autocast over fp32 weights" if BF16 else "fp32, as the card has no bf16"
        print(f"device: {torch.cuda.get_device_name()}, {numbers}", flush=True)
    else:
        hint = {"win32": "; pip's torch for Windows has no CUDA, pytorch.org has one with it",
                "darwin": "; a Mac's GPU is not used"}.get(sys.platform, "")
        print(f"device: CPU, {torch.get_num_threads()} threads, fp32{hint}", flush=True)

def share_done(steps, tokens, config):
    """Return the share of the run that is done: of its steps or its tokens, whichever is more."""
    return max(steps / config.max_steps, tokens / (config.max_tokens or math.inf))

def print_step(metrics, config, tokens, left):
    """Print the line of a step; left: the seconds that the run will take from here on."""
    budget = f" of {config.max_tokens:,}" if config.max_tokens else ""
    shown = ["reward", "eff_rate", "entropy", "cut", "answered"]
    values = " ".join(f"{name} {metrics[name]:.2f}" for name in shown)
    print(f"step {metrics['step'] + 1} of {config.max_steps}, {tokens:,}{budget} tokens, "
          f"{left / 60:.0f} min left: {values}", flush=True)

def print_response(t):
    """Print a response with its reward, so that one sees what the policy does."""
    text = t.text if len(t.text) <= 400 else t.text[:300] + " ... " + t.text[-100:]
    print(f"  reward {t.reward:.0f} (answer {t.gold}): " + text.replace("\n", "↵"), flush=True)

def print_table(folder, summary):
    """Print results before and after training, and GRPO's with this seed if they are at hand."""
    config = summary["config"]
    table = pandas.DataFrame({"before": summary["before"], "after": summary["after"]})
    # The folder that a run of GRPO with the same model and seed would have beside this one
    grpo = folder.parent / folder_of(Config(**config | {"method": "grpo", "out": ""})).name
    if (grpo / "summary.json").exists() and grpo != folder:
        other = json.loads((grpo / "summary.json").read_text(encoding="utf-8"))
        alike = ("model", "dataset", "eval_dataset", "operands", "habit", "warm_steps", "max_steps",
                 "max_tokens", "max_new_tokens", "prompt", "eval_prompts", "eval_samples")
        if all(other["config"][name] == config[name] for name in alike):
            table["GRPO's"] = pandas.Series(other["after"])
    elif config["method"] != "grpo":
        print(f"\nto compare: run --method grpo --out {grpo}; then --resume this run to see both")
    print(f"\n{table.round(3)}\n\n{in_words(summary)}")
    print(f"{summary['seconds']:.0f} s; everything is in {folder}")

def in_words(summary):
    """Return what the table says, in a sentence of three numbers and what they were before."""
    before, after = summary["before"], summary["after"]
    k = summary["config"]["eval_samples"]
    passed, different = f"pass@{k}", "distinct_correct"
    return (f"{after['pass@1']:.0%} of the responses are right (before: {before['pass@1']:.0%}), "
            f"{after[passed]:.0%} of the problems have a right one\namong {k} (before: "
            f"{before[passed]:.0%}), and a problem has {after[different]:.2f} different right "
            f"responses (before: {before[different]:.2f}).")

def main(argv=None):
    """Run the command line; return the run's summary."""
    config = parse_config(Path(__file__).stem, sys.argv[1:] if argv is None else argv)
    if WORLD > 1 and not torch.distributed.is_initialized():
        if DEVICE == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group()
    if RANK > 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    try:
        if config.show:
            return show(config)
        return train(config)
    except torch.OutOfMemoryError as e:
        fail(f"the GPU's memory is full: lower --micro_tokens if that was in an update, or else "
             f"--generate_tokens, and go on with --resume if there is a checkpoint ({e})")
    except KeyboardInterrupt:
        trains = not config.show
        saved = trains and (folder_of(config) / "state.pt").exists()
        print("interrupted:", "--resume goes on" if saved else "nothing was saved", file=sys.stderr)
        raise

if __name__ == "__main__":
    with contextlib.suppress(AttributeError):  # a notebook's stdout cannot be reconfigured
        sys.stdout.reconfigure(errors="replace")  # a terminal may know no Greek
    try:
        main()
        sys.stdout.flush()
        if WORLD > 1:
            torch.distributed.destroy_process_group()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
