"""Tensor parallelism: the matrices of a layer cut over ranks that see the same rows (Shoeybi et al.
2019, arXiv:1909.08053).

Parameters lie as DTensors, so that FSDP, optimizer, gradient norm and checkpoints take them like
any other; a module computes on this rank's plain part of them. Between modules all ranks hold the
same activations. Which module is cut how is the model's plan, as transformers ships it
(`base_model_tp_plan`), or as `model.tp_plan` says. Embedding and head are cut in memory, and put
together where they are used: the log-probabilities are then computed as in one process.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)

from plumb.errors import UserError


class Style(NamedTuple):
    """Describe how a matrix is split, and whether its input and output hold all features on every
    rank or each rank's part.
    """

    cut: str | None  # out, in, or not at all
    splits_input: bool = False
    gathers_output: bool = False
    sums_gradients: bool = False  # of parameters that are whole, but see a part of the activations


# The module's own weight beside adapters, and the matrices of a LoRA adapter, as peft names them.
ADAPTER_PART = re.compile(r"\.(?:base_layer|(lora_A|lora_B)\.\w+)$")
SPLITS_NO_DORA = (
    "adapter=dora: needs whole rows of the weights, which trainer=TensorParallelTrainer splits; set"
    " trainer=FSDPTrainer, or adapter=lora"
)
GATHERED = Style("vocabulary")  # embedding and head, whatever the plan says
STYLES = {
    "colwise": Style("out"),
    "rowwise": Style("in"),
    "colwise_gather_output": Style("out", gathers_output=True),
    "colwise_rep": Style("out", gathers_output=True),
    "rowwise_split_input": Style("in", splits_input=True),
    "rowwise_rep": Style("in", splits_input=True),
    "replicated_with_grad_allreduce": Style(None, sums_gradients=True),
    "replicate": Style(None),
    "embedding_rowwise": GATHERED,
}


def plan_of(model: Any, tp_plan: Mapping[str, str] | None) -> dict[str, str]:
    """Return {pattern of module names: style}. Raise UserError if there is no plan, or it has an
    unknown style.
    """
    prefix = f"{model.base_model_prefix}."
    shipped = {
        prefix + name: style
        for name, style in (getattr(model.config, "base_model_tp_plan", None) or {}).items()
    }
    plan = dict(tp_plan) if tp_plan else shipped
    if not plan:
        raise UserError(
            "model.tp_plan=null: transformers ships no tensor-parallel plan for"
            f" {type(model).__name__}; give one (see config/model/gpt2-large.yaml), or use"
            " trainer=FSDPTrainer"
        )
    if unknown := {style for style in plan.values() if style not in STYLES}:
        raise UserError(
            f"trainer=TensorParallelTrainer: {type(model).__name__}'s plan has styles that are not"
            f" built here ({', '.join(sorted(unknown))}); use trainer=FSDPTrainer"
        )
    return plan


def shard_tensor_parallel(
    model: Any,
    mesh: DeviceMesh,
    tp_plan: Mapping[str, str] | None,
    apart: Collection[nn.Module] = (),
) -> None:
    """Make every parameter a DTensor on `mesh`, split as the plan says, or replicated, as are those
    in `apart`. In place, before FSDP.
    """
    _check_adapters(model)
    plan, n = plan_of(model, tp_plan), mesh.size()
    patterns = [
        (re.compile(re.escape(name).replace(r"\*", r"\d+") + "$"), style)
        for name, style in plan.items()
    ]
    spec = model.config.get_text_config()
    for knob in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(spec, knob, None) or n
        if heads % n and any(style == "colwise" for style in plan.values()):
            raise UserError(
                f"tp_size={n}: does not divide the model's {knob}={heads}; give a divisor"
            )
    ends = {model.get_input_embeddings(), model.get_output_embeddings()}
    one_row = ends & set(apart)  # nothing to cut
    shared: dict[int, nn.Parameter] = {}  # a tied parameter stays one
    used = set()
    for name, module in model.named_modules():
        matches = [(pattern, style) for pattern, style in patterns if pattern.match(owner_of(name))]
        used |= {pattern for pattern, _ in matches}
        style = (
            GATHERED
            if module in ends - one_row
            else style_of_part(name, STYLES[matches[0][1]])
            if matches and module not in one_row
            else Style(None)
        )
        if any(p is not None for p in module._parameters.values()):
            _cut(module, name, style, mesh, shared)
        elif style.cut and not hasattr(module, "base_layer"):
            raise UserError(f"model.tp_plan: {name} has no weights to split")
    if missing := [pattern.pattern for pattern, _ in patterns if pattern not in used]:
        raise UserError(f"model.tp_plan: {type(model).__name__} has no module {missing[0]}")


def _check_adapters(model: Any) -> None:
    """Raise UserError for adapters that are not split here."""
    if any("lora_magnitude_vector" in name for name, _ in model.named_parameters()):
        raise UserError(SPLITS_NO_DORA)
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    if any(hasattr(end, "base_layer") for end in ends):
        raise UserError(
            "adapter_targets: the embedding and the head take no adapter with"
            " trainer=TensorParallelTrainer; leave them out, or set trainer=FSDPTrainer"
        )


def owner_of(name: str) -> str:
    """Return the name that a module would have without adapters: of its own weight, or of one of
    an adapter's matrices, that of the module which they belong to.

    >>> owner_of("model.layers.0.self_attn.q_proj.lora_A.0")
    'model.layers.0.self_attn.q_proj'
    """
    return ADAPTER_PART.sub("", name)


def style_of_part(name: str, style: Style) -> Style:
    """Return how this part of a module of the `style` is split: of B A x, the matrix that meets
    what is split. B has the module's outputs, A its inputs; the other one is whole on every rank.
    """
    part = ADAPTER_PART.search(name)
    whole_in = {"lora_A": "out", "lora_B": "in"}.get(part[1] or "") if part else None
    return Style(None) if whole_in and style.cut == whole_in else style


def _cut(
    module: nn.Module, name: str, style: Style, mesh: DeviceMesh, shared: dict[int, nn.Parameter]
) -> None:
    # [in, out], where a linear layer has [out, in]
    n = mesh.size()
    transposed = type(module).__name__ == "Conv1D"
    for leaf, p in module._parameters.items():
        if p is None:
            continue
        where: Placement = Replicate()
        if style is GATHERED:
            where = Shard(0)
        elif style.cut == "out":
            where = Shard(p.ndim - 1 if transposed else 0)
        elif style.cut == "in" and p.ndim == 2:
            where = Shard(0 if transposed else 1)
        if style is not GATHERED and isinstance(where, Shard) and p.shape[where.dim] % n:
            raise UserError(
                f"tp_size={n}: does not divide the {p.shape[where.dim]} of {name}.{leaf}; give a"
                " divisor"
            )
        if id(p) not in shared:
            shared[id(p)] = nn.Parameter(
                distribute_tensor(p.detach(), mesh, [where]), requires_grad=p.requires_grad
            )
        module._parameters[leaf] = shared[id(p)]
    if transposed and style.cut == "out":
        vars(module)["nf"] //= n  # Conv1D shapes its output by it
    module.register_forward_pre_hook(_Enter(style, mesh))
    module.register_forward_hook(_Leave(style, mesh), always_call=True)


class _Enter:
    """Prepare a module before it computes: replace its parameters by local tensors, and its input
    by what it should see.
    """

    def __init__(self, style: Style, mesh: DeviceMesh):
        self.style = style
        self.mesh = mesh

    def __call__(self, module: nn.Module, inputs: tuple) -> tuple | None:
        held: dict[str, Any] = dict(module._parameters)
        vars(module)["_held"] = held
        for leaf, p in held.items():
            if p is not None:
                del module._parameters[leaf]
                vars(module)[leaf] = self.to_compute_with(p)
        if self.style.cut not in ("in", "out") or not inputs:
            return None
        x, *rest = inputs
        if self.style.splits_input:
            x = (
                DTensor.from_local(x, self.mesh, [Replicate()], run_check=False)
                .redistribute(placements=[Shard(-1)])
                .to_local()
            )
        elif self.style.cut == "out":  # whole on every rank; each gives a part of its gradient
            x = DTensor.from_local(x, self.mesh, [Replicate()], run_check=False).to_local(
                grad_placements=[Partial()]
            )
        return (x, *rest)

    def to_compute_with(self, p: Any) -> Tensor:
        if self.style is GATHERED:
            return p.full_tensor()
        if self.style.sums_gradients:
            return p.to_local(grad_placements=[Partial()])
        if self.style.cut == "in" and p.ndim == 1:  # a bias counts once in the sum
            mine = p.to_local(grad_placements=[Partial()])
            return mine if self.mesh.get_local_rank() == 0 else mine * 0
        return p.to_local()


class _Leave:
    """Restore a module after it has computed: put its parameters back, and lay out its output as
    the plan says.
    """

    def __init__(self, style: Style, mesh: DeviceMesh):
        self.style = style
        self.mesh = mesh

    def __call__(self, module: nn.Module, inputs: tuple, output: Any) -> Any:
        for leaf, p in vars(module).pop("_held", {}).items():
            vars(module).pop(leaf, None)
            module._parameters[leaf] = p
        if self.style.cut == "in":
            return DTensor.from_local(output, self.mesh, [Partial()], run_check=False).full_tensor()
        if self.style.gathers_output:
            return DTensor.from_local(output, self.mesh, [Shard(-1)], run_check=False).full_tensor()
        return None
