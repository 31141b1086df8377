"""The identities and the promises. `pytest -q`; every training here is of toy size."""

import contextlib
import copy
import dataclasses
import doctest
import itertools
import json
import math
import os
import random
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import curvature
import edit as editing
import kg
import minedit
import models
from curvature import ablate, ablated, control, corrected_masses, eigen, keep_mask, kronecker_factors
from edit import alphaedit_update, edit, emmet_update, memit_update, record, rome_update, row_update, second_moment
from models import ARCHS, Config, Model

HERE = Path(__file__).parent
torch.set_num_threads(1)                                     # at toy size threads wait for each other longer than they work
os.environ["OMP_NUM_THREADS"] = "1"                          # for the runs that are started as commands
TINY = ["--entities", "10", "--relations", "4", "--d-model", "16", "--n-heads", "2", "--d-ff", "32", "--slots", "32",
        "--top-k", "4", "--ff-top-k", "8", "--depth", "2", "--steps", "20", "--eval-every", "10", "--batch", "16", "--n-edits", "4",
        "--device", "cpu"]

def generator(seed=0):
    return torch.Generator().manual_seed(seed)

def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)

def tiny_model(arch="lmc", **sizes):
    sizes = {"n_entities": 10, "n_relations": 4, "d_model": 16, "n_heads": 2, "depth": 3, "d_ff": 24, "slots": 32,
             "top_k": 4, "ff_top_k": 6} | ARCHS[arch] | sizes
    return Model(Config(**sizes), generator()).double().requires_grad_(False)

def close(got, want, tolerance=1e-10):
    """Relative error in the largest entry, with the place where it stands."""
    error = (got - want).abs()
    worst, scale = error.max().item(), max(want.abs().max().item(), 1e-300)
    assert worst <= tolerance * scale, f"off by {worst / scale:.2e} of {scale:.3g} at {error.argmax().item()} (> {tolerance})"

# --- documentation ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("module", [kg, models, editing, curvature], ids=lambda m: m.__name__)
def test_worked_examples(module):
    result = doctest.testmod(module)
    assert result.attempted > 0 and result.failed == 0

def readme_commands():
    for line in (HERE / "README.md").read_text().splitlines():
        if line.strip().startswith("python minedit.py"):
            yield line.strip().split("#")[0]

def test_readme_commands_parse():
    commands = list(readme_commands())
    assert len(commands) >= 4
    for command in commands:
        minedit.build_parser().parse_args(shlex.split(command)[2:])

def test_readme_code_runs():
    blocks = (HERE / "README.md").read_text().split("```python\n")[1:]
    assert blocks
    for block in blocks:
        exec(block.split("```")[0], {})

def test_modules_that_are_copied_import_torch_alone():
    imports = [line for line in (HERE / "edit.py").read_text().splitlines() if line.startswith(("import ", "from "))]
    assert all(line.split()[1].split(".")[0] in ("torch", "contextlib", "dataclasses") for line in imports), imports

# --- kg.py ------------------------------------------------------------------------------------------------------------

def brute_force_paths(facts):
    """Every (h, r1, r2) with its answers, by loops; a fact without continuation has one row."""
    rows = []
    for h, row in enumerate(facts):
        for r1, b in enumerate(row):
            if b >= 0:
                second = [(r2, t) for r2, t in enumerate(facts[b]) if t >= 0]
                rows += [((h, r1, r2), b, t) for r2, t in second] or [((h, r1, r1), b, -100)]
    return rows

@pytest.mark.parametrize("out_degree", [None, 3, 1])
def test_paths_are_those_of_the_table(out_degree):
    graph = kg.synthetic(12, 6, seed=3, out_degree=out_degree)
    facts = graph.facts.clone()
    facts[5] = -1                                            # an entity without outgoing facts
    paths = kg.split(kg.from_table(facts), 0.2, 0.7, seed=1)
    expected = brute_force_paths(facts.tolist())
    assert [tuple(t) for t in (paths.tokens - torch.tensor([0, 12, 12])).tolist()] == [key for key, _, _ in expected]
    assert paths.one_hop.tolist() == [b for _, b, _ in expected] and paths.two_hop.tolist() == [t for _, _, t in expected]

@pytest.mark.parametrize("seed", range(3))
def test_split_keeps_its_promises(seed):
    paths = kg.split(kg.synthetic(20, 8, seed, out_degree=5), 0.15, 0.75, seed)
    masks, second = paths.masks, paths.second >= 0
    assert torch.equal(sum(mask.long() for mask in masks.values()), second.long()), "every composition is in one set"
    o1, o2 = paths.ood_fact[paths.first], paths.ood_fact[paths.second]
    assert not (masks["train"] & (o1 | o2)).any(), "an OOD fact is in a trained composition"
    assert torch.equal(masks["ood"], o1 & o2 & second) and torch.equal(masks["ood_first"], o1 & ~o2 & second)
    assert torch.equal(masks["ood_second"], ~o1 & o2 & second)
    assert int(paths.ood_fact.sum()) == round(0.15 * 100)
    both_id = int((masks["train"] | masks["id"]).sum())
    assert int(masks["train"].sum()) == round(0.75 * both_id)
    assert torch.equal(paths.first.unique(), torch.arange(100)), "every fact has a row, so that it is trained"
    assert torch.equal(paths.facts[paths.first, 2], paths.one_hop)
    assert torch.equal(paths.facts[paths.second, 2][second], paths.two_hop[second])
    assert torch.equal(paths.facts[paths.second, 0][second], paths.one_hop[second]), "the hops meet"

def test_graphs_are_the_same_everywhere():
    graph, other = kg.synthetic(5, 2, seed=7), kg.synthetic(5, 2, seed=8)
    assert graph.facts.tolist() == GOLDEN_GRAPH and not torch.equal(graph.facts, other.facts)
    assert kg.split(graph, 0.2, 0.5, seed=7).masks["train"].long().tolist() == GOLDEN_TRAIN
    assert (graph.facts != torch.arange(5)[:, None]).all(), "no tail is its own head"
    assert (kg.synthetic(9, 6, seed=0, out_degree=2).facts >= 0).sum(1).tolist() == [2] * 9

GOLDEN_GRAPH = [[2, 2], [2, 3], [0, 0], [4, 4], [0, 0]]
GOLDEN_TRAIN = [0, 0, 0, 0, 0, 0, 1, 1, 0, 1, 0, 0, 1, 0, 1, 0, 0, 1, 0, 0]

def test_triples(tmp_path):
    file = tmp_path / "facts.tsv"
    file.write_text("# a comment\n\nParis\tcapital of\tFrance\r\nFrance\tin\tEurope\nParis\tcapital of\tFrance\n"
                    "France\tborders\tSpain\nFrance\tborders\tItaly\nRome\tcapital of\tItaly\nItaly\tin\tEurope\n", "utf-8")
    graph = kg.from_triples(file)
    named = {(graph.entities[h], graph.relations[r]): graph.entities[graph.facts[h, r]]
             for h, r in (graph.facts >= 0).nonzero().tolist()}
    assert named == {("Paris", "capital of"): "France", ("France", "in"): "Europe", ("Rome", "capital of"): "Italy",
                     ("Italy", "in"): "Europe"}
    assert "borders" not in graph.relations and "Spain" not in graph.entities, "no token without a fact"
    assert len(graph.notes) == 2 and "1 repeated" in graph.notes[0] and "1 questions" in graph.notes[1]
    paths = kg.split(graph, 0, 1, seed=0)
    assert len(paths.first) == 4 and int(paths.masks["train"].sum()) == 2

@pytest.mark.parametrize("text, line, word", [
    ("a\tb\n", 1, "2 field"), ("a\tr\tb\n\na\tr\tb\tc\n", 3, "4 field"), ("a\tr\t\n", 1, "expected head"),
    ("# only this\n", 1, "no usable triple"), ("a\tr\tb\na\tr\tc\n", 2, "no usable triple"),
    ("a\tr\tb\nc\tr\td\n", 2, "no two-hop path"), (b"a\tr\tb\n\xff\xfe\tr\tb\n", 2, "UTF-8")])
def test_bad_triples_name_the_line(tmp_path, text, line, word):
    file = tmp_path / "bad.tsv"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=word) as error:
        kg.from_triples(file)
    assert f"bad.tsv:{line}:" in str(error.value) and "\n" not in str(error.value)

# --- models.py --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("arch", ARCHS)
def test_later_tokens_change_nothing(arch):
    model = tiny_model(arch)
    tokens = torch.randint(14, (5, 4), generator=generator())
    whole = model(tokens)
    for t in range(1, 4):
        close(model(tokens[:, :t]), whole[:, :t], 1e-12)     # prefix equality: the state at r1 is that of (h, r1)
    x = model.embedding(tokens).detach().requires_grad_()
    with torch.enable_grad():
        hook = model.embedding.register_forward_hook(lambda *_: x)
        model(tokens)[:, 1].sum().backward()
        hook.remove()
    assert x.grad[:, :2].abs().min() > 0 and x.grad[:, 2:].abs().max() == 0

@pytest.mark.parametrize("arch", ARCHS)
def test_branches_are_paths_that_share_a_prefix(arch):
    model = tiny_model(arch)
    tokens = torch.tensor([[1, 10, 11, 12, 13]])
    branched = model(tokens, torch.tensor([0, 1, 2, 2, 2]))
    for i, r2 in enumerate([11, 12, 13]):
        close(branched[:, 2 + i], model(torch.tensor([[1, 10, r2]]))[:, 2], 1e-12)

def test_the_grid_shares_what_it_says():
    for arch, blocks in ("dense", 6), ("loop", 2), ("dense+mem", 6), ("lmc", 2):
        model = tiny_model(arch, blocks=2)
        assert len(model.blocks) == blocks
        layers = [name for name, module in model.named_modules() if name.endswith(("values", "down"))]
        assert len(layers) == (1 if "mem" in arch or arch == "lmc" else blocks)
        tokens = torch.tensor([[1, 10, 11]])
        calls = len(record(model, model.get_submodule(layers[0]), tokens)[0])
        assert calls == {"dense": 1, "loop": 3, "dense+mem": 6, "lmc": 6}[arch]
    both = tiny_model("lmc", feed_forward=True)
    assert both.memory is not None and both.blocks[0].feed_forward is not None

def test_a_loop_is_a_stack_whose_blocks_are_equal():
    loop, dense = tiny_model("loop"), tiny_model("dense")
    dense.embedding.load_state_dict(loop.embedding.state_dict())
    for block in dense.blocks:
        block.load_state_dict(loop.blocks[0].state_dict())
    tokens = torch.randint(14, (5, 3), generator=generator())
    close(loop(tokens), dense(tokens), 1e-12)

def test_addresses_against_a_slow_reference():
    scores = normal(7, 32)
    groups, topk = models.address(scores, 4, "groups"), models.address(scores, 4, "topk")
    assert torch.equal(models.address(scores, 0, "groups"), scores.clamp(min=0) ** 2)
    for row, got_groups, got_topk in zip(scores.tolist(), groups.tolist(), topk.tolist()):
        winners = [max(range(g, 32, 4), key=row.__getitem__) for g in range(4)]
        assert got_groups == [max(s, 0) ** 2 if j in winners else 0 for j, s in enumerate(row)]
        best = sorted(range(32), key=row.__getitem__)[-4:]
        assert got_topk == [max(s, 0) ** 2 if j in best else 0 for j, s in enumerate(row)]
    assert torch.equal(models.address(scores, 4, "plain"), topk)

@pytest.mark.parametrize("top_k, addressing", [(4, "groups"), (4, "topk"), (4, "plain"), (0, "groups")])
def test_the_gradient_of_an_address(top_k, addressing):
    scores = normal(5, 16).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: models.address(x, top_k, addressing), scores, eps=1e-7)

@pytest.mark.parametrize("arch, more", [(a, {}) for a in ARCHS] + [("lmc", {"feed_forward": True, "blocks": 2})])
def test_flops_are_those_that_torch_counts(arch, more):
    from torch.utils.flop_counter import FlopCounterMode
    model = tiny_model(arch, **more)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(torch.randint(14, (5, 3)))                     # the fused attention is not counted on a CPU
    assert counter.get_total_flops() == 5 * models.flops_per_path(model.config)

def test_weights_come_from_the_generator_alone():
    torch.rand(1)                                            # the global stream has moved on, whatever ran before
    one, same, other = (Model(Config(), generator(seed)).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) and not torch.equal(one[name], other[name]) for name in one)

@pytest.mark.parametrize("sizes, words", [
    ({"d_model": 60, "n_heads": 4}, ["60", "4"]), ({"slots": 100, "top_k": 32}, ["100", "32"]), ({"depth": 0}, ["depth", "0"]),
    ({"slots": 8, "top_k": 9}, ["8", "9"]), ({"d_ff": 100, "memory": False}, ["d_ff", "100"]),
    ({"n_entities": -1}, ["n_entities", "-1"]), ({"addressing": "hash"}, ["hash"])])
def test_config_names_the_values_that_clash(sizes, words):
    with pytest.raises(ValueError) as error:
        Config(**sizes)
    assert all(word in str(error.value) for word in words)

# --- edit.py: closed forms --------------------------------------------------------------------------------------------

@pytest.fixture
def problem():
    """W [d_out, d_in] that is not square, ordinary keys whose moments decay, a key and a value."""
    K = normal(200, 9) * torch.logspace(0, -2, 9, dtype=torch.float64)
    return normal(5, 9, seed=1), second_moment(K), normal(9, seed=2), normal(5, seed=3), K

def test_second_moment_is_the_mean_of_outer_products(problem):
    K = problem[-1]
    close(second_moment(K), sum(torch.outer(k, k) for k in K) / len(K), 1e-13)
    close(second_moment(K.view(10, 20, 9)), second_moment(K), 1e-13)
    assert second_moment(K.float()).dtype == torch.float64

def test_rome_writes_the_value_and_changes_ordinary_values_least(problem):
    W, C, k, v, K = problem
    dW = rome_update(W, C, k, v)
    close((W + dW) @ k, v)
    assert torch.linalg.matrix_rank(dW) == 1
    close(rome_update(W, 7.5 * C, k, v), dW)                 # ROME(C) = ROME(s C)
    # Independent: minimise E|dW k'|^2 subject to dW k = v - W k, by the KKT system of one row at a time.
    n = len(k)
    system = torch.zeros(n + 1, n + 1, dtype=torch.float64)
    system[:n, :n], system[:n, n], system[n, :n] = 2 * C, k, k
    for i, residual in enumerate(v - W @ k):
        right = torch.zeros(n + 1, dtype=torch.float64)
        right[n] = residual
        close(dW[i], torch.linalg.solve(system, right)[:n], 1e-9)
    cost = lambda D: (K @ D.T).square().sum()
    assert cost(dW) < cost(torch.outer(v - W @ k, k / (k @ k))), "worse than the plain projection"

def test_row_update_changes_one_column(problem):
    _, _, k, r, _ = problem
    dW = row_update(k, r)
    close(dW @ k, r, 1e-13)
    assert dW.any(0).nonzero().flatten().tolist() == [k.abs().argmax().item()] and dW.shape == (5, 9)

def test_a_singular_second_moment_gets_a_recorded_ridge(problem):
    W, C, k, v, _ = problem
    notes = {}
    rome_update(W, C, k, v, notes)
    assert notes["ridge"] == 0.0
    C, k = C.clone(), k.clone()
    C[3], C[:, 3], k[3] = 0, 0, 0                            # a dead input
    dW = rome_update(W, C, k, v, notes)
    assert 0 < notes["ridge"] <= 1e-7 * C.trace() and dW.isfinite().all()
    close((W + dW) @ k, v)
    assert dW[:, 3].abs().max() == 0, "a dead input needs no weight"
    low_rank = second_moment(normal(4, 9))
    dW = rome_update(W, low_rank, k, v, notes)
    assert notes["ridge"] > 0
    close((W + dW) @ k, v, 1e-9)

@pytest.mark.parametrize("change, words", [
    (lambda W, C, k, v: (W, C, 0 * k, v), "zeros"), (lambda W, C, k, v: (W, C, k * float("nan"), v), "not finite"),
    (lambda W, C, k, v: (W, C, k, v / 0), "not finite"), (lambda W, C, k, v: (W.T, C, k, v), r"\[5, 9\]"),
    (lambda W, C, k, v: (W, C[:4, :4], k, v), r"\[4, 4\]"), (lambda W, C, k, v: (W, 0 * C, k, v), "trace"),
    (lambda W, C, k, v: (W, C, k[None], v), r"\[1, 1, 9\]")])
def test_bad_requests_are_refused(problem, change, words):
    with pytest.raises(ValueError, match=words):
        rome_update(*change(*problem[:4]))
    _, _, k, v = change(*problem[:4])
    if k is not problem[2] or not v.isfinite().all():
        with pytest.raises(ValueError):
            row_update(k, v)

def test_updates_come_in_the_dtype_of_the_weights(problem):
    W, C, k, v, _ = problem
    assert rome_update(W.float(), C, k.float(), v.float()).dtype == torch.float32
    assert row_update(k.float(), v.float()).dtype == torch.float32
    with pytest.raises(ValueError, match="does not fit torch.float16"):
        rome_update(W.half(), C, k.half() / 100, 6e4 * torch.ones(5).half())
    close(rome_update(W.bfloat16(), C, k.bfloat16(), v.bfloat16()).double(),
          rome_update(W.bfloat16().double(), C, k.bfloat16().double(), v.bfloat16().double()), 0.01)

# --- edit.py: many facts in one update --------------------------------------------------------------------------------

def requests_of(n, d_in=9, d_out=5):
    """n keys and residuals; with d_in 9 and d_out 5 no matrix passes for its transpose."""
    return normal(n, d_in, seed=10 + n) * torch.linspace(2, 0.3, d_in, dtype=torch.float64), normal(n, d_out, seed=40 + n)

@pytest.mark.parametrize("form", ["primal", "dual", None])
@pytest.mark.parametrize("n, lam", [(4, 0.3), (4, 50.0), (30, 0.3), (30, 50.0)])
def test_memit_is_regularised_least_squares(problem, n, lam, form):
    C, (K, R) = problem[1], requests_of(n)
    dW = memit_update(K, R, C, lam, form=form)
    close(dW @ (lam * C + K.T @ K), R.T @ K)
    close(dW, R.T @ torch.linalg.solve(K @ torch.linalg.solve(C, K.T) + lam * torch.eye(n, dtype=C.dtype),
                                       K @ C.inverse()))
    close(dW, memit_update(K, R, 7.5 * C, lam / 7.5, form=form))
    stacked = torch.cat([lam ** 0.5 * torch.linalg.cholesky(C).T, K])            # [sqrt(lam) L^T; K] dW^T = [0; R]
    close(dW, torch.linalg.lstsq(stacked, torch.cat([torch.zeros(9, 5, dtype=C.dtype), R])).solution.T)

def test_the_limits_of_memit_and_one_fact(problem):
    W, C, k, v, _ = problem
    K, R = requests_of(4)
    gram = K @ torch.linalg.solve(C, K.T)
    smallest, largest = torch.linalg.eigvalsh(gram)[[0, -1]].tolist()
    lam = 1e12 * largest                                     # lam dW = R^T (gram / lam + I)^-1 K C^-1
    close(lam * memit_update(K, R, C, lam), R.T @ K @ C.inverse())
    lam = 1e-12 * smallest
    emmet = emmet_update(K, R, C)
    close(memit_update(K, R, C, lam), emmet)
    close(emmet @ K.T, R.T)
    r, a = (v - W @ k)[None], k @ torch.linalg.solve(C, k)
    rome = rome_update(W, C, k, v)
    close(emmet_update(k[None], r, C), rome)
    for lam in 0.01, 1.0, 100.0:
        close(memit_update(k[None], r, C, lam), rome * a / (a + lam))
    # EMMET writes with the least change of ordinary values: any other dW that writes the same adds one with D K^T = 0
    other = normal(5, 9) @ (torch.eye(9, dtype=C.dtype) - torch.linalg.pinv(K) @ K)
    assert abs((emmet @ C * other).sum()) < 1e-10 * (emmet @ C).norm() * other.norm(), "not orthogonal to it in C"

def test_batches_one_after_another_are_one_batch(problem):
    C, (K, R) = problem[1], requests_of(30)
    whole, dW, carried = memit_update(K, R, C, 2.0), torch.zeros(5, 9, dtype=C.dtype), torch.zeros_like(C)
    for part in torch.arange(30).split([1, 9, 20]):
        dW = dW + memit_update(K[part], R[part] - K[part] @ dW.T, C, 2.0, carried=carried)
        carried = carried + K[part].T @ K[part]
    close(dW, whole)
    alone = memit_update(K[:10], R[:10], C, 2.0)
    forgets = alone + memit_update(K[10:], R[10:] - K[10:] @ alone.T, C, 2.0)
    assert (forgets - whole).norm() > 0.01 * whole.norm(), "without carrying, the result is another"

def test_keys_that_coincide(problem):
    C, (K, R) = problem[1], requests_of(5)
    k, lam = K[0], 0.7
    a = k @ torch.linalg.solve(C, k)
    for form in "primal", "dual":
        dW = memit_update(k.expand(5, 9), R, C, lam, form=form)
        close(dW @ k, R.mean(0) * 5 * a / (5 * a + lam))
        close(dW, memit_update(5 ** 0.5 * k[None], 5 ** 0.5 * R.mean(0)[None], C, lam))
    for same in K[1], -3 * K[1]:
        with pytest.raises(ValueError, match="requests 1 and 4 have the same key.*memit_update"):
            emmet_update(torch.stack([*K[:4], same]), R, C)
    with pytest.raises(ValueError, match="rank of the keys is less than 5.*memit_update"):
        emmet_update(torch.stack([*K[:4], K[:4].sum(0)]), R, C)
    with pytest.raises(ValueError, match="10 requests .* at most 9.*memit_update"):
        emmet_update(*requests_of(10), C)
    with pytest.raises(ValueError, match="lost in rounding"):
        memit_update(k.expand(5, 9), R, C, 1e-20)
    close(emmet_update(*requests_of(9), C) @ requests_of(9)[0].T, requests_of(9)[1].T, 1e-9)     # as many as the rank

@pytest.mark.parametrize("form", ["primal", "dual"])
def test_a_decaying_spectrum_costs_no_more_digits_than_it_must(form):
    """C has condition 1e9. The error of any method is bounded by eps * condition of its matrix; 1e-10 needs a good one."""
    d, n, lam = 40, 12, 3.0
    Q = torch.linalg.qr(normal(d, d))[0]
    C = Q * torch.logspace(0, -9, d, dtype=torch.float64) @ Q.T
    C = (C + C.T) / 2
    K, R = normal(n, d, seed=1) * torch.logspace(0, -4.5, d, dtype=torch.float64) @ Q.T, normal(n, 7, seed=2)
    notes = {}
    dW = memit_update(K, R, C, lam, form=form, diagnostics=notes)
    system = lam * C + K.T @ K
    bound = 10 * d * torch.finfo(C.dtype).eps * torch.linalg.cond(system).item()
    assert notes["ridge"] == 0 and notes["condition"] < 1e3 < 1e7 < torch.linalg.cond(system)
    close(dW, torch.linalg.solve(system, K.T @ R).T, min(bound, 1e-6))
    close(dW @ system, R.T @ K)
    close(dW @ K.T, (R - lam * torch.linalg.solve(K @ torch.linalg.solve(C, K.T) + lam * torch.eye(n), R)).T, 1e-6)

def test_alphaedit_stays_in_the_null_space(problem):
    basis, (K, R) = torch.linalg.qr(normal(9, 9))[0], requests_of(12)
    kept, free = basis[:, :5], basis[:, 5:]
    ordinary = normal(200, 5, seed=4) @ kept.T
    C, lam, notes = second_moment(ordinary), 0.4, {}
    dW = alphaedit_update(K, R, C, lam, diagnostics=notes)
    assert notes["null_space"] == 4 and (ordinary @ dW.T).abs().max() < 1e-10 * dW.norm()
    stacked = torch.cat([lam ** 0.5 * torch.eye(4, dtype=C.dtype), K @ free])    # dW = Y^T free^T, the constraint solved
    Y = torch.linalg.lstsq(stacked, torch.cat([torch.zeros(4, 5, dtype=C.dtype), R])).solution
    close(dW, (free @ Y).T)
    P = free @ free.T                                        # the paper's formula, transposed
    close(dW, R.T @ K @ P @ (K.T @ K @ P + lam * torch.eye(9, dtype=C.dtype)).inverse())
    close(alphaedit_update(K[:2], R[:2], C, 1e-9) @ K[:2].T, R[:2].T, 1e-6)
    C = problem[1]                                           # a spectrum that decays: what is kept is kept to the threshold
    for threshold in 0.003, 0.1:
        bound = threshold * C.trace() / 9
        dW = alphaedit_update(K, R, C, lam, threshold=threshold, diagnostics=notes)
        assert notes["null_space"] == (torch.linalg.eigvalsh(C) < bound).sum() in range(1, 9)
        assert torch.linalg.matrix_rank(dW) <= notes["null_space"]
        assert 0 < (problem[-1] @ dW.T).square().sum(-1).mean() <= bound * dW.square().sum()
    with pytest.raises(ValueError, match="null space of C is empty.*raise the threshold or use memit_update"):
        alphaedit_update(K, R, torch.eye(9), lam)

@pytest.mark.parametrize("n", [6, 20])
def test_diagnostics_are_what_they_say(problem, n):
    W, C, k, v, _ = problem
    (K, R), lam, notes, alpha = requests_of(n), 0.8, {}, {}
    dW = memit_update(K, R, C, lam, W=W, diagnostics=notes)
    gram = K @ torch.linalg.solve(C, K.T)
    predicted = lam * torch.linalg.solve(gram + lam * torch.eye(n, dtype=C.dtype), R)
    close(R - K @ dW.T, predicted)
    close(notes["residual_predicted"], predicted.norm(dim=-1))
    close(notes["residual_left"], predicted.norm(dim=-1))
    whitened = torch.linalg.solve_triangular(torch.linalg.cholesky(C), K.T, upper=False)
    X = whitened.T if n < 9 else whitened
    assert notes["condition"] == pytest.approx(torch.linalg.cond(X @ X.T + lam * torch.eye(len(X))).item(), rel=1e-6)
    directions = F.normalize(torch.linalg.solve(C, K.T).T)
    cosines = (directions @ directions.T - torch.eye(n)).abs()
    assert notes["largest_cosine"] == pytest.approx(cosines.max().item(), rel=1e-9) and notes["ridge"] == 0
    i, j = sorted(divmod(cosines.argmax().item(), n))
    for chunk in 1, 4, 100:
        assert editing.largest_cosine(directions, chunk) == (pytest.approx(cosines.max().item()), i, j)
    assert notes["relative_norm"] == pytest.approx((dW.norm() / W.norm()).item())
    assert editing.largest_cosine(K[:1]) == (0.0, 0, 0)
    rounded = {}
    low = memit_update(K, R.bfloat16(), C, lam, diagnostics=rounded)
    assert low.dtype == torch.bfloat16 and "relative_norm" not in rounded
    close(rounded["residual_left"], (R.bfloat16().double() - K @ low.double().T).norm(dim=-1))
    assert (rounded["residual_left"] - rounded["residual_predicted"]).abs().max() > 1e-4, "not measured on what is returned"
    alphaedit_update(K, R, second_moment(K[:3]), lam, W=W, diagnostics=alpha)
    emmet, rome, row = {}, {}, {}
    emmet_update(K[:5], R[:5], C, W=W, diagnostics=emmet)
    assert emmet.keys() == notes.keys() == alpha.keys() - {"null_space"}
    assert emmet["residual_left"].max() < 1e-10 and emmet["residual_predicted"].max() == 0
    dW = rome_update(W, C, k, v, rome)
    row_update(k, v, row)
    assert rome["relative_norm"] == pytest.approx((dW.norm() / W.norm()).item())
    assert rome["residual_left"].shape == row["residual_left"].shape == (1,) and rome["residual_left"] < 1e-10

@pytest.mark.parametrize("update", [
    emmet_update, lambda *a, **b: memit_update(*a, 1.0, **b),
    lambda *a, **b: alphaedit_update(*a, 1e-4, threshold=0.1, **b)], ids=["emmet", "memit", "alphaedit"])
def test_bad_batches_are_refused(problem, update):
    C, (K, R) = problem[1], requests_of(4)
    def changed(x, value):
        x = x.clone()
        x[2] = value
        return x
    bad_C = C.clone()
    bad_C[8, 8] = -0.01
    for arguments, words in ((changed(K, 0), R, C), "request 2: a key of zeros"), ((changed(K, float("nan")), R, C), "request 2: its key"), \
            ((K, changed(R, float("inf")), C), "request 2: its residual"), ((K, R[:3], C), r"\[4, 9\] and \[3, 5\]"), \
            ((K[:0], R[:0], C), "n >= 1"), ((K[0], R[0], C), r"\[9\] and \[5\]"), ((K, R, C[:4, :4]), r"\[4, 4\]"), \
            ((K, R, 0 * C), "trace"), ((K, R, C / 0), "finite"):
        with pytest.raises(ValueError, match=words):
            update(*arguments)
    with pytest.raises(ValueError, match=r"W must be \[5, 9\] .* got \[9, 5\]"):
        update(K, R, C, W=problem[0].T)
    for lam in 0, -1.0, float("nan"), float("inf"):
        with pytest.raises(ValueError, match="lam must be positive"):
            memit_update(K, R, C, lam)
    with pytest.raises(ValueError, match="no second moment"):
        memit_update(K, R, bad_C, 1.0)
    with pytest.raises(ValueError, match="'dula'"):
        memit_update(K, R, C, 1.0, form="dula")
    with pytest.raises(ValueError, match=r"carried must be \[9, 9\] .* got \[9\]"):
        memit_update(K, R, C, 1.0, carried=C[0])
    for dtype in torch.float32, torch.bfloat16:
        assert update(K.to(dtype), R.to(dtype), C).dtype == dtype
        close(update(K.to(dtype), R.to(dtype), C).double(), update(K.to(dtype).double(), R.to(dtype).double(), C), 0.01)
    with pytest.raises(ValueError, match="does not fit torch.float16"):
        update(K / 100, (6e4 * R / R.abs().max()).half(), C)

def test_the_system_solved_is_the_smaller_one_and_ridges_are_recorded(problem, monkeypatch):
    C, sizes = problem[1], []
    cholesky = torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda A: sizes.append(len(A)) or cholesky(A))
    for n in 4, 9, 300:
        memit_update(*requests_of(n), C, 1.0)
    assert sizes == [9, 4, 9, 9, 9, 9]                       # C, then the system
    C, (K, R), notes = C.clone(), requests_of(4), {}
    C[3], C[:, 3], K[:, 3] = 0, 0, 0                         # a dead input
    for update in lambda: memit_update(K, R, C, 1.0, diagnostics=notes), lambda: emmet_update(K, R, C, diagnostics=notes):
        dW = update()
        assert notes["ridge"] == pytest.approx(1e-8 * C.trace().item() / 9) and dW[:, 3].abs().max() == 0
        alive = [0, 1, 2, 4, 5, 6, 7, 8]
    close(dW[:, alive], emmet_update(K[:, alive], R, C[alive][:, alive]), 1e-3)  # the ridge is all that differs

# --- edit.py: putting an edit into a model ----------------------------------------------------------------------------

def test_an_edited_model_is_restored_bit_for_bit():
    model = tiny_model().float()
    before = copy.deepcopy(model.state_dict())
    same = lambda: all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    dW = torch.randn(16, 32, generator=generator())
    with edit(model, {"memory.values": dW}):
        assert not same()
    assert same()
    with pytest.raises(KeyError), edit(model, {"memory.values": dW}):
        raise KeyError
    assert same()
    for bad in {"memory.values": dW.T}, {"memory.values": dW / 0}, {"memory.keys": torch.zeros(32, 16), "memory.values": dW.T}:
        with pytest.raises(ValueError, match="memory.values"), edit(model, bad):
            pass
        assert same()
    huge = {"memory.keys": torch.zeros(32, 16), "memory.values": torch.full((16, 32), 1e300, dtype=torch.float64)}
    with pytest.raises(ValueError, match="does not fit torch.float32"), edit(model, huge):
        pass
    assert same()
    with edit(model, {"memory.values": dW}):
        outer = model.memory.values.weight.clone()
        with edit(model, {"memory.values": 2 * dW}):
            assert not torch.equal(model.memory.values.weight, outer)
        assert torch.equal(model.memory.values.weight, outer), "the outer edit"
    assert same()
    model.alias = model.memory
    with edit(model, {"memory.values": dW, "alias.values": dW}):                 # two names of one layer
        close(model.memory.values.weight, before["memory.values.weight"] + 2 * dW, 1e-6)
    del model.alias
    assert same()
    old = editing.apply_edit(model, {"memory.values": dW})
    assert torch.equal(model.memory.values.weight, before["memory.values.weight"] + dW)
    editing.restore(model, old)
    assert same()

@pytest.mark.parametrize("arch, name", [("lmc", "memory.values"), ("dense", "blocks.1.feed_forward.down"),
                                        ("loop", "blocks.0.feed_forward.down")])
def test_many_rank_one_edits_at_once_are_those_edits_one_by_one(arch, name):
    model = tiny_model(arch)
    layer = model.get_submodule(name)
    tokens = torch.randint(10, (6, 3), generator=generator())
    u, r = normal(6, layer.in_features), normal(6, layer.out_features, seed=1)
    with editing.rank_one(layer, u, r):
        together = model(tokens)
    for i in range(6):
        with edit(model, {name: torch.outer(r[i], u[i])}):
            close(together[i], model(tokens[i:i + 1])[0])
    assert not layer._forward_hooks

def test_recording_sees_every_call():
    model, tokens = tiny_model(), torch.randint(10, (4, 3), generator=generator())
    keys, values = record(model, model.memory.values, tokens)
    assert keys.shape == (3, 4, 3, 32) and values.shape == (3, 4, 3, 16)
    close(values, keys @ model.memory.values.weight.T, 1e-12)
    C = editing.key_second_moment(model, model.memory.values, (tokens, None), chunk=3)
    close(C, second_moment(keys), 1e-12)
    site = lambda *ordinary: editing.site(model, "memory.values", 1, tokens[:, :2], *ordinary)
    close(site().C, second_moment(keys[:, :, :2]), 1e-12)    # the queries at every call, ordinary inputs at this one
    close(site(tokens).C, second_moment(torch.cat([keys[1].flatten(0, 1), keys[:, :, :2].flatten(0, 2)])), 1e-12)
    with pytest.raises(ValueError, match="not called"):
        record(model, nn.Linear(2, 2), tokens)
    with pytest.raises(ValueError, match="no call 3"):
        editing.site(model, "memory.values", 3, tokens[:, :2], tokens)

# --- edit.py: targets and scores --------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def world():
    """A tiny model, its paths, its own answers, and requests against it."""
    paths = kg.split(kg.synthetic(10, 4, seed=5, out_degree=3), 0.1, 0.8, seed=5)
    model = tiny_model()
    fact = (~paths.ood_fact).nonzero().flatten()[[1, 5, 12, 20]]
    queries = editing.queries(paths)
    requests = editing.Requests(fact, queries[fact], paths.facts[fact, 2], (paths.facts[fact, 2] + 3) % 10)
    at = editing.site(model, "memory.values", 0, queries, paths.tokens)
    return model, paths, requests, at

def test_queries_and_site(world):
    model, paths, requests, at = world
    assert torch.equal(editing.queries(paths), torch.stack([paths.facts[:, 0], 10 + paths.facts[:, 1]], 1))
    keys, values = record(model, model.memory.values, editing.queries(paths))
    close(at.keys, keys[0, :, 1], 1e-12)
    close(at.values, values[0, :, 1], 1e-12)

def test_prototype_is_the_mean_value_of_other_known_facts(world):
    _, paths, requests, at = world
    tails, known = paths.facts[:, 2], torch.arange(len(paths.facts)) % 4 != 0
    new = requests.new.clone()
    new[0], new[1], new[2] = tails[requests.fact[0]], -1, 99                     # the answer it has; answers that nobody has
    requests = editing.Requests(requests.fact, requests.tokens, requests.old, new)
    assert known[requests.fact[0]]
    r, has_one = editing.prototype_residual(at, requests, tails, known)
    for i, (f, new) in enumerate(zip(requests.fact.tolist(), requests.new.tolist())):
        rows = [j for j in range(len(tails)) if tails[j] == new and known[j] and j != f]
        assert bool(has_one[i]) == bool(rows)
        if rows:
            close(at.values[f] + r[i], torch.stack([at.values[j] for j in rows]).mean(0), 1e-12)
        else:
            assert not r[i].any()
    assert has_one[0] and not has_one[1] and not has_one[2]

@pytest.mark.parametrize("method", ["rome", "row"])
def test_gradient_target_answers_through_the_edited_model(world, method):
    model, paths, requests, at = world
    u = editing.direction(method, at, requests)
    close((u * at.keys[requests.fact]).sum(-1), torch.ones(4, dtype=torch.float64))
    before = copy.deepcopy(model.state_dict())
    r = editing.gradient_residual(model, at, requests, u)
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items()) and model.memory.values.weight.grad is None
    for i in range(4):                                       # the edit as weights, through every pass
        with edit(model, {"memory.values": torch.outer(r[i], u[i])}):
            assert model(requests.tokens[i:i + 1])[0, -1].argmax() == requests.new[i]
    assert (r.norm(dim=-1) <= 4.001 * at.values[requests.fact].norm(dim=-1)).all()

def test_a_key_of_zeros_is_an_edit_that_fails(world):
    model, paths, requests, at = world
    dead = copy.copy(at)
    dead.keys = at.keys.clone()
    dead.keys[requests.fact[2]] = 0
    for method in "rome", "row":
        u = editing.direction(method, dead, requests)
        assert u[2].abs().max() == 0 and u[[0, 1, 3]].abs().amax(-1).min() > 0

def test_a_gradient_target_in_small_batches_and_near_the_values_of_the_store(world):
    model, paths, requests, at = world
    u = editing.direction("rome", at, requests)
    free = editing.gradient_residual(model, at, requests, u)
    sizes = []
    hook = model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    close(editing.gradient_residual(model, at, requests, u, batch=3), free, 1e-9)
    hook.remove()
    assert set(sizes) == {3, 1}
    distance = lambda r: editing.distance_to_values(at.values, at.values[requests.fact] + r, chunk=3)
    slow = [min((at.values[f] + x - value).norm().item() for value in at.values) for f, x in zip(requests.fact, free)]
    close(distance(free), torch.tensor(slow, dtype=torch.float64), 1e-7)
    near = editing.gradient_residual(model, at, requests, u, near=at.values, pull=30.0)
    assert (distance(near) < 0.5 * distance(free)).all() and distance(free * 0).max() == 0
    close(editing.gradient_residual(model, at, requests, u, near=at.values, pull=0.0), free, 1e-9)

def test_a_batch_asks_for_a_fact_once(world):
    model, paths, requests, at = world
    requests.check_distinct()
    twice = editing.Requests(*(x[[0, 1, 2, 1, 2]] for x in (requests.fact, requests.tokens, requests.old, requests.new)))
    for check in twice.check_distinct, lambda: editing.memit_layers(model, [], twice, None, 1.0, paths.tokens, ("norm", 0)):
        with pytest.raises(ValueError, match=f"requests 1 and 3 .* fact, {requests.fact[1]};"):
            check()

def stream_at_the_end(model, tokens):
    return record(model, model.norm, tokens)[0][0, :, -1]

@pytest.mark.parametrize("arch, sites", [
    ("dense", [(f"blocks.{i}.feed_forward.down", 0) for i in range(3)]), ("lmc", [("memory.values", i) for i in range(3)]),
    ("loop", [("blocks.0.feed_forward.down", 0), ("blocks.0.feed_forward.down", 2)])])
def test_memit_over_layers_against_a_slow_reference(world, arch, sites):
    _, paths, requests, _ = world
    model, lam = tiny_model(arch), 0.05
    before, r, notes = copy.deepcopy(model.state_dict()), 0.1 * normal(4, 16, seed=7), {}
    updates = editing.memit_layers(model, sites, requests, r, lam, paths.tokens, ("norm", 0), notes)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    other, wanted = copy.deepcopy(model), stream_at_the_end(model, requests.tokens) + r
    earlier = {name: 0 for name, _ in sites}
    for i, (name, call) in enumerate(sites):
        keys = record(other, other.get_submodule(name), requests.tokens)[0][call, :, -1]
        C = second_moment(record(model, model.get_submodule(name), paths.tokens)[0][call])
        C += earlier[name] / lam + notes[name, call]["ridge"] * torch.eye(len(C))
        missing = (wanted - stream_at_the_end(other, requests.tokens)) / (len(sites) - i)
        dW = missing.T @ keys @ (lam * C + keys.T @ keys).inverse()
        earlier[name] = earlier[name] + keys.T @ keys
        other.get_submodule(name).weight += dW
    for name, dW in updates.items():
        close(dW, other.get_submodule(name).weight - model.get_submodule(name).weight, 1e-6)
    if arch != "dense":                                      # a loop is written at other calls too
        return
    left = []
    for some in sites, sites[-1:]:
        with edit(model, editing.memit_layers(model, some, requests, r, lam, paths.tokens, ("norm", 0))):
            left.append((wanted - stream_at_the_end(model, requests.tokens)).norm(dim=-1))
    close(left[0], notes[sites[-1]]["residual_predicted"], 1e-6)                 # the last solve tells what is left
    assert left[0].norm() < 0.9 * left[1].norm() < 0.1 * r.norm(), "more sites bring the stream nearer"

def test_memit_over_one_layer_is_memit_and_dead_keys_are_left_out(world):
    model, paths, requests, _ = world
    at = editing.site(model, "memory.values", 2, editing.queries(paths), paths.tokens)
    r, notes = normal(4, 16, seed=7), {}
    C = editing.key_second_moment(model, at.layer, (paths.tokens, 2))
    one = lambda: editing.memit_layers(model, [("memory.values", 2)], requests, r, 1.0, paths.tokens, ("norm", 0), notes)
    close(one()["memory.values"], memit_update(at.keys[requests.fact], r, C, 1.0))
    assert len(notes["memory.values", 2]["residual_left"]) == 4
    hook = model.memory.values.register_forward_pre_hook(                        # the first request has no address
        lambda _, inputs: (inputs[0] * (torch.arange(len(inputs[0])) > 0)[:, None, None],) if len(inputs[0]) == 4 else None)
    try:
        close(one()["memory.values"], memit_update(at.keys[requests.fact[1:]], r[1:], C, 1.0))
    finally:
        hook.remove()

@pytest.mark.parametrize("shift", range(1, 10))
def test_probes_against_a_slow_reference(world, shift):
    model, paths, _, at = world
    fact = (~paths.ood_fact).nonzero().flatten()             # every ID fact, with every other tail: loops come up too
    requests = editing.Requests(fact, editing.queries(paths)[fact], paths.facts[fact, 2], (paths.facts[fact, 2] + shift) % 10)
    rng = random.Random(0)
    known = torch.tensor([rng.random() < 0.9 for _ in paths.facts])
    right = torch.tensor([rng.random() < 0.8 for _ in paths.first])
    asked = paths.masks["train"] | paths.masks["id"]
    probes, left_out = editing.propagation_probes(requests, paths, known, right, asked)
    table = {(h, r): (i, t) for i, (h, r, t) in enumerate(paths.facts.tolist())}
    expected, n_left_out = {"hop1": [], "hop2": []}, 0
    for i, (f, new) in enumerate(zip(requests.fact.tolist(), requests.new.tolist())):
        for p, (h, r1, r2) in enumerate((paths.tokens - torch.tensor([0, 10, 10])).tolist()):
            if not asked[p]:
                continue
            (first, middle), edited = table[h, r1], {f: new}
            second, old = table[middle, r2]
            if f not in (first, second):
                continue
            middle_now = edited.get(first, middle)
            second_now, answer_now = table.get((middle_now, r2), (None, None))
            answer_now = edited.get(second_now, answer_now)
            other = second_now if first == f else first
            fine = (first != second and first != second_now and other is not None and bool(known[other])
                    and answer_now != old and bool(right[p]))
            if fine:
                expected["hop1" if first == f else "hop2"].append((i, (h, 10 + r1, 10 + r2), answer_now))
            n_left_out += not fine
    for hop, probe in probes.items():
        got = list(zip(probe.edit.tolist(), map(tuple, probe.tokens.tolist()), probe.answer.tolist()))
        assert sorted(got) == sorted(expected[hop]) and got
    # a path that uses the edited fact twice is met once as first and once as second hop
    twice = int(((paths.first == paths.second) & asked & torch.isin(paths.first, requests.fact)).sum())
    assert sum(left_out.values()) == n_left_out + twice

def test_unrelated_probes_do_not_use_the_edited_fact(world):
    model, paths, requests, at = world
    one_hop, two_hop = minedit.predict(model, paths)
    asked = paths.masks["train"] | paths.masks["id"]
    probes = editing.unrelated_probes(requests, paths, one_hop, two_hop, asked, 1000, generator())
    n_facts = len(paths.facts)
    assert len(probes["unrelated_one_hop"].edit) == 4 * (n_facts - 1), "all other facts, once"
    uses = ((paths.first == requests.fact[:, None]) | (paths.second == requests.fact[:, None])) & asked
    assert len(probes["unrelated_two_hop"].edit) == 4 * int(asked.sum()) - int(uses.sum())
    for probe in probes.values():                            # the answers are the model's own
        assert torch.equal(model(probe.tokens)[:, -1].argmax(-1), probe.answer)
    near, slot = editing.neighbour_probes(requests, at, paths, one_hop), at.keys.abs().argmax(-1)
    for name, group in ("same_row", slot), ("same_subject", paths.facts[:, 0]), ("same_relation", paths.facts[:, 1]):
        assert len(near[name].edit) == sum(int((group == group[f]).sum()) - 1 for f in requests.fact) > 0
        for i, (head, relation) in zip(near[name].edit.tolist(), near[name].tokens.tolist()):
            assert [head, relation] != requests.tokens[i].tolist()
            assert name == "same_row" or requests.tokens[i].tolist()[name == "same_relation"] == [head, relation][name == "same_relation"]

def test_address_overlap_against_a_slow_reference(world):
    model, paths, requests, at = world
    probe = editing.Probes(torch.tensor([0, 2, 3]), paths.tokens[[4, 9, 30]], torch.zeros(3, dtype=torch.long))
    cosines = []
    for i, tokens in zip(probe.edit, probe.tokens):
        keys, k = record(model, model.memory.values, tokens[None])[0][:, 0, 2], at.keys[requests.fact[i]]
        cosines.append(max(float(k @ key / (k.norm() * key.norm())) for key in keys))
    assert editing.address_overlap(model, at, requests, probe, chunk=2) == pytest.approx(sum(cosines) / 3)
    own = editing.Probes(torch.arange(4), requests.tokens, requests.old)
    assert editing.address_overlap(model, at, requests, own) == pytest.approx(1)
    assert editing.address_overlap(model, at, requests, editing.Probes(*(x[:0] for x in vars(own).values()))) is None

def test_score_of_edits_that_do_nothing_and_of_an_edit_that_breaks_everything(world):
    model, paths, requests, at = world
    one_hop, two_hop = minedit.predict(model, paths)
    everything = torch.ones(len(paths.first), dtype=torch.bool)
    probes, _ = editing.propagation_probes(requests, paths, everything[:len(paths.facts)], everything, paths.second >= 0)
    probes |= editing.unrelated_probes(requests, paths, one_hop, two_hop, paths.second >= 0, 50, generator())
    probes |= editing.neighbour_probes(requests, at, paths, one_hop)
    u = editing.direction("rome", at, requests)
    nothing = editing.score(model, at, requests, u, torch.zeros(4, 16, dtype=torch.float64), probes)
    assert nothing["unrelated_one_hop_moved"] == nothing["unrelated_two_hop_moved"] == 0
    assert nothing["direct"] == pytest.approx(float((one_hop[requests.fact] == requests.new).float().mean()))
    own = editing.Requests(requests.fact, requests.tokens, requests.old, one_hop[requests.fact])
    assert editing.score(model, at, own, u, torch.zeros(4, 16, dtype=torch.float64), probes)["direct"] == 1
    broken = editing.score(model, at, requests, torch.ones_like(u), 1e3 * normal(4, 16), probes)
    assert broken["unrelated_one_hop_moved"] > 0.5
    none = editing.Requests(requests.fact, requests.tokens, requests.old, torch.full_like(requests.new, -1))
    failed = editing.score(model, at, none, u, torch.zeros(4, 16, dtype=torch.float64), probes)
    assert failed["direct"] == 0 and failed["hop1"] is None and failed["probes_hop1"] == 0, "conditioned on direct success"

def test_rome_in_sequence_is_one_edit_after_another(problem):
    W, C, _, _, _ = problem
    K, V, now, notes = normal(6, 9, seed=4), normal(6, 5, seed=5), W.clone(), {}
    for k, v in zip(K, V):
        now = now + rome_update(now, C, k, v)
    dW = editing.rome_sequence(W, C, K, V, notes)
    close(W + dW, now)
    close((W + dW) @ K[-1], V[-1])
    close(notes["residual_left"], (V - K @ (W + dW).T).norm(dim=-1), 1e-9)
    assert notes["residual_left"][:-1].min() > 1e-3, "only the last is sure to hold"

def test_constrained_fine_tuning_keeps_its_bound(world):
    model, paths, requests, at = world
    before = copy.deepcopy(model.state_dict())
    limit = lambda bound: bound * at.layer.weight.square().mean().sqrt()
    dW = editing.finetune_update(model, at.layer, requests, 0.1)
    assert 0.9 * limit(0.1) < dW.abs().max() <= 1.0001 * limit(0.1)
    close(editing.finetune_update(model, at.layer, requests, 0.1, batch=3), dW, 1e-6)
    dW = editing.finetune_update(model, at.layer, requests, 20.0)
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items()) and not at.layer._forward_hooks
    with edit(model, {"memory.values": dW}):
        assert torch.equal(model(requests.tokens)[:, -1].argmax(-1), requests.new)

# --- minedit.py: training ---------------------------------------------------------------------------------------------

def run_main(*arguments):
    return minedit.main([str(a) for a in arguments])

def weights(folder):
    return torch.load(folder / "ckpt.pt", weights_only=True)

def same_weights(one, other):
    return all(torch.equal(one[part][name], other[part][name]) for part in ("model", "average") for name in one[part])

@pytest.mark.parametrize("shape", [(8, 20), (20, 8), (12, 12)])
def test_muon_makes_singular_values_equal(shape):
    values = torch.linalg.svdvals(minedit.orthogonalize(normal(*shape)))
    assert 0.6 < values.min() and values.max() < 1.3
    U, _, V = torch.linalg.svd(normal(*shape), full_matrices=False)
    got = minedit.orthogonalize(normal(*shape))
    assert (got * (U @ V)).sum() / (got.norm() * (U @ V).norm()) > 0.97

@pytest.mark.parametrize("shape", [(16, 48), (48, 16)])
def test_muon_is_that_of_torch_but_for_bfloat16(shape):
    start, grads = torch.randn(shape, generator=generator()), torch.randn(5, *shape, generator=generator(1))
    ours, theirs = start.clone().requires_grad_(), start.clone().requires_grad_()
    a, b = minedit.Muon([ours], {"lr": 0.02, "weight_decay": 0.5, "momentum": 0.9}), torch.optim.Muon([theirs], 0.02, 0.5, momentum=0.9)
    for g in grads:
        ours.grad, theirs.grad = g.clone(), g.clone()
        a.step(), b.step()
    moved = (theirs - start).norm()
    assert (ours - theirs).norm() < 0.03 * moved, f"{(ours - theirs).norm() / moved}"

def test_batches_hold_trained_answers_only():
    paths = kg.split(kg.synthetic(15, 6, seed=2, out_degree=4), 0.2, 0.6, seed=2)
    recipe = minedit.Recipe(batch=40, branches=3)
    batches, trained, seen = minedit.Batches(paths, recipe, generator()), {}, set()
    for row, mask in zip(zip(paths.tokens.tolist(), paths.two_hop.tolist()), paths.masks["train"].tolist()):
        if mask:
            trained[tuple(row[0])] = row[1]
    for _ in range(60):
        tokens, positions, answers = batches.draw()
        assert tokens.shape == (40, 5) and answers.shape == (40, 4) and positions.tolist() == [0, 1, 2, 2, 2]
        assert len(tokens[:, :2].unique(dim=0)) == 40, "a fact is drawn once"
        for row, answer in zip(tokens.tolist(), answers.tolist()):
            assert answer[0] == paths.facts[(paths.facts[:, 0] == row[0]) & (15 + paths.facts[:, 1] == row[1]), 2].item()
            for r2, a in zip(row[2:], answer[1:]):
                if a != -100:
                    assert trained[row[0], row[1], r2] == a
                    seen.add((row[0], row[1], r2))
                else:
                    assert not any(key[:2] == tuple(row[:2]) for key in trained), "an answer was left out"
    assert seen == set(trained), "some trained path never comes up"

def test_aliases_are_second_names_of_relations():
    paths = kg.split(kg.synthetic(10, 4, seed=5), 0.1, 0.8, seed=5)
    plain, aliased = (minedit.Batches(paths, minedit.Recipe(batch=20, branches=3), generator(), alias) for alias in (0, 4))
    tokens, positions, answers = aliased.draw()
    heads, relations = tokens[:, 0], tokens[:, 1:]
    assert heads.max() < 10 and relations.min() >= 10 and 14 <= relations.max() < 18 and 0.3 < (relations >= 14).float().mean() < 0.7
    same_tokens, _, same_answers = plain.draw()
    assert torch.equal(same_tokens[:, 0], heads) and torch.equal(same_tokens[:, 1:], (relations - 10) % 4 + 10)
    assert torch.equal(same_answers, answers)
    model = tiny_model(aliases=True)
    assert model(tokens, positions).shape == (20, 5, 10) and len(model.embedding.weight) == 18

def test_facts_alone_can_be_trained(tmp_path):
    assert run_main(*TINY, "--branches", "0", "--aliases", "--steps", "200", "--out", tmp_path / "l") == 0
    results = json.loads((tmp_path / "l" / "results.json").read_text())
    assert results["accuracy"]["ood"] is None and results["accuracy"]["one_hop"] > 0.5 and results["grokked_at"] is None

def test_loss_weighs_facts_and_compositions():
    logits, answers = normal(4, 5, 7), torch.randint(7, (4, 4), generator=generator())
    answers[0, 1:] = -100
    recipe = minedit.Recipe(one_hop_weight=3.0, label_smoothing=0.1)
    kept = torch.cat([logits[i, 2:] for i in range(1, 4)])
    expected = (3 * F.cross_entropy(logits[:, 1], answers[:, 0], label_smoothing=0.1)
                + F.cross_entropy(kept, answers[1:, 1:].flatten(), label_smoothing=0.1)) / 4
    close(minedit.loss_of(logits, answers, recipe), expected, 1e-12)
    answers[:, 1:] = -100
    assert minedit.loss_of(logits, answers, recipe).isfinite(), "a batch without a trained composition"

@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_step_does_not_wait_for_the_gpu():
    paths = kg.split(kg.synthetic(10, 4, seed=5), 0.1, 0.8, seed=5).to("cuda")
    recipe, model = minedit.Recipe(batch=16), Model(Config(10, 4), generator()).to("cuda")
    batches = minedit.Batches(paths, recipe, torch.Generator("cuda").manual_seed(0))
    optimizer = minedit.Muon(model.parameters(), {"lr": 0.01, "weight_decay": 1.0, "momentum": 0.9})
    for mode in ("default", "error"):                        # the first round may allocate and compile
        torch.cuda.set_sync_debug_mode(mode)
        try:
            tokens, positions, answers = batches.draw()
            minedit.loss_of(model(tokens, positions), answers, recipe).backward()
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")

@pytest.mark.parametrize("out_degree", [None, 2])
def test_predict_is_the_model_path_by_path(out_degree):
    paths = kg.split(kg.synthetic(10, 4, seed=5, out_degree=out_degree), 0.1, 0.8, seed=5)
    model = tiny_model()
    one_hop, two_hop = minedit.predict(model, paths, chunk=20)
    logits = model(paths.tokens)
    assert torch.equal(two_hop, logits[:, 2].argmax(-1)) and torch.equal(one_hop[paths.first], logits[:, 1].argmax(-1))
    shares = minedit.accuracy(model, paths)
    right = (logits[:, 2].argmax(-1) == paths.two_hop)[paths.masks["id"]]
    assert shares["id"] == int(right.sum()) / len(right)

@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One uninterrupted tiny run with its edits."""
    folder = tmp_path_factory.mktemp("run") / "a"
    assert run_main(*TINY, "--edit", "--out", folder) == 0
    return folder

def test_a_run_writes_what_it_promises(finished):
    def no_constant(name):
        raise AssertionError(f"{name} in a JSON file")
    results = json.loads((finished / "results.json").read_text(), parse_constant=no_constant)
    assert {"arch", "seed", "steps", "seconds", "peak_memory_mib", "accuracy", "memorized_at", "grokked_at", "edits"} <= results.keys()
    assert results["accuracy"].keys() == {"one_hop", "train", "id", "ood", "ood_first", "ood_second"}
    assert len(results["edits"]) == 2 * 5 + 1                # passes; ROME and row with two targets, MEMIT one; near once
    assert [e["near"] for e in results["edits"]].count(True) == 1 and results["edits"][2]["near"]
    for entry in results["edits"]:
        assert {"method", "target", "site", "pass", "n", "direct", "hop1", "hop2", "probes_hop1", "probes_hop2",
                "unrelated_one_hop_moved", "unrelated_two_hop_moved"} <= entry.keys()
        assert entry["n"] == 4 and entry["site"] == "memory.values"
        assert (entry["hop1"] is None) == (entry["probes_hop1"] == 0)
    log = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in log] == [10, 20]
    config = json.loads((finished / "config.json").read_text())
    assert config["environment"]["device"] == "cpu" and config["stages"]["edit"] and config["stages"]["n_edits"] == 4
    assert sorted(f.name for f in finished.iterdir()) == ["ckpt.pt", "config.json",
                                                          "log.jsonl", "results.json"]

def test_a_run_is_repeatable_and_resumes_bit_for_bit(finished, tmp_path):
    assert run_main(*TINY, "--out", tmp_path / "again") == 0
    assert same_weights(weights(finished), weights(tmp_path / "again"))
    draw, calls = minedit.Batches.draw, []
    def interrupted(self):
        calls.append(1)
        if len(calls) == 15:
            raise KeyboardInterrupt
        return draw(self)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(minedit.Batches, "draw", interrupted)
        assert run_main(*TINY, "--out", tmp_path / "b") == 130
    assert weights(tmp_path / "b")["step"] == 10
    assert run_main(*TINY, "--out", tmp_path / "b") == 2, "an unfinished run wants --resume"
    assert run_main(*TINY, "--out", tmp_path / "b", "--resume") == 0
    assert same_weights(weights(finished), weights(tmp_path / "b"))
    steps = [json.loads(line)["step"] for line in (tmp_path / "b" / "log.jsonl").read_text().splitlines()]
    assert steps == [10, 20]

def test_a_killed_run_resumes_bit_for_bit(tmp_path):
    size = [*TINY, "--steps", "300"]
    command = [sys.executable, "minedit.py", *size, "--out", str(tmp_path / "killed")]
    process = subprocess.Popen(command, cwd=HERE, stdout=subprocess.DEVNULL)
    while not (tmp_path / "killed" / "ckpt.pt").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()                                           # kill -9
    process.wait()
    assert weights(tmp_path / "killed")["step"] < 300
    for folder, more in ("killed", ["--resume"]), ("whole", []):     # one process each: equal numbers of threads
        subprocess.run([sys.executable, "minedit.py", *size, "--out", str(tmp_path / folder), *more], cwd=HERE, check=True,
                       stdout=subprocess.DEVNULL)
    assert same_weights(weights(tmp_path / "killed"), weights(tmp_path / "whole"))

def test_a_finished_run_is_loaded_and_keeps_its_stages(finished, tmp_path, capsys, monkeypatch):
    before = weights(finished)
    monkeypatch.setattr(minedit.Batches, "draw", lambda self: pytest.fail("trained again"))
    assert run_main(*TINY, "--out", finished) == 0
    assert "loaded" in capsys.readouterr().out and same_weights(before, weights(finished))
    assert "edits" in json.loads((finished / "results.json").read_text())

def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, capsys, monkeypatch):
    loss_of, calls = minedit.loss_of, []
    def bad_loss(*arguments):
        calls.append(1)
        return loss_of(*arguments) * (float("nan") if len(calls) > 12 else 1)
    monkeypatch.setattr(minedit, "loss_of", bad_loss)
    assert run_main(*TINY, "--out", tmp_path / "c") == 1
    error = capsys.readouterr().err
    assert "not finite at step 20" in error and "holds step 10" in error and error.count("\n") == 1
    state = weights(tmp_path / "c")
    assert state["step"] == 10 and all(value.isfinite().all() for value in state["average"].values())

def test_weights_that_are_not_finite_are_not_kept(tmp_path, monkeypatch):
    step, calls = minedit.Muon.step, []
    def bad_step(self):
        step(self)
        calls.append(1)
        if len(calls) == 20:                                 # the last step before an evaluation: its loss is still finite
            self.param_groups[0]["params"][0][0, 0] = float("inf")
    monkeypatch.setattr(minedit.Muon, "step", torch.no_grad()(bad_step))
    assert run_main(*TINY, "--out", tmp_path / "c") == 1
    assert weights(tmp_path / "c")["step"] == 10

def test_training_learns(tmp_path):
    arguments = ["--entities", "12", "--relations", "4", "--d-model", "32", "--slots", "128", "--top-k", "8", "--depth", "2",
                 "--steps", "150", "--eval-every", "50", "--warmup", "20", "--device", "cpu"]
    assert run_main(*arguments, "--out", tmp_path / "d") == 0
    accuracy = json.loads((tmp_path / "d" / "results.json").read_text())["accuracy"]
    assert accuracy["one_hop"] >= 0.95 and accuracy["train"] >= 0.9, accuracy

# --- minedit.py: command line -----------------------------------------------------------------------------------------

def refused(capsys, *arguments):
    """The command ends with status 2 and one line on stderr, which is returned."""
    try:
        status = run_main(*arguments)
    except SystemExit as stop:
        status = stop.code
    error = capsys.readouterr().err
    assert status == 2 and error.count("\n") == 1 and error.startswith("minedit: "), (status, error)
    return error

@pytest.mark.parametrize("arguments, words", [
    (["--arch", "sparse"], ["sparse", "lmc"]), (["--entities", "0"], ["0 entities"]), (["--relations", "-3"], ["-3 relations"]),
    (["--d-model", "30", "--n-heads", "4"], ["30", "4"]), (["--steps", "0"], ["steps", "0"]), (["--batch", "-1"], ["batch", "-1"]),
    (["--triples", "nowhere.tsv"], ["nowhere.tsv"]), (["--edi"], ["--edi"]), (["--seeds", "0"], ["--seeds"]), (["--seed", str(2**63)], ["--seed"]),
    (["--entities", "10000000000"], ["memory"]), (["--lr", "-1"], ["lr"]),
    (["--edit-fact", "e0", "r0", "nobody"], ["nobody", "e0"]), (["--edit-fact", "e0", "r99", "e1"], ["r99"]),
    (["--device", "cuda"], ["cuda"]), (["--out", "/dev/null/x"], ["/dev/null/x"]), (["--ood-fraction", "1.5"], ["1.5"]),
    (["--resume", "--retrain"], ["--resume", "--retrain"]), (["--report", "/nonexistent"], ["/nonexistent"])])
def test_bad_input_is_one_line(capsys, tmp_path, arguments, words):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    out = [] if "--out" in arguments else ["--out", tmp_path / "x"]
    error = refused(capsys, *out, *arguments)
    assert all(word in error for word in words)
    assert not (tmp_path / "x" / "ckpt.pt").exists()

def test_a_run_folder_is_protected(finished, tmp_path, capsys):
    before = {file.name: file.read_bytes() for file in finished.iterdir()}
    error = refused(capsys, *TINY, "--out", finished, "--steps", "30", "--seed", "1")
    assert "recipe.steps (20 there, 30 asked)" in error and "seed (0 there, 1 asked)" in error
    refused(capsys, *TINY, "--out", finished, "--arch", "dense")
    assert before == {file.name: file.read_bytes() for file in finished.iterdir()}
    foreign = tmp_path / "home"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("...")
    assert "not a run folder" in refused(capsys, *TINY, "--out", foreign, "--retrain")
    assert [file.name for file in foreign.iterdir()] == ["thesis.tex"]

@pytest.mark.parametrize("content", [b"", b"not a checkpoint", "truncated", "foreign", "object", "older"])
def test_a_bad_checkpoint_is_refused_and_kept(finished, tmp_path, capsys, content):
    import shutil
    folder = tmp_path / "e"
    shutil.copytree(finished, folder)
    whole = (folder / "ckpt.pt").read_bytes()
    if content == "truncated":
        content = whole[:len(whole) // 2]
    if isinstance(content, bytes):
        (folder / "ckpt.pt").write_bytes(content)
    elif content == "older":                                     # kept no weights of earlier moments
        torch.save({key: x for key, x in weights(folder).items() if key != "moments"}, folder / "ckpt.pt")
    else:
        torch.save({"average": {"w": torch.ones(2)}} if content == "foreign" else nn.Linear(2, 2), folder / "ckpt.pt")
    before = (folder / "ckpt.pt").read_bytes()
    assert "ckpt.pt" in refused(capsys, *TINY, "--out", folder, "--edit")
    assert (folder / "ckpt.pt").read_bytes() == before

def test_the_checkpoint_of_another_seed_is_refused(finished, tmp_path, capsys):
    import shutil
    assert run_main(*TINY, "--seed", "1", "--out", tmp_path / "h") == 0
    capsys.readouterr()
    shutil.copy(finished / "ckpt.pt", tmp_path / "h" / "ckpt.pt")
    assert "other settings" in refused(capsys, *TINY, "--seed", "1", "--out", tmp_path / "h")

@pytest.mark.parametrize("damage", ["model", "average", "adam", "muon", "generator", "history", "shape"])
def test_a_checkpoint_with_a_damaged_part_is_refused(finished, tmp_path, capsys, damage):
    import shutil
    shutil.copytree(finished, tmp_path / "i")
    state = weights(finished)
    if damage == "shape":
        state["muon"]["state"][0]["momentum"] = torch.ones(3, 3)
    else:
        state[damage] = {} if damage == "history" else None
    torch.save(state, tmp_path / "i" / "ckpt.pt")
    assert "not a checkpoint" in refused(capsys, *TINY, "--out", tmp_path / "i", "--resume")

def test_a_run_goes_on_on_another_kind_of_device(finished, tmp_path):
    """As far as a CPU can show it: the random state of the other device is not asked for."""
    run, = minedit.prepare(minedit.build_parser().parse_args([*TINY, "--out", str(tmp_path / "j")]))
    state = weights(finished) | {"device": "cuda", "generator": torch.zeros(16, dtype=torch.uint8)}
    torch.save(state, tmp_path / "j" / "ckpt.pt")
    run.load_checkpoint(tmp_path / "j" / "ckpt.pt")
    assert torch.equal(run.parts["generator"].get_state(), run.fresh()["generator"].get_state())
    assert torch.equal(run.parts["average"].embedding.weight, state["average"]["embedding.weight"])

def test_retrain_replaces_a_run_only_when_it_has_something_better(finished, tmp_path, capsys, monkeypatch):
    import shutil
    shutil.copytree(finished, tmp_path / "k")
    before = {file.name: file.read_bytes() for file in (tmp_path / "k").iterdir()}
    def interrupted(self):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(minedit.Batches, "draw", interrupted)
        assert run_main(*TINY, "--steps", "30", "--out", tmp_path / "k", "--retrain") == 130
    assert before == {file.name: file.read_bytes() for file in (tmp_path / "k").iterdir()}
    capsys.readouterr()
    assert run_main(*TINY, "--steps", "30", "--out", tmp_path / "k", "--retrain") == 0
    assert weights(tmp_path / "k")["step"] == 30 and "edits" not in json.loads((tmp_path / "k" / "results.json").read_text())
    (tmp_path / "k" / "config.json").write_text('{"name": "another program"}')
    assert "not the configuration of a run" in refused(capsys, *TINY, "--out", tmp_path / "k", "--retrain")

def test_results_without_a_checkpoint_are_kept(finished, tmp_path, capsys):
    import shutil
    shutil.copytree(finished, tmp_path / "g")
    (tmp_path / "g" / "ckpt.pt").unlink()
    assert "no ckpt.pt" in refused(capsys, *TINY, "--out", tmp_path / "g", "--resume")
    assert (tmp_path / "g" / "results.json").read_bytes() == (finished / "results.json").read_bytes()
    (tmp_path / "g" / "results.json").write_text('{"config": {"a": 1}}')
    assert "not the results of a run" in refused(capsys, "--report", tmp_path)

def test_edit_fact_by_name(finished, capsys):
    facts = kg.synthetic(10, 4, seed=0).facts
    new = (int(facts[3, 1]) + 1) % 10
    assert run_main(*TINY, "--out", finished, "--edit-fact", "e3", "r1", f"e{new}") == 0
    out = capsys.readouterr().out
    assert "ROME at memory.values, pass 0" in out and "e3 r1" in out and "first hop" in out and "second hop" in out

def test_mass_edits_count_every_request(tmp_path, capsys):
    arguments = [*TINY[4:], "--entities", "20", "--relations", "4", "--branches", "0", "--aliases", "--steps", "300", "--slots", "64"]
    assert run_main(*arguments, "--mass-edit", "--retrain", "--out", tmp_path / "m") == 0
    mass = json.loads((tmp_path / "m" / "results.json").read_text())["mass"]
    assert {e["n"] for e in mass["edits"]} == {1, 3, 10, 32, 40} and mass["facts"] == 80
    assert {e["method"] for e in mass["edits"]} == {"memit", "emmet", "rome", "alphaedit", "finetune"}
    for e in mass["edits"]:
        if "infeasible" not in e:
            for name in "efficacy", "paraphrase":
                assert e[name] * e["n"] == pytest.approx(round(e[name] * e["n"]), abs=1e-6), "a request was dropped"
            shares = [e["efficacy"], e["paraphrase"], e["specificity"]]
            assert e["score"] == pytest.approx(0 if min(shares) == 0 else 300 / sum(1 / s for s in shares), abs=1e-5)
        if e["method"] in ("memit", "emmet") and "infeasible" not in e and e["n"] > 1:
            assert e["residual_left"] == pytest.approx(e["residual_predicted"], abs=1e-4)
    assert "harmonic" in capsys.readouterr().out and not mass["layers"]
    assert run_main("--report", tmp_path / "m") == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    turned = lines[next(i for i, line in enumerate(lines) if line[:3] == ["arch", "at", "strength"]) + 2:]
    for row, entry in ((row, e) for row in turned[:6] for e in mass["edits"] if e["n"] == 10):
        if row[1:3] == [entry["method"] + ",", entry["target"]]:
            assert float(row[5]) == pytest.approx(entry["score"], rel=0.01, abs=0.001) and float(row[3]) == pytest.approx(entry["strength"])
            found = entry
    assert found["n"] == 10 and len({tuple(row[1:3]) for row in turned[:6]}) == 6, "method and target a row, number of edits a column"
    assert run_main(*arguments, "--arch", "dense", "--mass-edit", "--retrain", "--out", tmp_path / "m") == 0
    layers = json.loads((tmp_path / "m" / "results.json").read_text())["mass"]["layers"]
    assert [e["blocks"] for e in layers] == ["0-0", "0-1", "1-1"] and all(e["n"] == 40 for e in layers)
    assert max(e["efficacy"] for e in layers) > 0

def test_a_model_that_knows_nothing_and_few_facts_are_reported(tmp_path, capsys):
    tiny = [*TINY[4:], "--entities", "4", "--relations", "2", "--steps", "1", "--lr", "0", "--muon-lr", "0", "--warmup", "0"]
    assert run_main(*tiny, "--arch", "lmc", "--edit", "--mass-edit", "--branches", "1", "--out", tmp_path / "n") == 0
    assert "too few for mass edits" in capsys.readouterr().out

def test_every_cell_runs_and_reports(tmp_path, capsys):
    assert run_main(*TINY, "--arch", "all", "--edit", "--out", tmp_path / "all") == 0
    out = capsys.readouterr().out
    for arch in ARCHS:
        assert (tmp_path / "all" / f"{arch}-seed0" / "results.json").exists()
        assert f"\n{arch}, seed 0" in out
    tables = [block for block in out.split("\n\n") if block.startswith("arch") and " far\n" in block]
    assert len(tables) == len(ARCHS) + 1 and all(len(line) <= 100 for block in tables for line in block.splitlines())
    assert out.count("\nasked: ") == len(ARCHS)
    results = {arch: json.loads((tmp_path / "all" / f"{arch}-seed0" / "results.json").read_text()) for arch in ARCHS}
    assert {e["site"] for e in results["dense"]["edits"]} == {"blocks.0.feed_forward.down", "blocks.1.feed_forward.down"}
    for arch in ARCHS:
        for e in results[arch]["edits"]:
            assert 0 <= e["probes_hop1_shared"] <= e["probes_hop1"] and 0 <= e["probes_hop2_shared"] <= e["probes_hop2"]
    assert run_main("--report", tmp_path / "all") == 0
    assert capsys.readouterr().out.count("dense+mem") > 4

def test_mann_whitney_against_a_permutation_test_by_hand():
    assert minedit.mann_whitney([6, 7, 8, 9, 10], [1, 2, 3, 4, 5]) == pytest.approx(2 / 252)     # the papers' 0.008
    assert minedit.mann_whitney([1.0, 1.0], [1.0, 1.0]) == 1
    assert minedit.mann_whitney(range(16), range(16, 32)) == pytest.approx(2 / math.comb(32, 16)), "counted, not listed"
    # by hand, 2 v 2 with a tie: ranks 1, 2.5 | 2.5, 4; rank sums of the six divisions 3.5 3.5 5 5 6.5 6.5, expected 5
    assert minedit.mann_whitney([1, 2], [2, 3]) == pytest.approx(4 / 6)
    x, y = [0.3, 0.1, 0.9], [0.2, 0.5, 0.4, 0.8]
    # ranks 1 3 7 of 7 sum to 11, expected 12; five of the 35 divisions sum to 12: 147 156 237 246 345
    assert minedit.mann_whitney(x, y) == minedit.mann_whitney(y, x) == pytest.approx(30 / 35)

def test_blocks_per_pass_and_a_feed_forward_beside_the_memory():
    config = Config(loop=True, memory=True, feed_forward=True, blocks=2, depth=2)
    assert minedit.edit_sites(config) == [
        ("memory.values", 0, 0), ("blocks.0.feed_forward.down", 0, 0), ("memory.values", 1, 0), ("blocks.1.feed_forward.down", 0, 0),
        ("memory.values", 2, 1), ("blocks.0.feed_forward.down", 1, 1), ("memory.values", 3, 1), ("blocks.1.feed_forward.down", 1, 1)]
    dense = Config(loop=False, memory=False, depth=3)
    assert minedit.edit_sites(dense) == [(f"blocks.{i}.feed_forward.down", 0, i) for i in range(3)]

def test_a_sparse_graph_of_triples_runs_to_a_report(tmp_path, capsys):
    """Few facts continue, one relation has one tail, no OOD composition is left."""
    file = tmp_path / "cities.tsv"
    file.write_text("".join(f"city{i}\tcapital of\tland{i}\nland{i}\tin\tEurope\n" for i in range(12)))
    assert run_main(*TINY[4:], "--triples", file, "--edit", "--out", tmp_path / "f") == 0
    results = json.loads((tmp_path / "f" / "results.json").read_text())
    out = capsys.readouterr().out
    assert results["n_paths"]["ood"] == 0 and results["accuracy"]["ood"] is None and results["grokked_at"] is None
    assert "cannot be edited" in out and "no other known fact" in out
    assert all(e["gradient_for_want_of_a_prototype"] == 4 for e in results["edits"] if e["target"] == "prototype")

# --- edit.py: locate, and when it is written --------------------------------------------------------------------------

@pytest.fixture(params=[(arch, {}) for arch in ARCHS] + [("lmc", {"blocks": 2, "feed_forward": True})], ids=lambda p: p[0] + "+" * len(p[1]))
def two_runs(request):
    """A model, (part, module, call) of its states, and two batches of prompts that differ in the last token alone."""
    model = tiny_model(request.param[0], **request.param[1])
    clean = torch.randint(10, (6, 3), generator=generator())
    return model, [state[1:] for state in minedit.traced_states(model.config)], clean, (clean + torch.tensor([0, 0, 3])) % 10

def exchanged(model, tokens, other, states):
    """Logits of a run in which each (name, call, token) of `states` is that of the run on the tokens `other`."""
    values = [editing.at_call(model, name, call, other)[1][:, t] for name, call, t in states]
    with contextlib.ExitStack() as stack:
        for state, value in zip(states, values):
            stack.enter_context(editing.interchange(model, *state, value))
        return model(tokens)

def hooked(model, module, tokens, call, change):
    """The slow reference: logits of a run in which the call of a module returns change(input, output)."""
    outputs = []
    def hook(_, inputs, output):
        outputs.append(change(inputs[0], output) if len(outputs) == call else output)
        return outputs[-1]
    handle = module.register_forward_hook(hook)
    logits = model(tokens)
    handle.remove()
    return logits

def test_interchange_with_itself_and_of_everything(two_runs):
    model, states, one, _ = two_runs
    other = (one + torch.tensor([3, 1, 5])) % 10
    mine, theirs = model(one), model(other)
    for name in {name for _, name, _ in states}:             # every call of every module, once
        calls = len(record(model, model.get_submodule(name), one)[0])
        assert sorted(call for _, module, call in states if module == name) == list(range(calls))
    for part, name, call in states:
        tokens = [(name, call, t) for t in range(3)]
        close(exchanged(model, one, one, tokens), mine, 1e-13)
        swapped = exchanged(model, one, other, tokens)
        if part == "stream":                                 # it determines all that follows
            close(swapped, theirs, 1e-13)
        else:
            assert (swapped - mine).abs().max() > 1e-6 and (swapped - theirs).abs().max() > 1e-6
    close(exchanged(model, one, other, [(name, call, t) for _, name, call in states for t in range(3)]), theirs, 1e-13)
    assert torch.equal(model(one), mine), "a hook was left behind"

def test_tracing_finds_the_state_that_carries_the_answer(two_runs):
    """The two runs differ at the last token alone, so that the stream there carries the answer and no earlier state does."""
    model, states, clean, corrupted = two_runs
    answer = model(clean)[:, -1].argmax(-1)
    measures = lambda logits: ((logits[:, -1].argmax(-1) == answer).double().mean(),
                               logits[:, -1].softmax(-1)[torch.arange(6), answer].mean())
    top1, rise = editing.trace(model, clean, corrupted, answer, [state[1:] for state in states])
    before = measures(model(corrupted))
    assert before[0] < 1 and rise[:, :2].abs().max() < 1e-15 and (top1[:, :2] == before[0]).all()
    for i, (part, name, call) in enumerate(states):
        value = editing.at_call(model, name, call, clean)[1]
        put = lambda _, output: torch.stack([output[:, 0], output[:, 1], value[:, 2]], 1)
        by_hand = measures(hooked(model, model.get_submodule(name), corrupted, call, put))
        for expected in [by_hand] + [measures(model(clean))] * (part == "stream"):
            assert top1[i, 2] == expected[0] and abs(rise[i, 2] - (expected[1] - before[1])) < 1e-14
        assert rise[i, 2] != 0
    with pytest.raises(ValueError, match="no call 9"):
        editing.trace(model, clean, corrupted, answer, [("blocks.0", 9)])
    with pytest.raises(ValueError, match=r"\[5, 3\]"):
        editing.trace(model, clean, corrupted[:5], answer, [("blocks.0", 0)])

@pytest.mark.parametrize("arch, name", [("lmc", "memory.values"), ("dense+mem", "memory.values"), ("loop", "blocks.0.feed_forward.down")])
def test_an_edit_can_act_at_some_calls(arch, name):
    model, tokens = tiny_model(arch), torch.randint(10, (6, 3), generator=generator())
    layer = model.get_submodule(name)
    u, r = normal(6, layer.in_features), normal(6, layer.out_features, seed=1)
    edited = layer.weight + r[:, :, None] * u[:, None]                           # [batch, d_out, d_in]
    def acting(*several):
        with contextlib.ExitStack() as stack:
            for calls in several:
                stack.enter_context(editing.rank_one(layer, u, r, calls))
            return model(tokens)
    whole = acting(None)
    assert torch.equal(acting(range(3)), whole) and torch.equal(acting([]), model(tokens))
    everyone = torch.arange(6)
    at, probes = editing.Site(name, 0, layer, *3 * [u]), editing.Probes(everyone, tokens, everyone)
    assert torch.equal(editing.answers(model, at, u, r, probes, 4, [1]), acting([1])[:, -1].argmax(-1))
    close(acting([0], [1], [2]), whole)                      # one by one, and as a change of the weights
    for i in range(6):
        with edit(model, {name: torch.outer(r[i], u[i])}):
            close(acting([], [])[i], whole[i])
    for t in range(3):
        only = hooked(model, layer, tokens, t, lambda key, _: key @ edited.mT)
        close(acting([t]), only)
        close(acting(range(t, 3)), acting(*([s] for s in range(t, 3))))
        assert (only - whole).abs().max() > 1e-6, "the other calls matter"

def test_holding_a_subspace_at_its_old_value(world):
    model, paths, requests, at = world
    u, r, tokens = editing.direction("rome", at, requests), 9 * normal(4, 16, seed=3), paths.tokens[[3, 9, 20, 40]]
    probes = editing.Probes(torch.tensor([0, 1, 2, 3]), tokens, model(tokens)[:, -1].argmax(-1))
    edited = editing.answers(model, at, u, r, probes)
    assert (edited != probes.answer).sum() >= 3, "the edit changes answers"
    hold = lambda call, token, basis: editing.answers(model, at, u, r, probes, 3, held=("blocks.0", call, token, basis))
    nothing, everything = torch.zeros(4, 16, 0).double(), torch.eye(16).double().expand(4, 16, 16)
    for call in range(3):
        assert torch.equal(hold(call, 2, nothing), edited) and torch.equal(hold(call, 2, 0 * everything), edited)
    assert torch.equal(hold(2, 2, everything), probes.answer), "the last state of the run without the edit"
    assert torch.equal(hold(2, 1, everything), edited), "a state that nothing reads"
    E = model.embedding.weight
    a, b = E[requests.old], E[requests.new]
    B, other = editing.span(a, b), normal(4, 16, seed=4)
    close(B.mT @ B, torch.eye(2).double().expand(4, 2, 2), 1e-12)
    old = editing.at_call(model, "blocks.0", 1, tokens)[1]
    with editing.interchange(model, "blocks.0", 1, 1, other, B):
        new = editing.at_call(model, "blocks.0", 1, tokens)[1]
    for vector in a, b:                                      # as in the other run in the plane, as before across it
        close((new[:, 1] * vector).sum(-1), (other * vector).sum(-1), 1e-10)
    assert ((new - old)[0, 1] @ torch.linalg.svd(B[0].mT).Vh[2:].T).abs().max() < 1e-12 and (new == old)[:, [0, 2]].all()

# --- minedit.py: the stages of these -----------------------------------------------------------------------------------

def test_corruptions_change_one_token_and_the_answer():
    paths = kg.split(kg.synthetic(10, 4, seed=5, out_degree=3), 0.1, 0.8, seed=5)
    tokens, answers = paths.tokens, paths.two_hop
    for place in range(3):
        clean, other = minedit.corruptions(tokens, answers, place, 30, generator())
        assert len(clean) == 30 == len(clean.unique())
        assert ((tokens[clean] != tokens[other]) == (torch.arange(3) == place)).all()
        assert (answers[clean] != answers[other]).all()
    assert len(minedit.corruptions(tokens[:1], answers[:1], 0, 30, generator())[0]) == 0
    assert len(minedit.corruptions(tokens, 0 * answers, 0, 30, generator())[0]) == 0

def test_the_a_priori_site_is_fixed_without_the_facts_that_are_edited(world, monkeypatch):
    model, paths, requests, _ = world
    known, trace = torch.ones(len(paths.facts), dtype=torch.bool), editing.trace
    def run(**sizes):
        return type("Run", (), {"config": Config(10, 4, depth=3, **sizes), "paths": paths, "results": {}, "stream": generator})
    def watched(model, clean, corrupted, answer, sites):
        for query in requests.tokens:
            assert not (clean == query).all(1).any() and not (corrupted == query).all(1).any(), "an edited fact was used"
        top1, rise = trace(model, clean, corrupted, answer, sites)
        rise[1, 0], rise[:, 1] = 9, torch.tensor([0.1, 0.3, 0.2])                # the last token counts
        return top1, rise
    assert minedit.a_priori_site(run(feed_forward=True), None, requests, known) == ("memory.values", 0, 0)
    assert minedit.a_priori_site(run(memory=False), None, requests, known) == ("blocks.0.feed_forward.down", 0, 0)
    monkeypatch.setattr(editing, "trace", watched)
    dense = run(memory=False, loop=False)
    assert minedit.a_priori_site(dense, tiny_model("dense"), requests, known) == ("blocks.1.feed_forward.down", 0, 1)
    assert dense.results["a_priori"]["effects"] == pytest.approx([0.1, 0.3, 0.2]) and dense.results["a_priori"]["n"] > 10
    known[:] = False
    assert minedit.a_priori_site(dense, tiny_model("dense"), requests, known) == ("blocks.0.feed_forward.down", 0, 0)
    assert dense.results["a_priori"]["effects"] is None

def run_stages(capsys, *arguments):
    """results.json of a run with --locate and --when; no NaN in it, no line printed over 100 columns."""
    folder = arguments[-1]
    assert run_main(*arguments, "--locate", "--when") == 0
    out = capsys.readouterr().out
    assert all(len(line) <= 100 for line in out[out.index("causal tracing"):].splitlines())
    return json.loads((folder / "results.json").read_text(), parse_constant=lambda name: pytest.fail(name))

@pytest.mark.parametrize("arch, more", [(arch, []) for arch in ARCHS] + [("dense", ["--blocks", "2"]), ("lmc", ["--blocks", "2", "--feed-forward"])])
def test_locate_and_when(tmp_path, capsys, monkeypatch, arch, more):
    acted, counted, answers, share_of = [], [], editing.answers, minedit.share_of
    def watched_answers(*arguments, calls=None, held=None):
        acted.append(calls and list(calls))
        return answers(*arguments, calls=calls, held=held)
    def watched_share(hit):
        counted.append(len(hit))
        return share_of(hit)
    monkeypatch.setattr(editing, "answers", watched_answers)
    monkeypatch.setattr(minedit, "share_of", watched_share)
    edits = ["--edit"] if not more and arch in ("dense", "lmc") else []
    results = run_stages(capsys, *TINY, "--arch", arch, *more, "--steps", "150", *edits, "--out", tmp_path / "x")
    del counted[:6 * 15]                                     # six shares in each evaluation of the training
    n_blocks, n_parts = (4 if more else 2), (4 if "--feed-forward" in more else 3)
    n_states = n_blocks * n_parts
    assert len(results["locate"]["states"]) == n_states
    assert [(e["query"], e["corrupted"]) for e in results["locate"]["effects"]] == \
        [("fact", "h"), ("fact", "r1"), ("composition", "h"), ("composition", "r1"), ("composition", "r2")]
    for effect in results["locate"]["effects"]:
        assert effect["n"] > 0 and len(effect["top1"]) == len(effect["rise"]) == n_states
        assert effect["top1"][-1][-1] == 1 and all(x == 0 for row in effect["top1"] for x in row[:("h", "r1", "r2").index(effect["corrupted"])])
    site, written = results["a_priori"], results["when"]["written"]
    n_calls = 1 if arch == "dense" else n_blocks             # of the layer
    labels = [f"from call {t}" for t in range(1, n_calls)] + [f"only call {t}" for t in range(n_calls)]
    calls = [list(range(t, n_calls)) for t in range(1, n_calls)] + [[t] for t in range(n_calls)]
    first = [w for w in written if (w["site"], w["call"]) == (site["site"], site["call"])]
    assert first == written[:len(first)] and [w["acts"] for w in first] == ["always"] + labels * (n_calls > 1)
    assert counted[:3 * len(first)] == len(first) * counted[:3], "the rows of an edit are about the same questions"
    right = [round(n * (share or 0)) for n, share in zip(counted, (first[0][key] for key in ("direct", "hop1", "hop2")))]
    assert counted[3 * len(first):][:6] == [n for n in right for _ in "ab"], "held: those that the edit gets right"
    if not edits:
        assert acted[:3 * len(first):3] == [None] + calls * (n_calls > 1)
    held, last = results["when"]["held"], results["locate"]["states"][-1]
    assert [e["after"] for e in held] == [0, 1] and [held[-1][k] for k in ("module", "call")] == [last[k] for k in ("module", "call")]
    assert held[-1]["direct"] in (0, None), "the plane of both answers is what the model reads last"
    for e in results.get("edits", []):
        if (e["method"], e["target"], e["site"], e["pass"]) == ("rome", "prototype", site["site"], site["pass"]):
            assert all(written[0][key] == e[key] for key in ("direct", "hop1", "hop2")), "it is the edit of --edit"

def test_locate_and_when_where_there_is_nothing_to_ask(tmp_path, capsys):
    file = tmp_path / "cities.tsv"
    file.write_text("".join(f"city{i}\tcapital of\tland{i}\nland{i}\tin\tEurope\n" for i in range(12)))
    results = run_stages(capsys, *TINY[4:], "--triples", file, "--out", tmp_path / "x")
    assert results["when"]["written"][0]["hop1"] is None and results["when"]["held"][0]["hop2_random"] is None
    assert results["locate"]["effects"][2] == {"query": "composition", "corrupted": "h", "n": 0, "top1": None, "rise": None}
    file.write_text("a\tr\tb\nb\ts\tc\n")                    # no fact can be edited: no other tail
    results = run_stages(capsys, *TINY[4:], "--triples", file, "--ood-fraction", "0", "--train-fraction", "1", "--out", tmp_path / "y")
    assert results["when"]["probes"]["direct"] == 0 and results["when"]["written"][0]["direct"] is None

# --- curvature.py -----------------------------------------------------------------------------------------------------

class Tap(nn.Module):
    """Stands in for a linear layer and keeps every input and, with its gradient, every output."""
    def __init__(self, layer):
        super().__init__()
        self.layer, self.seen = layer, []

    def forward(self, x):
        z = sum(x[..., j, None] * self.layer.weight[:, j] for j in range(x.shape[-1]))
        z = z if self.layer.bias is None else z + self.layer.bias
        self.seen.append((x.detach().clone(), z.requires_grad_()))
        z.retain_grad()
        return z.clone()

def slow_pairs(model, batches, name, labels="gold", seed=0, positions="all"):
    """(a, g) of every position, one example at a time, by the gradient of the sum of -log p(label)."""
    model = copy.deepcopy(model).eval()
    tap, draw, pairs = Tap(model.get_submodule(name)), generator(seed), []
    for inputs, targets in batches:
        labels_now = targets.clone()
        if labels == "sampled":
            p = model(inputs).detach().softmax(-1)[targets != -100]
            labels_now[targets != -100] = torch.multinomial(p, 1, generator=draw)[:, 0]
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, tap)
        for x, y in zip(inputs, labels_now):
            tap.seen = []
            log_p = model(x[None])[0].log_softmax(-1).view(y.numel(), -1)
            terms = [-log_p[i, label] for i, label in enumerate(y.flatten().tolist()) if label >= 0]
            if terms:
                sum(terms).backward()
            for a, z in tap.seen:
                g = torch.zeros_like(z) if z.grad is None else z.grad
                rows = zip(a[0].reshape(y.numel(), -1, a.shape[-1]), g[0].reshape(y.numel(), -1, g.shape[-1]), y.flatten())
                pairs += [pair for a, g, t in rows if positions == "all" or t >= 0 for pair in zip(a, g)]
        setattr(model.get_submodule(parent), leaf, tap.layer)
    return pairs

def slow_factors(*arguments, **more):
    pairs = slow_pairs(*arguments, **more)
    return sum(torch.outer(a, a) for a, _ in pairs) / len(pairs), sum(torch.outer(g, g) for _, g in pairs) / len(pairs)

def paths_batches(dropped=True):
    """Two batches of different size; with `dropped` the first token never counts, the last one at times."""
    tokens, targets = torch.randint(14, (7, 3), generator=generator(1)), torch.randint(10, (7, 3), generator=generator(2))
    if dropped:
        targets[:, 0] = targets[2, 2] = targets[4] = -100
    return [(tokens[:5], targets[:5]), (tokens[5:], targets[5:])]

def images():
    return [(normal(4, 5, 6, seed=s), torch.randint(3, (4,), generator=generator(s))) for s in (1, 2)]

class Foreign(nn.Module):
    """Patches, a bias, an in-place activation, an input that is overwritten, dropout, a layer called twice, mean pooling."""
    def __init__(self):
        super().__init__()
        draw = generator(5)
        self.up, self.loop, self.head = nn.Linear(6, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 3)
        self.relu, self.dropout, self.norm, self.spare = nn.ReLU(inplace=True), nn.Dropout(0.5), nn.BatchNorm1d(5), nn.Linear(2, 2)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=draw, dtype=torch.float64)
        self.double().requires_grad_(False)

    def forward(self, x):
        h = self.dropout(self.norm(self.relu(self.up(x))))
        for _ in range(2):
            h += 0.3 * self.loop(h)
        return self.head(h.mean(1))

@pytest.mark.parametrize("labels", ["sampled", "gold"])
@pytest.mark.parametrize("arch, name", [
    ("dense", "blocks.1.feed_forward.up"), ("dense", "blocks.0.feed_forward.down"), ("loop", "blocks.0.feed_forward.up"),
    ("loop", "blocks.0.feed_forward.down"), ("loop", "blocks.0.attention.value"), ("dense+mem", "memory.keys"), ("lmc", "memory.values")])
def test_factors_against_one_example_at_a_time(arch, name, labels):
    model = tiny_model(arch)
    for batches, positions in (paths_batches(), "all"), (paths_batches(), "counted"), (paths_batches(False), "counted"):
        (A, G), = kronecker_factors(model, batches, F.cross_entropy, [name], labels, generator(3), positions=positions).values()
        slow = slow_factors(model, batches, name, labels, 3, positions)
        close(A, slow[0], 1e-12)
        close(G, slow[1], 1e-12)
    first, last = (f(model, batches, F.cross_entropy, [name], "gold")[name] for f in
                   (kronecker_factors, lambda *a: kronecker_factors(*a, positions="all")))
    assert all(map(torch.equal, first, last)), "where every target counts every row does"

@pytest.mark.parametrize("labels", ["sampled", "gold"])
def test_factors_of_a_foreign_model(labels):
    model, batches = Foreign().train(), images()
    batches[0][1][2] = -100
    for positions in "all", "counted":
        factors = kronecker_factors(model, batches, F.cross_entropy, ["up", "loop"], labels, generator(4), positions=positions)
        assert list(factors) == ["up", "loop"]
        for name, pair in factors.items():
            for got, want in zip(pair, slow_factors(model, batches, name, labels, 4, positions)):
                close(got, want, 1e-12)
    plain = nn.Sequential(nn.Linear(6, 4), nn.ReLU(inplace=True), nn.Linear(4, 3)).double()
    flat = [(x[:, 0], y) for x, y in images()]
    for name, pair in kronecker_factors(plain, flat, F.cross_entropy, ["0", "2"], "gold").items():
        for got, want in zip(pair, slow_factors(plain, flat, name)):
            close(got, want, 1e-12)

def test_how_the_positions_are_batched_and_typed_does_not_matter():
    model, batches, name = tiny_model("loop"), paths_batches(), "blocks.0.feed_forward.down"
    A, G = kronecker_factors(model, batches, F.cross_entropy, [name], "gold")[name]
    joined = [tuple(torch.cat(parts) for parts in zip(*batches))]
    singly = [(x[None], y[None]) for x, y in zip(*joined[0])]           # one of them has no target that counts
    for other in joined, singly, iter(batches):
        for got, want in zip(kronecker_factors(model, other, F.cross_entropy, [name], "gold")[name], (A, G)):
            close(got, want, 1e-12)
    close(kronecker_factors(model, batches, F.cross_entropy, [name], "gold", block=4)[name][0], A, 1e-12)
    model = copy.deepcopy(model).float()
    single, wide = (kronecker_factors(model, batches, F.cross_entropy, [name], "gold", dtype=d)[name] for d in (None, torch.float64))
    assert single[0].dtype == torch.float32 and wide[0].dtype == torch.float64
    close(single[1], wide[1].float(), 1e-5)
    half, batch = nn.Sequential(nn.Linear(6, 3)).bfloat16(), (normal(4, 6).bfloat16(), torch.arange(4) % 3)
    assert kronecker_factors(half, [batch], F.cross_entropy, ["0"], "gold")["0"][0].dtype == torch.float32

def test_padding_leaves_no_trace_of_counted_positions_and_example_rows_share_a_target():
    model, name = tiny_model("loop"), "blocks.0.feed_forward.up"
    tokens, targets = paths_batches(False)[0]
    padded = torch.cat([tokens, torch.tensor([[3]] * 5)], 1), torch.cat([targets, torch.full((5, 1), -100)], 1)
    plain = kronecker_factors(model, [(tokens, targets)], F.cross_entropy, [name], "gold", positions="counted")[name]
    for positions, same in ("counted", True), ("all", False):
        A, G = kronecker_factors(model, [padded], F.cross_entropy, [name], "gold", positions=positions)[name]
        assert torch.allclose(A, plain[0], rtol=1e-12) == same
    close(kronecker_factors(model, [padded], F.cross_entropy, [name], "gold")[name][1], plain[1] * 3 / 4, 1e-12)

class Steps(nn.Module):
    """One linear layer called once for each step: [batch, step, d] -> logits [batch, step, classes]."""
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return torch.stack([self.layer(part) for part in x.unbind(1)], 1)

@pytest.mark.parametrize("n_steps", [1, 3])
def test_the_fisher_where_the_product_is_exact(n_steps):
    model = Steps(nn.Linear(4, 3, bias=False).double())
    model.layer.weight.data.zero_()                          # p is the same everywhere, so that g does not depend on a
    x = normal(5, n_steps, 4).repeat(3, 1, 1)                # with each label once: the expectation over labels
    y = torch.arange(3).repeat_interleave(5)[:, None].expand(-1, n_steps)
    A, G = kronecker_factors(model, [(x, y)], F.cross_entropy, ["layer"], "gold")["layer"]
    W = model.layer.weight.detach()
    term = lambda w, a, t: -(w.view(3, 4) @ a).log_softmax(0)[t]
    gradients = torch.stack([torch.func.grad(term)(W.flatten(), a, t)
                             for a, t in zip(x.flatten(0, 1), y.flatten())])
    fisher = gradients.T @ gradients / len(gradients)
    close(torch.kron(G, A), fisher, 1e-12)
    mean = lambda w: F.cross_entropy(torch.func.functional_call(model, {"layer.weight": w.view(3, 4)}, (x,)).flatten(0, 1), y.flatten())
    close(torch.kron(G, A), torch.func.hessian(mean)(W.flatten()), 1e-12)
    assert (torch.kron(A, G) - fisher).abs().max() > 0.01, "the other order is another matrix"
    drawn = kronecker_factors(model, [(x.repeat(900, 1, 1), y.repeat(900, 1))], F.cross_entropy, ["layer"], "sampled", generator())
    close(drawn["layer"][1], G, 0.05)                        # sampled labels have this expectation

def test_sampled_labels_come_from_the_generator_alone():
    model, batches, name = tiny_model("dense"), paths_batches(), "blocks.1.feed_forward.up"
    state = torch.get_rng_state()
    one, same, other = (kronecker_factors(model, batches, F.cross_entropy, [name], "sampled", generator(s))[name][1] for s in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other) and torch.equal(torch.get_rng_state(), state)
    shifted = [(x, (y + 1) % 10 * (y >= 0) - 100 * (y < 0)) for x, y in batches]
    assert torch.equal(one, kronecker_factors(model, shifted, F.cross_entropy, [name], "sampled", generator(1))[name][1])

@pytest.mark.parametrize("labels", ["sampled", "gold"])
def test_ekfac_is_the_diagonal_of_the_fisher_in_the_eigenbasis(labels):
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    for p in model.parameters():
        p.data = normal(*p.shape, seed=p.numel())
    batches = [(x[:, 0], y) for x, y in images()]
    factors = kronecker_factors(model, batches, F.cross_entropy, ["0", "2"], labels, generator(3))
    masses = corrected_masses(model, batches, F.cross_entropy, factors, labels=labels, generator=generator(3))
    for name, (A, G) in factors.items():
        per_example = torch.stack([torch.outer(g, a).flatten() for a, g in slow_pairs(model, batches, name, labels, 3)])
        fisher = per_example.T @ per_example / len(per_example)
        basis = torch.kron(torch.linalg.eigh(G).eigenvectors, torch.linalg.eigh(A).eigenvectors)
        close(masses[name].flatten(), (basis.T @ fisher @ basis).diagonal(), 1e-12)
        plain = torch.outer(eigen(G).values, eigen(A).values).flatten()
        rebuilt = lambda diagonal: (basis * diagonal @ basis.T - fisher).norm()
        assert rebuilt(masses[name].flatten()) < rebuilt(plain)
        close(plain.sum(), torch.trace(A) * torch.trace(G), 1e-12)

@pytest.mark.parametrize("arch, name", [("loop", "blocks.0.feed_forward.down"), ("dense", "blocks.0.feed_forward.up")])
def test_ekfac_of_a_sequence_model(arch, name):
    model, batches = tiny_model(arch), paths_batches()
    factors = kronecker_factors(model, batches, F.cross_entropy, [name], "gold")
    masses = corrected_masses(model, batches, F.cross_entropy, factors, labels="gold")[name]
    (A, G), pairs = factors[name], slow_pairs(model, batches, name)
    U_A, U_G = eigen(A).vectors, eigen(G).vectors
    slow = sum(torch.outer((U_G.T @ g) ** 2, (U_A.T @ a) ** 2) for a, g in pairs) / len(pairs)
    close(masses, slow, 1e-12)
    assert not torch.equal(keep_mask(A, G, 0.9, masses), keep_mask(A, G, 0.9))
    W = model.get_submodule(name).weight
    kept = U_G.T @ ablate(W, A, G, 0.9, masses) @ U_A
    close(kept, U_G.T @ W @ U_A * keep_mask(A, G, 0.9, masses), 1e-12)

# the edit

@pytest.fixture
def layer():
    """W [5, 9], A with two dead inputs, G with a dead output."""
    a, g = normal(50, 9) * torch.logspace(0, -2, 9, dtype=torch.float64), normal(50, 5, seed=1) @ normal(5, 5, seed=2)
    a[:, [2, 6]] = g[:, 3] = 0
    return normal(5, 9, seed=3), a.T @ a / 50, g.T @ g / 50

def slow_mask(A, G, keep):
    lam, mu = torch.linalg.eigh(G).eigenvalues.clamp(min=0), torch.linalg.eigh(A).eigenvalues.clamp(min=0)
    pairs = sorted(((float(l * m), i, j) for i, l in enumerate(lam) for j, m in enumerate(mu)), reverse=True)
    mask, total = torch.zeros(len(lam), len(mu), dtype=torch.bool), 0.0
    for mass, i, j in pairs:
        if total >= keep * float(lam.sum() * mu.sum()):
            break
        mask[i, j], total = True, total + mass
    return mask

def test_the_mask_against_a_loop_over_pairs(layer):
    W, A, G = layer
    counts = []
    for keep in (1e-9, 0.1, 0.5, 0.6, 0.75, 0.9, 0.98, 0.999, 0.999999):
        mask = keep_mask(A, G, keep)
        assert torch.equal(mask, slow_mask(A, G, keep)) and mask.shape == W.shape
        assert torch.equal(mask, keep_mask(eigen(A), eigen(G), keep)) and torch.equal(mask, keep_mask(7 * A, G / 3, keep))
        counts.append(int(mask.sum()))
    assert counts == sorted(counts) and counts[0] == 1 and counts[-1] <= 4 * 7 and len(set(counts)) > 5
    assert keep_mask(A, G, 1).all() and keep_mask(A, G, 1.0, torch.eye(5, 9)).all()
    equal = torch.eye(2).double(), torch.eye(5).double()
    assert [int(keep_mask(*equal, k).sum()) for k in (0.1, 0.3, 0.30001, 0.1 * 3, 0.7, 0.9999)] == [1, 3, 4, 3, 7, 10]
    ties = keep_mask(*equal, 0.3)
    assert ties.flatten()[:3].all(), "equal masses in order"
    masses = torch.zeros(5, 9)
    masses[2, 7], masses[1, 3], masses[4, 0] = 3, 2, 1
    assert [keep_mask(A, G, keep, masses).nonzero().tolist() for keep in (0.5, 0.6)] == [[[2, 7]], [[1, 3], [2, 7]]]

def test_keeping_everything_returns_the_weights(layer):
    W, A, G = layer
    for dtype in torch.float64, torch.float32:
        assert ablate(W.to(dtype), A, G, 1).dtype == dtype
        close(ablate(W.to(dtype), A, G, 1), W.to(dtype), 1e-6)
    model = tiny_model("lmc", slots=64)
    tokens = torch.randint(14, (3, 3), generator=generator())
    factors = kronecker_factors(model, [(tokens, tokens % 10)], F.cross_entropy, ["memory.keys", "memory.values"], "gold")
    assert (factors["memory.values"][0].diagonal() == 0).any(), "a slot that nothing reads"
    for name, pair in factors.items():
        close(ablate(model.get_submodule(name).weight, *pair, 1), model.get_submodule(name).weight, 1e-6)

def test_the_ablated_weights_in_the_eigenbasis(layer):
    W, A, G = layer
    (_, U_A), (_, U_G) = torch.linalg.eigh(A), torch.linalg.eigh(G)
    M = slow_mask(A, G, 0.9)
    slow = sum((U_G[:, i] @ W @ U_A[:, j]) * torch.outer(U_G[:, i], U_A[:, j]) for i in range(5) for j in range(9) if M[i, j])
    close(ablate(W, A, G, 0.9), slow, 1e-12)
    close(ablate(ablate(W, A, G, 0.9), A, G, 0.9), slow, 1e-12)
    square, A, G = normal(5, 5, seed=8), A[:5, :5], G
    close(ablate(square, A, G, 0.7).T, ablate(square.T.contiguous(), G, A, 0.7), 1e-10)
    assert (ablate(square, A, G, 0.7) - ablate(square, G, A, 0.7)).abs().max() > 0.1, "A belongs to the input"

def test_a_direction_of_little_curvature_is_forgotten():
    """Eight examples share an input direction, one has its own: the edit keeps what the layer does for the eight."""
    layer = nn.Linear(3, 4, bias=False).double()
    layer.weight.data = normal(4, 3)
    x = torch.tensor([[1.0, 0, 0]] * 8 + [[0, 0, 1.0]]).double()
    (A, G), = kronecker_factors(layer, [(x, torch.arange(9) % 4)], F.cross_entropy, [""], "gold").values()
    W = ablate(layer.weight, A, eigen(torch.eye(4)), 0.8)
    close(W[:, 0], layer.weight[:, 0], 1e-12)
    assert W[:, 1:].abs().max() < 1e-12

# controls

@pytest.mark.parametrize("name", ["kfac", "random", "activations", "gradients", "svd", "magnitude"])
def test_controls_keep_what_they_are_asked_to(layer, name):
    W, A, G = layer
    basis = {"kfac": (eigen(G).vectors, eigen(A).vectors), "activations": (torch.eye(5), eigen(A).vectors),
             "gradients": (eigen(G).vectors, torch.eye(9)), "magnitude": (torch.eye(5), torch.eye(9))}
    draw = generator(7)
    basis["random"] = curvature.random_orthogonal(5, draw), curvature.random_orthogonal(9, draw)
    U, _, Vh = torch.linalg.svd(W, full_matrices=False)
    basis["svd"] = U, Vh.T
    U, V = (u.double() for u in basis[name])
    last, norms = torch.zeros(5, V.shape[1]).bool(), [1.0]
    for kept in range(1, 6 if name == "svd" else 46):
        new = control(name, W, A, G, kept, generator(7))
        C, mask = U.T @ new @ V, (U.T @ new @ V).abs() > 1e-11
        assert int(mask.sum()) == kept and (mask | last).sum() == kept, "one more than before"
        close(C[mask], (U.T @ W @ V)[mask], 1e-10)
        last = mask
        norms.append(float((W - new).norm() / W.norm()))
    assert norms[-1] < 1e-12 and norms == sorted(norms, reverse=True)
    for removed in 0.9, 0.5, 0.1, 0.0:
        new = control(name, W, A, G, generator=generator(7), removed=removed)
        assert float((W - new).norm() / W.norm()) == pytest.approx(max(n for n in norms if n <= removed + 1e-12), abs=1e-9)
    assert torch.equal(control(name, W, A, G, 0, generator(7)), 0 * W)
    if name == "svd":
        assert torch.linalg.matrix_rank(control(name, W, A, G, 3)) == 3
        assert norms[3] == pytest.approx(float(torch.linalg.svdvals(W)[3:].norm() / W.norm())), "no better matrix of rank 3"
    if name == "magnitude":
        assert torch.equal(control(name, W, A, G, 10) != 0, W.abs() >= W.abs().flatten().sort().values[-10])
    if name == "kfac":
        assert torch.equal(control(name, W, A, G, int(keep_mask(A, G, 0.8).sum())), ablate(W, A, G, 0.8))
    if name in ("activations", "gradients"):                 # with the other factor the identity it is the edit
        flat = (A, torch.eye(5)) if name == "activations" else (torch.eye(9), G)
        close(control(name, W, A, G, int(keep_mask(*flat, 0.8).sum())), ablate(W, *flat, 0.8), 1e-10)

def test_a_random_basis_is_orthogonal_and_comes_from_the_generator(layer):
    W, A, G = layer
    state = torch.get_rng_state()
    Q = curvature.random_orthogonal(6, generator(1))
    close(Q.T @ Q, torch.eye(6).double(), 1e-12)
    one, same, other = (control("random", W, A, G, 20, generator(s)) for s in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other) and torch.equal(torch.get_rng_state(), state)
    draw = generator(3)
    many = torch.stack([curvature.random_orthogonal(3, draw) for _ in range(4000)])
    assert many.mean(0).abs().max() < 0.04 and (many.square().mean(0) - 1 / 3).abs().max() < 0.02
    assert 0.45 < (torch.linalg.det(many) > 0).double().mean() < 0.55, "rotations and reflections"

def test_a_learned_mask_forgets_and_keeps():
    """Inputs 0-7 carry the label; each of four exceptions has an input of its own, with the largest weights, against it."""
    x = normal(60, 12)
    x[:, 8:] = 0
    y = (x[:, 0] > 0).long()
    x[:4, 0], x[:4, 8:] = x[:4, 0].sign(), torch.eye(4)
    wrong = 1 - y[:4]
    model = nn.Sequential(nn.Linear(12, 2, bias=False)).double()
    model[0].weight.data = torch.zeros(2, 12).double()
    model[0].weight.data[:, 0] = torch.tensor([-2.0, 2.0])
    model[0].weight.data[:, 1:8] = 0.1 * normal(2, 7, seed=1)
    model[0].weight.data[1 - y[:4], torch.arange(8, 12)] = 9.0
    right = lambda inputs, labels: float((model(inputs).argmax(-1) == labels).double().mean())
    assert right(x[:4], wrong) == 1 and right(x[4:], y[4:]) > 0.9
    before, W = right(x[4:], y[4:]), model[0].weight.detach().clone()
    A = x.T @ x / 60
    with ablated(model, {"0": control("magnitude", W, A, torch.eye(2), kept=12)}):
        assert right(x[:4], wrong) == 1, "the exceptions hold the largest weights"
    new = curvature.learned_mask(model, [(x[:4], wrong)], [(x[4:], y[4:])], F.cross_entropy, ["0"], share=0.5)
    assert int((new["0"] != 0).sum()) == 12 and ((new["0"] == W) | (new["0"] == 0)).all() and torch.equal(model[0].weight, W)
    with ablated(model, new):
        assert right(x[:4], wrong) == 0 and right(x[4:], y[4:]) >= before

def test_shares_of_a_vector_by_band():
    A = torch.diag(torch.tensor([1.0, 4.0, 2.0, 3.0])).double()
    X = torch.tensor([[0.0, 3.0, 0.0, 4.0], [1.0, 1.0, 1.0, 1.0], [0.0] * 4]).double()
    close(curvature.band_shares(X, A, 2), torch.tensor([[1, 0], [0.5, 0.5], [0, 0]]).double().sqrt(), 1e-12)
    close(curvature.band_shares(X[:1], A, 4), torch.tensor([[0.6, 0.8, 0, 0]], dtype=torch.float64), 1e-12)
    X, A = normal(2, 7, 9), normal(9, 9) @ normal(9, 9).T
    shares = curvature.band_shares(X, A, 4)
    assert shares.shape == (2, 7, 4)
    close(shares.square().sum(-1), torch.ones(2, 7).double(), 1e-12)
    close(curvature.band_shares(100 * X, A, 4), shares, 1e-12)

# what is left untouched, and what is refused

def everything_of(model):
    return [(n, p.detach().clone(), p.requires_grad, p.grad) for n, p in model.named_parameters()], \
        [b.clone() for b in model.buffers()], [m.training for m in model.modules()], \
        [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()]

def assert_same(before, after):
    for (name, W, needs, grad), (_, V, needs_now, grad_now) in zip(before[0], after[0]):
        assert torch.equal(W, V) and needs == needs_now and grad is grad_now, name
    assert all(map(torch.equal, before[1], after[1])) and before[2:] == after[2:]

def test_the_model_is_untouched():
    model = Foreign().train()
    model.dropout.eval()
    model.up.weight.requires_grad_().grad = normal(8, 6)
    before, batches, gradient = everything_of(model), images(), model.up.weight.grad.clone()
    def failing(*_):
        raise RuntimeError("the loss failed")
    with torch.no_grad():
        factors = kronecker_factors(model, batches, F.cross_entropy, ["up", "loop"], "sampled", generator())
        corrected_masses(model, batches, F.cross_entropy, factors, generator=generator())
        new = curvature.learned_mask(model, batches, batches, F.cross_entropy, ["up"], 0.5, steps=2)
    for loss, more in (failing, {}), (F.cross_entropy, {"layers": ["up", "head", "spare"]}), (F.cross_entropy, {"layers": ["up", "relu"]}):
        with pytest.raises((RuntimeError, ValueError, TypeError)):
            kronecker_factors(model, batches, loss, more.get("layers", ["up"]), "gold")
        with pytest.raises((RuntimeError, ValueError, TypeError)):
            curvature.learned_mask(model, batches, batches, loss if not more else failing, ["up"], 0.5)
        assert_same(before, everything_of(model))
    with pytest.raises(RuntimeError, match="body"):
        with ablated(model, new | {"loop": 2 * model.loop.weight}):
            assert torch.equal(model.up.weight, new["up"]) and not torch.equal(model.loop.weight, before[0][2][1])
            raise RuntimeError("the body failed")
    assert_same(before, everything_of(model))
    assert torch.equal(model.up.weight.grad, gradient)
    with pytest.raises(ValueError, match=r"'loop'.*\[8, 8\].*\[6, 8\]"):
        with ablated(model, {"up": new["up"], "loop": new["up"].T}):
            pass
    assert_same(before, everything_of(model))

@pytest.mark.parametrize("change, words", [
    ({"layers": ["blocks.0"]}, ["blocks.0", "blocks.0.attention.query"]), ({"layers": ["no.such"]}, ["no.such", "nn.Linear"]),
    ({"layers": []}, ["list"]), ({"layers": "memory.values"}, ["list", "memory.values"]), ({"batches": []}, ["no batch", "iterator"]),
    ({"batches": [(torch.zeros(2, 3).long(), torch.full((2, 3), -100))]}, ["-100"]), ({"labels": "true"}, ["true", "gold"]),
    ({"positions": "some"}, ["some", "counted"]), ({"layers": ["memory.values", "spare"]}, ["spare", "never called"]),
    ({"batches": [(torch.zeros(2, 3).long(), torch.zeros(2).long())]}, ["[2, 3, 10]", "[2]"])])
def test_bad_requests_for_factors_are_refused(change, words):
    model = tiny_model("lmc")
    model.spare = nn.Linear(2, 2)
    before = everything_of(model)
    request = {"batches": paths_batches(), "loss": F.cross_entropy, "layers": ["memory.values"], "labels": "gold"} | change
    with pytest.raises((ValueError, TypeError)) as error:
        kronecker_factors(model, **request)
    assert all(word in str(error.value) for word in words), error.value
    assert_same(before, everything_of(model))

def test_values_that_are_not_finite_are_refused():
    model, nan = Foreign(), float("nan")
    x, y = images()[0]
    with pytest.raises(ValueError, match="logits are not finite"):
        kronecker_factors(model, [(x * nan, y)], F.cross_entropy, ["up"], "sampled", generator())
    with pytest.raises(ValueError, match="'up' are not finite or overflow"):
        kronecker_factors(model, [(x, y)], lambda logits, y: F.cross_entropy(logits, y) * nan, ["up"], "gold")

@pytest.mark.parametrize("change, words", [
    (lambda W, A, G: (W, A, G, 0), r"\(0, 1\], got 0"), (lambda W, A, G: (W, A, G, 1.5), "1.5"), (lambda W, A, G: (W, A, G, -0.5), "-0.5"),
    (lambda W, A, G: (W, A, G, float("nan")), "nan"), (lambda W, A, G: (W.T, A, G, 0.5), r"W must.*\[5, 9\].*\[9, 5\]"),
    (lambda W, A, G: (W, G, A, 0.5), r"\[9, 5\]"), (lambda W, A, G: (W, W, G, 0.5), r"\[d, d\].*\[5, 9\]"),
    (lambda W, A, G: (W / 0, A, G, 0.5), "finite"), (lambda W, A, G: (W, A / 0, G, 0.5), "finite"),
    (lambda W, A, G: (W, 0 * A, G, 0.5), "not zero"), (lambda W, A, G: (W, A, 0 * G, 0.5), "not zero"),
    (lambda W, A, G: (W, -A, G, 0.5), "negative"), (lambda W, A, G: (W, A + torch.ones(9, 9).triu(), G, 0.5), "symmetric"),
    (lambda W, A, G: (W, A, G, 0.5, W.abs().T), r"masses.*\[9, 5\]"), (lambda W, A, G: (W, A, G, 0.5, 0 * W), "masses.*zero"),
    (lambda W, A, G: (W, A, G, 0.5, -W.abs()), "masses.*negative"), (lambda W, A, G: (W, A, G, 0.5, W / 0), "masses.*finite")])
def test_bad_edits_are_refused(layer, change, words):
    with pytest.raises(ValueError, match=words):
        ablate(*change(*layer))

def test_bad_controls_are_refused(layer):
    for request, words in (("pca", 3), "pca.*svd"), (("svd", 6), r"0\.\.5.*6"), (("random", 46), "46"), (("kfac", -1), "-1"), (("kfac",), "None"):
        with pytest.raises(ValueError, match=words):
            control(request[0], *layer, *request[1:])
    for more in {"removed": 1.0}, {"removed": -0.1}, {"kept": 3, "removed": 0.5}:
        with pytest.raises(ValueError, match="either kept"):
            control("kfac", *layer, **more)
    for more in {"share": 0.0}, {"share": 1.5}, {"share": 0.5, "forget": []}, {"share": 0.5, "others": []}:
        with pytest.raises(ValueError, match="share"):
            curvature.learned_mask(Foreign(), **{"forget": images(), "others": images(), "loss": F.cross_entropy, "layers": ["up"]} | more)
    empty = [(x, y * 0 - 100) for x, y in images()]
    with pytest.raises(ValueError, match="nan at step 0"):
        curvature.learned_mask(Foreign(), empty, images(), F.cross_entropy, ["up"], 0.5)

def test_curvature_can_be_copied_alone(tmp_path):
    (tmp_path / "curvature.py").write_text((HERE / "curvature.py").read_text())
    (tmp_path / "use.py").write_text(
        "import doctest, sys, curvature, torch, torch.nn as nn\n"
        "assert doctest.testmod(curvature).failed == 0 and doctest.testmod(curvature).attempted > 0\n"
        "model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))\n"
        "batches = [(torch.randn(20, 4), torch.randint(3, (20,)))]\n"
        "(A, G), = curvature.kronecker_factors(model, batches, nn.functional.cross_entropy, ['2']).values()\n"
        "with curvature.ablated(model, {'2': curvature.ablate(model[2].weight, A, G, 0.6)}):\n    model(batches[0][0])\n"
        "print(curvature.__file__, 'edit' in sys.modules, 'models' in sys.modules)\n")
    out = subprocess.run([sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); exec(open({str(tmp_path / 'use.py')!r}).read())"],
                         cwd=tmp_path, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert out.stdout.split() == [str(tmp_path / "curvature.py"), "False", "False"]

# --- minedit.py: pictures ---------------------------------------------------------------------------------------------

def made_up_runs():
    """Groups as `read_runs` returns them: two seeds of lmc with everything, one dense without stages, a second lmc."""
    entry = {"method": "rome", "target": "prototype", "near": False, "a_priori": True, "direct": 1.0, "hop1": 0.5}
    def result(seed, arch="lmc"):
        return {"arch": arch, "seed": seed, "edit": {}, "history": [{"step": 1, "one_hop": 0.5, "train": 0.2, "id": 0.1, "ood": None},
                                                        {"step": 2, "one_hop": 1.0, "train": 0.9, "id": 0.8, "ood": 0.1 * seed}]}
    full = [result(seed) | {
        "edit": entry | {"hop2": 0.2 * seed},
        "when": {"written": [{"pass": 1, "acts": "always", "direct": 0.1, "hop1": None, "hop2": 0.3},
                             {"pass": 0, "acts": "always", "direct": 1.0, "hop1": 0.7, "hop2": 0.4}]},
        "locate": {"states": [{"pass": 0, "part": "attention"}, {"pass": 0, "part": "memory"}], "effects": [
            {"query": "fact", "corrupted": "h", "n": 2, "top1": [[0.0, 1.0], [0.5, 0.25 * seed]]},
            {"query": "fact", "corrupted": "r1", "n": 0, "top1": None}]},
        "mass": {"edits": [{"method": "memit", "target": "prototype", "n": n, "efficacy": 0.9, "specificity": 0.8} for n in (1, 1000)]
                 + [{"method": "emmet", "target": "prototype", "n": 1000, "infeasible": "rank"}]},
        "circuits": {"id": {"before": {"n": 2, "right": 0.5, "whole": 0.25 * seed}}, "ood": {"end": {"n": 0, "lens": {}}}},
        "ablate": {"sweep": [{"keep": keep, "recited": 0.1, "true": 0.5, "train": 1.0, "id": 1.0, "ood": 0.5, "one_hop": 1.0}
                             for keep in (0.99, 0.9)]}} for seed in (1, 2)]
    return [[result(0, "dense")], full, [result(0) | {"name": "lmc 2"}]]

def test_the_points_of_the_pictures():
    figures = minedit.points(made_up_runs())
    assert figures["grokking"].keys() == {"dense", "lmc", "lmc 2"}, "other settings stand apart"
    assert figures["grokking"]["lmc"]["ood"] == {"2": [0.1, 0.2]} and figures["grokking"]["lmc"]["one_hop"] == {"1": [0.5, 0.5], "2": [1.0, 1.0]}
    (edits,) = figures["propagation"].values()
    assert edits["hop2"] == {"lmc": [0.2, 0.4]} and edits["direct"] == {"lmc": [1.0, 1.0]}
    assert list(figures["when"]["lmc"]["hop2"].items()) == [("0, always", [0.4, 0.4]), ("1, always", [0.3, 0.3])]
    assert figures["when"]["lmc"]["hop1"] == {"0, always": [0.7, 0.7]}, "nothing asked, nothing drawn"
    (traced,) = figures["locate"].values()
    assert traced == {"0 attention": {"fact: h, h": [0.0, 0.0], "fact: h, r1": [1.0, 1.0]},
                      "0 memory": {"fact: h, h": [0.5, 0.5], "fact: h, r1": [0.25, 0.5]}}
    assert figures["mass"]["lmc, efficacy"] == {"memit, prototype": {"1": [0.9, 0.9], "1000": [0.9, 0.9]}}
    assert figures["paths"]["lmc"] == {"right": {"id before": [0.5, 0.5]}, "whole": {"id before": [0.25, 0.5]}}
    assert {x for line in figures["retention"]["curvature, lmc"].values() for x in line} == {"0.99", "0.9"}
    assert all(len(v) == 2 for line in figures["retention"]["curvature, lmc"].values() for v in line.values()), "K-FAC on the chosen layers"

def test_plot_without_matplotlib_is_one_line(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "matplotlib is not installed" in refused(capsys, "--report", HERE / "results", "--plot")

def test_pictures_are_drawn(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(minedit, "read_runs", lambda folders: made_up_runs())
    minedit.plot([tmp_path], tmp_path)
    for file in minedit.FIGURES:
        text = (tmp_path / f"{file}.svg").read_text()
        assert "n = 2" in text and minedit.FIGURES[file] in text
    monkeypatch.setattr(minedit, "read_runs", lambda folders: made_up_runs()[:1])
    minedit.plot([tmp_path], tmp_path)
    assert capsys.readouterr().out.count("not drawn") == 6

# --- minedit.py: speed ------------------------------------------------------------------------------------------------

def test_the_plain_formulation_has_the_same_loss_and_gradient():
    paths, recipe = kg.split(kg.synthetic(15, 6, seed=2, out_degree=4), 0.2, 0.6, seed=2), minedit.Recipe(batch=20, branches=3)
    model = Model(Config(15, 6, d_model=16, n_heads=2, slots=16, top_k=4, depth=2), generator()).double()
    batch = minedit.Batches(paths, recipe, generator()).draw()
    tokens, positions, answers = minedit.apart(*batch)
    assert tokens.shape == (60, 3) and positions.tolist() == [0, 1, 2] and answers.shape == (60, 2)
    found = []
    for tokens, positions, answers in batch, (tokens, positions, answers):
        loss = minedit.loss_of(model(tokens, positions), answers, recipe)
        found.append([loss, *torch.autograd.grad(loss, [*model.parameters()])])
    assert len(found[0]) > 5 and (batch[2] < 0).any() and all(g.abs().max() > 0 for g in found[0])
    for shared, apart in zip(*found):
        torch.testing.assert_close(shared, apart, rtol=1e-10, atol=1e-12)

def test_bench_at_toy_size(tmp_path, capsys):
    assert run_main("--quick", "--bench", "--device", "cpu", "--out", tmp_path / "new" / "b") == 0
    out = capsys.readouterr().out
    assert all(len(line) <= 100 for line in out.splitlines()), max(out.splitlines(), key=len)
    found = json.loads((tmp_path / "new" / "b" / "bench.json").read_text())
    assert [row[0] for row in found["cells"][1:]] == list(ARCHS) and [row[0] for row in found["growth"][1:]] == ["d_model", "slots", "entities", "edits"]
    assert all(float(x) > 0 for row in found["cells"][1:] for x in (row[1], row[2], row[3].split()[0], row[4].split()[0], *row[5:]))
    memory = [int(x) for row in found["growth"][1:] for x in row[-1].split("(")[1].rstrip(")").split("-")]
    assert len(memory) == 8 and all(0 < x < found["peak_memory_mib"] for x in memory), "of processes smaller than this one"
    assert len(found["profile"]) > 5 and found["peak_memory_mib"] > 0 and found["threads"][1][0] == 1
    assert [f.name for f in (tmp_path / "new" / "b").iterdir()] == ["bench.json"]

class Watch(torch.utils._python_dispatch.TorchDispatchMode):
    """Records the operations that make a host wait for its device: they read a value, or have a shape that depends on values."""
    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "item", "is_nonzero", "equal", "repeat_interleave.Tensor", "bincount")

    def __init__(self, on_the_host=()):
        super().__init__()
        self.found, self.on_the_host = [], [x.data_ptr() for x in on_the_host]   # tensors that never leave it

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name, tensors = function.name().removeprefix("aten::"), [x for x in torch.utils._pytree.tree_leaves(arguments) if isinstance(x, torch.Tensor)]
        indexed = name.startswith("index") and any(x.dtype in (torch.bool, torch.uint8) for x in tensors[1:2])
        if (name.startswith(self.WAITS) or indexed) and tensors[0].data_ptr() not in self.on_the_host:
            self.found.append(name)
        return function(*arguments, **(options or {}))

@pytest.mark.parametrize("waits", [lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: bool(x.any()), lambda x: x.nonzero()])
def test_the_watch_sees_what_waits(waits):
    with Watch() as watch:
        waits(torch.ones(3))
    assert watch.found

def toy_run(tmp_path, *arguments):
    run, = minedit.prepare(minedit.build_parser().parse_args([*TINY, *arguments, "--out", str(tmp_path / "-".join(arguments))]))
    return run

@pytest.mark.parametrize("arguments", [("--arch", arch) for arch in ARCHS] + [("--aliases",), ("--branches", "0"), ("--addressing", "topk"), ("--addressing", "plain")])
def test_a_step_never_reads_a_value_of_the_device(tmp_path, arguments):
    run = toy_run(tmp_path, *arguments)
    parts = run.fresh()
    batches = run.batches(parts["generator"])
    run.advance(parts, batches, parts["model"], 0)           # the first one makes the state of the optimizers
    with Watch([state["step"] for state in parts["adam"].state.values()]) as watch:      # AdamW counts its steps on the host
        loss = run.advance(parts, batches, parts["model"], 1)
    assert not watch.found, watch.found
    assert loss.isfinite() and not loss.requires_grad

@pytest.mark.parametrize("arch", ARCHS)
def test_forward_and_loss_can_be_captured_as_one_graph(tmp_path, arch):
    run = toy_run(tmp_path, "--arch", arch)
    parts = run.fresh()
    (tokens, positions, answers), model = run.batches(parts["generator"]).draw(), parts["model"]
    plain = lambda tokens, answers: minedit.loss_of(model(tokens, positions), answers, run.recipe)
    whole = torch.compile(plain, backend="aot_eager", fullgraph=True)            # raises where the graph breaks
    expected = torch.autograd.grad(plain(tokens, answers), list(model.parameters()))
    got = torch.autograd.grad(whole(tokens, answers), list(model.parameters()))
    for x, y in zip(got, expected):
        close(x, y, 1e-5)

# --- README: copying out, exercises -----------------------------------------------------------------------------------

GPT = """
import torch, torch.nn as nn, torch.nn.functional as F

class Block(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out, self.up, self.down = nn.Linear(d, 3 * d), nn.Linear(d, d), nn.Linear(d, 4 * d), nn.Linear(4 * d, d)
    def forward(self, x):
        q, k, v = (y.unflatten(-1, (2, -1)).transpose(1, 2) for y in self.qkv(self.norm1(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))

class GPT(nn.Module):
    def __init__(self, d=16, vocabulary=50):
        super().__init__()
        self.embedding, self.place = nn.Embedding(vocabulary, d), nn.Embedding(16, d)
        self.blocks, self.head = nn.ModuleList(Block(d) for _ in range(2)), nn.Linear(d, vocabulary)
    def forward(self, tokens):
        x = self.embedding(tokens) + self.place(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(x)

torch.manual_seed(0)
model = GPT()
before = {name: value.clone() for name, value in model.state_dict().items()}
"""

@pytest.mark.parametrize("module, answer", [("edit", "tensor(7)"), ("curvature", "tensor(")])
def test_the_readme_edits_and_ablates_a_foreign_model_with_one_copied_file(tmp_path, module, answer):
    block, = [part.split("```")[0] for part in (HERE / "README.md").read_text().split("```py\n")[1:] if f"import torch, {module}\n" in part]
    assert len([line for line in block.splitlines() if line]) <= 10, "ten lines"
    (tmp_path / f"{module}.py").write_text((HERE / f"{module}.py").read_text())
    changed = "\n".join(line + "\n    assert any(not torch.equal(model.state_dict()[n], before[n]) for n in before)" * line.startswith("with ")
                        for line in block.splitlines())
    (tmp_path / "use.py").write_text(
        f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\n" + GPT + changed
        + "\nassert all(torch.equal(model.state_dict()[n], before[n]) for n in before)\n"
        + "assert not {'kg', 'models', 'minedit', 'edit', 'curvature'} - {'" + module + "'} & sys.modules.keys()\n")
    out = subprocess.run([sys.executable, "-I", "use.py"], cwd=tmp_path, capture_output=True, text=True)
    assert out.returncode == 0 and out.stdout.startswith(answer), (out.stdout, out.stderr)

def test_exercise_1():
    """(W + dW) k = v; and no matrix that does so changes ordinary values less."""
    K, W = normal(40, 9, seed=1), normal(5, 9, seed=2)
    C, k, v = second_moment(K), normal(9, seed=3), normal(5, seed=4)
    dW = rome_update(W, C, k, v)
    close((W + dW) @ k, v)
    cost = lambda dW: (dW @ C @ dW.T).trace()
    for seed in range(5):
        other = normal(5, 9, seed=10 + seed)
        other -= torch.outer(other @ k, k) / (k @ k)         # other k = 0, so that dW + other writes v too
        assert cost(dW) < min(cost(dW + 1e-3 * other), cost(dW - 1e-3 * other))

@pytest.mark.parametrize("n", [3, 20])
def test_exercise_2(n):
    """Both forms are the minimum of sum |r - dW k|^2 + lam E |dW k'|^2, found here by ordinary least squares."""
    K, R, ordinary, lam = normal(n, 9, seed=1), normal(n, 5, seed=2), normal(40, 9, seed=3), 0.7
    rows = torch.cat([K, (lam / 40) ** 0.5 * ordinary])
    expected = torch.linalg.lstsq(rows, torch.cat([R, torch.zeros(40, 5).double()])).solution.T
    for form in ("primal", "dual", None):
        close(memit_update(K, R, second_moment(ordinary), lam, form=form), expected)

def test_exercise_3():
    """What is restored at the last token after the last block is the whole answer; at the first token before anything
    has moved it is nothing where another token was replaced."""
    model, clean = tiny_model("dense"), torch.randint(10, (6, 2), generator=generator(1))
    clean[:, 1] += 4 - 10 * (clean[:, 1] > 9)
    corrupted = clean.clone()
    corrupted[:, 1] = (corrupted[:, 1] + 3) % 10
    answer = model(clean)[:, -1].argmax(-1)
    top1, rise = editing.trace(model, clean, corrupted, answer, [("blocks.2", 0), ("blocks.0", 0)])
    probability = [model(tokens)[:, -1].softmax(-1)[range(6), answer] for tokens in (clean, corrupted)]
    assert top1.shape == rise.shape == (2, 2) and top1[0, 1] == 1
    close(rise[0, 1].double(), (probability[0] - probability[1]).mean(), 1e-6)
    assert rise[:, 0].abs().max() < 1e-12, "the state of the first token was never corrupted"

@pytest.mark.parametrize("seed", range(3))
def test_exercise_4(seed):
    """All of the mass is W; a part of it is held by the fewest pairs that can hold it."""
    A, G = second_moment(normal(30, 6, seed=seed)), second_moment(normal(30, 4, seed=seed + 10))
    W, masses = normal(4, 6, seed=seed + 20), torch.outer(eigen(G).values, eigen(A).values)
    close(ablate(W, A, G, 1.0), W)
    for keep in (0.3, 0.9, 0.99):
        mask = keep_mask(A, G, keep)
        share, n = masses[mask].sum() / masses.sum(), int(mask.sum())
        assert share >= keep and masses.flatten().sort(descending=True).values[:n - 1].sum() < keep * masses.sum()
        assert mask.all() or masses[mask].min() >= masses[~mask].max()

def test_exercise_5():
    """One column changes; a fact whose key is 0 there keeps its value, another moves by r k'_j / k_j."""
    W, k, r = normal(5, 9, seed=1), normal(9, seed=2), normal(5, seed=3)
    dW, j = row_update(k, r), int(k.abs().argmax())
    close((W + dW) @ k, W @ k + r)
    assert dW.abs().sum(0).nonzero().flatten().tolist() == [j]
    tenant = normal(9, seed=4)
    close(dW @ tenant, r * tenant[j] / k[j])
    tenant[j] = 0
    assert not (dW @ tenant).any()

def test_each_exercise_fails_without_the_body_it_asks_for(monkeypatch):
    """The README names a function of a module for each; emptied, its test fails."""
    named = re.findall(r"^(\d)\. .*?`(edit|curvature)\.(\w+)`.*`python -m pytest test_all.py -k exercise_(\d)`$", (HERE / "README.md").read_text(), re.M)
    assert [n for n, *_ in named] == [n for *_, n in named] == list("12345")
    for n, module, function, _ in named:
        check = globals()[f"test_exercise_{n}"]
        with monkeypatch.context() as without:
            without.setattr({"edit": editing, "curvature": curvature}[module], function, lambda *_, **__: None)
            with pytest.raises(Exception):
                check(*[3] * check.__code__.co_argcount)         # of those with a parameter

def test_the_blocks_of_the_readme_are_lines_of_the_report(capsys):
    blocks, reports = re.findall(r"^```text (results/\w+)\n(.*?)^```", (HERE / "README.md").read_text(), re.M | re.S), {}
    assert len(blocks) > 10 and len({folder for folder, _ in blocks}) > 3
    for folder, block in blocks:
        if folder not in reports:
            assert run_main("--report", HERE / folder) == 0
            reports[folder] = capsys.readouterr().out
        lines = iter(reports[folder].splitlines())           # in this order: rows stand below their own header
        missing = [line for line in block.splitlines() if line not in lines]
        assert block.startswith("arch") and not missing, f"not in --report {folder}: {missing[0]}"
    whole = lambda name: (HERE / "results" / name).read_text().strip()
    assert run_main("--report", HERE / "results") == 0
    assert whole("claims.txt") == "claim " + capsys.readouterr().out.split("\nclaim ")[1].rstrip()
    for folder, name in ("results/main", "report.txt"), ("results/mass", "mass.txt"):
        assert whole(name) == reports[folder].split("\nclaim ")[0].strip(), name

def test_runs_of_a_job_array_merge_and_the_report_says_what_was_not_run(tmp_path, capsys):
    import shutil
    for seed, folder in (0, "one/machine"), (1, "another"):
        assert run_main(*TINY, "--arch", "loop", "--seed", seed, "--out", tmp_path / folder, *["--when"] * (seed == 0)) == 0
    capsys.readouterr()
    assert run_main("--report", tmp_path) == 0
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines() if line.startswith("loop")]
    assert rows[0][:2] == ["loop", "2"], "one row for both runs"
    assert ["loop", "0", "only", "call", "1"] in [row[:5] for row in rows], "the table of --when"
    assert "not run, of 2 runs: edits 2, locate 2, when 1" in out
    shutil.copytree(tmp_path / "another", tmp_path / "copy")
    kept = json.loads((tmp_path / "copy" / "results.json").read_text())
    (tmp_path / "copy" / "results.json").write_text(json.dumps(kept | {"locate": {"effects": [], "states": []}}))
    assert run_main("--report", tmp_path) == 0
    assert "not run, of 2 runs: edits 2, locate 1, when 1" in capsys.readouterr().out, "one run in two folders has the stages of both"
    (tmp_path / "copy" / "log.jsonl").unlink()
    (runs,) = minedit.read_runs([tmp_path / "copy", tmp_path / "another", tmp_path / "one"])
    assert [r["seed"] for r in runs] == [0, 1] and all(r["history"] for r in runs), "and the evaluations, where one has them"
    (tmp_path / "another" / "log.jsonl").unlink()
    assert [len(r["history"]) > 0 for r in minedit.read_runs([tmp_path])[0]] == [True, False]

def test_what_is_measured_beside_the_hops_is_reported(tmp_path, capsys):
    assert run_main(*TINY, "--arch", "loop", "--edit", "--when", "--out", tmp_path / "r") == 0
    capsys.readouterr()
    assert run_main("--report", tmp_path) == 0
    results = json.loads((tmp_path / "r" / "results.json").read_text())
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    below = lambda *head: lines[next(i for i, line in enumerate(lines) if line[:len(head)] == list(head)) + 2]
    first = results["edits"][0]
    assert below("arch", "site", "pass", "method", "target", "head")[5:] == [minedit.cell(first[key], None) for key in (
        "same_subject_moved", "same_relation_moved", "facts_per_row", "overlap_hop2")]
    held = results["when"]["held"][0]
    assert below("arch", "after")[1:] == ["0", *(minedit.cell(held[key + kind]) for key in minedit.HOPS for kind in ("", "_random"))]

def test_a_mean_says_of_how_many_runs_it_is(capsys):
    assert minedit.mean([None, None]) == "-" and minedit.mean([0.5, None]) == "0.500 (1 of 2)" and minedit.mean([0.5, 0.7]) == "0.600"
    assert minedit.mean([0.5, None, 0.7], lowest=True) == "0.600 (0.500) (2 of 3)"
    curve = lambda *steps: {"arch": "lmc", "ablate": {"relearning": {"ablated": [{"step": step, "recited": 0.5} for step in steps], "fresh": []}}}
    minedit.summary("relearning", [[curve(0, 10), curve(0, 10, 20), {"arch": "lmc"}]])
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("lmc")]
    assert [row[:5] for row in rows[:2]] == [["lmc", "ablated", "0", "-", "0.500"], ["lmc", "ablated", "10", "-", "0.500"]]
    assert rows[2][:8] == ["lmc", "(1", "of", "2)", "ablated", "20", "-", "0.500"], "of those that have this stage"
# --- edit.py: lens and swaps; kg.py: regimes --------------------------------------------------------------------------------------

class Known(nn.Module):
    """Its states are known: the part is called twice and returns c (one-hot of token + call) with c = call + 1."""
    def __init__(self):
        super().__init__()
        self.part = nn.Identity()

    def forward(self, tokens):
        for call in range(2):
            x = self.part((call + 1.0) * F.one_hot(tokens + call, 5).double())
        return x

def test_the_lens_of_a_model_whose_states_are_known():
    model, tokens, wanted = Known(), torch.tensor([[0, 1, 2], [3, 0, 1]]), torch.tensor([1, 3])
    scale = torch.tensor([1.0, 1, 1, -1, 1], dtype=torch.float64)                # entity 3 is read with the wrong sign
    rank, p = editing.lens(model, tokens, wanted, [("part", 0), ("part", 1)], lambda x: x * scale)
    e = torch.tensor(1.0, dtype=torch.float64).exp()
    assert rank.shape == p.shape == (2, 3, 2)
    assert rank[0, :, 0].tolist() == [4, 0, 4], "one logit is larger, three are equal: ties count against the rank"
    assert rank[1, :, 0].tolist() == [0, 4, 3], "in its second call the part holds the next token"
    assert rank[0, 0, 1] == 4, "read with the wrong sign it is last"
    close(p[0, :, 0], torch.stack([1 / (4 + e), e / (4 + e), 1 / (4 + e)]), 1e-14)
    close(p[1, 0, 0], e**2 / (4 + e**2), 1e-14)
    close(p[0, 0, 1], 1 / e / (4 + 1 / e), 1e-14)

def test_swaps_of_parts_of_a_state(two_runs):
    model, states, one, _ = two_runs
    other = (one + torch.tensor([3, 1, 5])) % 10
    own, theirs = (model(x)[:, -1].argmax(-1) for x in (one, other))
    basis = editing.span(normal(6, 16), normal(6, 16, seed=1))
    rest = editing.complement(basis)
    both = torch.cat([basis, rest], -1)
    assert rest.shape == (6, 16, 14)
    close(both.mT @ both, torch.eye(16, dtype=torch.float64).expand(6, 16, 16), 1e-12)
    for part, name, call in states:
        for token in range(3):
            assert torch.equal(editing.swapped(model, one, one, name, call, token, basis), own), "with itself"
            assert torch.equal(editing.swapped(model, one, other, name, call, token, both),
                               editing.swapped(model, one, other, name, call, token)), "both parts are the whole"
    assert torch.equal(editing.swapped(model, one, other, *states[-1][1:], 2), theirs), "the last state is the answer"
    value = editing.at_call(model, *states[-1][1:], other)[1][:, 2]
    with editing.interchange(model, *states[-1][1:], 2, value, basis):
        by_hand = model(one)[:, -1].argmax(-1)
    assert torch.equal(editing.swapped(model, one, other, *states[-1][1:], 2, basis), by_hand)

def test_tracing_prompt_by_prompt(two_runs):
    model, states, clean, corrupted = two_runs
    answer, sites = model(clean)[:, -1].argmax(-1), [state[1:] for state in states]
    each = editing.trace(model, clean, corrupted, answer, sites, each=True)
    alone = editing.trace(model, clean[2:3], corrupted[2:3], answer[2:3], sites)
    for one, whole, mean in zip(alone, each, editing.trace(model, clean, corrupted, answer, sites)):
        assert whole.shape == (len(sites), 3, 6)
        close(whole.mean(-1), mean, 1e-12)
        close(whole[:, :, 2], one, 1e-9)

@pytest.mark.parametrize("regime", kg.REGIMES)
@pytest.mark.parametrize("out_degree", [None, 5])
def test_regimes_never_ask_what_they_train(regime, out_degree):
    graph, share = kg.synthetic(20, 8, 3, out_degree), 0.0 if regime == "natural" else 0.3
    paths, natural = kg.split(graph, 0.2, 0.7, 3, regime, share), kg.split(graph, 0.2, 0.7, 3)
    triples = lambda paths, name: set(map(tuple, paths.tokens[paths.masks[name]].tolist()))
    trained, added = triples(paths, "train"), triples(paths, "train") - triples(natural, "train")
    assert all(not trained & triples(paths, name) for name in ("id", "ood", "ood_first", "ood_second"))
    assert triples(natural, "train") <= trained and triples(paths, "id") == triples(natural, "id")
    assert triples(paths, "ood") == triples(natural, "ood"), "two OOD facts are never trained together"
    for name in ("ood_first", "ood_second"):
        n = round(share * len(triples(natural, name))) if name in kg.REGIMES[regime] else 0
        assert len(added & triples(natural, name)) == n and len(triples(paths, name)) == len(triples(natural, name)) - n
    assert len(added) == sum(len(triples(natural, name)) - len(triples(paths, name)) for name in natural.masks if name != "train")
    if regime == "natural":
        assert all(torch.equal(paths.masks[name], natural.masks[name]) for name in natural.masks)

def test_paths_that_would_ask_what_they_train_are_refused():
    paths = kg.split(kg.synthetic(20, 8, 3), 0.2, 0.7, 3)
    with pytest.raises(ValueError, match="two sets"):
        dataclasses.replace(paths, masks=paths.masks | {"ood": paths.masks["ood"] | paths.masks["train"]})
    with pytest.raises(ValueError, match="augment"):
        kg.split(kg.synthetic(20, 8, 3), 0.2, 0.7, 3, "first-hop", 1.5)

def test_a_regime_is_part_of_a_run(finished, tmp_path, capsys):
    assert "--augment" in refused(capsys, *TINY, "--regime", "first-hop", "--out", tmp_path / "r")
    assert "--augment" in refused(capsys, *TINY, "--augment", "0.5", "--out", tmp_path / "r")
    assert "data.regime" in refused(capsys, *TINY, "--regime", "both-hops", "--augment", "0.5", "--out", finished)

# --- ablation: exceptions, the mixture, the study -----------------------------------------------------------------------

@pytest.mark.parametrize("seed", range(3))
def test_exceptions_are_trained_paths_with_one_wrong_answer(seed):
    clean = kg.split(kg.synthetic(10, 4, seed, out_degree=3), 0.1, 0.8, seed)
    before = clean.two_hop.clone()
    noisy, again, other = (kg.with_exceptions(clean, 0.2, 10, s) for s in (seed, seed, seed + 1))
    exceptions, train = noisy.masks["exceptions"], clean.masks["train"]
    assert exceptions.sum() == round(0.2 * int(train.sum())) and not (exceptions & ~train).any()
    assert torch.equal(noisy.two_hop != before, exceptions), "an exception is wrong, every other path right"
    assert ((noisy.two_hop >= 0) & (noisy.two_hop < 10))[exceptions].all()
    assert torch.equal(clean.two_hop, before), "the paths handed in are as they were"
    assert torch.equal(again.two_hop, noisy.two_hop) and torch.equal(again.masks["validation"], noisy.masks["validation"])
    assert not torch.equal(other.masks["exceptions"], exceptions) and "exceptions" not in clean.masks
    assert 0.05 < noisy.masks["validation"].float().mean() < 0.4

def test_a_share_of_exceptions_is_below_one():
    paths = kg.split(kg.synthetic(10, 4, 0), 0.1, 0.8, 0)
    with pytest.raises(ValueError, match="got 1.0"):
        kg.with_exceptions(paths, 1.0, 10, 0)
    with pytest.raises(ValueError, match="5 of them arithmetic"):
        kg.synthetic(10, 4, 0, arithmetic=5)

def test_arithmetic_relations_add_a_constant():
    plain, graph = kg.synthetic(11, 5, 3).facts, kg.synthetic(11, 5, 3, arithmetic=2).facts
    shift = (graph[:, :2] - torch.arange(11)[:, None]) % 11
    assert (shift == shift[0]).all() and (shift > 0).all() and torch.equal(graph[:, 2:], plain[:, 2:])
    assert not torch.equal(graph[:, :2], plain[:, :2])

def test_facts_are_drawn_as_often_as_their_frequency_says():
    paths = kg.split(kg.synthetic(10, 4, 0), 0.1, 0.8, 0)
    frequency = 1 / (torch.randperm(40, generator=generator(1)) + 1.0)
    batches = minedit.Batches(paths, minedit.Recipe(batch=1), generator(2), frequency=frequency)
    drawn = torch.stack([batches.draw()[0][0, :2] for _ in range(4000)])
    count = torch.bincount(4 * drawn[:, 0] + drawn[:, 1] - 10, minlength=40)
    p = frequency / frequency.sum()
    assert ((count - 4000 * p).abs() < 5 * (4000 * p * (1 - p)).sqrt()).all()
    many = minedit.Batches(paths, minedit.Recipe(batch=30), generator(2), frequency=frequency).draw()[0]
    assert len(many[:, :2].unique(dim=0)) == 30, "each fact at most once"

def test_open_book_prompts_are_answered_by_the_prompt_alone():
    paths = kg.split(kg.synthetic(10, 4, 0), 0.1, 0.8, 0)
    tokens, told = minedit.Batches(paths, minedit.Recipe(), generator()).open_book(4000, 10)
    assert torch.equal(tokens[:, :2], tokens[:, 3:]) and torch.equal(tokens[:, 2], told)
    fact = {(h, r): t for h, r, t in paths.facts.tolist()}
    tails = torch.tensor([fact[h, r - 10] for h, r in tokens[:, :2].tolist()])
    assert 0.05 < (tails == told).double().mean() < 0.15, "the fact itself says no more than chance"
    assert len({(h, t) for h, t in zip(tokens[:, 0].tolist(), told.tolist())}) == 100

def test_the_last_steps_are_trained_under_their_own_settings(tmp_path, monkeypatch):
    monkeypatch.setattr(minedit, "LATE", {"lr": 0.0, "muon_lr": 0.0, "weight_decay": 0.5, "label_smoothing": 0.0})
    options = ["--arch", "lmc", *TINY, "--eval-every", 5, "--label-noise", 0.2, "--zipf", 1, "--open-book", 3]
    assert run_main(*options, "--memorize", 10, "--out", tmp_path / "a") == 0
    at_20 = weights(tmp_path / "a")
    assert run_main(*options, "--memorize", 0, "--steps", 10, "--out", tmp_path / "b") == 0
    for name, p in weights(tmp_path / "b")["model"].items():
        assert torch.equal(p, at_20["model"][name]), name
    assert run_main(*options, "--memorize", 0, "--out", tmp_path / "c") == 0
    assert not torch.equal(weights(tmp_path / "c")["model"]["embedding.weight"], at_20["model"]["embedding.weight"])
    monkeypatch.setattr(minedit, "ENOUGH", 0.0)              # then the first evaluation among the last steps is the last
    for again in range(2):
        assert run_main(*options, "--memorize", 10, "--out", tmp_path / "d") == 0, "and the run counts as finished"
        assert weights(tmp_path / "d")["step"] == 15

def test_a_search_finds_the_strengths_of_each_group():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    options = {group: {s: {group: torch.full((3, 3), s)} for s in (1.0, 2.0, 3.0)} for group in ("0", "1")}
    for best in (2.0, 3.0), (1.0, None), (None, 2.0):
        old = copy.deepcopy(model.state_dict())
        want = [model[i].weight.detach().clone() if s is None else torch.full((3, 3), s) for i, s in enumerate(best)]
        value = lambda m: -sum((m[i].weight - want[i]).norm().item() for i in (0, 1))
        chosen, found = curvature.search(model, value, options)
        assert tuple(chosen.values()) == best and found.keys() == {g for g in "01" if chosen[g] is not None}
        assert all(torch.equal(old[name], p) for name, p in model.state_dict().items())

@pytest.fixture
def small_study():
    """A foreign model, its factors, and two of its layers."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).double()
    x, y = normal(60, 6), torch.randint(5, (60,), generator=generator())
    factors = kronecker_factors(model, [(x, y)], F.cross_entropy, ["0", "2"], "gold")
    masses = corrected_masses(model, [(x, y)], F.cross_entropy, factors, labels="gold")
    return model, {name: (eigen(A), eigen(G)) for name, (A, G) in factors.items()}, masses, x

def test_methods_are_compared_at_what_they_are_said_to_match(small_study):
    model, factors, masses, x = small_study
    seen, old = [], copy.deepcopy(model.state_dict())

    def measure(m):
        seen.append({name: m.get_submodule(name).weight.detach().clone() for name in ("0", "2")})
        return {"size": float(m(x).norm())}
    value = lambda m: -abs(float(m(x).norm()) - 3)
    best, weights, entries = curvature.compare(model, measure, value, factors, masses, {"a": ["0"], "b": ["2"]},
                                               (0.9, 0.6), (0.1, 0.5), generator())
    W = {name: model.get_submodule(name).weight.detach() for name in ("0", "2")}
    assert all(torch.equal(old[name], p) for name, p in model.state_dict().items()), "the model is as it was"
    assert [e["method"] for e in entries[:8]] == ["before", *curvature.KEEPING, *curvature.CONTROLS] and best in entries[1:3]
    assert best["value"] == max(e["value"] for e in entries[1:3])
    for entry, now in zip(entries[1:], seen[1:]):
        total = sum(float((W[n] - now[n]).square().sum()) for n in weights) / sum(float(W[n].square().sum()) for n in weights)
        if entry["matched"] == "norm":
            assert entry["removed"] <= best["removed"] + 1e-9
        if entry["matched"] != "own":
            assert entry["removed"] == pytest.approx(total ** 0.5, abs=1e-9)
        for n in weights:
            if (entry["method"], entry["matched"]) == ("magnitude", "parts"):
                strength = best["strengths"]["a" if n == "0" else "b"]
                kept = keep_mask(*factors[n], strength, masses[n] if best["method"] == "ekfac" else None)
                assert (now[n] != 0).sum() == kept.sum()
    assert {(e["method"], e["matched"]) for e in entries[8:]} == {(m, k) for m in curvature.CONTROLS for k in (
        "parts", "norm")} - {("svd", "parts")}

def test_images_of_shapes():
    patches, kind = minedit.shapes(400, generator())
    again, _ = minedit.shapes(400, generator())
    assert patches.shape == (400, 16, 32) and torch.equal(patches, again) and kind.unique().tolist() == list(range(8))
    images = patches[..., :16].view(400, 4, 4, 4, 4).transpose(2, 3).reshape(400, 16, 16)
    steps = (images[:, 1:] - images[:, :-1]).abs().mean()
    assert steps < (images[:, 1:] - images[:, :-1].flip(1)).abs().mean(), "neighbours are alike: the patches lie in order"
    area = (images > 0.5).double().mean((1, 2))
    assert (area > 0.02).all() and (area < 0.7).all() and area[kind == 0].mean() > area[kind == 1].mean()

@pytest.mark.parametrize("arch", ["dense", "lmc"])
def test_the_ablation_stage(tmp_path, capsys, arch):
    options = ["--arch", arch, *TINY, "--label-noise", 0.2, "--arithmetic", 1, "--open-book", 4, "--memorize", 5,
               "--images", 60 if arch == "dense" else 0, "--ablate", "--out", tmp_path / "run"]
    assert run_main(*options) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.split("exceptions; ")[1].splitlines())) <= 100, "tables fit 100 columns"
    results = json.loads((tmp_path / "run" / "results.json").read_text())["ablate"]
    assert {"before", "chosen", "entries", "sweep", "bands", "relearning"} <= results.keys()
    assert ("vision" in results) == (arch == "dense")
    before, first = results["before"], results["relearning"]["ablated"][0]
    assert all(first[key] == results["chosen"][key] for key in ("recited", "true", "id")), "relearning starts where it ended"
    assert before["removed"] == 0 and all(0 <= e["removed"] for e in results["entries"])
    state = weights(tmp_path / "run")["average"]
    assert run_main(*options) == 0
    assert all(torch.equal(p, state[name]) for name, p in weights(tmp_path / "run")["average"].items())
    assert json.loads((tmp_path / "run" / "results.json").read_text())["ablate"]["chosen"] == results["chosen"]

def test_an_ablation_without_exceptions_is_refused(tmp_path, capsys):
    for missing in "--label-noise", "--branches":
        assert missing in refused(capsys, *TINY, "--ablate", missing, 0, "--out", tmp_path / "a")
        assert not (tmp_path / "a").exists(), "before anything is trained"

def test_what_an_ablation_asks_for_is_true(tmp_path):
    run, clean = run_of("--label-noise", 0.2, "--out", tmp_path / "n"), run_of("--out", tmp_path / "c")
    (mask, true), exceptions, paths = minedit.Ablation(run).sets["true"], run.paths.masks["exceptions"], run.paths
    assert torch.equal(mask, exceptions) and torch.equal(true != paths.two_hop, exceptions), "exceptions are trained wrong"
    assert torch.equal(true, clean.paths.two_hop)

def test_a_late_phase_longer_than_the_training(tmp_path):
    assert run_main(*TINY, "--steps", 4, "--memorize", 8, "--label-noise", 0.2, "--out", tmp_path / "m") == 0

# --- Inference paths, transfer, claims --------------------------------------------------------------------------------

def run_of(*options):
    return minedit.prepare(minedit.build_parser().parse_args([*TINY, *map(str, options)]))[0]

def test_what_is_kept_of_a_training_for_the_circuits(tmp_path, monkeypatch):
    shares = iter([0.2, 0.8, 0.95, 0.99, 1.0, 0.8, 1.0])
    monkeypatch.setattr(minedit, "accuracy", lambda *_: dict.fromkeys(minedit.LABELS, next(shares)))
    run = run_of("--steps", 7, "--eval-every", 1, "--out", tmp_path / "r")
    end = run.train().state_dict()
    steps = {name: record["step"] for name, (record, _) in run.moments.items()}
    assert steps == {"before": 2, "memorized": 4, "end": 7}, "the last before 0.9, the first at 0.99, the end"
    again = run_of("--steps", 7, "--eval-every", 1, "--out", tmp_path / "r").moments
    for name, (_, weights) in run.moments.items():
        assert all(torch.equal(weights[key], again[name][1][key]) for key in weights)
        assert all(torch.equal(weights[key], end[key]) for key in weights) == (name == "end")

def test_corruptions_whose_clean_prompts_are_chosen():
    tokens = torch.cartesian_prod(torch.arange(4), torch.arange(5), torch.arange(3))
    chosen = torch.arange(len(tokens)) % 3 == 0
    clean, other = minedit.corruptions(tokens, tokens.sum(1), 2, 30, generator(), chosen)
    assert len(clean) > 5 and chosen[clean].all() and not chosen[other].all()

def test_paths_that_are_the_same_and_not(tmp_path):
    run, rate = run_of("--arch", "lmc", "--out", tmp_path / "r"), torch.rand(6, 3, 1, generator=generator())
    hits = lambda seed, rate: {place: ((torch.rand(6, 3, 80, generator=generator(seed)) < rate).double(),
                                       torch.arange(80) < 60) for place in range(3)}
    one, two = hits(1, rate), hits(2, rate)
    same = minedit.same_paths(run, one, one)
    assert same["n"] == 180 and same["r"] == pytest.approx(1) and same["low"] == pytest.approx(1)
    other, opposite = minedit.same_paths(run, one, two), minedit.same_paths(run, one, hits(3, 1 - rate))
    assert 0.8 < other["low"] < other["r"] < 1 and opposite["high"] < -0.5
    x, y = [], []                                            # by hand; depth 2: sites 0 to 2, then 3 to 5, the stream last
    for place in range(3):
        for site, token in itertools.product(range(5), range(place, 3)):
            if site < 3 or token == 2:
                x.append(one[place][0][site, token, :60].mean())
                y.append(two[place][0][site, token, :60].mean())
    r = torch.corrcoef(torch.stack([torch.stack(x), torch.stack(y)]))[0, 1].item()
    assert other["r"] == pytest.approx(r, abs=1e-9)
    spoilt = {place: (torch.where(torch.arange(3)[:, None] < place, 1 - h, h), n) for place, (h, n) in two.items()}
    assert minedit.same_paths(run, one, spoilt)["r"] == other["r"], "states before the replaced token do not count"
    assert minedit.same_paths(run, {}, one) is None

@pytest.mark.parametrize("more", [[], ["--out-degree", "2"]], ids=["full", "sparse"])
def test_new_facts_and_what_is_asked_of_them(tmp_path, more):
    run = run_of(*more, "--out", tmp_path / "r")
    child = minedit.grown(run)
    graph, paths, E, R, N = child.graph, child.paths, 10, 4, 14
    assert torch.equal(torch.where(run.graph.facts >= 0, graph.facts[:E, :R], -1), run.graph.facts), "old facts stay"
    assert (graph.n_entities, graph.n_relations) == (N, 5) == (child.config.n_entities, child.config.n_relations)
    old = {(h, r) for h, r in (run.graph.facts >= 0).nonzero().tolist()}
    triples = lambda paths, name, n: {(h, r1 - n, r2 - n) for h, r1, r2 in paths.tokens[paths.masks[name]].tolist()}
    for name in run.paths.masks:
        assert triples(paths, name, N) == triples(run.paths, name, E), "the old sets are the old sets"
    sets = {"new->old": set(), "old->new": set(), "new->new": set()}
    for h, row in enumerate(graph.facts.tolist()):
        for r1, b in enumerate(row):
            for r2, t in enumerate(graph.facts[b].tolist() if b >= 0 else []):
                ages = ["old" if fact in old else "new" for fact in ((h, r1), (b, r2))]
                if t >= 0 and "new" in ages and ("old" in ages or h >= E and b >= E and r2 < R):
                    sets["->".join(ages)].add((h, r1, r2))
    for name in sets:
        assert triples(paths, name, N) == sets[name] and (sets[name] or more)

def test_the_default_graph_has_a_thousand_new_questions_of_each_kind(tmp_path):
    run = minedit.prepare(minedit.build_parser().parse_args(["--out", str(tmp_path / "r")]))[0]
    masks = minedit.grown(run).paths.masks
    assert all(int(masks[kind].sum()) >= 1000 for kind in ("new->old", "old->new", "new->new"))

def test_transfer_starts_from_the_old_weights(tmp_path, monkeypatch):
    run, starts = run_of("--transfer-steps", 2, "--out", tmp_path / "r"), {}
    run.train()
    run.summarize()
    further, before = minedit.further, {file.name: file.read_bytes() for file in (tmp_path / "r").iterdir()}
    def noted(child, weights, *rest):
        starts[len(starts)] = copy.deepcopy(weights)
        return further(child, weights, *rest)
    monkeypatch.setattr(minedit, "further", noted)
    run.moments["memorized"] = run.moments["before"]
    minedit.transfer_stage(run, None)
    assert before == {file.name: file.read_bytes() for file in (tmp_path / "r").iterdir()}, "the run is as it was"
    assert [*run.results["transfer"]] == ["scratch", "end", "memorized"]
    (scratch, end), old = (starts[i]["embedding.weight"] for i in (0, 1)), run.moments["end"][1]
    assert torch.equal(end[:10], old["embedding.weight"][:10]), "the old entities"
    assert torch.equal(end[14:18], old["embedding.weight"][10:14]), "relation r is token E + r"
    assert torch.equal(end[10:14], scratch[10:14]) and torch.equal(end[18:], scratch[18:]), "what is new is fresh"
    assert all(torch.equal(starts[1][key], old[key]) for key in old if key != "embedding.weight")

@pytest.mark.parametrize("arch", ARCHS)
def test_circuits_and_transfer(tmp_path, capsys, arch):
    more = ["--circuits", "--transfer", "--transfer-steps", "2", "--ood-fraction", "0.3", "--train-fraction", "0.3",
            "--lr", "0.02", "--muon-lr", "0.02", "--warmup", "1", "--steps", "40", "--eval-every", "20"]
    assert run_main(*TINY, "--n-edits", "2", *more, "--arch", arch, "--out", tmp_path / "run") == 0
    text = (tmp_path / "run" / "results.json").read_text()
    assert not any(word in text for word in ("NaN", "Infinity"))
    found = json.loads(text)
    states, path = len(found["circuits"]["states"]), found["circuits"]["id"]["end"]
    assert len(path["lens"]["bridge"]["rank"]) == states and len(path["lens"]["relation"]["p"][0]) == 3
    assert all(1 <= rank <= 10 for row in path["lens"]["bridge"]["rank"] for rank in row)
    assert len(path["swap"]) == 1 and found["circuits"]["fake"] in (True, False, None)
    assert 0 <= path["whole"] <= 1 and found["circuits"]["worth"]["end"].keys() >= {"step", "id", "hop2", "ablated"}
    assert found["transfer"]["end"]["n"]["new->old"] > 0 and 0 <= found["transfer"]["scratch"]["new->old"] <= 1
    assert run_main("--report", tmp_path / "run") == 0
    out = capsys.readouterr().out
    assert "not testable here" in out and " no figure" in out and f"\n{arch} " in out
    others = ("paths:", "loss", "memorized (train", *minedit.ACCURACY.splitlines())
    wide = [line for line in out.splitlines() if len(line) > 100 and not any(text in line for text in others)]
    assert not wide, wide

def test_circuits_where_there_is_nothing_to_ask(tmp_path, capsys):
    few = [*TINY[4:], "--entities", "4", "--relations", "2", "--steps", "1", "--n-edits", "2", "--transfer-steps", "1"]
    assert run_main(*few, "--circuits", "--transfer", "--ood-fraction", "0", "--train-fraction", "1", "--out",
                    tmp_path / "n") == 0
    assert "fake grokking" in capsys.readouterr().out
    assert "--branches" in refused(capsys, *TINY, "--branches", "0", "--circuits", "--out", tmp_path / "b")
    assert not (tmp_path / "b").exists(), "before anything is trained"

def test_intervals():
    assert minedit.wilson(0.0, 16) == pytest.approx((0, 0.194), abs=1e-3)        # published tables of Wilson's interval
    assert minedit.wilson(1.0, 16) == pytest.approx((0.806, 1), abs=1e-3)
    assert minedit.wilson(0.5, 100) == pytest.approx((0.404, 0.596), abs=1e-3)

def test_verdicts_follow_from_the_figures(capsys):
    """A made-up grokked loop: what is said of it is decided by its figures."""
    path = lambda **more: {"n": 100, "n_swap": 100, "bridge": 0.9, "relation": 0.5, "whole": 0.5, "visible": 0.0} | more
    circuits = {"same": {"id": {"r": 0.95}}, "id": {"before": path(whole=0.1), "end": path()},
                "ood": {"memorized": path(), "end": path(visible=0.2)}}
    run = lambda seed, **more: {
        "arch": "loop", "seed": seed, "step_train": 10, "step_id": 20, "step_ood": 80, "accuracy": {"ood": 0.99},
        "n_paths": {"ood": 1000}, "config": {"data": {"train_fraction": 0.8}, "recipe": {}, "model": usual}, "circuits": circuits, "transfer": {"end": {
            "new->old": 1.0, "old->new": 0.5, "new->new": 0.15, "n": dict.fromkeys(("new->old", "old->new"), 1000)}}} | more
    usual = vars(Config())
    apart = lambda **config: [run(seed, config={"data": {"train_fraction": 0.8}, "recipe": {}, "model": usual} | config, step_id=1000) for seed in range(3)]
    minedit.claims([apart(recipe={"label_noise": 0.1}), apart(data={"train_fraction": 0.5}), apart(data={"train_fraction": 0.8, "regime": "first-hop"}),
                    apart(model=usual | {"depth": 4}), apart(model=usual | {"feed_forward": True}), apart(data={"train_fraction": 0.8, "sha256": "a"}),
                    [run(0, step_id=10)], [run(0), run(1, step_ood=70)]])        # the larger group of the kind asked counts
    said = {line[:32].strip(): line[32:].split() for line in capsys.readouterr().out.splitlines()}
    says = lambda claim: next(rest for key, rest in said.items() if key.startswith(claim))
    assert says("[2] ID steps / train")[-5:] == ["loop", "2.000", "2.000..2.000", "-", "differs"], "2 is not 50"
    assert says("[2] OOD steps / ID")[-4:] == ["3.750", "3.500..4.000", "-", "agrees"]
    assert says("[2] OOD comes")[-3:] == ["0.985..0.994", "2000", "agrees"], "all queries of both runs"
    minedit.claims([[run(0, step_id=500)]])
    alone = next(line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("[2] ID steps / train"))
    assert alone[-2:] == ["agrees", "?"], "one run has no interval"
    assert says("[2] OOD never")[-2:] == ["no", "figure"], "no dense cell"
    assert says("[2] r1 -> t")[-4] == "0.400" and says("[2] r1 -> t")[-1] == "agrees"
    assert says("[2] r2 at r2")[-1] == "differs", "no growth"
    assert says("[2] ungrokked")[-2:] == ["agrees", "?"], "0 of 200 may be 0.02"
    assert says("[2] grokked")[-1] == "differs" and says("[11] ID paths")[-1] == "agrees"
    assert says("[11] after grokking: new->old")[-1] == "agrees"
    assert says("[11] after grokking: old->new")[-1] == "differs"
    assert says("[11] after grokking: new->new")[-3:] == ["0.150..0.150", "-", "agrees"]
