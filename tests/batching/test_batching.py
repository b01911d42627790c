"""Order, microbatches, and the layout of trees."""

import gc
import hashlib
import runpy
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from golden import load, needs_golden
from hypothesis import given, settings
from hypothesis import strategies as st

from plumb.batching.feed import Feed, Microbatch, Prefetcher, Step
from plumb.batching.layout import Batch, pack, unfold
from plumb.batching.microbatches import Packing, by_tokens, split_into_microbatches
from plumb.data.examples import Examples, Table, lengths_of
from plumb.data.order import Schedule
from plumb.data.tokenization import Example


def example(prompt, *responses) -> Example:
    array = lambda ids: np.array(ids, np.int32)
    prompt = tuple(map(array, prompt)) if isinstance(prompt, tuple) else array(prompt)
    return Example(prompt, tuple(map(array, responses)), "")


PACKING = Packing(packed=True, budget=100, world_size=1, pad_token_id=0, longest=64)


def sees(batch):
    """The rule, restated: [T, T] bool, query q sees key k <=> same tree, k not after q, and k in
    the prompt or q's response.
    """
    n = batch.input_ids.numel()
    tree, part = torch.full((n,), -1), torch.full((n,), -1)
    for r, (prompt, n_prompt, start, length) in enumerate(batch.spans.tolist()):
        tree[prompt : prompt + n_prompt], tree[start : start + length] = prompt, prompt
        part[start : start + length] = r
    q, k = torch.arange(n)[:, None], torch.arange(n)[None]
    mine = (part[None] == -1) | (part[None] == part[:, None])
    return (tree[:, None] == tree[None]) & (k <= q) & mine & (tree >= 0)[None]


def seen_by_segments(batch):
    """The same from the segments that attention runs over."""
    n, s = batch.input_ids.numel(), batch.segments
    seen = torch.zeros(n, n, dtype=torch.bool)
    keys, q0 = s.gather.split(s.key_lengths), 0
    assert s.query_ends.tolist() == [0, *np.cumsum(s.query_lengths)] and s.key_ends.tolist() == [
        0,
        *np.cumsum(s.key_lengths),
    ]
    for n_queries, k in zip(s.query_lengths, keys, strict=True):
        mask = s.mask(n_queries, len(k), None, torch.empty(0))
        causal = torch.ones(n_queries, len(k)).tril() if mask is None else mask == 0
        seen[q0 + torch.arange(n_queries)[:, None], k[None]] = causal.bool()
        q0 += n_queries
    assert q0 == n
    return seen


prompts = st.lists(st.integers(1, 99), max_size=9)
answers = st.lists(st.integers(1, 99), max_size=9)
some = lambda k: st.lists(
    st.tuples(prompts, st.lists(answers, min_size=k, max_size=k)), min_size=1, max_size=5
)
trees = st.integers(1, 5).flatmap(some)


@given(rows=trees, n_padding=st.integers(0, 150))
def test_trees_see_what_the_rule_says_and_score_what_they_hold(rows, n_padding):
    """Empty responses and prompts, one to five responses; padding sees itself alone; targets are
    the responses' tokens.
    """
    rows = [(p, r) for p, r in rows if p or any(r)] or [([1], rows[0][1])]
    examples = [example(p, *r) for p, r in rows]
    n = lengths_of(examples).tokens().sum()
    batch = pack(examples, pad_token_id=0, longest=64, row_length=n + n_padding)
    k, flat = (
        batch.n_responses[0],
        [x for p, r in rows for x in (*p, *(t for one in r for t in one))],
    )
    assert (
        batch.input_ids[0, :n].tolist() == flat
        and batch.n_tokens == n
        and max(batch.segments.key_lengths) <= 64
    )
    seen = seen_by_segments(batch)
    assert torch.equal(seen[:n, :n], sees(batch)[:n, :n])
    assert not seen[:n, n:].any() and not seen[n:, :n].any() and seen.any(1).all()
    for i, (p, responses) in enumerate(rows):
        for j, response in enumerate(responses):
            mine = batch.response == j * len(rows) + i
            assert batch.targets[mine].tolist() == response[not p :]
            context = [flat[t] for t in batch.scored[mine].tolist()]
            assert context == (p[-1:] + response)[: len(response) - (not p)]
            prompt, n_prompt, start, length = batch.spans[j * len(rows) + i].tolist()
            assert batch.position_ids[0, start : start + length].tolist() == list(
                range(len(p), len(p) + len(response))
            )
            assert batch.position_ids[0, prompt : prompt + n_prompt].tolist() == list(range(len(p)))
    n_scored = sum(len(r) - (not p) for p, rs in rows for r in rs if r)
    assert batch.n_scored == lengths_of(examples).n_scored() == n_scored and k == len(rows[0][1])


@given(rows=trees)
def test_unfolding_gives_every_response_its_row(rows):
    rows = [(p or [7], r) for p, r in rows]
    batch = pack([example(p, *r) for p, r in rows], pad_token_id=0, longest=64)
    padded = unfold(batch, 0)
    for i, (p, responses) in enumerate(rows):
        for j, response in enumerate(responses):
            row = padded.input_ids[j * len(rows) + i]
            mask = padded.attention_mask[j * len(rows) + i]
            n = len(p) + len(response)
            assert (
                row[:n].tolist() == p + response
                and not row[n:].any()
                and mask.tolist() == [1] * n + [0] * (len(row) - n)
            )
    assert padded.attention_mask.any(0).all()  # no column of padding alone
    flat = padded.input_ids.flatten()
    assert (
        flat[padded.scored + 1].tolist() == batch.targets.tolist()
        and batch.n_processed(False) == flat.numel()
    )


def test_a_prompt_of_its_own_for_each_response_makes_two_trees():
    """Pairs whose tokenized prompts differ: as two examples of one response, numbered as the pair's
    two.
    """
    pair = pack(
        [example([1, 2], [3, 4], [5]), example(([1, 2], [6]), [7, 8], [9])],
        pad_token_id=0,
        longest=64,
    )
    assert pair.input_ids[0].tolist() == [
        1,
        2,
        3,
        4,
        5,
        1,
        2,
        7,
        8,
        6,
        9,
    ] and pair.response.tolist() == [0, 0, 2, 1, 1, 3]
    assert torch.equal(seen_by_segments(pair), sees(pair)) and pair.position_ids[
        0, -2:
    ].tolist() == [0, 1]
    lengths = lengths_of([example([1, 2], [3, 4], [5]), example(([1, 2], []), [7, 8], [9])])
    assert lengths.tokens().tolist() == [5, 5] and lengths.longest().tolist() == [4, 4]
    assert lengths.n_scored() == 5  # the 9 has no token before it


@needs_golden
def test_unfolded_batches_equal_the_2023_code():
    """The concatenated chosen and rejected rows of 6 pairs: ids, mask and labels. 2023 padded the
    second half's ids with 0.
    """
    golden = load("collate.json.gz")
    batch, concatenated = golden["batch"], golden["concatenated"]
    examples = []
    for i in range(6):
        n_prompt = batch["chosen_labels"][i].count(-100) - batch["chosen_attention_mask"][i].count(
            0
        )
        sides = [
            batch[f"{s}_input_ids"][i][: sum(batch[f"{s}_attention_mask"][i])]
            for s in ("chosen", "rejected")
        ]
        examples.append(example(sides[0][:n_prompt], *(side[n_prompt:] for side in sides)))
    packed = pack(examples, pad_token_id=2, longest=512)
    ours = unfold(packed, pad_token_id=2)
    mask = torch.tensor(concatenated["concatenated_attention_mask"])
    assert torch.equal(ours.attention_mask, mask)
    assert torch.equal(
        ours.input_ids * mask, torch.tensor(concatenated["concatenated_input_ids"]) * mask
    )
    labels = torch.full_like(mask, -100)
    labels.view(-1)[ours.scored + 1] = packed.targets
    assert torch.equal(labels, torch.tensor(concatenated["concatenated_labels"]))


@settings(max_examples=200)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=70),
    budget=st.integers(10, 400),
    at_least=st.integers(1, 5),
    world=st.integers(1, 8),
    packed=st.booleans(),
)
def test_a_plan_loses_nothing_and_keeps_the_budget(lengths, budget, at_least, world, packed):
    of_batch = lengths_of([example([1] * (n - 1), [2]) for n in lengths])
    packing = replace(PACKING, budget=budget, world_size=world, packed=packed)
    micro = microbatches(split_into_microbatches(of_batch, packing, at_least), world)
    # every rank has the same number of microbatches
    assert all(len(parts) == world for parts in micro)
    assert sorted(i for parts in micro for part in parts for i in part) == list(range(len(lengths)))
    assert min(at_least, max(1, len(lengths) // world)) <= len(micro) <= -(-len(lengths) // world)
    for part in (
        part
        for parts in micro
        for part in parts
        if len(part) > 1 and len(micro) < -(-len(lengths) // world)
    ):
        cost = (
            sum(lengths[i] for i in part) if packed else len(part) * max(lengths[i] for i in part)
        )
        assert cost <= budget


def microbatches(parts, world):
    parts = [part.tolist() for part in parts]
    return [parts[i : i + world] for i in range(0, len(parts), world)]


def plan_by_definition(examples, packing, at_least):
    """As few microbatches as fit, at least `at_least`: by tokens, the longest example first and
    each to the part that is emptiest so far (of equal ones, the first), fullest part first; or,
    where rows are padded, neighbours in length.

    This is how every run so far was cut: another plan would change the rounding, and what a resumed
    run does.
    """
    n = len(examples)
    world = packing.world_size
    k = len(examples[0].responses)
    if packing.packed:
        sizes = [len(e.prompt) + sum(map(len, e.responses)) for e in examples]
    else:
        sizes = [len(e.prompt) + max(map(len, e.responses)) for e in examples]
    longest_first = sorted(range(n), key=lambda i: -sizes[i])  # of equally long ones, the first
    most = -(-n // world)
    n_micro = min(
        most, max(1, min(at_least, n // world), -(-sum(sizes) // (packing.budget * world)))
    )
    load = lambda part: sum(sizes[i] for i in part)
    padded = lambda part: k * len(part) * max((sizes[i] for i in part), default=0)
    cost = load if packing.packed else padded
    while True:
        parts = [[] for _ in range(n_micro * world)]
        if packing.packed:
            for i in longest_first:
                min(parts, key=load).append(i)
            parts.sort(key=load, reverse=True)  # stable: equally full ones stay in their order
        else:
            each, rest = divmod(n, len(parts))
            left = iter(longest_first)
            parts = [[next(left) for _ in range(each + (p < rest))] for p in range(len(parts))]
        if n_micro == most or all(cost(part) <= packing.budget or len(part) == 1 for part in parts):
            return [parts[i : i + world] for i in range(0, len(parts), world)]
        n_micro += 1


# many ties
lengths_of_pairs = st.tuples(st.integers(0, 12), st.integers(0, 12), st.integers(0, 12))


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(lengths_of_pairs, min_size=1, max_size=40),
    budget=st.integers(10, 150),
    at_least=st.integers(1, 5),
    world=st.integers(1, 8),
    packed=st.booleans(),
)
def test_a_plan_is_the_one_by_definition(lengths, budget, at_least, world, packed):
    examples = [example([1] * p, [2] * a, [3] * b) for p, a, b in lengths]
    packing = replace(PACKING, budget=budget, world_size=world, packed=packed)
    found = microbatches(split_into_microbatches(lengths_of(examples), packing, at_least), world)
    assert found == plan_by_definition(examples, packing, at_least)


def test_parts_are_balanced_by_tokens():
    sizes = np.random.default_rng(0).lognormal(5, 0.7, 64).astype(int)
    largest_first = np.sort(sizes)[::-1]
    for n in (2, 4, 8):
        loads = [largest_first[part].sum() for part in by_tokens(largest_first, n)]
        assert max(loads) / np.mean(loads) < 1.02
        equal_counts = [part.sum() for part in np.split(sizes, n)]
        assert max(loads) / np.mean(loads) < max(equal_counts) / np.mean(equal_counts)


def test_ranks_share_a_step_and_a_rank_without_a_part_has_weight_0():
    examples = [example([1], [i], [i + 50]) for i in range(3)]
    reference = np.arange(6.0).reshape(3, 2)
    steps = [
        Feed(examples, replace(PACKING, world_size=4), rank, reference).step(np.array([2, 0, 1]))
        for rank in range(4)
    ]
    # the batch is everyone's
    assert all(step.indices.tolist() == [2, 0, 1] and len(step.lengths) == 3 for step in steps)
    shares = [
        (m.weight, m.batch.targets.tolist(), m.batch.extras.response["reference"].tolist())
        for step in steps
        for m in step.microbatches
    ]
    assert sorted(x for x in shares if x[0]) == [
        (1, [0, 50], [0, 1]),
        (1, [1, 51], [2, 3]),
        (1, [2, 52], [4, 5]),
    ]
    assert [w for w, _, _ in shares].count(0) == 1


def test_a_rank_makes_its_own_examples_alone():
    """16 ranks of 4 pairs each: of the 64 of a batch a rank touches its 4, so its work does not
    grow with the ranks.
    """

    class Counted(Examples):
        def __getitem__(self, i):
            made.append(i)
            return super().__getitem__(i)

    store = SimpleNamespace(
        ids=np.arange(600, dtype=np.uint16),
        starts=np.arange(0, 601, 2),
        rows=np.array([(3 * i, 0, i) for i in range(100)]),
        files=["x"],
    )
    items = np.array([(i, 3 * i + 1, 3 * i + 2) for i in range(100)])
    examples = Counted(
        [Table(store, items, True)], None, np.arange(100), np.full((100, 3), 2, np.int32)
    )
    batch, seen = np.random.default_rng(0).permutation(100)[:64], []
    for rank in range(16):
        made = []
        step = Feed(examples, replace(PACKING, world_size=16), rank).step(batch)
        assert len(made) == 4 and step.lengths.tokens().sum() == 64 * 6
        seen += made
    assert sorted(seen) == sorted(batch.tolist())


def test_the_benchmark_of_the_hosts_work_runs(monkeypatch, tmp_path, capsys):
    """It compares plans, numbers and digests with those of its baseline, which looks at every
    example.
    """
    monkeypatch.setattr(sys, "argv", ["host_work.py", "--smoke", "--out", str(tmp_path)])
    runpy.run_path(str(ROOT / "benchmarks/host_work.py"), run_name="__main__")
    assert (tmp_path / "host_work.md").read_text() in capsys.readouterr().out


def test_the_thread_ahead_keeps_order_and_passes_errors_on():
    def steps():
        for i in range(5):
            yield Step(np.array([i]), lengths_of([example([i], [i])]), [])
        raise OSError("the disk is gone")

    ahead = Prefetcher(steps(), torch.device("cpu"))
    assert [int(next(ahead).indices[0]) for _ in range(5)] == list(range(5))
    for _ in range(2):  # again and again, as of an iterator
        with pytest.raises(OSError, match="the disk is gone"):
            next(ahead)
    slow = Prefetcher(
        (time.sleep(0.2) or Step(np.arange(0), lengths_of([]), []) for _ in range(1)),
        torch.device("cpu"),
    )
    next(slow)
    assert slow.waited_secs > 0.1 and next(slow, None) is next(slow, None) is None


def test_the_thread_ahead_ends_with_its_prefetcher():
    steps = [Step(np.arange(0), lengths_of([]), [])] * 3
    ahead = Prefetcher(steps, torch.device("cpu"))
    next(ahead)
    (thread,) = ahead.thread._threads
    del ahead
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()


def test_the_thread_ahead_of_a_gpu_is_on_that_gpu(monkeypatch):
    """It pins the tensors of each microbatch, and has taken the process's GPU before."""
    calls = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append(str(device)))
    monkeypatch.setattr(Batch, "pin", lambda batch: calls.append("pin") or batch)
    made = pack([example([1], [2])], pad_token_id=0, longest=8)
    steps = [Step(np.array([0]), lengths_of([example([1], [2])]), [Microbatch(made, 1.0, [0])])]
    ahead = Prefetcher(steps, torch.device("cuda:3"))
    assert len(next(ahead).microbatches) == 1 and calls == ["cuda:3", "pin"]


@given(
    n=st.integers(1, 40),
    batch_size=st.integers(1, 20),
    n_epochs=st.one_of(st.none(), st.integers(1, 3)),
    n_examples=st.one_of(st.none(), st.integers(1, 90)),
    shuffle=st.booleans(),
)
def test_schedule(n, batch_size, n_epochs, n_examples, shuffle):
    if n_epochs is None and n_examples is None:
        return
    schedule = Schedule(
        n, batch_size=batch_size, n_epochs=n_epochs, n_examples=n_examples, shuffle=shuffle, seed=3
    )
    batches = [b.tolist() for b in schedule]
    assert len(batches) == schedule.n_steps
    seen = [i for b in batches for i in b]
    assert (
        len(seen)
        == schedule.n_examples
        == min(n * n_epochs if n_epochs else n_examples, n_examples or n * n_epochs)
    )
    # every epoch sees every example once, the last one as far as it goes
    for epoch in range(schedule.n_epochs):
        part = seen[epoch * n : (epoch + 1) * n]
        assert len(set(part)) == len(part) and (len(part) < n or sorted(part) == list(range(n)))
    assert all(len(b) <= batch_size for b in batches)
    for i in range(len(batches)):  # a run that was stopped after i batches goes on with the next
        assert [b.tolist() for b in schedule.after(sum(map(len, batches[:i])))] == batches[i:]


def test_order_depends_on_the_seed_and_the_epoch_alone():
    """2023: every seed gave the same order. This order must stay: a change here moves every run's
    numbers.
    """
    options = {"batch_size": 7, "n_epochs": 2, "n_examples": None, "shuffle": True}
    order = lambda seed: [i for b in Schedule(50, seed=seed, **options) for i in b.tolist()]
    assert order(0) == order(0) != order(7) and order(0)[:50] != order(0)[50:]
    assert hashlib.sha256(str(order(0)).encode()).hexdigest()[:12] == "0e6237d6be88"


def test_no_example_no_step():
    assert list(Schedule(0, batch_size=4, n_epochs=1, n_examples=None, shuffle=True, seed=0)) == []
