"""Convert a policy.pt to a Hugging Face folder, its adapter to one of peft's, or a model to a
policy.pt: `python export.py MODEL --out FOLDER`. See docs/export.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from plumb.errors import UserError
from plumb.paths import new_file
from plumb.settings.cli import Parser, run
from plumb.settings.schema import DTYPE_NAMES


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    p = Parser("Convert a policy.pt to a Hugging Face folder, or any model to a policy.pt.")
    p.add_argument(
        "model",
        metavar="MODEL",
        help="run, checkpoint or policy.pt; with --policy also a folder or hub name",
    )
    to = p.add_mutually_exclusive_group(required=True)
    to.add_argument("--out", type=Path, metavar="FOLDER", help="write a Hugging Face folder")
    to.add_argument(
        "--peft",
        type=Path,
        metavar="FOLDER",
        help="write the adapter of a run as a folder that peft reads",
    )
    to.add_argument(
        "--policy",
        type=Path,
        metavar="FILE.pt",
        help="write a policy.pt: {step_idx, state, metrics}",
    )
    p.add_argument(
        "--dtype", choices=sorted(DTYPE_NAMES), help="dtype of the weights (default: as stored)"
    )
    p.add_argument(
        "--max-shard-gb",
        type=float,
        help="with --out: maximum size of a safetensors file, in 1e9 bytes (default: 5)",
    )
    p.add_argument(
        "--base",
        help="base model of a policy.pt that has no config.yaml, or of a run whose base has moved",
    )
    p.add_argument("--tokenizer", help="with --out: tokenizer to use in place of the model's own")
    p.add_argument(
        "--chat-template",
        metavar="hh|NAME|FILE",
        help="with --out: template to write (default: the run's or the tokenizer's)",
    )
    p.add_argument("--overwrite", action="store_true", help="overwrite an existing export")
    p.add_argument(
        "--no-check",
        action="store_true",
        help="skip the comparison, which loads the model in float32 (with --out and --peft)",
    )
    return p


def main(options: argparse.Namespace) -> None:
    """Run the command."""
    if options.max_shard_gb is not None and not options.max_shard_gb > 0:
        raise UserError(f"--max-shard-gb {options.max_shard_gb:g}: must be above 0")
    for name in () if options.out else ("max_shard_gb", "chat_template", "tokenizer"):
        if getattr(options, name) is not None:
            raise UserError(f"--{name.replace('_', '-')}: is for --out; leave it out")
    if options.no_check and options.policy:
        raise UserError("--no-check: is for --out and --peft; leave it out")
    if options.dtype and options.peft:
        raise UserError("--dtype: is for --out and --policy; leave it out")

    import torch

    from plumb.models.export import export, stored_dtype
    from plumb.models.find import find_model, open_model
    from plumb.models.load import load_config
    from plumb.runs.policy_file import load_policy_state

    ref = find_model(options.model, options.base, options.tokenizer, options.dtype)
    if options.out:
        export(
            ref,
            options.out,
            dtype=options.dtype,
            max_shard_gb=options.max_shard_gb or 5.0,
            overwrite=options.overwrite,
            chat_template=options.chat_template,
            check=not options.no_check,
        )
        return
    if options.peft:
        from plumb.models.peft_folder import export_adapter

        export_adapter(ref, options.peft, overwrite=options.overwrite, check=not options.no_check)
        return
    if options.policy.exists() and not options.overwrite:
        raise UserError(
            f"--policy {options.policy}: already exists; give another name, or --overwrite"
        )
    if options.policy.suffix != ".pt":
        raise UserError(f"--policy {options.policy}: give it a name that ends in .pt")
    if options.dtype is None:
        stored = (
            stored_dtype(load_policy_state(str(ref.archive)))
            if ref.archive
            else load_config(ref.config).dtype
        )
        ref.config.model.policy_dtype = str(stored or torch.float32).removeprefix("torch.")
    model = open_model(ref, "cpu").model
    with new_file(options.policy, "--policy", "wb") as file:
        torch.save({"step_idx": 0, "state": model.state_dict(), "metrics": {}}, file)
    print(
        f"wrote {options.policy}: {type(model).__name__}, {model.num_parameters() / 1e6:,.1f} M"
        " parameters"
    )


if __name__ == "__main__":
    run(parser(), main)
