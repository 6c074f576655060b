# /// script
# requires-python = ">=3.10"
# dependencies = ["torch==2.13.0", "transformers==5.24.0", "datasets", "sympy", "tqdm"]
# ///
"""I²B-LPO: Latent Policy Optimization via Iterative Information Bottleneck (arXiv 2601.05870).

    python iiblpo.py                          # a tiny policy, on a laptop
    python iiblpo.py --method grpo            # the same policy, by the GRPO baseline
    python iiblpo.py --model Qwen2.5-0.5B     # a real model, on one GPU

Every field of `Config` is a flag. A `training_step` does this:
1. Sample M rollouts per prompt, and record each token's entropy H_t: `sample`, `token_entropy`.
2. Branch each rollout up to K times at a token where the policy was uncertain. Each branch has a
   latent, which enters by pseudo self-attention: `branch`, `LatentCVAE`, `PseudoSelfAttention`.
3. Score each response by what it tells about the answer, minus what it carries over from the
   prompt, and filter the branches by this score: `trajectory_ib_score`, `select_top_n`.
4. Compare the rewards of all responses to the same prompt: `group_advantages`.
5. Update the policy, without latents, by GRPO's loss and the IB self-reward: `update`.

The sections, in order:
    Config. Trajectory. Stage 1, branching. Stage 2, the information bottleneck. The update. The
    training step. The run
    The latents' training; log-probabilities; the baselines; --show and --probe_heads
    Supporting code, repeated word for word in ib_tpo.py: sampling, the policy, problems, the tiny
    task, the verifier, evaluation, files
Read as far as "The run", and look up the rest, such as `sample` or DEVICE, when needed.

Left out: vLLM, sharded models, rewards other than right or wrong. README.md lists our choices.

Marks: [P] the paper's abstract, figures and tables; [P, reported] the paper's text as others report
it, because we could not read it; [C] the released code, github.com/denghuilin-cyber/IIB-LPO at
commit 9d21779; [O] our own choice. Other marks name their source.
Shapes: B rows, T response tokens, P longest prompt of a batch, V vocabulary, H width of the model,
D width of a head, Z latent dimensions, Q queries, C keys. H_t, with an index, is entropy in nats.
"""
import contextlib
import functools
import itertools
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
from transformers.integrations.sdpa_attention import sdpa_attention_forward
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
    method: Literal["iiblpo", "grpo", "dapo", "entropy_reg"] = setting(
        "iiblpo", "the method, or a baseline")
    max_steps: int = setting(200, "largest number of training steps", "1..")
    max_tokens: int = setting(0, "sampled tokens after which the run stops (0: no limit)", "0..")
    seed: int = setting(0, "seed of problems and sampling", "0..")
    out: str = setting("", "folder of the run (by default runs/METHOD-MODEL-SEED)")
    resume: bool = setting(False, "go on from the run's last checkpoint")
    save_every: int = setting(10, "steps between checkpoints", "1..")
    show: bool = setting(False, "print how iiblpo explores one problem, and do not train")
    probe_heads: bool = setting(False, "print which attention heads know how difficult a problem "
                                "is, and do not train")
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
    # Rollouts
    prompts_per_step: int = setting(16, "prompts per step", "1..")
    rollouts: int = setting(8, "responses per prompt of a baseline; iiblpo's rollouts and "
                            "branches together get at most as many tokens", "1..")
    max_new_tokens: int = setting(1024, "tokens of the longest response", "1..")
    generate_tokens: int = setting(131072, "largest generate call, in tokens: rows x (prompt + "
                                   "tokens still to sample)", "1..")
    # Stage 1: branching
    initial: int = setting(2, "M: rollouts per prompt before branching", "1..")
    branches: int = setting(3, "K: branches per rollout", "1..")
    branch_mode: Literal["psa", "random"] = setting(
        "psa", "psa: each branch has its latent; random: branches differ by chance alone")
    top_frac: float = setting(0.05, "rho: t* is among this share of tokens of top H_t", "0..1")
    psa_layers: int = setting(4, "how many of the last layers see the latent", "1..")
    psa_gamma: float = setting(1.0, "gamma: strength of the latents at first; it falls to 0 over "
                               "the run", "0..")
    psa_halflife: float = setting(8.0, "tokens until z's shift of the RMSNorms halves", "0.001..")
    z_dim: int = setting(128, "dimensions of the latent", "1..")
    cvae_pairs: int = setting(512, "largest number of continuations the latents learn from", "1..")
    cvae_steps: int = setting(200, "training steps of the latents", "1..")
    # Stage 2: information bottleneck
    keep: float = setting(0.75, "share of a prompt's right branches that is kept, and likewise "
                          "of its wrong ones (1: all)", "0..1")
    beta: float = setting(1.0, "beta: weight of the answer term in S_IB", "0..")
    ib_rounds: int = setting(1, "how many times responses are branched and filtered", "1..")
    kappa: float = setting(0.005, "kappa: weight of the self-reward", "0..")
    # Update
    lr: float = setting(1e-6, "highest learning rate of AdamW; it falls to 0", "0..")
    updates_per_step: int = setting(1, "minibatches per batch, each with an optimizer step", "1..")
    clip_low: float = setting(0.2, "lower clip: the ratio is clipped at 1 - clip_low", "0..1")
    clip_high: float = setting(0.2, "upper clip: at 1 + clip_high (dapo: at least 0.28)", "0..2")
    entropy_bonus: float = setting(0.003, "entropy_reg: weight of the mean entropy", "0..")
    max_grad_norm: float = setting(1.0, "norm to which the gradient is clipped", "0.001..")
    micro_tokens: int = setting(4096, "largest training pass, in tokens: rows x longest row", "1..")
    recompute: bool = setting(True, "run layers again in the backward pass, to save memory")
    # Evaluation
    eval_prompts: int = setting(256, "held-out problems", "1..")
    eval_samples: int = setting(16, "responses per held-out problem", "1..")
    eval_every: int = setting(0, "steps between evaluations (0: only before and after)", "0..")

    def check(self):
        """Set what the method implies; end the program where settings contradict each other."""
        if self.method == "dapo":
            self.clip_high = max(0.28, self.clip_high)  # clip-higher
        if self.method == "iiblpo" and self.rollouts <= self.initial:
            fail("initial must be below rollouts, or no tokens are left for branches")
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
    is_branch: bool = False
    score: float = 0.0  # S_IB
    advantage: float = 0.0

    def __len__(self):
        return len(self.prompt) + len(self.response)


# ==== Stage 1: entropy-driven latent branching
#   token entropy          H_t = -Σ_v p_t(v) ln p_t(v), by `token_entropy`             [P]
#   where it hesitates     Ω = the top ρ of a response's positions by H_t              [P, reported]
#                          t* ~ Uniform(Ω)                                             [P, reported]
#   the prefix             c = (q, o_<t*)                                              [O]
#   a latent per branch    z_1 ... z_K ~ p_ψ(z | c)                                    [P]
#   training of ψ, φ, W    maximises the ELBO, see `latent_loss`                       [P]
#                          ln π(o_>=t* | c, z) - KL(q_φ || p_ψ),  z ~ q_φ(z | c, o_>=t*)
#                          the decoder π is the frozen policy, steered by z            [O]
#                          the KL is halved, and its first 8 / Z nats per dimension cost nothing,
#                          or else q_φ would become p_ψ, and z would tell nothing      [O]
#   pseudo self-attention  K' = [k_z ; K],  V' = [v_z ; V]                             [P]
#                          weights of the layers' input RMSNorms: w' = w + w_z         [P]
#                          w_z decays over the tokens generated after t*               [P, reported]
#   maps of z              k_z = W_K z,  v_z = W_V z,  w_z = γ 2^(-age/half-life) W_N z          [O]
#                          age is 0 at the last token of c, which predicts o_t*, then 1, 2, ...  [O]
#   strength γ of z        it scales w_z and exp(q·k_z / √D), and falls to 0 over the run       [O]
# The released code takes the position of highest H_t for t*. In that code and in the paper's figure
# a branch begins after o_t*. Here it begins before o_t*, so that the uncertain token is drawn anew.
# The released code samples with top-p 0.9, whereas we do not truncate. [O]
# Why γ falls over the run: the latents are trained once, on the starting policy, and keep steering
# towards what that policy said. At constant γ some tiny runs unlearnt correct arithmetic.

def branch_positions(entropy, mask, top_frac, generator=None):
    """Return a branching position t* for each response, [B]; entropy, mask: [B, T].

    t* is drawn from Ω. The first position is left out, because a branch from there would share
    no token. Of the n others, Ω holds the max(1, floor(ρ n)) of highest entropy. At ρ = 0.05
    and n < 40, as in the tiny task with up to 6 digits, Ω is one position. t* may be where EOS is,
    as in the released code. A response of one token has t* = 0.
    """
    chosen = torch.zeros(len(entropy), dtype=torch.long)
    for row in range(len(entropy)):
        positions = mask[row].nonzero().squeeze(1)[1:]
        if len(positions) > 0:
            size = max(1, int(top_frac * len(positions) + 1e-9))  # 1e-9 is for rounding errors
            omega = positions[entropy[row, positions].topk(size).indices]
            chosen[row] = omega[torch.randint(size, (1,), generator=generator)]  # t*
    return chosen

def prefixes_to_branch(parents, config):
    """Draw t* of each response; return its prefix c = (q, o_<t*), which a branch continues."""
    entropy, mask = padded_entropy(parents)
    positions = branch_positions(entropy, mask, config.top_frac).tolist()
    return [replace(t, response=t.response[:i], logps=t.logps[:i], entropy=t.entropy[:i], start=i,
                    is_branch=True) for t, i in zip(parents, positions)]  # i is t*

class LatentCVAE(torch.nn.Module):
    """The prior p_ψ(z | c) and the posterior q_φ(z | c, o_>=t*) of a conditional VAE. [P]

    Both are three-layer MLPs that give diagonal Gaussians. [C] Their inputs e(c) and e(o_>=t*),
    [B, H], are the policy's mean last hidden states of prefix and continuation, where the released
    code has a DeBERTa encoder. [O]
    """

    def __init__(self, width, z_dim):
        super().__init__()
        self.free_nats = 8 / z_dim  # per dimension: 8 in all, whatever Z is
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
        """Return p_ψ(z | c), a Normal over [B, Z]."""
        return self.gaussian(self.prior_net(prefix))

    def posterior(self, prefix, continuation):
        """Return q_φ(z | c, o_>=t*), a Normal over [B, Z]."""
        return self.gaussian(self.posterior_net(torch.cat([prefix, continuation], -1)))

    def sample(self, prefix, k):
        """Return k latents of each prefix from the prior, [k, B, Z]."""
        return self.prior(prefix).sample((k,))

class PseudoSelfAttention(torch.nn.Module):
    """PSA: z enters the last layers as one more key and value, and through their input norms. [P]

    As in the released code, it enters the last four layers, and its maps begin with std 0.01. [C]
    Each layer has maps of its own. The latent's slot, k_z and v_z, gets no rotary embedding.
    `steer` gets `first`, the column of the last token of c, which predicts o_t*. The latent acts
    from there on; its age is column - first. Earlier columns see no slot and no shifted norm. [O]
    The hooks stay on `model`, but do nothing outside a `with psa.steer(...)` block.
    """

    def __init__(self, model, config):
        super().__init__()
        layers = model.base_model.layers[-config.psa_layers:]
        kv_heads, head_dim = model.config.num_key_value_heads, layers[0].self_attn.head_dim
        self.n_layers = len(layers)
        self.slot_shape = (len(layers), kv_heads, 1, head_dim)  # a key, or value, per kv-head
        width = len(layers) * model.config.hidden_size
        size = math.prod(self.slot_shape)
        self.to_key = torch.nn.Linear(config.z_dim, size, bias=False)  # W_K
        self.to_value = torch.nn.Linear(config.z_dim, size, bias=False)  # W_V
        self.to_norm = torch.nn.Linear(config.z_dim, width, bias=False)  # W_N
        for weight in self.parameters():
            torch.nn.init.normal_(weight, std=0.01)
        self.gamma = config.psa_gamma
        self.halflife = config.psa_halflife
        self.steering = False
        transformers.AttentionInterface.register("psa", psa_attention)
        transformers.AttentionMaskInterface.register("psa", visible_mask)
        model.set_attn_implementation("psa")  # from here on, layers call psa_attention
        model.get_input_embeddings().register_forward_hook(self.count_columns)
        for i, layer in enumerate(layers):
            layer.self_attn.psa = (self, i)  # in a tuple, or torch would make psa a submodule
            layer.input_layernorm.register_forward_hook(functools.partial(self.modulate, i))

    @contextlib.contextmanager
    def steer(self, z, first):
        """Let z[i] steer row i of the model's input in this block, from column first[i] on.

        z: [B, Z]; first: [B], or one number for all rows. With γ = 0 nothing is steered.
        """
        self.keys = self.to_key(z).view(len(z), *self.slot_shape)  # k_z
        self.values = self.to_value(z).view(len(z), *self.slot_shape)  # v_z
        self.shifts = self.to_norm(self.gamma * z).view(len(z), self.n_layers, 1, -1)  # initial w_z
        self.first = torch.as_tensor(first, device=DEVICE).reshape(-1, 1)
        self.columns = 0  # how many columns the model has run in this block
        self.steering = self.gamma > 0
        try:
            yield
        finally:
            self.steering = False

    def count_columns(self, embedding, args, output):
        """Set the ages, [B, Q] or [1, Q], of the Q columns that a forward pass is about to run.

        `generate` runs all columns of the prompts in one pass, and then one column per pass. This
        hook is the first that a pass calls. It counts the columns itself, because how
        positions are passed depends on the release of transformers.
        """
        if self.steering:
            Q = output.shape[1]
            self.age = torch.arange(self.columns, self.columns + Q, device=DEVICE) - self.first
            self.columns += Q

    def modulate(self, i, norm, args, output):
        """Turn the output w x̂ of layer i's input norm into (w + w_z) x̂; w_z decays with age."""
        if not self.steering:
            return output
        x = args[0]
        x_hat = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)
        decay = (self.age >= 0) * 0.5 ** (self.age.clamp(min=0) / self.halflife)
        w_z = decay[..., None] * self.shifts[:, i]  # [B, Q, H]
        return output + w_z * x_hat  # w' x̂ = w x̂ + w_z x̂

def psa_attention(module, query, key, value, attention_mask, **kwargs):
    """Return the usual attention, with the latent's slot, if there is one, before keys and values.

    query: [B, heads, Q, D]; key, value: [B, kv_heads, C, D]; attention_mask: bool [B, 1, Q, C], or
    None (causal). Adding ln γ to the slot's logit multiplies exp(logit) by γ; -inf hides the slot.
    """
    psa, i = getattr(module, "psa", (None, None))
    if psa and psa.steering:
        B, Q, C = len(query), query.shape[2], key.shape[2]
        if attention_mask is None:  # transformers leaves out a mask that is merely causal
            attention_mask = torch.ones(Q, C, dtype=torch.bool, device=DEVICE).tril(C - Q)
        usual = torch.where(attention_mask, 0.0, -math.inf).to(query)  # added to the logits
        of_slot = torch.where(psa.age >= 0, math.log(psa.gamma), -math.inf).to(query)
        of_slot = of_slot[:, None, :, None].expand(B, 1, Q, 1)
        attention_mask = torch.cat([of_slot, usual.expand(B, 1, Q, C)], -1)
        key = torch.cat([psa.keys[:, i].to(key.dtype), key], 2)  # K' = [k_z ; K]
        value = torch.cat([psa.values[:, i].to(value.dtype), value], 2)  # V' = [v_z ; V]
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

def latent_loss(model, latents, batch, prefix, continuation):
    """Return the loss of the latents, the mean over rows of -ln π(o_>=t* | c, z) + KL / 2.

    This is the negative ELBO with half its KL, and with free bits: a KL below 8 / Z nats in one
    dimension counts as 8 / Z. z ~ q_φ, and ln π is summed over the tokens from t* on. prefix,
    continuation: [B, H], e(c) and e(o_>=t*). Also return ln π [B], and mean KL per dimension [Z].
    In the released code a separate decoder reconstructs a feature vector from z. We measured that
    such latents do not change what the policy says. So our decoder is the policy itself. [O]
    """
    cvae, psa = latents
    prior, posterior = cvae.prior(prefix), cvae.posterior(prefix, continuation)
    with psa.steer(posterior.rsample(), first_columns(batch)):
        logp, _, mask = token_logps(model, batch)
    logp = (logp * mask).sum(1)
    kl = torch.distributions.kl_divergence(posterior, prior)  # [B, Z]
    loss = kl.clamp(min=cvae.free_nats).sum(1) / 2 - logp  # nearly -ELBO
    return loss.mean(), logp, kl.mean(0)

@torch.no_grad()
def branch(model, tokenizer, latents, parents, config, budget=math.inf):
    """Sample up to K branches from t* of every parent, each with a latent of its own. [P]

    latents: (cvae, psa), or [] for branches without latents. First each parent gets one branch,
    then each a second one, and so on. A branch is expected to cost as many tokens as its parent has
    from t* on, and there are as many branches as `budget` tokens pay for. [O]
    """
    prefixes = prefixes_to_branch(parents, config)
    costs = [len(parent.response) - c.start for parent, c in zip(parents, prefixes)]
    totals = itertools.accumulate(costs * config.branches)
    affordable = sum(total <= budget for total in totals)
    branches = (prefixes * config.branches)[:affordable]
    if not latents:
        return sample(model, tokenizer, branches, config)
    cvae, psa = latents
    e_c, _ = features(model, prefixes, config)
    z = cvae.sample(e_c, config.branches).flatten(0, 1)  # [K B, Z]
    # z[i] is for branches[i]: both list all parents K times. The budget may leave some z unused.
    # Each generate call of `sample` gives `steer` its rows, and the column of c's last token
    return sample(model, tokenizer, branches, config,
                  steer=lambda rows, first: psa.steer(z[rows], first))

# ==== Stage 2: information-bottleneck filter and self-reward
# r is a whole response, r̄ is r without its answer, a* the right answer and |a*| its number of
# tokens, cue the text that introduces an answer.
#   score         S_IB(r) = β Î(r; a*) - Î(q; r)                                      [P]
#                 both terms are standardised over the responses to a prompt          [O]
#   answer term   Î(r; a*) = ln π(a* | q, r̄, cue) / |a*|                              [O]
#   prompt term   Î(q; r) = Σ_t (h - H_t), h as explained below                       [O]
#   filter        of a rollout's K branches those N of highest S_IB stay              [P]
#                 here right branches of highest, wrong ones of lowest S_IB           [O]
#   self-reward   the paper's figure puts S_IB itself into the loss                   [P]
#                 here the loss has -κ mean_t(A H_t), with A as under Update        [C]
# Why Î(r; a*): given q, the policy's answer Y has I(r; Y) = E[ln p(Y | q, r) - ln p(Y | q)]. In
# place of the mean we take the value at Y = a*. The last logarithm is equal for all responses to a
# prompt, so standardising removes it. r̄ is in r's place, because after r's own answer ln π(a*)
# would only repeat the reward. In the tiny task the last line of r̄ is the answer, too. So there
# Î(r; a*) nearly repeats the reward, and among equal rewards mainly Î(q; r) decides.
# Why Î(q; r): I(q; r) = E[ln π(r | q) - ln p(r)]. We replace each token's ln π by its mean, -H_t,
# and the unknown p(r) by the product of its tokens' frequencies in the batch, whose ln is -T·h in
# the mean: h is the entropy of these frequencies. H_t is nearly always below h. So almost every
# token lowers S_IB: by h if the policy was sure, as in repeated text, by less if it hesitated.
# So long, sure branches have a low S_IB, and the filter drops them if right, not if wrong.
# H_t is as recorded in sampling, where the tokens of a branch from t* on had its latent. [O]

@torch.no_grad()
def answer_gain(model, tokenizer, trajectories, config):
    """Return Î(r; a*), [B], in nats per answer token, under the policy without latents.

    r̄ is the text before the answer's marker, if there is one. [O] A probe is q, r̄, cue and a*.
    """
    cue = cue_of(config.prompt)
    reasoning = [t.text[:find_answer(t.text)[1]] for t in trajectories]  # r̄, up to the marker [1]
    probes = [answer_probe(t, said, cue, tokenizer) for t, said in zip(trajectories, reasoning)]
    gains = torch.zeros(len(probes))
    for rows in micro_batches([len(t) for t in probes], config.micro_tokens):
        logp, _, mask = token_logps(model, [probes[row] for row in rows])
        gains[rows] = ((logp * mask).sum(1) / mask.sum(1)).cpu()
    return gains

def frequency_entropy(trajectories):
    """Return h: the entropy of the frequencies of the tokens that the trajectories sampled."""
    sampled = gather([t.response[t.start:] for t in trajectories])  # of all processes
    counts = Counter(token for tokens in sampled for token in tokens)
    p = torch.tensor([*counts.values()]) / counts.total()
    return -(p * p.log()).sum().item()

def prompt_information(entropy, mask, h):
    """Return Î(q; r) = Σ_t (h - H_t), [B]; entropy, mask: [B, T], h in nats."""
    return ((h - entropy) * mask).sum(1)

def trajectory_ib_score(gain, entropy, mask, groups, beta, h):
    """Return S_IB [B] of responses; gain: Î(r; a*) [B], groups: [B], entropy, mask: [B, T].

    Both terms are standardised per prompt, as rewards are, so at beta 1 they weigh the same. [O]
    """
    information = prompt_information(entropy, mask, h)
    return beta * group_advantages(gain, groups) - group_advantages(information, groups)  # S_IB

def select_top_n(candidates, keep):
    """Return the candidates that pass the filter, in their order.

    All initial rollouts pass. Branches are ranked among those of the same prompt and reward: right
    ones by high S_IB, wrong ones by low S_IB. Of both, the share `keep` passes, rounded up. Where
    Î(r; a*) decides, a wrong one of high S_IB is a near miss, and pushing it down would do harm.
    Where Î(q; r) decides, as in the tiny task, long and sure wrong ones pass: a side effect. [O]
    """
    rivals = defaultdict(list)
    for t in candidates:
        if t.is_branch:
            rivals[t.group, t.reward].append(t)
    dropped = set()
    for (_, reward), branches in rivals.items():
        branches.sort(key=lambda t: -t.score if reward else t.score)
        passing = math.ceil(keep * len(branches) - 1e-9)  # 1e-9 is for rounding errors
        dropped.update(branches[passing:])
    return [t for t in candidates if t not in dropped]

def ib_self_reward(entropy, advantages, mask):
    """Return mean_t(A H_t), with a gradient through H_t; entropy, mask: [B, T], advantages: [B].

    H_t is that of the policy without latents. The loss raises it where A > 0, and lowers it where
    A < 0. From IBRO [arXiv 2507.18391]. [C]
    """
    return (advantages[:, None] * entropy * mask).sum() / mask.sum()

def set_scores(model, tokenizer, candidates, config):
    """Write S_IB into all candidates of a batch of problems."""
    gain = answer_gain(model, tokenizer, candidates, config)
    entropy, mask = padded_entropy(candidates)
    groups = torch.tensor([t.group for t in candidates])
    h = frequency_entropy(candidates)
    scores = trajectory_ib_score(gain, entropy, mask, groups, config.beta, h)
    for t, score in zip(candidates, scores.tolist()):
        t.score = score

def explore(model, tokenizer, latents, problems, config):
    """Sample, branch and filter a batch of problems; return (all candidates, those kept).

    The budget is the tokens of `config.rollouts` responses per prompt, each as long as the initial
    ones on average. The initial ones use a part; the rest is for branches, equally per round. [O]
    We could not find out what "iterative" means in the paper. Here there are `ib_rounds` rounds.
    A round branches from what is kept, then filters all branches anew, dropped ones, too. [O]
    """
    candidates = sample(model, tokenizer, problems * config.initial, config)
    kept = candidates
    budget = own_tokens(candidates) * (config.rollouts / config.initial - 1)  # for branches
    for rounds_left in range(config.ib_rounds, 0, -1):
        branches = branch(model, tokenizer, latents, kept, config, budget / rounds_left)
        budget -= own_tokens(branches)
        candidates = candidates + branches
        assign_rewards(candidates, config)
        set_scores(model, tokenizer, candidates, config)
        kept = select_top_n(candidates, config.keep)
    return candidates, kept

# ==== Update
#   advantage  A = (R - mean) / (std + 1e-4)                                  [GRPO]
#              mean, std over all candidates of a prompt, not only those kept [O]
#              times n/k, if k of n candidates of the same prompt and R are kept [O]
#   ratio      r_t = π_θ(o_t | q, o_<t) / π_old(o_t | q, o_<t, z), z in branches only   [O]
#   loss       L = -mean_t min(r_t A, clip(r_t) A)                             [P]
#                  - κ mean_t(A H_t), the self-reward                          [C]
#              where A < 0, r_t is bounded by 3, as in verl's dual clip        [C]
#              mean_t is over all own tokens of the kept responses (A = 0, too), a branch's
#              from t* on; GRPO's paper takes the mean of each response first         [O]
# The ratio's numerator is the bare policy, which has no latent. Its denominator is the policy that
# sampled, steered by z. So r_t is an importance weight. It corrects for this token only, not for
# the tokens before and after it. A token that the latent made likelier has r_t < 1. Where A > 0 it
# counts less. Where A < 0 and r_t < 1 - clip_low, the clip removes its gradient, so that what is
# rare without z is not made rarer. Likewise, tokens with A > 0 and r_t > 1 + clip_high are not made
# likelier. [O] In the released code π_old has no z. [C]

def group_advantages(rewards, groups, eps=1e-4):
    """Return (R - mean) / (std + eps) over the responses to the same prompt; all: [B]. [GRPO]

    The standard deviation is the population's, so that a group of one has advantage 0. [O]
    """
    advantages = torch.zeros_like(rewards)
    for g in groups.unique():
        own = rewards[groups == g]
        advantages[groups == g] = (own - own.mean()) / (own.std(correction=0) + eps)  # A
    return advantages

def set_advantages(candidates, kept):
    """Write advantages, relative to all candidates of a prompt, into the trajectories.

    If k of the n candidates of one prompt and reward are kept, initial rollouts included, each of
    these k counts n/k times. So the filter keeps the sum of A over right responses, and over
    wrong ones, though not over their tokens. With fewer of these, the gradient grows. [O]
    """
    rewards = torch.tensor([t.reward for t in candidates])
    groups = torch.tensor([t.group for t in candidates])
    for t, advantage in zip(candidates, group_advantages(rewards, groups).tolist()):
        t.advantage = advantage
    n = Counter((t.group, t.reward) for t in candidates)
    k = Counter((t.group, t.reward) for t in kept)
    for t in kept:
        t.advantage *= n[t.group, t.reward] / k[t.group, t.reward]  # A n/k

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

def responses_loss(model, batch, config):
    """Return L of a micro-batch and other statistics, all means over the responses' own tokens.

    `sampling_gap` is |ln π - ln π_old|; branches count as 0, because they had a latent. Before the
    batch's first optimizer step it must be mere rounding.
    """
    logp, entropy, mask = token_logps(model, batch)  # [B, T]
    old = pad([t.logps for t in batch]).to(DEVICE)  # ln π_old, in branches given z
    advantages = torch.tensor([t.advantage for t in batch], device=DEVICE)  # [B]
    loss, means = policy_loss(logp, old, advantages, mask, config)
    if config.method == "iiblpo":
        loss = loss - config.kappa * ib_self_reward(entropy, advantages, mask)
    if config.method == "entropy_reg":
        loss = loss - config.entropy_bonus * (entropy * mask).sum() / mask.sum()
    of_rollout = mask & torch.tensor([[not t.is_branch] for t in batch], device=DEVICE)
    means["sampling_gap"] = ((logp - old).abs() * of_rollout).sum() / mask.sum()
    return loss, means

def update(model, optimizer, batch, config):
    """Take `updates_per_step` optimizer steps on a batch; return the loss and other means.

    A branch is trained from t* on, because the tokens before are its parent's. [C]
    Responses of advantage 0 have no gradient, except in `entropy_reg`. So they are not run, but
    their tokens count in the loss's mean. The other means are over the tokens that are run.
    """
    sums = Counter(loss=0, tokens_trained=0, sampling_gap=0)  # logged even if nothing is trained
    norm = 0.0
    for i in range(config.updates_per_step):
        minibatch = batch[i::config.updates_per_step]
        tokens = sum(gather([own_tokens(minibatch)]))  # of all processes
        if config.method != "entropy_reg":
            minibatch = [t for t in minibatch if t.advantage != 0]
        sizes = [len(t) for t in minibatch]
        for rows in progress(micro_batches(sizes, config.micro_tokens), "update"):
            micro = [minibatch[row] for row in rows]
            with recompute_layers(model, config):
                loss, means = responses_loss(model, micro, config)
            share_of_tokens = own_tokens(micro) / tokens
            (share_of_tokens * loss).backward()  # the micro-batches add up to the minibatch's mean
            sums["loss"] += (share_of_tokens * loss).item() / config.updates_per_step
            add_means(sums, means, own_tokens(micro))
        if sum(gather([len(minibatch)])) > 0:  # else AdamW would step by its momentum alone
            norm = take_step(model, optimizer, config)
    return total_means(sums) | {"grad_norm": norm}

# ==== The training step

def training_step(model, tokenizer, optimizer, latents, problems, config, step):
    """Do one step of the method or of a baseline; return its line of metrics.jsonl."""
    # Seeded by the run's seed and the step only, so that a resumed run draws the same numbers
    rng = random.Random(f"{config.seed} {step}")
    torch.manual_seed(rng.getrandbits(62) + RANK)
    shuffled = rng.sample(problems, len(problems))
    metrics = {}

    # Before the first step the latents are trained; after that they are frozen
    if latents and step == 0:
        metrics = train_latents(model, tokenizer, latents, shuffled, config)

    # 1 to 4 of this file's docstring: sample, branch, score and filter, compare rewards
    began = time.time()
    batch = shard(shuffled[:config.prompts_per_step])
    if config.method == "iiblpo":
        candidates, kept = explore(model, tokenizer, latents, batch, config)
        set_advantages(candidates, kept)
    elif config.method == "dapo":
        candidates, kept = dapo_rollouts(model, tokenizer, shuffled, config)
        set_advantages(candidates, candidates)  # no n/k for what it drops
    else:
        candidates = kept = roll_out(model, tokenizer, batch, config)
        set_advantages(candidates, kept)

    # 5: update the policy without latents
    explored = time.time()
    metrics |= update(model, optimizer, kept, config)

    # Log. Rewards and entropies are those of rollouts and branches, not of the bare policy alone
    if step % 10 == 0:
        print_response(candidates[0])
    metrics |= {"rollout_s": explored - began, "update_s": time.time() - explored}
    metrics = rollout_metrics(candidates) | metrics
    metrics["tokens_sampled"] += metrics.get("latent_tokens", 0)  # max_tokens counts them
    return metrics

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

# ==== The latents' training and log-probabilities; the baselines, --show and --probe_heads

def prepare(model, config):
    """Seed torch; return the latents (cvae, psa), or an empty module list for methods without.

    End the program with a one-line message if the model has no RMSNorm for a latent to shift.
    """
    torch.manual_seed(config.seed)
    if config.method != "iiblpo" or config.branch_mode == "random":
        return torch.nn.ModuleList()
    norm = dict(model.base_model.named_modules()).get("layers.0.input_layernorm")
    if not hasattr(norm, "variance_epsilon"):
        fail(f"latents need RMSNorm layers like those of Qwen2, Qwen3 and Llama, unlike "
             f"{type(model).__name__}'s: use --branch_mode random or a baseline")
    cvae = LatentCVAE(model.config.hidden_size, config.z_dim)
    return torch.nn.ModuleList([cvae, PseudoSelfAttention(model, config)]).to(DEVICE)

def set_schedule(run, config):
    """Let the learning rate rise for 20 steps and then fall to 0; let γ fall from the start. [O]"""
    step = len(run.state["log"])
    run.optimizer.param_groups[0]["lr"] = config.lr * min((step + 1) / 20, 1 - run.done)
    if run.auxiliary:
        psa = run.auxiliary[1]
        psa.gamma = config.psa_gamma * (1 - run.done)

def alternatives(model, tokenizer, problems, config):
    """Return the continuations that the latents learn from, and how many tokens were sampled. [O]

    Each problem is answered once. Each of the four likeliest tokens at t*, except EOS, begins a
    continuation if it has p > 0.01, so that a rare choice counts as much as a common one.
    """
    prefixes = []
    eos = model.generation_config.eos_token_id
    parents = sample(model, tokenizer, problems, config)
    for t in prefixes_to_branch(parents, config):
        ids = torch.tensor([t.prompt + t.response], device=DEVICE)
        with torch.no_grad(), autocast():
            p = model(ids, logits_to_keep=1).logits[0, -1].float().softmax(-1)
        for token in p.topk(4).indices.tolist():
            goes_on = token not in eos and t.start + 1 < config.max_new_tokens
            if goes_on and p[token] > 0.01:
                # The token is given, not sampled, so logps and entropy lack it. The training
                # of the latents reads only tokens and `start`
                prefixes.append(replace(t, response=t.response + [token]))
    pairs = sample(model, tokenizer, prefixes[:math.ceil(config.cvae_pairs / WORLD)], config)
    tokens = own_tokens(parents) + own_tokens(pairs)
    # `start` goes back by one, to the end of c, so that the latents learn the given token, too
    return [replace(t, start=t.start - 1) for t in pairs], tokens

@torch.no_grad()
def check_policy(model, tokenizer, latents, problems, config):
    """Compare the ln π recorded in sampling with that of training passes, bare and steered. [O]

    End the program with a one-line message if they differ, or if latents change nothing. The
    latents are not trained yet, so z is 3 times standard normal, for a clear effect.
    """
    torch.manual_seed(config.seed)
    ordered = sorted(problems, key=len)  # two short and two long prompts, so that there is padding
    few = [replace(t, group=i) for i, t in enumerate(ordered[:2] + ordered[-2:])]
    short = replace(config, max_new_tokens=min(CHECK_TOKENS, config.max_new_tokens))
    batch = sample(model, tokenizer, few, short)
    logp, _, mask = token_logps(model, batch)
    recorded = torch.cat([t.logps for t in batch])
    alone = torch.cat([row_logps(model, t) for t in batch])
    gaps = {"a row alone": alone - recorded, "a padded batch": logp[mask].cpu() - recorded}
    if latents:
        psa = latents[1]
        z = 3 * torch.randn(len(batch), config.z_dim, device=DEVICE)
        prefixes = prefixes_to_branch(batch, short)
        branches = sample(model, tokenizer, prefixes, short,
                          steer=lambda rows, first: psa.steer(z[rows], first))
        bare, _, mask = token_logps(model, branches)
        with psa.steer(z, first_columns(branches)):
            steered, _, _ = token_logps(model, branches)
        recorded = torch.cat([t.logps[t.start:] for t in branches])
        gaps["a steered batch"] = steered[mask].cpu() - recorded
        if config.psa_gamma > 0 and torch.equal(steered, bare):
            fail("latents change nothing in this model or this release of transformers")
    report_gaps(gaps)

def train_latents(model, tokenizer, latents, problems, config):
    """Train prior, posterior and PSA on the policy's alternatives; return metrics.

    Of the last micro-batch, whose rows are the shortest: z_gain, the mean of ln π(o_>=t* | c, z) -
    ln π(o_>=t* | c), z ~ q_φ, in nats; latents_kl, the KL; active_dims, how many dimensions have a
    KL above their free nats.
    """
    # A problem gives about two pairs, so cvae_pairs / 2 problems are enough, plus one per process
    problems = shard(problems[:WORLD + config.cvae_pairs // 2])
    pairs, tokens = alternatives(model, tokenizer, problems, config)
    pairs, tokens = gather(pairs), sum(gather([tokens]))
    if not pairs:
        return {"latent_tokens": tokens}
    states = features(model, pairs, config)  # e(c) and e(o_>=t*), [2, pairs, H]
    optimizer = torch.optim.AdamW(latents.parameters(), lr=0.003)
    model.requires_grad_(False)
    for _ in progress(range(config.cvae_steps), "training the latents"):
        drawn = torch.randperm(len(pairs))[:32]
        for rows in micro_batches([len(pairs[i]) for i in drawn], config.micro_tokens):
            chosen = drawn[rows]
            batch = [pairs[i] for i in chosen]
            loss, logp, kl = latent_loss(model, latents, batch, *states[:, chosen])
            (loss * len(rows) / len(drawn)).backward()
        torch.nn.utils.clip_grad_norm_(latents.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    model.requires_grad_(True)
    if WORLD > 1:
        for weight in latents.parameters():
            torch.distributed.broadcast(weight.data, 0)  # each trained its own; all use the first's
    with torch.no_grad():
        bare, _, mask = token_logps(model, batch)
    return {"z_gain": (logp - (bare * mask).sum(1)).mean().item(), "latents_kl": kl.sum().item(),
            "active_dims": (kl > latents[0].free_nats).sum().item(), "latent_tokens": tokens}

def first_columns(batch):
    """Return the columns [B] whose states predict o_t*; `last_states` has o_i in column P + i."""
    P = max(len(t.prompt) for t in batch)
    return torch.tensor([P + t.start - 1 for t in batch], device=DEVICE)

def padded_entropy(trajectories):
    """Return H_t of responses, [B, T], and the mask of their tokens."""
    entropy = pad([t.entropy for t in trajectories], padding_value=-1)
    return entropy, entropy >= 0  # entropies are not negative, so these are the tokens

def last_states(model, batch):
    """Return the last hidden states [B, P + T, H] of trajectories, their ids [B, P + T], and P.

    Prompts are padded on the left and responses on the right, both with -1, so that column P + t is
    token t of every row.
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
    """Return ln π(o_t) and H_t of the own tokens, 0 elsewhere, and their mask, three [B, T]."""
    states, ids, P = last_states(model, batch)
    tokens = ids[:, P:]
    begin = torch.tensor([t.start for t in batch], device=DEVICE)[:, None]
    mask = (tokens >= 0) & (torch.arange(tokens.shape[1], device=DEVICE) >= begin)
    with autocast():
        flat = head_logps(model, states[:, P - 1:-1][mask], tokens[mask])
    zeros = torch.zeros(2, *mask.shape, device=DEVICE)
    logp, entropy = zeros.masked_scatter(mask, flat)  # flat, [2, N], fills both where mask is set
    return logp, entropy, mask

def cue_of(prompt):
    """Return the text that opens an answer, in the form that the prompt asks for."""
    if "\\boxed" in prompt:
        return "\\boxed{"
    return "#### " if "####" in prompt else "#"

def answer_probe(t, said, cue, tokenizer):
    """Return a trajectory whose response is `said`, the cue and the gold answer.

    Only the answer counts as its own tokens, so `token_logps` scores nothing else, not even its
    end. So a gold answer of 1 also gets the probability of 12. [O]
    The text is tokenised as a whole, because one token may hold the end of the cue and the start of
    the answer, as "{\\" does in "\\boxed{\\frac12". So the answer begins at the first token that
    differs from those of `said` and the cue alone.
    """
    given = tokenizer(said + cue, add_special_tokens=False).input_ids
    whole = tokenizer(said + cue + t.gold, add_special_tokens=False).input_ids
    begin = len(os.path.commonprefix([given, whole]))  # it compares lists, too
    return Trajectory(t.prompt, response=whole, start=begin)

@torch.no_grad()
def features(model, batch, config):
    """Return e(c) and e(o_>=t*), [2, B, H]: mean last hidden states of prefix and continuation."""
    e = torch.zeros(2, len(batch), model.config.hidden_size, device=DEVICE)
    for rows in micro_batches([len(t) for t in batch], config.micro_tokens):
        states, _, P = last_states(model, [batch[row] for row in rows])
        for row, state in zip(rows, states.float()):
            t = batch[row]
            e[0, row] = state[P - len(t.prompt):P + t.start].mean(0)
            e[1, row] = state[P + t.start:P + len(t.response)].mean(0)  # nan if nothing follows c
    return e

def roll_out(model, tokenizer, problems, config):
    """Sample `rollouts` responses to each problem, and reward them."""
    responses = sample(model, tokenizer, problems * config.rollouts, config)
    assign_rewards(responses, config)
    return responses

def dapo_rollouts(model, tokenizer, shuffled, config):
    """Return (all responses sampled, those to train on).

    Problems whose responses are all right or all wrong are dropped, because their advantages are 0.
    Others are sampled in their place, at most twice. Responses that were cut off are dropped, too.
    """
    wanted = len(shard(shuffled[:config.prompts_per_step]))
    waiting = shard(shuffled[:3 * config.prompts_per_step])
    candidates, mixed = [], []
    for _ in range(3):
        missing = wanted - len(mixed)
        candidates += roll_out(model, tokenizer, waiting[:missing], config)
        waiting = waiting[missing:]
        mixed = [group for group, rate in pass_rates(candidates).items() if 0 < rate < 1]
    return candidates, [t for t in candidates if t.complete and t.group in mixed]

def show(config):
    """Print how a held-out problem is explored.

    To see a trained policy, give --model RUN/model, and if it is tiny --config tiny_config.yaml.
    The latents are trained anew, because RUN/model holds the policy alone.
    """
    training, heldout = load_problems(config)  # before the model: a mistyped name fails at once
    model, tokenizer = load_policy(config)
    problems = encode(training, model, tokenizer, config)
    heldout = encode(heldout, model, tokenizer, config)
    latents = prepare(model, config)
    if latents:
        print("latents:", train_latents(model, tokenizer, latents, problems, config))
    problem = heldout[config.seed % len(heldout)]
    candidates, kept = explore(model, tokenizer, latents, [problem], config)
    print(f"{problem.question}  answer {problem.gold}; ▸ is t* or a rollout's start, H its H_t")
    for t in candidates:
        fate = "kept" if t in kept else "dropped"
        print(f"\nreward {t.reward:.0f}, S_IB {t.score:+.2f}, {fate}, H {t.entropy[t.start]:.2f}:")
        prefix, own = tokenizer.decode(t.response[:t.start]), tokenizer.decode(t.response[t.start:])
        print(f"{prefix}▸{own}")
    return candidates

# The paper is reported to look for attention heads that react to a prompt's difficulty, which is
# analysis, not training. [P, reported] The recipe is ours, after [arXiv 2510.05969]. A prompt's
# difficulty is 1 minus its pass rate. For each head, a ridge regression predicts it from the head's
# output at the prompt's last token. The head's score is the Spearman correlation of prediction and
# difficulty on prompts not fitted. [O]

@torch.no_grad()
def head_outputs(model, problems):
    """Return what each head puts out at the prompts' last tokens, [B, layers, heads, D].

    It is taken before the projection that mixes the heads.
    """
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
    """Return predictions for x_new of a ridge regression of y [n] on standardised x [n, D]."""
    mean, scale = x.mean(0), x.std(0) + 1e-6
    x, x_new = (x - mean) / scale, (x_new - mean) / scale
    penalty = 0.1 * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
    return y.mean() + x_new @ torch.linalg.solve(x.T @ x + penalty, x.T @ (y - y.mean()))

def probe_heads(config):
    """Score the attention heads of a policy, print the scores, and save them to heads.json."""
    _, heldout = load_problems(config)
    model, tokenizer = load_policy(config)
    problems = encode(heldout, model, tokenizer, config)
    if len(problems) < 4:
        fail("--probe_heads needs 4 problems at least: more --eval_prompts")
    outputs, half = head_outputs(model, problems), len(problems) // 2
    torch.manual_seed(config.seed)
    responses = sample(model, tokenizer, problems * config.eval_samples, config)
    assign_rewards(responses, config)
    rewards = torch.tensor([t.reward for t in responses], dtype=torch.double)
    difficulty = 1 - rewards.view(-1, len(problems)).mean(0)
    predicted = {}
    for layer in range(outputs.shape[1]):
        for head in range(outputs.shape[2]):
            x = outputs[:, layer, head]
            predicted[layer, head] = ridge_probe(x[:half], difficulty[:half], x[half:]).numpy()
    # Spearman's is the correlation of ranks; `unstack` makes a table of layers and heads
    ranks = pandas.DataFrame(predicted).rename_axis(columns=["layer", "head"]).rank()
    scores = ranks.corrwith(pandas.Series(difficulty[half:]).rank()).fillna(0)  # nan: no variance
    print(f"mean difficulty {difficulty.mean():.2f}\n{scores.unstack().round(2)}")
    print(f"best heads\n{scores.nlargest(5).round(2)}")
    report = {"scores": scores.unstack().values.tolist(), "difficulty": difficulty.tolist()}
    save_lines(Path(config.out or "runs", "heads.json"), [report])
    return report

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
        if config.probe_heads:
            return probe_heads(config)
        return train(config)
    except torch.OutOfMemoryError as e:
        fail(f"the GPU's memory is full: lower --micro_tokens if that was in an update, or else "
             f"--generate_tokens, and go on with --resume if there is a checkpoint ({e})")
    except KeyboardInterrupt:
        trains = not (config.show or config.probe_heads)
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
