"""Train low-rank adapters (LoRA, DoRA; peft's layers) instead of a model's own weights.

The base weights W of a model never change. Its policy adds the effect of its adapters: with LoRA,
W + s B A; with DoRA, m (W + s B A) / |W + s B A|, the norms of the rows. So the weights that a run
started from are always at hand: they are the base and the adapters it started from. StartingPolicy
computes with them, and is the live reference.

A policy.pt of such a model holds its adapters only, each with a number, and the scalar head of a
reward model:

    adapters.0.scaling                                        s
    adapters.base                    some numbers of the weights that they were trained on, in the
                                     type of these
    model.layers.3.self_attn.q_proj.lora_A.0.weight           A  [r, in]
    model.layers.3.self_attn.q_proj.lora_B.0.weight           B  [out, r]
    model.layers.3.self_attn.q_proj.lora_magnitude_vector.0.weight    m  [out], of DoRA

r rank, s scaling: alpha / r, or alpha / sqrt(r) with rsLoRA. An embedding [V, d] has
lora_embedding_A [r, V] and lora_embedding_B [d, r].
"""

from __future__ import annotations

import hashlib
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from plumb.distributed import sharding
from plumb.errors import UserError
from plumb.models.blocks import block_class
from plumb.models.quantized_base import quantized_layers
from plumb.models.scalar_head import head_name, scores
from plumb.models.sharded_load import ReadPart

START = "start"  # the name of the frozen copy of an adapter whose training continues
PARTS = "lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector"
KEY = re.compile(rf"(?P<module>.+)\.(?P<part>{PARTS})\.(?P<adapter>\w+)(\.weight)?")
BASE = "adapters.base"
SCALING = re.compile(r"adapters\.(?P<adapter>\d+)\.scaling")


@dataclass(frozen=True)
class AdapterKnobs:
    """Hold the options adapter*.

    Example: those of adapter=lora with all defaults have rank 16 and alpha 32, so scaling 2.
    """

    kind: str  # lora | dora
    rank: int
    alpha: float
    rslora: bool
    init: str  # default | pissa | olora
    targets: Sequence[str] | None  # names of modules; None: all linear layers of the blocks
    previous: str  # merge | continue | stack: what becomes of the adapters of model.archive
    quantize: str | None = None  # nf4 | int8: how the weights beside them are kept

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


# Those of a model that is opened with its adapters beside its weights.
UNMERGED = AdapterKnobs(
    kind="lora",
    rank=1,
    alpha=1.0,
    rslora=False,
    init="default",
    targets=None,
    previous="continue",
)


def knobs_of(config: Any) -> AdapterKnobs | None:
    """Return the options of a config; None without an adapter."""
    if config.adapter == "none":
        return None
    targets = config.adapter_targets
    return AdapterKnobs(
        kind=config.adapter,
        rank=config.adapter_rank,
        alpha=config.adapter_alpha,
        rslora=config.adapter_rslora,
        init=config.adapter_init,
        targets=None if targets is None else tuple(targets),
        previous=config.adapter_previous,
        quantize=config.model.quantize,
    )


class Factors(NamedTuple):
    """Hold what one adapter has for one module."""

    a: Tensor  # [r, in]
    b: Tensor  # [out, r]
    magnitude: Tensor | None  # [out], of DoRA


@dataclass(frozen=True)
class Adapter:
    """Hold one adapter of a model.

    `factors` gives those of a module, for which it may read the module's base weight.
    """

    name: str  # its number; or START
    rank: int
    scaling: float
    dora: bool
    modules: Sequence[str]
    factors: Callable[[str], Factors]
    trained: bool = False
    in_policy: bool = True
    in_start: bool = True  # part of the weights that the run starts from


@dataclass(frozen=True)
class Roles:
    """Hold the names of a model's adapters by what they take part in."""

    policy: tuple[str, ...]
    start: tuple[str, ...]
    trained: str


# ---- which modules ----


def target_modules(
    model: PreTrainedModel, targets: Sequence[str] | None, block_name: str | None
) -> list[str]:
    """Return the names of the modules that get an adapter. Raise UserError for names that no
    module has.
    """
    fitting = {name for name, module in model.named_modules() if _takes_adapter(module)}
    if targets is None:
        block = block_class(model, block_name)
        blocks = tuple(
            f"{name}." for name, module in model.named_modules() if isinstance(module, block)
        )
        return sorted(
            name
            for name in fitting
            if name.startswith(blocks) and not isinstance(model.get_submodule(name), nn.Embedding)
        )
    chosen = set[str]()
    for target in targets:
        named = {name for name in fitting if f".{name}".endswith(f".{target}")}
        if not named:
            known = ", ".join(sorted({name.rpartition(".")[2] for name in fitting}))
            raise UserError(
                f"adapter_targets={list(targets)}: {type(model).__name__} has no linear layer or"
                f" embedding named {target}; it has {known}"
            )
        chosen |= named
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    if ends[1] is not None and ends[0].weight is ends[1].weight:
        tied = [name for name in chosen if any(model.get_submodule(name) is end for end in ends)]
        if tied:
            raise UserError(
                f"adapter_targets={list(targets)}: the head and the embedding of this"
                f" {type(model).__name__} are one matrix, which an adapter of {tied[0]} would"
                " separate; leave it out"
            )
    return sorted(chosen)


def _takes_adapter(module: nn.Module) -> bool:
    """Return whether this is a plain matrix or table. A subclass with a computation of its own (a
    router, a scalar head) is none.
    """
    plain = (nn.Linear, nn.Embedding, Conv1D)
    return any(isinstance(module, kind) and type(module).forward is kind.forward for kind in plain)


def size_of_adapters(
    knobs: AdapterKnobs, model: PreTrainedModel, block_name: str | None
) -> tuple[int, int]:
    """Return how many numbers the adapters of a model without values would have, and how many would
    be trained, a scalar head included. Those of an archive are not counted, and one that continues
    is taken for a new one. Raise UserError for a rank that a matrix cannot have.
    """
    trained = 0
    for name in target_modules(model, knobs.targets, block_name):
        module: Any = model.get_submodule(name)
        out, into = shape = as_matrix(module, module.weight).shape
        if knobs.previous != "continue":
            _check_rank(knobs.rank, name, shape)
        trained += knobs.rank * (out + into) + (out if knobs.kind == "dora" else 0)
    copies = 1 + (knobs.init != "default" or knobs.previous == "continue")
    n_head = model.get_output_embeddings().weight.numel() if scores(model) else 0
    return copies * trained, trained + n_head


# ---- values ----


def first_factors(knobs: AdapterKnobs, seed: int, module: str, weight: Tensor) -> Factors:
    """Return the factors of a new adapter for a module with this weight.  [out, in]

    default: B = 0, and A uniform with variance 1 / (3 in), as in LoRA (arXiv:2106.09685). pissa
    (arXiv:2404.02948): s B A is the best approximation of W of rank r. olora (arXiv:2406.01775):
    B and A are the first columns of Q and rows of R of W = Q R. Raises UserError if the rank
    exceeds that of the matrix.
    """
    rank = knobs.rank
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    _check_rank(rank, module, wide.shape)
    if knobs.init == "pissa":
        u, s, vh = torch.linalg.svd(wide, full_matrices=False)
        root = (s[:rank] / knobs.scaling).sqrt()
        b, a = u[:, :rank] * root, root[:, None] * vh[:rank]
    elif knobs.init == "olora":
        q, r = torch.linalg.qr(wide)
        b, a = q[:, :rank], r[:rank]
    else:
        drawn = int.from_bytes(hashlib.blake2b(f"{seed} {module}".encode()).digest()[:7])
        generator = torch.Generator().manual_seed(drawn)
        bound = 1 / math.sqrt(wide.shape[1])
        a = torch.rand(rank, wide.shape[1], generator=generator).mul_(2).sub_(1).mul_(bound)
        b = torch.zeros(wide.shape[0], rank)
    magnitude = torch.linalg.norm(wide, dim=1) if knobs.kind == "dora" else None
    return Factors(a.to(wide.dtype), b.to(wide.dtype), magnitude)


def _check_rank(rank: int, module: str, shape: torch.Size) -> None:
    """Raise UserError if an adapter of this rank has more rows than its matrix can have a rank."""
    if rank > min(shape):
        raise UserError(
            f"adapter_rank={rank}: {module} is a matrix of {' x '.join(map(str, shape))};"
            f" give {min(shape)} or less, or leave it out of adapter_targets"
        )


def merged(weight: Tensor, adapters: Sequence[tuple[float, Factors]]) -> Tensor:
    """Return a module's weight with the effect of adapters, (scaling, factors) each.  [out, in] ->
    [out, in], of the same type

    Each has its effect on W itself, as in peft's forward pass:
    W + sum of s B A (LoRA) and of m (W + s B A) / |W + s B A| - W (DoRA).
    """
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    total = wide
    for scaling, (a, b, magnitude) in adapters:
        change = scaling * (b.to(wide) @ a.to(wide))
        if magnitude is not None:
            moved = wide + change
            size = torch.linalg.norm(moved, dim=1, keepdim=True)
            change = magnitude.to(wide)[:, None] / size * moved - wide
        total = total + change
    return total.to(weight.dtype)


def as_matrix(module: nn.Module, weight: Any) -> Tensor:
    """Return a module's weight as [out, in], or such a matrix as the module's weight."""
    return weight.T if isinstance(module, Conv1D | nn.Embedding) else weight


# ---- the adapters of a policy.pt ----


def holds_adapters(state: Mapping[str, Tensor]) -> bool:
    """Return whether this is the state dict of a model with adapters, complete or not."""
    return any(SCALING.fullmatch(name) or KEY.fullmatch(name) for name in state)


def read_adapters(state: Mapping[str, Tensor], what: str) -> list[Adapter]:
    """Return the adapters of a policy.pt, in their order, all of them part of a run's start. Raise
    UserError for one that is not complete, or whose parts do not fit each other; `what`: how to
    call the file.
    """
    tables: dict[str, dict[str, dict[str, Tensor]]] = {}
    for name, tensor in state.items():
        if match := KEY.fullmatch(name):
            of_module = tables.setdefault(match["adapter"], {}).setdefault(match["module"], {})
            of_module[match["part"].replace("embedding_", "")] = tensor
    if tables and BASE not in state:
        raise UserError(
            f"{what}: lacks {BASE}, by which the model that its adapter was trained on is known;"
            " take another checkpoint"
        )
    if odd := next((name for name in tables if not name.isdigit()), None):
        raise UserError(
            f"{what}: its adapter {odd!r} has no number, so that no run has written it; take the"
            " policy.pt of a run"
        )
    adapters = []
    for number in sorted(tables, key=int):
        modules = tables[number]
        scaling = state.get(f"adapters.{number}.scaling")
        broken = next((m for m, parts in modules.items() if not parts.keys() >= _FACTORS), None)
        if scaling is None or broken is not None:
            raise UserError(
                f"{what}: its adapter {number} is not complete"
                f" ({broken or 'its scaling is missing'}); take another checkpoint"
            )
        some = next(iter(modules.values()))
        rank, dora = some["lora_A"].shape[0], len(some)
        for module, parts in modules.items():
            a, b, size = parts["lora_A"], parts["lora_B"], parts.get("lora_magnitude_vector")
            fits = a.ndim == b.ndim == 2 and a.shape[0] == b.shape[1] == rank
            if not fits or len(parts) != dora or (size is not None and len(size) != b.shape[0]):
                shapes = ", ".join(f"{key} {list(x.shape)}" for key, x in sorted(parts.items()))
                raise UserError(
                    f"{what}: the parts of its adapter {number} do not fit each other: {module} has"
                    f" {shapes}, and the rank is {rank}; take another checkpoint"
                )
        adapters.append(
            Adapter(
                name=number,
                rank=rank,
                scaling=float(scaling),
                dora="lora_magnitude_vector" in some,
                modules=sorted(modules),
                factors=_Stored(modules),
            )
        )
    return adapters


_FACTORS = {"lora_A", "lora_B"}


@dataclass(frozen=True)
class _Stored:
    """Give the factors that a policy.pt holds."""

    modules: Mapping[str, Mapping[str, Tensor]]

    def __call__(self, module: str) -> Factors:
        parts = self.modules[module]
        return Factors(parts["lora_A"], parts["lora_B"], parts.get("lora_magnitude_vector"))


# ---- what adapters belong to ----

N_SAMPLED = 16  # numbers of each weight, of the row in its middle
# Sums of another order than where they were taken: how far, of their size, and what share of them
# may be further. A step of full training moves nearly all of them further.
ALIKE = 1e-5
MOST_APART = 0.01


def shapes_of_base(model: PreTrainedModel) -> dict[str, torch.Size]:
    """Return the names and shapes of the weights by which a model is known: all but its head's,
    which a reward model replaces.
    """
    head = head_name(model)
    return {name: p.shape for name, p in model.named_parameters() if name != head}


def sampled(shapes: Mapping[str, torch.Size], dtype: torch.dtype, read: ReadPart) -> Tensor:
    """Return some numbers of weights of these names and shapes, by which their model is known.
    [weights, 16] `dtype`
    """
    rows = []
    for name, shape in sorted(shapes.items()):
        middle = shape[0] // 2 if shape else 0
        row = read(name, (slice(middle, middle + 1),) if len(shape) > 1 else ())
        row = row.detach().reshape(-1).to("cpu", dtype)
        rows.append(row[torch.linspace(0, len(row) - 1, N_SAMPLED).long()])
    return torch.stack(rows)


def of_one_model(some: Tensor, others: Tensor) -> bool:
    """Return whether two samples are of the same weights.  [n, 16], of one type

    >>> of_one_model(torch.ones(1, 16), torch.full((1, 16), 1 + 1e-6))
    True
    >>> of_one_model(torch.ones(1, 16), torch.full((1, 16), 1 + 1e-4))
    False
    """
    if some.shape != others.shape:
        return False
    apart = (some.double() - others.double()).abs() > ALIKE * others.double().abs()
    return float(apart.double().mean()) <= MOST_APART


# ---- a model with adapters ----


def inject(model: PreTrainedModel, adapters: Sequence[Adapter]) -> None:
    """Give the model's modules peft's layers for these adapters, in float32 or wider, without
    values. Only the trained one, and a scalar head, can be trained from now on.
    """
    from peft import LoraConfig, inject_adapter_in_model

    transposed = any(isinstance(module, Conv1D) for module in model.modules())
    for adapter in adapters:
        config = LoraConfig(
            r=adapter.rank,
            lora_alpha=adapter.scaling * adapter.rank,  # type: ignore[arg-type]
            lora_dropout=0.0,
            use_dora=adapter.dora,
            target_modules=list(adapter.modules),
            fan_in_fan_out=transposed,
            init_lora_weights=False,
        )
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")  # that fan_in_fan_out is for some of the layers only
            inject_adapter_in_model(config, model, adapter.name, low_cpu_mem_usage=True)
    (trained,) = (adapter.name for adapter in adapters if adapter.trained)
    roles = Roles(
        policy=tuple(adapter.name for adapter in adapters if adapter.in_policy),
        start=tuple(adapter.name for adapter in adapters if adapter.in_start),
        trained=trained,
    )
    model.adapter_roles = roles  # type: ignore[assignment]
    _activate(_layers(model), roles.policy)
    model.requires_grad_(False)
    for owner, name, match, base in _parameters(model):
        dtype = torch.promote_types(base.dtype, torch.float32)
        p: Any = owner._parameters[name]
        owner._parameters[name] = nn.Parameter(
            torch.empty_like(p, dtype=dtype), requires_grad=match["adapter"] == trained
        )
    if scores(model):
        model.get_output_embeddings().requires_grad_(True)


def base_name(name: str) -> str:
    """Return the name that a parameter has in the model without adapters."""
    return name.replace(".base_layer.", ".")


def values_of(adapters: Sequence[Adapter]) -> Callable[[str], Tensor | None]:
    """Return the function from a parameter's name to its first value; None for one of the base."""
    by_name = {adapter.name: adapter for adapter in adapters}
    last: dict[tuple[str, str], Factors] = {}  # parameters of a module follow one another

    def value(name: str) -> Tensor | None:
        match = KEY.fullmatch(name)
        if match is None:
            return None
        key = match["adapter"], match["module"]
        if key not in last:
            if any(module != key[1] for _, module in last):
                last.clear()
            last[key] = by_name[key[0]].factors(key[1])
        factors = last[key]
        part = match["part"].rpartition("_")[2]
        return {"A": factors.a, "B": factors.b, "vector": factors.magnitude}[part]

    return value


@torch.no_grad()
def fill_adapters(model: PreTrainedModel, adapters: Sequence[Adapter]) -> None:
    """Allocate the parameters of a model's adapters on the devices of their modules, and give them
    their values.
    """
    value = values_of(adapters)
    for owner, name, match, base in _parameters(model):
        p = owner._parameters[name]
        first = value(match.string)
        assert p is not None and first is not None
        made = first.to(base.device, p.dtype, copy=True).contiguous()
        owner._parameters[name] = nn.Parameter(made, requires_grad=p.requires_grad)


def _parameters(model: nn.Module) -> Iterator[tuple[nn.Module, str, re.Match[str], Tensor]]:
    """Yield each parameter of a model's adapters: the module that has it, its name there, the match
    of its full name, and the base weight beside it.
    """
    for prefix, owner in model.named_modules():
        for name in list(owner._parameters):
            if match := KEY.fullmatch(f"{prefix}.{name}"):
                layer: Any = model.get_submodule(match["module"])
                yield owner, name, match, layer.get_base_layer().weight


def roles_of(model: Any) -> Roles | None:
    """Return the roles of a model's adapters; None if it has none."""
    return getattr(model, "adapter_roles", None)


def adapters_of(model: Any) -> list[Adapter]:
    """Return the adapters of a model, with the factors that they have when these are asked for."""
    roles = roles_of(model)
    if roles is None:
        return []
    layers = {module: layer for module, layer in model.named_modules() if _is_layer(layer)}
    adapters = []
    for name in dict.fromkeys((*roles.policy, *roles.start)):
        own = {module: layer for module, layer in layers.items() if name in layer.scaling}
        some = next(iter(own.values()))
        adapters.append(
            Adapter(
                name=name,
                rank=some.r[name],
                scaling=some.scaling[name],
                dora=name in some.lora_magnitude_vector,
                modules=list(own),
                factors=_Present(own, name),
                trained=name == roles.trained,
                in_policy=name in roles.policy,
                in_start=name in roles.start,
            )
        )
    return adapters


@dataclass(frozen=True)
class _Present:
    """Give the factors of one adapter that the layers of a model have."""

    layers: Mapping[str, Any]
    name: str

    def __call__(self, module: str) -> Factors:
        layer = self.layers[module]
        magnitude = None
        if self.name in layer.lora_magnitude_vector:
            magnitude = layer.lora_magnitude_vector[self.name].weight
        if self.name in layer.lora_embedding_A:
            a, b = layer.lora_embedding_A[self.name], layer.lora_embedding_B[self.name]
        else:
            a, b = layer.lora_A[self.name].weight, layer.lora_B[self.name].weight
        return Factors(a, b, magnitude)


@torch.no_grad()
def merged_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield each weight of a model in one piece by its name without adapters: merged with those of
    its policy, and as a quantized layer computes with it. There is one merged weight at a time.
    """
    by_module: dict[str, list[Adapter]] = {}
    for adapter in adapters_of(model):
        for module in adapter.modules if adapter.in_policy else ():
            by_module.setdefault(module, []).append(adapter)

    def weights() -> Iterator[tuple[str, Tensor]]:
        yield from ((name, p) for name, p in model.named_parameters() if p.is_floating_point())
        for name, layer in quantized_layers(model).items():
            yield f"{name}.weight", layer.weight

    for name, weight in weights():
        if KEY.fullmatch(name):
            continue
        name = base_name(name)
        module = name.removesuffix(".weight")
        if module in by_module:
            layer = model.get_submodule(module).get_base_layer()
            factors = [(each.scaling, each.factors(module)) for each in by_module[module]]
            weight = as_matrix(layer, merged(as_matrix(layer, weight), factors))
        yield name, weight.detach()


def own_names(policy: PreTrainedModel) -> set[str]:
    """Return the names of the parameters that belong to a run: all of them or, with adapters, all
    but the base weights.
    """
    names = {name for name, _ in policy.named_parameters()}
    if roles_of(policy) is None:
        return names
    head = head_name(policy) if scores(policy) else None
    return {name for name in names if KEY.fullmatch(name) or name == head}


def stored(policy: PreTrainedModel) -> dict[str, Tensor]:
    """Return what policy.pt holds of a policy, sharded as it is: its state dict or, with adapters,
    those that take part in it, and a scalar head.
    """
    state = policy.state_dict(keep_vars=True)
    roles = roles_of(policy)
    if roles is None:
        return state
    own = own_names(policy)
    numbers = {name: str(i) for i, name in enumerate(roles.policy)}
    kept: dict[str, Tensor] = {BASE: policy.adapter_base}  # type: ignore[dict-item]
    for name, number in numbers.items():
        scaling = next(layer.scaling[name] for layer in _layers(policy) if name in layer.scaling)
        kept[f"adapters.{number}.scaling"] = torch.tensor(scaling, dtype=torch.float64)
    for name, tensor in state.items():
        match = KEY.fullmatch(name)
        if name in own and (match is None or match["adapter"] in numbers):
            kept[name] = tensor
    return kept


def starting_state(policy: PreTrainedModel) -> dict[str, Tensor]:
    """Return the weights that a run starts from, by their names without adapters: those of the
    base, and of the adapters that it starts from. Their digest is that of the reference. Every rank
    must call it.
    """
    state = policy.state_dict(keep_vars=True)
    roles = roles_of(policy)
    if roles is None:
        return state
    matches = {name: KEY.fullmatch(name) for name in state}
    start = {
        base_name(name): tensor
        for name, tensor in state.items()
        if (match := matches[name]) is None or match["adapter"] in roles.start
    }
    for name, layer in quantized_layers(policy).items():
        start |= {base_name(f"{name}.{key}"): x for key, x in layer.tensors().items()}
    return start


def count_trained(policy: nn.Module) -> int:
    """Return the number of weights that are trained."""
    return sum(p.numel() for p in policy.parameters() if p.requires_grad)


# ---- the reference ----


class StartingPolicy:
    """Compute with the weights that a policy with adapters started from, which are part of it: the
    base and the adapters it started from. It is a live reference without weights of its own.

    What else is asked of it, the policy answers.
    """

    def __init__(self, policy: PreTrainedModel):
        roles = roles_of(policy)
        assert roles is not None
        self.policy = policy
        self.roles = roles
        self.layers = _layers(policy)

    @torch.no_grad()
    def __call__(self, *arguments: Any, **inputs: Any) -> Any:
        with self._in_place():
            return self.policy(*arguments, **inputs)

    def generate(self, *arguments: Any, **options: Any) -> Any:
        """Sample, as transformers does."""
        with self._in_place():
            return self.policy.generate(*arguments, **options)  # type: ignore[operator]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.policy, name)

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        """Switch to the adapters of the start within the context."""
        _activate(self.layers, self.roles.start)
        try:
            yield
        finally:
            _activate(self.layers, self.roles.policy)
            # otherwise FSDP would miss the gradients of what it has left gathered
            sharding.reshard(self.policy)


def _is_layer(module: nn.Module) -> bool:
    from peft.tuners.lora import LoraLayer

    return isinstance(module, LoraLayer)


def _layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if _is_layer(module)]


def _activate(layers: Sequence[Any], names: Sequence[str]) -> None:
    """Let exactly these adapters take part in a forward pass. peft's own functions would also
    change which parameters are trained.
    """
    for layer in layers:
        layer._active_adapter = list(names)
        layer._disable_adapters = not names
