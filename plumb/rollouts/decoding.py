"""Describe how answers are decoded: the modes, their options, and the command-line flags.

Imports neither torch nor transformers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from plumb.errors import UserError

# The options of each mode besides n, max_new_tokens and stop, with their defaults. Sampling leaves
# out the unlikely tokens, which small models give too much probability (arXiv:1904.09751).
DRAW: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sample": {"temperature": 0.7, "top_k": 0, "top_p": 0.9},
    "beam": {"num_beams": 4},
    "beam-sample": {"num_beams": 4} | DRAW,
    "diverse-beam": {"num_beams": 4, "num_beam_groups": 4, "diversity_penalty": 1.0},
    "contrastive": {"top_k": 4, "penalty_alpha": 0.6},
}


@dataclass(frozen=True)
class Decoding:
    """Describe how answers are generated. Options that a mode does not use are None; otherwise None
    means the model's generation config.
    """

    mode: str
    n: int = 1  # answers per prompt
    max_new_tokens: int | None = None
    stop: tuple[str, ...] = ()  # strings that end an answer; they are not part of it
    temperature: float | None = None
    top_k: int | None = (
        None  # draw from the k most probable tokens, 0: all; contrastive: candidates
    )
    top_p: float | None = None
    num_beams: int | None = None
    num_beam_groups: int | None = None
    diversity_penalty: float | None = (
        None  # nats for each beam of an earlier group with the same token at the same place
    )
    penalty_alpha: float | None = None  # share of the degeneration penalty

    def checked(self) -> Decoding:
        """Return the options with the mode's defaults. Raise UserError for options the mode would
        ignore, and for conflicting ones.
        """
        defaults, values = MODES[self.mode], {k: v for k, v in vars(self).items() if v is not None}
        every = {name for of_mode in MODES.values() for name in of_mode}
        for name in sorted(values.keys() & every - defaults.keys()):
            modes = ", ".join(mode for mode, of_mode in MODES.items() if name in of_mode)
            raise UserError(
                f"{flag(name)} {values[name]}: mode {self.mode} would ignore it; leave it out, or"
                f" use --mode {modes}"
            )
        decoding = replace(self, **(defaults | values))
        most = decoding.num_beams or (1 if decoding.mode in ("greedy", "contrastive") else None)
        if most is not None and decoding.n > most:
            what = f"{most} beams" if decoding.num_beams else "this mode"
            raise UserError(
                f"--n {decoding.n}: {what} give{'' if decoding.num_beams else 's'} {most} at most;"
                " ask for fewer, or use more beams or --mode sample"
            )
        if (
            decoding.num_beam_groups
            and decoding.num_beams
            and decoding.num_beams % decoding.num_beam_groups
        ):
            raise UserError(
                f"--num-beam-groups {decoding.num_beam_groups}: must divide --num-beams"
                f" {decoding.num_beams}"
            )
        return decoding

    def arguments(self) -> dict[str, Any]:
        """Return the options as arguments of transformers' `generate`."""
        drawn = self.mode in ("sample", "beam-sample")
        options: dict[str, Any] = {"num_beams": self.num_beams}
        options |= (
            {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
            if drawn
            else {}
        )
        return {"do_sample": drawn, "num_return_sequences": self.n} | {
            k: v for k, v in options.items() if v is not None
        }


def flag(name: str) -> str:
    """Return the command-line option that sets this field."""
    return f"--{name.replace('_', '-')}"
