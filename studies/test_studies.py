"""What the studies promise: propagation, mass edits, ablation, circuits, bench, report.

python -m pytest -q studies/test_studies.py       # every training here is of toy size
"""

import copy
import itertools
import json
import math
import re
import shlex
import shutil
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import curvature
import edit as editing
import kg
import minedit
import models
from curvature import ablate, ablated, eigen, keep_mask
from edit import record
from models import ARCHS, Config
from studies import all as everything
from studies import (
    ablation,
    bench,
    capacity,
    circuit_tables,
    circuits,
    claims,
    controls,
    edit_tables,
    figures,
    gpt2,
    gpu,
    images,
    mass_edit,
    mass_task,
)
from studies import many, propagation, report, runs, second_moment, sequence, shrinkage
from studies import attention, pages, peers, times, training, transfer, when
from studies.training import further
from test_all import TINY, World, assert_same, checkpoint, close, generator, normal
from test_all import results_of, tiny_model, tiny_paths, weights_of

HERE = Path(__file__).parent.parent
STUDIES = {"propagation": propagation, "mass_edit": mass_edit, "ablation": ablation}
STUDIES |= {"circuits": circuits, "bench": bench, "report": report, "gpu": gpu}
STUDIES |= {"gpt2": gpt2, "shrinkage": shrinkage, "many": many, "all": everything}
STUDIES |= {"capacity": capacity, "sequence": sequence, "second_moment": second_moment}
STUDIES |= {"times": times, "pages": pages, "transfer": transfer, "attention": attention}


@pytest.fixture(scope="module")
def world():
    return World()


def run_study(study, *arguments):
    return study.main([str(a) for a in arguments])


def refused(capsys, study, *arguments):
    """The command ends with status 2 and one line on stderr, which is returned."""
    capsys.readouterr()
    try:
        status = run_study(study, *arguments)
    except SystemExit as stop:
        status = stop.code
    error = capsys.readouterr().err
    assert status == 2 and error.count("\n") == 1 and error.startswith("minedit: "), error
    return error


def commands_in(file):
    """Every command that begins a line of a text, in backticks or not, continued lines joined."""
    text = (HERE / file).read_text().replace("\\\n", " ")
    lines = [line.strip().removeprefix("`").split("`")[0] for line in text.splitlines()]
    starts = ("python -m studies.", "python minedit.py")
    return [line.split("#")[0] for line in lines if line.startswith(starts)]


TEXTS = ["README.md", "results/FINDINGS.md", "results/RECIPE.md", "studies/EXERCISES.md"]
TEXTS += [f"studies/{name}.py" for name in STUDIES]
COMMANDS = sorted({command for file in TEXTS for command in commands_in(file)})


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_in_the_documents_parses(command, monkeypatch):
    """As far as the parser; nothing is run."""
    monkeypatch.setattr(minedit, "guarded", lambda *_: 0)
    name, *arguments = shlex.split(command.removeprefix("python ").removeprefix("-m studies."))
    module = minedit if name == "minedit.py" else STUDIES[name]
    assert module.main(arguments) == 0


def test_every_exercise_names_tests_that_exist():
    names = (HERE / "test_all.py").read_text()
    text = (HERE / "studies" / "EXERCISES.md").read_text()
    for expression in text.split('-k "')[1:]:
        for word in expression.split('"')[0].split(" or "):
            assert word in names.replace("def test_the_", "def test_"), word


def test_an_abbreviated_option_is_refused(capsys):
    for study in STUDIES.values():
        refused(capsys, study, "--qui")


# --- propagation ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def propagated(tmp_path_factory):
    """The folder of the study of propagation in all four cells."""
    folder = tmp_path_factory.mktemp("propagation")
    assert run_study(propagation, *TINY, "--arch", "all", "--out", folder) == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_propagation_edits_every_store_and_pass(propagated, arch):
    found = results_of(propagated / f"{arch}-seed0")
    entries = found["propagation"]["edits"]
    several = [e["site"] for e in entries if e["pass"] is None]
    assert several == (["every store", "both copies"] if arch == "dense" else [])
    entries = [e for e in entries if e["pass"] is not None]
    assert len(entries) == 2 * 5 + 2
    targets = Counter(e["target"] for e in entries)
    assert (targets["near"], targets["short"]) == (1, 1)
    for e in entries:
        assert e["length"] <= {"short": 1.0001, "gradient": 4.0001}.get(e["target"], 1e9)
    sites = {(e["site"], e["pass"]) for e in entries}
    config = Config(**ARCHS[arch], depth=2)
    assert sites == {(store.module, store.at_pass) for store in models.stores(config)}
    assert len({e["site"] for e in entries if e["a_priori"]}) == 1
    for e in entries:
        assert 0 <= e["same_row_moved"] <= 1 or e["same_row_moved"] is None
    assert len(found["locate"]["states"]) == 6 and len(found["locate"]["effects"]) == 5
    assert found["when"]["held"][0].keys() >= {"direct", "direct_random", "hop2"}


def test_edits_of_every_store_against_weights_edited_one_by_one(tmp_path):
    run = toy_run(tmp_path, "--arch", "dense")
    model = run.train()
    case = propagation.make_case(run, model, 3, None)
    entry = propagation.edit_every_store(run, model, case)
    made = []
    for site in models.stores(run.config):
        at = minedit.gather(run, model, site)
        made.append(minedit.make_edits(model, run.paths, case.known.facts, case.requests, at, 0))
    assert len(made) == run.config.depth
    right, asked = {}, {}
    for i in range(3):
        dW = {one.at.name: torch.outer(one.r[i], one.u[i]) for one in made}
        with editing.edited(model, dW):
            for name in ("direct", "facts", "compositions"):
                probes = getattr(case.probes, name)
                mine = probes.edit == i
                answers = minedit.last_answers(model, probes.tokens[mine])
                right[name] = right.get(name, 0) + int((answers == probes.answer[mine]).sum())
                asked[name] = asked.get(name, 0) + int(mine.sum())
    assert entry["direct"] == right["direct"] / 3
    for name, key in (("facts", "one_hop"), ("compositions", "two_hop")):
        assert entry[f"unrelated_{key}_moved"] == pytest.approx(1 - right[name] / asked[name])
    assert propagation.edit_every_store(toy_run(tmp_path / "b"), model, case) is None


def test_the_second_copy_has_the_keys_and_values_of_compositions(tmp_path, monkeypatch):
    run = toy_run(tmp_path, "--arch", "dense")
    model = run.train()
    case = propagation.make_case(run, model, 3, None)
    right = torch.ones_like(case.known.right)  # as of a model that knows all
    case = case._replace(known=case.known._replace(right=right))
    fact, paths = case.requests.fact, run.paths
    asked = (torch.ones_like(case.known.facts), right, case.known.asked)
    hop2, _ = kg.hop2_probes(paths, fact, case.requests.new, *asked)
    case = case._replace(probes=case.probes._replace(hop2=hop2))
    made = []
    monkeypatch.setattr(
        propagation,
        "ask_under_all",
        lambda model, several, probes: made.append((several, probes)) or probes.answer,
    )
    assert propagation.edit_both_copies(run, model, case)["site"] == "both copies"
    first, second = made[0][0]
    assert first.at.name == "blocks.0.feed_forward.down"
    assert (second.at.name, second.at_pass) == ("blocks.1.feed_forward.down", 1)
    _, kept = made[2]  # hop 2, after direct and hop 1
    W, asked, n_lent = second.at.layer.weight, set(kept.path.tolist()), []
    answered = case.known.asked & (paths.second >= 0)
    for i in range(3):
        mine = hop2.path[hop2.edit == i].tolist()
        lent = [path for path in mine if path not in asked]
        assert len(lent) == min(8, len(mine) // 2)
        if not lent:
            continue
        n_lent.append(len(lent))
        keys, _ = editing.last_token(model, second.at.name, 0, paths.tokens[lent])
        key = keys.mean(0)
        close(second.at.keys[fact[i]], key, 1e-6)
        alike = answered & (paths.two_hop == case.requests.new[i])
        _, values = editing.last_token(model, second.at.name, 0, paths.tokens[alike])
        if alike.any():
            close(second.r[i] + W @ key, values.mean(0), 1e-5)
        close(second.u[i] @ key, torch.tensor(1.0), 1e-4)
    assert n_lent


@pytest.mark.slow
def test_what_all_four_cells_know_is_scored_apart(propagated):
    shared = []
    for arch in ARCHS:
        entries = results_of(propagated / f"{arch}-seed0")["propagation"]["edits"]
        for e in entries:
            if e["pass"] is not None:
                assert 0 <= e["probes_hop1_shared"] <= e["probes_hop1"]
        shared.append(entries)
    assert len(shared) == 4


def test_the_first_copy_is_in_another_store_than_the_second(tmp_path):
    run = toy_run(tmp_path, "--arch", "dense", "--depth", "3")
    model = run.train()
    case = propagation.make_case(run, model, 3, None)
    first, second, last = models.stores(run.config)
    for chosen, wanted in ((first, first), (second, second), (last, first)):
        a_priori = minedit.APriori(chosen, [0.4, 0.3, 0.5], 10)
        mine = case._replace(chosen=a_priori)
        assert propagation.site_of_first_copy(run, mine) == wanted
    single = toy_run(tmp_path / "b", "--arch", "dense", "--depth", "1")
    assert propagation.edit_both_copies(single, model, case) is None


def test_every_site_is_shrunk_as_the_chosen_one(tmp_path):
    run = toy_run(tmp_path, "--arch", "dense")
    model = run.train()
    case = propagation.make_case(run, model, 3, None, shrink=2.0)
    for site in models.stores(run.config):
        C = minedit.gather(run, model, site).C
        entries = propagation.edit_site(run, model, case, site)
        assert {entry["shrink"] for entry in entries} == {2.0}
        at = propagation.gather(run, model, case, site)
        close(at.C, C + 2 * C.diagonal().mean() * torch.eye(len(C)).double(), 1e-9)
    chosen = propagation.make_case(run, model, 3, None, shrink="auto").shrink
    fact = case.requests.fact
    assert chosen == minedit.site_for_edits(run, model, case.known, fact, "auto").at.shrink


def test_a_target_is_pulled_to_the_values_of_the_store(world):
    at, requests = world.at, world.requests
    u = editing.direction("rome", at, requests)
    known = torch.ones(len(world.tails), dtype=torch.bool)
    free = editing.gradient_residual(world.model, at, requests, u)
    near = propagation.near_residual(world.model, at, requests, u, known)
    v0 = at.values[requests.fact]
    slow = []
    for value in v0 + free:
        slow.append(min((value - other).norm().item() for other in at.values))
    distance = propagation.distance_to_values(at.values, v0 + free, chunk=3)
    close(distance, torch.tensor(slow, dtype=torch.float64), 1e-7)
    assert (propagation.distance_to_values(at.values, v0 + near) < distance).all()


def test_address_overlap_against_a_slow_reference(world):
    at, requests = world.at, world.requests
    tokens = world.paths.tokens[[4, 9, 30]]
    probe = kg.Probes(torch.tensor([0, 2, 3]), tokens, torch.zeros(3, dtype=torch.long))
    cosines = []
    for i, row in zip(probe.edit, tokens):
        keys = record(world.model, world.model.memory.values, row[None])[0][:, 0, 2]
        k = at.keys[requests.fact[i]]
        cosines.append(max(float(k @ key / (k.norm() * key.norm())) for key in keys))
    overlap = propagation.address_overlap(world.model, at, requests, probe)
    assert overlap == pytest.approx(sum(cosines) / 3)


def test_holding_a_state_as_it_was(world):
    model, at, requests = world.model, world.at, world.requests
    u, r = editing.direction("rome", at, requests), 9 * normal(4, 16, seed=3)
    tokens = world.paths.tokens[[3, 9, 20, 40]]
    before = model(tokens)[:, -1].argmax(-1)
    probe = kg.Probes(torch.arange(4), tokens, before)
    edited = editing.answers_under_edits(model, at.layer, u, r, probe.edit, tokens)
    assert (edited != before).sum() >= 3, "the edit changes answers"
    everything = torch.eye(16).double().expand(4, 16, 16)

    def held(call, token, basis):
        state = models.State(call, "stream", "blocks.0", call)
        edits = minedit.Edits(at, 0, "rome", "gradient", u, r)
        return when.held_answers(model, edits, probe, state, token, basis, chunk=3)

    assert torch.equal(held(1, 2, 0 * everything), edited), "nothing is held"
    assert torch.equal(held(2, 2, everything), before), "the last state decides"
    assert torch.equal(held(2, 1, everything), edited), "a state that nothing reads"


# --- shrinkage ------------------------------------------------------------------------------------


def test_the_shrinkage_study_and_its_table_and_figure(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert run_study(shrinkage, *TINY, "--out", tmp_path / "s") == 0
    entries = results_of(tmp_path / "s")["tradeoff"]
    assert [(e["key"], e["shrink"]) for e in entries] == [
        (key, s) for s in shrinkage.SHRINKS for key in ("own", "contexts")
    ]
    assert len({(e["probes_hop1"] >= 0, e["n"]) for e in entries}) == 1
    capsys.readouterr()
    assert run_study(report, tmp_path / "s", "--plot") == 0
    assert "contexts  10.0" in capsys.readouterr().out
    assert (tmp_path / "s" / "tradeoff.svg").exists()


def test_a_composition_that_lends_its_key_is_no_probe(world):
    paths = world.paths
    everything = torch.ones(len(paths.facts), dtype=torch.bool)
    right = torch.ones(len(paths.tokens), dtype=torch.bool)
    known = minedit.Known(paths.facts[:, 2], paths.two_hop, everything, right, right)
    fact, new, _ = kg.draw_edits(paths, 4, generator(0))
    probes = minedit.edit_probes(paths, known, fact, new, 5, generator(1))
    lent, left = shrinkage.set_apart(probes, generator(2))
    pairs = [set(zip(x.edit.tolist(), x.path.tolist())) for x in (lent, left.hop2, probes.hop2)]
    assert pairs[0] and not pairs[0] & pairs[1] and pairs[0] | pairs[1] == pairs[2]
    for edit in range(4):
        n = sum(e == edit for e, _ in pairs[2])
        assert sum(e == edit for e, _ in pairs[0]) == min(n // 2, shrinkage.MOST_CONTEXTS)


def test_the_mean_key_against_a_slow_reference(world):
    model, at, requests = world.model, world.at, world.requests
    tokens = world.paths.tokens[[4, 9, 30]]
    lent = kg.Probes(torch.tensor([0, 0, 2]), tokens, torch.zeros(3).long(), torch.arange(3))
    there = shrinkage.mean_keys(model, at, requests, lent)
    for edit, fact in enumerate(requests.fact.tolist()):
        keys = [at.keys[fact]]
        for i, row in zip(lent.edit.tolist(), tokens):
            if i == edit:
                read = record(model, at.layer, row[None])[0][:, 0, 2]
                keys.append(max(read, key=lambda k: F.cosine_similarity(k, at.keys[fact], dim=0)))
        close(there.keys[fact], torch.stack(keys).mean(0), 1e-12)
        close(there.values[fact], at.layer.weight @ there.keys[fact], 1e-12)
    others = [f for f in range(len(at.keys)) if f not in requests.fact.tolist()]
    assert torch.equal(there.keys[others], at.keys[others])
    none = kg.Probes(*(column[:0] for column in lent))
    close(shrinkage.mean_keys(model, at, requests, none).keys, at.keys, 1e-12)


# --- what C covers --------------------------------------------------------------------------------


def test_the_second_moment_study_and_its_table(tmp_path, capsys):
    assert run_study(second_moment, *TINY, "--out", tmp_path / "s") == 0
    entries = results_of(tmp_path / "s")["second_moment"]
    kinds = [(entry["covers"], entry["target"]) for entry in entries]
    covers = ("here", "paths", "questions", "all", "nothing", "half")
    assert kinds == list(itertools.product(covers, second_moment.TARGETS))
    capsys.readouterr()
    assert run_study(report, tmp_path / "s") == 0
    assert "questions  prototype" in capsys.readouterr().out
    assert minedit.main([*TINY, "--edit", "--resume", "--out", str(tmp_path / "s")]) == 0
    core = results_of(tmp_path / "s")["edits"][0]
    assert (core["method"], core["target"]) == ("rome", "prototype")
    names = ("direct", "hop1", "hop2", "unrelated_one_hop_moved", "unrelated_two_hop_moved")
    assert [entries[0][name] for name in names] == [core[name] for name in names]


def test_every_edit_of_the_second_moment_study_has_the_C_that_it_names(tmp_path, monkeypatch):
    run, used, make_edits = toy_run(tmp_path), [], minedit.make_edits
    model = run.train()

    def noted(model, paths, known, requests, at, *rest):
        used.append(at.C)
        return make_edits(model, paths, known, requests, at, *rest)

    monkeypatch.setattr(minedit, "make_edits", noted)
    entries = second_moment.second_moment_stage(run, model, 3)
    site = next(site for site in models.stores(run.config))
    found = second_moment.moments(run, model, minedit.gather(run, model, site))
    assert len({C.sum().item() for C in used}) == len(found) == 6
    for C, entry in zip(used, entries):
        assert torch.equal(C, found[entry["covers"]])


def test_what_moves_beyond_C_is_asked_of_heads_that_it_has_not_seen(tmp_path, monkeypatch):
    run, asked, score = toy_run(tmp_path), [], minedit.score
    model = run.train()
    monkeypatch.setattr(minedit, "score", lambda *a: asked.append(a[2]) or score(*a))
    entries = second_moment.second_moment_stage(run, model, 3)
    covered = second_moment.is_covered(run)
    for entry, probes in zip(entries, asked):
        for several in (probes.facts, probes.compositions):
            seen = covered[several.tokens[:, 0]]
            assert len(seen) and seen.any() == (entry["covers"] != "half")
        assert covered[probes.hop2.tokens[:, 0]].any() or not len(probes.hop2.edit)


def test_what_C_covers_against_a_slow_reference(tmp_path):
    run = toy_run(tmp_path)
    model, call = run.train(), 1
    at = editing.site(model, "memory.values", call, run.paths.queries, run.ordinary())
    found = second_moment.moments(run, model, at)

    def keys(inputs, calls):
        read = [record(model, at.layer, row[None])[0] for row in inputs]  # [call, 1, token, d_in]
        return torch.cat([x[list(calls)].flatten(0, 2) for x in read]).double()

    every = range(run.config.depth)
    questions, paths = run.paths.queries, run.paths.tokens
    parts = {
        "here": [keys(questions, every), keys(paths, [call])],
        "paths": [keys(paths, [call])],
        "questions": [keys(questions, every)],
        "all": [keys(questions, every), keys(paths, every)],
    }
    covered = set(second_moment.is_covered(run).nonzero().flatten().tolist())
    assert len(covered) == 5
    some = [torch.tensor([row[0] in covered for row in x.tolist()]) for x in (questions, paths)]
    parts["half"] = [keys(questions[some[0]], every), keys(paths[some[1]], [call])]
    for covers, read in parts.items():
        K = torch.cat(read)
        close(found[covers], K.T @ K / len(K), 1e-5)
    assert torch.equal(found["nothing"], torch.eye(len(at.C)).double())


# --- many -----------------------------------------------------------------------------------------


def a_run(tmp_path, *options):
    parser = minedit.core_parser()
    arguments = [str(x) for x in (*TINY, *options, "--out", tmp_path / "run")]
    return minedit.prepare(minedit.parse(parser, arguments, {}))[0]


def test_edits_one_by_one_are_counted_as_the_core_counts_them(tmp_path):
    run = a_run(tmp_path, "--steps", 150, "--eval-every", 150, "--train-fraction", 0.7)
    model = run.train()
    editor = many.Editor(run, model, 10)
    requests, known, paths = editor.requests, editor.known, run.paths
    one_by_one = [slice(i, i + 1) for i in range(10)]
    entry = editor.entry("rome", "prototype", one_by_one, None)
    ten = requests[:10]
    probes = minedit.edit_probes(paths, known, ten.fact, ten.new, 5, generator())
    edits = minedit.make_edits(model, paths, known.facts, ten, editor.at, 0)
    record = minedit.score(model, edits, probes)
    assert record.direct == entry.direct > 0 and record.probes_hop1 + record.probes_hop2 > 20
    assert (record.hop1, record.hop2) == (entry.hop1, entry.hop2)
    assert record.probes_hop1 == entry.probes["hop1"]
    assert record.probes_hop2 == entry.probes["hop2"]


def test_what_follows_of_edits_made_together_against_a_slow_reference(world):
    paths = world.paths
    facts = {(h, r): t for h, r, t in paths.facts.tolist()}
    everything = torch.ones(len(paths.facts), dtype=torch.bool)
    right = torch.ones(len(paths.tokens), dtype=torch.bool)
    tails = paths.facts[:, 2]
    known = minedit.Known(tails, paths.two_hop, everything, right, right)
    fact, new, _ = kg.draw_edits(paths, 12, generator(0))
    after = dict(facts)
    for i, tail in zip(fact.tolist(), new.tolist()):
        h, r, _ = paths.facts[i].tolist()
        after[h, r] = tail
    edited = {tuple(paths.facts[i, :2].tolist()) for i in fact.tolist()}
    wanted = {"hop1": 0, "hop2": 0, "both": 0}
    answers = []
    n_entities = paths.tokens[0, 1].item() - paths.facts[0, 1].item()
    for (h, r1, r2), old, second, first in zip(
        paths.tokens.tolist(), paths.two_hop.tolist(), paths.second.tolist(), paths.first.tolist()
    ):
        one, two = (h, r1 - n_entities), (after[h, r1 - n_entities], r2 - n_entities)
        answers.append(after.get(two, -1))
        if second >= 0 and two in after and after[two] != old and second != first and two != one:
            kind = {(1, 0): "hop1", (0, 1): "hop2", (1, 1): "both"}
            kind = kind.get((one in edited, two in edited))
            if kind:
                wanted[kind] += 1
    one_hop = tails.index_copy(0, fact, new)
    hits = many.hits_of(paths, known, fact, new, (one_hop, torch.tensor(answers)))
    sizes = {name: len(getattr(hits, name)) for name in wanted}
    assert sizes == wanted and min(wanted.values()) > 0
    assert all(getattr(hits, name).all() for name in ("direct", *wanted))
    assert not hits.facts.any() and not hits.compositions.any()
    failed = one_hop.index_copy(0, fact[:1], tails[fact[:1]])  # the first edit has no effect
    hits = many.hits_of(paths, known, fact, new, (failed, torch.tensor(answers)))
    assert hits.direct.sum() == 11
    assert sum(len(getattr(hits, name)) for name in wanted) < sum(wanted.values())


def test_requests_with_a_key_of_zeros_are_counted_as_failed(tmp_path):
    run = a_run(tmp_path)
    model = run.train()
    editor = many.Editor(run, model, 8)
    editor.at.keys[editor.requests.fact[2]] = 0
    for method, target in many.KINDS:
        entry = editor.entry(method, target, many.groups_of(4, 0, 8), 1.0)
        assert entry.probes["direct"] == 8 and entry.direct <= 7 / 8
    editor.at.keys[:] = 0
    assert not editor.update("memit", "prototype", slice(0, 4), 1.0).any()
    assert editor.chosen_lam("prototype", [slice(4, 8)]) in many.LAMBDAS


def test_the_many_study_reports_and_leaves_the_model(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert run_study(many, *TINY, "--out", tmp_path / "m") == 0
    entries = results_of(tmp_path / "m")["many"]
    kinds = [(e["method"], e["target"]) for e in entries if e["n"] == 1]
    assert kinds == many.KINDS and max(e["n"] for e in entries) > 10
    capsys.readouterr()
    assert run_study(report, tmp_path / "m", "--plot") == 0
    assert "n facts in one update" in capsys.readouterr().out
    assert (tmp_path / "m" / "many.svg").exists()


# --- mass edits -----------------------------------------------------------------------------------


def test_relations_are_asked_by_two_names():
    paths, recipe = tiny_paths(None), minedit.Recipe(batch=20, branches=0)
    batches = mass_task.TwoNames(paths, recipe, generator())
    drawn = [batches.draw() for _ in range(20)]
    tokens, answers = (torch.cat([draw[i] for draw in drawn]) for i in (0, 2))
    relations = tokens[:, 1:]
    assert tokens[:, 0].max() < 10 and relations.min() >= 10 and 14 <= relations.max() < 18
    assert 0.3 < (relations >= 14).float().mean() < 0.7
    tails = dict(zip(map(tuple, paths.queries.tolist()), paths.facts[:, 2].tolist()))
    for (head, *asked), right in zip(tokens.tolist(), answers.tolist()):
        for relation, tail in zip(asked, right):
            assert tail == -100 or tail == tails[head, (relation - 10) % 4 + 10]
    assert (answers >= 0).any()


@pytest.mark.parametrize("arch", ["lmc", "dense"])
def test_mass_edits_count_every_request(tmp_path, arch):
    sizes = "--entities 20 --relations 4 --steps 120 --slots 64 --batch 64 --branches 0"
    options = [*TINY[4:], *sizes.split(), "--arch", arch, "--out", tmp_path / "m"]
    assert run_study(mass_edit, *options) == 0
    mass = results_of(tmp_path / "m")["mass"]
    assert {e["n"] for e in mass["edits"]} == {1, 10, 40} and mass["facts"] == 80
    methods = {"memit", "emmet", "rome", "alphaedit", "alphaedit-official", "finetune"}
    assert {e["method"] for e in mass["edits"]} == methods
    memit = {(e["target"], e["n"]) for e in mass["edits"] if e["method"] == "memit"}
    assert memit == set(itertools.product(mass_edit.TARGETS, (1, 10, 40)))
    for e in mass["edits"]:
        if "infeasible" in e:
            continue
        for name in ("efficacy", "paraphrase"):
            n_right = e[name] * e["n"]
            assert n_right == pytest.approx(round(n_right), abs=1e-6), "a request was dropped"
        shares = [max(e[name], 1e-9) for name in ("efficacy", "paraphrase", "specificity")]
        assert e["score"] == pytest.approx(300 / sum(1 / s for s in shares), abs=1e-5)
        if e["method"] in ("memit", "emmet"):
            assert e["residual_left"] == pytest.approx(e["residual_predicted"], abs=1e-4)
    blocks = [e["blocks"] for e in mass["layers"]]
    assert blocks == (["0-0", "1-1", "0-1"] if arch == "dense" else [])


@pytest.mark.parametrize("arch", ["lmc", "dense"])
def test_a_larger_store_leaves_less_of_as_many_edits(tmp_path, arch, capsys, monkeypatch):
    """Wide stores by the direct form; what is left is what is predicted; no request is dropped."""
    monkeypatch.setattr(minedit, "WIDE", 100)
    options = (
        "--entities 30 --relations 5 --steps 80 --batch 150 --counts 20 75 --branches 0".split()
    )
    options = [*TINY[4:], *options, "--arch", arch]
    left = {}
    for slots in (64, 512):
        sizes = f"--slots {slots} --d-ff {slots} --top-k 8 --ff-top-k 8".split()
        monkeypatch.setattr(capacity, "LAMBDAS", (1, 3))
        assert run_study(capacity, *options, *sizes, "--out", tmp_path / "c" / str(slots)) == 0
        found = results_of(tmp_path / "c" / str(slots))["capacity"]
        assert [e["n"] for e in found["edits"]] == [20, 75] and len(found["sweep"]) == 4
        for e in found["edits"]:
            n_new = e["efficacy"] * e["n"]
            assert e["slots"] == slots and n_new == pytest.approx(round(n_new), abs=1e-6)
            assert e["residual_left"] == pytest.approx(e["residual_predicted"], abs=1e-4)
            assert e["lam"] in (1, 3)
        left[slots] = found["edits"][1]["residual_left"]
    assert left[512] < 0.2 * left[64], "75 edits in 64 slots"
    capsys.readouterr()
    assert run_study(report, tmp_path / "c") == 0
    assert "MEMIT of n facts in one update" in capsys.readouterr().out
    pytest.importorskip("matplotlib")
    assert run_study(report, tmp_path / "c", "--plot") == 0
    assert (tmp_path / "c" / "capacity.svg").exists()


def test_batches_of_edits_add_up_where_earlier_keys_count(tmp_path, capsys, monkeypatch):
    """With given values and earlier keys carried, the last batch leaves what one update does."""
    monkeypatch.setattr(minedit, "WIDE", 100)
    monkeypatch.setattr(capacity, "LAMBDAS", (3,))
    sizes = "--entities 30 --relations 5 --steps 80 --batch 150 --branches 0 --slots 512 --top-k 8"
    options = [*TINY[4:], *sizes.split(), "--arch", "lmc", "--out", tmp_path / "s"]
    assert run_study(sequence, *options, "--facts", "40", "--batches", "4") == 0
    assert run_study(capacity, *options, "--counts", "40", "--resume") == 0
    found = results_of(tmp_path / "s")
    (whole,) = found["capacity"]["edits"]
    by_way = {way: [e for e in found["sequence"] if e["way"] == way] for way in sequence.WAYS}
    for entries in by_way.values():
        assert [(e["batch"], e["n"]) for e in entries] == [(i, 10 * i) for i in (1, 2, 3, 4)]
        assert entries[0]["first"] == entries[0]["efficacy"]
    last = by_way["carried"][-1]
    for name in ("efficacy", "paraphrase", "specificity"):
        assert last[name] == pytest.approx(whole[name], abs=1e-6)
    assert last["relative_norm"] == pytest.approx(whole["relative_norm"], rel=1e-4)
    forgotten = by_way["forgotten"][-1]["relative_norm"]
    assert abs(forgotten - last["relative_norm"]) > 1e-3 * forgotten, "the keys do overlap"
    capsys.readouterr()
    assert run_study(report, tmp_path / "s") == 0
    assert "one batch after another" in capsys.readouterr().out
    pytest.importorskip("matplotlib")
    assert run_study(report, tmp_path / "s", "--plot") == 0
    assert (tmp_path / "s" / "sequence.svg").exists()


def test_numbers_on_an_axis_ascend_in_whatever_order_runs_come():
    pytest.importorskip("matplotlib")
    panels = figures.Panels()
    for slots, score in ((16384, 0.9), (2048, 0.1), (8192, 0.5)):
        panels.add("lmc", "10 facts", slots, score)
    (ax,) = figures.draw_lines(panels, "slots").axes
    assert [label.get_text() for label in ax.get_xticklabels()] == ["2048", "8192", "16384"]
    assert list(ax.lines[0].get_ydata()) == [0.1, 0.5, 0.9]


def test_one_solution_serves_several_targets_side_by_side(mass_runs, monkeypatch):
    """What a sweep scores for each target is the update that this target has by itself."""
    study, updates = mass_edit.MassStudy(*mass_runs["lmc"], 100, 10), []
    monkeypatch.setitem(mass_edit.STRENGTHS, "memit", (3.0,))
    monkeypatch.setitem(mass_edit.STRENGTHS, "alphaedit", ((0.5, 0.3),))
    monkeypatch.setattr(study, "score", lambda entry, _, dW, group: updates.append((entry, dW)))
    K = study.at.keys[study.choosing.requests[:6].fact]
    for method in ("memit", "alphaedit"):
        study.sweep_targets(method, 6, mass_edit.TARGETS)
    assert len(updates) == 6
    for entry, dW in updates:
        r = study.residual(study.choosing, 6, entry.target)[0]
        close(dW[study.at.name], study.closed_form(entry.method, K, r, entry.setting), 1e-5)


@pytest.fixture(scope="module")
def mass_runs(tmp_path_factory):
    """{arch: (run, model)} of 80 facts, every relation under two names."""
    sizes = "--entities 20 --relations 4 --steps 120 --slots 64 --d-ff 64 --batch 64 --branches 0"
    runs = {}
    for arch in ("lmc", "dense"):
        options = [*TINY[4:], *sizes.split(), "--arch", arch]
        args = minedit.core_parser().parse_args(
            [*options, "--out", str(tmp_path_factory.mktemp(arch))]
        )
        (run,) = minedit.prepare(
            args, make_task=mass_task.make_task, make_batches=mass_task.TwoNames
        )
        runs[arch] = run, run.train()
    return runs


class Scores:
    """Every call of MassStudy.score: what was asked of which facts."""

    def __init__(self, monkeypatch):
        self.calls, score = [], mass_task.MassTask.score

        def recorded(study, entry, requests, updates, group):
            score(study, entry, requests, updates, group)
            self.calls.append((study, requests.fact, group.spared))

        monkeypatch.setattr(mass_task.MassTask, "score", recorded)

    def check(self, n_swept: int, n_edits: int):
        """Strengths are chosen on facts of their own, by facts of their own, and nothing else."""
        found = Counter()
        for study, fact, spared in self.calls:
            plan = minedit.mass_plan(study.run.paths, study.run.stream())
            to_choose = torch.equal(fact, plan.others.fact[: len(fact)])
            assert to_choose or torch.equal(fact, plan.requests.fact[: len(fact)])
            assert torch.equal(spared, plan.spared[0 if to_choose else 1 :: 2])
            together = torch.cat([plan.others.fact, plan.requests.fact, plan.spared])
            assert len(together) == len(together.unique())
            found["swept" if to_choose else "edits"] += 1
        assert found == {"swept": n_swept, "edits": n_edits}


def solved(entries: list[dict]) -> list[dict]:
    return [entry for entry in entries if not entry.get("infeasible")]


@pytest.mark.parametrize("arch", ["lmc", "dense"])
def test_strengths_are_chosen_on_facts_that_are_not_scored(mass_runs, monkeypatch, arch):
    run, model = mass_runs[arch]
    scores = Scores(monkeypatch)
    found = mass_edit.mass_stage(run, model, [3, 10], list(mass_edit.STRENGTHS), 100)
    scores.check(len(solved(found["sweep"])), len(solved(found["edits"] + found["layers"])))
    for edit in found["edits"] + found["layers"]:
        same = ("method", "target", "blocks")
        mine = [e for e in found["sweep"] if all(e.get(k) == edit.get(k) for k in same)]
        if mine:  # both numbers of edits are chosen on all the others, fewer than a hundred
            highest = max((e["score"] for e in solved(mine)), default=0)
            best = [e for e in mine if e.get("score", 0) >= highest - mass_edit.NEARLY][0]
            names = ("strength", "threshold")
            assert [edit.get(k) for k in names] == [best.get(k) for k in names]
    scores.calls.clear()
    found = capacity.capacity_stage(run, model, [3, 10], 100)
    scores.check(len(solved(found["sweep"])), len(solved(found["edits"])))
    for edit in found["edits"]:
        tried = [e for e in solved(found["sweep"]) if e["n"] == edit["n"]]
        highest = max(e["score"] for e in tried)
        nearly = [e["lam"] for e in tried if e["score"] >= highest - mass_edit.NEARLY]
        assert edit["lam"] == max(nearly), "the most careful of those that are nearly as good"


def test_scores_ask_the_edited_model_by_both_names_and_others_before_and_after(mass_runs):
    run, _ = mass_runs["lmc"]
    blank = models.Model(run.config, generator())  # it answers two names of a relation differently
    study = mass_edit.MassStudy(run, blank.requires_grad_(False), 100, 10)
    dW = normal(*study.weight.shape, seed=3).float() * study.weight.std()
    model = copy.deepcopy(study.model)
    editing.apply_edit(model, {study.at.name: dW})
    entry, group = study.entry("memit", "gradient", 1.0, 10), study.scoring
    group.requests.new[2:] = minedit.last_answers(model, group.requests.tokens[2:])
    study.score(entry, group.requests, {study.at.name: dW}, group)
    paths = study.run.paths
    queries, n_names = paths.queries, int(paths.facts[:, 1].max()) + 1

    def answers(model, tokens):
        return model(tokens)[:, -1].argmax(-1)

    asked, new = queries[group.requests.fact], group.requests.new
    assert entry.efficacy == float((answers(model, asked) == new).double().mean())
    assert entry.efficacy >= 0.8 and entry.paraphrase < 0.8
    asked = asked + torch.tensor([0, n_names])
    assert entry.paraphrase == float((answers(model, asked) == new).double().mean())
    spared = queries[group.spared]
    same = answers(model, spared) == answers(study.model, spared)
    assert entry.specificity == float(same.double().mean()) < 1


def test_scores_as_the_papers_count_them(mass_runs):
    """By hand, one question after another: which of two answers is likelier."""
    run, _ = mass_runs["lmc"]
    blank = models.Model(run.config, generator()).requires_grad_(False)
    study = mass_edit.MassStudy(run, blank, 100, 10)
    entry, group = study.entry("memit", "gradient", 1.0, 10), study.scoring
    requests, facts = group.requests, study.run.paths.facts
    request, other = study.neighbours(requests, group)
    assert torch.isin(other, group.spared).all()
    again = study.neighbours(requests[:4], group)
    mine = request < 4
    assert torch.equal(again[0], request[mine]) and torch.equal(again[1], other[mine])
    for i in range(len(requests)):
        rows = other[request == i]
        assert len(rows) == len(rows.unique()) <= mass_task.NEIGHBOURS
        assert (facts[rows, 2] != requests.new[i]).all()
        alike = group.spared[facts[group.spared, 1] == facts[requests.fact[i], 1]]
        alike = alike[facts[alike, 2] != requests.new[i]]
        n_alike = torch.isin(rows, alike).sum()
        assert n_alike == min(len(alike), mass_task.NEIGHBOURS), "of the relation first"
    study.score(entry, requests, {study.at.name: 0 * study.weight}, group)

    def likelier(tokens, one, two):
        rows = range(len(tokens))
        logits = blank(tokens)[:, -1]
        return sum(bool(logits[j, one[j]] > logits[j, two[j]]) for j in rows) / len(tokens)

    n_names = int(facts[:, 1].max()) + 1
    renamed = requests.tokens + torch.tensor([0, n_names])
    shares = [likelier(requests.tokens, requests.new, requests.old)]
    shares.append(likelier(renamed, requests.new, requests.old))
    shares.append(likelier(study.queries[other], facts[other, 2], requests.new[request]))
    assert shares == [entry.new_likelier, entry.new_likelier_paraphrase, entry.own_likelier]
    assert 0 < min(shares) < max(shares) < 1
    assert entry.paper_score == pytest.approx(300 / sum(1 / share for share in shares))


def test_the_most_careful_of_those_that_are_nearly_best_is_chosen():
    entries = [mass_edit.MassEntry("memit", "gradient", lam, 9) for lam in (30, 10, 3, 1)]
    for entry, score in zip(entries, (None, 80.0, 80.4, 70.0)):
        entry.score = score
    assert mass_edit.best(entries).strength == 10
    entries[2].score = 80.6
    assert mass_edit.best(entries).strength == 3


def test_alphaedit_is_given_its_ridge_in_squared_lengths_of_a_key(mass_runs):
    study = mass_edit.MassStudy(*mass_runs["lmc"], 100, 10)
    problem = study.problem(study.scoring, 6, "gradient")
    keys, _ = editing.record(study.model, study.at.layer, study.queries)
    squared = keys.double().square().sum(-1).mean()  # of ordinary keys, at every call and token
    dW = study.closed_form("alphaedit", problem.K, problem.r, (0.3, 2.0))
    C = study.at.C
    close(dW, editing.alphaedit_update(problem.K, problem.r, C, 0.3 * squared, threshold=2.0), 1e-6)
    entry = study.entry("alphaedit", "gradient", (0.3, 2.0), 6)
    assert (entry.strength, entry.threshold, entry.setting) == (0.3, 2.0, (0.3, 2.0))
    official = study.closed_form("alphaedit-official", problem.K, problem.r, (10.0, 1e9))
    options = {"threshold": 1e9, "absolute": True}
    close(official, editing.alphaedit_update(problem.K, problem.r, C, 10.0, **options), 1e-6)


def test_every_method_has_the_target_that_suits_it(mass_runs, monkeypatch):
    study = mass_edit.MassStudy(*mass_runs["lmc"], 100, 10)
    liked = {"memit": "official", "rome": "prototype", "emmet": "gradient"}

    def chosen(method, n, target):
        entry = study.entry(method, target, mass_edit.STRENGTHS[method][0], n)
        entry.score = 90.0 if liked[method] == target else 50.0
        return entry

    monkeypatch.setattr(study, "chosen", chosen)
    for method, target in liked.items():
        assert study.target(method, 3) == target
    assert study.target("finetune", 3) == "gradient"


def test_fine_tuning_ends_where_the_answers_are_given(mass_runs, monkeypatch):
    run, trained = mass_runs["lmc"]
    model = copy.deepcopy(trained)
    model.embedding.weight *= 10  # its answers can be as good as certain
    requests, steps = minedit.mass_plan(run.paths, run.stream()).requests[:3], []
    adam = torch.optim.Adam.step

    def counted(optimizer, *args):
        steps.append(1)
        return adam(optimizer, *args)

    monkeypatch.setattr(torch.optim.Adam, "step", counted)
    n_steps = []
    for bound in (1e-6, 5.0):
        steps.clear()
        peers.finetune_update(model, "memory.values", requests, bound, 100)
        n_steps.append(len(steps))
    assert n_steps[0] == 45 > n_steps[1] > 0


def test_a_key_of_zeros_fails_and_the_others_are_edited(mass_runs):
    study = mass_edit.MassStudy(*mass_runs["lmc"], 100, 10)
    dead = study.scoring.requests.fact[0]
    study.at.keys[dead] = 0
    for method in ("memit", "emmet", "rome", "alphaedit"):
        entry = study.edit(method, 10, "gradient")
        assert entry.infeasible is None or method == "alphaedit"
    assert capacity.update(study, study.scoring, 10, 1.0).score is not None
    assert capacity.update(study, study.scoring, 1, 1.0).efficacy in (0, 1)
    entries = sequence.in_batches(study, "anew", 10, 1.0)
    assert [entry.n for entry in entries] == list(range(1, 11))


def test_batches_sought_anew_see_the_edits_so_far(mass_runs, monkeypatch):
    study = mass_edit.MassStudy(*mass_runs["lmc"], 100, 9)
    weight, seen, carried = study.weight.clone(), [], []
    sought, memit = study.mass_residual, minedit.memit

    def recorded(*args):
        seen.append((study.at.layer.weight.detach() - weight).norm())
        return sought(*args)

    def only_the_first(*args, **options):
        carried.append(copy.deepcopy(options["carried"]))  # it is added to in place
        dW = memit(*args, **options)
        return dW if len(carried) == 1 else 0 * dW

    monkeypatch.setattr(study, "mass_residual", recorded)
    monkeypatch.setattr(minedit, "memit", only_the_first)
    entries = sequence.in_batches(study, "anew", 3, 0.01)
    assert len(seen) == 4, "once for all, then for each batch"
    assert seen[1] == 0 < seen[2] == seen[3]
    keys = study.at.keys[study.scoring.requests.fact].double()
    assert carried[0] is None
    close(carried[2], keys[:6].T @ keys[:6])
    assert entries[0].first == entries[0].efficacy > 0.5, "later batches write nothing here"
    assert [entry.first for entry in entries] == [entries[0].first] * 3
    assert entries[2].efficacy < entries[0].efficacy


def test_blocks_are_asked_for_what_is_missing_in_the_stream_after_them(mass_runs, monkeypatch):
    study, asked = mass_edit.MassStudy(*mass_runs["dense"], 100, 5), []
    layers = editing.memit_layers

    def recorded(*args):
        asked.append(args)
        return layers(*args)

    monkeypatch.setattr(editing, "memit_layers", recorded)
    for first, last in ((0, 0), (0, 1), (1, 1)):
        study.over_blocks(first, last, study.scoring, 5, 1.0)
        model, sites, requests, r, _, _, stream = asked[-1]
        assert sites == [(f"blocks.{i}.feed_forward.down", 0) for i in range(first, last + 1)]
        before, _ = editing.last_token(model, *stream, requests.tokens)
        _, after = editing.last_token(model, f"blocks.{last}", 0, requests.tokens)
        assert torch.equal(before, after)
        close(study.after(f"blocks.{last}").values[requests.fact], after, 1e-6)
        store, rows = model.get_submodule(f"blocks.{last}.feed_forward"), torch.arange(5)
        then = model(requests.tokens)[:, -1].log_softmax(-1)[rows, requests.new]
        with editing.added(store, r, [0]):
            now = model(requests.tokens)[:, -1].log_softmax(-1)[rows, requests.new]
        assert (now > then).all(), "r is what brings the new answers"


@pytest.mark.parametrize(
    "study, wrong",
    [
        (mass_edit, "--counts 0"),
        (mass_edit, "--counts 10 -5"),
        (mass_edit, "--methods emmett"),
        (mass_edit, "--branches 1"),
        (capacity, "--counts 0"),
        (sequence, "--batches 0"),
        (sequence, "--facts none"),
        (sequence, "--entities 8 --relations 1 --out-degree 1"),
    ],
)
def test_mass_edits_that_cannot_be_are_refused_before_any_training(
    study, wrong, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(minedit.Run, "train", None)
    options = [*TINY[4:], "--branches", "0", *wrong.split(), "--out", tmp_path / "r"]
    refused(capsys, study, *options)
    assert not list(tmp_path.glob("r/*.json*"))


def test_the_official_target_search_keeps_its_length_and_finds_answers(world):
    model, at, requests = world.model.float(), copy.copy(world.at), world.requests
    at.values, before = at.values.float(), weights_of(model)
    try:
        _, stream = editing.last_token(model, "blocks.0", 0, world.paths.queries)
        r = peers.official_residual(model, at, stream.detach(), requests, 3)
        assert (r.norm(dim=-1) <= 0.7501 * stream[requests.fact].norm(dim=-1)).all()
        assert_same(model, before)

        def added(_, value):
            return torch.cat([value[:, :-1], value[:, -1:] + r[:, None]], 1)

        with editing.intervene(at.layer, added, calls=[at.call]):
            now = model(requests.tokens)[:, -1].log_softmax(-1)
        then = model(requests.tokens)[:, -1].log_softmax(-1)
        rows = torch.arange(4)
        assert (now[rows, requests.new] > then[rows, requests.new]).all()
    finally:
        model.double()


def test_constrained_fine_tuning_keeps_its_bound_and_writes(world):
    model, layer, requests = world.model, world.at.layer, world.requests
    before, limit = weights_of(model), 0.1 * layer.weight.square().mean().sqrt()
    dW = peers.finetune_update(model, "memory.values", requests, 0.1, 100)
    assert 0.9 * limit < dW.abs().max() <= 1.0001 * limit
    close(peers.finetune_update(model, "memory.values", requests, 0.1, 3), dW, 1e-6)
    large = peers.finetune_update(model, "memory.values", requests, 20.0, 100)
    assert_same(model, before)
    with editing.edited(model, {"memory.values": large}):
        assert torch.equal(model(requests.tokens)[:, -1].argmax(-1), requests.new)


# --- ablation: the mixture ------------------------------------------------------------------------


def mixture(zipf=0.0, n_open_book=0, **recipe):
    batches = ablation.Mixture(tiny_paths(None), minedit.Recipe(**recipe), generator(2))
    batches.n_open_book, batches.n_entities = n_open_book, 10
    if zipf:
        batches.weights = ablation.zipf_weights(40, zipf, seed=1)
    return batches


@pytest.mark.parametrize("batch", [16, 256])
def test_facts_are_drawn_as_often_as_their_weights_say(batch):
    """Whatever the batch, which is large against the number of facts: with replacement."""
    batches, n = mixture(zipf=1.0, batch=batch), 160_000
    drawn = torch.cat([batches.draw_facts() for _ in range(n // batch)])
    p = batches.weights / batches.weights.sum()
    count = torch.bincount(drawn, minlength=40)
    assert ((count - n * p).abs() < 5 * (n * p * (1 - p)).sqrt()).all()
    order = p.argsort()
    asked = p[order[-8:]].sum() / p[order[:8]].sum()  # the most frequent fifth to the least
    realized = count[order[-8:]].sum() / count[order[:8]].sum()
    assert realized == pytest.approx(float(asked), rel=0.05)


def test_open_book_prompts_are_answered_by_the_prompt_alone():
    batches = mixture(n_open_book=8)
    tokens, told = batches.open_book(4000)
    assert torch.equal(tokens[:, :2], tokens[:, 3:]) and torch.equal(tokens[:, 2], told)
    fact = {(h, r): t for h, r, t in batches.paths.facts.tolist()}
    tails = torch.tensor([fact[h, r - 10] for h, r in tokens[:, :2].tolist()])
    assert 0.05 < (tails == told).double().mean() < 0.15, "the fact says no more than chance"
    batch = batches.mixture(1)[-1]
    assert batch[0].shape == (8, 5) and (batch[1][:, :4] == -100).all()


def test_arithmetic_relations_add_a_constant():
    plain = kg.synthetic(11, 5, 3)
    graph = ablation.arithmetic_graph(plain, 2, 3)
    shift = (graph.facts[:, :2] - torch.arange(11)[:, None]) % 11
    assert (shift == shift[0]).all() and (shift > 0).all()
    assert torch.equal(graph.facts[:, 2:], plain.facts[:, 2:])
    for seed in range(30):
        shifts = ablation.arithmetic_graph(plain, 5, seed).facts[0]
        assert len(shifts.unique()) == 5, "no two relations are the same"
    sparse = kg.synthetic(11, 5, 3, out_degree=2)
    filled = ablation.arithmetic_graph(sparse, 2, 3).facts >= 0
    assert torch.equal(filled, sparse.facts >= 0), "no new facts"


# --- ablation: controls ---------------------------------------------------------------------------


class Layer:
    """W [5, 9], A with two dead inputs, G with a dead output."""

    def __init__(self):
        a = normal(50, 9) * torch.logspace(0, -2, 9, dtype=torch.float64)
        g = normal(50, 5, seed=1) @ normal(5, 5, seed=2)
        a[:, [2, 6]], g[:, 3] = 0, 0
        self.W, self.A, self.G = normal(5, 9, seed=3), a.T @ a / 50, g.T @ g / 50
        self.all = (self.W, self.A, self.G)

    def bases(self, name):
        """U [5, k], V [9, k] in which the control sees W."""
        U_G, U_A = eigen(self.G).vectors, eigen(self.A).vectors
        eye5, eye9 = torch.eye(5).double(), torch.eye(9).double()
        if name == "random":
            draw = generator(7)
            U = controls.random_orthogonal(5, draw)
            return U, controls.random_orthogonal(9, draw)
        if name == "svd":
            U, _, Vh = torch.linalg.svd(self.W, full_matrices=False)
            return U, Vh.T
        found = {"kfac": (U_G, U_A), "activations": (eye5, U_A), "gradients": (U_G, eye9)}
        return found.get(name, (eye5, eye9))


@pytest.fixture
def layer():
    return Layer()


@pytest.mark.parametrize("name", ["kfac", "random", "activations", "gradients", "svd", "magnitude"])
def test_controls_keep_what_they_are_asked_to(layer, name):
    W, (U, V) = layer.W, layer.bases(name)
    last, norms = torch.zeros(5, V.shape[1]).bool(), [1.0]
    for kept in range(1, 6 if name == "svd" else 46):
        new = controls.control(name, *layer.all, kept, generator(7))
        C = U.T @ new @ V
        mask = C.abs() > 1e-11
        assert int(mask.sum()) == kept == int((mask | last).sum()), "one more than before"
        close(C[mask], (U.T @ W @ V)[mask])
        last = mask
        norms.append(float((W - new).norm() / W.norm()))
    assert norms[-1] < 1e-12 and norms == sorted(norms, reverse=True)
    for removed in (0.9, 0.5, 0.1, 0.0):
        new = controls.control(name, *layer.all, generator=generator(7), removed=removed)
        largest = max(n for n in norms if n <= removed + 1e-12)
        assert float((W - new).norm() / W.norm()) == pytest.approx(largest, abs=1e-9)


def test_controls_are_what_they_are_called(layer):
    W, A, G = layer.all
    values = torch.linalg.svdvals(W)
    low_rank = controls.control("svd", W, A, G, 3)
    assert torch.linalg.matrix_rank(low_rank) == 3
    assert float((W - low_rank).norm()) == pytest.approx(float(values[3:].norm()))
    largest = W.abs() >= W.abs().flatten().sort().values[-10]
    assert torch.equal(controls.control("magnitude", W, A, G, 10) != 0, largest)
    n = int(keep_mask(A, G, 0.8).sum())
    assert torch.equal(controls.control("kfac", W, A, G, n), ablate(W, A, G, 0.8))
    n = int(keep_mask(A, torch.eye(5), 0.8).sum())
    close(controls.control("activations", W, A, G, n), ablate(W, A, torch.eye(5), 0.8))


@pytest.mark.parametrize(
    "name, options, words",
    [
        ("pca", {"kept": 3}, "pca.*svd"),
        ("svd", {"kept": 6}, r"0\.\.5.*6"),
        ("random", {"kept": 46}, "46"),
        ("kfac", {}, "None"),
        ("kfac", {"removed": 1.0}, "either kept"),
        ("kfac", {"kept": 3, "removed": 0.5}, "either kept"),
    ],
)
def test_bad_controls_are_refused(layer, name, options, words):
    with pytest.raises(ValueError, match=words):
        controls.control(name, *layer.all, **options)


def test_a_random_basis_is_orthogonal_and_uniform():
    Q = controls.random_orthogonal(6, generator(1))
    close(Q.T @ Q, torch.eye(6).double(), 1e-12)
    draw = generator(3)
    many = torch.stack([controls.random_orthogonal(3, draw) for _ in range(4000)])
    assert many.mean(0).abs().max() < 0.04
    assert (many.square().mean(0) - 1 / 3).abs().max() < 0.02
    assert 0.45 < (torch.linalg.det(many) > 0).double().mean() < 0.55, "and reflections"


def test_a_learned_mask_forgets_and_keeps():
    """Inputs 0-7 carry the label; each of four exceptions has an input of its own, with the largest
    weights, against it."""
    x = normal(60, 12)
    x[:, 8:] = 0
    y = (x[:, 0] > 0).long()
    x[:4, 0], x[:4, 8:] = x[:4, 0].sign(), torch.eye(4)
    wrong = 1 - y[:4]
    model = nn.Sequential(nn.Linear(12, 2, bias=False)).double().requires_grad_(False)
    W = torch.zeros(2, 12).double()
    W[:, 0], W[:, 1:8] = torch.tensor([-2.0, 2.0]), 0.1 * normal(2, 7, seed=1)
    W[wrong, torch.arange(8, 12)] = 9.0
    model[0].weight.data = W.clone()

    def right(inputs, labels):
        return float((model(inputs).argmax(-1) == labels).double().mean())

    held = right(x[4:], y[4:])
    assert right(x[:4], wrong) == 1 and held > 0.9
    batches = ([(x[:4], wrong)], [(x[4:], y[4:])], F.cross_entropy, ["0"])
    new = controls.learned_mask(model, *batches, share=0.5)
    assert int((new["0"] != 0).sum()) == 12 and ((new["0"] == W) | (new["0"] == 0)).all()
    assert torch.equal(model[0].weight, W)
    with ablated(model, new):
        assert right(x[:4], wrong) == 0 and right(x[4:], y[4:]) >= held


@pytest.mark.parametrize("best", [(2.0, 3.0), (1.0, None), (None, 2.0)])
def test_a_search_finds_the_strength_of_each_group(best):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).requires_grad_(False)
    before = weights_of(model)
    options, want = {}, []
    for i, strength in enumerate(best):
        options[str(i)] = {s: {str(i): torch.full((3, 3), s)} for s in (1.0, 2.0, 3.0)}
        old = model[i].weight.clone()
        want.append(old if strength is None else torch.full((3, 3), strength))

    def value(m):
        return -sum((m[i].weight - want[i]).norm().item() for i in (0, 1))

    chosen, found = controls.search(model, value, options)
    assert tuple(chosen.values()) == best
    assert found.keys() == {group for group in "01" if chosen[group] is not None}
    assert_same(model, before)


def test_methods_are_compared_at_what_they_are_said_to_match():
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).double()
    x, y = normal(60, 6), torch.randint(5, (60,), generator=generator())
    names = ["0", "2"]
    spectrum = curvature.spectrum(model, [(x, y)], F.cross_entropy, names, generator)
    before, seen = weights_of(model), []

    def measure(m):
        seen.append({name: m.get_submodule(name).weight.detach().clone() for name in names})
        return {"size": float(m(x).detach().norm())}

    def value(m):
        return -abs(float(m(x).detach().norm()) - 3)

    groups = {"a": ["0"], "b": ["2"]}
    options = (groups, (0.9, 0.6), (0.1, 0.5), generator())
    found = controls.compare(model, measure, value, spectrum, *options)
    best, outcomes = found.best, found.outcomes
    assert_same(model, before)
    methods = [o.method for o in outcomes[:8]]
    assert methods == ["before", *controls.KEEPING, *controls.CONTROLS]
    assert best in outcomes[1:3] and best.value == max(o.value for o in outcomes[1:3])
    kinds = set(itertools.product(controls.CONTROLS, ("parts", "norm"))) - {("svd", "parts")}
    assert {(o.method, o.matched) for o in outcomes[8:]} == kinds
    for o, now in zip(outcomes[8:], seen[8:]):
        if o.matched == "norm":
            assert o.removed <= best.removed + 1e-9
        if (o.method, o.matched) == ("magnitude", "parts"):
            for group, (name,) in groups.items():
                if name not in found.weights:
                    continue
                masses = spectrum.masses[name] if best.method == "ekfac" else None
                mask = keep_mask(*spectrum.factors[name], best.strengths[group], masses)
                assert int((now[name] != 0).sum()) == int(mask.sum())


# --- ablation: the study --------------------------------------------------------------------------


def test_images_are_noisy_shapes_in_order():
    patches, kind = images.shapes(400, generator())
    assert patches.shape == (400, 16, 32) and kind.unique().tolist() == list(range(8))
    assert torch.equal(patches, images.shapes(400, generator())[0])
    pictures = patches[..., :16].view(400, 4, 4, 4, 4).transpose(2, 3).reshape(400, 16, 16)
    steps = (pictures[:, 1:] - pictures[:, :-1]).abs().mean()
    assert steps < (pictures[:, 1:] - pictures[:, :-1].flip(1)).abs().mean(), "in order"
    area = (pictures > 0.5).double().mean((1, 2))
    assert area[kind == 0].mean() > area[kind == 1].mean(), "a disc is more than a ring"


def tables_in(folder):
    """Every table of the report of a folder."""
    return [str(make(runs.read_groups([folder]))) for make in report.TABLES]


ABLATION = [*TINY, "--label-noise", "0.2", "--arithmetic", "1", "--open-book", "4"]
ABLATION += ["--memorize", "5", "--images", "0", "--quick"]  # quick: fewer strengths are tried


def run_ablation(arch, folder):
    n_images = 60 if arch == "dense" else 0
    options = [*ABLATION, "--arch", arch, "--images", n_images, "--out", folder]
    assert run_study(ablation, *options) == 0


@pytest.fixture(scope="module")
def ablation_runs(tmp_path_factory):
    """The folder of the study of ablation in Dense, with images, and in LMC."""
    folder = tmp_path_factory.mktemp("ablation")
    for arch in ("dense", "lmc"):
        run_ablation(arch, folder / arch)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["dense", "lmc"])
def test_the_ablation_study(ablation_runs, tmp_path, arch):
    folder = ablation_runs / arch
    found = results_of(folder)["ablation"]
    assert ("vision" in found) == (arch == "dense")
    first = found["relearning"]["old"][0]
    for name in ("recited", "true", "id"):
        assert first[name] == found["chosen"][name], "relearning starts where the ablation ended"
    assert first["lost"] in (0, None), "what was lost is not recited"
    assert found["before"]["removed"] == 0
    everything.collect(folder, tmp_path / "kept")
    assert tables_in(folder) == tables_in(tmp_path / "kept")


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["dense", "lmc"])
def test_the_ablation_study_leaves_the_model_and_finds_the_same_again(
    ablation_runs, tmp_path, arch
):
    first, again = ablation_runs / arch, tmp_path / "again"
    shutil.copytree(first, again)
    run_ablation(arch, again)
    weights = checkpoint(again)["average"]
    for name, weight in checkpoint(first)["average"].items():
        assert torch.equal(weight, weights[name])
    before, after = results_of(first)["ablation"], results_of(again)["ablation"]
    for name in ("chosen", "sweep", "relearning"):
        assert after[name] == before[name]


def ablation_args(folder, *options):
    parsed = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(minedit, "guarded", lambda command, args: parsed.append(args) or 0)
        ablation.main([*ABLATION, *options, "--out", str(folder)])
    return parsed[0]


def test_what_an_ablation_asks_for_is_true(tmp_path):
    args = ablation_args(tmp_path / "n")
    run = ablation.prepare(args)[0]
    batches = run.make_batches(run.paths, run.recipe, generator())
    weights = ablation.zipf_weights(len(run.paths.facts), 1.0, 0)
    questions = ablation.Questions(run, batches, weights, 1)
    mask, true = questions.paths["true"]
    exceptions = run.paths.masks["exceptions"]
    assert torch.equal(mask, exceptions)
    assert torch.equal(true != run.paths.two_hop, exceptions), "exceptions are trained wrong"
    assert not questions.scored[questions.choosing].any(), "what chooses is not scored"


def test_a_learned_mask_is_asked_to_keep_no_exception(tmp_path, monkeypatch):
    run = ablation.prepare(ablation_args(tmp_path / "n"))[0]
    batches = run.make_batches(run.paths, run.recipe, generator())
    questions = ablation.Questions(run, batches, torch.ones(len(run.paths.facts)), 1)
    exceptions = {tuple(row) for row in run.paths.tokens[run.paths.masks["exceptions"]].tolist()}
    told = {"forget": [], "keep": []}

    def learned_mask(model, forget, keep, *_, **__):
        for name, batches in (("forget", forget), ("keep", keep)):
            for tokens, targets in batches:
                told[name] += [tuple(row) for row in tokens[targets[:, 2] >= 0, :3].tolist()]
        return {}

    monkeypatch.setattr(ablation, "learned_mask", learned_mask)
    ablation.learned_outcome(run.fresh().model, questions, [])
    assert told["forget"] and exceptions.issuperset(told["forget"])
    assert told["keep"] and exceptions.isdisjoint(told["keep"])


@pytest.mark.parametrize(
    "options, words",
    [
        ("--label-noise 0", "--label-noise"),
        ("--branches 0", "--branches"),
        ("--arithmetic 5", "--arithmetic must be at most --relations, got 5"),
        ("--zipf -1", "--zipf must be 0 or more"),
        ("--open-book -3", "--open-book must be 0 or more"),
        ("--images 9", "--images must be 0, or 20 at least"),
        ("--label-noise 1e-3", "too few exceptions, 0"),
        ("--label-noise 8e-3", "too few exceptions, 1"),
        ("--label-noise 8e-3 --seed 7", "too few exceptions, 1"),
    ],
)
def test_bad_ablations_are_refused_before_training(tmp_path, capsys, options, words):
    arguments = [*ABLATION, *options.split(), "--out", tmp_path / "a"]
    assert words in refused(capsys, ablation, *arguments)
    assert not (tmp_path / "a").exists()


def test_the_arithmetic_graph_has_as_many_paths_as_are_asked_for(tmp_path):
    n_paths = {}
    for most in (120, 1000):
        args = ablation_args(tmp_path / str(most), "--most-paths", str(most))
        n_paths[most] = len(ablation.prepare(args)[0].paths.first)
    assert n_paths[120] <= 120 < n_paths[1000]


@pytest.mark.parametrize("study", [circuits, propagation, second_moment, shrinkage])
def test_a_graph_without_a_fact_that_can_be_edited_is_refused(tmp_path, capsys, study):
    (tmp_path / "g.tsv").write_text("".join(f"e{i}\tr{i}\te{(i + 1) % 9}\n" for i in range(9)))
    arguments = ["--triples", tmp_path / "g.tsv", "--out", tmp_path / "c", "--ood-fraction", 0]
    assert "no fact can be edited" in refused(capsys, study, *arguments)
    assert not (tmp_path / "c").exists()


def test_open_book_prompts_weigh_as_much_as_compositions():
    """loss = (w facts + compositions + prompts) / (w + 1)"""
    recipe = minedit.Recipe(batch=16, label_smoothing=0.1, one_hop_weight=3.0)
    with_book, without = (mixture(n_open_book=n, batch=16) for n in (8, 0))
    weight = torch.randn(20, 10, generator=generator())

    def forward(tokens, positions=None):
        return weight[tokens % 20]

    plain = without.loss(forward, recipe)
    tokens, told = without.open_book(8)  # from where the same stream is now
    book = F.cross_entropy(forward(tokens)[:, -1], told, label_smoothing=0.1)
    torch.testing.assert_close(with_book.loss(forward, recipe), plain + book / 4)


# --- ablation: controls ---------------------------------------------------------------------------


def test_what_is_removed_is_a_share_of_all_layers_that_change():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).requires_grad_(False)
    model[0].weight.copy_(torch.tensor([[3.0, 0.0], [0.0, 0.0]]))
    model[1].weight.copy_(torch.tensor([[0.0, 4.0], [0.0, 0.0]]))
    new = {"0": torch.zeros(2, 2), "1": model[1].weight.clone()}
    before = weights_of(model)
    found = controls.outcome(model, lambda m: {"norm": float(m[0].weight.norm())}, new, "x")
    assert found.removed == pytest.approx(3 / 5)
    assert found.shares == {"norm": 0.0}, "measured with the new weights"
    assert_same(model, before)


AREAS = {  # in units of the squared radius
    "disc": math.pi,
    "ring": math.pi * (1 - 0.6**2),
    "square": 1.7**2,
    "frame": 1.9**2 - 1,
    "diamond": 2,
    "plus": 2 * 0.6 * 2 - 0.6**2,
    "triangle": 1.9**2 / 2,
    "cross": 2 * (1.8**2 - 1.4**2) - 0.8**2 / 2,
}


@pytest.fixture(scope="module")
def area():
    """Of each kind of shape, a mean over many radii, in pixels."""
    patches, kind = images.shapes(8000, generator())
    covered = (patches[..., :16] > 0.5).double().sum((1, 2))
    return torch.stack([covered[kind == k].mean() for k in range(8)])


@pytest.mark.parametrize("name", AREAS)
def test_shapes_are_what_they_are_called(area, name):
    k = list(AREAS).index(name)
    assert float(area[k] / area[0]) == pytest.approx(AREAS[name] / math.pi, abs=0.04)


@pytest.mark.slow
def test_wrong_labels_of_images_are_few_and_trained():
    """A transformer that was trained on wrong labels alone would name fewer shapes than chance."""
    options = (generator(1), generator, (0.9,), (0.3,))
    before = images.images_stage(400, *options)[0].shares
    assert before["validation"] > 2 / 8, "twice chance"
    assert before["memorized"] + before["true"] <= 1


def test_ablations_are_chosen_by_paths_of_every_kind_that_they_may_harm(tmp_path):
    run = ablation.prepare(ablation_args(tmp_path / "n"))[0]
    batches = run.make_batches(run.paths, run.recipe, generator())
    weights = ablation.zipf_weights(len(run.paths.facts), 1.0, 0)
    questions = ablation.Questions(run, batches, weights, 1)
    masks = run.paths.masks
    asked = masks["exceptions"] | masks["id"] | masks["ood"]
    asked = asked | masks["ood_first"] | masks["ood_second"]
    wanted = (asked & masks["validation"]).nonzero().flatten()
    assert 0 < len(wanted) < 150, "so few that all are taken"
    assert torch.equal(questions.choosing.sort().values, wanted)
    arithmetic, rare, frequent = (
        questions.facts[name][0] for name in ("arithmetic", "rare", "frequent")
    )
    middle = ~(arithmetic | rare | frequent)
    assert rare.any() and frequent.any() and not (arithmetic & (rare | frequent)).any()
    assert weights[rare].max() < weights[middle].min()
    assert weights[middle].max() < weights[frequent].min()


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["dense", "lmc"])
def test_the_sweep_removes_more_the_less_is_kept(ablation_runs, arch):
    sweep = results_of(ablation_runs / arch)["ablation"]["sweep"]
    removed = [entry["removed"] for entry in sweep]
    assert removed == sorted(removed) and 0 < removed[0] < removed[-1] < 1
    assert [entry["keep"] for entry in sweep] == list(ablation.KEEPS)


def test_other_answers_are_wrong_and_new(tmp_path):
    run = ablation.prepare(ablation_args(tmp_path / "n"))[0]
    paths = run.paths
    exceptions = paths.masks["exceptions"].nonzero().flatten()
    assert len(exceptions) > 20
    which = torch.zeros(len(paths.tokens), dtype=torch.bool).index_fill(0, exceptions[::2], True)
    child = ablation.with_other_answers(run, which)
    true = paths.facts[paths.second, 2]
    assert torch.equal(child.paths.two_hop[~which], paths.two_hop[~which])
    for answers in (true, paths.two_hop):
        assert (child.paths.two_hop != answers)[which].all()
    assert child.paths.two_hop[which].unique().numel() > 5, "any entity"
    assert run.paths is paths


def test_other_answers_are_all_alike_likely(tmp_path):
    run = ablation.prepare(ablation_args(tmp_path / "n"))[0]
    n, n_rows = run.task.graph.n_answers, 20000
    true = torch.zeros(n_rows, dtype=torch.long)
    run.paths = SimpleNamespace(true_two_hop=true, two_hop=true + 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ablation, "replace", lambda paths, two_hop: two_hop)
        answers = ablation.with_other_answers(run, true == 0).paths
    counts = answers.bincount(minlength=n) / n_rows
    assert counts[0] == counts[2] == 0
    others = counts[[i for i in range(n) if i not in (0, 2)]]
    assert (others - 1 / (n - 2)).abs().max() < 0.01


def test_lost_exceptions_were_recited_before_and_are_no_more(tmp_path):
    run = ablation.prepare(ablation_args(tmp_path / "n", "--arch", "lmc"))[0]
    model = run.fresh().model
    before = minedit.predict(model, run.paths)[1]
    is_recited = torch.arange(len(before)) % 3 > 0
    run.paths = replace(run.paths, two_hop=torch.where(is_recited, before, before + 1))
    values = model.memory.values.weight.detach()
    lost = ablation.lost_exceptions(run, model, {"memory.values": 0 * values})
    with editing.edited(model, {"memory.values": -values}):
        after = minedit.predict(model, run.paths)[1]
    exceptions = run.paths.masks["exceptions"]
    assert torch.equal(lost, exceptions & is_recited & (after != before))
    assert 0 < lost.sum() < (exceptions & is_recited).sum()
    assert torch.equal(minedit.predict(model, run.paths)[1], before), "the model is as it was"


@pytest.mark.slow
def test_controls_in_the_attention_change_it_as_much(tmp_path, monkeypatch):
    options = [*TINY, "--arch", "lmc", "--label-noise", "0.2", "--memorize", "5"]
    assert run_study(attention, *options, "--out", tmp_path / "r") == 0
    records = results_of(tmp_path / "r")["attention"]
    assert len(records) == len(minedit.KEEPS) * (1 + len(controls.CONTROLS))
    for keep in minedit.KEEPS:
        by_method = {r["method"]: r["removed"] for r in records if r["keep"] == keep}
        kfac = by_method.pop("kfac")
        for method, removed in by_method.items():
            assert 0 < removed <= kfac + 1e-9, method
            assert removed > 0.7 * kfac or method == "svd", "svd has few components here"
    assert minedit.main([*map(str, options), "--ablate", "--out", str(tmp_path / "r")]) == 0
    in_the_core = results_of(tmp_path / "r")["ablate"]
    mine = [r for r in records if r["method"] == "kfac"]
    assert mine == [r for r in in_the_core if r["method"] == "kfac"]
    groups = runs.read_groups([tmp_path / "r"])
    methods = {row[1] for row in circuit_tables.exceptions_table(groups).rows[1:]}
    assert methods == {"before", "kfac", "ekfac", "learnt", *controls.CONTROLS}


def test_relearning_goes_on_with_the_last_steps(tmp_path):
    """The recipe of the last steps from step `first` on, optimizers and stream anew, the average
    started at the weights."""
    run = ablation.prepare(ablation_args(tmp_path / "n"))[0]
    first = run.recipe.steps
    weights = {name: 0.5 * p for name, p in run.fresh().model.state_dict().items()}
    moments = further(run, weights, [0, 3], first)
    assert_same(next(moments).average, weights)
    after = next(moments)

    reference = minedit.Training(run.config, run.recipe, run.seed, run.device)
    reference.model.load_state_dict(weights)
    reference.average.load_state_dict(weights)
    batches = run.make_batches(run.paths, run.recipe, reference.generator)
    for step in range(first, first + 3):
        reference.step(batches, run.recipe.at(first), step)
    assert run.recipe.at(first) != run.recipe, "the last steps are gentle"
    assert after.steps == 3
    assert_same(after.model, reference.model.state_dict())
    assert_same(after.average, reference.average.state_dict())


# --- circuits: regimes and moments ----------------------------------------------------------------


def triples(paths, name, n_entities=0):
    tokens = paths.tokens[paths.masks[name]] - torch.tensor([0, n_entities, n_entities])
    return set(map(tuple, tokens.tolist()))


@pytest.mark.parametrize("out_degree", [None, 5])
@pytest.mark.parametrize("regime", ["first-hop", "second-hop", "both-hops"])
def test_regimes_never_ask_what_they_train(regime, out_degree):
    natural = kg.split(kg.synthetic(20, 8, 3, out_degree), 0.2, 0.7, 3)
    paths = circuits.with_regime(natural, regime, 0.3, 3)
    trained = triples(paths, "train")
    for name in kg.SPLITS[1:]:
        assert not trained & triples(paths, name)
    added = trained - triples(natural, "train")
    assert triples(natural, "train") <= trained and triples(paths, "id") == triples(natural, "id")
    assert triples(paths, "ood") == triples(natural, "ood"), "two OOD facts never meet in training"
    for name in ("ood_first", "ood_second"):
        before, now = triples(natural, name), triples(paths, name)
        n = round(0.3 * len(before)) if name in circuits.REGIMES[regime] else 0
        assert len(added & before) == n == len(before) - len(now)


@pytest.mark.parametrize("options", ["--regime first-hop", "--augment 0.5"])
def test_a_regime_and_its_share_need_each_other(tmp_path, capsys, options):
    arguments = [*TINY, *options.split(), "--out", tmp_path / "r"]
    assert "--augment" in refused(capsys, circuits, *arguments)
    arguments = [*TINY, "--regime", "first-hop", "--augment", "1.5", "--out", tmp_path / "r"]
    assert "1.5" in refused(capsys, circuits, *arguments)


def toy_run(folder, *options):
    args = minedit.core_parser().parse_args([*TINY, *options, "--out", str(folder / "r")])
    return minedit.prepare(args)[0]


def test_four_moments_of_a_training_are_kept(tmp_path, monkeypatch):
    shares, facts = iter([0.2, 0.8, 0.95, 0.99, 1.0, 0.8, 1.0]), iter([0.99] * 7)
    monkeypatch.setattr(minedit, "accuracy", lambda *_: accuracies(next(shares), next(facts)))
    run = toy_run(tmp_path, "--steps", "7", "--eval-every", "1")
    moments = training.Moments(run)
    end = run.train(moments).state_dict()
    steps = {name: record["step"] for name, (record, _) in moments.found.items()}
    assert steps == {"facts": 1, "before": 2, "memorized": 4, "end": 7}
    again = toy_run(tmp_path, "--steps", "7", "--eval-every", "1")
    for name, (_, weights) in training.Moments(again).found.items():
        same = all(torch.equal(weights[key], end[key]) for key in weights)
        assert same == (name == "end")


def accuracies(share, facts):
    return dict.fromkeys(minedit.LABELS, share) | {"one_hop": facts}


@pytest.mark.parametrize("facts, last", [([0.9, 0.9], None), ([0.9, 0.99], 2), ([0.99, 0.99], 2)])
def test_facts_are_known_before_they_are_composed(tmp_path, facts, last):
    run = toy_run(tmp_path, *STEPS)
    known = [*facts, 1.0, 1.0]
    for step, share in enumerate([0.2, 0.29, 0.3, 0.99], 1):
        run.history.append({"step": step} | accuracies(share, known[step - 1]))
    assert training.moments_due(run).get("facts") == last


def test_a_run_without_its_moments_is_refused(tmp_path, capsys):
    assert minedit.main([*TINY, "--out", str(tmp_path / "core")]) == 0
    error = refused(capsys, circuits, *TINY, "--out", tmp_path / "core")
    assert "moments are not kept" in error and "--retrain" in error


class Interrupted(Exception):
    pass


def train_until(run, last, moments=None):
    """As a run that is interrupted at its evaluation at step `last`, before the checkpoint."""

    def watch(trained, record):
        if moments is not None:
            moments(trained, record)
        if record["step"] == last:
            raise Interrupted

    with pytest.raises(Interrupted):
        run.train(watch)


STEPS = ["--steps", "7", "--eval-every", "1"]


def test_a_run_half_trained_without_its_moments_is_refused(tmp_path):
    train_until(toy_run(tmp_path, *STEPS), 4)
    with pytest.raises(minedit.UserError, match=r"not kept \(before\); use --retrain"):
        training.Moments(toy_run(tmp_path, *STEPS, "--resume"))


def test_a_moment_that_was_kept_at_an_earlier_step_is_not_taken_for_a_later_one(tmp_path):
    run = toy_run(tmp_path, *STEPS)
    train_until(run, 2, training.Moments(run))
    train_until(toy_run(tmp_path, *STEPS, "--resume"), 4)  # without the study
    with pytest.raises(minedit.UserError, match=r"not kept \(before\); use --retrain"):
        training.Moments(toy_run(tmp_path, *STEPS, "--resume"))


@pytest.mark.parametrize("last", [1, 2, 3, 4, 5])
def test_an_interrupted_run_keeps_the_moments_of_an_uninterrupted_one(tmp_path, monkeypatch, last):
    shares = {1: 0.2, 2: 0.8, 3: 0.95, 4: 0.99, 5: 1.0, 6: 0.8, 7: 1.0}
    found = {}
    for name in ("whole", "resumed"):
        run = toy_run(tmp_path / name, *STEPS)
        monkeypatch.setattr(minedit, "accuracy", lambda *_: accuracies(shares[run.step], 1.0))
        if name == "resumed":
            train_until(run, last, training.Moments(run))
            run = toy_run(tmp_path / name, *STEPS, "--resume")
            assert run.step == last - 1
        moments = training.Moments(run)
        run.train(moments)
        found[name] = moments.found
    names = {"facts", "before", "memorized", "end"}
    assert found["whole"].keys() == found["resumed"].keys() == names
    for name, (entry, weights) in found["whole"].items():
        again, their_weights = found["resumed"][name]
        assert entry["step"] == again["step"]
        assert all(torch.equal(weights[key], their_weights[key]) for key in weights)


def test_a_training_that_is_made_longer_keeps_its_moments(tmp_path):
    first = toy_run(tmp_path, *STEPS)
    first.train(training.Moments(first))
    longer = toy_run(tmp_path, "--steps", "9", "--eval-every", "1", "--resume")
    moments = training.Moments(longer)
    assert moments.found["end"][0]["step"] == 7
    longer.train(moments)
    assert moments.found["end"][0]["step"] == 9


def test_moments_of_a_run_that_was_replaced_are_not_read(tmp_path):
    first = toy_run(tmp_path)
    first.train(training.Moments(first))
    other = ["--lr", "0.001"]
    toy_run(tmp_path, *other, "--retrain").train()
    assert (tmp_path / "r" / "moments.pt").exists()
    with pytest.raises(minedit.UserError, match="moments are not kept"):
        training.Moments(toy_run(tmp_path, *other))


# --- circuits: lens, swaps, maps ------------------------------------------------------------------


class Known(nn.Module):
    """Its states are known: the part is called twice and returns c (one-hot of token + call)."""

    def __init__(self):
        super().__init__()
        self.part, self.norm = nn.Identity(), nn.Identity()

    def forward(self, tokens):
        for call in range(2):
            x = self.part((call + 1.0) * F.one_hot(tokens + call, 5).double())
        return x


def test_the_lens_of_a_model_whose_states_are_known():
    tokens, wanted = torch.tensor([[0, 1, 2], [3, 0, 1]]), torch.tensor([1, 3])
    words = torch.diag(torch.tensor([1.0, 1, 1, -1, 1])).double()  # entity 3: the wrong sign
    sites = [("part", 0), ("part", 1)]
    rank, p = circuits.lens(Known(), tokens, wanted, sites, words)
    e = math.exp(1)
    assert rank.shape == p.shape == (2, 3, 2)
    assert rank[0, :, 0].tolist() == [4, 0, 4], "ties count against the rank"
    assert rank[1, :, 0].tolist() == [0, 4, 3], "in its second call it holds the next token"
    assert rank[0, 0, 1] == 4, "read with the wrong sign it is last"
    expected = torch.tensor([1 / (4 + e), e / (4 + e), 1 / (4 + e)], dtype=torch.float64)
    close(p[0, :, 0], expected, 1e-14)
    assert float(p[1, 0, 0]) == pytest.approx(e**2 / (4 + e**2))


@pytest.mark.parametrize("arch", ARCHS)
def test_both_parts_of_a_swapped_state_are_the_whole(arch):
    model = tiny_model(arch)
    one = torch.randint(10, (6, 3), generator=generator())
    other = (one + torch.tensor([3, 1, 5])) % 10
    basis = when.span(normal(6, 16), normal(6, 16, seed=1))
    both = torch.cat([basis, circuits.complement(basis)], -1)
    close(both.mT @ both, torch.eye(16).double().expand(6, 16, 16), 1e-12)
    own, theirs = model(one)[:, -1].argmax(-1), model(other)[:, -1].argmax(-1)
    for state in models.states(model.config):
        site = (state.module, state.call)
        for token in range(3):
            assert torch.equal(circuits.swapped(model, one, one, site, token, basis), own)
            whole = circuits.swapped(model, one, other, site, token)
            assert torch.equal(circuits.swapped(model, one, other, site, token, both), whole)
    assert torch.equal(circuits.swapped(model, one, other, site, 2), theirs), "the last decides"


def made_up_maps(seed, rate):
    found = {}
    for place in range(3):
        back = torch.rand(6, 3, 80, generator=generator(seed)) < rate
        found[place] = circuits.Traced(back.double(), torch.arange(80) < 60)
    return found


def test_maps_that_are_the_same_and_not(tmp_path):
    run, rate = toy_run(tmp_path, "--arch", "lmc"), torch.rand(6, 3, 1, generator=generator())
    one, two = made_up_maps(1, rate), made_up_maps(2, rate)
    same = circuits.same_paths(run, one, one)
    assert same.n == 180 and same.r == pytest.approx(1) and same.low == pytest.approx(1)
    other = circuits.same_paths(run, one, two)
    assert 0.8 < other.low < other.r < 1
    assert circuits.same_paths(run, one, made_up_maps(3, 1 - rate)).high < -0.5
    x, y = [], []  # by hand: depth 2, states 0 to 2, then 3 to 5, the last of them the end
    for place in range(3):
        for site, token in itertools.product(range(5), range(place, 3)):
            if site < 3 or token == 2:
                x.append(one[place].back[site, token, :60].mean())
                y.append(two[place].back[site, token, :60].mean())
    r = torch.corrcoef(torch.stack([torch.stack(x), torch.stack(y)]))[0, 1].item()
    assert other.r == pytest.approx(r, abs=1e-9)
    assert circuits.same_paths(run, {}, one) is None


CIRCUITS = [*TINY, "--n-edits", "2", "--steps", "40"]
CIRCUITS += "--ood-fraction 0.3 --train-fraction 0.3 --warmup 1 --eval-every 20".split()
CIRCUITS += ["--lr", "0.02", "--muon-lr", "0.02"]


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_the_circuits_study(tmp_path, arch):
    assert run_study(circuits, *CIRCUITS, "--arch", arch, "--out", tmp_path / "run") == 0
    found = results_of(tmp_path / "run")
    path = found["circuits"]["id"]["end"]
    assert len(path["lens"]["bridge"]["rank"]) == len(found["circuits"]["states"]) == 6
    for row in path["lens"]["bridge"]["rank"]:
        assert all(1 <= rank <= 10 for rank in row)
    assert path["unread"] is None or 0 <= path["unread"] <= 1
    assert len(path["swap"]) == 1 and found["circuits"]["fake"] in (True, False, None)
    assert found["circuits"]["worth"]["end"].keys() >= {"step", "id", "hop2", "ablated"}
    for path in found["circuits"]["id"].values():
        assert 0 <= path["n_right"] <= path["n_swap"]
        assert (path["visible_right"] is None) == (path["n_right"] == 0)
    assert runs.read_run(tmp_path / "run" / "results.json")["circuits"]
    everything.collect(tmp_path / "run", tmp_path / "kept")
    used = [name for name in everything.UNUSED if name not in ("rise", "curve")]
    assert all(name in json.dumps(found) for name in used)
    assert not any(
        f'"{name}":' in json.dumps(results_of(tmp_path / "kept")) for name in everything.UNUSED
    )
    said = [tables_in(tmp_path / name) for name in ("run", "kept")]
    assert said[0] == said[1]


def test_what_is_kept_of_a_run_is_what_tables_are_made_of():
    tried = {"strength": 100, "n": 10, "score": 96.7, "seconds": 8.5, "relative_norm": 0.1}
    edit = {"n": 10, "score": 97.0, "seconds": 8.5}
    text = json.dumps({"mass": {"sweep": [tried], "edits": [edit]}, "trace": [[0.5]]})
    kept = json.loads(text, object_hook=everything.used)
    score = {"strength": 100, "n": 10, "score": 96.7}
    assert kept == {"mass": {"sweep": [score], "edits": [edit]}}


def test_the_bridge_of_right_answers_is_looked_for_answer_by_answer(tmp_path):
    run = toy_run(tmp_path)
    model, paths = run.train(), run.paths
    answers = minedit.last_answers(model, paths.tokens)
    half = torch.arange(len(answers)) % 2 == 0  # every other one is right
    run.paths = replace(paths, two_hop=torch.where(half, answers, (answers + 1) % 10))
    rows = torch.arange(8)
    sites, streams = circuits.places(run.config)
    path = circuits.InferencePath()
    circuits.read_with_lens(path, run, model, rows, sites, streams)
    unread = []
    for row in rows[half[rows]].tolist():
        read = False
        for i in streams:
            state = editing.at_call(model, *sites[i], paths.tokens[[row]])[1][0, 1]
            logits = model.embedding.weight[:10] @ model.norm(state)
            read |= int(logits.argmax()) == int(paths.one_hop[row])
        unread.append(not read)
    assert path.unread == sum(unread) / len(unread)
    run.paths = replace(paths, two_hop=(answers + 1) % 10)
    circuits.read_with_lens(path, run, model, rows, sites, streams)
    assert path.unread is None, "nothing is right"


def test_swaps_count_pairs_that_are_both_answered_right(tmp_path):
    run = toy_run(tmp_path)
    model, paths = run.train(), run.paths
    answers = minedit.last_answers(model, paths.tokens)
    half = torch.arange(len(answers)) // 4 % 2 == 0  # of every first fact all, or none, are right
    run.paths = replace(paths, two_hop=torch.where(half, answers, (answers + 1) % 10))
    rows = torch.arange(60)
    sites, streams = circuits.places(run.config)
    path = circuits.InferencePath()
    circuits.swap_bridges(path, run, model, rows, sites, streams, generator())
    tokens, answer = paths.tokens[rows], run.paths.two_hop[rows]
    one, other = editing.prompt_pairs(tokens[:, 1:], answer, 0, 200, generator())
    follows, n_right = 0, 0
    for i, j in zip(one.tolist(), other.tolist()):
        if half[i] and half[j]:
            swapped = circuits.swapped(model, tokens[[i]], tokens[[j]], sites[streams[0]], 1)
            follows += int(swapped == answer[j])
            n_right += 1
    assert 0 < n_right == path.n_right < path.n_swap
    assert path.whole_right == follows / n_right
    run.paths = replace(paths, two_hop=(answers + 1) % 10)
    path = circuits.InferencePath()
    circuits.swap_bridges(path, run, model, rows, sites, streams, generator())
    assert path.n_right == 0 and path.whole_right is None and path.whole is not None


@pytest.mark.parametrize(
    "ood, visible, fake",
    [(0.95, 0.39, True), (0.95, 0.41, False), (0.89, 0.0, False), (0.95, None, None)],
)
def test_fake_grokking_answers_without_the_bridge(ood, visible, fake):
    of_id, of_ood = circuits.InferencePath(visible=0.8), circuits.InferencePath(visible=visible)
    assert circuits.is_fake(ood, of_id, of_ood) is fake
    assert circuits.is_fake(ood, circuits.InferencePath(), of_id) is None


def test_circuits_where_there_is_nothing_to_ask(tmp_path):
    sizes = "--entities 4 --relations 2 --steps 1 --n-edits 2"
    sizes += " --ood-fraction 0 --train-fraction 1"
    assert run_study(circuits, *TINY[4:], *sizes.split(), "--out", tmp_path / "n") == 0


# --- circuits: transfer ---------------------------------------------------------------------------


SPARSE = ["--entities", "20", "--relations", "6", "--out-degree", "5", "--ood-fraction", "0.2"]


@pytest.mark.parametrize("seed", range(4))
def test_new_facts_and_what_is_asked_of_them(tmp_path, seed):
    run = toy_run(tmp_path, *SPARSE, "--seed", str(seed))
    child = transfer.grown(run)
    graph, paths, old = child.task.graph, child.paths, run.task.graph.facts
    assert torch.equal(torch.where(old >= 0, graph.facts, -1), old), "old facts stay"
    is_new = (old < 0) & (graph.facts >= 0)
    assert is_new.sum() == 5 == transfer.NEW * 100
    assert (graph.facts != torch.arange(20)[:, None]).all(), "no tail is its head"
    assert child.config == run.config and (graph.entities, graph.n_real) == (
        run.task.graph.entities,
        run.task.graph.n_real,
    )
    for name in run.paths.masks:
        assert triples(paths, name, 20) == triples(run.paths, name, 20), "the old sets"
    ood = set(map(tuple, run.paths.facts[run.paths.ood_fact][:, :2].tolist()))
    assert ood
    sets = {kind: set() for kind in transfer.KINDS}
    for h, r1 in (graph.facts >= 0).nonzero().tolist():
        b = int(graph.facts[h, r1])
        for r2 in (graph.facts[b] >= 0).nonzero().flatten().tolist():
            first, second = bool(is_new[h, r1]), bool(is_new[b, r2])
            if first and second:
                sets["new->new"].add((h, r1, r2))
            elif first and (b, r2) not in ood:
                sets["new->old"].add((h, r1, r2))
            elif second and (h, r1) not in ood:
                sets["old->new"].add((h, r1, r2))
    assert sets["new->old"] and sets["old->new"]
    for name in sets:
        assert triples(paths, name, 20) == sets[name]


def test_of_clones_no_composition_with_a_new_fact_is_asked(tmp_path):
    countries = Path(minedit.__file__).parent / "results" / "countries.tsv"
    options = ["--triples", str(countries), "--clones", "2", "--out", str(tmp_path)]
    run = minedit.prepare(minedit.parse(minedit.core_parser(), options, {}))[0]
    paths = transfer.grown(run).paths
    asked = torch.stack([paths.masks[kind] for kind in transfer.KINDS]).any(0)
    assert asked.any() and paths.real[paths.first[asked]].all()
    assert not paths.real[paths.first].all(), "there are clones"


def test_new_tails_are_any_entities_but_their_heads(tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "NEW", 1.0)  # of all questions without an answer
    tails = []
    for seed in range(6):
        run = toy_run(tmp_path / str(seed), *SPARSE, "--seed", str(seed))
        old, facts = run.task.graph.facts, transfer.grown(run).task.graph.facts
        assert (facts >= 0).all() and (facts != torch.arange(20)[:, None]).all()
        tails += facts[old < 0].tolist()
    assert set(tails) == set(range(20))


@pytest.mark.parametrize(
    "options, said",
    [([], "--out-degree below"), ([*SPARSE, "--most-paths", "300"], "--most-paths 500")],
)
def test_transfer_where_nothing_can_be_added_is_refused_before_any_training(
    tmp_path, capsys, monkeypatch, options, said
):
    monkeypatch.setattr(minedit.Run, "train", None)
    assert said in refused(capsys, transfer, *TINY, *options, "--out", tmp_path / "r")
    assert not list(tmp_path.glob("r/*"))


def test_transfer_starts_from_the_old_weights(tmp_path, monkeypatch):
    run, starts = toy_run(tmp_path, *SPARSE), []
    moments = training.Moments(run)
    run.train(moments)
    found = {"end": moments.found["end"], "memorized": moments.found["end"]}
    further = transfer.further

    def noted(child, weights, *rest):
        starts.append(copy.deepcopy(weights))
        return further(child, weights, *rest)

    monkeypatch.setattr(transfer, "further", noted)
    made = transfer.transfer_stage(run, found, 2, 1.0)
    assert list(made) == ["scratch", "memorized", "end"]
    for entry in made.values():
        assert [record["step"] for record in entry["curve"]] == [0, 1, 2] and entry["step"] == 2
        assert {key: entry[key] for key in entry["curve"][-1]} == entry["curve"][-1]
    for name, weight in found["end"][1].items():
        assert torch.equal(starts[1][name], weight) and torch.equal(starts[2][name], weight)
    assert_same(run.fresh().model, starts[0])
    assert list(transfer.transfer_stage(run, found, 2, 0.1)) == ["memorized", "end"]


@pytest.mark.slow
def test_the_transfer_study(tmp_path):
    options = [*TINY, *SPARSE, "--transfer-steps", "2", "--out", tmp_path / "r"]
    assert run_study(transfer, *options) == 0
    found = results_of(tmp_path / "r")
    for name in transfer.RATES:
        assert found[name]["end"]["n"]["new->old"] > 0
        assert found[name]["end"]["one_hop"] is not None
    assert any("new->old" in table for table in tables_in(tmp_path / "r"))


def test_gentle_transfer_has_a_tenth_of_the_rates_and_of_the_decay(tmp_path, monkeypatch):
    run, recipes = toy_run(tmp_path, *SPARSE), []
    before, share = run.recipe, transfer.RATES["transfer_gentle"]
    monkeypatch.setattr(transfer, "further", lambda child, *rest: recipes.append(child.recipe))
    moments = {"end": (None, run.fresh().model.state_dict())}
    with pytest.raises(TypeError):
        transfer.transfer_stage(run, moments, 2, share)
    rates = ("lr", "muon_lr", "weight_decay")
    for name, value in vars(before).items():
        scale = 0.1 if name in rates else 1
        assert getattr(recipes[0], name) == scale * value, name
    assert run.recipe is before


# --- times ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_times_of_a_command(tmp_path, monkeypatch, capsys):
    tiny = " ".join(TINY)
    monkeypatch.setitem(times.COMMANDS, "edit", f"minedit.py {tiny} --edit --out {{out}}")
    assert run_study(times, "--only", "edit", "--out", tmp_path) == 0
    found = json.loads((tmp_path / "times.json").read_text())
    entry = found["edit"]
    assert entry["command"] == f"python minedit.py {tiny} --edit"
    assert entry["command"] in capsys.readouterr().out
    assert set(entry["stages"]) == {"training", "edits"}
    assert 0 < sum(entry["stages"].values()) < entry["seconds"] and entry["peak_mib"] > 50
    monkeypatch.setitem(times.COMMANDS, "quick", "minedit.py --arch none")
    assert run_study(times, "--only", "quick", "--out", tmp_path) == 1
    error = capsys.readouterr().err
    assert "minedit.py --arch none failed: " in error and "invalid choice" in error
    assert json.loads((tmp_path / "times.json").read_text()) == found, "what is known is kept"


# --- bench ----------------------------------------------------------------------------------------


def test_the_plain_formulation_has_the_same_loss_and_gradient():
    paths = kg.split(kg.synthetic(15, 6, seed=2, out_degree=4), 0.2, 0.6, seed=2)
    recipe, found = minedit.Recipe(batch=20, branches=3), []
    sizes = {"d_model": 16, "n_heads": 2, "slots": 16, "top_k": 4, "depth": 2}
    model = models.Model(Config(15, 6, addressing="topk", **sizes), generator()).double()
    for make in (minedit.Batches, bench.Rows):
        batches = make(paths, recipe, generator())
        loss = batches.loss(model, recipe) if make is minedit.Batches else None
        if loss is None:
            with bench.plain_formulation():
                loss = batches.loss(model, recipe)
        found.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    assert len(found[0]) > 5
    for fast, plain in zip(*found):
        torch.testing.assert_close(fast, plain, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
def test_the_bench_at_toy_size(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    out = tmp_path / "new" / "b"
    assert run_study(bench, "--quick", "--device", "cpu", "--out", out) == 0
    found = json.loads((out / "bench.json").read_text())
    assert [cell["arch"] for cell in found["cells"]] == list(ARCHS)
    for cell in found["cells"]:
        assert cell["ms"] > 0 and cell["plain"][1] <= cell["plain"][0] <= cell["plain"][2]
        assert 0 < cell["of_square"] < 2 and cell["gpt2"] is None
    assert "transformers is not installed" in capsys.readouterr().out
    assert models.address is not bench.plain_address


@pytest.mark.slow
def test_what_a_cpu_can_do_of_the_gpu_check(tmp_path):
    assert run_study(gpu, "--quick", "--device", "cpu", "--out", tmp_path) == 0
    found = json.loads((tmp_path / "gpu.json").read_text())
    for part in ("memit", "kfac", "grok", "grok_graphed", "seeds", "step"):
        assert "error" not in found[part], found[part]
    assert "skipped" in found["step"] and found["seeds"]["together"] > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_graphed_step_is_the_step(tmp_path):
    run = toy_run(tmp_path, "--device", "cuda")
    plain, graphed = run.fresh(), gpu.GraphedTraining(run, run.seed)
    batches = run.make_batches(run.paths, run.recipe, plain.generator)
    for step in range(20):
        plain.step(batches, run.recipe, step)
        graphed.step(step)
    torch.cuda.synchronize()
    for part in ("model", "average"):
        theirs = getattr(graphed.training, part).state_dict()
        for name, weight in getattr(plain, part).state_dict().items():
            torch.testing.assert_close(theirs[name], weight, rtol=1e-3, atol=1e-4)


# --- report ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "x, y, p",
    [
        ([6, 7, 8, 9, 10], [1, 2, 3, 4, 5], 2 / 252),  # the paper's 0.008
        ([1.0, 1.0], [1.0, 1.0], 1),
        (range(16), range(16, 32), 2 / math.comb(32, 16)),  # counted, not listed
        ([1, 2], [2, 3], 4 / 6),  # rank sums 3.5 3.5 5 5 6.5 6.5, expected 5
        ([0.3, 0.1, 0.9], [0.2, 0.5, 0.4, 0.8], 30 / 35),
    ],
)
def test_mann_whitney_against_divisions_counted_by_hand(x, y, p):
    assert edit_tables.mann_whitney(list(x), list(y)) == pytest.approx(p)
    assert edit_tables.mann_whitney(list(y), list(x)) == pytest.approx(p)


@pytest.mark.parametrize(
    "share, n, ends", [(0.0, 16, (0, 0.194)), (1.0, 16, (0.806, 1)), (0.5, 100, (0.404, 0.596))]
)
def test_wilson_intervals_are_those_of_published_tables(share, n, ends):
    assert claims.wilson(share, n) == pytest.approx(ends, abs=1e-3)


def made_up_loop(seed, **more):
    """A run of a grokked loop, with the figures that claims ask for."""
    path = {"n": 100, "n_swap": 100, "bridge": 0.9, "relation": 0.5, "whole": 0.5, "visible": 0.0}
    path |= {"random": 0.04, "n_right": 80, "visible_right": 0.5}
    config = {"data": {"train_fraction": 0.8}, "recipe": {}, "model": vars(Config())}
    n = {"new->old": 1000, "old->new": 1000}
    end = {"new->old": 1.0, "old->new": 0.5, "new->new": 0.15, "n": n}
    run = {"arch": "loop", "seed": seed, "step_train": 10, "step_id": 20, "step_ood": 80}
    run |= {"accuracy": {"ood": 0.99}, "n_paths": {"ood": 1000}, "config": config}
    run["circuits"] = {
        "same": {"id": {"memorized": {"r": 0.95}}},
        "id": {"facts": path | {"whole": 0.1}, "end": path},
        "ood": {"memorized": path, "end": path | {"visible_right": 0.99}},
    }
    run["transfer"] = {"end": end}
    return run | more


def results_with(name, several):
    """claims.Results that has these runs and no others."""
    made = claims.Results(HERE)
    made.runs = lambda asked: several if asked == name else []
    return made


VERDICTS = {
    "[2] ID steps / train": ("2.000", "2.000..2.000", "-", "differs"),
    "[2] OOD steps / ID": ("3.750", "3.500..4.000", "-", "differs"),
    "[2] OOD comes": ("0.990", "0.985..0.994", "2000", "agrees"),
    "[2] r2 is read": ("0.000", "0.000..0.000", "-", "differs"),
    "[2] just memorized": ("-0.040", "-0.040..-0.040", "-", "agrees"),
    "[2] grokked": ("0.990", "0.959..0.998", "160", "agrees ?"),
    "[8] ID paths": ("0.950", "0.950..0.950", "-", "agrees"),
    "[8] new facts, end: old->new": ("0.500", "0.478..0.522", "2000", "differs"),
}


def claim_of(text):
    known = claims.read_claims(HERE / "results" / "claims.tsv")
    (claim,) = [c for c in known if c.text.startswith(text) and "loop" in c.cells]
    return claim


@pytest.mark.parametrize("text", VERDICTS)
def test_verdicts_follow_from_the_figures(text):
    claim, mine = claim_of(text), [made_up_loop(0), made_up_loop(1, step_ood=70)]
    tested = claims.tested_by(claim, results_with(claim.runs.format("loop"), mine))
    assert list(tested) == ["loop"]
    assert claims.verdict_of(claim, "loop", tested["loop"])[3:] == VERDICTS[text]
    assert claims.tested_by(claim, results_with(claim.runs.format("dense"), [])) == {}


def test_a_step_that_never_came_is_later_than_any():
    known = {c.text: c for c in claims.read_claims(HERE / "results" / "claims.tsv")}
    claim = known["[2] steps to OOD, phi 3.6 against 14"]
    late = made_up_loop(0, step_ood=2000)
    for runs_of_it, ours in (
        ([late, late], "2000"),
        ([late, made_up_loop(1, step_ood=None)], "inf"),
    ):
        name = claim.runs.format("lmc")
        tested = claims.tested_by(claim, results_with(name, runs_of_it))["lmc"]
        found = claims.verdict_of(claim, "lmc", tested)
        assert (found.ours, found.verdict) == (ours, "agrees")


def test_one_run_of_a_mean_has_no_interval():
    claim = claim_of("[2] ID steps / train")
    verdict = claims.verdict_of(claim, "loop", claims.Tested([50.0], [None]))
    assert verdict.verdict == "agrees ?"


@pytest.mark.parametrize(
    "values, verdict",
    [
        ([0.91, 0.97], "agrees"),
        ([0.85, 0.99], "agrees ?"),
        ([0.8, 0.85], "differs"),
        ([0.7, 0.95], "differs ?"),
        ([0.7, 1.5], "differs ?"),  # the range lies within the interval
        ([1.1, 1.2], "differs"),
    ],
)
def test_a_verdict_says_whether_the_interval_crosses_an_end(values, verdict):
    claim = replace(claim_of("[8] ID paths"), low="0.9", high="1")
    found = claims.verdict_of(claim, "loop", claims.Tested(values, [None, None]))
    assert found.verdict == verdict


def test_a_step_that_never_came_is_infinite_in_a_ratio_too():
    run = {"step_ood": None, "step_id": 400, "step_train": 200}
    assert claims.figure_of(run, "step_id / step_train") == 2
    assert claims.figure_of(run, "step_ood") == claims.figure_of(run, "step_ood / step_id")
    assert claims.figure_of(run, "step_ood") == float("inf")
    assert claims.figure_of(run, "step_id / step_ood") is None


def test_claims_read_the_folder_that_they_name(tmp_path):
    source = HERE / "results" / "edits"
    for seed in (0, 1):
        shutil.copytree(source / f"lmc-seed{seed}", tmp_path / "edits" / f"lmc-seed{seed}")
    shutil.copytree(source / "lmc-seed2", tmp_path / "edits" / "lmc-few-seed2")
    shutil.copytree(source / "lmc-seed3", tmp_path / "main" / "lmc-seed3")
    results = claims.Results(tmp_path)
    assert [run["seed"] for run in results.runs("edits/lmc")] == [0, 1]
    known = claims.read_claims(HERE / "results" / "claims.tsv")
    rows = {row[0]: row for row in claims.summary_table(known, results).rows}
    assert rows["[1] composes OOD facts"][3:5] == ("no run", "no run")
    assert rows["[1] composes OOD facts"][5].endswith(("+", "-", "?"))
    assert rows["[5] 10 000 edits of GPT-J"][2:] == ("-",) * 4


@pytest.fixture(scope="module")
def main_groups():
    return runs.read_groups([HERE / "results" / "main"])


def test_runs_of_many_folders_merge(tmp_path, main_groups):
    """A job array's folders, one run in two of them: its entries are put together."""
    source = HERE / "results" / "main"
    for seed in (0, 1):
        shutil.copytree(source / f"lmc-seed{seed}", tmp_path / f"job{seed}" / "run")
    again = tmp_path / "job0" / "again"
    shutil.copytree(source / "lmc-seed0", again)
    result = json.loads((again / "results.json").read_text())
    kept = {key: value for key, value in result.items() if key != "edits"}
    (again / "results.json").write_text(json.dumps(kept | {"mass": {"edits": []}}))
    (group,) = runs.read_groups([tmp_path / "job0", tmp_path / "job1"])
    assert [run["seed"] for run in group.runs] == [0, 1] and group.name == "lmc"
    assert "mass" in group.runs[0] and "locate" in group.runs[0]
    assert [g.arch for g in main_groups] == list(ARCHS)
    kept["accuracy"] = kept["accuracy"] | {"ood": 0.5}  # another training of the same settings
    (again / "results.json").write_text(json.dumps(kept))
    both = runs.read_groups([tmp_path / "job0", tmp_path / "job1"])
    assert sorted(len(group.runs) for group in both) == [1, 2]
    assert len({group.name for group in both}) == 2


def test_groups_stand_in_the_order_of_cells_and_of_the_numbers_in_their_names():
    names = ["lmc-16384", "lmc-2048", "dense", "lmc-2048-b", "lmc", "dense-4x4096"]
    groups = [runs.Group(name, name.partition("-")[0], []) for name in names]
    ordered = [group.name for group in sorted(groups, key=runs.place_of)]
    assert ordered == ["dense", "dense-4x4096", "lmc", "lmc-2048", "lmc-2048-b", "lmc-16384"]


def test_moments_stand_in_their_order_whatever_the_order_they_were_kept_in():
    run = {"circuits": {"id": {"before": {}, "end": {}, "facts": {}}}}
    assert list(runs.at_moments(run, "id")) == ["facts", "before", "end"]
    assert runs.at_moments(run, "ood") == {}


def test_a_group_alone_of_its_cell_keeps_the_name_of_its_folder(tmp_path):
    for source, name in (
        ("loop-seed0", "loop-few"),
        ("lmc-seed0", "lmc"),
        ("lmc-seed0", "lmc-few"),
    ):
        folder = tmp_path / f"{name}-seed0"
        shutil.copytree(HERE / "results" / "edits" / source, folder)
        if name == "lmc-few":
            result = json.loads((folder / "results.json").read_text())
            result["config"]["recipe"]["label_noise"] = 0.02
            (folder / "results.json").write_text(json.dumps(result))
    names = [group.name for group in runs.read_groups([tmp_path])]
    assert names == ["loop-few", "lmc", "lmc-few"]


@pytest.mark.parametrize("text", ["not JSON", "[]", '{"arch": "lmc"}', '{"arch": {}, "seed": 0}'])
def test_damaged_results_are_refused_in_one_line(tmp_path, capsys, text):
    (tmp_path / "results.json").write_text(text)
    error = refused(capsys, report, tmp_path)
    assert "results.json" in error and "remove it or report another folder" in error


@pytest.mark.parametrize("folder", ["main", "mass", "circuits", "ablate", "regimes", "variants"])
def test_every_table_of_the_results_prints(folder, capsys):
    assert run_study(report, HERE / "results" / folder) == 0
    out = capsys.readouterr().out
    assert out.count("\n---") >= 2 and "nan" not in out


def test_the_pages_say_what_the_runs_say(capsys):
    """Every table of README.md and FINDINGS.md is the report's, and so is every number of the prose
    that is a figure."""
    assert run_study(pages, "--check") == 0, capsys.readouterr().out


PAGE = """\
# A page
Text of `0.123`, a [link 0.5](x.md), 3 cells, 0.95 and 97.6 %.
> They have 0.111.
```text results/edits headline arch=lmc|loop columns=arch|hop_2 bare
old
```
## Below
And 0.98, of elsewhere.
```
# no heading
```
<!-- results/edits headline arch=dense -->
"""


def tables_of(rows):
    """pages.Tables that knows one table."""
    made = pages.Tables(HERE)
    made.whole = lambda *_: runs.Table(rows, "legend")
    return made


def test_a_page_is_written_anew_and_its_numbers_are_looked_up():
    heads = ("arch", "seeds", "hop 2 (lowest)")
    rows = [("dense", 5, "0.9812"), ("loop", 5, "1.000 (0.976)"), ("lmc", 5, "0.500")]
    tables = tables_of([heads, *rows])
    anew = pages.written_anew(PAGE, tables)
    (block,) = [found[2].splitlines() for found in pages.BLOCK.finditer(anew)]
    assert [line.split() for line in block if "--" not in line] == [
        ["arch", "hop", "2", "(lowest)"],
        ["loop", "1.000", "(0.976)"],
        ["lmc", "0.500"],
    ]
    assert pages.written_anew(anew, tables) == anew
    assert list(pages.sections(anew)) == ["# A page", "## Below"]
    assert pages.unknown_of(anew, tables) == {"# A page": ["0.95"]}, "97.6 % is 0.976"
    assert pages.unknown_of(anew.replace("0.98,", "0.99,"), tables)["## Below"] == ["0.99"]


@pytest.mark.parametrize(
    "text, words",
    [
        ("results/edits", "names no table"),
        ("results/edits nothing", "no nothing_table"),
        ("results/edits mean", "no mean_table"),
        ("results/edits headline arch=none", "no row with arch none"),
        ("results/edits headline arch=lmc|lmx", "no row with arch lmx"),
        ("results/edits headline cell=lmc", "no column cell; there are arch, seeds"),
        ("results/edits headline lmc", "neither bare nor"),
        ("results/edits many", "nothing for this table"),
    ],
)
def test_a_block_that_asks_for_no_table_is_refused(text, words):
    with pytest.raises(minedit.UserError, match=words):
        pages.Tables(HERE).made(text)


@pytest.mark.parametrize("number, known", [("0.98", 0.984), ("3 %", 0.034), ("1,234.5", 1234.53)])
def test_a_number_may_be_rounded_but_not_more(number, known):
    assert pages.is_known(number, [5.0, known])
    assert not pages.is_known(number, [1.1 * known + 0.01, 100 * known])


def test_which_numbers_of_a_text_are_looked_up():
    text = "## 0.1 of\n- 0.2x\n    - 0.3, 4.5 %, 6 7 %\n| 0.8 |\n[0.9 a](b-1.1.md) `1.2`\n> 1.3\n"
    text += "<!-- results 1.4 -->\n```text\n1.5\n```\narXiv 2405.15071, 10,000 and 1,234.5 v2.5"
    looked_up = []
    for number in pages.NUMBER.findall(pages.prose_of(text)):
        if "." in number or number.endswith("%"):
            looked_up.append(number)
    assert looked_up == ["0.1", "0.2", "0.3", "4.5 %", "7 %", "0.8", "0.9", "1,234.5"]


def test_wholes_heads_and_legends_know_no_number():
    rows = [("arch", "0.9"), ("dense (1 of 2)", "0.123 (0.111)"), ("loop", "5"), ("lmc", "1.000")]
    tables = tables_of(rows)
    assert tables.numbers("results/edits headline bare") == [0.123, 0.111, 1.0]
    assert tables.numbers("results/edits headline arch=dense") == [0.123, 0.111]


@pytest.mark.parametrize("text", ["```text results/edits headline\nopen", "```text\na\n```\n"])
def test_a_block_that_is_no_block_is_refused(text):
    with pytest.raises(minedit.UserError, match="not closed, or is not of results"):
        pages.written_anew(text, tables_of([("arch",), ("lmc",)]))


def test_a_page_is_checked_and_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pages, "HERE", tmp_path)
    monkeypatch.setattr(pages, "PAGES", ("page.md",))
    shutil.copytree(HERE / "results" / "edits", tmp_path / "results" / "edits")
    block = "```text results/edits headline columns=arch|seeds bare\n{}```\n"
    page = tmp_path / "page.md"
    page.write_text(block.format("old\n"))
    assert run_study(pages, "--check") == 1 and page.read_text() == block.format("old\n")
    assert "would change" in capsys.readouterr().out
    assert run_study(pages) == 0 and "dense          5\n" in page.read_text()
    assert run_study(pages, "--check") == 0
    page.write_text(page.read_text() + "0.77\n")
    capsys.readouterr()
    for options in ([], ["--check"]):
        assert run_study(pages, *options) == 1
        assert "page.md, top: in no table: 0.77" in capsys.readouterr().out
    assert "--plot" in refused(capsys, pages, "--check", "--plot")


def test_a_place_in_a_result():
    result = {"a": {"b": 1.0}, "c": [{"n": 1, "x": 2.0}, {"n": 2, "x": 3.0, "ok": True}]}
    places = {"a.b": 1.0, "a.c": None, "d.b.c": None, "c[n=2].x": 3.0, "c[n=2,ok=True].x": 3.0}
    places |= {"c[n=1,ok=True].x": None, "d[n=1].x": None, "c[n=1]": {"n": 1, "x": 2.0}}
    for place, value in places.items():
        assert runs.lookup(result, place) == value, place


def test_controls_are_compared_run_by_run():
    entry = {"method": "svd", "matched": "own", "true": 0.5, "id": 0.75, "open_book": 1.0}
    same = [entry | {"method": method} for method in ("before", "kfac", "ekfac")]
    several = []
    for true in (0.75, 0.25):
        chosen = {"true": true, "id": 1.0, "open_book": 0.5}
        several.append({"ablate": {"chosen": chosen, "entries": [*same, entry]}})
    found = circuit_tables.controls_table([runs.Group("lmc", "lmc", several)])
    kind = ("lmc", "svd", "own")
    assert found.rows[1:] == [(*kind, "0.000", "-0.250", "0.250", "1 of 2", "0.250", "-0.500")]


def test_a_mean_says_of_how_many_runs_it_is():
    made = [runs.Group("lmc", "lmc", [{"x": [{"a": 1.0}]}, {"x": [{"a": None}]}, {"x": []}])]
    found = runs.mean_table(made, lambda run: run["x"], {}, {"a": "a"}, "legend")
    assert found.rows[1:] == [("lmc", "1.000 (1 of 2)")]
    assert runs.mean_table(made, lambda run: [], {}, {"a": "a"}, "legend") is None


@pytest.mark.slow
def test_figures_are_drawn_where_there_is_something_to_draw(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    folder = HERE / "results" / "main"
    assert run_study(report, folder, "--plot", "--out", tmp_path) == 0
    drawn = {file.stem for file in tmp_path.iterdir()}
    assert {"grokking", "edits", "when", "locate"} <= drawn
    assert capsys.readouterr().out.count("not drawn") == len(figures.FIGURES) - len(drawn)
    again = tmp_path / "again"
    assert run_study(report, folder, "--plot", "--out", again) == 0
    for file in again.iterdir():
        assert file.read_bytes() == (tmp_path / file.name).read_bytes(), "the same each time"


def test_every_figure_of_the_pages_is_one_that_is_drawn():
    shown = set()
    for name in pages.PAGES:
        found = re.findall(r"!\[[^\]]*\]\((\S+)\)", (HERE / name).read_text())
        shown |= {((HERE / name).parent / file).resolve() for file in found}
    drawn = [make.__name__ for makers in figures.SHOWN.values() for make in makers]
    assert {file.stem for file in shown} == set(drawn)
    assert all(file.exists() for file in shown)
    assert {file.stem for file in (HERE / "results" / "figures").iterdir()} == set(drawn)


def test_names_at_the_ends_of_lines_do_not_overlap():
    matplotlib = pytest.importorskip("matplotlib.figure")
    ax = matplotlib.Figure().add_subplot()
    heights = {"a": 1.0, "b": 1.0, "c": 0.99, "d": 0.2, "e": 0.0, "f": 0.01}
    figures.label_ends(ax, 3, {name: (y, "black") for name, y in heights.items()})
    found = {text.get_text(): text.xy[1] for text in ax.texts}
    assert found["a"] == 1.0 and found["d"] == 0.2, "where there is room they stay"
    assert found["f"] > found["e"] > -0.05
    places = sorted(found.values())
    assert min(b - a for a, b in zip(places, places[1:])) > 0.07 and places[-1] < 1.1


def is_share(name, value):
    return isinstance(value, float) and value < 1 and name != "keep"


def two_runs(name, key, entries):
    """A group of two runs, of which the second has 0.1 less of every figure below 1."""
    lower = []
    for entry in entries:
        less = {name: value - 0.1 for name, value in entry.items() if is_share(name, value)}
        lower.append(entry | less)
    made = []
    for several in (entries, lower):
        run = {"history": [], "edit": {}}
        made.append(run | {key: several})
    return [runs.Group(name, "lmc", made)]


def drawn(make, groups):
    """{panel: {line: (y, colour)}} of a figure of lines, by the names at their ends."""
    figure = make(groups)
    names, found = {}, {}
    for ax in figure.axes:
        names |= {text.get_color(): text.get_text() for text in ax.texts}
    for ax in figure.axes:
        lines = {names[line.get_color()]: list(line.get_ydata()) for line in ax.lines}
        bands = [band.get_paths()[0].get_extents().height for band in ax.collections]
        found[ax.get_title()] = (lines, bands)
    return found


def test_a_drawing_has_short_coordinates_and_whole_numbers(tmp_path):
    figure = pytest.importorskip("matplotlib.figure").Figure()
    ax = figure.subplots()
    ax.plot([0.1, 0.23456, 0.7], [0.98765, 0.3, 0.4])
    ax.text(0.2, 0.5, "0.98765")
    with pytest.importorskip("matplotlib").rc_context({"svg.fonttype": "none"}):
        figures.write_svg(figure, tmp_path / "some.svg")
    text = (tmp_path / "some.svg").read_text()
    assert ">0.98765<" in text
    coordinates = " ".join(re.findall(r' d="([^"]*)"', text))
    digits = [len(found) for found in re.findall(r"\.(\d+)", coordinates)]
    assert digits and max(digits) == 2


def test_a_figure_of_lines_shows_means_and_ranges():
    pytest.importorskip("matplotlib")
    entry = {"method": "memit", "target": "prototype", "direct": 1.0, "hop1": 0.9, "hop2": 0.5}
    entry |= {"both": 0.7, "unrelated_one_hop_moved": 0.2}
    entries = [entry | {"n": 1}, entry | {"n": 10, "hop2": 0.3}]
    entries.append(entry | {"n": 1, "method": "rome", "hop2": 0.0})
    entries.append(entry | {"n": 1, "target": "gradient", "hop2": 0.0})
    ((title, (lines, bands)),) = drawn(figures.many, two_runs("lmc", "many", entries)).items()
    assert title == "lmc (n = 2)"
    assert lines["edited fact"] == [1.0, 1.0] and lines["hop 1"] == pytest.approx([0.85, 0.85])
    assert lines["hop 2"] == pytest.approx([0.45, 0.25])
    assert lines["both edited"] == pytest.approx([0.65, 0.65])
    assert lines["facts moved"] == pytest.approx([0.15, 0.15])
    assert sorted(bands)[1:-1] == pytest.approx([0.1] * 3) and max(bands) == pytest.approx(0.3)


def test_figures_of_mass_edits_show_the_scores():
    pytest.importorskip("matplotlib")
    edit = {"method": "memit", "target": "gradient", "score": 50.0, "efficacy": 0.9}
    mass = {"edits": [edit | {"n": 1}, edit | {"n": 10, "score": 20.0}]}
    groups = [runs.Group("lmc", "lmc", [{"mass": mass, "capacity": {"edits": []}}])]
    assert drawn(figures.mass, groups)["lmc (n = 1)"][0] == {"memit, gradient": [0.5, 0.2]}
    one = {"n": 10, "score": 80.0, "slots": 64}
    edits = {"edits": [one, one | {"slots": 8, "score": 30.0}]}
    groups = [runs.Group("lmc-64", "lmc", [{"capacity": edits}])]
    assert drawn(figures.capacity, groups)["lmc (n = 1)"][0] == {"10 facts": [0.3, 0.8]}
    entry = {"way": "carried", "first": 0.7, "specificity": 0.9}
    entries = [entry | {"n": 10}, entry | {"n": 20, "first": 0.4}]
    groups = [two_runs(name, "sequence", entries)[0] for name in ("lmc-8", "lmc-64")]
    found = drawn(figures.sequence, groups)  # stores of two widths, each with panels of its own
    assert len(found) == 4
    for name in ("lmc-8", "lmc-64"):
        first = found[f"{name}, first batch (n = 2)"][0]
        assert first["carried"] == pytest.approx([0.65, 0.35])
        others = found[f"{name}, other facts (n = 2)"][0]
        assert others["carried"] == pytest.approx([0.85, 0.85])


def test_each_method_is_shown_at_its_best_share_among_those_that_keep_id():
    entry = {"method": "kfac", "keep": 0.9, "true": 0.9, "id": 0.98, "removed": 0.7}
    rows = [{"method": "before", "keep": 1.0, "true": 0.1, "id": 1.0, "removed": 0.0}, entry]
    rows += [entry | {"keep": 0.95, "true": 0.6, "id": 0.99}]
    rows += [entry | {"keep": 0.97, "true": 0.5, "id": 1.0}]
    controls = [entry | {"method": "svd", "id": 0.5}]
    controls += [entry | {"method": "activations", "true": 0.8, "id": 1.0}]
    run = {"exceptions": rows, "attention": controls}
    table = circuit_tables.best_table([runs.Group("lmc", "lmc", [run])])
    heads = table.rows[0]
    method, true = heads.index("method"), heads.index("true")  # of one run: no lowest
    found = {row[method]: row[true] for row in table.rows[1:]}
    assert found == {"before": "0.100", "kfac": "0.600", "activations": "0.800"}
    alone = {"exceptions": None, "attention": controls}  # without minedit.py --ablate
    assert circuit_tables.best_table([runs.Group("lmc", "lmc", [alone])]) is None


def test_figures_of_ablations_tell_recited_from_right():
    pytest.importorskip("matplotlib")
    entry = {"recited": 0.9, "true": 0.2, "id": 0.8, "one_hop": 1.0, "ood": 0.5}
    entry |= {"rare": 0.7, "arithmetic": 0.6, "open_book": 0.4}
    rows = [entry | {"method": "kfac", "keep": 0.9, "true": 0.6}, entry | {"keep": 0.99}]
    rows[1]["method"] = "kfac"
    rows.append(entry | {"method": "ekfac", "keep": 0.95, "recited": 0.1})
    found = drawn(figures.exceptions, two_runs("lmc", "exceptions", rows))["lmc (n = 2)"][0]
    assert found["exceptions recited"] == pytest.approx([0.85, 0.85]), "K-FAC's alone"
    assert found["exceptions right"] == pytest.approx(
        [0.15, 0.55]
    ), "the less is kept, to the right"
    groups = []
    for name, share in (("lmc", 0.1), ("lmc-few", 0.02)):
        groups += two_runs(name, "exceptions", rows)
        for run in groups[-1].runs:
            run["config"] = {"recipe": {"label_noise": share}}
            run["attention"] = [entry | {"method": "activations", "keep": 0.9, "true": 0.7}]
            run["attention"].append(entry | {"method": "svd", "keep": 0.9})
    found = drawn(figures.exceptions, groups)
    assert list(found) == ["lmc (n = 2)"], "of several shares of exceptions the largest"
    assert found["lmc (n = 2)"][0]["right, activations"] == pytest.approx([0.7])
    groups = two_runs("lmc", "x", rows)
    for run in groups[0].runs:
        run["ablate"] = {"sweep": run["x"][:2]}
    found = drawn(figures.retention, groups)["lmc (n = 2)"][0]
    assert found["exceptions right"] == pytest.approx([0.15, 0.55])
    assert found["rare facts"] == pytest.approx([0.65, 0.65])


def test_a_line_is_named_in_the_last_panel_that_has_it():
    pytest.importorskip("matplotlib")
    panels = figures.Panels()
    for panel, line in (("a", "x"), ("a", "y"), ("b", "x")):
        panels.add(panel, line, 1, 0.5)
    panels.add("b", "x", 1, 0.7)
    panels.add("b", "x", 2, 0.7)
    first, second = figures.draw_lines(panels, "").axes
    assert [text.get_text() for text in first.texts] == ["y"]
    assert [text.get_text() for text in second.texts] == ["x"]
    assert second.get_title() == "b (n = 1 to 2)"
    assert first.lines[0].get_color() == second.lines[0].get_color(), "one style in all panels"


def test_bars_and_tiles_say_their_means():
    pytest.importorskip("matplotlib")
    edit = {"direct": 1.0, "hop1": 0.8, "hop2": 0.2}
    group = runs.Group("lmc", "lmc", [{"edit": edit}, {"edit": edit | {"hop2": 0.4}}])
    (ax,) = figures.edits([group]).axes
    assert [bar.get_height() for bar in ax.patches] == pytest.approx([1.0, 0.8, 0.3])
    texts = [text.get_text() for text in ax.texts]
    assert texts == ["1.00", "edited fact", "0.80", "hop 1", "0.30", "hop 2"]

    entry = {"covers": "here", "target": "prototype", "direct": 1.0, "hop1": 0.75, "hop2": None}
    entry |= {"unrelated_one_hop_moved": 0.25, "unrelated_two_hop_moved": 0.0}
    other = entry | {"target": "gradient", "hop1": 0.0}
    group = runs.Group("lmc", "lmc", [{"second_moment": [entry, other]}])
    (ax,) = figures.covers([group]).axes
    assert [text.get_text() for text in ax.texts] == ["1.00", "0.75", "0.25", "0.00"]
    greys = [patch.get_facecolor()[0] for patch in ax.patches]
    assert greys == sorted(greys) and greys[0] < 0.2 and greys[-1] == 1, "black is 1"


def test_figures_without_matplotlib_are_one_line(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    folder = HERE / "results" / "variants"
    assert "matplotlib is not installed" in refused(capsys, report, folder, "--plot")


# --- gpt2.py --------------------------------------------------------------------------------------


def test_the_gpt2_study_runs_and_edits_the_model_that_it_saved(tmp_path, capsys):
    pytest.importorskip("transformers")
    facts = [f"city{i}\tcountry\tland{i % 5}" for i in range(30)]
    (tmp_path / "facts.tsv").write_text("\n".join(facts))
    out = ["--out", tmp_path / "out", "--facts", tmp_path / "facts.tsv"]
    assert run_study(gpt2, *out, "--steps", "80", "--edits", "5") == 0
    found = json.loads((tmp_path / "out" / "gpt2.json").read_text())
    assert found["known"] > 10 and len(found["edits"]) == 2
    again = ["--out", tmp_path / "again", "--facts", tmp_path / "facts.tsv"]
    assert run_study(gpt2, *again, "--steps", "80", "--edits", "5") == 0
    repeated = json.loads((tmp_path / "again" / "gpt2.json").read_text())
    assert repeated["trace"] == found["trace"] and repeated["ablation"] == found["ablation"]
    tables = [make([found, repeated]) for make in (gpt2.edits_table, gpt2.ablation_table)]
    assert [row[1] for table in tables for row in table.rows[1:]] == [2, 2, 2, 2]
    (tmp_path / "prompts.tsv").write_text("the country of city3 is\tcity3\tland1\n")
    prompts = ["--prompts", tmp_path / "prompts.tsv", "--at", "last"]
    assert run_study(gpt2, "--model", tmp_path / "out", *prompts) == 0
    assert "ok" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize(
    "options, words", [("--steps 0", "--steps"), ("--model nowhere", "--prompts")]
)
def test_bad_input_of_the_gpt2_study_is_one_line(capsys, options, words):
    assert gpt2.main(options.split()) == 2
    assert words in capsys.readouterr().err


def test_what_a_run_has_in_one_folder_stays_when_another_lacks_it(tmp_path):
    source = HERE / "results" / "edits" / "lmc-seed0"
    for name in ("a", "b"):
        shutil.copytree(source, tmp_path / name / "lmc-seed0")
    file = tmp_path / "b" / "lmc-seed0" / "results.json"
    later = json.loads(file.read_text())
    del later["edits"]
    file.write_text(json.dumps(later | {"many": [{"n": 1}]}))
    (tmp_path / "b" / "lmc-seed0" / "log.jsonl").unlink()
    (group,) = runs.read_groups([tmp_path])
    (run,) = group.runs
    assert run["edits"] and run["edit"]["hop2"] > 0.9 and run["history"]
    assert run["many"] == [{"n": 1}]


# --- all ------------------------------------------------------------------------------------------


def tiny_plan(monkeypatch, *options):
    """A plan of one run of toy size and of the 2x2 of a seed, in the place of the long one."""
    tiny = " ".join(TINY)
    one = everything.each("real", {"lmc": tiny}, 1, ["minedit.py --edit", *options], "edits", 1)
    monkeypatch.setattr(everything, "plan", lambda umls: one)
    return one


def test_every_command_of_the_plan_parses(monkeypatch):
    monkeypatch.setattr(minedit, "guarded", lambda *_: 0)
    jobs = everything.plan(Path("umls.tsv"))
    assert len({job.name for job in jobs}) == len(jobs) > 200
    folders = [folder for job in jobs for folder in job.folders]
    assert len(set(folders)) == len(folders)
    for job in jobs:
        for command in job.commands:
            module, *arguments = shlex.split(command.removeprefix("-m "))
            study = minedit if module == "minedit.py" else STUDIES[module.removeprefix("studies.")]
            assert study.main([*arguments, "--out", job.out]) == 0


@pytest.mark.slow
def test_a_job_is_run_once_and_its_small_files_are_kept(tmp_path, monkeypatch, capsys):
    tiny_plan(monkeypatch)
    monkeypatch.setattr(minedit, "version", lambda: "abc")
    where = ["--work", tmp_path / "work", "--results", tmp_path / "results"]
    assert run_study(everything, *where) == 0
    kept = tmp_path / "results" / "real" / "lmc-seed0"
    assert {f.name for f in kept.iterdir()} == {"config.json", "log.jsonl", "results.json"}
    found, made = results_of(kept), results_of(tmp_path / "work" / "real" / "lmc-seed0")
    assert found == everything.rounded(made) and found["edits"]
    config = json.loads((kept / "config.json").read_text())
    config["environment"]["version"] = "abc"  # a checkout without git has none
    (kept / "config.json").write_text(json.dumps(config))
    before = (kept / "results.json").stat().st_mtime_ns
    capsys.readouterr()
    assert run_study(everything, *where) == 0 and run_study(everything, *where, "--list") == 0
    said = capsys.readouterr().out
    assert "1 of 1 jobs are done" in said and "commits of what is done: abc" in said
    assert (kept / "results.json").stat().st_mtime_ns == before


@pytest.mark.slow
def test_a_job_is_done_when_all_its_runs_have_all_their_entries(tmp_path):
    job = everything.Job("g", "g-seed0", "g", ("g/a", "g/b"), ("",), ("edits", "locate"), 1)
    config = {"environment": {"version": "abc"}}
    for folder, entries in (("g/a", {"edits": [], "locate": {}}), ("g/b", {"edits": []})):
        assert not everything.is_done(job, tmp_path)
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "results.json").write_text(json.dumps(entries))
        (tmp_path / folder / "config.json").write_text(json.dumps(config))
    assert not everything.is_done(job, tmp_path), "one has no locate"
    (tmp_path / "g/b" / "results.json").write_text(json.dumps({"edits": [], "locate": {}}))
    assert everything.is_done(job, tmp_path)
    (tmp_path / "g/a" / "config.json").write_text(json.dumps({"environment": {}}))
    assert not everything.is_done(job, tmp_path), "of no commit that it names"


@pytest.mark.slow
def test_a_job_that_fails_is_named_and_nothing_of_it_is_kept(tmp_path, monkeypatch, capsys):
    tiny_plan(monkeypatch, "-m studies.nothing", f"-m studies.second_moment {' '.join(TINY)}")
    where = ["--work", tmp_path / "work", "--results", tmp_path / "results"]
    assert run_study(everything, *where) == 1
    said = capsys.readouterr()
    assert "real-lmc-seed0.txt" in said.err and said.err.count("\n") == 1
    assert not (tmp_path / "results").exists()
    made = results_of(tmp_path / "work" / "real" / "lmc-seed0")
    assert made["edits"] and "second_moment" not in made, "nothing is run after what failed"


def test_parts_hold_every_job_once():
    jobs = list(range(11))
    parts = [everything.part_of(jobs, f"{i}/2") for i in (1, 2)]
    assert parts == [[0, 2, 4, 6, 8, 10], [1, 3, 5, 7, 9]]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--part", "0/3"], ["--part 0/3", "1 <= i <= n"]),
        (["--part", "2"], ["--part 2"]),
        (["--jobs", "0"], ["--jobs 0"]),
        (["nothing"], ["nothing", "main"]),
        (["--umls", "nowhere.tsv"], ["nowhere.tsv"]),
    ],
)
def test_bad_input_of_all_is_one_line(capsys, options, words):
    error = refused(capsys, everything, "--list", *options)
    for word in words:
        assert word in error


def test_numbers_are_rounded_to_five_digits():
    value = {"a": [0.123456789, 12345678, None], "b": {"c": 1234567.89}, "d": "0.123456789"}
    rounded = {"a": [0.12346, 12345678, None], "b": {"c": 1234600.0}, "d": "0.123456789"}
    assert everything.rounded(value) == rounded


def test_collected_results_have_a_line_for_each_entry():
    content = {"a": [1, {"b": None}], "c": {"d": 0.5}, "e": 'a "word"'}
    text = everything.in_lines(content).decode()
    assert json.loads(text) == content
    assert len(text.splitlines()) == len(content) + 2
    with pytest.raises(ValueError):
        everything.in_lines({"a": float("nan")})
