"""Choose the layout that gives a model's own numbers: from its config, or by trying it on
synthetic rows.

The truth is each response alone: its prompt and itself in a row of their own, without padding,
under the model's own attention and head. A layout is used if it reproduces the truth up to
rounding, in values and in gradients, for what training will see: a row of max_length, neighbours
of very different lengths, a full microbatch. The rows are synthetic, so that the choice depends on
the model and the settings, not on which rows of the data come first.

Shapes: T tokens in a row, n compared positions of it, d hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from plumb.batching.layout import Batch, pack, unfold
from plumb.data.examples import lengths_of
from plumb.data.tokenization import Example
from plumb.distributed import collectives, sharding
from plumb.distributed.device import is_out_of_memory
from plumb.errors import UserError
from plumb.models import tree_attention
from plumb.models.chunked_head import token_logps
from plumb.models.forward_path import ForwardPath
from plumb.models.logps import lm_head_at_positions, packed_inputs
from plumb.models.scalar_head import scores

# positions of a response that are compared, spread over its length: their logits must fit in memory
COMPARED = 64
# nats per token; sixty families of small models in float32 differ by at most 2e-6 from one layout
# to another
ROUNDING = 1e-5
GRADIENT_ROUNDING = 1e-4  # of the gradient's norm; the same families differ by at most 6e-6
# Kinds of layers that keep nothing along the row.
FREE_OF_STATE = {"full_attention", "sliding_attention", "attention"}


# ---- known from the config ----


def cannot_pack(model: Any) -> str | None:
    """Return why several sequences must not share a row of this model, as far as its config says
    so; None if it may be tried.
    """
    spec = model.config.get_text_config()
    if kinds := sorted(layer_kinds(spec) - FREE_OF_STATE):
        return f"its {', '.join(kinds)} layers run along the row"
    if getattr(model, "_is_stateful", False):
        return "it keeps a state along the row"
    if getattr(spec, "attn_temperature_tuning", False):
        return "its attention temperature counts along the row"
    if getattr(spec, "alibi", False) or getattr(spec, "position_embedding_type", None) == "alibi":
        return "its ALiBi bias counts along the row"
    if model.config._attn_implementation != tree_attention.NAME:
        return "its attention cannot be exchanged"
    return None


def layer_kinds(spec: Any) -> set[str]:
    """Return the kinds of layers that a transformers config lists, under any of the names in use;
    empty if it lists none.
    """
    lists = (
        getattr(spec, name, None) for name in ("layer_types", "block_types", "layers_block_type")
    )
    return {str(kind) for kinds in lists if kinds for kind in kinds}


def check_rope(hf_config: Any, longest: int) -> None:
    """Raise UserError if sequences of up to `longest` tokens would get rotary embeddings that
    depend on their neighbours.

    "dynamic" and "longrope" choose their frequencies by the longest sequence of the batch, so
    beyond a length one long text changes the log-probabilities of all others, in padded rows too.
    """
    spec = hf_config.get_text_config()
    parameters = getattr(spec, "rope_parameters", None) or {}
    for rope in [parameters, *(each for each in parameters.values() if isinstance(each, dict))]:
        kind, limit = rope.get("rope_type"), getattr(spec, "max_position_embeddings", None)
        if kind == "longrope":
            limit = rope.get("original_max_position_embeddings", limit)
        if kind in ("dynamic", "longrope") and limit is not None and longest > limit:
            raise UserError(
                f"max_length={longest}: the model's rotary embeddings ({kind}) change for a whole"
                f" batch as soon as one of its sequences has more than {limit:,} tokens, so results"
                f" would depend on neighbours; set max_length={limit} or less"
            )


LOGIT_KNOBS = ("final_logit_softcapping", "logits_scaling", "logit_scale", "lm_head_multiplier")


@torch.no_grad()
def keeps_logits(model: Any, precision: Callable[[], AbstractContextManager]) -> bool:
    """Return whether the model returns its head's output unchanged (no soft cap, no scale).

    Exact in any precision: the head is made to return integers up to 60, which bfloat16 holds, and
    they must come back.
    """
    head = model.get_output_embeddings()
    device = next(model.parameters()).device
    positions, rows = torch.arange(3)[:, None], torch.arange(head.weight.shape[0])
    expected = (13 * positions + 7 * rows) % 61 * 2.0 - 60  # [3, V]

    def ramp(hidden: Tensor) -> Tensor:  # [1, 3, d] -> [1, 3, V]
        return expected[None].to(hidden.device)

    ids = torch.zeros(1, 3, dtype=torch.int64, device=device)
    with precision(), lm_head_at_positions(model, torch.arange(3, device=device), None, ramp):
        logits = model(input_ids=ids, use_cache=False).logits
    same = torch.equal(logits[0].float().cpu(), expected[:, : logits.shape[-1]])
    return all(collectives.all_gather_object(same))


def plain_head(model: Any, precision: Callable[[], AbstractContextManager]) -> tuple[bool, str]:
    """Return whether log-probabilities may be computed straight from the head's weight, and why
    not.
    """
    head = model.get_output_embeddings()
    if scores(model):
        return False, ""
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        return False, "its head is not a plain matrix"
    if not keeps_logits(model, precision):
        spec = model.config.get_text_config()
        named = [
            f"{knob}={getattr(spec, knob)}" for knob in LOGIT_KNOBS if getattr(spec, knob, None)
        ]
        knobs = f" ({', '.join(named)})" if named else ""
        return False, f"it changes the logits after its head{knobs}"
    return True, ""


# ---- found by trying ----


def ordinary_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Return the token ids that texts are made of: all that have an embedding, less the special
    ones.  [n] int64
    """
    n = min(len(tokenizer), model.get_input_embeddings().weight.shape[0])
    return np.setdiff1d(np.arange(n), tokenizer.all_special_ids)


class Row(NamedTuple):
    """Hold one row to try, and which of its trees are compared."""

    examples: list[Example]
    compared: list[int]


def synthetic_rows(longest: int, row_tokens: int, vocabulary: np.ndarray, seed: int) -> list[Row]:
    """Return three rows of trees with two responses each, tokens drawn from `vocabulary`, no
    sequence longer than `longest`.

    Neighbours of very different lengths; a response of nearly `longest`; and these two trees again,
    at both ends of a row of `row_tokens`.

    >>> rows = synthetic_rows(40, 200, np.arange(5, 9), seed=0)
    >>> [[(len(e.prompt), *map(len, e.responses)) for e in row.examples] for row in rows[:2]]
    [[(4, 3, 7), (20, 20, 20)], [(8, 32, 2), (10, 10, 5)]]
    >>> full = rows[2]
    >>> int(lengths_of(full.examples).tokens().sum()) >= 200
    True
    >>> full.compared == [0, len(full.examples) - 1]
    True
    """
    rng = np.random.default_rng(seed)

    def tree(prompt: int, *responses: int) -> Example:
        prompt = min(prompt, longest - 1)
        lengths = [prompt, *(min(r, longest - prompt) for r in responses)]
        ids, *texts = (rng.choice(vocabulary, length).astype(np.int32) for length in lengths)
        return Example(ids, tuple(texts), "synthetic")

    half, quarter = max(1, longest // 2), max(1, longest // 4)
    neighbours = [tree(4, 3, 7), tree(half, longest, 20)]
    ends = [tree(8, longest, 2), tree(quarter, quarter, 5)]
    between: list[Example] = []
    room = row_tokens - int(lengths_of(ends).tokens().sum())
    while room > 0:
        between.append(tree(quarter, *rng.integers(1, 2 * quarter + 1, 2).tolist()))
        room -= int(lengths_of(between[-1:]).tokens().sum())
    full = [ends[0], *between, ends[1]]
    return [Row(neighbours, [0, 1]), Row(ends, [0, 1]), Row(full, [0, len(full) - 1])]


class Alone(NamedTuple):
    """Hold the outputs of a tree's responses, each in a row of its own."""

    values: list[Tensor]  # [n] float64 of each response, on the CPU: nats, or scores
    gradients: list[Tensor]  # [prompt + response, d] of each, see Prober.compute; none without


class Distance(NamedTuple):
    """Measure how far two computations are apart."""

    # of the worst response, the mean absolute difference: nats per token, or scores relative to the
    # largest
    values: float
    gradients: float  # of the worst tree, the norm of the difference relative to the gradient's


class Precision(NamedTuple):
    context: Callable[[], AbstractContextManager]  # autocast, or nothing
    dtype: torch.dtype  # of the computation


class Prober(NamedTuple):
    """Compare computations of one model in one precision. All ranks must make the same calls."""

    model: Any
    device: torch.device
    precision: Precision
    gradients: bool

    def compute(
        self, inputs: dict[str, Any], positions: Tensor, targets: Tensor, head_in_chunks: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return the values at `positions` [n] of the flattened tokens, [n], and the gradient of
        their signed sum by the input embeddings, [rows, T, d]; float64 on the CPU.
        """
        embeddings: list[Tensor] = []

        def leaf(module, arguments, output):
            embeddings.append(output.detach().requires_grad_(self.gradients))
            return embeddings[-1]

        handle = self.model.get_input_embeddings().register_forward_hook(leaf)
        try:
            with torch.set_grad_enabled(self.gradients), self.precision.context():
                with lm_head_at_positions(
                    self.model, positions, targets if head_in_chunks else None
                ):
                    output = self.model(**inputs, use_cache=False).logits[0]  # [n, 1], or [n, V]
                one = head_in_chunks or scores(self.model)
                values = output[:, 0] if one else token_logps(output, targets)
            gradient = None
            if self.gradients:
                signs = 1 - 2 * (targets.to(values.device) % 2)
                (gradient,) = torch.autograd.grad((values * signs).sum(), embeddings[0])
        finally:
            handle.remove()
            sharding.reshard(self.model)
        return values.detach().double().cpu(), None if gradient is None else gradient.double().cpu()

    def alone(self, example: Example) -> Alone:
        """Return the truth: each response without neighbours and padding, under the model's own
        attention and head.
        """
        values, gradients = [], []
        for response in example.responses:
            ids = np.concatenate([example.prompt, response]).astype(np.int64)
            scored = len(example.prompt) - 1 + compared_tokens(response)
            targets = torch.from_numpy(ids[scored + 1]).to(self.device)
            row = torch.from_numpy(ids)[None].to(self.device)
            value, gradient = self.compute(
                {"input_ids": row}, torch.from_numpy(scored).to(self.device), targets, False
            )
            values.append(value)
            gradients += [] if gradient is None else [gradient[0]]
        return Alone(values, gradients)

    def packed(self, row: Row, truths: Sequence[Alone], head_in_chunks: bool) -> Distance:
        """Compare the row in one piece with the compared trees' truths, in their order."""
        batch = self._batch(row.examples)
        values, gradient = self._responses(
            batch, row, packed_inputs(batch), batch.scored, head_in_chunks
        )
        pairs = []
        for i, truth in zip(row.compared, truths, strict=True):
            if gradient is not None:  # the responses' gradients of a shared prompt add up
                start, n_prompt = batch.spans[i, :2]
                prompt = torch.stack([g[:n_prompt] for g in truth.gradients]).sum(0)
                expected = torch.cat([prompt, *(g[n_prompt:] for g in truth.gradients)])
                pairs.append((gradient[0, start : start + len(expected)], expected))
        return self._distance(values, truths, pairs)

    def padded(self, example: Example, truth: Alone, head_in_chunks: bool) -> Distance:
        """Compare a tree's responses in padded rows with its truth."""
        batch = self._batch([example])
        rows = unfold(batch, 0)
        inputs = {"input_ids": rows.input_ids, "attention_mask": rows.attention_mask}
        values, gradient = self._responses(
            batch, Row([example], [0]), inputs, rows.scored, head_in_chunks
        )
        pairs: list[tuple[Tensor, Tensor]] = []
        if gradient is not None:
            pairs = [(row[: len(g)], g) for row, g in zip(gradient, truth.gradients, strict=True)]
        return self._distance(values, [truth], pairs)

    def _batch(self, examples: list[Example]) -> Batch:
        longest = int(lengths_of(examples).longest().max())
        return pack(examples, pad_token_id=0, longest=longest).to(self.device)

    def _responses(
        self, batch: Batch, row: Row, inputs: dict[str, Any], scored: Tensor, head_in_chunks: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the compared trees' values, tree by tree; `scored` [N]: where the batch's scored
        tokens lie in `inputs`.
        """
        response, n_trees = batch.response.cpu().numpy(), len(row.examples)
        chosen = []
        for tree in row.compared:
            for i, text in enumerate(row.examples[tree].responses):
                chosen.append(
                    int((response == tree + n_trees * i).argmax()) + compared_tokens(text)
                )
        at = torch.from_numpy(np.concatenate(chosen)).to(self.device)
        return self.compute(inputs, scored[at], batch.targets[at], head_in_chunks)

    def _distance(
        self, values: Tensor, truths: Sequence[Alone], gradients: Sequence[tuple[Tensor, Tensor]]
    ) -> Distance:
        expected = [one for truth in truths for one in truth.values]
        largest = max(float(one.abs().max()) for one in expected)
        scale = max(1.0, largest) if scores(self.model) else 1.0
        parts = values.split([len(one) for one in expected])
        off_by = [float((a - b).abs().mean()) for a, b in zip(parts, expected, strict=True)]
        off = [float((a - b).norm() / b.norm().clamp(min=1e-30)) for a, b in gradients]
        return worst_of([Distance(max(off_by) / scale, max(off, default=0.0))])

    def rounding(self, examples: Sequence[Example], truths: Sequence[Alone]) -> Distance:
        """Return the difference that one more rounding after each block makes: what no two orders
        of summation can be held to.

        The output of each block is multiplied by 1 + eps z with z standard normal, where eps is
        half the spacing of the precision's numbers at 1.
        """
        generator = torch.Generator().manual_seed(0)
        eps = torch.finfo(self.precision.dtype).eps / 2

        def rounded(x: Tensor) -> Tensor:
            z = torch.randn(x.shape, generator=generator, dtype=torch.float32)
            return (x.double() * (1 + eps * z.to(x.device))).to(x.dtype)

        def hook(module, arguments, output):
            return (
                (rounded(output[0]), *output[1:]) if isinstance(output, tuple) else rounded(output)
            )

        stacks = [module for module in self.model.modules() if isinstance(module, nn.ModuleList)]
        handles = [block.register_forward_hook(hook) for block in max(stacks, key=len, default=())]
        try:
            others = [self.alone(example) for example in examples]
        finally:
            for handle in handles:
                handle.remove()
        distances = []
        for other, truth in zip(others, truths, strict=True):
            pairs = list(zip(other.gradients, truth.gradients, strict=True))
            distances.append(self._distance(torch.cat(other.values), [truth], pairs))
        return worst_of(distances)


def compared_tokens(response: np.ndarray) -> np.ndarray:
    """Return numbers of at most COMPARED tokens of a response, spread over its length.  [n]
    int64
    """
    return np.unique(
        np.linspace(0, len(response) - 1, min(COMPARED, len(response))).astype(np.int64)
    )


def worst_of(distances: Sequence[Distance]) -> Distance:
    """Return the maximum of each over all ranks; NaN counts as infinite."""
    values = torch.tensor(distances, dtype=torch.float64).nan_to_num(nan=torch.inf).amax(0)
    return Distance(*(max(collectives.all_gather_object(float(value))) for value in values))


def choose_forward_path(
    model: Any,
    *,
    device: torch.device,
    longest: int,
    vocabulary: np.ndarray,
    row_tokens: Callable[[ForwardPath], int],
    precisions: Sequence[Precision],
    gradients: bool,
) -> tuple[ForwardPath, str]:
    """Return the fastest layout that gives this model's own values, and a line that says why it was
    chosen.

    `longest`: tokens of the longest sequence. `vocabulary`: ids of ordinary tokens. `row_tokens`:
    of a microbatch in a layout. `precisions`: a layout must hold in each. `gradients`: compare
    these too, in the last. All ranks get the same answer. Raises UserError where no layout would
    do, see check_rope.
    """
    check_rope(model.config, longest)
    head_in_chunks, why_own_head = plain_head(model, precisions[0].context)
    packed, padded = ForwardPath(True, head_in_chunks), ForwardPath(False, head_in_chunks)
    unit = "" if scores(model) else " nats per token"
    why = cannot_pack(model)
    if why is None:
        # Rounding can tip a router from one expert to another: what fails on one draw of tokens
        # gets a second.
        for seed in (0, 1):
            rows = synthetic_rows(longest, row_tokens(packed), vocabulary, seed)
            try:
                worst, within = try_layout(model, packed, rows, device, precisions, gradients)
            except Exception as error:  # any error of a model for an argument that it does not know
                if isinstance(error, RuntimeError) and is_out_of_memory(error):
                    raise
                why = str(error).splitlines()[0][:100]
                break
            if within:
                own = f" ({why_own_head})" if why_own_head else ""
                equal = f"equal to each response alone to {worst.values:.0e}{unit}"
                return packed, f"batches: {packed}{own}; {equal}"
            if worst.values > ROUNDING:
                why = f"packed, it would be off by {worst.values:.1g}{unit}"
            else:
                why = f"packed, it would be off by {worst.gradients:.1g} of the gradient"
    rows = synthetic_rows(longest, 0, vocabulary, 0)
    worst, within = try_layout(model, padded, rows, device, precisions, gradients)
    reasons = "; ".join(filter(None, [why, why_own_head]))
    verdict = "equal to" if within else "WARNING: results depend on padding; off from"
    line = (
        f"batches: {padded} ({reasons}); {verdict} each response alone to {worst.values:.0e}{unit}"
    )
    return padded, line


def try_layout(
    model: Any,
    forward_path: ForwardPath,
    rows: Sequence[Row],
    device: torch.device,
    precisions: Sequence[Precision],
    gradients: bool,
) -> tuple[Distance, bool]:
    """Return the layout's largest distance from the truth, and whether it is within the tolerance
    of every precision.

    The tolerance is ROUNDING and GRADIENT_ROUNDING for numbers of 32 bits or more. Beyond that, and
    in 16 bits, it is twice what one more rounding in each block makes (see Prober.rounding).
    """
    trees = [row.examples[i] for row in rows[:2] for i in row.compared]
    worst, within = [], True
    for precision in precisions:
        prober = Prober(model, device, precision, gradients and precision is precisions[-1])
        truths = {id(tree): prober.alone(tree) for tree in trees}
        if forward_path.packed:
            # A full microbatch without gradients: they would take as much time as a second one.
            full = prober._replace(gradients=False)
            distances = [
                p.packed(
                    row,
                    [truths[id(row.examples[i])] for i in row.compared],
                    forward_path.plain_head,
                )
                for p, row in zip((prober, prober, full), rows, strict=True)
            ]
        else:
            distances = [
                prober.padded(tree, truths[id(tree)], forward_path.plain_head) for tree in trees
            ]
        off = worst_of(distances)
        worst.append(off)
        fixed = precision.dtype.itemsize >= 4
        if not (fixed and off.values <= ROUNDING and off.gradients <= GRADIENT_ROUNDING):
            rounding = prober.rounding(trees, list(truths.values()))
            within &= off.values <= 2 * rounding.values and off.gradients <= 2 * rounding.gradients
    return worst_of(worst), within
