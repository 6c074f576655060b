# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.13", "transformers>=5.23", "datasets", "sympy", "tqdm"]
# ///
"""I²B-LPO: Latent Policy Optimization via Iterative Information Bottleneck (arXiv 2601.05870).

    python iiblpo.py                                         # a tiny policy, on a laptop
    python iiblpo.py --method grpo                           # a baseline; every setting is a flag
    python iiblpo.py --model Qwen2.5-0.5B --out runs/qwen    # a real model, on one GPU

Left out: vLLM, sharding, rewards other than right or wrong. Unlike in the released code,
latents learn through the policy that they steer, and pseudo self-attention is the paper's.

Marks: [P] the paper, [C] the released code, [O] our own choice; others name a source. Shapes: B
rows, T response tokens, V vocabulary, H width, Z latent dimensions. Entropies, ln π are in nats.
"""
import contextlib
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
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

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
    method: Literal["iiblpo", "grpo", "dapo", "entropy_reg"] = setting("iiblpo", "or a baseline")
    max_steps: int = setting(200, "training steps")
    max_tokens: int = setting(0, "stop when so many tokens have been sampled; 0: never")
    seed: int = setting(0, "of problems and sampling")
    out: str = setting("", "the run's folder (runs/METHOD-SEED)")
    resume: bool = setting(False, "go on from the run's last checkpoint")
    save_every: int = setting(50, "steps between checkpoints")
    show: bool = setting(False, "do not train: print how a problem is explored")
    probe_heads: bool = setting(False, "do not train: which attention heads know difficulty")
    # problems
    dataset: str = setting("gsm8k", "gsm8k, math, chain, or a .jsonl, .json or .parquet file")
    prompt: str = setting("{question}\nReason step by step and put your final answer within "
                          "\\boxed{}.", "what the policy is asked")
    operands: list[int] = HfArg(default_factory=[4, 7].copy, help="chain: fewest and most digits")
    habit: float = setting(0.75, "chain: share of lines that do the leftmost operator by habit")
    warm_steps: int = setting(1000, "tiny: supervised steps before RL")
    # rollout
    prompts_per_step: int = setting(16, "prompts a step")
    rollouts: int = setting(8, "responses a prompt of the baselines, and everyone's budget")
    max_new_tokens: int = setting(1024, "longest response")
    generate_tokens: int = setting(131072, "rows x (prompt + tokens to come, no prefix) of a call")
    # stage 1: branching
    initial: int = setting(2, "M: rollouts a prompt before branching")
    branches: int = setting(3, "K: branches of each rollout")
    branch_mode: Literal["psa", "random"] = setting("psa", "random: same places, no latents")
    top_frac: float = setting(0.05, "rho: share of tokens, by entropy, to branch at")
    psa_layers: int = setting(4, "how many of the last layers see the latent; 0: all")
    psa_gamma: float = setting(1.0, "gamma: strength of the latent at the start")
    psa_decay_steps: int = setting(200, "steps in which gamma falls to 0; 0: it stays")
    psa_halflife: float = setting(0.0, "tokens that halve the norm's modulation; 0: it stays")
    z_dim: int = setting(128, "dimensions of the latent")
    cvae_pairs: int = setting(512, "most continuations that the latents learn from")
    cvae_steps: int = setting(200, "training steps of the latents")
    cvae_refresh: int = setting(0, "train them again every so many steps; 0: frozen")
    # stage 2: information bottleneck
    keep: int = setting(3, "N: branches kept of a prompt; 0: all")
    beta: float = setting(1.0, "beta: weight of the answer gain in S_IB")
    ib_rounds: int = setting(1, "times that stages 1 and 2 are gone through")
    kappa: float = setting(0.005, "kappa: weight of the IB self-reward")
    # update
    lr: float = setting(1e-6, "AdamW's learning rate")
    updates_per_step: int = setting(1, "steps a batch; at 1 only steered branches are clipped")
    clip_low: float = setting(0.2, "the ratio is clipped to [1 - clip_low, ...")
    clip_high: float = setting(0.2, "... 1 + clip_high]; dapo: at least 0.28")
    entropy_bonus: float = setting(0.003, "entropy_reg: weight of the entropy")
    max_grad_norm: float = setting(1.0, "gradients are clipped to this norm")
    micro_tokens: int = setting(4096, "rows x columns of one training pass")
    # evaluation
    eval_prompts: int = setting(256, "held-out problems")
    eval_samples: int = setting(16, "responses a problem: the k of pass@k and maj@k")
    eval_every: int = setting(0, "steps between further evaluations; 0: before and after only")

    MAY_BE_0 = ["max_tokens", "seed", "eval_every", "psa_layers", "psa_decay_steps",
                "cvae_refresh", "keep"]  # other integers may not
    SHARES = ["habit", "top_frac", "clip_low"]  # 1 at most

    def check(self):
        """What the method implies, and what else must hold."""
        if self.method == "dapo":
            self.clip_high = max(0.28, self.clip_high)  # clip-higher
        if self.method == "iiblpo" and self.rollouts <= self.initial:
            fail("initial must be below rollouts: branches get the rest of them")


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


# ==== Stage 1: entropy-driven latent branching
#   [P] token entropy          H_t = -Σ_v p_t(v) ln p_t(v)
#   [P] where it hesitates     Ω = the top ρ of a response's positions by H_t,  t* ~ Uniform(Ω)
#   [P] a latent a branch      c = (q, o_<t*),  z_1 ... z_K ~ p_ψ(z | c)
#   [P] pseudo self-attention  K' = [γ W_K z ; K],  V' = [γ W_V z ; V],  w' = w + γ W_N z
# w: an input norm's weights. o_t* is decided again: H_t* is the entropy of its choice [O, not C].

def branch_positions(entropy, mask, top_frac, generator=None):
    """t* of each response, [B], from the floor(ρ n) >= 1 positions of highest entropy [B, T].

    EOS is one of the n candidates, the first token is not [C]; without any, t* = 0.
    """
    positions = torch.zeros(len(entropy), dtype=torch.long)
    for row in range(len(entropy)):
        candidates = mask[row].nonzero().squeeze(1)[1:]
        if len(candidates) > 0:
            size = max(1, int(top_frac * len(candidates) + 1e-9))  # 0.29 * 100 is 28.99...
            omega = candidates[entropy[row, candidates].topk(size).indices]
            positions[row] = omega[torch.randint(size, (1,), generator=generator)]
    return positions

def prefixes_to_branch(parents, config):
    """The prefix c = (q, o_<t*) of each response."""
    entropy = pad([t.entropy for t in parents], padding_value=-1)
    positions = branch_positions(entropy, entropy > -1, config.top_frac).tolist()
    return [replace(t, response=t.response[:n], logps=t.logps[:n], entropy=t.entropy[:n], start=n)
            for t, n in zip(parents, positions)]

class LatentCVAE(torch.nn.Module):
    """Prior p_ψ(z | c) and posterior q_φ(z | c, o_>=t*): three-layer MLPs, diagonal Gaussians. [C]

    They see e(c) and e(o_>=t*), [B, H], the policy's mean last hidden states, standardised [O] (the
    authors use a DeBERTa encoder). The decoder is the policy itself, see `latent_loss`.
    """

    def __init__(self, width, z_dim):
        super().__init__()
        self.prior_net = self.three_layers(width, 2 * z_dim)
        self.posterior_net = self.three_layers(2 * width, 2 * z_dim)

    def three_layers(self, n_in, n_out, hidden=256):
        return torch.nn.Sequential(
            torch.nn.LayerNorm(n_in), torch.nn.Linear(n_in, hidden), torch.nn.SiLU(),
            torch.nn.Linear(hidden, hidden), torch.nn.SiLU(), torch.nn.Linear(hidden, n_out))

    def gaussian(self, parameters):
        mean, logvar = parameters.chunk(2, -1)
        return torch.distributions.Normal(mean, (logvar.clamp(-8, 8) / 2).exp())

    def prior(self, prefix):
        """p_ψ(z | c), a Normal over [B, Z]."""
        return self.gaussian(self.prior_net(prefix))

    def posterior(self, prefix, continuation):
        """q_φ(z | c, o_>=t*), a Normal over [B, Z]."""
        return self.gaussian(self.posterior_net(torch.cat([prefix, continuation], -1)))

    def sample(self, prefix, k):
        """k latents of each prefix from the prior, [B, k, Z]."""
        return self.prior(prefix).sample((k,)).transpose(0, 1)

class PseudoSelfAttention(torch.nn.Module):
    """PSA: z enters the last layers as one more key and value, and through their input norms. [P]

    The hooks stay on `model` but do nothing outside a `with psa.steer(...)` block. The slot stands
    at RoPE position 0, where rotation does nothing. A row's latent is `born` in the column whose
    state produces o_t*, and seen by columns of age = column - born >= 0. It takes attention at any
    γ > 0 and is gone at 0.
    """

    def __init__(self, model, config):
        super().__init__()
        layers = model.base_model.layers[-config.psa_layers:]  # [-0:] is all of them
        heads, head_dim = model.config.num_key_value_heads, layers[0].self_attn.head_dim
        self.shape = (len(layers), heads, 1, head_dim)
        width = len(layers) * model.config.hidden_size
        self.to_key = torch.nn.Linear(config.z_dim, math.prod(self.shape), bias=False)  # W_K
        self.to_value = torch.nn.Linear(config.z_dim, math.prod(self.shape), bias=False)  # W_V
        self.to_norm = torch.nn.Linear(config.z_dim, width, bias=False)  # W_N
        for weight in self.parameters():
            torch.nn.init.normal_(weight, std=0.01)  # [C]
        self.gamma, self.halflife = config.psa_gamma, config.psa_halflife or math.inf
        self.steering = False
        model.set_attn_implementation("psa")
        model.get_input_embeddings().register_forward_hook(self.count_columns)
        for i, layer in enumerate(layers):
            layer.self_attn.psa = (self, i)  # in a tuple, so that it is no part of the policy
            layer.input_layernorm.register_forward_hook(functools.partial(self.modulate, i))

    @contextlib.contextmanager
    def steer(self, z, born):
        """Within the block, row i of what the model runs is steered by z[i] from column born[i] on.

        z: [B, Z], born: [B]. With γ = 0 the model is exactly what it was.
        """
        z = self.gamma * z
        self.keys = self.to_key(z).view(len(z), *self.shape)
        self.values = self.to_value(z).view(len(z), *self.shape)
        self.changes = self.to_norm(z).view(len(z), self.shape[0], 1, -1)
        self.born = born[:, None]
        self.columns = 0  # that the model has run since the block began
        self.steering = self.gamma > 0
        try:
            yield
        finally:
            self.steering = False

    def count_columns(self, embedding, args, output):
        """Before the layers run: the ages [B, Q] of the Q columns whose tokens are embedded.

        `generate` runs a prompt's columns first, and then one column per call. Counting them needs
        no argument of the model, whose names change between releases of transformers.
        """
        if self.steering:
            Q = output.shape[1]
            self.age = torch.arange(self.columns, self.columns + Q, device=DEVICE) - self.born
            self.columns += Q

    def modulate(self, i, norm, args, output):
        """After layer i's input norm: w x̂ + δ x̂ = (w + δ) x̂, δ = γ W_N z, which may fade. [P]"""
        if not self.steering:
            return output
        x = args[0]
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)
        strength = (self.age >= 0) * 0.5 ** (self.age.clamp(min=0) / self.halflife)
        return output + strength[..., None] * self.changes[:, i] * x

def psa_attention(module, query, key, value, attention_mask, **kwargs):
    """The usual attention, with the latent's slot, if there is one, before keys and values.

    query: [B, heads, Q, D]; key, value: [B, KV, K, D]; attention_mask: bool [B, 1, Q, K] or None.
    """
    psa, i = getattr(module, "psa", (None, None))
    if psa and psa.steering:
        B, Q, K = len(query), query.shape[2], key.shape[2]
        if attention_mask is None:  # transformers leaves out a mask that is merely causal
            attention_mask = torch.ones(Q, K, dtype=torch.bool, device=DEVICE).tril(K - Q)
        slot_mask = (psa.age >= 0)[:, None, :, None]
        attention_mask = torch.cat([slot_mask, attention_mask.expand(B, 1, Q, K)], -1)
        key = torch.cat([psa.keys[:, i].to(key.dtype), key], 2)
        value = torch.cat([psa.values[:, i].to(value.dtype), value], 2)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

transformers.AttentionInterface.register("psa", psa_attention)
transformers.AttentionMaskInterface.register("psa", sdpa_mask)

def psa_gamma(step, config):
    """γ at a training step: it falls linearly to 0. [P]"""
    return config.psa_gamma * max(0.0, 1 - step / (config.psa_decay_steps or math.inf))

def latent_loss(model, latents, batch, prefix, continuation, above):
    """-Σ_t>=t* ln π(o_t | q, o_<t, z) + KL(q_φ || p_ψ) / 2, z ~ q_φ, mean over rows; the KL only of
    dimensions that are `above` [Z] what is free. The decoder is the frozen policy, steered by z
    [O]: latents that decode into a feature [C] were measured to do nothing to what it says.

    prefix, continuation: [B, H]. Also returns ln π of the rows [B] and the KL [Z].
    """
    cvae, psa = latents
    prior, posterior = cvae.prior(prefix), cvae.posterior(prefix, continuation)
    P = max(len(t.prompt) for t in batch)
    born = torch.tensor([P + t.start - 1 for t in batch], device=DEVICE)  # its state gives o_t*
    with psa.steer(posterior.rsample(), born):
        logp, _, mask = token_logps(model, batch)
    logp = (logp * mask).sum(1)
    kl = torch.distributions.kl_divergence(posterior, prior).mean(0)
    return 0.5 * kl[above].sum() - logp.mean(), logp, kl

def alternatives(model, tokenizer, problems, config):
    """What the latents learn from: continuations from t*, after each of the 4 likeliest tokens
    there with p > 0.01, so that rare next tokens count as much as usual ones [O]; and how many
    tokens were sampled for it.
    """
    begun = []
    eos = model.generation_config.eos_token_id
    parents = sample(model, tokenizer, problems, config)
    for t in prefixes_to_branch(parents, config):
        ids = torch.tensor([t.prompt + t.response], device=DEVICE)
        with torch.no_grad(), autocast():
            p = model(ids, logits_to_keep=1).logits[0, -1].float().softmax(-1)
        for token in p.topk(4).indices.tolist():
            goes_on = token not in eos and t.start + 1 < config.max_new_tokens
            if goes_on and p[token] > 0.01:
                begun.append(replace(t, response=t.response + [token]))  # not in logps
    pairs = sample(model, tokenizer, begun[:math.ceil(config.cvae_pairs / WORLD)], config)
    tokens = own_tokens(parents) + own_tokens(pairs)
    return [replace(t, start=t.start - 1) for t in pairs], tokens  # the forced token is part of it

@torch.no_grad()
def branch(model, tokenizer, latents, parents, config, budget=math.inf):
    """K branches from t* of every parent, each with a latent of its own.

    latents: (cvae, psa), or [] for the same places without latents. Every parent's first branch
    comes before any second one, until `budget` is spent, were each to end where its parent ends.
    """
    prefixes = prefixes_to_branch(parents, config)
    begun = []
    for prefix, parent in zip(prefixes * config.branches, parents * config.branches):
        budget -= len(parent.response) - prefix.start
        if budget >= 0:
            begun.append(prefix)
    if not latents:
        return sample(model, tokenizer, begun, config)
    cvae, psa = latents
    z = cvae.sample(features(model, prefixes, config)[0], config.branches)
    z = z.transpose(0, 1).flatten(0, 1)[:len(begun)]  # in the order of `begun`

    def steer(rows, column):  # generation goes on behind `column`, the last one of each prefix
        return psa.steer(z[rows], torch.full((len(rows),), column, device=DEVICE))

    return sample(model, tokenizer, begun, config, steer=steer)

# ==== Stage 2: information-bottleneck filter and self-reward
#   [P] S_IB(r) = β Î(r; a*) - Î(q; r), of a whole response r
#   [O] Î(r; a*) = (ln π(a* | q, r̄, cue) - ln π(a* | q, cue)) / |a*|, r̄: r before its answer
#   [O] Î(q; r) = Ĥ(r) / mean of Ĥ over the prompt's responses, Ĥ(r) = Σ_t H_t
#   [C] self-reward: κ mean_t(A H_t), as in [arXiv 2507.18391]; A: the advantage, below

@torch.no_grad()
def answer_gain(model, tokenizer, trajectories, config):
    """Î(r; a*), [B], by the policy without latents."""
    cue = "#"  # what opens an answer
    if "####" in config.prompt:
        cue = "#### "
    if "\\boxed" in config.prompt:
        cue = "\\boxed{"
    probes = []
    for t in trajectories:
        answer = tokenizer(t.gold, add_special_tokens=False).input_ids
        before = re.split(r"\\f?box|####|" + re.escape(cue), t.text)[0]  # its answer cut
        for said in (before, ""):
            given = tokenizer(said + cue, add_special_tokens=False).input_ids
            probes.append(Trajectory(t.prompt, response=given + answer, start=len(given)))
    means = torch.zeros(len(probes))
    for rows in micro_batches([len(t) for t in probes], config.micro_tokens):
        logp, _, mask = token_logps(model, [probes[row] for row in rows])
        means[rows] = ((logp * mask).sum(1) / mask.sum(1)).cpu()
    return means[0::2] - means[1::2]  # with what the response says before, and without

def trajectory_ib_score(answer_gain, entropy, mask, groups, beta):
    """S_IB, [B]; answer_gain, groups: [B], entropy, mask: [B, T]."""
    H = (entropy * mask).sum(1)
    mean = torch.zeros(len(H))
    for g in groups.unique():
        mean[groups == g] = H[groups == g].mean()
    return beta * answer_gain - H / mean.clamp(min=1e-9)

def select_top_n(scores, rewards, lengths, groups, n, always):
    """Indices, in order, of what is kept: in each group the n highest scores (ties: the shorter),
    and all that `always` marks, not counted in n. All arguments: [B].

    Were all kept of one reward, the last gives way to the best of another [O].
    """
    kept = []
    for g in groups.unique():
        members = (groups == g).nonzero().squeeze(1).tolist()
        fixed = [i for i in members if always[i]]
        ranked = [i for i in members if not always[i]]
        ranked.sort(key=lambda i: (-float(scores[i]), int(lengths[i])))
        chosen = ranked[:n]
        found = {float(rewards[i]) for i in fixed + chosen}
        missing = [i for i in ranked[n:] if float(rewards[i]) not in found]
        if len(found) == 1 and missing and len(fixed + chosen) > 1:
            chosen[-1] = missing[0]
        kept += fixed + chosen
    return sorted(kept)

def ib_self_reward(entropy, advantages, mask):
    """mean_t(A H_t), with a gradient through H_t; entropy, mask: [B, T], advantages: [B]. [C]"""
    return (advantages[:, None] * entropy * mask).sum() / mask.sum()

def ib_scores(model, tokenizer, candidates, config):
    """S_IB of all candidates, [B]."""
    gain = answer_gain(model, tokenizer, candidates, config)
    entropy = pad([t.entropy for t in candidates])  # 0 behind a response's end
    groups = torch.tensor([t.group for t in candidates])
    return trajectory_ib_score(gain, entropy, torch.ones_like(entropy), groups, config.beta)

def explore(model, tokenizer, latents, problems, config):
    """Stages 1 and 2 on a batch of problems: (all candidates, those kept).

    At most as many tokens are expected as `rollouts` such responses would have [O].
    """
    candidates = sample(model, tokenizer, problems * config.initial, config)
    initial, kept = len(candidates), candidates
    budget = own_tokens(candidates) * (config.rollouts / config.initial - 1)
    for rounds_left in range(config.ib_rounds, 0, -1):
        branches = branch(model, tokenizer, latents, kept, config, budget / rounds_left)
        budget -= own_tokens(branches)
        candidates = candidates + branches
        judge(candidates, config)
        kept = candidates
        if config.keep > 0:  # else all are kept, and none needs a score
            scores = ib_scores(model, tokenizer, candidates, config)
            rewards = [t.reward for t in candidates]
            lengths = [len(t.response) for t in candidates]
            groups = torch.tensor([t.group for t in candidates])
            always = [i < initial for i in range(len(candidates))]
            chosen = select_top_n(scores, rewards, lengths, groups, config.keep, always)
            kept = [candidates[i] for i in chosen]
    return candidates, kept

# ==== Update
#   [GRPO, O]     A = n/k (R - mean) / (std + 1e-4)
#   [O]           r_t = π_θ(o_t | q, o_<t) / π_old(o_t | q, o_<t, z)
#   [GRPO, O, C]  L = -mean_t min(min(r_t, 3) A, clip(r_t) A) - κ mean_t(A H_t)
# mean, std: of all candidates of a prompt; n of them have reward R, k of these are kept.
# r_t: the bare policy over the one that sampled, so that what latents find goes into the policy.

def group_advantages(rewards, groups, eps=1e-4):
    """(R - mean) / (std + eps) over the responses to the same prompt; all [B]. [GRPO]

    The standard deviation is the population's, so that a group of one has advantage 0 [O].
    """
    advantages = torch.zeros_like(rewards)
    for g in groups.unique():
        own = rewards[groups == g]
        advantages[groups == g] = (own - own.mean()) / (own.std(correction=0) + eps)
    return advantages

def set_advantages(candidates, kept):
    """Write advantages, relative to all candidates of a prompt, into the trajectories.

    The filter looks at a*, so that among wrong responses it keeps near misses, and what it drops
    would never be punished: those kept of a reward get the weight of all that had it [O].
    """
    rewards = torch.tensor([t.reward for t in candidates])
    groups = torch.tensor([t.group for t in candidates])
    for t, advantage in zip(candidates, group_advantages(rewards, groups).tolist()):
        t.advantage = advantage
    sampled = Counter((t.group, t.reward) for t in candidates)
    left = Counter((t.group, t.reward) for t in kept)
    for t in kept:
        t.advantage *= sampled[t.group, t.reward] / left[t.group, t.reward]

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

def update(model, optimizer, batch, config):
    """`updates_per_step` optimizer steps on a batch; returns statistics, means over its tokens.

    A branch is trained from t* on, its prefix belongs to its parent [C]. Rows of advantage 0 are
    skipped, in the mean too, unless they have a bonus [O]. Micro-batches and processes add up.
    """
    if config.method != "entropy_reg":
        batch = [t for t in batch if t.advantage != 0]
    stats, log_weights, norm = Counter(loss=0, tokens_trained=0), [], 0.0
    for i in range(config.updates_per_step):
        part = batch[i::config.updates_per_step]
        tokens = sum(gather([own_tokens(part)]))
        for rows in micro_batches([len(t) for t in part], config.micro_tokens):
            micro = [part[row] for row in rows]
            logp, entropy, mask = token_logps(model, micro)
            old = pad([t.logps for t in micro]).to(DEVICE)
            advantages = torch.tensor([t.advantage for t in micro], device=DEVICE)
            loss, found = policy_loss(logp, old, advantages, mask, config)
            if config.method == "iiblpo":
                loss = loss - config.kappa * ib_self_reward(entropy, advantages, mask)
            if config.method == "entropy_reg":
                loss = loss - config.entropy_bonus * (entropy * mask).sum() / mask.sum()
            share_of_tokens = mask.sum() / tokens
            (share_of_tokens * loss).backward()
            for name, value in {"loss": loss, **found}.items():
                stats[name] += (share_of_tokens * value).item() / config.updates_per_step
            stats["tokens_trained"] += mask.sum().item()
            log_weight = ((logp - old) * mask).sum(1).tolist()
            log_weights += [w for w, t in zip(log_weight, micro) if t.start > 0]
        if tokens > 0:
            norm = take_step(model, optimizer, config)
    total = pandas.DataFrame(gather([stats])).sum().to_dict()
    weights = torch.tensor(gather(log_weights) or [0.0]).softmax(0)
    effective = 1 / weights.square().sum().item()  # sample size of the branches, by their weights
    return {**total, "grad_norm": norm, "branch_ess": effective / len(weights)}

# ==== The training step

def training_step(model, tokenizer, optimizer, latents, problems, config, step):
    """One step of the method, or of a baseline; returns its line of metrics.jsonl."""
    # 1. random numbers of the step's own, so that a resumed run has the very same ones
    rng = random.Random(f"{config.seed} {step}")
    torch.manual_seed(rng.getrandbits(62) + RANK)
    shuffled = rng.sample(problems, len(problems))
    metrics = {}

    # 2. the latents learn the policy's alternatives, once or every `cvae_refresh` steps, and fade
    if latents:
        if step == 0 or (config.cvae_refresh and step % config.cvae_refresh == 0):
            metrics = train_latents(model, tokenizer, latents, shuffled, config)
        latents[1].gamma = psa_gamma(step, config)

    # 3. roll out, branch where the policy hesitates, keep what is informative and short
    began = time.time()
    if config.method == "iiblpo":
        batch = share(shuffled[:config.prompts_per_step])
        candidates, kept = explore(model, tokenizer, latents, batch, config)
        set_advantages(candidates, kept)
    else:
        candidates, kept = baseline_rollouts(model, tokenizer, shuffled, config)
        set_advantages(candidates, candidates)  # none gets more weight for what dapo drops

    # 4. policy gradient of the bare policy
    explored = time.time()
    metrics |= update(model, optimizer, kept, config)

    # 5. log
    metrics |= {"rollout_s": explored - began, "update_s": time.time() - explored}
    metrics = rollout_metrics(candidates) | metrics
    metrics["tokens_sampled"] += metrics.get("latent_tokens", 0)  # all tokens count
    return metrics


# ====
# What only I²B-LPO needs

def prepare(model, config):
    """What is trained besides the policy: (cvae, psa), seeded, or nothing without latents."""
    torch.manual_seed(config.seed)
    if config.method != "iiblpo" or config.branch_mode == "random":
        return torch.nn.ModuleList()
    norm = dict(model.base_model.named_modules()).get("layers.0.input_layernorm")
    if not hasattr(norm, "variance_epsilon"):
        fail(f"latents need layers with RMSNorm (as of Qwen2, Qwen3 or Llama), which "
             f"{type(model).__name__} has not; --branch_mode random and baselines take it")
    cvae = LatentCVAE(model.config.hidden_size, config.z_dim)
    return torch.nn.ModuleList([cvae, PseudoSelfAttention(model, config)]).to(DEVICE)

def train_latents(model, tokenizer, latents, problems, config):
    """Train prior, posterior and PSA on the policy's alternatives; a report on the last batch."""
    cvae, psa = latents
    psa.gamma = config.psa_gamma
    problems = share(problems[:WORLD + config.cvae_pairs // 2])
    pairs, tokens = alternatives(model, tokenizer, problems, config)
    pairs, tokens = gather(pairs), sum(gather([tokens]))
    if not pairs:
        return {"latent_tokens": tokens}
    states = features(model, pairs, config)
    optimizer = torch.optim.AdamW(latents.parameters(), lr=0.003)
    model.requires_grad_(False)
    for _ in tqdm(range(config.cvae_steps), "latents", disable=RANK > 0 or None):
        drawn = torch.randperm(len(pairs))[:32]
        with torch.no_grad():  # 0.5 nats a dimension are free, in the mean of all drawn
            posterior, prior = cvae.posterior(*states[:, drawn]), cvae.prior(states[0, drawn])
            above = torch.distributions.kl_divergence(posterior, prior).mean(0) > 0.5
        for rows in micro_batches([len(pairs[i]) for i in drawn], config.micro_tokens):
            chosen = drawn[rows]
            batch = [pairs[i] for i in chosen]
            loss, logp, kl = latent_loss(model, latents, batch, *states[:, chosen], above)
            (loss * len(rows) / len(drawn)).backward()
        torch.nn.utils.clip_grad_norm_(latents.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    model.requires_grad_(True)
    if WORLD > 1:
        for weight in latents.parameters():
            torch.distributed.broadcast(weight.data, 0)  # the first process's for all
    with torch.no_grad():
        bare, _, mask = token_logps(model, batch)
    return {"z_gain": (logp - (bare * mask).sum(1)).mean().item(), "kl": kl.sum().item(),
            "active_dims": (kl > 0.01).sum().item(), "latent_tokens": tokens}

def last_states(model, batch):
    """Last hidden states [B, P + T, H] of whole trajectories, their token ids [B, P + T], and P.

    Prompts are padded on the left, responses on the right, both with -1: column P + t is token t of
    every row.
    """
    P = max(len(t.prompt) for t in batch)
    rows = [[-1] * (P - len(t.prompt)) + t.prompt + t.response for t in batch]
    ids = pad([torch.tensor(row) for row in rows], padding_value=-1).to(DEVICE)
    mask = (ids >= 0).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with autocast():
        states = model.base_model(input_ids=ids.clamp(min=0), attention_mask=mask,
                                  position_ids=positions, use_cache=False).last_hidden_state
    return states, ids, P

def token_logps(model, batch):
    """ln π(o_t) and H_t of trajectories' own tokens, and their mask: three [B, T] tensors."""
    states, ids, P = last_states(model, batch)
    tokens = ids[:, P:]
    begin = torch.tensor([t.start for t in batch], device=DEVICE)[:, None]
    mask = (tokens >= 0) & (torch.arange(tokens.shape[1], device=DEVICE) >= begin)
    with autocast():
        flat = score(model, states[:, P - 1:-1][mask], tokens[mask])
    logp, entropy = torch.zeros(2, *mask.shape, device=DEVICE).masked_scatter(mask, flat)
    return logp, entropy, mask

@torch.no_grad()
def features(model, batch, config):
    """e(c) and e(o_>=t*): mean last hidden states of prefixes and continuations, two [B, H]."""
    e = torch.zeros(2, len(batch), model.config.hidden_size, device=DEVICE)
    for rows in micro_batches([len(t) for t in batch], config.micro_tokens):
        states, _, P = last_states(model, [batch[row] for row in rows])
        for row, h in zip(rows, states.float()):
            t = batch[row]
            e[0, row] = h[P - len(t.prompt):P + t.start].mean(0)
            e[1, row] = h[P + t.start:P + len(t.response)].mean(0)  # nan, unused, of a bare prefix
    return e

def baseline_rollouts(model, tokenizer, shuffled, config):
    """(all, those to train on): `rollouts` responses to each of the first problems of `shuffled`.

    dapo replaces, up to twice, problems whose rewards are all equal (so that their advantages are
    0), and leaves out what was cut at the length limit.
    """
    dapo = config.method == "dapo"
    missing = wanted = len(share(shuffled[:config.prompts_per_step]))
    waiting, candidates = share(shuffled[:3 * config.prompts_per_step]), []
    for _ in range(3 if dapo else 1):
        new = sample(model, tokenizer, waiting[:missing] * config.rollouts, config)
        judge(new, config)
        candidates += new
        waiting = waiting[missing:]
        found = {(t.group, t.reward) for t in candidates}  # a problem of both is there twice
        mixed = len(found) - len({t.group for t in candidates})
        missing = wanted - mixed
    return candidates, [t for t in candidates if t.complete or not dapo]

def show(config):
    """Print how a held-out problem is explored; after a run, with --model RUN/model."""
    model, tokenizer = load_policy(config)
    problems, heldout = [encode(side, model, tokenizer, config) for side in load_problems(config)]
    latents = prepare(model, config)
    if latents:
        print(train_latents(model, tokenizer, latents, problems, config))
    problem = heldout[config.seed % len(heldout)]
    candidates, kept = explore(model, tokenizer, latents, [problem], config)
    scores = ib_scores(model, tokenizer, candidates, config)
    print(f"{problem.question}  answer {problem.gold}; ▸ is t*")
    for t, s in zip(candidates, scores.tolist()):
        fate = "kept" if t in kept else "dropped"
        print(f"\nreward {t.reward:.0f}, Ĥ {t.entropy.sum():.2f}, S_IB {s:+.2f}, {fate}:")
        print(tokenizer.decode(t.response[:t.start]) + "▸" + tokenizer.decode(t.response[t.start:]))
    return candidates

# Difficulty-sensitive attention heads [P]: a prompt's difficulty is 1 - its pass rate. A ridge
# probe predicts it from a head's output at the prompt's last token; the head's score is the
# Spearman correlation of the two on prompts that the probe has not seen.

@torch.no_grad()
def head_outputs(model, problems):
    """Each head's output at the last prompt token, before the projection: [B, layers, heads, D]."""
    seen, hooks = [], []
    for name, module in model.named_modules():
        if name.endswith("self_attn.o_proj"):
            hooks.append(module.register_forward_pre_hook(
                lambda module, args: seen.append(args[0][0, -1].double().cpu())))
    if not hooks:
        fail(f"--probe_heads needs layers with self_attn.o_proj, unlike {type(model).__name__}")
    for t in problems:
        model.base_model(torch.tensor([t.prompt], device=DEVICE))
    for hook in hooks:
        hook.remove()
    return torch.stack(seen).view(len(problems), len(hooks), model.config.num_attention_heads, -1)

def ridge_probe(x, y, x_new):
    """Predictions [m] for x_new [m, D] of a ridge regression of y [n] on standardised x [n, D]."""
    mean, scale = x.mean(0), x.std(0) + 1e-6
    x, x_new = (x - mean) / scale, (x_new - mean) / scale
    penalty = 0.1 * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
    return y.mean() + x_new @ torch.linalg.solve(x.T @ x + penalty, x.T @ (y - y.mean()))

def probe_heads(config):
    """Score the attention heads of a policy; print and save."""
    model, tokenizer = load_policy(config)
    problems = encode(load_problems(config)[1], model, tokenizer, config)
    if len(problems) < 4:
        fail("--probe_heads needs 4 problems at least: more --eval_prompts")
    outputs, half = head_outputs(model, problems), len(problems) // 2
    torch.manual_seed(config.seed)
    responses = sample(model, tokenizer, problems * config.eval_samples, config)
    judge(responses, config)
    rewards = torch.tensor([t.reward for t in responses], dtype=torch.double)
    difficulty = 1 - rewards.view(-1, len(problems)).mean(0)
    predicted = {}
    for layer in range(outputs.shape[1]):
        for head in range(outputs.shape[2]):
            x = outputs[:, layer, head]
            predicted[layer, head] = ridge_probe(x[:half], difficulty[:half], x[half:]).numpy()
    ranks = pandas.DataFrame(predicted).rename_axis(columns=["layer", "head"]).rank()
    scores = ranks.corrwith(pandas.Series(difficulty[half:]).rank()).fillna(0)  # 0: all are equal
    print(f"mean difficulty {difficulty.mean():.2f}\n{scores.unstack().round(2)}")
    print(f"best heads\n{scores.nlargest(5).round(2)}")
    report = {"scores": scores.unstack().values.tolist(), "difficulty": difficulty.tolist()}
    save_lines(Path(config.out or "runs", "heads.json"), [report])
    return report


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
    if config.probe_heads:
        return probe_heads(config)
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
