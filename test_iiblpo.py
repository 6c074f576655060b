"""Tests of iiblpo.py and ib_tpo.py: values worked by hand, independent slow versions, faults."""
import ast
import contextlib
import copy
import functools
import gc
import inspect
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import socket
import statistics
import subprocess
import sys
import time
import unicodedata
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

if os.name != "nt":  # Windows has none
    import resource
os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported
import datasets
import mpmath
import pandas
import pytest
import torch
import transformers
from pytest import approx
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import tensor
from transformers import GenerationConfig, PreTrainedTokenizerFast

import ib_tpo as tpo
import iiblpo as m

HERE = Path(__file__).parent
KINDS = ["Qwen2", "Qwen3", "Llama"]
# The most lines of files and methods; aimed at are 1,400, 1,150, 2,400 and 260, and 430 and 340
CEILINGS = {"iiblpo.py": 1995, "ib_tpo.py": 1687, "test_iiblpo.py": 2690, "README.md": 260}
METHOD_CEILINGS = {"iiblpo.py": 474, "ib_tpo.py": 367}
each = pytest.mark.parametrize
SCRIPTS = ("iiblpo.py", "ib_tpo.py")
benchmark = pytest.mark.benchmark
posix = pytest.mark.skipif(os.name == "nt", reason="needs a POSIX shell or file system")
seed = torch.manual_seed
TINY = m.tiny_tokenizer()

def source(name):
    return (HERE / name).read_text(encoding="utf-8")

def config(*flags):
    return m.parse_config("iiblpo", list(map(str, flags)))

def tree_config(*flags):
    return tpo.parse_config("ib_tpo", list(map(str, flags)))

def small_model(kind="Qwen2", seed=0, ends=None, **changes):
    """Return a random decoder over the tiny tokenizer, with weights wide enough for opinions."""
    torch.manual_seed(seed)
    shape = dict(vocab_size=18, hidden_size=32, intermediate_size=64, num_hidden_layers=3,
                 head_dim=16, num_attention_heads=4, num_key_value_heads=2,
                 max_position_embeddings=256, bos_token_id=None, eos_token_id=1, pad_token_id=0,
                 tie_word_embeddings=True, initializer_range=0.2)
    c = getattr(transformers, kind + "Config")(**{**shape, **changes})
    model = getattr(transformers, kind + "ForCausalLM")(c).eval()
    ends = [1] if ends is None else ends
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=0)
    return model

@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Make a working directory with a model folder `policy`, and go there."""
    monkeypatch.chdir(tmp_path)
    small_model().save_pretrained("policy")
    TINY.save_pretrained("policy")
    return tmp_path

def by_checksum(batch, config):
    for t in batch:
        t.reward = float(zlib.crc32(t.text.encode()) % 2)

@pytest.fixture
def rewarded(folder, monkeypatch):
    """Make the same directory, and let about half of all responses be right."""
    for script in (m, tpo):
        monkeypatch.setattr(script, "assign_rewards", by_checksum)

SMALL = [f"--config={HERE / 'tiny_config.yaml'}",
         *"--model policy --max_new_tokens 12 --max_steps 4 --eval_prompts 4 --eval_samples 2 "
         "--max_tokens 0 --save_every 2 --lr 1e-3".split()]
QUICK = [*SMALL, *"--keep 0.75 --prompts_per_step 4 --rollouts 4 --initial 2 --branches 2 "
         "--cvae_pairs 24 --cvae_steps 3".split()]
TREES = [*SMALL, *"--prompts_per_step 3 --tree 2 3 1 1".split()]

def start(script, *flags):
    return script.main(list(map(str, flags)))

def run(*flags):
    return start(m, *QUICK, *flags)

def load(dataset, *flags):
    """Return the problems to train on and those held out, for a real model."""
    return m.load_problems(config("--model", "x", "--dataset", dataset, *flags))

def prompts(*texts):
    texts = texts or ("1+2=\n", "3*4*5-6+7=\n", "9-9=\n")
    return [m.Trajectory(TINY(t).input_ids, group=i) for i, t in enumerate(texts)]

def refused(capsys, *flags, script=m):
    """Run a script with a mistake among its flags; return the one line that it ends with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        script.main(list(map(str, flags)))
    line = capsys.readouterr().err
    assert e.value.code == 2 and line.startswith("error: ") and line.count("\n") == 1, line
    return line

def metrics(folder):
    """Return the lines of metrics.jsonl, without what the clock says."""
    lines = map(json.loads, (Path(folder) / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in x.items() if k not in ("rollout_s", "update_s")} for x in lines]

def grabber(model):
    """Return an optimizer that keeps the gradient instead of stepping."""
    grads = []
    return SimpleNamespace(grads=grads, zero_grad=model.zero_grad, step=lambda: grads.append(
        torch.cat([p.grad.flatten() for p in model.parameters()])))

def bpe_tokenizer(texts):
    """Return a small byte-level BPE that cuts words as Qwen2 does; ".\\n\\n" may be one token."""
    backend = Tokenizer(models.BPE())
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = Regex(r"[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+| ?\p{L}+|\p{N}|\s+")
    split = pre_tokenizers.Split(words, "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pieces])
    backend.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|user|>", "<|end|>"]
    backend.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=pieces.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")

def teacher_forced(model, t):
    """Return ln π(o_t) and H_t of one trajectory, run alone, without padding, from all logits."""
    logp = model(tensor([t.prompt + t.response])).logits[0, len(t.prompt) - 1:-1].log_softmax(-1)
    return logp.gather(1, tensor(t.response)[:, None])[:, 0], -(logp.exp() * logp).sum(-1)

def gradient(loss, model):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])

def clipped_objective(r, A):
    """Return min(min(r, 3) A, clip(r) A) of tokens whose ratios are r, at the default clip 0.2."""
    return torch.minimum(r.clamp(max=3) * A, r.clamp(0.8, 1.2) * A)

def shake(batch):
    """Move ln π_old away from ln π, so that ratios differ from 1 and some are clipped."""
    for t in batch:
        t.logps = t.logps + 0.3 * torch.randn(len(t.logps))

def shake_trees(roots):
    seed(5)
    shake(node for root in roots for node in root.walk()[1:])

def far(a, b):
    return ((a - b).norm() / b.norm()).item()

def same(a, b):
    return all(map(torch.equal, a, b))

# ---- configuration

def test_flags_win_over_the_file_over_the_defaults(tmp_path):
    assert config().dataset == "chain" and config("--lr", 0.5).lr == 0.5
    c = config("--model", "Qwen2.5-0.5B")  # with the papers' settings
    assert (c.lr, c.z_dim, c.kappa, c.top_frac, c.dataset) == (1e-6, 128, 0.005, 0.05, "gsm8k")
    file = tmp_path / "c.yaml"
    file.write_text("common: {lr: 2.0e-4, seed: 6}\n"
                    "iiblpo: {seed: 7, operands: [2, 3]}\nib_tpo: {x: 1}\n")
    c = config("--model", "x", "--config", file, "--keep", 0.5)
    assert (c.lr, c.seed, c.operands, c.z_dim, c.keep) == (2e-4, 7, [2, 3], 128, 0.5)
    assert config("--method", "dapo").clip_high == 0.28 and config().clip_high == 0.2

@each("text, message", [
    ("common: {max_step: 3}", "--max_step"), ("common: {lr: fast}", "'fast'"),
    ("- a\n- b", "sections"), ("common: {method: ppo}", "'ppo'"), ("lr: [", "cannot read"),
    ("common: {operands: [2]}", "operands"), ("comon: {}", "'common'")])
def test_a_wrong_file_is_one_line(tmp_path, capsys, text, message):
    (tmp_path / "c.yaml").write_text("iiblpo: {}\n" * text.startswith("com") + text)
    assert message in refused(capsys, "--config", tmp_path / "c.yaml")

@each("flags, message", [
    ("--operands 2 3 --eval_prompts 900", "there are not 900"), ("--out /proc/x/y", "cannot write"),
    ("--model tiny --dataset d.jsonl", "needs a --model"), ("--out policy/config.json/x", "cannot"),
    ("--max_new_tokens 9999", "too many for the model"), ("--model no/such", "the model no/such"),
    ("--rollouts 0", "rollouts must be from 1"), ("--resume --out policy", "to resume"),
    ("--dataset none.jsonl", "none.jsonl"), ("--initial 4", "below rollouts"), ("--prompt x", "{q"),
    ("--resume --out x", "to resume"), ("--out policy", "policy exists"), ("--lr x", "'x'"),
    ("--operands 5 3", "operands"), ("--top_frac 1.1", "top_frac"), ("--config no.yml", "no.yml")])
def test_a_mistake_is_one_line_before_any_work(folder, capsys, flags, message):
    before = set(Path().rglob("*"))
    assert message in refused(capsys, *QUICK, *flags.split())
    assert set(Path().rglob("*")) - before <= {Path("runs")}

@each("script", [m, tpo])
def test_every_number_has_its_range(script, capsys):
    may_be_0 = ("seed max_tokens habit psa_gamma keep kappa lr clip_low eval_every "
                "clip_high entropy_bonus top_frac lam kl").split()
    may_be_0.append("beta" if script is m else "rollouts")
    for name, default in asdict(script.Config()).items():
        for text in ["-1", "nan", "1e30", "9" * 30, "0"] * (not isinstance(default, (bool, str))):
            count = len(default) if isinstance(default, list) else 1
            flags = ["--model", "x", "--" + name, *[text] * count]
            if text == "0" and name in may_be_0:
                assert getattr(script.parse_config("x", flags), name) == 0
            else:
                assert name in refused(capsys, *flags, script=script)
    for name in {"habit", "clip_low", "top_frac", "keep"} & asdict(script.Config()).keys():
        assert "to 1, not 1.1" in refused(capsys, "--model", "x", "--" + name, 1.1, script=script)

# ---- problems

def test_chain_arithmetic():
    for q, value in {"3+4*2=": "1", "1-2*3-4=": "1", "9*9*9=": "9", "2-9=": "3"}.items():
        assert m.chain_value(q) == value
    found = {m.demonstration("3+4*2=", random.Random(i), 0.5) for i in range(20)}
    assert found == {"7*2\n4\n#4", "3+8\n1\n#1"}
    rng = random.Random(0)
    for q in m.chain_questions(rng, [2, 7], False, 200):
        lines = [q[:-1], *m.demonstration(q, rng, 0.3).split("\n")]
        for a, b in zip(lines, lines[1:-1]):  # each line is one reduction behind the one before
            assert b in [m.reduce_at(a, i) for i in range(1, len(a), 2)]
        assert lines[-1] == "#" + lines[-2] and m.chain_value(q) == str(eval(q[:-1]) % 10)

@each("habit", [0, 0.75, 1])
def test_habit_is_the_share_of_leftmost_reductions(habit):
    """Where it can be told which operator was reduced, the leftmost was by habit, or by chance."""
    rng, left, expected, variance = random.Random(0), 0, 0.0, 0.0
    for q in m.chain_questions(rng, [3, 7], False, 1500):
        lines = [q[:-1], *m.demonstration(q, rng, habit).split("\n")]
        for a, b in zip(lines, lines[1:-1]):
            results = [m.reduce_at(a, i) for i in range(1, len(a), 2)]
            if results.count(results[0]) == 1 < len(results):
                p = habit + (1 - habit) / len(results)
                left += b == results[0]
                expected += p
                variance += p * (1 - p)
    assert expected > 1000 * max(habit, 0.3) and abs(left - expected) <= 4 * math.sqrt(variance)

def test_evaluation_problems_are_held_out():
    train, heldout = m.load_problems(config("--operands", 4, 5))
    other, again = m.load_problems(config("--operands", 4, 5, "--seed", 5))
    assert heldout == again and train != other and len(set(heldout)) == 256
    assert not {*train, *other} & {*heldout}
    assert all(gold == m.chain_value(q) for q, gold in train + heldout)

def test_streams_of_random_numbers_differ(monkeypatch):
    seeds, real = [], random.Random
    monkeypatch.setattr(random, "Random", lambda seed: seeds.append(seed) or real(seed))
    for s in (0, 1):
        m.load_problems(config("--seed", s))
    assert len({real(s).random() for s in [*seeds, "warm start"]}) == 4  # two to train on, held out

def test_copying_the_question_earns_nothing():
    texts = ("#1", "3+4*2=\n#3+4*2", "#1+0", "", "#5\n#1", "#1\n#5")
    batch = [m.Trajectory([], gold="1", text=x) for x in texts]
    m.assign_rewards(batch, config())
    assert [t.reward for t in batch] == [1, 0, 0, 0, 1, 0]
    m.assign_rewards(batch, config("--model", "x"))  # where answers are mathematics, 1+0 is 1
    assert [t.reward for t in batch] == [1, 0, 1, 0, 1, 0]

def test_a_warm_start_is_made_once_and_never_in_halves(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ("--warm_steps 3 --operands 2 3 --max_steps 1 --eval_prompts 2 --eval_samples 1 "
             "--method grpo --prompts_per_step 2 --rollouts 2 --out run").split()
    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedTokenizerFast, "save_pretrained", lambda *a: open("/no/x", "w"))
        assert "cannot write" in refused(capsys, *flags)
    assert not Path("run").exists() and not list(Path("runs").glob("warm_start-*[0-9a-f]"))
    made = m.warm_start(config(*flags))
    monkeypatch.setattr(torch.optim, "Muon", None)  # it is not trained again
    assert m.warm_start(config(*flags)) == made and m.main(flags)["after"]["length"] > 0
    assert sum(p.numel() for p in m.load_policy(config(*flags))[0].parameters()) == 643_328
    for change in ("--warm_steps 2", "--habit 0.5", "--operands 2 4", "--prompt {question}"):
        with pytest.raises(TypeError):
            m.warm_start(config(*flags, *change.split()))  # another one

ROWS = [{"question": f"What is {i}+{i}?", "answer": f"It is.\n#### {2 * i}"} for i in range(40)]

def write_lines(rows):
    Path("d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

def test_local_files_of_each_kind(folder):
    write_lines(ROWS)
    other = [{"prompt": row["question"], "solution": rf"so \boxed{{{2 * i}}}"}
             for i, row in enumerate(ROWS)]
    datasets.Dataset.from_list(other).to_parquet("d.parquet")
    for name in ("d.jsonl", "d.parquet"):
        train, heldout = load(name, "--eval_prompts", 8)
        assert len(train) == 32 and train[3] == ("What is 3+3?", "6")
        assert heldout[0] == ("What is 32+32?", "64")
    write_lines([{"question": "What?", "answer": r"\boxed{}"}, *ROWS])  # MATH has two such rows
    assert {gold for side in load("d.jsonl") for _, gold in side} == {str(2 * i) for i in range(40)}
    write_lines(ROWS[:8] + ROWS[:6])  # half is held out at most, and no question is on both sides
    train, heldout = load("d.jsonl")
    assert len(heldout) == 7 and [q for q, _ in train] == ["What is 6+6?"]

def rows_of_the_hub(i):
    """Return row i of stand-ins of the hub's data sets, each in the form that rows have there."""
    q, a = f"q{i}", str(i)
    around = ("Solve the following math problem step by step. The last line of your response "
              "should be of the form Answer: $Answer (without quotes) where $Answer is the answer "
              "to the problem.\n\n",
              '\n\nRemember to put your answer on its own line after "Answer:".')
    return {
        "gsm8k": {"question": q, "answer": f"So <<1+1=2>>.\n#### {a}"},
        "math": {"problem": q, "level": "Level 5", "solution": f"So $\\boxed{{{a}}}$."},
        "dapo": {"prompt": q.join(around), "solution": a, "ability": "math",
                 "reward_model": {"ground_truth": a, "style": "rule"}},
        "math500": {"problem": q, "solution": f"\\boxed{{{a}}}", "answer": a, "level": 3},
        "aime24": {"id": i, "problem": q, "solution": "see there", "answer": a, "url": "x"},
        "aime25": {"problem": q, "answer": a, "id": a},
        "olympiadbench": {"question": q, "solution": ["long"], "final_answer": [a]},
        "ByteDance/verl": {
            "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": q}],
            "reward_model": {"ground_truth": a}},
        "some/numbers:all": {"Problem": q, "Answer": i}}

SPLITS = {"gsm8k": ["train", "test"], "math": ["train", "test"],
          "math500": ["test"], "aime25": ["test"]}

@pytest.fixture
def hub(monkeypatch):
    """Let `datasets.load_dataset` find the stand-ins, under their repositories' names."""
    def load_dataset(repository, subset=None):
        name = ":".join(filter(None, [repository, subset]))
        name = {address: short for short, address in m.HUB.items()}.get(name, name)
        tables = {}
        for k, side in enumerate(SPLITS.get(name, ["train"])):
            rows = [rows_of_the_hub(1000 * k + i)[name] for i in range(40)]
            tables[side] = datasets.Dataset.from_list(rows)
        return datasets.DatasetDict(tables)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)

@each("name", rows_of_the_hub(0))
def test_data_sets_of_the_hub_load_by_name(hub, name):
    train, heldout = load(name, "--eval_prompts", 8)
    first = 1000 if len(SPLITS.get(name, ["train"])) == 2 else 0  # the first row of the test split
    assert len(heldout) == 8 and len(train) == (40 if first else 32)
    for question, gold in train + heldout:
        assert question == f"q{gold}"
    assert all(int(gold) >= first for _, gold in heldout)
    if first:
        assert max(int(gold) for _, gold in heldout) > 1010  # shuffled: it may be sorted by subject

def test_an_evaluation_data_set_takes_the_place_of_held_out_problems(hub):
    train, heldout = load("dapo", "--eval_dataset", "math500", "--eval_prompts", 8)
    assert len(heldout) == 8 and len(train) == 32
    assert not {question for question, _ in heldout} & {question for question, _ in train}

def test_an_unknown_data_set_is_one_line(capsys):
    message = refused(capsys, "--model", "x", "--dataset", "gms8k", "--out", "x")
    assert "no data set gms8k" in message and "gsm8k, math, dapo, math500" in message
    assert "the chain task has" in refused(capsys, "--eval_dataset", "math500")

def test_qwen_is_short_for_its_repository(hub, capsys):
    message = refused(capsys, "--model", "Qwen2.5-0.5B", "--out", "x")
    assert "cannot load the model Qwen/Qwen2.5-0.5B" in message

@each("rows, message", [
    ([], "cannot load the dataset"),
    ([{"q": "a", "answer": "b"}] * 9, "needs in each row a question"),
    ([{"question": "a", "a": "b"}] * 9, "and an answer"), (ROWS[:1] * 9, "not held out"),
    (ROWS[:5] + [{"question": "x", "answer": None}], "and an answer"),
    (ROWS[:5] + [{"question": "", "answer": "5"}], "a question"), (b"[1, 2]\n[3]\n", "d.jsonl"),
    ([{"prompt": [{"role": "system", "content": "Be brief."}], "answer": "2"}] * 9, "a question"),
    *[([{"question": "x", "answer": answer}] * 9, "and an answer") for answer in (
        ["1", "2"], {"value": 1}, math.nan, "2024-01-05T00:00:00")],  # the last becomes a date
    (ROWS[:2] + [{"question": "x", "answer": "so " * 200}], "at most 300 characters"),
    (ROWS[:1], "cannot load"),
    ('{"question": "é", "answer": "1"}\n'.encode("latin-1") * 9, "d.jsonl")])
def test_bad_data_is_one_line(folder, capsys, rows, message):
    Path("d.jsonl").write_bytes(rows) if isinstance(rows, bytes) else write_lines(rows)
    assert message in refused(capsys, *QUICK, "--dataset", "d.jsonl", "--out", "run")
    assert not Path("run").exists()

def test_each_process_needs_a_problem(folder, capsys, monkeypatch):
    write_lines(ROWS[:4])
    monkeypatch.setattr(m, "WORLD", 3)
    with pytest.raises(SystemExit):
        load("d.jsonl")
    assert "2 problems" in capsys.readouterr().err

# ---- sampling, and PSA

def steered(*flags, kind="Qwen2", scale=10):
    """Return a policy, its config, and latents with weights large enough to matter."""
    model = small_model(kind)
    c = config("--z_dim", 4, "--max_new_tokens", 14, "--micro_tokens", 90, "--rollouts", 99, *flags)
    seed(5)
    latents = m.prepare(model, c)
    for p in latents[1].parameters():
        p.data *= scale
    return model, c, latents

def steer(psa, batch, z):
    """Steer in the columns of `last_states`, where column P + t is token t."""
    P = max(len(t.prompt) for t in batch)
    return psa.steer(z, tensor([P + t.start - 1 for t in batch]))

def catch_latents(monkeypatch, cvae):
    """Return a list that will hold the latents drawn, first those of all first branches."""
    found, real = [], cvae.sample

    def spy(prefix, k):
        z = real(prefix, k)
        found.extend(z.flatten(0, 1))
        return z

    monkeypatch.setattr(cvae, "sample", spy)
    return found

def slow_tokens(model, psa, t, z=None):
    """Return ln π(o_t) and H_t of Qwen2 with PSA, by loops over positions and heads, uncached."""
    c, layers = model.config, model.model.layers
    ids = tensor(t.prompt + t.response)
    n, D, KV = len(ids), c.head_dim, c.num_key_value_heads
    first = len(t.prompt) + t.start - 1  # the column whose state predicts o_t*
    L = psa.to_norm.out_features // c.hidden_size  # how many layers see the latent
    theta = c.rope_parameters["rope_theta"]
    angle = torch.arange(n)[:, None] / theta ** (torch.arange(0, D, 2) / D)
    cos, sin = torch.cat([angle.cos()] * 2, -1), torch.cat([angle.sin()] * 2, -1)
    x = model.model.embed_tokens(ids)

    def rotate(x):
        return x * cos + torch.cat([-x[:, D // 2:], x[:, :D // 2]], -1) * sin

    for l, layer in enumerate(layers, L - len(layers)):  # those below 0 do not see it
        h, out, a = [], [], layer.self_attn
        sees = z is not None and l >= 0
        if sees:
            key = (psa.to_key.weight @ z).view(L, KV, 1, D)[l]
            value = (psa.to_value.weight @ z).view(L, KV, 1, D)[l]
            change = psa.gamma * (psa.to_norm.weight @ z).view(L, -1)[l]
        for i in range(n):
            w = layer.input_layernorm.weight
            if sees and i >= first:
                w = w + change * 0.5 ** ((i - first) / psa.halflife)
            h.append(w * x[i] / (x[i].pow(2).mean() + c.rms_norm_eps).sqrt())
        q, k, v = (p(torch.stack(h)).view(n, -1, D) for p in (a.q_proj, a.k_proj, a.v_proj))
        for i, j in itertools.product(range(n), range(c.num_attention_heads)):
            g = j * KV // c.num_attention_heads
            keys, values = rotate(k[:, g])[:i + 1], v[:i + 1, g]
            weights = (rotate(q[:, j])[i] @ keys.T / D ** 0.5).exp()
            if sees and i >= first:
                weight = psa.gamma * (rotate(q[:, j])[i] @ key[g].T / D ** 0.5).exp()
                weights, values = torch.cat([weight, weights]), torch.cat([value[g], values])
            out.append(weights @ values / weights.sum())
        x = x + a.o_proj(torch.cat(out).view(n, -1))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    p = model.lm_head(model.model.norm(x)).softmax(-1)[len(t.prompt) - 1:-1]
    return torch.stack([q[o].log() for q, o in zip(p, t.response)]), -(p * p.log()).sum(-1)

@each("kind, flags", [(kind, []) for kind in KINDS] + [
    ("Qwen2", ["--psa_layers", 2, "--psa_halflife", 3, "--psa_gamma", 0.7]),
    ("Qwen3", ["--psa_layers", 99])])
def test_recorded_log_probs_are_those_of_a_teacher_forced_pass(kind, flags, monkeypatch):
    """Sampling and training agree on ln π, bare and steered, or else ratios would be wrong."""
    model, c, latents = steered("--generate_tokens", 150, "--top_frac", 0.6, *flags, kind=kind)
    starts = prompts("1+2=\n", "3*4*5-6+7=\n", "9-9-9=\n", "1=\n", "2+2+2+2=\n") * 2
    seed(1)
    parents, drawn = m.sample(model, TINY, starts, c), catch_latents(monkeypatch, latents[0])
    children = m.branch(model, TINY, latents, parents, c)
    assert [t.prompt for t in parents] == [t.prompt for t in starts]
    assert len({t.start for t in children}) > 3 < len({len(t.response) for t in parents})
    passes, effects = [*zip(parents, *m.token_logps(model, parents))], []
    with steer(latents[1], children, torch.stack(drawn)):
        passes += zip(children, *m.token_logps(model, children))
    for t, logp, entropy, mask in passes:
        n = len(t.response)
        own, before = slice(t.start, n), slice(t.start or n)
        assert t.complete == (t.response[-1] == 1) and 1 not in t.response[:-1]
        assert t.complete or n == 14
        assert t.text == TINY.decode(t.response, skip_special_tokens=True) and len(t.entropy) == n
        assert mask.nonzero().flatten().tolist() == list(range(t.start, n))
        assert (logp[own] - t.logps[own]).abs().max() < 1e-4
        assert (entropy[own] - t.entropy[own]).abs().max() < 1e-4
        bare, H = teacher_forced(model, t)
        if t in parents or t.start:  # a prefix was sampled without a latent
            assert (bare - t.logps)[before].abs().max() < 1e-4 > (H - t.entropy)[before].abs().max()
        effects += [(bare - t.logps)[own].abs().max().item()] * (t in children)
    assert min(effects) > 1e-4 and max(effects) > 1e-2

def test_outside_steer_and_with_gamma_0_the_model_is_bit_for_bit_the_bare_one():
    model, c, starts = small_model(), config("--max_new_tokens", 9), prompts("1+2=\n", "3*4*5-6=\n")
    batch, keys, z = m.sample(model, TINY, starts, c), {*model.state_dict()}, torch.ones(2, 16)

    def look():
        seed(0)
        drawn = m.sample(model, TINY, starts, c)
        logits = model(tensor([starts[0].prompt])).logits
        return [logits, *m.token_logps(model, batch), *[t.logps for t in drawn]]

    bare, (_, psa) = look(), m.prepare(model, c)
    assert same(bare, look()) and {*model.state_dict()} == keys  # PSA is no part of the policy
    with pytest.raises(ZeroDivisionError), steer(psa, batch, z):
        assert not torch.equal(m.token_logps(model, batch)[0], bare[1])
        1 / 0
    assert same(bare, look())
    psa.gamma = 0.0
    with steer(psa, batch, z):
        assert same(bare, look())

def test_a_prefix_is_untouched_by_its_branches_latents():
    model, _, (_, psa) = steered()
    t = m.Trajectory([5, 12, 6], response=[3, 4, 12, 5, 6, 7], start=3)
    ids, logits, first = tensor([t.prompt + t.response]), [], 3 + 3 - 1
    for z in torch.randn(2, 1, 4):
        with steer(psa, [t], z):
            logits.append(model(ids).logits[0])
    a, b, bare = *logits, model(ids).logits[0]
    assert torch.equal(a[:first], b[:first]) and (a - bare)[:first].abs().max() < 1e-5
    assert (a - b)[first:].abs().amax(-1).min() > 1e-3

def test_sampling_follows_the_policy():
    """Tokens are drawn from the softmax of the raw logits, at temperature 1."""
    model, start, c = small_model(), prompts("1+2=\n"), config("--max_new_tokens", 1)
    p = model(tensor([start[0].prompt])).logits[0, -1].softmax(-1)
    drawn = tensor([t.response[0] for t in m.sample(model, TINY, start * 4000, c)])
    assert (torch.bincount(drawn, minlength=18) / 4000 - p).abs().max() < 0.04
    assert m.sample(model, TINY, start, c, greedy=True)[0].response == [p.argmax()]

def test_micro_batches():
    sizes = random.Random(0).sample(range(1, 90), 50)
    batches = m.micro_batches(sizes, 200)
    assert sorted(sum(batches, [])) == list(range(50)) and len(batches) < 40
    assert all(len(b) * max(sizes[i] for i in b) <= 200 or len(b) == 1 for b in batches)

# ---- stage 1

def test_branch_positions():
    """t* is drawn uniformly from Ω, the top share of a response's candidates by entropy."""
    H = tensor([[9., .1, .8, .3, .7, 5.],
                [9., 8., 9., .2, .1, 0.],
                [1., 1., 1., 1., 1., 1.],
                [9., 1., 2., 3., 4., 5.]])
    mask = torch.arange(6) < tensor([5, 2, 1, 6])[:, None]
    # row 0: {2, 4} are the top half of the candidates 1 to 4; row 1: only 1 is one;
    # row 2: a single token, so 0; row 3: {4, 5} are the top two of five, and 5 is EOS
    drawn = []
    for i in range(600):
        drawn.append(m.branch_positions(H, mask, 0.5, torch.Generator().manual_seed(i)).tolist())
    assert [set(column) for column in zip(*drawn)] == [{2, 4}, {1}, {0}, {4, 5}]
    assert 250 < sum(row[0] == 2 for row in drawn) < 350  # uniform
    assert m.branch_positions(H, mask, 0.01).tolist() == [2, 1, 0, 5]  # at least one
    parent = m.Trajectory([7], response=[2] * 5, logps=torch.ones(5), entropy=H[0, :5])
    (t,) = m.prefixes_to_branch([parent], config("--top_frac", 0.01))
    assert t.start == len(t.response) == len(t.logps) == len(t.entropy) == 2
    assert t.is_branch and not parent.is_branch  # o_t* is decided again

def test_the_change_of_the_norms_halves_every_so_many_generated_tokens():
    """A norm's weight w becomes w + w_z, where w_z = γ 2^(-age/half-life) W_N z from age 0 on."""
    model, c, (cvae, psa) = steered("--psa_halflife", 2, "--psa_gamma", 0.7)
    norm = model.model.layers[-1].input_layernorm
    x = torch.randn(1, 6, 32)
    bare = norm(x)
    with psa.steer(torch.ones(1, 4), tensor([1])):
        psa.count_columns(None, None, x)  # ages -1, 0, 1, 2, 3 and 4
        changed = norm(x) - bare
    x = x / (x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
    whole = 0.7 * psa.to_norm.weight[-32:].sum(1) * x  # the last layer's part of W_N z
    shares = tensor([0, 1, 0.5 ** 0.5, 0.5, 0.5 ** 1.5, 0.25])
    assert changed.allclose(whole * shares[:, None], atol=1e-5)

def test_latents_are_drawn_from_the_prior():
    seed(0)
    cvae, c, x = m.LatentCVAE(6, 3), torch.randn(5, 6), torch.randn(5, 6)
    prior, posterior, z = cvae.prior(c), cvae.posterior(c, x), cvae.sample(c, 20_000)
    assert z.shape == (20_000, 5, 3) and prior.mean.shape == posterior.mean.shape == (5, 3)
    assert (z.mean(0) - prior.mean).abs().max() < 0.05 > (z.std(0) - prior.stddev).abs().max()
    assert not posterior.mean.allclose(cvae.posterior(c, x.flip(0)).mean, atol=1e-3)
    assert prior.mean.allclose(cvae.prior(7 * c + 3).mean, atol=1e-3)  # features are standardised

def begun(model, c):
    """Return prefixes of many lengths together with how they went on."""
    seed(2)
    batch = m.sample(model, TINY, prompts() + prompts("1+1+2=\n"), c)
    return [replace(t, start=len(t.response) // 2) for t in batch]

def test_the_latents_loss_is_the_elbo_of_the_steered_policy(monkeypatch):
    """The loss is the mean of -ln π(o_>=t* | c, z) + KL / 2, the KL being that of q_φ from p_ψ.
    The KL is worked out here for Gaussians. In each of 4 dimensions it counts as 2 at least."""
    model, c, (cvae, psa) = steered("--psa_halflife", 4, "--psa_layers", 2)
    cvae.posterior_net[-1].weight.data *= 25
    batch, seen, real = begun(model, c), [], psa.steer
    prefixes, continuations = [], []
    monkeypatch.setattr(psa, "steer", lambda z, first: seen.append(z) or real(z, first))
    seed(1)
    e = m.features(model, batch, c)
    loss, logps, fast_kl = m.latent_loss(model, (cvae, psa), batch, *e)
    for t in batch:
        hidden = model.model(tensor([t.prompt + t.response])).last_hidden_state[0]
        n = len(t.prompt) + t.start
        prefixes.append(hidden[:n].mean(0))
        continuations.append(hidden[n:].mean(0))
    prefix, continuation = torch.stack(prefixes), torch.stack(continuations)
    q, p, slow = cvae.posterior(prefix, continuation), cvae.prior(prefix), []
    seed(1)
    assert seen[0].allclose(q.rsample(), atol=1e-4)
    for i, t in enumerate(batch):
        slow.append(slow_tokens(model, psa, t, seen[0][i])[0][t.start:].sum().item())
        assert logps[i].item() == approx(slow[i], abs=1e-4)
    d, ratio = q.mean - p.mean, q.variance / p.variance
    kl = 0.5 * (ratio + d * d / p.variance - 1 - ratio.log())
    assert fast_kl.allclose(kl.mean(0), atol=1e-4) and 0 < (kl > 2).sum() < 16
    counted = sum(max(nats, 2) for nats in kl.flatten().tolist())
    assert loss.item() == approx((counted / 2 - sum(slow)) / 4, abs=1e-4)
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in [*cvae.parameters(), *psa.parameters()])

def test_alternatives_begin_with_the_likeliest_tokens_where_the_policy_hesitates():
    model, c, _ = steered("--cvae_pairs", 50, "--top_frac", 0.3)
    pairs, tokens = m.alternatives(model, TINY, prompts() * 8, c)
    tried = {}
    assert tokens > m.own_tokens(pairs) + 24
    for t in pairs:
        p = model(tensor([t.prompt + t.response[:t.start]])).logits[0, -1].softmax(-1)
        first = t.response[t.start]
        assert first in p.topk(4).indices and p[first] > 0.01
        assert first != 1 and len(t.response) <= 14
        tried.setdefault((*t.prompt, *t.response[:t.start]), set()).add(first)
    assert 20 < len(pairs) <= 50 and sum(len(x) > 1 for x in tried.values()) > 5

def test_training_the_latents_lowers_the_loss_and_leaves_the_policy_alone(monkeypatch):
    model, c, latents = steered("--cvae_steps", 60, "--micro_tokens", 999, scale=1)
    pairs, before = begun(model, c) * 4, [p.clone() for p in model.parameters()]
    monkeypatch.setattr(m, "alternatives", lambda *a: (pairs, 7))
    e = m.features(model, pairs, c)
    first = m.latent_loss(model, latents, pairs, *e)[0]
    report = m.train_latents(model, TINY, latents, [], c)
    last = m.latent_loss(model, latents, pairs, *e)[0]
    assert last < first - 1 < first - 2 + report["z_gain"]
    assert same(before, model.parameters()) and 0 <= report["active_dims"] <= 4
    assert all(p.requires_grad and p.grad is None for p in model.parameters())

def test_micro_batches_of_the_latents_add_up(monkeypatch):
    """Micro-batches have the whole batch's gradient, in which 2 nats of a KL are free."""
    def fresh(*flags):
        model, c, latents = steered("--cvae_steps", 1, *flags)
        latents[0].posterior_net[-1].weight.data *= 30
        return model, c, latents, begun(model, c)

    def gradient():
        return torch.cat([w.grad.flatten() for w in latents.parameters()])

    grads = []
    monkeypatch.setattr(torch.distributions.Normal, "rsample", lambda self: self.mean)  # no noise
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *a: grads.append(gradient()))
    monkeypatch.setattr(m, "alternatives", lambda *a: (pairs, 7))
    for tokens in (999, 50, 1):
        model, c, latents, pairs = fresh("--micro_tokens", tokens)
        m.train_latents(model, TINY, latents, [], c)
    model, c, latents, pairs = fresh()
    e = m.features(model, pairs, c)
    q, p = latents[0].posterior(*e), latents[0].prior(e[0])
    with steer(latents[1], pairs, q.mean):
        logp, _, mask = m.token_logps(model, pairs)
    kl = torch.distributions.kl_divergence(q, p)
    assert kl.shape == (4, 4) and 0 < (kl > 2).sum() < 16
    ((kl.clamp(min=2).sum() / 2 - (logp * mask).sum()) / len(pairs)).backward()
    assert len(grads) == 3 and all(far(grad, gradient()) < 1e-4 for grad in grads)

def test_branches_share_the_budget_first_ones_first(monkeypatch):
    model, c, latents = steered("--branches", 2)
    parents = prompts("1=\n", "2=\n", "3=\n")
    for t, n in zip(parents, (5, 8, 4)):
        t.response = [3] * n
    prefixes = [replace(t, response=[3, 3], start=2) for t in parents]
    monkeypatch.setattr(m, "prefixes_to_branch", lambda *a: prefixes)
    # the branches are expected to take 3, 6 and 2 tokens, and these again
    found = {2: [], 3: [0], 10: [0, 1], 11: [0, 1, 2], 20: [0, 1, 2, 0, 1], math.inf: [0, 1, 2] * 2}
    for parts, budget in itertools.product((latents, []), found):
        assert [t.group for t in m.branch(model, TINY, parts, parents, c, budget)] == found[budget]

# ---- stage 2, and formulas

def test_prompt_information_averages_to_the_mutual_information():
    """Î(q; r) is an estimate whose mean is I(q; r), where a response is a single token.
    Of the two prompts q0 says 3 with probability 3/4 and 4 otherwise, and q1 the reverse."""
    H = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    batch = [m.Trajectory([0], response=[token]) for token in (3, 3, 3, 4, 4, 4, 4, 3)]
    h = m.frequency_entropy(batch)
    assert h == approx(math.log(2))
    found = m.prompt_information(torch.full((8, 1), H), torch.ones(8, 1), h).mean()
    # Σ p(q, o) ln p(o|q) / p(o), where p(o) = 1/2
    by_enumeration = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert found.item() == approx(by_enumeration, abs=1e-6)
    prefixed = m.Trajectory([0], response=[9, 3], start=1)  # the prefix is its parent's
    four_to_one = -0.8 * math.log(0.8) - 0.2 * math.log(0.2)
    assert m.frequency_entropy(batch[:4] + [prefixed]) == approx(four_to_one)

def test_ib_score_by_hand():
    """S_IB = β Î(r; a*) - Î(q; r), each standardised, where Î(q; r) is the sum of h - H_t."""
    # h = 2; prompt 0: Î(q; r) = (2 - 1) + (2 - 0) = 3 and 2 - 1 = 1; prompt 5 has one response
    H = tensor([[1., 0., 9.], [1., 9., 9.], [.5] * 3])
    mask = tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1]])
    assert m.prompt_information(H, mask, 2.0).tolist() == [3, 1, 4.5]
    s = m.trajectory_ib_score(tensor([2., -2., 7.]), H, mask, tensor([0, 0, 5]), 0.5, 2.0)
    # standardised, the gains are 2/2.0001 and -2/2.0001, the informations 1/1.0001 and -1/1.0001
    assert s.tolist() == approx([0.5 * 2 / 2.0001 - 1 / 1.0001, -0.5 * 2 / 2.0001 + 1 / 1.0001, 0])

def test_ib_score_orders_four_responses_as_the_case_study_does():
    """S_IB ranks as the authors' scores do, which are .85, .20, .15 and -.85 in this order."""
    responses = {  # tokens, mean H_t, gain in nats per token of the answer
        "concise": (8, 0.5, 2.0), "drifting": (10, 1.0, -0.5),
        "verbose": (24, 0.5, 2.0), "looping": (30, 0.02, 0.0)}
    lengths, means, gains = (tensor(x) for x in zip(*responses.values()))
    mask = torch.arange(30) < lengths[:, None]
    H = means[:, None].expand(4, 30)
    scores = m.trajectory_ib_score(gains, H, mask, torch.zeros(4), 1.0, 2.3)
    score = dict(zip(responses, scores.tolist()))
    assert score["concise"] > max(score["drifting"], score["verbose"])
    assert min(score["drifting"], score["verbose"]) > score["looping"]

def test_the_filter_keeps_a_contrast_within_each_reward():
    """Of right branches those of highest S_IB stay, of wrong ones of lowest, and all rollouts."""
    def branch(reward, score, group=0):
        return m.Trajectory([1], group=group, reward=reward, score=score, is_branch=True)

    right = [branch(1.0, s) for s in (0.3, 0.9, -0.5, 0.1)]
    wrong = [branch(0.0, s) for s in (0.2, -0.7, 0.8)]
    rollouts = [m.Trajectory([1], reward=r, score=s) for r, s in ((1.0, -9), (0.0, 9))]
    other = [branch(1.0, -5.0, group=3), branch(0.0, 5.0, group=3)]  # each without a rival
    candidates = rollouts + right + wrong + other

    def dropped(keep):
        kept = m.select_top_n(candidates, keep)
        assert kept == [t for t in candidates if t in kept]  # the order stays
        return [t for t in candidates if t not in kept]

    assert dropped(1) == []
    assert dropped(0.75) == [right[2]]  # 3 of 4, and 3 of 3, because shares are rounded up
    assert dropped(0.5) == [right[2], right[3], wrong[2]]
    assert dropped(0.25) == [right[0], right[2], right[3], wrong[0], wrong[2]]

def test_token_entropy():
    """H = -Σ p ln p of the softmax; impossible tokens add 0, and the gradient is finite."""
    assert m.token_entropy(torch.zeros(2, 3, 8)).allclose(torch.full((2, 3), math.log(8)))
    logits = tensor([0.5, 0.25, 0.25]).log()
    assert m.token_entropy(logits).item() == approx(1.5 * math.log(2), abs=1e-6)
    assert m.token_entropy(tensor([3.0, -math.inf])).item() == 0
    x = tensor([200.0, 0.0, 1.0], requires_grad=True)
    m.token_entropy(x).backward()
    assert x.grad.isfinite().all()

def test_group_advantages_by_hand():
    """A = (R - mean) / (std + 1e-4) over a prompt's responses, 0 for equal rewards or one alone."""
    # group 7: rewards 1 0 0 1, so mean 1/2 and population std 1/2; group 3: equal; group 8: alone
    a = m.group_advantages(tensor([1., 0, 3, 0, 1, 3, 9]), tensor([7, 7, 3, 7, 7, 3, 8]))
    assert a.tolist() == approx([0.5 / 0.5001, -0.5 / 0.5001, 0, -0.5 / 0.5001, 0.5 / 0.5001, 0, 0])

def test_policy_loss_by_hand():
    """L = -mean min(min(r, 3) A, clip(r) A); a token is cut where a bound stops its gradient."""
    # ratios 2 and 1/2 with A = 1 and clip 0.2: min(2, 1.2) = 1.2 and min(0.5, 0.8) = 0.5, mean 0.85
    logp, mask = tensor([[math.log(2.0), math.log(0.5), 9.0]]), tensor([[1, 1, 0]])
    for A, method, value in (
            (1, "grpo", -0.85), (-1, "grpo", (2 + 0.8) / 2), (1, "dapo", -(1.28 + 0.5) / 2)):
        loss, stats = m.policy_loss(logp, 0 * logp, tensor([A]), mask, config("--method", method))
        assert loss.item() == approx(value) and stats["clipped"] == 0.5
    for r, A, value, cut in ((5, -1, 3, 1), (2.9, -1, 2.9, 0), (5, 1, -1.2, 1)):  # 3 at most
        logp = tensor([[math.log(r)]])
        loss, stats = m.policy_loss(logp, 0 * logp, tensor([A]), torch.ones(1, 1), config())
        assert loss.item() == approx(value) and stats["clipped"] == cut

@each("gap", [89, 1000, -1000])
def test_no_ratio_makes_a_gradient_of_nan(gap):
    for advantage in (1.0, -1.0):
        logp = tensor([[float(gap)]], requires_grad=True)
        old, mask = tensor([[0.0]]), tensor([[1.0]])
        m.policy_loss(logp, old, tensor([advantage]), mask, config())[0].backward()
        assert logp.grad.isfinite().all()

def test_policy_loss_slowly():
    logp, old, mask = -torch.rand(5, 7), -2 * torch.rand(5, 7), torch.rand(5, 7) < 0.7
    for A in (torch.randn(5), torch.randn(5, 7)):
        terms, cut = [], 0
        for i, t in mask.nonzero().tolist():
            r, a = math.exp(logp[i, t] - old[i, t]), (A[i, t] if A.ndim == 2 else A[i]).item()
            terms.append(-min(min(r, 3) * a, min(max(r, 0.9), 1.3) * a))
            cut += r > 1.3 and a > 0 or (r < 0.9 or r > 3) and a < 0
        loss, stats = m.policy_loss(logp, old, A, mask, config("--clip_low=0.1", "--clip_high=0.3"))
        assert loss.item() == approx(sum(terms) / len(terms), abs=1e-6)
        assert stats["clipped"] == approx(cut / len(terms))

def test_pass_at_k_by_enumeration_and_distinct_n():
    """pass@k is the share of k-subsets of n samples that hold at least one of the c right ones."""
    for n, c, k in itertools.product(range(1, 7), range(7), range(1, 7)):
        if c <= n and k <= n:
            found = [min(s) < c for s in itertools.combinations(range(n), k)]
            assert m.pass_at_k(n, c, k) == approx(sum(found) / len(found))
    assert m.distinct_n(["a b a", "b c"], 1) == 3 / 5 and m.distinct_n(["a b a", "a b"], 2) == 2 / 3
    assert m.distinct_n(["a"], 4) == 0

def test_what_is_logged_of_rollouts_by_hand():
    rows = [(0, 1, "a", 0)] * 2 + [(0, 1, "b", 0), (0, 0, "c", 1), (1, 0, "a", 0), (1, 0, "b", 0)]
    fixed = dict(prompt=[2], response=[3, 4], entropy=tensor([1., 3.]))
    ts = [m.Trajectory(**fixed, group=g, reward=r, text=x, start=s) for g, r, x, s in rows]
    ts[2].text = "#5"  # the only one with an answer
    ts[3].complete = False  # the only one that was cut
    log = m.rollout_metrics(ts)
    assert log == {"reward": 0.5, "eff_rate": 0.5, "solved": 0.5, "distinct_correct": 1.0,
                   "trajectories": 6, "entropy": approx(23 / 11), "tokens_sampled": 11,
                   "cut": 1 / 6, "answered": 1 / 6}

def test_evaluation_by_hand(monkeypatch, tmp_path):
    answers = [["#1", "#1", "3+8\n1\n#1", "2 #2", "7*2\n#1"],  # of gold 1, the greedy one first
               ["#5", "#5", "#5", "4\n#4", "x\n#4"]]  # of gold 4
    monkeypatch.setattr(m, "sample", lambda model, tokenizer, problems, config, greedy=False: [
        replace(t, text=answers[t.group].pop(0), response=[1, 1, 1]) for t in problems])
    problems = [m.Trajectory([], "3+4*2=", "1"), m.Trajectory([], "9-5=", "4")]
    found = m.evaluate(None, None, problems, config("--eval_samples", 4), tmp_path / "s")
    assert found == approx({
        "greedy": 1 / 2, "pass@1": (3 / 4 + 2 / 4) / 2, "pass@4": 1, "maj@4": 1 / 2, "length": 3,
        "distinct_1": (6 / 8 + 4 / 6) / 2, "distinct_4": 0, "distinct_correct": 5 / 2,
        "sound@1": 1 / 4, "sound@4": 1, "distinct_sound": 1})
    answers[:] = [["", "", "", "", "#1"], ["", "", "", "", ""]]  # who does not answer has no vote
    assert m.evaluate(None, None, problems, config("--eval_samples", 4))["maj@4"] == 1 / 2
    lines = [json.loads(x) for x in (tmp_path / "s").read_text().splitlines()]
    assert lines[2] == {"question": "3+4*2=", "answer": "1", "response": "2 #2", "reward": 0.0}
    assert len(lines) == 8

def test_a_sound_response_goes_from_the_question_to_the_answer_by_valid_reductions():
    assert m.is_sound("3+4*2=", "3+8\n1\n#1")
    assert m.is_sound("1+2+3=", "3+3\n6\n#6") and m.is_sound("1+2+3=", "1+5\n6\n#6")
    luck = "7*0\n0\n#0"  # of 3+4*0, which is 3
    assert not m.is_sound("3+4*0=", luck)
    assert not m.is_sound("2+3*0-2=", "5*0-2\n0-2\n8\n#8")
    for text in ("#1", "1\n#1", "3+8\n#1", "3+8\n1\n1\n#1", "3+8\n\n1\n#1", "3+4*2\n3+8\n1\n#1", "",
                 "3+8=\n1\n#1", "3+8\n11\n#1", "3+8\n1\n#2", "3+8\n1\n", "3+8\n1", "٣+8\n1\n#1"):
        assert not m.is_sound("3+4*2=", text), text

# ---- the whole step against slow loops

def explored(monkeypatch, *flags):
    """Run a step of the method up to its update, with known latents."""
    model, c, latents = steered(
        *"--branches 3 --initial 2 --keep .6 --top_frac .3 --kappa .2 --beta .7".split(),
        "--max_grad_norm", 1e9, *flags)
    monkeypatch.setattr(m, "assign_rewards", by_checksum)
    drawn = catch_latents(monkeypatch, latents[0])
    problems = m.shard(m.encode([("1+2*3=", "7"), ("9-4=", "15")], model, TINY, c))
    seed(8)
    return model, c, latents, drawn, *m.explore(model, TINY, latents, problems, c)

def answer_texts(prompt, *texts):
    """Return the texts that `answer_gain` puts before the answer, with a token per character."""
    seen = []

    def tokenizer(text, **others):
        seen.append(text)
        return SimpleNamespace(input_ids=[5] * len(text) + [6] * text.endswith("18"))

    batch = [m.Trajectory([5], gold="18", text=text) for text in texts]
    m.answer_gain(small_model(), tokenizer, batch, config("--prompt", prompt))
    return {text.removesuffix("18") for text in seen}

def test_a_response_is_cut_where_its_answer_was_found():
    boxed = "{question} Answer in \\boxed{}."
    for response in ("so\n\\boxed 18", "so\n\\fbox{18}", "so\n\\boxed{18}", "so\n"):
        assert answer_texts(boxed, response) == {"so\n\\boxed{"}
    twice = "First \\boxed{3}, so\n\\boxed{18}"  # the last box is the answer
    assert answer_texts(boxed, twice) == {"First \\boxed{3}, so\n\\boxed{"}
    headed = "#### Step 1: add\n2+3\n#### 18"
    prompt = "{question} End with ####."
    assert answer_texts(prompt, headed) == {"#### Step 1: add\n2+3\n#### "}

def test_the_tokens_of_an_answer_are_those_of_the_whole_text():
    """An answer begins with the token of its first sign, even if that token begins with a brace."""
    golds = ["\\frac{3}{4}", "-7", "(1,2)", "18", "{x}", "|x|"]
    bpe = bpe_tokenizer([f"so \\boxed{{{gold}}}" for gold in golds] * 30)
    merged = 0
    for gold, said in itertools.product(golds, ("so ", "")):
        probe = m.answer_probe(m.Trajectory([5], gold=gold), said, "\\boxed{", bpe)
        joint = bpe(said + "\\boxed{" + gold, add_special_tokens=False).input_ids
        assert probe.response == joint
        answer = bpe.decode(joint[probe.start:])
        assert answer.endswith(gold) and len(answer) <= len("\\boxed{" + gold)
        merged += answer != gold
    assert merged > 0

def test_a_slow_reference_reproduces_the_method(monkeypatch):
    """Loops over the formulas find the same Ω, Î, S_IB, filter, advantages, loss and gradient."""
    model, c, (cvae, psa), drawn, candidates, kept = explored(monkeypatch)
    alike = [replace(candidates[0], text=text) for text in ("9#5", "9#1", "9")]  # r̄ is "9" in all
    assert len(set(m.answer_gain(model, TINY, alike, c).tolist())) == 1
    gains, informations, terms = [], [], []
    said = Counter(token for t in candidates for token in t.response[t.start:])
    h = -sum(n / said.total() * math.log(n / said.total()) for n in said.values())
    assert len(candidates) == 16
    latent = dict(zip(candidates[4:], drawn, strict=True))
    for t, parent in zip(candidates, itertools.cycle(candidates[:4])):
        logp, H = slow_tokens(model, psa, t)
        if t in latent:
            own, own_H = slow_tokens(model, psa, t, latent[t])  # the prefix was sampled without
            logp = torch.cat([logp[:t.start], own[t.start:]])
            H = torch.cat([H[:t.start], own_H[t.start:]])
            order = sorted(range(1, len(parent.response)), key=lambda j: -parent.entropy[j].item())
            assert t.start in order[:max(1, int(0.3 * len(order)))]  # Ω
            assert t.group == parent.group and t.response[:t.start] == parent.response[:t.start]
        assert (logp - t.logps).abs().max() < 1e-5 and (H - t.entropy).abs().max() < 2e-5
        value = []
        for x in (t.text[:m.find_answer(t.text)[1]], ""):
            probe = m.Trajectory(t.prompt, response=TINY(x + "#" + t.gold).input_ids)
            value.append(slow_tokens(model, psa, probe)[0][-len(t.gold):].mean().item())
        gains.append(value[0] - value[1])
        informations.append(sum(h - x.item() for x in H))
    expected = []
    for g in (0, 1):
        own = [i for i, t in enumerate(candidates) if t.group == g]
        S = {i: 0.0 for i in own}
        for weight, terms_of in ((0.7, gains), (-1, informations)):
            found = [terms_of[i] for i in own]
            for i in own:
                score = (terms_of[i] - statistics.fmean(found)) / (statistics.pstdev(found) + 1e-4)
                S[i] += weight * score
        assert [candidates[i].score for i in own] == approx([S[i] for i in own], abs=1e-3)
        expected += own[:2]
        for reward in (0.0, 1.0):
            rivals = [i for i in own[2:] if candidates[i].reward == reward]
            rivals.sort(key=lambda i: S[i], reverse=reward == 1)
            expected += rivals[:math.ceil(0.6 * len(rivals))]
    assert [candidates[i] for i in sorted(expected)] == kept and len(kept) < len(candidates)

    m.set_advantages(candidates, kept)
    shake(kept)
    for t in kept:
        n, k = ([(p.group, p.reward) for p in ts].count((t.group, t.reward))
                for ts in (candidates, kept))
        rewards = [p.reward for p in candidates if p.group == t.group]
        A = (t.reward - statistics.fmean(rewards)) / (statistics.pstdev(rewards) + 1e-4)
        A *= n / k  # those kept stand for all
        logp, H = slow_tokens(model, psa, t)  # of the bare policy
        for i in range(t.start, len(t.response)):  # a prefix belongs to its parent
            r = (logp[i] - t.logps[i]).exp()
            terms.append(-clipped_objective(r, A) - 0.2 * A * H[i])
    loss, grab = sum(terms) / len(terms), grabber(model)
    slow, stats = gradient(loss, model), m.update(model, grab, kept, c)
    assert stats["loss"] == approx(loss.item(), abs=1e-5) and stats["clipped"] > 0
    assert far(grab.grads[0], slow) < 1e-5
    assert stats["tokens_trained"] == m.own_tokens([t for t in kept if t.advantage != 0])
    assert all(p.grad is None for p in [*cvae.parameters(), *psa.parameters()])

def test_the_ratio_of_a_branch_is_its_importance_weight(monkeypatch):
    """The ratio is 1 where no latent steered the sampling, else π bare over π steered."""
    model, c, *_, candidates, _ = explored(monkeypatch)
    for t in candidates:
        t.advantage = 1.0
    rollouts, branches = candidates[:4], candidates[4:]
    first, then = (m.update(model, grabber(model), batch, c) for batch in (rollouts, branches))
    assert first["ratio"] == approx(1, abs=1e-5) and first["clipped"] == 0
    weights = torch.cat([(teacher_forced(model, t)[0] - t.logps)[t.start:] for t in branches]).exp()
    assert then["ratio"] == approx(weights.mean().item(), abs=1e-4)
    assert (weights - 1).abs().max() > 0.1
    assert then["clipped"] == approx((weights > 1.2).float().mean().item())
    with monkeypatch.context() as patch:  # an ablation
        steer_the_update_too(patch.setattr)
        model, c, *_, candidates, _ = explored(monkeypatch)
        for t in candidates:
            t.advantage = 1.0
        assert m.update(model, grabber(model), candidates, c)["ratio"] == approx(1, abs=1e-5)

def test_exploring_keeps_the_initial_rollouts_and_the_token_budget(monkeypatch):
    calls, real = [], m.branch
    monkeypatch.setattr(m, "branch", lambda *a: calls.append((a[-1], real(*a))) or calls[-1][1])
    *_, candidates, kept = explored(monkeypatch, "--rollouts", 4, "--ib_rounds", 2)
    (budget, branches), (left, more) = calls
    assert candidates == candidates[:4] + branches + more and kept[:4] == candidates[:4]
    whole = m.own_tokens(candidates[:4]) * (4 / 2 - 1)  # what 4 rollouts have more than 2
    assert budget == whole / 2 and left == whole - m.own_tokens(branches)

# ---- update

def batch_for_update(model, n=12):
    seed(3)
    batch = m.sample(model, TINY, prompts() * (n // 3), config("--max_new_tokens", 15))
    for t, advantage in zip(batch, torch.randn(n).tolist()):
        t.advantage = advantage
    shake(batch)
    return batch

@each("method", ["iiblpo", "entropy_reg"])
def test_micro_batches_and_logits_in_chunks_give_the_gradient_of_the_whole_batch(
        method, monkeypatch):
    model, terms = small_model(vocab_size=50), []
    flags = ["--method", method, "--max_grad_norm", 1e9, "--entropy_bonus", 0.1]
    batch = batch_for_update(model)
    batch[0].advantage = 0.0  # its tokens count in the mean
    for t in batch:
        logp, H = teacher_forced(model, t)
        bonus = 0.1 if method == "entropy_reg" else 0.005 * t.advantage
        terms.append(-clipped_objective((logp - t.logps).exp(), t.advantage) - bonus * H)
    parts = [torch.cat(terms[i::2]) for i in (0, 1)]
    loss, grads = torch.cat(parts).mean().item(), [gradient(part.mean(), model) for part in parts]
    grad = sum(len(part) * g for part, g in zip(parts, grads)) / sum(map(len, parts))
    for flag, value, logits, slow in (
            ("--micro_tokens", 60, 2 ** 25, [grad]), ("--micro_tokens", 2048, 300, [grad]),
            ("--updates_per_step", 2, 2 ** 25, grads)):
        monkeypatch.setattr(m, "LOGITS", logits)
        grab = grabber(model)
        stats = m.update(model, grab, batch, config(flag, value, *flags))
        assert all(far(a, b) < 1e-5 for a, b in zip(grab.grads, slow, strict=True))
        assert slow is grads or stats["loss"] == approx(loss, abs=1e-5)
    assert m.update(model, grab, batch[:1], config())["tokens_trained"] == 0
    assert len(grab.grads) == 2

def test_all_methods_divide_by_all_own_tokens():
    """Without its own term each method has the same gradient, whichever rows it leaves out."""
    model = small_model()
    batch = batch_for_update(model)
    for t in batch[:5]:
        t.advantage = 0.0
    losses = []
    for t in batch:
        r = (teacher_forced(model, t)[0] - t.logps).exp()
        losses.append(-clipped_objective(r, t.advantage))
    slow = gradient(torch.cat(losses).sum() / m.own_tokens(batch), model)
    for method in ("grpo", "iiblpo", "entropy_reg"):
        grab = grabber(model)
        flags = ["--method", method, "--kappa", 0, "--entropy_bonus", 0, "--max_grad_norm", 1e9]
        m.update(model, grab, batch, config(*flags))
        assert far(grab.grads[0], slow) < 1e-5

def test_dapo_samples_in_the_place_of_prompts_that_teach_nothing(monkeypatch):
    c = config("--method", "dapo", "--prompts_per_step", 3, "--rollouts", 2, "--max_new_tokens", 6)
    rewards = {0: [1., 1.], 1: [1., 0.], 2: [0., 0.],  # two to replace,
               3: [0., 1.], 4: [1., 1.], 5: [1., 0.]}  # and then one
    monkeypatch.setattr(m, "assign_rewards", lambda batch, config: [
        setattr(t, "reward", rewards[t.group].pop()) for t in batch])
    seed(1)
    candidates, kept = m.dapo_rollouts(small_model(), TINY, prompts(*["1=\n"] * 50), c)
    assert sorted(t.group for t in candidates) == sorted([0, 1, 2, 3, 4, 5] * 2)
    assert kept == [t for t in candidates if t.complete and t.group in (1, 3, 5)]
    assert 0 < len(kept) < 6  # some were cut at the length limit

# ---- runs

def interrupt_at_step_3(script, name, log, *flags):
    """Repeat the run of `log` in the folder `part`, and press Ctrl-C in its step 3, in `name`."""
    def dies(*args):
        if Path("part/metrics.jsonl").exists() and len(metrics("part")) == 3:
            raise KeyboardInterrupt
        return real(*args)

    real = getattr(script, name)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(script, name, dies)
        start(script, *flags, "--out", "part")
    assert metrics("part") == log[:3] and len(torch.load("part/state.pt")["log"]) == 2

@each("method", ["iiblpo", "grpo", "dapo", "entropy_reg"])
def test_a_run_writes_what_it_promises_and_goes_on_exactly(rewarded, method):
    flags = ["--method", method]
    summary = run(*flags, "--out", "whole")
    log, state = metrics("whole"), torch.load("whole/state.pt")
    keys = set("reward eff_rate entropy solved distinct_correct tokens_sampled tokens_trained "
               "trajectories loss".split())
    assert [x["step"] for x in log] == [0, 1, 2, 3] and all(keys <= x.keys() for x in log)
    keys = set("greedy pass@1 pass@2 maj@2 distinct_1 distinct_4 distinct_correct length "
               "sound@1 sound@2 distinct_sound".split())
    assert summary["before"].keys() == keys == summary["after"].keys()
    assert json.loads(Path("whole/summary.json").read_text()) == summary
    assert Path("whole/samples.jsonl").read_text().count('"reward": ') == 4 * 2
    saved = transformers.AutoModelForCausalLM.from_pretrained("whole/model").state_dict()
    assert same(saved.values(), state["model"].values())
    assert not same(saved.values(), small_model().parameters())
    seed(99)  # whatever happened before
    interrupt_at_step_3(m, "update", log, *QUICK, *flags)
    file = Path("part/metrics.jsonl")
    file.unlink() if method == "grpo" else file.write_text(file.read_text()[:99])  # cut by a crash
    resumed = run(*flags, "--out", "part", "--resume")
    assert metrics("part") == log and all(resumed[k] == summary[k] for k in ("before", "after"))
    assert not list(Path().rglob("*.tmp"))

def test_max_tokens_ends_a_run_and_other_settings_or_folders_are_refused(folder, capsys):
    flags = ["--method", "grpo", "--out", "a"]
    run(*flags, "--max_steps", 99, "--max_tokens", 300)
    tokens = [x["tokens_sampled"] for x in metrics("a")]
    assert sum(tokens[:-1]) < 300 <= sum(tokens) and len(tokens) > 1
    before = {p: p.stat().st_mtime_ns for p in Path("a").rglob("*")}
    assert "a exists" in refused(capsys, *QUICK, *flags)
    assert "lr 0.001, not 0.5" in refused(capsys, *QUICK, *flags, "--resume", "--lr", 0.5)
    assert before == {p: p.stat().st_mtime_ns for p in Path("a").rglob("*")}
    run(*flags, "--resume", "--max_steps", len(tokens) + 1)  # longer than it was
    assert len(metrics("a")) == len(tokens) + 1
    Path("a/state.pt").write_bytes(b"")  # as a power cut may leave it
    assert "cannot read a/state.pt" in refused(capsys, *QUICK, *flags, "--resume")

def test_a_gradient_that_is_not_finite_ends_the_run_with_its_last_checkpoint(
        folder, monkeypatch, capsys):
    real, calls = m.take_step, itertools.count()

    def step(model, *others):
        model.lm_head.weight.grad[0] *= math.nan if next(calls) == 3 else 1
        return real(model, *others)

    monkeypatch.setattr(m, "take_step", step)
    flags = ["--method", "entropy_reg", "--out", "run", "--save_every", 1]
    assert "not finite" in refused(capsys, *QUICK, *flags)
    assert len(torch.load("run/state.pt")["log"]) == 3 == len(metrics("run"))

@posix
def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(rewarded, capsys):
    flags = ["--method", "entropy_reg", "--out", "run"]
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    run(*flags, "--max_steps", 2)
    before = {p: Path(p).read_bytes() for p in ("run/state.pt", "run/model/model.safetensors")}
    for limit in (1000, 50_000):  # metrics.jsonl does not fit, or only the checkpoint does not
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))  # no file may grow beyond
        try:
            assert "cannot write run/" in refused(capsys, *QUICK, *flags, "--resume")
            with pytest.raises(SystemExit):
                m.save_atomically(Path("run/model"), small_model().save_pretrained)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        assert before == {p: Path(p).read_bytes() for p in before}
        assert not list(Path().rglob("*.tmp"))
    run(*flags, "--resume")

OFFLINE = """
import runpy, socket, sys
def refuse(*args, **kwargs):
    open("network", "a").write(repr(args))
    raise OSError("no network")
socket.socket.connect = socket.socket.connect_ex = refuse
socket.getaddrinfo = socket.create_connection = refuse
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""

@posix
def test_a_killed_run_goes_on_and_nothing_tries_the_network(folder, capsys, monkeypatch):
    write_lines({"question": f"{i}+1=", "answer": f"{i + 1}"} for i in range(9))
    flags = ["--dataset", "d.jsonl", "--method", "entropy_reg", "--max_steps", 8]
    command = [sys.executable, "-c", OFFLINE, HERE / "iiblpo.py", *QUICK, *flags, "--out", "part"]
    pipe = subprocess.PIPE
    process = subprocess.Popen(list(map(str, command)), stderr=pipe, stdout=pipe)
    while not Path("part/metrics.jsonl").exists() or len(metrics("part")) < 3:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert not Path("part/summary.json").exists() and not Path("network").exists()
    whole, resumed = run(*flags, "--out", "whole"), run(*flags, "--out", "part", "--resume")
    assert metrics("part") == metrics("whole") and whole["after"] == resumed["after"]
    monkeypatch.setattr(socket.socket, "connect", None)
    assert "cannot load" in refused(capsys, "--model=Qwen2.5-0.5B", "--dataset=gsm8k", "--out=run")

def test_show_prints_how_a_problem_is_explored(folder, capsys):
    candidates = run("--show")
    out = capsys.readouterr().out
    assert out.count("reward ") == len(candidates) == out.count("S_IB ") > 2 <= out.count("kept")
    assert "▸" in out and not Path("runs").exists()  # nothing is written
    run("--max_steps", 1, "--out", "run")
    capsys.readouterr()
    done = run("--show", "--model", "run/model")
    assert capsys.readouterr().out.count("reward ") == len(done)

def test_the_table_shows_what_grpo_got_with_the_same_settings(folder, capsys):
    def printed(*flags):
        run("--max_steps", 1, *flags)
        return capsys.readouterr().out

    hint = "run --method grpo --out runs/grpo-policy-0; then --resume this run to see both"
    assert hint in printed("--out", "runs/alone")
    assert "GRPO's" not in printed("--method", "grpo") and "GRPO's" in printed()
    m.print_table(Path(), json.loads(Path("runs/alone/summary.json").read_text()))  # --out .
    for flags in ("--eval_prompts=5", "--seed=1", "--habit=0", "--warm_steps=9"):
        assert "GRPO's" not in printed("--out", f"runs/{flags}", flags)

def test_the_table_is_followed_by_what_it_says():
    before = {"pass@1": 0.33, "pass@16": 0.79, "distinct_correct": 1.5}
    after = {"pass@1": 0.5, "pass@16": 0.9375, "distinct_correct": 2.204}
    summary = {"before": before, "after": after, "config": {"eval_samples": 16}}
    assert m.in_words(summary) == (
        "50% of the responses are right (before: 33%), 94% of the problems have a right one\n"
        "among 16 (before: 79%), and a problem has 2.20 different right responses (before: 1.50).")

@posix
def test_show_into_head_and_a_terminal_of_ascii(folder):
    words = [sys.executable, HERE / "iiblpo.py", *QUICK, "--show", "| true; exit ${PIPESTATUS[0]}"]
    done = subprocess.run(["bash", "-c", " ".join(map(str, words))], capture_output=True, text=True,
                          env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and done.stderr == ""

# ---- a run checks itself

def test_a_run_prints_what_its_self_check_found(folder, capsys):
    for script, flags in ((m, QUICK), (tpo, TREES)):
        start(script, *flags, "--max_steps", 1, "--out", script.__name__)
        line = re.search("self-check: .*", capsys.readouterr().out)[0]
        gaps = [float(number) for number in re.findall(r"\d\S*e-\d+", line)]
        assert len(gaps) == (3 if script is m else 2) and max(gaps) < 1e-5

def test_latents_that_steer_a_single_token_end_the_run(folder, monkeypatch, capsys):
    """Latents that steer one token only, as under transformers 5.24, are found before training."""
    def forget(self, embedding, args, output):
        if self.steering:
            self.age = torch.arange(output.shape[1]) - self.first

    monkeypatch.setattr(m.PseudoSelfAttention, "count_columns", forget)
    message = refused(capsys, *QUICK, "--out", "run")
    assert "a steered batch" in message and "ln π of sampling and of training differ" in message
    assert not Path("run").exists()

def test_latents_that_change_nothing_end_the_run(folder, monkeypatch, capsys):
    monkeypatch.setattr(m.PseudoSelfAttention, "steer", lambda *a: contextlib.nullcontext())
    assert "latents change nothing" in refused(capsys, *QUICK, "--out", "run")

def test_a_padded_batch_unlike_its_rows_ends_the_run(folder, monkeypatch, capsys):
    real = m.token_logps

    def spoiled(model, batch):
        logp, *others = real(model, batch)
        return logp + math.nan * (len(batch) > 1), *others

    monkeypatch.setattr(m, "token_logps", spoiled)
    assert "a padded batch inf" in refused(capsys, *QUICK, "--out", "run")

# Models that see more than a tree's mask and positions: ALiBi and local attention count columns
UNFIT = {
    "Mpt": dict(d_model=32, n_heads=4, n_layers=3, max_seq_len=512),
    "GPTNeo": dict(hidden_size=32, num_layers=2, attention_types=[[["local"], 2]], window_size=16,
                   num_heads=4, max_position_embeddings=512),
    "Bloom": dict(hidden_size=32, n_layer=3, n_head=4),
    "Falcon": dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, alibi=True)}

@each("kind", UNFIT)
def test_models_that_trees_do_not_fit_end_the_run(folder, capsys, kind):
    settings = getattr(transformers, kind + "Config")(
        vocab_size=18, eos_token_id=1, bos_token_id=1, initializer_range=0.2, **UNFIT[kind])
    seed(0)
    getattr(transformers, kind + "ForCausalLM")(settings).save_pretrained("policy")
    message = refused(capsys, *TREES, "--max_new_tokens", 48, "--out", "run", script=tpo)
    assert "packed tree" in message and not Path("run").exists()

def test_no_column_of_padding_sees_nothing(monkeypatch):
    """Every column sees another or itself, because attention to nothing is NaN on CUDA."""
    spy = Mock(wraps=torch.nn.functional.scaled_dot_product_attention)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    model, c, latents = steered()
    batch = m.sample(model, TINY, prompts("1=\n", "3*4*5-6+7=\n"), c)
    m.branch(model, TINY, latents, batch, c)
    m.token_logps(model, batch)
    masks = [call.kwargs.get("attn_mask") for call in spy.call_args_list]
    masks = [mask for mask in masks if mask is not None]
    assert len(masks) > 50 and all(mask.any(-1).all() for mask in masks)

def test_the_gap_of_each_step_is_that_of_tokens_without_a_latent(folder):
    run("--method", "entropy_reg", "--max_steps", 2, "--out", "run")
    assert all(0 < line["sampling_gap"] < 1e-5 for line in metrics("run"))
    model, c, latents = steered("--updates_per_step", 1)
    parents = m.sample(model, TINY, prompts() * 2, c)
    batch = [replace(t, advantage=1.0, logps=t.logps + (5.0 if t.is_branch else 0.25))
             for t in parents + m.branch(model, TINY, latents, parents, c)]
    gap = 0.25 * m.own_tokens(parents) / m.own_tokens(batch)  # branches count as 0
    assert m.update(model, grabber(model), batch, c)["sampling_gap"] == approx(gap, abs=1e-5)

# ---- memory

@each("script", [m, tpo])
def test_layers_that_are_run_again_give_the_same_gradient(script):
    grads = []
    for recompute in ("True", "False"):
        model = small_model()
        if script is m:
            grab, batch = grabber(model), batch_for_update(model)
            m.update(model, grab, batch, config("--recompute", recompute))
            grads += grab.grads
        else:
            flags = ["--kl", 0.1, "--recompute", recompute]
            grads += packed(model, grown()[1], small_model(seed=1), *flags)[0]
        assert all("forward" not in vars(module) for module in model.modules())
    assert far(*grads) < 1e-6

def test_layers_that_are_run_again_keep_only_their_inputs():
    kept = {}
    for recompute in ("True", "False"):
        model, saved = small_model(), []
        batch = batch_for_update(model)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
            with m.recompute_layers(model, config("--recompute", recompute)):
                m.last_states(model, batch)
        weights = {weight.data_ptr() for weight in model.parameters()}
        sizes = {x.data_ptr(): x.numel() for x in saved if x.data_ptr() not in weights}
        kept[recompute] = sum(sizes.values())
    assert kept["True"] < kept["False"] / 3

@each("script, flags", [(m, [*QUICK, "--method", "entropy_reg"]), (tpo, TREES)])
def test_a_full_gpu_is_one_line_and_the_last_checkpoint_stays(
        folder, capsys, monkeypatch, script, flags):
    full = torch.OutOfMemoryError("CUDA out of memory.")
    monkeypatch.setattr(script, "take_step", Mock(side_effect=full))
    message = refused(capsys, *flags, "--out", "run", script=script)
    assert "lower --micro_tokens" in message and "--generate_tokens" in message
    assert torch.load("run/state.pt")["log"] == []
    monkeypatch.undo()
    os.chdir(folder)
    assert len(start(script, *flags, "--out", "run", "--resume", "--micro_tokens", 99)["after"]) > 5

# ---- a run speaks

def test_a_run_says_what_it_uses_what_it_does_and_how_long_it_takes(folder, capsys):
    run("--max_steps", 2, "--max_tokens", 99999, "--out", "run")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("device: CPU, ") and lines[0].endswith("threads, fp32")
    assert lines[1].startswith("self-check: ")
    assert re.fullmatch(r"  reward [01] \(answer \d\): \S*", lines[2])  # in every tenth step
    steps = [line for line in lines if line.startswith("step ")]
    assert len(steps) == 2 and re.fullmatch(
        r"step 2 of 2, [\d,]+ of 99,999 tokens, 0 min left: reward .* cut \d.\d\d answered \d.\d\d",
        steps[1])

def test_bars_appear_in_a_log_file_at_least_every_half_minute(capsys):
    assert [*m.progress("ab", "work", delay=0, mininterval=0)] and "work" in capsys.readouterr().err
    assert m.progress.keywords["delay"] <= 10 and m.progress.keywords["mininterval"] <= 30

def test_ctrl_c_says_what_is_true(folder, monkeypatch, capsys):
    for name, advice in {"evaluate": "nothing was saved", "update": "--resume goes on"}.items():
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(m, name, Mock(side_effect=KeyboardInterrupt))
            run("--method", "grpo", "--out", name)
        assert f"interrupted: {advice}" in capsys.readouterr().err
        assert Path(name, "state.pt").exists() == (name == "update")

def test_the_learning_rate_rises_and_falls_and_gamma_falls():
    for script, c in (m, config("--lr", 0.8)), (tpo, tree_config("--lr", 0.8)):
        for step, done, lr in (0, 0, 0.04), (9, 0.25, 0.4), (40, 0.5, 0.4), (79, 0.75, 0.2):
            psa, optimizer = SimpleNamespace(), SimpleNamespace(param_groups=[{}])
            script.set_schedule(SimpleNamespace(state={"log": [0] * step}, done=done,
                                                optimizer=optimizer, auxiliary=[0, psa]), c)
            assert optimizer.param_groups[0]["lr"] == approx(lr)
            assert script is tpo or psa.gamma == approx(1.3 * (1 - done))

def test_a_run_s_folder_names_its_model(folder):
    assert m.folder_of(config()) == Path("runs/iiblpo-tiny-0")
    c = config("--model", "Qwen/Qwen2.5-0.5B", "--seed", 3)
    assert m.folder_of(c) == Path("runs/iiblpo-Qwen2.5-0.5B-3")
    run("--method", "grpo", "--max_steps", 1)
    assert Path("runs/grpo-policy-0/summary.json").exists()

@each("script, flag", [(m, "--show"), (m, "--probe_heads"), (tpo, "--show")])
def test_a_wrong_data_set_shows_before_a_model_is_loaded(folder, capsys, monkeypatch, script, flag):
    monkeypatch.setattr(script, "load_policy", None)
    flags = QUICK if script is m else TREES
    assert "no data set" in refused(capsys, *flags, flag, "--dataset", "gms8k", script=script)

def test_a_checkpoint_holds_latents_but_no_frozen_reference(folder):
    run("--max_steps", 1, "--out", "a")
    start(tpo, *TREES, "--kl", 0.1, "--max_steps", 1, "--out", "b")
    assert "auxiliary" in torch.load("a/state.pt")
    assert {*torch.load("b/state.pt")} == {"config", "log", "before", "model", "optimizer"}

NOTEBOOK = """
import runpy, sys
class Cell:  # the stdout of a notebook: it cannot be reconfigured
    encoding = "utf-8"
    def write(self, text): sys.__stdout__.write(text)
    def flush(self): pass
    def isatty(self): return False
sys.stdout = Cell()
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""

@each("script", SCRIPTS)
def test_a_notebook_can_run_a_script(script):
    words = [sys.executable, "-c", NOTEBOOK, HERE / script, "--help"]
    done = subprocess.run(words, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0 and "--eval_dataset" in done.stdout, done.stderr

@each("has_bf16", [True, False])
def test_bf16_only_where_the_card_has_it(has_bf16):
    """A card such as a T4, which says that it supports bf16 but emulates it, computes in fp32."""
    text = ("import torch\ntorch.cuda.is_available = lambda: True\n"
            "torch.cuda.is_bf16_supported = "
            f"lambda including_emulation=True: including_emulation or {has_bf16}\n"
            "import iiblpo as m\nprint(m.DEVICE, m.BF16, m.autocast.keywords)")
    said = subprocess.check_output([sys.executable, "-c", text], text=True, cwd=HERE)
    assert said == f"cuda {has_bf16} {{'enabled': {has_bf16}}}\n"

# ---- real models

def test_a_real_model_folder_with_chat_template_and_local_data(tmp_path, monkeypatch):
    """A Llama with a BPE tokenizer, no pad token and a chat template runs like one of the hub."""
    monkeypatch.chdir(tmp_path)
    prompt = config("--model", "x").prompt
    tokenizer = bpe_tokenizer([r["question"] + r["answer"] + prompt for r in ROWS])
    tokenizer.chat_template = (
        "<s>{% for x in messages %}<|user|>{{ x.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt and enable_thinking is not false %}...{% endif %}")
    tokenizer.save_pretrained("chat")
    model = small_model("Llama", vocab_size=len(tokenizer), bos_token_id=0, pad_token_id=None)
    model.generation_config = GenerationConfig(eos_token_id=[1, 2], top_k=1, do_sample=True)
    model.save_pretrained("chat")
    write_lines(ROWS)
    flags = [*QUICK, "--model", "chat", "--dataset", "d.jsonl", "--prompt", prompt]
    loaded, t = m.load_policy(config(*flags))
    (problem,) = m.encode([("What is 1+1?", "2")], loaded, t, config(*flags))
    asked = prompt.replace("{question}", "What is 1+1?")
    assert t.decode(problem.prompt) == f"<s><|user|>{asked}<|end|>" and problem.prompt.count(0) == 1
    batch = m.sample(loaded, t, [problem] * 99, config(*flags))
    assert len({t.response[0] for t in batch}) > 9  # top_k is not 1 any more
    assert {t.response[-1] for t in batch if t.complete} == {1, 2, 3}  # 3 ends the template's turn
    assert run(*flags, "--out", "run", "--max_steps", 2)["after"]["length"] <= 12

def without_eos():
    small_model(eos_token_id=None).save_pretrained("policy")
    Path("policy/generation_config.json").unlink()
    PreTrainedTokenizerFast(tokenizer_object=TINY.backend_tokenizer).save_pretrained("policy")

@each("spoil, message", [
    (without_eos, "no end-of-sequence token"),
    (lambda: Path("policy/tokenizer.json").unlink(), "cannot load the model policy"),
    (lambda: small_model(initializer_range=math.inf).save_pretrained("policy"), "finite"),
    (lambda: small_model("Granite", logits_scaling=8.0).save_pretrained("policy"),
     "scales or caps its")])
def test_a_model_that_cannot_be_used_is_one_line(folder, capsys, spoil, message):
    spoil()
    assert message in refused(capsys, *QUICK, "--method", "grpo", "--out", "run")
    assert not Path("run").exists()

def test_an_end_token_may_have_the_id_0(folder):
    small_model(eos_token_id=0, ends=0).save_pretrained("policy")
    assert m.load_policy(config(*QUICK))[0].generation_config.eos_token_id == [0]

def test_each_end_token_is_listed_once(folder):
    small_model(ends=[1, 1, 17]).save_pretrained("policy")
    assert m.load_policy(config(*QUICK))[0].generation_config.eos_token_id == [1, 17]

def test_a_prompt_does_not_end_with_an_end_token(folder):
    """EOS is taken off a prompt, because some tokenizers put it behind every text."""
    backend = TINY.backend_tokenizer.to_str()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(backend), eos_token="<eos>", pad_token="<pad>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", 1)])
    assert tokenizer("1+2=").input_ids[-1] == 1
    (problem,) = m.encode([("1+2=", "3")], small_model(), tokenizer, config())
    assert problem.prompt == TINY("1+2=\n").input_ids

def test_a_template_with_the_date_makes_the_same_prompts_every_day():
    tokenizer = bpe_tokenizer(["What is 1+1? 01 Jan 2026"] * 9)
    dated = "{% for x in messages %}{{ strftime_now('%d %b %Y') }} {{ x.content }}{% endfor %}"
    tokenizer.chat_template = dated
    text = m.apply_template(tokenizer, [{"role": "user", "content": "What?"}], tokenize=False)
    assert text == "01 Jan 2026 What?"
    assert tokenizer.chat_template == dated  # what is saved is the model's own

def test_a_template_that_raises_is_one_line(folder, capsys):
    tokenizer = m.tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    tokenizer.save_pretrained("policy")
    message = refused(capsys, *QUICK, "--out", "run")
    assert "chat template cannot be used" in message and "roles must alternate" in message

def test_the_tokenizer_is_saved_as_it_was(folder):
    run("--method", "grpo", "--max_steps", 1, "--out", "run")
    saved = json.loads(Path("run/model/tokenizer_config.json").read_text())
    assert (saved["pad_token"], saved["eos_token"]) == ("<pad>", "<eos>")
    bare = bpe_tokenizer(["What is 1+1?\n\n"] * 9)  # without a pad token
    m.save_policy(folder / "bare", small_model("Llama"), bare)
    assert "pad_token" not in json.loads(Path("bare/tokenizer_config.json").read_text())
    loaded = transformers.AutoTokenizer.from_pretrained("bare")
    assert loaded("What 1?\n").input_ids == bare("What 1?\n").input_ids

def test_a_model_without_safetensors_is_one_line_and_asks_no_service(folder, capsys, monkeypatch):
    torch.save(small_model().state_dict(), "policy/pytorch_model.bin")
    Path("policy/model.safetensors").unlink()
    monkeypatch.setattr(socket, "getaddrinfo", None)  # whoever asked a service would fail on this
    assert "safetensors" in refused(capsys, *QUICK, "--out", "run")
    assert os.environ["DISABLE_SAFETENSORS_CONVERSION"] == "1"

def test_a_download_that_breaks_names_its_cause(folder, capsys, monkeypatch):
    error = OSError("no file named pytorch_model.bin")
    error.__cause__ = ConnectionError("the line went dead")
    loader = transformers.AutoModelForCausalLM
    monkeypatch.setattr(loader, "from_pretrained", Mock(side_effect=error))
    message = refused(capsys, *QUICK, "--out", "run")
    assert "no file named pytorch_model.bin" in message and "the line went dead" in message

def test_logits_are_fp32_where_the_model_is_bf16(folder, monkeypatch):
    """With logits in fp32, ln π differs less between sampling and training."""
    c = config(*QUICK, "--max_new_tokens", 30)
    gaps = {}
    for head in ("fp32", "bf16"):
        model, tokenizer = m.load_policy(c)
        if head == "bf16":
            del model.get_output_embeddings().forward
        with monkeypatch.context() as patch:
            autocast = functools.partial(torch.autocast, "cpu", torch.bfloat16)
            patch.setattr(m, "autocast", autocast)
            seed(0)
            batch = m.sample(model, tokenizer, prompts() * 20, c)
            logp, _, mask = m.token_logps(model, batch)
            with autocast():
                assert (model(tensor([[5]])).logits.dtype == torch.float32) == (head == "fp32")
        gaps[head] = (logp[mask] - torch.cat([t.logps for t in batch])).abs().mean().item()
    assert 0 < gaps["fp32"] < gaps["bf16"]

def test_a_copy_of_the_policy_has_an_output_layer_of_its_own(folder):
    model, _ = m.load_policy(config(*QUICK))
    copied = copy.deepcopy(model)
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
        emptied, kept = (policy(tensor([[5]])).logits.abs().max() for policy in (model, copied))
    assert emptied == 0 < kept

def test_other_architectures_are_for_the_baselines_only(folder, capsys):
    c = transformers.GPT2Config(
        vocab_size=18, n_embd=32, n_layer=2, n_head=2, eos_token_id=1, bos_token_id=1)
    for model in (small_model("Gemma"), transformers.GPT2LMHeadModel(c)):  # Gemma's norms: 1 + w
        model.save_pretrained("policy")
        assert type(model).__name__ in refused(capsys, *QUICK, "--out", "run")
        assert not Path("run").exists()
    assert "GPT2LMHeadModel" in refused(capsys, *QUICK, "--probe_heads")
    assert "needs 4 problems" in refused(capsys, *QUICK, "--probe_heads", "--eval_prompts", 3)
    for flags in (["--method", "grpo"], ["--branch_mode", "random"]):
        assert run(*flags, "--max_steps", 1, "--out", flags[1])["after"]["length"] > 0

def test_the_rows_of_the_logits_are_the_output_layer_s():
    model, states = small_model(), torch.randn(3, 32)
    found = m.head_logps(model, states, tensor([4, 5, 6]))
    model.config = None  # Gemma 3's holds no vocab_size
    assert torch.equal(m.head_logps(model, states, tensor([4, 5, 6])), found)

def test_attention_is_never_cudnn_s():
    assert not torch.backends.cuda.cudnn_sdp_enabled()  # NaN gradients on an H100: pytorch#196678

# ---- difficulty-sensitive heads

@each("kind", KINDS)
def test_head_outputs_recombine_to_the_attention_output(kind):
    model, outputs, batch = small_model(kind), [], prompts("1+2=\n", "3*4*5-6+7=\n")
    heads = m.head_outputs(model, batch)
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(
            lambda module, args, output: outputs.append(output[0][0, -1]))
    for t in batch:
        model(tensor([t.prompt]))
    assert heads.shape == (2, 3, 4, 16)
    for x, output, layer in zip(heads.flatten(0, 1).float(), outputs, [*model.model.layers] * 2):
        assert layer.self_attn.o_proj(x.flatten()).allclose(output, atol=1e-5)

def test_ridge_slowly():
    """Ridge regression on standardised features is least squares with a row of data per penalty."""
    x, y = torch.randn(20, 4).double() * 5 + 2, torch.randn(20).double()
    new = torch.randn(3, 4).double()
    rows = torch.cat([(x - x.mean(0)) / x.std(0), torch.eye(4) * math.sqrt(0.1 * 20)])
    targets = torch.cat([y - y.mean(), torch.zeros(4)])
    w = torch.linalg.lstsq(rows, targets[:, None]).solution[:, 0]
    predicted = y.mean() + (new - x.mean(0)) / x.std(0) @ w
    assert m.ridge_probe(x, y, new).allclose(predicted, atol=1e-5)

def test_a_planted_head_is_found_and_reported(folder, monkeypatch, capsys):
    """The probe finds the head from whose output each prompt's difficulty was made."""
    seed(0)
    c = config(*QUICK, "--eval_prompts", 200, "--eval_samples", 5, "--max_new_tokens", 1)
    model, tokenizer = m.load_policy(c)
    problems = m.encode(m.load_problems(c)[1], model, tokenizer, c)
    planted = m.head_outputs(model, problems)[:, 1, 2] @ torch.randn(16).double()
    level = dict(zip((t.question for t in problems), (planted.argsort().argsort() / 200).tolist()))

    def assign_rewards(batch, config):
        for i, t in enumerate(batch):
            t.reward = float((i // 200 + 0.5) / 5 > level[t.question])

    monkeypatch.setattr(m, "assign_rewards", assign_rewards)
    report = m.probe_heads(c)
    scores = tensor(report["scores"])
    assert scores.shape == (3, 4) and scores.argmax() == 1 * 4 + 2
    assert scores[1, 2] > 0.8 > scores.flatten().sort().values[-2]
    x = m.head_outputs(model, problems)[:, 1, 0]
    y = tensor(report["difficulty"], dtype=torch.double)
    assert len(y) == 200
    said = m.ridge_probe(x[:100], y[:100], x[100:])  # its ranks, a tie's being their mean:
    slow = [(v[:, None] > v).sum(1) + (v[:, None] == v).sum(1) / 2 for v in (said, y[100:])]
    assert scores[1, 0].item() == approx(torch.corrcoef(torch.stack(slow))[0, 1].item(), abs=1e-4)
    assert json.loads(Path("runs/heads.json").read_text()) == report
    printed = capsys.readouterr().out
    assert f"{y.mean():.2f}" in printed and f"{scores[1, 2]:.2f}" in printed
    monkeypatch.setattr(m, "assign_rewards", lambda batch, config: None)  # all are wrong
    assert m.probe_heads(c)["scores"] == [[0.0] * 4] * 3

# ---- the house

@each("script", [m, tpo])
def test_no_text_reaches_an_evaluator(script):
    tree = list(ast.walk(ast.parse(inspect.getsource(script))))
    names = {getattr(n, "id", getattr(n, "attr", "")) for n in tree}
    evaluators = "exec sympify parse_expr literal_eval simplify factor system pickle".split()
    assert not names & {*evaluators}
    calls = {ast.unparse(n.func): ast.unparse(n) for n in tree if isinstance(n, ast.Call)}
    assert not calls.keys() & {"eval", "compile", "__import__"}
    assert "weights_only=True" in calls["torch.load"]

@each("name", CEILINGS)
def test_files_stay_below_their_ceilings(name):
    lines = source(name).splitlines()
    assert len(lines) <= CEILINGS[name]
    for number, line in enumerate(lines, 1):
        columns = sum(not unicodedata.combining(character) for character in line)
        assert columns <= 100 or name == "README.md", f"line {number}"

@each("name", SCRIPTS)
def test_scripts_keep_the_limits_of_functions_and_method(name):
    text = source(name)
    before, method, _ = re.split("^# ==== (?:Stage 1|IBTree|The run).*", text, flags=re.M)
    assert before.count("\n") < 200 and method.count("\n") <= METHOD_CEILINGS[name]
    tree = ast.parse(text)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    assert [f.name for f in functions if f.end_lineno - f.lineno >= 40] == []
    top = [node.name for node in tree.body if hasattr(node, "name")]
    assert len(top) == len(set(top))  # no name hides another

# ---- verifiable reward

EQUAL = r"""0.5|\frac12 ; -2\frac12|-2.5 ; 50\%|0.5 ; 50\%|50 ; \sqrt{8}|2\sqrt2 ; \sqrt[3]{27}|3 ;
(x+1)^2|x^2+2x+1 ; (1,\frac12)|(1,0.5) ; \text{No solution}|no solution ;
\frac{\sqrt{3}}{2}|\frac{3}{2\sqrt{3}} ; \$1,234.50|1234.5 ; 10^{-2}|0.01 ; 10\,000|10000 ;
10{,}000|10000 ; 10,\!080|10080 ; 1,234.50|1234.5 ; 1,234,567|1234567 ;
1,234,567,890,123|1234567890123 ; +5|5 ; 1e5|100000 ; 3!|6 ; 42 pies|42 ; 1 hour|1 ;
25\,\text{m}^2|25 ; \frac{1}{2}\text{ pies}|0.5 ; 2\text{ and }1|1,2 ; ‑3|-3 ; –3|-3 ;
( 1 , 2 )|(1,2) ; \begin{pmatrix} 1 \\ 2 \end{pmatrix}|\begin{pmatrix}1\\2\end{pmatrix} ;
2 \frac{1}{2}|2.5 ; 2xy|2yx ; -0.5%|-0.005 ; 3 \sqrt 2|\sqrt{18} ; 2\pi r|2r\pi ; 5 cm|5.0 cm ;
2 \left(x+1\right)|2x+2 ; 1-\sqrt{2}, 1+\sqrt{2}|1+\sqrt2,1-\sqrt2 ;
2^{100}|1267650600228229401496703205376 ; $\frac{1}{2}$|0.5 ; \(5\)|5 ; .5|1/2 ;
2*sqrt(3)|\sqrt{12} ; \$5|5 dollars ; 1,000|1000 ; \frac{3}{4}|3/4 ; \dfrac34|0.75 ;
2\frac{1}{2}|2.5 ; 2 1/2|5/2 ; 2^{10}|1024 ; \frac{\pi}{2}|0.5\pi ; 2x+1|1+2x ; x=5|5 ; \$18.00|18 ;
90^\circ|90 ; 5\text{ cm}|5 ; 12 dollars|12 ; [0,1)|[0,1.0) ; \{1,2\}|\{2,1\} ; 1,2|2, 1 ;
(-\infty, 3]|(-\infty,3] ; \text{Yes}|yes ; \left(1,2\right)|(1,2) ; x \in [1,2]|[1,2] ; 007|7 ;
3.0|3 ; \text{(A)}|(A) ; 1.5\times 10^{3}|1500 ; \frac{x}{2}|x/2 ; 6.|6 ; −3|-3 ; 1{,}000|1000 ;
42\text{ pieces}|42 ; 42 pieces|42 ; 42 pints|42 ; 42 pigs|42 ; 42 pictures|42 ;
1 \text{ or } 2|1,2 ; 20%|20 ; 20%|0.2 ; Monday|monday ; (x + 1) (x - 2)|x^2-x-2 ;
5\text{ cm}^{2}|5\text{ cm}^2 ; 52_{8}|52_8 ; [0,+\infty)|[0,\infty) ; \displaystyle 5|5 ;
864 \mbox{ m}^2|864"""
UNEQUAL = r"""0.333|1/3 ; \pi|3.14 ; (1,2)|(2,1) ; (1,2]|[1,2] ; (1,2)|1,2 ; listen|silent ;
x+1|x-1 ; 9^{9^9}|3 ; 1/0|1/0.0 ; \sqrt{2}|1.41421356 ; 1,2|1,2,2 ; 50\%|0.05 ; 5|x ; 12|1,2 ;
(1,234)|1234 ; 1e3|1000.5 ; x²|x2 ; ٣|3 ; \sqrt{x^2}|x ; \infty-\infty|0 ; 0/0|0 ; 1/0|2/0 ;
5:30|5:30 PM ; no|on ; BA|AB ; x|X ; 42 or 23|42 ; 42 minus 2|40 ; 42 is wrong|42 ; 42 million|42 ;
42 millions|42 ; 42 dozens|42 ; 42 times|42 ; 42 halves|42 ; 42 twos|42 ; 42 thirds|42 ; 42 or|42 ;
5 km|5 kg ; 5 cm|5 cm^2 ; 5 pigs|5 pies ; 5%|5 km ; 5 feet 3|5 ; 5 feet 3|53 ; 6 7|42 ; 6 7|67 ;
6 (7)|42 ; (6) (7)|42 ; 6 .7|6.7 ; 4\,2|42 ; 4\text{ and }2|42 ; 4\text{2}|42 ; 2{3}|23 ; x2|2x ;
500%|5% ; 1, 234|1234 ; 5 # wrong|5 ; True|1 ; None|0 ; \sqrt{-1}|-1 ; 10^{30}|10^{30}+1 ;
10^{-79}|0 ; 1+10^{-79}|1 ; \sqrt2+10^{-60}|\sqrt2 ; 10^{-60}\sqrt2+1-1|0 ;
\sqrt{10^{60}}|1000000000000000000000000000001 ; 2^{10^{-60}}|1 ;
0.12345678901234567890|0.12345678901234567891 ; [5]|5 ; __class__|0 ; x.y|xy ; i^2|-1.0 ; x|x=5 ;
2 or 3|3 ; dollars|\$5 ; cm|5 cm ; 1|2 ; |0 ; 2^{10}|1023 ; x^2|2x ; -1|1 ; \frac12|2 ; ...|0 ;
..|0 ; .|0 ; \ldots|0 ; \infty/\infty|1 ; 0/0|1 ; \,|\, ; ...|... ; ()|() ; 42 wrong|42 ;
42\text{ million}|42 ; 42 hundredths|42 ; 42 dozen|42 ; 42 plus|42 ; 42 minus|42 ; 42 half|42 ;
\$5|5 km ; 4\,2|8 ; 1\,000|0 ; 4\text{ and }2|8 ; 2{3}|6 ; lno|lon ; 50%|0.05 ; 1/x|1/X ;
50%|50.5 ; \sqrt{x^2}|-x ; \sqrt{x^2y^2}|xy ; \sqrt{-4}|2 ; \text{}|0 ; 42 hundred|42"""
EQUAL, UNEQUAL = (table.replace("\n", " ").split(" ; ") for table in (EQUAL, UNEQUAL))
ANSWER_KINDS = {  # kind: pairs that are equal, and pairs that are not
    "a name before the sign": (r"""k=5|5 ; y = x^2+1|1+x^2 ; f(x)=x+1|x+1 ; x_1=5|5 ; x_{12}=5|5 ;
\theta=30|30 ; AB=5|5 ; total = 100 meters|100 ; (p,q)=(3,2)|(3,2) ; x\in[1,2)|[1,2) ;
a_{-1}=0|0""",
        r"""y=5|x=5 ; x=2x+1|y=2x+1 ; 2x=4|4 ; 7=11a+c|11a+c ; x=y=5|5 ; f(y)|f(x) ; x=5|x"""),
    "units": (r"""100|100\text{ square units} ; 12|12\text{ miles per hour} ; 35 mph|35 ;
35\text{ km/h}|35 ; 35 square feet|35 ; 17\text{ children}|17 ; 10 \text{ years old}|10 ;
3 \text{ geese}|3 ; 12\pi \text{ cm}^2|12\pi ; 70 \text{ sq cm}|70 ; 5 L|5 ; 5 g|5 ; 5 m/s|5 ;
\frac13 \textbf{meters}|1/3 ; \$18 \text{ per day}|18 ; 3 cups of tea|3 ; 5\text{ apples}|5 apple ;
2 million|2*10^6""",
        r"""6\text{ or more}|6 ; 42 minus 2|42 ; 5 m/s|5 km/h ; 17\text{ men}|12\text{ men} ;
3 squared|3 ; 3 cubed|3 ; 5 x|5 ; 5 xy|5 ; 10\text{ units}|100 ; 5 square feet|5 feet ;
42 billion|42 ; 42 sixes|42 ; \text{cm}|5\text{ cm}"""),
    "several solutions": (r"""a=1 \text{ or } a=-2|1,-2 ; 4,5|AB=4,CD=5 ;
x=2, x=3|3 \text{ and } 2 ; 1, 2, and 3|3,2,1 ;
p=5,q=2;p=7,q=2|p = 5, q = 2 \quad \text{and} \quad p = 7, q = 2""",
        r"""a=1,b=2|a=2,b=1 ; a=7,b=3|3 ; 1,-2|1,-3 ; 2, 5|n=25 ; 1 2|12 ; 1 or 2|1 ; 1,2|1,2,"""),
    "exponents with signs": (r"""1e-1|0.1 ; 0.00005|5e-05 ; 1.5e+3|1500 ; 10^{17}|1e+17 ;
2^{-1}|\frac12 ; 10^-2|0.01""",
        r"""1e-1|0.01 ; 1e+3|100 ; 1e3|1e-3 ; 2e|2e1"""),
    "infinity": (r"""(-\infty,0.5)|(-\infty,\frac12) ; (-\infty,5)|(-infinity,5) ; \infty|infinity ;
+\infty|∞ ; (-\infty,0.5)\cup(1,\infty)|(1, +\infty) \cup (-\infty,\frac12) ;
(-∞,1)∪(2,∞)|(-\infty,1)\cup(2,\infty)""",
        r"""\infty|-\infty ; (-\infty,0.5)|(-\infty,0.5] ; (-\infty,1)|(1,\infty) ; \infty|0"""),
    "lists of tuples": (r"""(1,2),(3,4)|(3,4),(1,2) ; (0.5,2),(3,4)|(\frac12,2),(3,4) ;
((1,2),3)|((1.0,2),3) ; \{(1,2),(3,4)\}|(1,2), (3,4) ;
(x, y) = (5, 8) \text{ and } (8, 5)|(5,8),(8,5)""",
        r"""(1,2),(3,4)|(2,1),(3,4) ; (1,2),(3,4)|(1,2),(3,4),(5,6) ; ((1,2),3)|(1,(2,3))"""),
    "two signs": (r"""\pm 3|3,-3 ; 2\pm\sqrt3|2+\sqrt3, 2-\sqrt3 ; x=\pm 2|\pm2 ;
1\pm\sqrt{5},-2|1+\sqrt5,-2,1-\sqrt5 ; 3 \pm 2\sqrt{2}|3±2√2""",
        r"""\pm 3|3 ; \pm 3|-3 ; 2\pm\sqrt3|2+\sqrt3 ; 2\pm3|3\pm2"""),
    "percent": (r"""28\text{ percent}|28\% ; 28 pct|28% ; 28 \%|28 percent ; 42 percent|42 ;
5\%,10\%|0.05,0.1""",
        r"""28\%|29\% ; 28\%|0.028 ; 5 percent|5 km"""),
    "two names of a sign": (r"""x\le5|x\leq 5 ; x\ge5|x\geq 5 ; x\ne5|x\neq 5 ; x <= 2|x \leq 2 ;
x \gt 5|x>5 ; x\lt 5|x < 5 ; \emptyset|\varnothing ; 2\times3|2\cdot 3 ; 2**3|2^3""",
        r"""x\le5|x\ge5 ; x<5|x\le5 ; x\ne5|x=5 ; x>-1|x<1"""),
    "fractions": (r"""\frac{\pi}2|\frac{\pi}{2} ; \frac{\sqrt3}2|\frac{\sqrt3}{2} ;
\cfrac{1}{2}|0.5 ; \frac1{2}|1/2 ; \frac94\pi|\frac{9}{4}\pi ; \frac 1 2|0.5 ;
\frac{x}{7}+\frac{2}{7}|\frac{x+2}{7}""",
        r"""\frac{\pi}2|\frac{2}{\pi} ; \frac12x|\frac12 ; \frac{1}{x}|\frac{1}{x^2} ;
2\frac1{2}|1"""),
    "matrices": (r"""\begin{pmatrix}1\\2\end{pmatrix}|(1,2) ;
\begin{bmatrix} 0.5 & 1 \\ 2 & 3 \end{bmatrix}|\begin{pmatrix}\frac12&1\\2&3\end{pmatrix} ;
\begin{pmatrix}1\\2\end{pmatrix}|\begin{pmatrix} 1.0 \\ 2 \end{pmatrix}""",
        r"""\begin{pmatrix}1&2\\3&4\end{pmatrix}|\begin{pmatrix}1&3\\2&4\end{pmatrix} ;
\begin{pmatrix}1&2\\3&4\end{pmatrix}|\begin{pmatrix}1&2\\3&5\end{pmatrix}"""),
    "small things": (r"""{13}|13 ; \boldsymbol{13}|13 ; 130 000|130000 ; 30°|30 ; 2π|2\pi ; x²|x^2 ;
mn|nm ; xy^2|y^2x ; 5cm|5 ; Not so|not so ; ab|ba ; 11,\! 111,\! 111,\! 100|11111111100 ;
14 {, }916|14916 ; \text{(C)}|C ; None|none ; -0|0 ; \(\dfrac{1}{3} \)|1/3 ; $$ 9 $$|9 ; 5−3|2 ;
√2|\sqrt 2 ; 1 - \frac1e|1-\frac{1}{\mathrm{e}}""",
        r"""xy^2|(xy)^2 ; \sqrt{(x-y)^2}|x-y ; \sqrt{(x-y)^2}|y-x ; x-y|y-x ; ln|nl ;
30^2|30^{\circ} ; 1 3|13 ; odd|oddd ; (1,f)|(1,n) ; \sin(x)|cos(x) ; \sqrt{67}|67""")}
for equal_pairs, unequal_pairs in ANSWER_KINDS.values():
    EQUAL += equal_pairs.replace("\n", " ").split(" ; ")
    UNEQUAL += unequal_pairs.replace("\n", " ").split(" ; ")
HOSTILE = [
    "__import__('os').system('touch /tmp/owned')", "().__class__", "lambda: 0", "9" * 10 ** 6,
    "9^9^9^9^9", "(" * 300, "99!", "2^{2^{2^{2^{2^{9}}}}}", r"\frac{" * 200, "x^{999999999}",
    "(((x^{200})^{200})^{200})^{200}", "\x00", "1_0", "1" + "0" * 198, "5\n%", "*x",
    r"\sqrt{" + "7" * 90 + "}", "1/(1-1)", "0^{-1}", "5!" * 50, "sqrt" * 40, "(-2)^{pi}",
    "((2^{200})^{200})^{200}", "(1+x)^{200}-(1+y)^{200}", "x^{y^{z}}", "pi^{pi^{pi}}",
    "1" * 99 + "^{199}", "x" * 200, ",".join("123456789" * 10), "(" * 90 + ")" * 90, "(-8)^{1/3}",
    "-" * 299 + "1", "1.2.3", "{" + "^" * 50, "\\" * 299, r"\text{" * 40 + "}" * 40,
    "sqrt(67+x*" * 12 + "2" + ")" * 12, r"\sqrt{1-" * 9 + r"\sqrt{2}" + "}" * 9, "\ud800",
    "(((((2^(1/2))^199)^199)^199)^199)^199", "a*" * 149 + "b", "'\\d'", "f'{1}'", "0x1F", "x:=1",
    "2^" * 149 + "2", "1/" * 149 + "3", "1 if 2 else 3", "(9^99)^99*" * 29 + "1", "1," * 149 + "1",
    "%" * 300, "\n" * 300, "(" * 5000, "{" * 300, "[" * 150, "٣٤", "oo-oo", "0.{1}" * 30,
    "--" * 90 + "1", "((((x+y+z))^199)^(199/100))^(2/3)", "." * 10 ** 6, "50%" * 99,
    "+".join("abcdef" * 20), "(1+9^{-70})^{9^{70}}+" * 13 + "1", "(-2)^.2+" * 37 + "1",
    r"(\frac xx+9^-70)^9^70+" * 13 + "1", r"\sqrt2^" * 40 + "2", "a+" * 149 + "b",
    "((1," * 70 + "1)", "nan", "inf", "1/inf", r"\frac" * 60, r"\sqrt" * 58 + "2", "5" + " cm" * 90,
    "5 " + "abc " * 74, "9!+" * 99]

@each("equal, pair", [(True, pair) for pair in EQUAL] + [(False, pair) for pair in UNEQUAL])
def test_equal_answers_are_and_unequal_ones_and_attacks_are_not(equal, pair):
    a, b = pair.split("|")
    assert m.verify(a, b) == m.verify(b, a) == equal and (m.verify(a, a) or not equal)

def test_an_empty_answer_equals_nothing():
    empty = [None, "", " ", ".", "...", ". . .", "\\,", "$$", "\\text{}", "()", ",", "x="]
    golds = ["0", "none", "None", *empty[1:]]
    assert not any(m.verify(nothing, gold) for nothing in empty for gold in golds)

def test_lengths_in_bars_are_a_name():
    assert m.verify("1", "|AB|=1") and not m.verify("2", "|AB|=1")

@each("text, answer, start", [
    (r"\boxed{1} so \boxed{\frac{1}{2}}.", r"\frac{1}{2}", 13), (r"\fbox{x}", "x", 0),
    (r"it is $\boxed 7$.", "7", 7), (r"\boxed 1,003.5.", "1,003.5", 0), (r"\boxed {5}", "5", 0),
    (r"\fbox {5}", "5", 0), (r"#### 3 \boxed{\text{a {b}}}", r"\text{a {b}}", 7),
    ("#### Step 1\n2+3\nso \\boxed{5}\n# Check", "5", 19),
    ("18 is\n#### 1,800\nbye", "1,800", 6), ("#### 1\nno\n####2", "2", 10),
    ("#### 42\n\n# Check\n40+2 = 42", "42", 0), ("#### 42\n### Conclusion\nIt is 42.", "42", 0),
    ("so\n#### **42**\n", "42", 3), ("**#### 42**", "42", 2), ("#### 42 # the sum", "42", 0),
    ("#### 42\n#hashtag", "42", 0), ("is #### 99 dollars.", "99 dollars.", 3),
    ("3+8\n1\n#1", "1", 6), ("#2\n#", "2", 0), ("#1\n# 2", "1", 0), ("##1\n###2\n#3", "3", 9)])
def test_the_answer_is_found_where_its_marker_begins(text, answer, start):
    assert m.find_answer(text) == (answer, start) and m.extract_answer(text) == answer

@each("text", ["", "nothing", "a\n#### ", "####", "# Check\n", "### 5", "##5", r"\boxed{open",
               r"\boxed{2} \boxed{open", "# 5"])
def test_text_without_an_answer_has_none(text):
    assert m.find_answer(text) == (None, len(text)) and m.extract_answer(text) is None

@each("piece", ["\\boxed{", "#", "\\boxed ", "{", "}", "\\boxed{}", "####\n", " "])
def test_extraction_from_a_megabyte_is_linear(piece):
    start = time.process_time()
    for before in ("", "\\boxed{", "\\boxed"):
        m.extract_answer(before + piece * (10 ** 6 // len(piece)))
    assert time.process_time() - start < 3

def filled(text, letters):
    """Return the text with the letters' values in the place of the letters."""
    return text.translate(str.maketrans({x: str(value) for x, value in letters.items()}))

def spellings(rng):
    """Return a kind of value that GSM8K, MATH or AIME ask for, a random one, and its spellings."""
    a, b, c = rng.randint(2, 99), rng.randint(2, 12), rng.randint(2, 9)
    n, x, y = rng.randint(1000, 999_999), rng.randint(-20, 0), rng.randint(1, 20)
    letters = dict(A=a, B=b, C=c, D=a * c, E=b * c, F=b * c * c, L="ABCDE"[a % 5], N=n,
                   T=f"{n:,}", P=c ** b, S=b + c, W=("Sunday", "even", "no solution")[a % 3],
                   X=x, Y=y, Z=c * 10 ** b, Q=a / 8)
    kinds = {
        r"A | A.0 | \text{A} | A. | \left(A\right) | x=A | 0A": a,
        r"N | T | \$T | T.00 | N dollars": n,
        r"\frac{A}{B} | A/B | \dfrac{D}{E} | \tfrac{A}{B} | (A/B)": a / b,
        r"-\frac{A}{B} | \frac{-A}{B} | −A/B": -a / b,
        r"A.5 | A.5000 | \$A.50 | \$A.50\text{ dollars}": a + 0.5,
        r"Q | Q0 | \frac{A}{8}": a / 8,
        r"A | A apples | A\text{ apples}": a,
        r"A | A cm | A\text{ cm} | A\,\mathrm{cm}": a,
        r"A | A\text{ cm}^2 | A\,\text{cm}^{2}": a,
        r"A | A degrees | A^\circ | A^{\circ}": a,
        r"C\sqrt{B} | \sqrt{F} | C*\sqrt{B} | C\cdot\sqrt{B}": c * math.sqrt(b),
        r"\frac{A}{\sqrt{B}} | \frac{A\sqrt{B}}{B}": a / math.sqrt(b),
        r"A+\sqrt{B} | \sqrt{B}+A": a + math.sqrt(b),
        r"\frac{A\pi}{B} | \frac{A}{B}\pi | A\pi/B": a / b * math.pi,
        r"C^{B} | P": c ** b,
        r"C\times 10^{B} | C\cdot 10^{B} | Z": c * 10 ** b,
        r"x^2+Cx+A | A+Cx+x^2 | x^{2}+Cx+A": ("polynomial", c, a),
        r"(x+B)(x+C) | (x+C)(x+B) | x^2+Sx+E": ("polynomial", b + c, b * c),
        r"\frac{x}{A} | x/A | \frac{1}{A}x": ("linear", a),
        r"(X,Y) | (X, Y) | \left(X, Y\right)": ("pair", x, y),
        r"[X,Y) | [X, Y) | \left[X,Y\right) | x\in[X,Y)": ("interval", x, y),
        r"(-\infty,X] | (-\infty, X] | \left(-\infty,X\right]": ("ray", x),
        r"\{X,Y\} | \{Y,X\} | \{X, Y\}": ("set", x, y),
        r"X,Y | Y, X | X \text{ or } Y": ("set", x, y),
        r"A\frac{C}{10} | A.C | A C/10": a + c / 10,
        r"\text{(L)} | (L)": ("choice", a % 5),
        r"\text{W} | W": ("word", a % 3)}
    kind = rng.choice(list(kinds))
    return kind, kinds[kind], filled(kind, letters).split(" | ")

def spelled_pairs(n, seed=0):
    """Return n (answer, gold, equal); half are one value, half two values of one kind."""
    rng, pairs = random.Random(seed), []
    while len(pairs) < n:
        (kind, value, texts), (other, another, more) = spellings(rng), spellings(rng)
        if len(pairs) % 2:
            pairs.append((*rng.sample(texts, 2), True))
        elif kind == other and value != another:
            pairs.append((rng.choice(texts), rng.choice(more), False))
    return pairs

def test_spellings_of_one_value_are_equal_and_of_two_are_not():
    for a, g, equal in spelled_pairs(6000):
        assert m.verify(a, g) == m.verify(g, a) == equal and m.verify(a, a), (a, g)

def test_values_of_different_kinds_are_never_equal():
    rng = random.Random(1)
    for _ in range(6000):
        (_, a, texts), (_, b, others) = spellings(rng), spellings(rng)
        both_numbers = not isinstance(a, tuple) and not isinstance(b, tuple)
        if abs(a - b) > 1e-9 if both_numbers else a != b:
            assert not m.verify(rng.choice(texts), rng.choice(others)), (texts, others)

MATH_FORMS = {  # a gold answer in MATH's forms: its natural respellings
    r"\frac{A}{B}": r"A/B | \dfrac{A}{B} | \tfrac{A}B | \fracAB | \frac AB | x=\frac{A}{B}",
    r"-\frac{A}{B}": r"\frac{-A}{B} | -A/B | −\frac{A}{B} | -\left(\frac{A}{B}\right)",
    r"A\frac{B}{10}": r"A.B | A B/10 | A\frac B{10} | A\tfrac{B}{10} | A.B0",
    r"A\sqrt{B}": r"A\sqrtB | A\sqrt B | A*sqrt(B) | A\cdot\sqrt{B} | A√B | \sqrt{B}*A",
    r"\frac{\sqrt{A}}{B}": r"\frac{\sqrtA}B | \sqrt{A}/B | \frac1B\sqrt A | \frac{\sqrt A}{B}",
    r"\frac{A\pi}{B}": r"\frac{A}{B}\pi | Aπ/B | \frac{A\pi}B | Api/B | \frac{A \pi}{B}",
    r"A+B\sqrt{C}": r"B\sqrt{C}+A | A + B\sqrtC | A+B√C | x = A+B\sqrt{C}",
    r"A\pm\sqrt{B}": r"A+\sqrt{B},A-\sqrt{B} | A-\sqrtB \text{ or } A+\sqrtB | x=A ± √B",
    r"(A,B)": r"(A, B) | \left(A,B\right) | (x,y)=(A,B) | \begin{pmatrix} A \\ B \end{pmatrix}",
    r"\left(A,\frac{B}{C},N\right)": r"(A,B/C,N) | ( A.0 , \fracBC , N )",
    r"[A,N)": r"[A, N) | \left[A,N\right) | x\in[A,N) | [A.0,N)",
    r"(-\infty,\frac{A}{B}]": r"(-\infty, A/B] | (-∞,\fracAB] | x \in (-\infty,\dfrac{A}{B}]",
    r"(-\infty,-A)\cup(B,\infty)": r"(B,\infty) \cup (-\infty,-A) | (-∞,-A)∪(B,+∞)",
    r"\begin{pmatrix} A & B \\ C & -A \end{pmatrix}":
        r"\begin{pmatrix}A&B\\C&-A\end{pmatrix} | \begin{bmatrix} A.0 & B \\ C & −A \end{bmatrix}",
    r"A0^\circ": r"A0 | A0° | A0 degrees | A0^{\circ} | A0\text{ degrees}",
    r"N\text{ square units}": r"N | N square units | $N$ square units | N\text{ square units}.",
    r"A\text{ cm}^2": r"A | A cm^2 | A\,\mathrm{cm}^{2} | A.0 cm^2",
    r"\$N": r"N | \$N.00 | N dollars | $\$N$ | \$N\text{ dollars}",
    r"A\%": r"A% | A percent | A | 0.0A | A\text{ percent} | \frac{A}{100}",
    r"A,B,C": r"C, B, A | \{B,A,C\} | A \text{ and } B \text{ and } C | B, A, and C | x=A,B,C",
    r"(A,B),(C,A)": r"(C,A),(A,B) | (A, B), (C, A) | (C,A) and (A,B) | \{(A,B),(C,A)\}",
    r"x=A,y=B": r"y=B,x=A | x = A \text{ and } y = B",
    r"x^2+Ax-B": r"-B+Ax+x^2 | x^{2}+A x-B | f(x)=x^2+Ax-B | x²+Ax−B",
    r"(x+A)(x-B)": r"(x-B)(x+A) | \left(x+A\right)\left(x-B\right)",
    r"10^{A}": r"10^A | 1e+A | 1.0\times10^{A} | 1eA", r"N_{8}": r"N_8 | $N_8$",
    r"Ax-By+C=0": r"A x - B y + C = 0 | Ax - By + C = 0",
    r"x\leA": r"x \le A | x \leq A | x ≤ A | x<=A"}

@each("gold", MATH_FORMS)
def test_golds_in_the_forms_of_math_equal_their_respellings_and_no_mutated_gold_does(gold):
    rng = random.Random(7)
    for _ in range(40):
        letters = dict(zip("ABC", rng.sample(range(2, 10), 3)), N=rng.randint(100, 999))
        right = filled(gold, letters)
        mutated = [filled(gold, letters | {x: letters[x] + 1}) for x in letters.keys() & set(gold)]
        for answer in [right, *filled(MATH_FORMS[gold], letters).split(" | ")]:
            assert m.verify(answer, right) and m.verify(right, answer), (answer, right)
            for wrong in mutated:
                assert not m.verify(answer, wrong) and not m.verify(wrong, answer), (answer, wrong)

def test_agreement_with_math_verify():
    library = pytest.importorskip("math_verify", reason="pip install math-verify")
    pairs, differ = spelled_pairs(600, seed=2), []
    for a, g, equal in pairs:
        theirs = library.verify(library.parse(f"${g}$"), library.parse(f"\\boxed{{{a}}}"))
        if theirs != m.verify(a, g):
            assert m.verify(a, g) == equal  # this one is right by construction
            differ.append((a, g, "math-verify says equal" if theirs else "different"))
    print(f"\nagreement {1 - len(differ) / len(pairs):.1%}", *differ, sep="\n")
    assert len(differ) / len(pairs) <= 0.02

def hostile_strings(n, seed):
    """Yield mutations and mixtures of answers, LaTeX pieces and code."""
    rng = random.Random(seed)
    pieces = [s for pair in EQUAL + UNEQUAL for s in pair.split("|")]
    pieces += HOSTILE[:3] + ["1" * 60, " ", "\n"]
    pieces += (r"^ { } ( ) 9 x \frac \sqrt sqrt , [ ] \{ _ . % pi oo / * - 10^{99} é = \boxed{ 10 "
               r"0 ** ! e \text{a} __ ^{-1/2} \pm \cup \\ & \infty ~ $").split()
    for _ in range(n):
        s = "".join(rng.choice(pieces) for _ in range(rng.randint(1, 12)))
        for _ in range(rng.randint(0, 3)):
            i = rng.randrange(len(s) + 1)
            odd = rng.choice(["", chr(rng.randrange(32, 127)), chr(rng.randrange(0x2000)), s[:i]])
            s = s[:i] + odd + s[i + rng.randint(0, 2):]
        yield s

def tower(rng, depth):
    """Return a nested expression's text and its value to 200 digits.

    The value is nan where there are letters or dots, no real value or one beyond 10^70.
    """
    if depth == 0:
        text = rng.choice(r"2 3 199 0.5 1 10 0 1.0 99999999999999999999 \pi x ...".split())
        known = {r"\pi": +mpmath.pi, "x": mpmath.nan, "...": mpmath.nan}
        return text, known.get(text) or mpmath.mpf(text)
    (a, x), (b, y) = tower(rng, depth - 1), tower(rng, rng.randrange(depth))
    form, value = rng.choice([
        (r"\sqrt{%s}%.0s", lambda: mpmath.sqrt(x)), ("(%s)^{199}%.0s", lambda: x ** 199),
        ("(%s)^{1/2}%.0s", lambda: mpmath.sqrt(x)), ("(%s)^{-1}%.0s", lambda: 1 / x),
        ("1-(%s)%.0s", lambda: 1 - x), (r"\frac{%s}{%s}", lambda: x / y),
        ("(%s)+(%s)", lambda: x + y),
        (r"(%s)-\sqrt{%s}", lambda: x - mpmath.sqrt(y)), ("(%s)*(%s)", lambda: x * y),
        ("(%s)^{%s}", lambda: x ** y if abs(y) < 1000 else mpmath.nan)])
    try:
        number = value()
    except ZeroDivisionError:
        number = mpmath.nan
    known = mpmath.im(number) == 0 and 1e-70 < abs(number) < 1e70
    return form % (a, b), mpmath.re(number) if known else mpmath.nan

def peak_memory():
    """Return the most memory of this process so far, in MB; macOS counts it in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2 ** 20

def attack(strings):
    """Verify strings against a gold and themselves plus one; none is right, slow or leaks."""
    memory, worst = peak_memory(), (0, "")
    gc.freeze()  # or else a collection of all that the tests hold would count as an answer's time
    golds = itertools.cycle(["3", r"\frac{1}{2}", "(1,2)", "x+1", "50%", "0"])
    for s in strings:
        for gold in (next(golds), f"({s})+1"):
            start = time.process_time()
            right = m.verify(s, gold)
            worst = max(worst, (time.process_time() - start, s[:300]))
            assert right in (True, False) and not (right and gold == f"({s})+1"), s
    grown = peak_memory() - memory
    print(f"\nworst {worst[0]:.3f} s at {worst[1]!r}, memory grew by {grown:.0f} MB")
    assert worst[0] <= 0.2 and grown <= 200 and not os.path.exists("/tmp/owned")

def attack_by_towers(n, seed):
    """Attack by towers; one that has a value is equal to the nearest integer only if it is one."""
    rng = random.Random(seed)
    with mpmath.workdps(200):
        towers = [tower(rng, rng.randint(1, 9)) for _ in range(n)]
        for text, value in towers:
            if abs(value) < 1e15 and m.verify(text, str(int(mpmath.nint(value)))):
                assert abs(value - mpmath.nint(value)) < 1e-150, text
    attack(text for text, _ in towers)

def test_nested_latex_is_compared_both_ways_alike_and_equals_itself():
    rng = random.Random(3)
    texts = [tower(rng, rng.randint(1, 5))[0] for _ in range(1500)]
    texts += hostile_strings(1500, seed=4)
    for a, b in zip(texts, texts[1:] + texts[:1]):
        assert m.verify(a, b) == m.verify(b, a)
        something = re.search(r"\w", str(m.read(a, hundredths=False)[0])) is not None
        assert m.verify(a, a) == (len(a) <= m.MAX_LENGTH and something)

def test_constant_answers_earn_no_more_than_their_share():
    rng, problems = random.Random(5), []
    while len(problems) < 500:
        a, b, c = rng.randint(2, 40), rng.randint(2, 12), rng.randint(2, 9)
        problems.append(rng.choice([
            (f"Ann has {a} boxes of {b} pens each. She gives {c} pens away. How many are left?",
             f"{a * b - c}", a * b - c),
            (f"Bus #{a} carries {b} people at ${c} each. How many dollars is it? Write #### first.",
             f"\\${b * c}", b * c),
            (f"What share of {b * c} is {c}? Write \\boxed{{...}}.", f"\\frac{{1}}{{{b}}}", 1 / b),
            (f"Solve {a}x = {a * c}.", f"x={c}", c),
            (f"A square has sides of {a} cm. What is its area?", f"{a * a}\\text{{ cm}}^2",
             a * a)]))
    boxed = "\\boxed{{{}}}".format
    attackers = {text: () for text in ("", "...", "no idea", "####", "# 5", "### 5")}
    for text in ("...", "", "x", "1,2,3,4,5", "2 or 3 or 4", "\\infty", "0/0", "dollars", "cm",
                 "1/0", "x=", "\\pm 5", "5 million", "5,", "\\text{ cm}^2", "(2,3)"):
        attackers[boxed(text)] = ()
    attackers |= {boxed("50%"): (0.5, 50), boxed("\\frac12"): (0.5,), boxed("5 cm"): (5,)}
    attackers |= {boxed(n): (n,) for n in range(-1, 101)}
    attackers |= {f"#### {n}": (n,) for n in range(10)}
    for response, values in attackers.items():
        earned = sum(m.verify(m.extract_answer(response), gold) for _, gold, _ in problems)
        assert earned <= sum(value in values for _, _, value in problems), response
    for question, gold, _ in problems:
        assert not m.verify(m.extract_answer(question), gold) and not m.verify(question, gold)
        assert m.verify(m.extract_answer(f"so\n#### {gold}"), gold)

@posix
def test_known_killers():
    attack([*HOSTILE, "9" * 30_000_000, "\\frac{" * 5_000_000, "." * 30_000_000])

@posix
def test_ten_thousand_hostile_strings_neither_raise_nor_run_nor_hang():
    attack(hostile_strings(5000, seed=0))
    attack_by_towers(5000, seed=0)

@benchmark
@posix
def test_100_000_towers_and_200_000_hostile_strings():
    attack_by_towers(100_000, seed=1)
    attack(hostile_strings(200_000, seed=1))

# ---- IB-TPO: steps, tree, score

def test_what_stands_in_both_scripts_is_in_the_same_words():
    ours, theirs = {}, {}  # {name: source lines} of what a script defines at its top level
    for script, found in zip(SCRIPTS, (ours, theirs)):
        for node in ast.parse(text := source(script)).body:
            defined = [node, *getattr(node, "targets", [])]
            begin = min(part.lineno for part in [node, *getattr(node, "decorator_list", [])])
            lines = text.splitlines()[begin - 1:node.end_lineno]
            found |= {getattr(x, "name", getattr(x, "id", "")): lines for x in defined}
    ours["main"] = [line.replace("(config.show or config.probe_heads)", "config.show")
                    for line in ours["main"]
                    if "probe_heads(" not in line and "if config.probe" not in line]
    own = ("is_branch", "score: float", "advantage: float")  # what only iiblpo.py's have
    ours["Trajectory"] = [line for line in ours["Trajectory"] if not line.strip().startswith(own)]
    both = set(ours) & set(theirs)
    both -= {"", "Config", "prepare", "check_policy", "training_step", "set_schedule",
             "show"}  # each its own
    assert [name for name in both if ours[name] != theirs[name]] == []
    assert len(both) >= 40

def test_split_steps():
    text = "Löse x.\n\nErst 3·4 = 12 😀.\n\n\nThen: **done**.\n\n"
    for delimiter, *steps in (
            ["\n", "3+8\n", "1\n", "#1<eos>"], ["\n", "<eos>"], ["\n\n", "1\n\n", "\n2"],
            ["\n", "\n\n3+8\n", "\n1\n", "\n"]):  # blank lines are no steps of their own
        found = tpo.split_steps(TINY("".join(steps)).input_ids, TINY, delimiter)
        assert [TINY.decode(step) for step in found] == steps
    bpe = bpe_tokenizer([text] * 9 + ["word.\n\n"] * 50)
    ids = bpe(text).input_ids + [1]
    assert any(bpe.decode([i]).startswith(".\n") for i in ids)  # not the delimiter alone
    steps = tpo.split_steps(ids, bpe, "\n\n")
    assert sum(steps, []) == ids and len(steps) == 4 and steps[-1] == [1]
    assert all("\n\n" in bpe.decode(s) and "\n\n" not in bpe.decode(s[:-1]) for s in steps[:-1])

# Steps named by letters:  q -+- a -+- b -+- c      reward 1    π(s), geometric means over tokens:
#                             |     |     +- d             0    a 0.5 (of 0.25 and 1)  b 0.8  c 0.9
#                             |     +- e                   1    d 0.1  e 0.2  f 0.3  g 0.2  h 0.6
#                             +- f (twice)              0, 0
#                             +- g --- h                   0
P = {"a": [0.25, 1.0], "b": [0.8], "c": [0.9], "d": [0.1],
     "e": [0.2], "f": [0.3], "g": [0.2], "h": [0.6]}
PATHS = [("abc", 1.0), ("abd", 0.0), ("ae", 1.0), ("f", 0.0), ("gh", 0.0), ("f", 0.0)]

def hand_tree(paths=PATHS):
    """Return the root of a tree of paths (their steps, reward, start), and its nodes by letter."""
    root = tpo.Node([9])
    for path, reward, *start in paths:
        steps = [[ord(s)] * len(P[s]) for s in path]
        tpo.insert(root, steps, [tensor(P[s]).log() for s in path], reward, None, *start)
    return root, {chr(n.tokens[0]): n for n in root.walk()[1:]}

def test_a_tree_by_hand():
    """p̂, η₁, J_IB, Cov and all kinds of A(s) of the tree above are what the formulas give."""
    root, node = hand_tree()
    assert [node[s].visits for s in "abcdefgh"] == [3, 2, 1, 1, 1, 2, 1, 1]
    assert [node[s].total_reward for s in "abcdefgh"] == [2, 1, 1, 0, 1, 0, 0, 0]
    assert (root.visits, root.value, node["a"].value) == approx((6, 1 / 3, 2 / 3))
    assert node["a"].confidence == approx(0.5) and node["c"].end == 4 and len(root.children) == 3
    # η₁ = p̂/p̂(parent) - 1.2: a 2 - 1.2; b (1/2)/(2/3) - 1.2; d f g -1.2; h 1 - 1.2 as p̂(g) = 0
    for s, eta in zip("abcdefgh", [0.8, -0.45, 0.8, -1.2, 0.3, -1.2, -1.2, -0.2]):
        assert tpo.information_gain(node[s], 5.0) == approx(eta, abs=1e-6)
    # J(q) = 6/6 (3·0.8·0.5 - 2·1.2·0.3 - 1.2·0.2);  J(a) = 6/3 (-2·0.45·0.8 + 0.3·0.2);
    # J(b) = 6/2 (0.8·0.9 - 1.2·0.1);  J(g) = 6 (-0.2·0.6): a single child
    for s, J in {"q": 0.24, "a": -1.32, "b": 1.8, "g": -0.72}.items():
        assert tpo.ib_score(node.get(s, root), 5.0) == approx(J, abs=1e-6)
    # Cov at q: means -0.2 and 23/60, E[η₁η₂] = 0.04; at b: means -0.2 and 0.5, E = 0.3
    for s, cov in {"q": 0.04 + 0.2 * 23 / 60, "b": 0.4, "g": 0}.items():
        assert tpo.ib_covariance(node.get(s, root), 5.0) == approx(cov, abs=1e-6)
    with pytest.raises(ZeroDivisionError):
        tpo.ib_score(node["c"], 5.0)
    # std = sqrt(1/3 · 2/3) = sqrt(2)/3;  A_GL = (p̂ - 1/3) / std
    r, std = math.sqrt(2), math.sqrt(2) / 3
    gl = tensor([r / 2, r / 4, r, -r / 2, r, -r / 2, -r / 2, -r / 2])
    ib = tensor([0.4, -0.36, 0.72, -0.12, 0.06, -0.36, -0.24, -0.12])
    # TreeRL: a (1/3 + 1/3)/√3;  b (1/6 - 1/6)/√2;  c 2/3 + 1/2;  d -1/3 - 1/2;  e 2/3 + 1/3;
    # f (-1/3 - 1/3)/√2;  g -1/3 - 1/3;  h -1/3 + 0
    treerl = tensor([2 / 27 ** 0.5, 0, 7 / 6, -5 / 6, 1, -r / 3, -2 / 3, -1 / 3])
    grpo = gl * std / (std + 1e-4)
    kinds = {"gl": gl, "ib": ib, "gl+ib": gl + 0.1 * ib, "grpo": grpo, "treerl": treerl}
    for kind, A in kinds.items():
        found = tpo.step_advantages(root, tree_config("--beta=5", "--lam=0.1", "--advantage", kind))
        assert len(found) == 8
        assert [found[node[s]] for s in "abcdefgh"] == approx(A.tolist(), abs=1e-6)

def test_a_child_counts_as_often_as_it_was_drawn_at_its_node():
    """A step counts once for each trajectory that drew it, and not for those that go on from it."""
    root, node = hand_tree([  # a has two tokens, so that two go on from a, and one from b
        ("abc", 1.0), ("f", 0.0), ("abd", 1.0, 2), ("ae", 1.0, 2), ("abd", 0.0, 3)])
    assert [node[s].visits for s in "abcdef"] == [4, 3, 1, 2, 1, 1]
    assert [node[s].drawn for s in "abcdef"] == [1, 2, 1, 2, 1, 1]
    # p̂: q 3/5, a 3/4, b 2/3, f 0, e 1.  η₁ with β = 5: a (3/4)/(3/5) - 1.2 = 0.05, f -1.2,
    # b (2/3)/(3/4) - 1.2 = 8/9 - 1.2, e 4/3 - 1.2
    at_q = 6 / 2 * (1 * 0.05 * 0.5 + 1 * -1.2 * 0.3)
    at_a = 6 / 3 * (2 * (8 / 9 - 1.2) * 0.8 + 1 * (4 / 3 - 1.2) * 0.2)
    assert tpo.ib_score(root, 5.0) == approx(at_q, abs=1e-6)
    assert tpo.ib_score(node["a"], 5.0) == approx(at_a, abs=1e-6)
    # Cov at a: b counts twice, e once
    eta = [(8 / 9 - 1.2, 0.8)] * 2 + [(4 / 3 - 1.2, 0.2)]
    gains, trusts = zip(*eta)
    products = [x * y for x, y in eta]
    covariance = statistics.fmean(products) - statistics.fmean(gains) * statistics.fmean(trusts)
    assert tpo.ib_covariance(node["a"], 5.0) == approx(covariance, abs=1e-6)

def test_a_tree_all_wrong_or_all_right_teaches_by_confidence_alone():
    for reward in (0.0, 1.0):  # η₁ = -1/β everywhere
        root, node = hand_tree([("abc", reward), ("f", reward)])
        for kind, A in {"gl": 0.0, "grpo": 0.0, "gl+ib": -0.1 * 0.2 * 0.3}.items():
            c = tree_config("--beta", 5, "--lam", 0.1, "--advantage", kind)
            assert tpo.step_advantages(root, c)[node["f"]] == approx(A)
        assert tpo.ib_score(root, 5.0) == approx(6 * -0.2 * (0.5 + 0.3) / 2)

def test_samplers_choose_as_they_say():
    root, node = hand_tree()
    for s, n in node.items():
        n.entropy = torch.full((len(n.tokens),), {"e": 0.9, "h": 0.7, "c": 0.5}.get(s, 0.1))
    root.branched, rng = 1, random.Random(0)

    def names(k, sampler):
        nodes = tpo.select_nodes(root, k, sampler, tree_config("--beta", 5), rng)
        return "".join("q" if n is root else chr(n.tokens[0]) for n in nodes)

    assert names(4, "ib") == "bqga" and names(6, "ib") == "bqgabq"  # by J as above, then again
    assert names(4, "entropy") == "agbq"  # before e, h, c; the root was branched once already
    assert names(4, "fixed") == "agbq"  # from the root down, each place once
    node["a"].branched = node["g"].branched = 1
    assert names(4, "fixed") == "bqag" and names(2, "entropy") == "ba"
    assert {names(1, "random") for _ in range(99)} == set("qabg")

def test_the_estimator_is_the_closed_form_where_shares_are_probabilities():
    """J_IB is (1+β) Σ π² (p(a*|s)/p(a*|v) - (1 + 1/β)) where samples' shares are exact."""
    pi, p, root = tensor([0.5, 0.3, 0.2]), tensor([0.9, 0.5, 0.1]), tpo.Node([9])
    for s, (count, right) in enumerate([(50, 45), (30, 15), (20, 2)]):
        for i in range(count):
            tpo.insert(root, [[s]], [pi[s:s + 1].log()], float(i < right))
    closed = 6 * (pi ** 2 * (p / (pi @ p) - 1.2)).sum()
    assert tpo.ib_score(root, 5.0) == approx(closed.item(), abs=1e-6)

def grown(kind="Qwen2", n=3, sampler="ib"):
    """Return a random policy, roots of its trees with arbitrary rewards, and trajectories."""
    model = small_model(kind)
    c = tree_config("--max_new_tokens", 24, "--tree", 3, 4, 2, 2, "--sampler", sampler)
    problems = prompts(*(q + "\n" for q in m.chain_questions(random.Random(0), [2, 7], False, n)))
    seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tpo, "assign_rewards", by_checksum)
        roots, sampled = tpo.grow(model, TINY, problems, c, random.Random(0))
    return model, list(roots.values()), sampled

def upto(root, node):
    """Return the trajectory that ends with a node's step."""
    return m.Trajectory(root.tokens, response=sum((n.tokens for n in node.path()), []))

def leaves(root):
    return [n for n in root.walk() for _ in range(n.visits) if not n.children]

@each("kind, sampler", [*zip(KINDS * 2, ["ib", "independent", "random", "fixed", "entropy", "ib"])])
def test_trees_grow_as_configured_and_record_the_policys_log_probs(kind, sampler):
    model, roots, sampled = grown(kind, sampler=sampler)
    assert len(sampled) == 3 * 15 and [root.visits for root in roots] == [15] * 3
    assert (sampler == "independent") == (sum(t.start > 0 for t in sampled) < 8)
    for t in sampled:
        logp, entropy = teacher_forced(model, t)  # prefixes came from the tree
        assert (t.logps - logp).abs().max() < 1e-4 and (t.entropy - entropy).abs().max() < 1e-4
        assert t.complete == (t.response[-1] == 1) and 1 not in t.response[:-1]
        assert len(t.response) == 24 or t.complete and len(t.response) < 24
    for i, root in enumerate(roots):
        own = [t for t in sampled if t.group == i]
        ends = [upto(root, leaf).response for leaf in leaves(root)]
        assert sorted(t.response for t in own) == sorted(ends)
        for node in root.walk()[1:]:  # visits and p̂, counted again from the trajectories
            prefix = upto(root, node).response
            through = [t for t in own if t.response[:len(prefix)] == prefix]
            assert node.visits == len(through) and node.end == len(prefix)
            assert node.total_reward == sum(t.reward for t in through)
            assert node.drawn == sum(t.start <= node.end - len(node.tokens) for t in through) > 0
            assert len({tuple(child.tokens) for child in node.children}) == len(node.children)

# ---- IB-TPO: the packed update against the flat way

def packed(model, roots, reference, *flags):
    """Return gradients and statistics of the packed update, which takes no step."""
    grab, c = grabber(model), tree_config("--max_grad_norm", 1e9, *flags)
    return grab.grads, tpo.update_on_trees(model, grab, roots, c, reference)

def flat(model, roots, reference, *flags, outcomes=None):
    """Return loss, gradient and clipped share, by one pass for each trajectory of the trees.
    The advantages are those of steps, or else `outcomes`, those of trajectories."""
    c, terms, cut = tree_config(*flags), [], []
    for root, leaf in ((root, leaf) for root in roots for leaf in leaves(root)):
        A, t = tpo.step_advantages(root, c), upto(root, leaf)
        a = torch.cat([torch.full((len(n.tokens),), A[n]) for n in leaf.path()])
        if outcomes is not None:
            a = outcomes[len(terms)]
        logp, _ = teacher_forced(model, t)
        ratio = teacher_forced(reference, t)[0].detach() - logp
        r = (logp - torch.cat([n.logps for n in leaf.path()])).exp()
        clipped = r.clamp(1 - c.clip_low, 1 + c.clip_high)
        terms.append(c.kl * (ratio.exp() - 1 - ratio) - clipped_objective(r, a))
        cut.append((r > clipped) & (a > 0) | ((r < clipped) | (r > 3)) & (a < 0))
    loss = torch.cat(terms).mean()
    return loss.item(), gradient(loss, model), torch.cat(cut).float().mean().item()

@each("kind, advantage", [*zip(KINDS + ["GPTNeoX"], ["gl+ib", "gl", "ib", "grpo"])])
def test_the_packed_update_is_the_flat_one(kind, advantage):
    """A tree run once has the loss and gradient of its separate trajectories, with clip and KL."""
    (model, roots, _), reference = grown(kind), small_model(kind, seed=1)
    flags = ["--advantage", advantage, "--kl", 0.1]
    shake_trees(roots)
    loss, slow, cut = flat(model, roots, reference, *flags)
    for tokens in (10 ** 6, 300):
        grads, stats = packed(model, roots, reference, *flags, "--micro_tokens", tokens)
        assert far(grads[0], slow) < 1e-5 and stats["loss"] == approx(loss, rel=1e-5, abs=1e-6)
        assert stats["clipped"] == approx(cut, abs=1e-4) and 0.05 < cut < 0.95
        assert stats["policy_kl"] > 0.01 and stats["tokens_trained"] > 1.1 * stats["tokens_unique"]
    grads, _ = packed(model, roots, reference, *flags, "--updates_per_step", 2)  # half each
    for i in (0, 1):
        assert far(grads[i], flat(model, roots[i::2], reference, *flags)[1]) < 1e-5

def test_at_ratio_1_gl_on_the_tree_is_grpo_on_its_trajectories(monkeypatch, request):
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.double)  # in float32 rounding alone makes 1e-6
    request.addfinalizer(lambda: torch.set_default_dtype(torch.float))
    model, roots, _ = grown()
    ends = [(i, leaf.value) for i, root in enumerate(roots) for leaf in leaves(root)]
    groups, rewards = tensor(ends).T
    for kind, eps in (("gl", 0.0), ("grpo", 1e-4)):
        outcomes = m.group_advantages(rewards, groups, eps)
        _, slow, _ = flat(model, roots, model, "--advantage", kind, outcomes=outcomes)
        (grad,), stats = packed(model, roots, None, "--advantage", kind)
        assert far(grad, slow) < 1e-6 and stats["ratio"] == approx(1, abs=1e-5)

def test_trees_that_teach_nothing_cost_no_pass():
    model, roots, _ = grown(n=4)
    for node in roots[1].walk():
        node.total_reward = float(node.visits)
    tokens = [sum(len(upto(root, leaf).response) for leaf in leaves(root)) for root in roots]
    teach = sum(n for n, root in zip(tokens, roots) if 0 < root.value < 1)
    assert packed(model, roots, None, "--advantage", "gl")[1]["tokens_trained"] == teach
    assert packed(model, roots, None)[1]["tokens_trained"] == sum(tokens) > teach > 0  # by A_IB
    # what is not run counts in the mean, so that λ = 0 divides by the same number as λ > 0
    shake_trees(roots)
    grads, _ = packed(model, roots, None, "--advantage", "gl")
    zero, _ = packed(model, roots, None, "--advantage", "gl+ib", "--lam", 0)
    _, slow, _ = flat(model, roots, model, "--advantage", "gl")
    assert far(grads[0], slow) < 1e-5 and far(zero[0], slow) < 1e-5
    assert not packed(model, roots[1:2], None, "--advantage", "gl")[0]

# ---- IB-TPO: runs, several processes

@each("flags", [[], ["--method", "grpo", "--kl", 0.01], ["--sampler", "entropy"]])
def test_ib_tpo_runs_repeat_and_resume_exactly(rewarded, flags):
    whole, logged = start(tpo, *TREES, *flags, "--out", "whole"), metrics("whole")
    assert {"reward", "eff_rate", "entropy", "tokens_unique", "ib_score", "cov"} < {*logged[0]}
    advantage = "grpo" if "grpo" in flags else "gl+ib"
    assert len(logged) == 4 and whole["config"]["advantage"] == advantage
    if "--kl" in flags:  # the KL is to where the run began
        assert logged[0]["policy_kl"] < 1e-6 < logged[-1]["policy_kl"]
    interrupt_at_step_3(tpo, "update_on_trees", logged, *TREES, *flags)
    resumed = start(tpo, *TREES, *flags, "--out", "part", "--resume")
    assert metrics("part") == logged and resumed["after"] == whole["after"]

def test_mistakes_with_trees_are_one_line(folder, capsys):
    assert "tree must be four numbers" in refused(capsys, *TREES, "--tree", 4, 9, 1, script=tpo)
    assert "delimiter must not be empty" in refused(capsys, *TREES, "--delimiter", "", script=tpo)
    assert tree_config("--delimiter", r"\n\n").delimiter == "\n\n"  # it was typed in a shell
    assert not Path("runs").exists()
    windows = small_model(use_sliding_window=True, sliding_window=4, max_window_layers=0)
    for model in (windows, small_model("Mistral", sliding_window=4)):  # deaf to a tree's mask
        model.save_pretrained("policy")
        assert "need full attention" in refused(capsys, *TREES, script=tpo)

def test_show_prints_a_tree_a_line_a_node(folder, capsys):
    start(tpo, *TREES, "--max_steps", 1, "--out", "run")
    capsys.readouterr()
    for policy in ([], ["--model", "run/model"]):
        root = start(tpo, *TREES, "--show", *policy)
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 2 + len(root.walk())  # behind the problem and the columns' names
        assert " J " in lines[2] and " η₂ " in lines[3]

def gradients_of_both():
    model, found, share = small_model(), [], slice(m.RANK, None, m.WORLD)
    batch = batch_for_update(model, 15)
    for method in ("iiblpo", "entropy_reg"):
        grab = grabber(model)
        c = config("--method", method, "--max_grad_norm", 1e9, "--micro_tokens", 100)
        m.update(model, grab, batch[share], c)
        found += grab.grads
    model, roots, _ = grown(n=5)
    shake_trees(roots)
    flags = ["--micro_tokens", 300, "--kl", 0.1]
    return found + packed(model, roots[share], small_model(seed=1), *flags)[0]

def test_two_processes_have_the_gradient_of_one_and_train_resume_and_show(folder):
    lines = ["import contextlib, sys, torch", f"sys.path.insert(0, {str(HERE)!r})",
             f"import {Path(__file__).stem} as t"]
    for script, flags in (("m", "QUICK"), ("tpo", "TREES")):
        def begin(run):
            return f"t.start(t.{script}, *t.{flags}, '--out', *'{script}_{run}'.split())"

        lines += [begin("a --max_steps 3"),
                  f"step, calls = t.{script}.training_step, []",
                  f"t.{script}.training_step = lambda *a: sys.exit()"
                  " if len(calls) == 2 else calls.append(1) or step(*a)",
                  "with contextlib.suppress(SystemExit):  # the run stops in its third step",
                  "    " + begin("b --max_steps 3 --save_every 1"),
                  f"t.{script}.training_step = step",
                  begin("b --max_steps 3 --resume"), begin("b --show")]
    lines += ["two = t.gradients_of_both()", "if t.m.RANK == 0: torch.save(two, 'two.pt')",
              "torch.distributed.destroy_process_group()"]
    Path("two.py").write_text("\n".join(lines))
    how = ("-m torch.distributed.run --nproc_per_node=2 --rdzv_backend=c10d "
           "--rdzv_endpoint=localhost:0 two.py")
    done = subprocess.run([sys.executable, *how.split()], capture_output=True, text=True,
                          timeout=300, env={"OMP_NUM_THREADS": "1", **os.environ})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("everything is in") == 4  # only the first process speaks
    for a, b, candidates in (("m_a", "m_b", 4 * 6), ("tpo_a", "tpo_b", 3 * 4)):
        assert metrics(a) == metrics(b) and len(metrics(a)) == 3
        assert candidates / 2 < metrics(a)[0]["trajectories"] <= candidates
        assert Path(a, "samples.jsonl").read_text() == Path(b, "samples.jsonl").read_text()
        transformers.AutoModelForCausalLM.from_pretrained(b + "/model")
    for one, two in zip(gradients_of_both(), torch.load("two.pt"), strict=True):
        assert far(two, one) < 1e-6

# ---- README

README = source("README.md")
SNIPPETS = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)

def test_readme_and_scripts_name_the_same_tested_packages():
    packages = re.search("^pip install (.*)$", README, re.M)[1].split()
    pinned = [package for package in packages if "==" in package]
    assert [package.split("==")[0] for package in pinned] == ["torch", "transformers"]
    for script in SCRIPTS:
        assert json.loads(re.search("# dependencies = (.*)", source(script))[1]) == packages
    assert transformers.__version__ in README  # among the releases that are known to work

def test_commands_of_the_readme_survive_pasting():
    """They hold nothing that zsh, where "#" begins no comment, or PowerShell 5 misreads."""
    for block in re.findall(r"^```bash\n(.*?)^```", README, re.M | re.S):
        assert not re.search(r"#|&&|\|\||^\w+=", block, re.M), block

def test_the_commands_of_the_readme_parse(monkeypatch):
    monkeypatch.chdir(HERE)  # some name tiny_config.yaml
    text = README.replace("\\\n", " ")
    commands = re.findall(r"python (iiblpo|ib_tpo)\.py([^`\n#|;&>)]*)", text)
    assert {script for script, _ in commands} == {"iiblpo", "ib_tpo"}
    for script, flags in commands:
        if not re.search("[A-Z]{4}|--help", flags):  # FOLDER
            (config if script == "iiblpo" else tree_config)(*shlex.split(flags))

def test_the_functions_that_the_readme_names_exist():
    """The last columns of its tables name only functions, classes and methods of the scripts."""
    columns = re.findall(r"\| ((?:`[\w.]+`(?:, )?)+) \|$", README, re.M)
    text = "".join(map(source, SCRIPTS))
    named = re.findall(r"\w+", " ".join(columns))
    missing = [name for name in named if not re.search(rf"^ *(def|class) {name}\b", text, re.M)]
    assert len(named) >= 30 and not missing

@posix
def test_the_snippets_of_the_readme_run(folder, monkeypatch):
    """They run as they stand, in a folder where each run that they read is the same tiny one."""
    for module in re.findall(r"^\s*(?:import|from) (\w+)", "\n".join(SNIPPETS), re.M):
        pytest.importorskip(module)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    start(m, *QUICK, "--method", "grpo", "--max_steps", 1, "--out", "runs/grpo-tiny-0",
          "--eval_samples", 16)
    for name in ("iiblpo", "ib_tpo"):
        Path(f"runs/{name}-tiny-0").symlink_to("grpo-tiny-0")
    for snippet in SNIPPETS:
        exec(snippet, {"__name__": "__main__"})
    assert "summary.json" in "".join(SNIPPETS)

# ---- benchmarks: pytest -m benchmark -s

METHODS = {"grpo": "iiblpo.py --method grpo", "iiblpo": "iiblpo.py", "ib_tpo": "ib_tpo.py",
           "entropy_reg": "iiblpo.py --method entropy_reg"}
CONTROLS = {"dapo": "iiblpo.py --method dapo --updates_per_step 2",
            "treerl": "ib_tpo.py --sampler entropy --advantage treerl",
            "grpo_12": "iiblpo.py --method grpo --rollouts 12",  # as many as a tree has
            "ib_tpo_paper": "ib_tpo.py --beta 5 --lam 0.1", "iiblpo_all_kept": "iiblpo.py --keep 1"}
SETTINGS = {"long": "--max_tokens 1600000", "habit0": "--habit 0", "habit0.5": "--habit 0.5",
            "habit0.9": "--habit 0.9"}
ABLATIONS = {
    "iiblpo_random_share": "test_iiblpo.py random_share", "iiblpo_top_n": "test_iiblpo.py top_n",
    "iiblpo_no_latents": "iiblpo.py --branch_mode random",
    "iiblpo_same_latent": "test_iiblpo.py same_latent",
    "iiblpo_no_decay": "iiblpo.py --psa_halflife 1e9", "ib_tpo_grpo": "ib_tpo.py --method grpo",
    "iiblpo_no_self_reward": "iiblpo.py --kappa 0", "ib_tpo_visits": "test_iiblpo.py visits",
    "ib_tpo_lambda0": "ib_tpo.py --lam 0", "ib_tpo_independent": "ib_tpo.py --sampler independent",
    "ib_tpo_random": "ib_tpo.py --sampler random", "ib_tpo_entropy": "ib_tpo.py --sampler entropy"}
DIAGNOSES = ["eff_rate", "ib_score", "cov"]  # means of a run's first fifth and of its last
EVIDENCE = [("default", *method, range(8)) for method in (METHODS | CONTROLS).items()]  # and seeds
EVIDENCE += [("default", *ablation, range(0, 8, 2)) for ablation in ABLATIONS.items()]
EVIDENCE += [(key, name, f"{METHODS[name]} {flags}", (0, 2, 4, 6) if key == "long" else (0, 2, 6))
             for key, flags in SETTINGS.items() for name in METHODS]

def background(script, *flags):
    return subprocess.Popen([sys.executable, HERE / script, *map(str, flags)],
                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})

def steer_the_update_too(set_attribute=setattr):
    """Patch iiblpo.py to train what a latent sampled under it, so that the ratio begins at 1."""
    sample, token_logps, noted = m.sample, m.token_logps, {}

    def sample_and_note(model, tokenizer, begun, config, greedy=False, steer=None):
        found = sample(model, tokenizer, begun, config, greedy, steer)
        if steer:
            noted.update(inspect.getclosurevars(steer).nonlocals)
            for t, z in zip(found, noted["z"][:len(found)], strict=True):
                t.z = z
        return found

    def steered_logps(model, batch):
        latents = [getattr(t, "z", None) for t in batch]
        known = [z for z in latents if z is not None]
        if not known or not torch.is_grad_enabled():
            return token_logps(model, batch)
        P = max(len(t.prompt) for t in batch)
        z = torch.stack([torch.zeros_like(known[0]) if z is None else z for z in latents])
        never = 10 ** 9
        first = [never if z is None else P + t.start - 1 for t, z in zip(batch, latents)]
        with noted["psa"].steer(z, tensor(first)):
            return token_logps(model, batch)

    set_attribute(m, "sample", sample_and_note)
    set_attribute(m, "token_logps", steered_logps)

def score_at_random():
    """Patch iiblpo.py so that the filter keeps the same share, drawn at random."""
    def set_scores(model, tokenizer, candidates, config):
        for t in candidates:
            t.score = torch.rand(()).item()

    m.set_scores = set_scores

def keep_the_best():
    """Patch iiblpo.py so that the filter keeps the wrong branches, too, of highest S_IB."""
    set_scores = m.set_scores

    def set_scores_of_wrong_ones_upside_down(model, tokenizer, candidates, config):
        set_scores(model, tokenizer, candidates, config)
        for t in candidates:
            t.score *= 1 if t.reward else -1

    m.set_scores = set_scores_of_wrong_ones_upside_down

def count_visits():
    """Patch ib_tpo.py so that the IB-Score counts a child as often as it was visited."""
    insert = tpo.insert

    def insert_and_count(root, *trajectory):
        leaf = insert(root, *trajectory)
        for node in root.walk():
            node.drawn = node.visits
        return leaf

    tpo.insert = insert_and_count

def final(out):
    return json.loads(Path(out, "summary.json").read_text())["after"]

def evidence(run):
    """Return a run's row, and do the run if it is not done; two seeds share a warm start."""
    setting, name, command, seed = run
    out = Path(f"runs/evidence/{setting}-{name}-{seed}")
    script, *flags = command.split()
    flags = ["--warm_steps", 1000 + seed // 2, *flags, "--seed", seed, "--out", out]
    if not (out / "summary.json").exists():
        assert background(script, *flags, *["--resume"] * out.exists()).wait() == 0, out
    log = pandas.read_json(out / "metrics.jsonl", lines=True)
    fifth, reward = len(log) // 5, log.reward.rolling(10).mean()
    row = {"setting": setting, "name": name, "warm": seed // 2, **final(out)}
    for key in log.columns.intersection(DIAGNOSES):
        row |= {f"{key} first": log[key][:fifth].mean(), f"{key} last": log[key][-fifth:].mean()}
    return row | {"fall": (reward.cummax() - reward).max()}

@benchmark
def test_evidence(monkeypatch):
    """Both methods keep GRPO's pass@1 and gain in sound responses; runs are not done twice."""
    monkeypatch.chdir(HERE)
    for warm, flags in itertools.product(range(4), ["", *SETTINGS.values()]):
        m.warm_start(config("--warm_steps", 1000 + warm, *flags.split()))
    with ThreadPoolExecutor(2) as pool:
        runs = [(*variant, seed) for *variant, seeds in EVIDENCE for seed in seeds]
        table = pandas.DataFrame(pool.map(evidence, runs))
    columns = "pass@1 pass@4 pass@16 maj@16 distinct_correct sound@16 distinct_sound length".split()
    columns += [f"{key} {fifth}" for key in DIAGNOSES for fifth in ("first", "last")]
    rules = dict.fromkeys(columns, "mean") | {"fall": "max"}
    table = table.groupby(["setting", "name", "warm"], sort=False).agg(rules)
    for setting, values in table.groupby("setting", sort=False):
        values = values.droplevel("setting")
        parts = {f"minus {name}": values.sub(values.loc[name], level="warm") for name in METHODS}
        for title, part in [("mean ± standard error", values), *parts.items()]:
            group = part.groupby("name", sort=False)
            text = group.mean().map("{:.3f}".format) + group.sem().map(" ± {:.3f}".format)
            print(f"\n{setting}: {title}\n{text.to_string()}")
    habits = table.loc[["default", "habit0", "habit0.5", "habit0.9"]]
    for name in ("iiblpo", "ib_tpo"):
        group = (habits.xs(name, level=1) - habits.xs("entropy_reg", level=1)).groupby("setting")
        error = (group.sem() / 4).pow(2).sum().pow(0.5)
        text = group.mean().mean().map("{:+.4f}".format) + error.map(" ± {:.4f}".format)
        print(f"\n{name} minus the entropy bonus, mean of the four habits\n{text.to_string()}")
    table = table.loc["default"]
    assert table.loc[[*METHODS, "dapo"]].fall.max() <= 0.15  # no seed goes astray
    for name in ("iiblpo", "ib_tpo"):
        gain = table.loc[name] - table.loc["grpo"]
        assert gain["pass@1"].mean() >= -gain["pass@1"].sem() and gain["sound@16"].mean() >= 0.08
        assert gain.distinct_sound.mean() >= 0.3 * table.distinct_sound["grpo"].mean()

@benchmark
def test_where_to_branch():
    """Trees by IB score take fewer tokens than independent rollouts on the same 512 problems."""
    (model, tokenizer), rows = tpo.load_policy(tree_config()), {}
    for flags in ("independent --rollouts 8", "independent", "random", "fixed", "entropy", "ib"):
        c = tree_config("--sampler", *flags.split())
        problems = tpo.shard(tpo.encode(tpo.load_problems(c)[0][:512], model, tokenizer, c))
        seed(0)
        log = tpo.rollout_metrics(tpo.grow(model, tokenizer, problems, c, random.Random(0))[1])
        rows[flags] = [log["eff_rate"], log["reward"], log["tokens_sampled"] / 512]
    table = pandas.DataFrame(rows, ["Eff-Rate", "Avg-Rate", "tokens"]).T
    print(table.round(3))
    assert table["tokens"]["ib"] < table["tokens"]["independent"]

@benchmark
def test_latents_change_what_is_done_next_and_leave_it_right():
    def share_of_valid_lines(t):
        """Return the share of lines that follow from the one before by one reduction."""
        lines, valid = [t.question.rstrip("="), *t.text.split("\n")], 0
        for before, line in itertools.pairwise(lines):
            places = range(1, len(before), 2) if re.fullmatch(r"\d([-+*]\d)*", before) else []
            valid += line == "#" + before or line in [m.reduce_at(before, i) for i in places]
        return valid / (len(lines) - 1)

    c = config("--branches", 8)
    seed(0)
    model, tokenizer = m.load_policy(c)
    problems, heldout = (m.encode(side, model, tokenizer, c) for side in m.load_problems(c))
    cvae, psa = latents = m.prepare(model, c)
    print("\n", m.train_latents(model, tokenizer, latents, problems, c))
    parents = m.sample(model, tokenizer, m.shard(heldout[:96]), c)
    found = [m.branch(model, tokenizer, used, parents, c) for used in (latents, [])]
    steered, bare = (sum(map(share_of_valid_lines, branches)) / len(branches) for branches in found)
    variation, prefixes = 0.0, m.prefixes_to_branch(parents, c)
    for t, z in zip(prefixes, cvae.sample(m.features(model, prefixes, c)[0], 2).transpose(0, 1)):
        ids = tensor([t.prompt + t.response] * 2)
        with torch.no_grad(), psa.steer(z, torch.full((2,), ids.shape[1] - 1)):
            p, q = model(ids).logits[:, -1].softmax(-1)
        variation += (p - q).abs().sum().item() / 2 / len(prefixes)
    print(f"valid lines {steered:.3f}, bare {bare:.3f}; total variation at t* {variation:.3f}")
    assert variation >= 0.05 and steered >= bare - 0.1

@benchmark
def test_steps_against_trl(tmp_path, monkeypatch):
    """GRPO and IB-TPO make more trajectories a second than TRL's GRPO, from the same weights."""
    trl = pytest.importorskip("trl", reason="TRL is not installed here (pip install trl)")
    c, trees = config("--method", "grpo", "--rollouts", 16, "--prompts_per_step", 24), tree_config()
    model, tokenizer = m.load_policy(c)
    ours, pairs, rng, seconds = copy.deepcopy(model), m.load_problems(c)[0], random.Random(0), []
    problems = m.encode(pairs, ours, tokenizer, c)
    optimizer = torch.optim.AdamW(ours.parameters(), lr=1e-6)
    monkeypatch.chdir(tmp_path)

    class Turns(transformers.TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            self.began = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            times = [self.began, time.perf_counter()]
            batch = m.roll_out(ours, tokenizer, m.shard(rng.sample(problems, 24)), c)
            m.set_advantages(batch, batch)
            m.update(ours, optimizer, batch, c)
            times.append(time.perf_counter())
            roots, _ = tpo.grow(ours, tokenizer, tpo.shard(rng.sample(problems, 48)), trees, rng)
            tpo.update_on_trees(ours, optimizer, list(roots.values()), trees)
            times.append(time.perf_counter())
            seconds.append([after - before for before, after in itertools.pairwise(times)])

    trl.GRPOTrainer(
        model, lambda completions, gold, **_: [
            m.extract_answer(t) == a for t, a in zip(completions, gold)],
        trl.GRPOConfig(
            "trl", per_device_train_batch_size=384, num_generations=16, max_completion_length=48,
            max_steps=17, learning_rate=1e-6, loss_type="dapo", beta=0.0, temperature=1.0, top_k=0,
            use_cpu=True, bf16=False, gradient_checkpointing=False, save_strategy="no"),
        datasets.Dataset.from_list([{"prompt": q + "\n", "gold": gold} for q, gold in pairs]),
        processing_class=tokenizer, callbacks=[Turns()]).train()
    times = pandas.DataFrame(seconds, columns=["TRL", "GRPO", "IB-TPO"])[2:].median()
    rate = pandas.Series({"TRL": 384, "GRPO": 384, "IB-TPO": 576}) / times
    print(f"\nseconds\n{times}\ntrajectories a second, to TRL's\n{rate / rate['TRL']}")
    assert rate["GRPO"] >= 1.5 * rate["TRL"] and rate["IB-TPO"] >= 1.8 * rate["TRL"]

UPDATE = """
import re, sys, time, torch, transformers
script, recompute, rows = __import__(sys.argv[1]), sys.argv[2], int(sys.argv[3])
model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(
    vocab_size=151_936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
    num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True))
config = script.parse_config(sys.argv[1], ["--model", "x", "--recompute", recompute])
extra = script.prepare(model, config) if sys.argv[1] == "ib_tpo" else None  # the reference

def update(rows):
    if sys.argv[1] == "iiblpo":  # responses of 256 tokens with the prompt
        batch = [script.Trajectory([5] * 8, response=[7 + i] * 248, logps=torch.full((248,), -12.0),
                                   advantage=1.0) for i in range(rows)]
        return script.update(model, optimizer, batch, config)
    root = script.Node([5] * 8)  # one tree of responses of 1,024 tokens
    for i in range(rows):
        script.insert(root, [[7 + i] * 1024], [torch.full((1024,), -12.0)], i % 2)
    return script.update_on_trees(model, optimizer, [root], config, extra)

optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
update(1)  # from the second step on Adam's moments are there, too
began = time.time()
update(rows)
seconds = time.time() - began
peak = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 2 ** 20
print(f"{sys.argv[1]}, recompute {recompute}, {rows} rows: {peak:.1f} GiB, {seconds:.0f} s")
"""

def update_of_half_a_billion(*arguments):
    """Return peak memory in GiB and seconds of an update of a random Qwen2.5-0.5B on the CPU."""
    said = subprocess.check_output([sys.executable, "-c", UPDATE, *arguments], cwd=HERE, text=True)
    print("\n" + said.strip().splitlines()[-1])
    return [float(number) for number in re.findall(r"([\d.]+) (?:GiB|s)\b", said)]

@benchmark
def test_memory_of_an_update_at_the_defaults():
    assert update_of_half_a_billion("iiblpo", "True", "16")[0] <= 16  # 4,096 tokens
    assert update_of_half_a_billion("ib_tpo", "True", "12")[0] <= 20  # the worst tree, with the KL

@benchmark
def test_the_price_of_running_layers_again():
    """Running layers again makes an update, here of a quarter, 1.5 times as long at most."""
    times = [update_of_half_a_billion("iiblpo", again, "4")[1] for again in ("True", "False")]
    assert times[0] <= 1.5 * times[1]

@benchmark
@each("script, flags", list(zip(SCRIPTS, (QUICK, TREES))), ids=SCRIPTS)
def test_twenty_kills_lose_nothing(folder, script, flags):
    """A run killed at a random moment, warm start included, goes on to end in the same numbers."""
    flags = [*flags, "--model", "tiny", "--warm_steps", 60, "--max_steps", 8]
    began, rng = time.time(), random.Random(0)
    assert background(script, *flags, "--out", "whole").wait() == 0
    seconds = time.time() - began
    for out in map("part{}".format, range(20)):
        if rng.random() < 0.5:
            shutil.rmtree("runs", ignore_errors=True)
        process = background(script, *flags, "--out", out)
        time.sleep(rng.uniform(0.2, 1) * seconds)
        process.kill()
        process.wait()
        resume = ["--resume"] * Path(out).exists()
        assert background(script, *flags, "--out", out, *resume).wait() == 0
        assert metrics(out) == metrics("whole") and final(out) == final("whole")

# Variants that no flag offers: `python test_iiblpo.py VARIANT FLAGS` patches a script and runs it
VARIANTS = {"same_latent": steer_the_update_too, "top_n": keep_the_best,
            "random_share": score_at_random, "visits": count_visits}

if __name__ == "__main__":
    name = sys.argv.pop(1)
    VARIANTS[name]()
    (tpo if name == "visits" else m).main()
