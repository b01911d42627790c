"""Score answers: with a reward model, a policy by the rewards of its loss or against a reference,
or any sequence-classification model.

Shapes: n rows of k responses each (1 or 2), R = k * B responses of a microbatch (see
batching/layout.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from plumb.batching.feed import Feed
from plumb.batching.layout import Batch, by_example
from plumb.batching.microbatches import Packing
from plumb.console import quiet, rank0_print, to_dict
from plumb.data.registry import DataSet
from plumb.data.rows import Row
from plumb.data.tokenization import (
    Example,
    TextRules,
    automatic_bos,
    encode,
    own_template,
    template_text,
    truncate,
)
from plumb.distributed.device import pick_device
from plumb.errors import UserError
from plumb.losses import inputs
from plumb.losses.bound import Reads
from plumb.losses.contract import halves
from plumb.models.find import (
    ModelRef,
    Opened,
    check_device,
    find_model,
    move_reference,
    open_model,
    start_of,
)
from plumb.models.forward_path import ForwardPath
from plumb.models.layout_probe import Precision, choose_forward_path, ordinary_ids
from plumb.models.limits import check_positions, check_vocabulary
from plumb.models.load import (
    has_scalar_head,
    load_classifier,
    load_config,
    load_tokenizer,
)
from plumb.models.logps import read_responses
from plumb.paths import CONFIG
from plumb.runs.loss_of_run import loss_of_run


class Scored(NamedTuple):
    """Hold the scores of n rows."""

    scores: np.ndarray  # [n, k] float64
    tokens: np.ndarray  # [n, k] of each response, as it was read
    cut: np.ndarray  # [n] bool: the prompt or a response was truncated
    same: np.ndarray  # [n] bool: all k responses are the same, as they were read


class Scorer(Protocol):
    def score(self, rows: Sequence[Row], keep: str) -> Scored:
        """Score rows with one pair each, or one SFT target each. `keep`: which end of a long prompt
        is kept.
        """
        ...


class Rewarding(NamedTuple):
    """Hold how responses are scored: what is read from the model and from its reference, and the
    function that gives the scores of the first and the second of two responses, [B] each.
    """

    reads: Reads
    reads_of_reference: Reads | None
    scores: Callable[[inputs.Two, inputs.Two | None], tuple[Tensor, Tensor] | None]
    about: str  # in words


def load_scorer(
    ref: ModelRef,
    config: DictConfig,
    reference: str | None = None,
    beta: float | None = None,
    *,
    device: str | None = None,
    budget: int = 8192,
) -> Scorer:
    """Return the scorer. `config`: see knobs_of. `reference` and `beta` replace those of the
    model's run; both together ask for the implicit reward beta * log(policy / reference), whatever
    the run's loss. `budget` is the number of tokens in a microbatch. Raises UserError for a model
    that is not a scorer, and for options it does not use, before weights are read.
    """
    if ref.scalar:
        for option, value in (("reference", reference), ("beta", beta)):
            if value is not None:
                raise UserError(
                    f"--{option}={value}: {ref.name} is a reward model, which needs none; leave"
                    " it out"
                )
        if ref.archive is None and not has_scalar_head(ref.config):
            return Classifier(ref, config, device, budget)
        read = (ref.config.get("loss") or {}).get("read", "last")  # as its run did
        return Causal(config, budget, of_reward_model(read), open_model(ref, device))
    if beta is not None and not 0 < beta < float("inf"):
        raise UserError(f"--beta={beta}: must be above 0, and finite")
    rewarding = rewarding_of(ref, reference, beta)
    origin: ModelRef | None = None
    if rewarding.reads_of_reference is not None:
        origin = (
            replace(ref, config=start_of(ref))
            if reference is None
            else find_reference(ref, reference)
        )
    policy = open_model(ref, device)
    start = open_model(origin, device) if origin is not None else None
    if start is not None and reference is None:
        move_reference(ref, start.model)
    if start is not None:
        probe = [
            o.tokenizer("Where is the 3rd house?", add_special_tokens=False)["input_ids"]
            for o in (policy, start)
        ]
        if probe[0] != probe[1]:
            raise UserError(
                f"--reference={reference}: its tokenizer encodes text differently from that of"
                f" {ref.name}; give the model it was trained from"
            )
    rank0_print(f"scores: {rewarding.about}")
    return Causal(config, budget, rewarding, policy, start)


def find_reference(ref: ModelRef, name: str) -> ModelRef:
    """Return the model that a policy is compared with. Raise UserError for a reward model."""
    base = ref.config.model.name_or_path if name.endswith(".pt") else None
    origin = find_model(name, base, dtype=ref.config.model.policy_dtype)
    if origin.scalar:
        raise UserError(
            f"--reference={name}: a reward model has no log-probabilities; give a policy"
        )
    return origin


def of_reward_model(read: str) -> Rewarding:
    """Return the scores of a reward model's head: at the last tokens, or with "mean" their mean."""
    return Rewarding("scores", None, lambda two, _: (two[0].of(read), two[1].of(read)), "")


def implicit_reward(beta: float) -> Rewarding:
    """Return beta * log(policy / reference)."""

    def scores(two: inputs.Two, theirs: inputs.Two | None) -> tuple[Tensor, Tensor]:
        assert theirs is not None
        first, second = (beta * (a.sum - b.sum) for a, b in zip(two, theirs, strict=True))
        return first, second

    return Rewarding("logps", "logps", scores, f"{beta:g} * log(policy / reference)")


def rewarding_of(ref: ModelRef, reference: str | None, beta: float | None) -> Rewarding:
    """Return how a policy scores: by the rewards of its run's loss, or by the implicit reward.
    Raise UserError for an option that would not be used, and for one that is missing.
    """
    recorded = to_dict(ref.config.get("loss"))
    try:
        loss = loss_of_run({"loss": recorded})
        why = "" if loss.rewards else f"the loss of its run ({loss.name}) has no rewards"
    except ValueError as error:
        loss, why = None, str(error) if recorded else "no loss is known"
    if beta is not None and (reference is not None or why):
        return implicit_reward(beta)
    if loss is None or why:
        raise UserError(
            f"{ref.name}: neither a reward model nor a run whose loss has rewards ({why}); give a"
            " reward model, or --beta and --reference MODEL for the implicit reward beta *"
            " log(policy / reference)"
        )
    if reference is not None and not loss.needs_reference:
        raise UserError(
            f"--reference={reference}: the rewards of its run's loss ({loss.name}) need no"
            " reference; leave it out, or give --beta too for beta * log(policy / reference)"
        )
    if beta is not None:
        if list(loss.values_of("beta")) != ["loss.beta"]:
            raise UserError(
                f"--beta={beta}: its run's loss ({loss.name}) has no beta of its own; leave it out,"
                " or give --reference too for beta * log(policy / reference)"
            )
        loss = loss_of_run({"loss": {**recorded, "beta": beta}})
    return Rewarding(
        loss.reads,
        loss.reads_of_reference if loss.needs_reference else None,
        partial(inputs.rewards, loss),
        f"the rewards of its run's loss, {loss.name}: {loss.rewards}",
    )


def knobs_of(ref: ModelRef, options: dict[str, Any]) -> DictConfig:
    """Return the defaults in config.yaml, overridden by the model's run, overridden by the given
    values that are not None.
    """
    config = cast(DictConfig, OmegaConf.load(CONFIG / "config.yaml"))
    config = cast(
        DictConfig,
        OmegaConf.merge(config, ref.config, {k: v for k, v in options.items() if v is not None}),
    )
    if not 0 < config.max_prompt_length < config.max_length:
        raise UserError(
            f"--max-prompt-length={config.max_prompt_length}: must be at least 1 and below"
            f" max_length ({config.max_length}); give both"
        )
    return config


class Causal:
    """Score with a causal LM: by its scalar head, or by its log-probabilities and those of its
    reference, as `rewarding` says.

    Tokens, truncation, BOS and EOS are those of training.
    """

    def __init__(
        self,
        config: DictConfig,
        budget: int,
        rewarding: Rewarding,
        policy: Opened,
        reference: Opened | None = None,
    ):
        self.config = config
        self.budget = budget
        self.rewarding = rewarding
        self.model = policy.model
        self.tokenizer = policy.tokenizer
        self.reference = reference and reference.model
        self.name = policy.ref.name
        self.device = next(self.model.parameters()).device
        for model in (self.model, self.reference):
            if model is not None:
                check_positions(model, config.max_length, "--max-length")
        self.forward_path: ForwardPath | None = None  # chosen when there are tokens to try

    @torch.no_grad()
    def score(self, rows: Sequence[Row], keep: str) -> Scored:
        """Score at least one row; see Scorer. Raises UserError for a score that is not finite, and
        for unknown tokens.
        """
        examples, cut = encoded(rows, self.tokenizer, self.config, keep)
        highest = max(int(x.max(initial=0)) for e in examples for x in (e.prompt, *e.responses))
        for model in (self.model, self.reference):
            if model is not None:
                check_vocabulary(model, self.tokenizer, highest, self.name, examples)
        n, forward_path = len(examples), self._find_forward_path()
        scores = np.empty((n, len(examples[0].responses)))
        packing = Packing(
            packed=forward_path.packed,
            budget=self.budget,
            world_size=1,
            pad_token_id=cast(int, self.tokenizer.pad_token_id),
            longest=2 * self.config.max_length,
        )
        feed = Feed(examples, packing, rank=0)
        with tqdm(total=n, desc="scoring", unit="row", disable=quiet()) as progress:
            for start in range(0, n, 256):
                step = feed.step(np.arange(start, min(start + 256, n)))
                for batch, _, where in step.microbatches:
                    values = self._values(batch.to(self.device), forward_path)  # [R]
                    values = by_example(values, batch.n_responses)  # [B, k]
                    scores[start + where] = values.double().cpu().numpy()
                    progress.update(len(where))
        _check_finite(scores, rows, self.name)
        tokens = np.array([[len(r) for r in e.responses] for e in examples]).reshape(scores.shape)
        same = np.array(
            [all(np.array_equal(e.responses[0], r) for r in e.responses) for e in examples], bool
        )
        return Scored(scores, tokens, cut, same)

    def _find_forward_path(self) -> ForwardPath:
        """Return how the models compute."""
        if self.forward_path is None:
            self.forward_path, line = choose_forward_path(
                self.model,
                device=self.device,
                longest=self.config.max_length,
                vocabulary=ordinary_ids(self.model, self.tokenizer),
                row_tokens=lambda forward_path: self.budget,
                precisions=[Precision(nullcontext, self.model.dtype)],
                gradients=False,
            )
            rank0_print(line)
        return self.forward_path

    def _values(self, batch: Batch, forward_path: ForwardPath) -> Tensor:  # [R]
        own = read_responses(self.rewarding.reads, self.model, batch, forward_path, self.reference)
        pairs = len(batch.spans) == 2 * len(batch.n_responses)
        two = halves(own) if pairs else (own, own)
        theirs = None
        if self.rewarding.reads_of_reference is not None:
            other = read_responses(
                self.rewarding.reads_of_reference, self.reference, batch, forward_path
            )
            theirs = halves(other) if pairs else (other, other)
        scores = self.rewarding.scores(two, theirs)
        assert scores is not None  # a loss without rewards is refused
        return torch.cat(scores) if pairs else scores[0]


class Encoded(NamedTuple):
    examples: list[Example]
    cut: np.ndarray  # [n] bool


def encoded(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, config: DictConfig, keep: str
) -> Encoded:
    """Return rows as examples in memory, as a run trains on them."""
    rules = TextRules(
        max_length=config.max_length,
        max_prompt_length=config.max_prompt_length,
        response_truncation=config.response_truncation,
        add_bos=config.add_bos,
        eos_in_text=config.eos_in_text,
    )
    bos = [b for b in [automatic_bos(tokenizer) if config.add_bos else None] if b is not None]
    examples, cuts = list[Example](), [np.empty(0, bool)]
    template = template_text(
        config.chat_template, f"--chat-template={config.chat_template}", tokenizer
    )
    for chunk in encode(DataSet("rows", 0.0, iter(rows), len(rows)), tokenizer, rules, template):
        texts = np.split(np.array(chunk.ids, np.int32), np.cumsum(chunk.lengths)[:-1])
        items = np.array(chunk.pairs or chunk.targets)  # [rows, 1 + k]
        items[:, 0] = [chunk.rows[row][0] for row in items[:, 0]]
        before = np.array(chunk.lengths)[items]
        before[:, 0] += len(bos)
        after = truncate(before[:, 0], before[:, 1:], rules)
        cuts.append((after < before).any(1))
        for (prompt, *responses), (n_prompt, *n) in zip(items, after, strict=True):
            room = n_prompt - len(bos)
            ids = (
                texts[prompt][len(texts[prompt]) - room :]
                if keep == "keep_end"
                else texts[prompt][:room]
            )
            cut = tuple(texts[r][:length] for r, length in zip(responses, n, strict=True))
            examples.append(
                Example(
                    np.concatenate([np.array(bos, np.int32), ids]), cut, rows[len(examples)].source
                )
            )
    return Encoded(examples, np.concatenate(cuts))


class Classifier:
    """Score with any sequence-classification model with one label, including encoders, through its
    own tokenizer and forward pass.

    Text that is too long loses its start. If padding could be taken for text (no PAD token of its
    own), a batch is one text.
    """

    def __init__(self, ref: ModelRef, config: DictConfig, device: str | None, budget: int):
        check_device(device)
        ref.config.device = device
        labels = load_config(ref.config).num_labels
        if labels != 1:
            raise UserError(
                f"{ref.name}: has num_labels={labels}; a scorer needs a model with one label"
            )
        self.config = config
        self.name = ref.name
        self.tokenizer = load_tokenizer(ref.config)
        self.model = load_classifier(ref.config).to(pick_device(ref.config)).eval()  # type: ignore[arg-type]
        pad, eos = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        self.alone = pad is None or pad == eos or pad != self.model.config.pad_token_id
        self.tokenizer.truncation_side = "left"
        self.tokenizer.padding_side = "right"
        positions = getattr(self.model.config, "max_position_embeddings", None) or config.max_length
        self.longest = min(config.max_length, self.tokenizer.model_max_length, positions)
        self.budget = budget

    @torch.no_grad()
    def score(self, rows: Sequence[Row], keep: str) -> Scored:
        """Score rows; see Scorer."""
        texts = [self._text(row, response) for row in rows for response in row.responses]
        k = len(rows[0].responses) if rows else 1
        ids, cut = [], np.zeros(len(texts), bool)
        for i, text in enumerate(texts):
            full = self.tokenizer(text, verbose=False)["input_ids"]
            cut[i] = len(full) > self.longest
            ids.append(
                self.tokenizer(text, truncation=True, max_length=self.longest)["input_ids"]
                if cut[i]
                else full
            )
        scores = np.empty(len(texts))
        with tqdm(total=len(texts), desc="scoring", unit="text", disable=quiet()) as progress:
            for part in self._batches(np.array([len(x) for x in ids])):
                batch = self.tokenizer.pad(
                    {"input_ids": [ids[i] for i in part]}, return_tensors="pt"
                )
                logits = self.model(**batch.to(self.model.device)).logits  # [B, 1]
                scores[part] = logits[:, 0].double().cpu().numpy()
                progress.update(len(part))
        table = scores.reshape(-1, k)
        _check_finite(table, rows, self.name)
        tokens = [
            len(self.tokenizer(as_text(r), add_special_tokens=False)["input_ids"])
            for row in rows
            for r in row.responses
        ]
        same = np.array(
            [all(ids[i] == ids[j] for j in range(i, i + k)) for i in range(0, len(ids), k)], bool
        )
        return Scored(
            table,
            np.array(tokens, np.int64).reshape(-1, k),
            np.any(cut.reshape(-1, k), axis=1),
            same,
        )

    def _batches(self, lengths: np.ndarray) -> list[np.ndarray]:
        """Yield texts of similar length together, within the token budget."""
        batches: list[list[int]] = []
        for i in np.argsort(-lengths, kind="stable").tolist():
            if (
                batches
                and not self.alone
                and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= self.budget
            ):
                batches[-1].append(i)
            else:
                batches.append([i])
        return [np.array(part) for part in batches]

    def _text(self, row: Row, response: Any) -> str:
        """Return prompt and response as one text, without a BOS from the chat template, since the
        tokenizer adds one.
        """
        if isinstance(row.prompt, str):
            return row.prompt + as_text(response)
        named = self.config.chat_template
        template = template_text(named, f"--chat-template={named}", self.tokenizer) or own_template(
            self.tokenizer
        )
        turns = [*row.prompt, *response]
        try:
            text = str(
                self.tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False)
            )
        except Exception as error:  # jinja2's, and the template's own
            raise UserError(
                f"{row.source}: the chat template refuses this conversation:"
                f" {str(error).splitlines()[0]}"
            ) from None
        bos = self.tokenizer.bos_token
        return text.removeprefix(bos) if bos and automatic_bos(self.tokenizer) is not None else text


def as_text(response: Any) -> str:
    return (
        response if isinstance(response, str) else "\n".join(turn["content"] for turn in response)
    )


def _check_finite(scores: np.ndarray, rows: Sequence[Row], name: str) -> None:
    bad = ~np.isfinite(scores).all(1)
    if bad.any():
        raise UserError(
            f"{name}: {rows[int(bad.argmax())].source} is given {scores[bad][0].tolist()}; is the"
            " model damaged, or --dtype too imprecise?"
        )
