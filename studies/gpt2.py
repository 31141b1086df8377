"""edit.py and curvature.py on a model of Hugging Face's transformers: GPT-2, in minutes on a CPU.

Trains a small GPT-2 (transformers' own class, random weights) on sentences made of
results/countries.tsv, three phrasings of every fact, and on a few sentences of random words that are
repeated over and over. Then

    edits     a hundred facts by MEMIT in one update, at one layer and over two, at the last token of
              the prompt (where these three blocks bring a fact together: at the last subject token,
              as in a language model, edits fail); asked in the phrasing of the edit (efficacy), in
              one that the edit has not seen (paraphrase), and other facts (specificity)
    trace     which layer's output, at which token, restored, brings an answer back
    recite    the repeated sentences out by K-FAC, as few of the facts as can be

lam and the share of curvature to keep are chosen on facts and sentences that are not scored. With
--model FOLDER --prompts FILE it takes weights and tokenizer of your own instead, and edits each line
`prompt <tab> subject <tab> new answer` by itself (ROME, target by gradient).

    python -m studies.gpt2 --out runs/gpt2            # three minutes on two cores
    python -m studies.gpt2 --model runs/gpt2 --prompts FILE --layer transformer.h.1.mlp.c_proj

Needs `pip install transformers`. Saves model and tokenizer to --out, and gpt2.json.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import curvature
import edit as editing
import minedit
from minedit import UserError, cell, mean, require, share_of, table
from studies.runs import Table, table_of

PHRASINGS = ("the {r} of {h} is", "we know that the {r} of {h} is", "{r} of {h} :")
PAD = 0
N_REPEATED = 16  # sentences of random words
LAMBDAS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0, 10_000.0)
KEEPS = (0.99, 0.97, 0.96, 0.95, 0.94, 0.93, 0.92, 0.91, 0.9, 0.89, 0.88, 0.87, 0.85, 0.8, 0.7)


def load_transformers():
    try:
        import transformers
    except ImportError:
        raise UserError("studies.gpt2 needs transformers: pip install transformers") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


# --- Sentences ------------------------------------------------------------------------------------


class Fact(NamedTuple):
    head: str
    relation: str
    tail: str


def read_facts(file: Path) -> list[Fact]:
    """The facts of a file with one tail for each head and relation."""
    tails = minedit.kg.read_triples(file).tails
    return [Fact(h, r, next(iter(t))) for (h, r), t in tails.items() if len(t) == 1]


class Words:
    """A vocabulary of whole words; word 0 is the padding."""

    def __init__(self, texts: list[str]):
        words = sorted(set(" ".join(texts).split()))
        self.number = {"<pad>": PAD} | {word: i for i, word in enumerate(words, 1)}

    def read(self, text: str) -> list[int]:
        return [self.number[word] for word in text.split()]


def make_prompts(words: Words, facts: list[Fact], phrasing: str, tails: list[str]):
    """`editing.Prompts` of facts with these answers."""
    texts = [words.read(phrasing.format(r=fact.relation, h=fact.head)) for fact in facts]
    return editing.prompts(texts, [words.read(tail) for tail in tails], PAD)


def requests_of(made, rows: Tensor) -> editing.Requests:
    """All prompts, as edits of the facts `rows` of a site."""
    new = made.targets.max(1).values  # only targets count
    return editing.Requests(rows, made.tokens, new, new, made.targets, made.position)


# --- The model ------------------------------------------------------------------------------------


def train(model, sentences: Tensor, repeated: Tensor, steps: int, generator, batch: int = 128):
    """Sentences at random, and in each batch a few of the repeated ones."""
    n_repeated = batch // 6
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    model.train()
    for step in range(1, steps + 1):
        rows = torch.randint(len(sentences), (batch - n_repeated,), generator=generator)
        again = torch.randint(len(repeated), (n_repeated,), generator=generator)
        tokens = torch.cat([sentences[rows], repeated[again]])
        logits = model(input_ids=tokens[:, :-1]).logits
        targets = tokens[:, 1:].masked_fill(tokens[:, 1:] == PAD, -100)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 100 == 0 or step == steps:
            print(f"step {step}/{steps}  loss {loss.item():.3f}", flush=True)
    model.eval()


def adapted(model) -> editing.Adapted:
    """Padding stands at the right, where a causal model does not look: no mask is needed."""
    return editing.Adapted(model, lambda m, tokens: m(input_ids=tokens))


@torch.no_grad()
def right(model, made) -> Tensor:
    """Whether the whole answer is what the model says [n]."""
    request = requests_of(made, torch.arange(len(made.tokens)))
    return editing.answered(editing.logits_of(model(made.tokens)), request)[1]


@torch.no_grad()
def recited(model, sentences: Tensor, given: int = 3) -> float:
    """Share of sentences of which every word after the first `given` is predicted."""
    answers = editing.logits_of(model(sentences[:, :-1])).argmax(-1)
    return share_of((answers == sentences[:, 1:])[:, given - 1 :].all(1))


# --- Edits ----------------------------------------------------------------------------------------


class Score(NamedTuple):
    method: str
    lam: float
    efficacy: float
    paraphrase: float
    specificity: float
    seconds: float

    def mean(self) -> float:
        """Harmonic, in percent."""
        shares = (self.efficacy, self.paraphrase, self.specificity)
        return 100 * statistics.harmonic_mean([max(share, 1e-9) for share in shares])


class Editor:
    """A model and all facts that it knows, each as a prompt."""

    def __init__(self, model, words: Words, facts: list[Fact]):
        self.model, self.words, self.facts = model, words, facts
        self.layers = [
            f"transformer.h.{i}.mlp.c_proj" for i in range(len(model.model.transformer.h))
        ]
        self.made = [
            make_prompts(words, facts, phrasing, [fact.tail for fact in facts])
            for phrasing in PHRASINGS
        ]
        # keys are means over two phrasings; the third is left for the paraphrase
        first, second, _ = self.made
        options = {"phrasings": [(second.tokens, second.position)], "pad": PAD}
        self.at = editing.site(
            self.model, self.layers[1], 0, first.tokens, position=first.position, **options
        )

    def wanted(self, rows: list[int], generator) -> list[str]:
        """New tails, each another one of the same relation."""
        tails = {}
        for fact in self.facts:
            tails.setdefault(fact.relation, set()).add(fact.tail)
        require(min(map(len, tails.values())) > 1, "too few facts are known; use more --steps")
        new = []
        for i in rows:
            fact = self.facts[i]
            others = sorted(tails[fact.relation] - {fact.tail})
            new.append(others[int(torch.randint(len(others), (1,), generator=generator))])
        return new

    def targets(self, rows: list[int], new: list[str]) -> Tensor:
        """r of each fact at the second layer, by gradient, through its own rank-one edit."""
        facts = [self.facts[i] for i in rows]
        made = make_prompts(self.words, facts, PHRASINGS[0], new)
        request = requests_of(made, torch.tensor(rows))
        u = editing.direction("rome", self.at, request)
        notes = {}
        options = {"steps": 30, "decay": 0.05, "batch": 256, "diagnostics": notes}
        r = editing.gradient_residual(self.model, self.at, request, u, **options)
        print(f"targets of {len(rows)} facts: {int(notes['reached'].sum())} reach their answer")
        return r

    def score(self, method: str, lam: float, rows, new, spared, updates, began: float) -> Score:
        facts = [self.facts[i] for i in rows]
        others = [self.facts[i] for i in spared]
        keep = make_prompts(self.words, others, PHRASINGS[0], [fact.tail for fact in others])
        with editing.edited(self.model, updates):
            shares = [
                share_of(right(self.model, make_prompts(self.words, facts, phrasing, new)))
                for phrasing in (PHRASINGS[0], PHRASINGS[2])
            ]
            shares.append(share_of(right(self.model, keep)))
        return Score(method, lam, *shares, time.perf_counter() - began)

    def memit(self, rows, _: list[str], r: Tensor, lam: float) -> dict[str, Tensor]:
        """At one layer; the arguments of `memit_two`."""
        return {self.at.name: editing.memit_update(self.at.keys[rows], r, self.at.C, lam)}

    def memit_two(self, rows, new: list[str], r: Tensor, lam: float) -> dict[str, Tensor]:
        """Over the first two layers: r is what the stream after them lacks."""
        made = make_prompts(self.words, [self.facts[i] for i in rows], PHRASINGS[0], new)
        request = requests_of(made, torch.tensor(rows))
        sites = [(name, 0) for name in self.layers[:2]]
        stream = ("transformer.h.2.ln_1", 0)
        arguments = (self.model, sites, request, r, lam, self.made[0].tokens, stream)
        return editing.memit_layers(*arguments, pad=PAD)


def edit_many(editor: Editor, n: int, generator) -> list[Score]:
    """n facts in one update, a quarter of all at most; lam is chosen on half of the facts, the other
    half is scored."""
    order = torch.randperm(len(editor.facts), generator=generator).tolist()
    half = len(order) // 2
    choosing, scored = order[:half], order[half:]
    new = {i: tail for i, tail in zip(order, editor.wanted(order, generator))}
    found = []
    for method, update in (("one layer", editor.memit), ("two layers", editor.memit_two)):
        best = None
        r = editor.targets(choosing[:n], [new[i] for i in choosing[:n]])
        for lam in LAMBDAS:
            rows, began = choosing[:n], time.perf_counter()
            tails = [new[i] for i in rows]
            updates = update(rows, tails, r, lam)
            result = editor.score(method, lam, rows, tails, choosing[n:], updates, began)
            if best is None or result.mean() > best.mean():
                best = result
        rows, began = scored[:n], time.perf_counter()
        tails = [new[i] for i in rows]
        r = editor.targets(rows, tails)
        updates = update(rows, tails, r, best.lam)
        found.append(editor.score(method, best.lam, rows, tails, scored[n:], updates, began))
    return found


def trace_layers(editor: Editor, generator) -> dict[str, list[float]]:
    """Mean rise of the right answer's probability, token by token, where one layer's output is that
    of the run with the right subject; prompts of one length with answers of one word."""
    made = editor.made[0]
    one_word = (made.targets >= 0).sum(1) == 1
    length = made.position[one_word].mode().values + 1
    rows = (one_word & (made.position + 1 == length)).nonzero().flatten()
    tokens, answer = made.tokens[rows, :length], made.targets[rows].max(1).values
    place = int((tokens != tokens[0]).sum(0).argmax())  # where most of them differ: the subject
    clean, other = editing.prompt_pairs(tokens, answer, place, 50, generator)
    sites = [(name, 0) for name in editor.layers]
    rise = editing.trace(editor.model, tokens[clean], tokens[other], answer[clean], sites).rise
    return {name: rise[i].mean(-1).tolist() for i, (name, _) in enumerate(sites)}


# --- Repeated sentences out by curvature ----------------------------------------------------------


class Ablated(NamedTuple):
    keep: float
    recited: float
    facts: float


def ablate_repeated(editor: Editor, sentences: Tensor, repeated: Tensor) -> tuple[Ablated, Ablated]:
    """Before, and with one share of curvature mass kept in all feed-forward layers: that at which
    most facts of one half are left beyond the sentences; the other half of both is scored."""
    model = editor.model.model  # names of layers are its own
    layers = []
    for name in editor.layers:
        layers += [name.replace("c_proj", "c_fc"), name]
    data = torch.cat([sentences, repeated.repeat(len(sentences) // len(repeated) // 5, 1)])
    batches = []
    for part in data.split(256):
        targets = part[:, 1:].masked_fill(part[:, 1:] == PAD, -100)
        batches.append((part[:, :-1], targets))
    factors = curvature.kronecker_factors(
        model,
        batches,
        F.cross_entropy,
        layers,
        generator=torch.Generator().manual_seed(0),
        positions="counted",  # no padding
    )
    spectra = {n: (curvature.eigen(A), curvature.eigen(G)) for n, (A, G) in factors.items()}
    halves = slice(None, None, 2), slice(1, None, 2)

    def measure(keep: float, half: slice) -> Ablated:
        made = editing.Prompts(*(x[half] for x in editor.made[0]))
        return Ablated(keep, recited(model, repeated[half]), share_of(right(model, made)))

    def weights_at(keep: float) -> dict[str, Tensor]:
        found = {}
        for name, (A, G) in spectra.items():
            W = curvature.layer_of(model, name).matrix.detach()
            found[name] = curvature.ablate(W, A, G, keep)
        return found

    tried = []
    for keep in KEEPS:
        with curvature.ablated(model, weights_at(keep)):
            tried.append(measure(keep, halves[0]))
    rows = [("K-FAC, other half: keep", "recited", "facts")]
    for a in tried:
        rows.append(tuple(map(cell, a)))
    print("\n" + table(rows))
    best = max(tried, key=lambda a: a.facts - a.recited)
    before = measure(1.0, halves[1])
    with curvature.ablated(model, weights_at(best.keep)):
        return before, measure(best.keep, halves[1])


def edits_table(runs: list[dict]) -> Table | None:
    """Of the gpt2.json of several seeds."""
    names = ("lam", "efficacy", "paraphrase", "specificity", "score")
    rows = [("MEMIT", "runs", "lam", *(f"{name} (lowest)" for name in names[1:]))]
    for entries in zip(*(run["edits"] for run in runs)):
        row = [entries[0]["method"], len(runs)]
        for name in names:
            row.append(mean([entry[name] for entry in entries], None, name != "lam"))
        rows.append(tuple(row))
    known = mean([run["known"] for run in runs], ".0f")
    legend = "paraphrase: asked in words in which no key was read; score: harmonic mean, percent"
    return table_of(rows, f"{known} of {runs[0]['facts']} facts known; {legend}")


def ablation_table(runs: list[dict]) -> Table | None:
    """Of the gpt2.json of several seeds."""
    rows = [("K-FAC", "runs", "keep", "recited", "facts (lowest)")]
    for name in runs[0]["ablation"]:
        entries = [run["ablation"][name] for run in runs]
        row = [name, len(runs)]
        for key in ("keep", "recited", "facts"):
            row.append(mean([entry[key] for entry in entries], lowest=key == "facts"))
        rows.append(tuple(row))
    return table_of(rows, "recited: repeated random sentences; facts: known ones still right")


# --- Command line ---------------------------------------------------------------------------------


def save(model, words: Words, folder: Path, transformers):
    """Model and tokenizer, for AutoModelForCausalLM and AutoTokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel(words.number, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")
    model.save_pretrained(folder)
    fast.save_pretrained(folder)


def study(args) -> dict:
    transformers = load_transformers()
    generator = torch.Generator().manual_seed(args.seed)
    facts = read_facts(args.facts)
    texts = []
    for phrasing in PHRASINGS:
        texts += [f"{phrasing.format(r=f.relation, h=f.head)} {f.tail} ." for f in facts]
    words = Words(texts)
    sentences = pad_sequence([torch.tensor(words.read(text)) for text in texts], True, PAD)
    n_words, width = len(words.number), sentences.shape[1]
    repeated = torch.randint(1, n_words, (N_REPEATED, width), generator=generator)
    sizes = {"vocab_size": n_words, "n_positions": width, "n_embd": 128, "n_layer": 3, "n_head": 4}
    none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}  # of the global generator
    config = transformers.GPT2Config(**sizes, **none, pad_token_id=PAD)
    with torch.random.fork_rng():
        torch.manual_seed(args.seed)
        model = transformers.GPT2LMHeadModel(config)
    print(f"{len(facts)} facts, {len(texts)} sentences, {n_words} words")
    began = time.perf_counter()
    train(model, sentences, repeated, args.steps, generator)
    print(f"{time.perf_counter() - began:.0f} s for training")
    save(model, words, args.out, transformers)
    reader = adapted(model)
    known = right(reader, make_prompts(words, facts, PHRASINGS[0], [f.tail for f in facts]))
    n_known = int(known.sum())
    print(f"{n_known} of {len(facts)} facts are known")
    require(n_known >= 4, f"--steps {args.steps}: {n_known} facts are known; train longer")
    editor = Editor(reader, words, [fact for fact, knows in zip(facts, known) if knows])
    n = min(args.edits, n_known // 4)
    scores = edit_many(editor, n, generator)
    rows = [("MEMIT", "facts", "lam", "efficacy", "paraphrase", "specificity", "score", "s")]
    for s in scores:
        shares = (s.efficacy, s.paraphrase, s.specificity, s.mean(), s.seconds)
        rows.append((s.method, n, s.lam, *map(cell, shares)))
    print("\n" + table(rows))
    traced = trace_layers(editor, generator)
    for name, rise in traced.items():
        print(f"{name}: " + "  ".join(f"{x:.2f}" for x in rise) + "  rise, token by token")
    before, after = ablate_repeated(editor, sentences, repeated)
    rows = [("K-FAC", "keep", "recited", "facts")]
    for name, a in (("before", before), ("after", after)):
        rows.append((name, *map(cell, a)))
    print("\n" + table(rows))
    return {
        "facts": len(facts),
        "known": n_known,
        "n": n,
        "edits": [s._asdict() | {"score": s.mean()} for s in scores],
        "trace": traced,
        "ablation": {"before": before._asdict(), "after": after._asdict()},
        "seconds": round(time.perf_counter() - began, 1),
    }


def edit_pretrained(args):
    """Edit each line of the prompts by itself in a model from a folder; print what it says."""
    transformers = load_transformers()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(args.model, local_files_only=True)
        model = transformers.AutoModelForCausalLM.from_pretrained(args.model, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"--model {args.model}: {str(error).splitlines()[0]}") from None
    reader = adapted(model.eval())
    lines = [line.split("\t") for line in args.prompts.read_text().splitlines() if line.strip()]
    for line in lines:
        line[0] = line[0].rstrip()  # a blank at its end would belong to the answer's first token
        fine = len(line) == 3 and line[1] and line[1] in line[0] and line[2].strip()
        require(fine, f"--prompts: a prompt, its subject, an answer, with tabs, not {line}")
    try:
        editing.layer_of(reader, args.layer)
    except (AttributeError, ValueError) as error:
        raise UserError(f"--layer {args.layer}: {error}") from None
    rows = [("prompt", "before", "after", "wanted", "p", "")]
    shared = 0  # C over all prompts
    for prompt, *_ in lines:
        tokens = torch.tensor([tokenizer(prompt)["input_ids"]])
        shared = shared + editing.site(reader, args.layer, 0, tokens).C
    for prompt, subject, answer in lines:
        text = tokenizer(prompt)["input_ids"]
        end = prompt.index(subject) + len(subject)
        place = len(tokenizer(prompt[:end])["input_ids"]) - 1
        if args.at == "last":
            place = len(text) - 1
        whole = tokenizer(f"{prompt} {answer}")["input_ids"]
        made = editing.prompts([text], [whole[len(text) :]], tokenizer.pad_token_id or 0, [place])
        usual = editing.site(reader, args.layer, 0, made.tokens, position=made.position)
        usual.C = shared  # holds that of this prompt, too
        at = editing.shrunk(usual, args.shrink)
        request = requests_of(made, torch.tensor([0]))
        notes, u = {}, editing.direction("rome", at, request)
        r = editing.gradient_residual(reader, at, request, u, diagnostics=notes)
        last = torch.tensor([text])
        before = editing.logits_of(reader(last))[0, -1].argmax().item()
        with editing.edited(reader, {args.layer: torch.outer(r[0], u[0])}):
            after = editing.logits_of(reader(last))[0, -1].argmax().item()
            ok = right(reader, made).all()
        said = [tokenizer.decode([token]) for token in (before, after)]
        rows.append(
            (prompt, *said, answer, cell(float(notes["probability"])), "ok" if ok else "NO")
        )
    print(table(rows))


def command(args):
    for name in ("steps", "edits"):
        require(getattr(args, name) >= 1, f"--{name} must be at least 1, got {getattr(args, name)}")
    if args.model is not None:
        require(args.prompts is not None, "--model wants --prompts, a file of lines to edit")
        edit_pretrained(args)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    found = study(args)
    minedit.write_atomically(args.out / "gpt2.json", found)
    print(f"\n{found['seconds']:.0f} s in all")


def main(argv: list[str] | None = None) -> int:
    formatter = argparse.ArgumentDefaultsHelpFormatter
    about = {"description": __doc__.split("\n\n")[0], "formatter_class": formatter}
    parser = minedit.Parser("python -m studies.gpt2", allow_abbrev=False, **about)
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/gpt2"), help="folder for all of it")
    add("--facts", type=Path, default=Path("results/countries.tsv"), help="triples")
    add("--seed", type=int, default=0)
    add("--steps", type=int, default=400, help="of training")
    add("--edits", type=int, default=100, help="facts in one update")
    add("--model", type=Path, help="folder of a model and a tokenizer of your own")
    add("--prompts", type=Path, help="lines prompt <tab> subject <tab> new answer")
    add("--layer", default="transformer.h.1.mlp.c_proj", help="to edit in --model")
    add("--at", choices=["subject", "last"], default="subject", help="token of the key in --model")
    add("--shrink", type=float, default=0.1, help="of C in --model")
    return minedit.guarded(command, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
