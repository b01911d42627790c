"""Plan a run (plan=true) without a GPU, weights or writing a file: memory of each GPU by kind,
steps, and time.
"""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from plumb.batching import microbatches
from plumb.batching.microbatches import Packing
from plumb.data.examples import Lengths, lengths_of
from plumb.data.order import Schedule
from plumb.data.prepare import UNITS, load_examples
from plumb.data.registry import LOADERS, resolve
from plumb.data.tokenization import Example
from plumb.errors import UserError
from plumb.losses.advantage_rules import GaeRule
from plumb.losses.registry import Loss
from plumb.models.adapters import knobs_of, size_of_adapters
from plumb.models.blocks import block_class, recomputes_blocks, share_of_blocks
from plumb.models.chunked_head import step_bytes
from plumb.models.forward_path import DTYPES
from plumb.models.load import load_config, load_tokenizer
from plumb.models.quantized_base import BYTES, layers_to_quantize
from plumb.models.scalar_head import put_scalar_head
from plumb.planning import activations, rollouts
from plumb.planning.activations import Held
from plumb.planning.cards import CARDS
from plumb.training import budget as sizing
from plumb.training.budget import ClusterShape, Memory, Precision, Weights
from plumb.training.optimizers import MUON, WHOLE, make_optimizer, make_schedule
from plumb.training.rollout_memory import (
    REWARD_ITEMSIZE,
    Beside,
    PolicySize,
    beside_policy,
    computing_dtype,
)
from plumb.training.rollouts import check_prompts, samples_responses, trees_of
from plumb.training.run_plan import Numbers, plan_run
from plumb.training.stepwise import Joint, Stepwise

GPU = torch.device("cuda")  # planned for, wherever the plan is made
N_STEPS = 32  # steps that are laid out, evenly spread over the run
GPUS_PER_NODE = 8
MOST_GPUS = 64  # the most that an alternative may need
# of an example, where the data is not available
ASSUMED_RESPONSES = {"single": 1, "labelled": 1, "pair": 2, "list": 4, "rollout": 1}

Check = Callable[[DictConfig], object]  # raises UserError for a config that no run can have


@dataclass(frozen=True)
class Model:
    """Hold what a plan needs to know of a model."""

    name: str
    config: Any  # transformers'
    weights: Weights
    cost: sizing.Cost
    # activations.count of this model, each once; None where it fails
    held: Callable[..., Held | None]
    packed: bool  # can compute trees in a row
    plain_head: bool  # its logits are hidden states times a matrix
    n_out: int  # rows of that matrix: the vocabulary, or one score
    own_head: int  # numbers of that matrix, 0 if it is the embedding


@dataclass(frozen=True)
class Data:
    """Hold the examples of a plan."""

    examples: Sequence[Example]  # all training examples, or one of assumed lengths
    n: int | None  # examples of an epoch, None if unknown
    description: str  # how they were obtained, for the plan's text
    lengths: Lengths  # of the trees that steps are made of
    n_held_out: int = 0  # where they are known
    n_trees: int = 1  # of an example


class Part(NamedTuple):
    """Describe what one GPU computes of a microbatch; `shape` is rows and tokens in each."""

    shape: tuple[int, int]
    n_keys: int | None  # of trees; None: padded rows
    n_scored: int


class Steps(NamedTuple):
    """Describe the steps of a run."""

    fullest: Part  # the largest part of a microbatch on one GPU
    n_micro: float  # microbatches of a step, on average
    n_tokens: float  # of an example, on average
    forward: float  # operations of one forward pass over an example, on average


@dataclass(frozen=True)
class Plan:
    """Hold the trainer's decisions and the memory they would take."""

    layout: ClusterShape
    precision: Precision
    live: bool  # the reference runs beside the policy
    cached: bool  # the reference runs once, before the first step
    summed: bool  # gradients are summed over processes after each microbatch
    counted: bool  # activations were counted, not assumed
    steps: Steps
    memory: Memory
    rollout: rollouts.Rollout | None = None  # where the policy samples what it learns from


def accept(config: DictConfig) -> None:
    """Accept every config."""


def show(config: DictConfig, loss: Loss, check: Check = accept) -> str:
    """Return the plan of this run as one screen of text. Raise UserError if it cannot be
    planned. `check`: what a change that is proposed must pass.
    """
    model, data = read_model(config, loss), read_data(config, loss)
    plan, limit = make_plan(config, loss, model, data), gb(config)
    lines = [
        *_what(config, loss, model, data, plan),
        *_run(config, model, data, plan),
        "",
        *_table(plan.memory),
        "",
    ]
    peak = plan.memory.peak / 1e9
    if peak <= limit:
        return "\n".join([*lines, f"fits: {peak:.1f} of {limit:g} GB"])
    fixes = alternatives(config, loss, model, data, check)
    what = (
        "these would fit:"
        if fixes
        else f"no change tried here makes it fit on up to {MOST_GPUS} GPUs"
    )
    lines.append(f"does not fit: needs {peak:.1f} of {limit:g} GB; {what}")
    rows = [(as_options(change), fix.memory.peak / 1e9) for change, fix in fixes]
    width = max((len(text) for text, _ in rows), default=0)
    return "\n".join(
        lines
        + [f"  {text:<{width}}  {needs:5.1f} GB ({needs - peak:+.1f})" for text, needs in rows]
    )


# ---- the model and the data ----


def read_model(config: DictConfig, loss: Loss) -> Model:
    """Return the model's description, from its config alone."""
    hf_config = load_config(config)
    model = activations.blank_model(hf_config, DTYPES[config.model.policy_dtype])
    if loss.reads == "scores":
        put_scalar_head(model)
    if config.model.quantize is not None:
        layers_to_quantize(model, config.model.block_name)  # refuses those that can't be
    kind = block_class(model, config.model.block_name)
    blocks = [list(m.parameters()) for m in model.modules() if isinstance(m, kind)]
    within = {id(p) for block in blocks for p in block}
    root = [p.shape for p in model.parameters() if id(p) not in within]
    weights = Weights(root, [[p.shape for p in block] for block in blocks])
    if (knobs := knobs_of(config)) is not None:
        adapters, trained = size_of_adapters(knobs, model, config.model.block_name)
        weights = weights._replace(adapters=adapters, trained=trained)

    @cache
    def count(*arguments: Any) -> Held | None:
        try:
            return activations.count(hf_config, *arguments)
        except Exception:
            # a model's code may raise anything on arguments it does not know or data that is absent
            return None

    packed = count((1, 16), 16, torch.float32, None, False) is not None
    capped = getattr(hf_config.get_text_config(), "final_logit_softcapping", None)
    plain_head = isinstance(model.get_output_embeddings(), nn.Linear) and not capped
    n_out = 1 if loss.reads == "scores" else hf_config.get_text_config().vocab_size
    head = model.get_output_embeddings().weight
    tied = head is model.get_input_embeddings().weight
    return Model(
        name=type(model).__name__,
        config=hf_config,
        weights=weights,
        cost=sizing.cost_of(model),
        held=count,
        packed=packed,
        plain_head=plain_head,
        n_out=n_out,
        own_head=0 if tied else head.numel(),
    )


def read_data(config: DictConfig, loss: Loss) -> Data:
    """Return the run's own examples if they are available locally, otherwise an assumption.
    Downloads and keeps nothing.
    """
    remote = [
        name
        for name in map(resolve, config.datasets)
        if name in LOADERS and not config.dataset_paths.get(name)
    ]
    samples = samples_responses(config, loss)
    group = "rollout" if samples else loss.group
    try:
        with _offline(bool(remote)), redirect_stdout(io.StringIO()):
            train, held_out = load_examples(
                config, load_tokenizer(config), group, keep=False, prefixes=loss.prefixes
            )
        if samples:
            room = config.max_length - config.rollout.max_new_tokens
            check_prompts(train, room, config.rollout.max_new_tokens)
        description = f"read here: {', '.join(map(str, config.datasets))}"
        lengths, n_trees = _lengths(config, samples, train)
        return Data(
            examples=train,
            n=len(train),
            description=description,
            lengths=lengths,
            n_held_out=len(held_out),
            n_trees=n_trees,
        )
    except UserError as problem:
        if not remote:
            raise
        why = f"{', '.join(remote)} not on this machine" if "hub" in str(problem) else str(problem)
    quarter = max(1, config.max_length // 4)
    what = "prompts of" if samples else "prompt and response of"
    each = "" if samples else " each"
    description = f"assumed: {what} {quarter} tokens{each}, a quarter of max_length ({why})"
    return assumed_data(config, loss, quarter, quarter, description)


def assumed_data(
    config: DictConfig, loss: Loss, n_prompt: int, n_response: int, description: str
) -> Data:
    """Return examples whose prompts and responses all have these many tokens."""
    samples = samples_responses(config, loss)
    ids = np.zeros(n_prompt, np.int32), np.zeros(n_response, np.int32)
    group = "rollout" if samples else loss.group
    examples = [Example(ids[0], (ids[1],) * ASSUMED_RESPONSES[group], "")]
    lengths, n_trees = _lengths(config, samples, examples)
    return Data(
        examples=examples, n=None, description=description, lengths=lengths, n_trees=n_trees
    )


def _lengths(config: DictConfig, samples: bool, examples: Sequence[Example]) -> tuple[Lengths, int]:
    """Return the lengths of the examples' trees, and how many are made of one; `samples`: of the
    policy's own responses.
    """
    lengths = lengths_of(examples)
    return trees_of(config, lengths.prompts[:, 0]) if samples else (lengths, 1)


@contextmanager
def _offline(wanted: bool) -> Iterator[None]:
    """Let hub data sets come from earlier downloads only."""
    import datasets

    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or wanted
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


# ---- the plan ----


def layout_of(config: DictConfig) -> ClusterShape:
    """Return the layout of the planned GPUs. Raise UserError if they do not divide evenly."""
    sharded = config.trainer != "BasicTrainer"
    n = config.plan_gpus or (GPUS_PER_NODE if sharded else 1)
    nodes = config.plan_nodes or -(-n // GPUS_PER_NODE)
    if not sharded and n > 1:
        raise UserError(
            f"plan_gpus={n}: BasicTrainer is planned on one GPU; trainer=FSDPTrainer trains on"
            " several"
        )
    if n % nodes:
        raise UserError(
            f"plan_gpus={n}: the GPUs of all {nodes} nodes (plan_nodes), so a multiple of {nodes}"
        )
    tp = (config.tp_size or n) if config.trainer == "TensorParallelTrainer" else 1
    if n % tp or (config.fsdp_shard_size and n // tp % config.fsdp_shard_size):
        knob = "tp_size" if n % tp else "fsdp_shard_size"
        among = n if n % tp else n // tp
        raise UserError(
            f"{knob}={config[knob]}: does not divide the {among} processes; give a divisor, or null"
        )
    return ClusterShape(
        n_gpus=n,
        n_nodes=nodes,
        shard_size=config.fsdp_shard_size if sharded else None,
        tp_size=tp,
        offload=config.fsdp_cpu_offload,
    )


def gb(config: DictConfig) -> float:
    """Return the memory of each planned GPU, in 1e9 bytes."""
    return config.plan_gpu_gb or CARDS[config.plan_gpu].gb


def make_plan(config: DictConfig, loss: Loss, model: Model, data: Data) -> Plan:
    """Decide as the trainer would on these GPUs, and compute the memory this takes."""
    layout = layout_of(config)
    spec = config.model
    sharded = config.trainer != "BasicTrainer"
    weights, compute, reference = (
        DTYPES[name]
        for name in (
            spec.policy_dtype,
            spec.fsdp_policy_mp or spec.policy_dtype,
            spec.reference_dtype or spec.policy_dtype,
        )
    )
    with_adapter = model.weights.trained is not None
    of_trained = torch.promote_types(weights, torch.float32) if with_adapter else weights
    state, foreach = optimizer_state(
        config, of_trained, 1.0 if with_adapter else share_of_matrices(model.weights)
    )
    average = 0 if config.ema_decay is None else max(4, weights.itemsize)
    precision = Precision(
        weights=weight_bytes(config, model.weights, weights.itemsize),
        compute=compute.itemsize,
        reference=reference.itemsize,
        state=state,
        average=average,
        in_blocks=gathered_bytes(config, model.weights, compute.itemsize),
    )

    room = gb(config) * 1e9
    of_policy = model.weights.n * precision.weights + model.weights.adapters * of_trained.itemsize
    each = of_policy / layout.shards / layout.tp_size
    trained = model.weights.n if model.weights.trained is None else model.weights.trained
    several = (
        (config.n_epochs or 1) > 1
        if data.n is None
        else make_schedule(config, data.n).n_examples > data.n
    )
    numbers = Numbers(
        device=GPU,
        memory=room,
        weights=each,
        trained=trained * of_trained.itemsize / layout.shards / layout.tp_size,
        reference=0.0 if with_adapter else each,
        n_weights=trained / layout.tp_size,
        ranks=layout.ranks,
        mean_tokens=float(np.mean(lengths_of(data.examples).tokens())),
        longest=int(data.lengths.tokens().max()),
        repeats=several,
    )
    samples = samples_responses(config, loss)
    beside = None
    if samples:
        size = PolicySize(
            n=model.weights.n,
            adapters=model.weights.adapters,
            weights=of_policy,
            trained=trained * of_trained.itemsize,
            head=model.own_head * weights.itemsize,
            sharded=sharded,
            **packed_size(config, model.weights),
        )
        beside = beside_policy(config, loss, size, room)
    decided = plan_run(
        config,
        model.config,
        loss.needs_reference,
        numbers,
        loss.needs_reference and (loss.live_reference or samples),
        0.0 if beside is None else beside.taken(numbers.trained),
    )
    live = decided.reference == "live"
    budget = decided.tokens(model.plain_head)
    steps = lay_out(config, model, data, layout.ranks, budget)

    summed, kept = decided.reduce_each, kept_share(config, model)
    dtype, autocast = (compute, None) if sharded or compute == weights else (weights, compute)
    held = count_body(model, steps.fullest, dtype, autocast, kept)
    offloaded = 0.0
    if config.activation_offload and held:
        on_host = sum(held)
        held = count_body(model, steps.fullest, dtype, autocast, kept, offload=True)
        offloaded = on_host - sum(held or ())
    text, n = model.config.get_text_config(), steps.fullest.n_scored
    assumed = math.prod(steps.fullest.shape) * sizing.activation_bytes(model.config, compute, kept)
    activations = held.wide + held.within / layout.tp_size if held else assumed
    total = sizing.memory(
        model.weights,
        layout,
        precision,
        sharded=sharded,
        live=live,
        foreach=foreach,
        stand_ins=stand_in_bytes(config, model.weights, layout, weights),
        dequantized=dequantized_bytes(config, model.weights, weights, compute),
        kept_whole=steps.n_micro > 1 and not summed,
        activations=activations,
        head=(
            step_bytes(
                n,
                text.hidden_size,
                model.n_out,
                compute.itemsize,
                decided.head_chunk,
                not with_adapter,
                loss.reads_entropy,
            )
            if model.plain_head
            else n * model.n_out * (2 * compute.itemsize + 2 * 4)
        ),  # logits in two precisions, and their gradients
    )
    total = total._replace(host=total.host + offloaded)
    rollout = None
    if beside is not None:
        # FSDP casts its own modules only, and a critic is none of them
        of_critic = count_body(model, steps.fullest, weights, None if sharded else autocast, kept)
        rollout = plan_rollout(
            config,
            loss,
            model,
            data,
            layout,
            beside,
            activations=sum(of_critic) if of_critic else assumed,
            of_trained=of_trained,
            of_policy=of_policy,
        )
        total = rollout.moments.added_to(total)
    return Plan(
        layout=layout,
        precision=precision,
        live=live,
        cached=decided.reference == "cached",
        summed=summed,
        counted=held is not None,
        steps=steps,
        memory=total,
        rollout=rollout,
    )


def plan_rollout(  # noqa: PLR0913
    config: DictConfig,
    loss: Loss,
    model: Model,
    data: Data,
    layout: ClusterShape,
    beside: Beside,
    *,
    activations: float,
    of_trained: torch.dtype,
    of_policy: float,
) -> rollouts.Rollout:
    """Return what sampling, rewards and a critic take. `activations`: of the policy's passes in the
    critic's precision; `of_trained`: the type of the policy's trained weights; `of_policy`: the
    bytes of all of them.
    """
    dtype = computing_dtype(config)
    sampled = rollouts.at_once(config, data.lengths.prompts[:, 0], layout)
    cache, computing = rollouts.sampling_bytes(model.config, dtype, sampled, model.n_out)
    scores = beside.rewards
    critic, of_critic = beside.critic / of_policy, of_trained
    if isinstance(loss.advantages, GaeRule) and loss.advantages.critic != "policy":
        of_critic = torch.float32
        critic = beside.critic / (model.weights.n * REWARD_ITEMSIZE)
    matrices = 1.0 if model.weights.trained is not None else share_of_matrices(model.weights)
    state, foreach = optimizer_state(config, of_critic, matrices)
    scoring = sizing.activation_bytes(model.config, torch.float32, 0) * rollouts.SCORING_TOKENS
    in_critic = max(critic * activations, beside.critic_trained * foreach)
    if config.rollout.engine == "vllm":
        cache = computing = 0.0  # part of vLLM's share
    moments = rollouts.Moments(
        beside=beside,
        critic_state=beside.critic_trained / of_critic.itemsize * state,
        cache=cache,
        computing=computing,
        scoring=scoring if scores else 0.0,
        critic=beside.critic_trained + in_critic if beside.critic else 0.0,
    )
    return rollouts.Rollout(
        sampled=sampled,
        moments=moments,
        weights=model.weights.n * dtype.itemsize,
        cache=sizing.cache_bytes(model.config, dtype),
        operations=2.0 * (model.cost.body + model.cost.head),
        of_rewards=sum(scores.values()) / REWARD_ITEMSIZE,
        with_advantages=loss.group == "rollout",
        critic=critic,
    )


def optimizer_state(
    config: DictConfig, dtype: torch.dtype, matrices: float = 1.0
) -> tuple[float, bool]:
    """Return (bytes per weight, whether a step on a GPU holds a temporary per weight), from one
    step on a matrix of 256 x 256; `matrices`: the share of the weights in the blocks' matrices,
    which muon steps otherwise than the rest.
    """
    optimizer, layer = after_a_step(config, dtype)

    def each(p: torch.Tensor) -> float:
        tensors = [x for x in optimizer.state[p].values() if isinstance(x, torch.Tensor)]
        return sum(x.numel() * x.element_size() for x in tensors if x.dim()) / p.numel()

    # None: on a GPU, unless the kernel is fused, or torch has it off as for Adafactor
    foreach = optimizer.defaults.get("foreach", False)
    if config.optimizer == "Adafactor":
        foreach = bool(foreach)
    bytes_each = each(layer.weight)
    if config.optimizer == MUON:
        bytes_each = matrices * bytes_each + (1 - matrices) * each(layer.bias)
    return (
        bytes_each,
        not isinstance(optimizer, Stepwise)
        and (foreach is True or (foreach is None and "fused" not in optimizer.defaults)),
    )


def after_a_step(config: DictConfig, dtype: torch.dtype) -> tuple[torch.optim.Optimizer, nn.Linear]:
    """Return the optimizer of a matrix of 256 x 256 and its bias after one step, and both."""
    layer = nn.Linear(256, 256, dtype=dtype)
    for p in layer.parameters():
        p.grad = torch.ones_like(p)
    optimizer = make_optimizer(config, layer, torch.device("cpu"))
    optimizer.step()
    return optimizer, layer


def stand_in_bytes(
    config: DictConfig, weights: Weights, layout: ClusterShape, dtype: torch.dtype
) -> float:
    """Return the bytes of the largest stand-in that an optimizer's step makes of a parameter (see
    training/stepwise.py): its weight, gradient and moments in float32 or wider, as far as they
    are in bfloat16; all of them where it is the full tensor of one that is sharded. Those of an
    adapter are too small to count.
    """
    if weights.trained is not None:
        return 0.0
    optimizer, layer = after_a_step(config, dtype)
    matrices = [s for block in weights.blocks for s in block if len(s) == 2]
    others = [s for block in weights.blocks for s in block if len(s) != 2] + weights.root
    groups: list[tuple[Any, torch.Tensor, list[Any]]]
    groups = [(optimizer, layer.weight, [*matrices, *others])]
    if isinstance(optimizer, Joint):
        of_matrices, of_others = optimizer.parts
        groups = [(of_matrices, layer.weight, matrices), (of_others, layer.bias, others)]
    itemsize = torch.promote_types(dtype, torch.float32).itemsize
    most = 0.0
    for part, p, shapes in groups:
        kind = type(part.inner if isinstance(part, Stepwise) else part).__name__
        whole = kind in WHOLE and layout.shards * layout.tp_size > 1
        if not (whole or isinstance(part, Stepwise)):
            continue
        moments = [x for x in part.state[p].values() if getattr(x, "shape", None) == p.shape]
        n = sum(whole or x.dtype == torch.bfloat16 for x in (p, p.grad, *moments) if x is not None)
        largest = max((s.numel() if whole else layout.part(s) for s in shapes), default=0)
        most = max(most, float(n * itemsize * largest))
    return most


def weight_bytes(config: DictConfig, weights: Weights, itemsize: int) -> float:
    """Return the mean bytes of a weight, of which those in the matrices of the blocks may be
    quantized.
    """
    if config.model.quantize is None:
        return itemsize
    share = share_of_matrices(weights)
    return share * BYTES[config.model.quantize] + (1 - share) * itemsize


def packed_size(config: DictConfig, weights: Weights) -> dict[str, Any]:
    """Return how many weights are quantized, and the bytes of these, as PolicySize has them."""
    if config.model.quantize is None:
        return {}
    n = round(share_of_matrices(weights) * weights.n)
    return {"quantized": n, "packed": n * BYTES[config.model.quantize]}


def gathered_bytes(config: DictConfig, weights: Weights, itemsize: int) -> float | None:
    """Return the mean bytes of a block's weight when FSDP has gathered it, where the matrices are
    quantized, which are gathered as they are; None where not. `itemsize`: of the others.
    """
    if config.model.quantize is None:
        return None
    return weight_bytes(config, weights._replace(root=[]), itemsize)


def dequantized_bytes(
    config: DictConfig, weights: Weights, dtype: torch.dtype, compute: torch.dtype
) -> float:
    """Return the bytes of the largest quantized weight, as its layer computes with it: in the type
    that the weight had and, if it is another, in that of the computation.
    """
    if config.model.quantize is None:
        return 0.0
    matrices = [shape for block in weights.blocks for shape in block if len(shape) == 2]
    largest = max(map(math.prod, matrices), default=0)
    return float(largest * sum(each.itemsize for each in {dtype, compute}))


def share_of_matrices(weights: Weights) -> float:
    """Return the share of all weights that lies in the matrices of the blocks."""
    matrices = [shape for block in weights.blocks for shape in block if len(shape) == 2]
    return sum(map(math.prod, matrices)) / weights.n


def kept_share(config: DictConfig, model: Model) -> float:
    """Return the share of activations that is kept, of whole blocks unless they are compiled."""
    kept = sizing.kept(config)
    if recomputes_blocks(config.activation_checkpointing, config.compile):
        return share_of_blocks(len(model.weights.blocks), kept)
    return kept


def count_body(
    model: Model,
    part: Part,
    dtype: torch.dtype,
    autocast: torch.dtype | None,
    kept: float,
    offload: bool = False,
) -> Held | None:
    """Return the bytes that the body's passes hold, interpolated if a share of activations is kept;
    None if unknown.
    """
    what = part.shape, part.n_keys, dtype, autocast
    least, most = (
        model.held(*what, recompute, offload) if share else Held(0, 0)
        for recompute, share in ((True, 1 - kept), (False, kept))
    )
    if least is None or most is None:
        return None
    return Held(*(int((1 - kept) * a + kept * b) for a, b in zip(least, most, strict=True)))


def lay_out(config: DictConfig, model: Model, data: Data, ranks: int, budget: int) -> Steps:
    """Lay out some steps of the run, split as the trainer splits them."""
    if data.n is None:
        batches = [
            np.zeros(min(config.batch_size, config.n_examples or config.batch_size), np.int64)
        ]
    else:
        steps = list(make_schedule(config, data.n))
        some = sorted({int(i) for i in np.linspace(0, len(steps) - 1, N_STEPS)})
        batches = [steps[k] for k in some]
    n = sum(map(len, batches))
    batches = [np.repeat(batch, data.n_trees) for batch in batches]
    lengths = data.lengths
    packing = Packing(
        packed=model.packed,
        budget=budget,
        world_size=ranks,
        pad_token_id=0,
        longest=config.max_length,
    )
    plans = [
        microbatches.split_into_microbatches(
            lengths[batch], packing, config.gradient_accumulation_steps
        )
        for batch in batches
    ]
    parts = [
        measure(lengths[batch[part]], model.packed, budget if config.compile else 0)
        for batch, plan in zip(batches, plans, strict=True)
        for part in plan
        if len(part)
    ]
    planned = lengths[np.concatenate(batches)]
    return Steps(
        max(parts, key=lambda part: math.prod(part.shape)),
        float(np.mean([len(plan) / ranks for plan in plans])),
        float(planned.tokens().sum()) / n,
        model.cost.forward(planned) / n,
    )


def measure(lengths: Lengths, packed: bool, at_least: int) -> Part:
    """Return the shape of these examples' row, of `at_least` tokens, or of the padded rows it is
    unfolded to.
    """
    n_scored = int(lengths.responses.sum())
    if not packed:
        return Part((int(lengths.counts.sum()), int(lengths.longest().max())), None, n_scored)
    n_keys = int((lengths.prompts + lengths.responses).sum())
    return Part((1, max(at_least, int(lengths.tokens().sum()))), max(at_least, n_keys), n_scored)


# ---- what else would fit ----


def alternatives(
    config: DictConfig, loss: Loss, model: Model, data: Data, check: Check = accept
) -> list[tuple[dict[str, Any], Plan]]:
    """Return changes that make the run fit, each planned again: single changes, otherwise the first
    that suffice together, otherwise more GPUs. None of them is refused.
    """

    def fitting(some: Iterable[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], Plan]]:
        for change in some:
            new = changed(config, change)
            if refusal(new, check) is None:
                plan = make_plan(new, loss, model, data)
                if plan.memory.peak <= gb(config) * 1e9:
                    yield change, plan

    changes = savers(config, loss)
    together = list(in_turn(config, changes, check))
    fixes = list(fitting(changes)) or list(fitting(together))[:1]
    n = layout_of(config).n_gpus
    trainer = {"trainer": "FSDPTrainer"} if config.trainer == "BasicTrainer" else {}
    nodes = {"plan_nodes": None} if config.plan_nodes else {}
    sizes = [2**i for i in range(1, 7) if n < 2**i <= MOST_GPUS]
    for base in ({}, *together[-1:]):  # as configured, or with all changes
        more = next(
            fitting({**base, **trainer, "plan_gpus": size, **nodes} for size in sizes), None
        )
        if more:
            return [*fixes, more]
    return fixes


def refusal(config: DictConfig, check: Check) -> UserError | None:
    """Return why a run can't be as configured, or its planned GPUs not be laid out; None if all can
    be.
    """
    try:
        with redirect_stdout(io.StringIO()):  # without its notes
            check(config)
        layout_of(config)
    except UserError as error:
        return error
    return None


def in_turn(
    config: DictConfig, changes: Iterable[dict[str, Any]], check: Check
) -> Iterator[dict[str, Any]]:
    """Yield each change together with those before it, leaving out what would be refused."""
    together: dict[str, Any] = {}
    for change in changes:
        if refusal(changed(config, together | change), check) is None:
            together = together | change
            yield together


def savers(config: DictConfig, loss: Loss) -> list[dict[str, Any]]:
    """Return the changes that save memory on the same GPUs, where the config leaves them."""
    changes: list[dict[str, Any]] = (
        [{"activation_checkpointing": True}] if config.activation_checkpointing is not True else []
    )
    samples = samples_responses(config, loss)
    if samples and config.rollout.batch_size > config.rollout.n:
        fewer = max(config.rollout.n, config.rollout.batch_size // 4)
        changes.append({"rollout.batch_size": fewer})
    if loss.needs_reference and config.reference != "cached" and not samples:
        changes.append({"reference": "cached"})
    if (
        config.tokens_per_microbatch is not None
        and config.tokens_per_microbatch > 2 * config.max_length
    ):
        changes.append({"tokens_per_microbatch": 2 * config.max_length})
    if config.fsdp_reduce == "last" and config.trainer != "BasicTrainer":
        changes.append({"fsdp_reduce": "each"})
    if config.model.fsdp_policy_mp is None and config.model.policy_dtype == "float32":
        changes.append({"model.fsdp_policy_mp": "bfloat16"})
    return changes


def changed(config: DictConfig, change: dict[str, Any]) -> DictConfig:
    config = copy.deepcopy(config)
    for knob, value in change.items():
        OmegaConf.update(config, knob, value)
    return config


# ---- as text ----


def _what(config: DictConfig, loss: Loss, model: Model, data: Data, plan: Plan) -> list[str]:
    n = model.weights.n
    kind = (
        {True: ", live reference", False: ", cached reference"}[plan.live]
        if loss.needs_reference
        else ""
    )
    layout = plan.layout
    on = f"{layout.n_gpus} x {config.plan_gpu}, nodes: {layout.n_nodes}, {config.trainer}"
    if layout.n_gpus > 1:
        on += f", a copy of the model over {layout.shards * layout.tp_size}"
        on += f", {layout.tp_size} of them by tensor parallelism" if layout.tp_size > 1 else ""
    trained = model.weights.trained
    share = "" if trained is None else f" and {trained / 1e6:,.1f} M of an adapter"
    examples = UNITS[loss.group]
    each = f"{plan.steps.n_tokens:,.0f} tokens on average"
    if plan.rollout is not None:
        examples, each = "prompts", f"{each}, with the responses that are trained"
    return [
        f"{loss.name} of {model.name}, {n / 1e6:,.1f} M parameters{share}{kind}",
        f"{'on':<8}{on}",
        f"{'data':<8}{'' if data.n is None else f'{data.n:,} '}{examples} of {each},"
        f" {data.description}",
        *([] if plan.rollout is None else [f"{'samples':<8}{plan.rollout.in_words(config)}"]),
    ]


def _run(config: DictConfig, model: Model, data: Data, plan: Plan) -> list[str]:
    """Return the lines on steps, time and traffic. Recomputation costs another forward pass, and so
    does the reference.
    """
    layout, steps = plan.layout, plan.steps
    rows, width = steps.fullest.shape
    largest = f"{width:,} tokens" if rows == 1 else f"{rows} padded rows of {width:,} tokens"
    n_micro = f"{steps.n_micro:.1f}".removesuffix(".0")
    lines = [
        f"{'step':<8}{config.batch_size:,} examples, {config.batch_size * steps.n_tokens:,.0f}"
        f" tokens; on each GPU {n_micro} microbatch{'es' if n_micro != '1' else ''}, the largest of"
        f" {largest}"
    ]
    lines += (
        []
        if plan.counted
        else [f"{'':<8}activations are a generous estimate: this model's could not be counted"]
    )
    schedule = make_schedule(config, data.n or config.n_examples or 0)
    n = schedule.n_examples or 1000
    if schedule.n_examples:
        lines.append(
            f"{'run':<8}{n:,} examples in {schedule.n_steps:,} steps,"
            f" {n * steps.n_tokens / 1e6:,.1f} M tokens"
        )
    uses = config.rollout.uses
    kept = kept_share(config, model)
    passes = n * (3 + plan.live + 1 - kept)
    if plan.rollout is not None:
        passes = n / uses * plan.rollout.passes(uses, plan.live, kept)
    if plan.cached:
        every = config.reference_update_every
        passes += reference_passes(schedule, every, data.n_held_out) or n
    card = CARDS[config.plan_gpu]
    peak = {2: card.flops16, 4: card.flops32}.get(plan.precision.compute)
    if peak is None:
        return [
            *lines,
            (
                f"{'time':<8}unknown: there is no data-sheet rate for a {config.plan_gpu} in this"
                " precision"
            ),
        ]
    secs = passes * steps.forward / (layout.n_gpus * peak * config.plan_mfu)
    before = ""
    if plan.rollout is not None:
        rates = rollouts.Rates(
            peak * config.plan_mfu, card.flops32 * config.plan_mfu, card.bytes_per_sec
        )
        sampling, scoring = (
            n / uses / layout.n_gpus * each(rates)
            for each in (plan.rollout.sampling_secs, plan.rollout.scoring_secs)
        )
        before = f", of which sampling {_duration(sampling)} at least"
        before += f", rewards {_duration(scoring)}" if scoring else ""
        secs += sampling + scoring
    unknown = "" if schedule.n_examples else " per 1,000 examples (set n_examples for the total)"
    at = f"plan_mfu={config.plan_mfu:g} of {layout.n_gpus} x {peak / 1e12:g} TFLOP/s"
    lines.append(
        f"{'time':<8}{_duration(secs)}{before}{unknown} at {at}, without evaluation"
        f"{'' if plan.rollout else ', sampling'} and saving"
    )
    sent = sizing.traffic(
        model.weights,
        layout,
        plan.precision,
        n_micro=steps.n_micro,
        live=plan.live,
        each=plan.summed,
    )
    if sent:
        rate = sent / (secs * config.batch_size / n) / 1e9
        lines.append(
            f"{'network':<8}{sent / 1e9:,.1f} GB sent by each GPU per step; links below {rate:,.0f}"
            " GB/s make it longer"
        )
    return lines


def reference_passes(schedule: Schedule, every: int | None, n_held_out: int) -> int:
    """Return the number of examples for which a cached reference is computed: each of those that
    the steps until it moves see, once, and all held-out ones; and so again after each move, `every`
    steps (None: never). 0 for a schedule without examples.

    >>> twice = Schedule(6, batch_size=2, n_epochs=2, n_examples=None, shuffle=False, seed=0)
    >>> reference_passes(twice, None, 5), reference_passes(twice, 4, 5)
    (11, 20)
    """
    batches = list(schedule)
    every = every or max(len(batches), 1)
    starts = range(0, len(batches), every)
    seen = (np.unique(np.concatenate(batches[start : start + every])) for start in starts)
    return sum(len(examples) + n_held_out for examples in seen)


def _table(memory: Memory) -> list[str]:
    rows = [*memory.kinds.items(), ("in all", memory.moments)]
    width = max(len(kind) for kind, _ in rows)
    titles = memory.titles
    lines = [f"{'GB per GPU':<{width}}  {'  '.join(titles)}"]
    lines += [
        "  ".join(
            [
                f"{kind:<{width}}",
                *(f"{x / 1e9:{len(t)}.1f}" for x, t in zip(values, titles, strict=True)),
            ]
        )
        for kind, values in rows
    ]
    return lines + ([f"and {memory.host / 1e9:,.1f} GB of each node's RAM"] if memory.host else [])


def as_options(change: dict[str, Any]) -> str:
    """Return a change as it is added to a command."""
    return " ".join(f"{knob}={_value(value)}" for knob, value in change.items())


def _value(value: Any) -> str:
    return (
        {True: "true", False: "false", None: "null"}[value]
        if value is None or isinstance(value, bool)
        else str(value)
    )


def _duration(secs: float) -> str:
    """Return a time in a unit that suits it.

    >>> _duration(40), _duration(600), _duration(90_000), _duration(9e5)
    ('40 s', '10 min', '25.0 h', '10.4 days')
    """
    for limit, unit, name, digits in (
        (120, 1, "s", 0),
        (7200, 60, "min", 0),
        (172_800, 3600, "h", 1),
    ):
        if secs < limit:
            return f"{secs / unit:,.{digits}f} {name}"
    return f"{secs / 86_400:,.1f} days"
