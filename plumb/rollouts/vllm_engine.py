"""Sample with vLLM, in the process that trains, on the same GPU.

Written for the documented interface of vLLM 0.10.2, and tested with a stand-in only: it has never
run with vLLM. A wrong weight shows in rollout_train/logps_difference. Unlike PolicyEngine's, draws
may depend on which responses are sampled at the same time, as vLLM's rounding does.
"""

from __future__ import annotations

import copy
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from plumb.data.prompts import NumberedPrompt
from plumb.errors import UserError
from plumb.models.adapters import merged_weights
from plumb.rollouts.decoding import Decoding
from plumb.rollouts.engine import NOT_FINITE, Response, Samples, check_lengths, check_untruncated


@dataclass
class VllmModel:
    """Hold vLLM's own copy of the policy. Several engines may share it."""

    dtype: torch.dtype
    longest: int  # tokens of a prompt and its response
    batch_size: int  # responses that run at the same time
    memory: float  # the share of the GPU's memory that it takes
    llm: Any = None  # started when needed

    @torch.no_grad()
    def update(self, policy: Any) -> None:
        """Take over the weights that the policy has now, its adapters merged into them. Raise
        UserError where vLLM raises.
        """
        try:
            self.llm = self.llm or self._started(policy)
            self.llm.apply_model(lambda model: model.load_weights(merged_weights(policy)))
            self.llm.reset_prefix_cache()  # its keys and values are of other weights
        except Exception as error:
            why, _, _ = f"{type(error).__name__}: {error}".partition("\n")
            raise UserError(f"rollout.engine=vllm: {why}; set rollout.engine=policy") from error

    def _started(self, policy: Any) -> Any:
        """Return an LLM of the policy's architecture, without its weights."""
        # otherwise it would be a process of its own, which these weights do not reach
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm import LLM

        config = copy.deepcopy(policy.config)
        config.architectures = [type(policy).__name__]
        with tempfile.TemporaryDirectory() as folder:
            config.save_pretrained(folder)
            return LLM(
                model=folder,
                load_format="dummy",
                skip_tokenizer_init=True,
                generation_config="vllm",
                dtype=str(self.dtype).removeprefix("torch."),
                max_model_len=self.longest,
                max_num_seqs=self.batch_size,
                gpu_memory_utilization=self.memory,
                logprobs_mode="processed_logprobs",  # at the temperature of sampling
            )


@dataclass
class VllmEngine:
    """Sample from vLLM's copy of the policy."""

    decoding: Decoding
    ends: Sequence[int]  # the tokens that end a response
    model: VllmModel

    def __post_init__(self) -> None:
        check_untruncated(self.decoding)

    def load(self, policy: Any) -> None:
        """Hand the policy's weights over to vLLM."""
        self.model.update(policy)

    def sample(self, prompts: Sequence[NumberedPrompt], n: int, seed: Sequence[int]) -> Samples:
        """Return n responses to each prompt; see engine.Engine, and the note on draws above."""
        start = time.perf_counter()
        check_lengths(prompts, int(self.decoding.max_new_tokens or 0), self.model.longest)
        each = [(prompt, [*seed, prompt.number, i]) for prompt in prompts for i in range(n)]
        inputs = [{"prompt_token_ids": np.asarray(prompt.ids).tolist()} for prompt, _ in each]
        params = [self._params(key) for _, key in each]
        outputs = self.model.llm.generate(inputs, params, use_tqdm=False)
        flat = [_response(output.outputs[0]) for output in outputs]
        secs = time.perf_counter() - start
        return Samples([flat[i : i + n] for i in range(0, len(flat), n)], secs)

    def _params(self, key: Sequence[int]) -> Any:
        """Return the sampling parameters of one response."""
        from vllm import SamplingParams

        return SamplingParams(
            temperature=self.decoding.temperature,
            top_p=1.0,
            top_k=-1,
            max_tokens=self.decoding.max_new_tokens,
            seed=int(np.random.SeedSequence(key).generate_state(1)[0]),
            stop_token_ids=[*self.ends],
            logprobs=0,  # of the drawn token only
            detokenize=False,
        )


def _response(output: Any) -> Response:
    ids = np.array(output.token_ids, np.int64)
    logps = np.array([at[y].logprob for y, at in zip(ids.tolist(), output.logprobs, strict=True)])
    if not np.isfinite(logps).all():
        raise UserError(NOT_FINITE)
    return Response(ids, logps, "eos" if output.finish_reason == "stop" else "length")
