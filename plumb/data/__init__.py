"""Data: rows of text in, examples of token ids out.

Files and named sets -> rows -> prompts, responses and pairs -> token ids on disk -> examples.
Models, losses and microbatches do not belong here; what reads text imports no torch.
"""

from plumb.data import deepspeed_chat  # noqa: F401  registers its sets
