"""Make tokenizers of every kind, and load those that are available, for properties that hold for
all of them.
"""

import gzip
import json
from functools import cache
from pathlib import Path

from golden import GOLDEN
from tiny import tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared"
BYTES = [f"<0x{i:02X}>" for i in range(256)]
PIECES = [
    "▁",
    "▁H",
    "He",
    "ll",
    "llo",
    "▁He",
    "▁Hello",
    "Hello",
    "▁Li",
    "Li",
    "ly",
    "Lily",
    "▁Lily",
    "\n",
    "▁▁",
    "it",
    "▁it",
]
METASPACE = [
    decoders.Replace("▁", " "),
    decoders.ByteFallback(),
    decoders.Fuse(),
    decoders.Strip(" ", 1, 0),
]


def wrapped(backend: Tokenizer, bos: bool) -> PreTrainedTokenizerFast:
    """Return a tokenizer with <s>, </s>, <unk> and another special token; `bos`: it adds <s>
    itself.
    """
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.add_special_tokens({"additional_special_tokens": ["<|assistant|>"]})
    if bos:
        number = fast.convert_tokens_to_ids("<s>")
        fast._tokenizer.post_processor = processors.TemplateProcessing(
            "<s> $A", special_tokens=[("<s>", number)]
        )
    fast.pad_token = "<unk>"
    return fast


def sentencepiece(manner: str, bos: bool = True) -> PreTrainedTokenizerFast:
    """Return a BPE with byte fallback, like Llama's. `manner` of adding a space before a text:
    "first" and "always" (Metaspace), "legacy" (a normalizer's), "never".
    """
    letters = sorted(
        {c for piece in PIECES for c in piece if c != "\n"} | set("abcdefghijklmnopqrstuvwxyz.:?!")
    )
    names = [
        "<unk>",
        "<s>",
        "</s>",
        *BYTES,
        *dict.fromkeys([*letters, *(p for p in PIECES if p != "\n")]),
    ]
    vocab = {name: i for i, name in enumerate(names)}
    merges = [
        (p[:i], p[i:])
        for p in PIECES
        for i in range(1, len(p))
        if p[:i] in vocab and p[i:] in vocab
    ]
    backend = Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    if manner == "legacy":
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", manner, split=False)
    backend.decoder = decoders.Sequence(METASPACE[: 3 if manner == "never" else 4])
    return wrapped(backend, bos)


def unigram(collapse: bool) -> PreTrainedTokenizerFast:
    """Return a Unigram tokenizer; with `collapse` like T5's: runs of white space, including
    newlines, are one space, and none ends a text.
    """
    letters = sorted({*"abcdefghijklmnopqrstuvwxyzHL.:?!▁"} | ({"\n"} if not collapse else set()))
    pieces = [(p, -2.0 - 0.1 * i) for i, p in enumerate(PIECES) if len(p) > 1] + [
        (c, -6.0) for c in letters
    ]
    vocab = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0)]
    vocab += [] if collapse else [(b, -9.0) for b in BYTES]
    backend = Tokenizer(models.Unigram([*vocab, *pieces], 0, not collapse))
    metaspace = pre_tokenizers.Metaspace("▁", "always", split=collapse)
    split = [pre_tokenizers.WhitespaceSplit()] if collapse else []
    backend.pre_tokenizer = pre_tokenizers.Sequence([*split, metaspace])
    backend.decoder = (
        decoders.Metaspace("▁", "always") if collapse else decoders.Sequence(METASPACE)
    )
    return wrapped(backend, bos=False)


def prefixed() -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer that puts a space before every text (add_prefix_space)."""
    fast = tiny_tokenizer()
    fast.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return fast


def lower_case() -> PreTrainedTokenizerFast:
    fast = sentencepiece("first")
    fast.backend_tokenizer.normalizer = normalizers.Lowercase()
    return fast


MADE = {
    "bytes": tiny_tokenizer,
    "bytes, BOS": lambda: tiny_tokenizer(bos=True),
    "first": lambda: sentencepiece("first"),
    "first, no BOS": lambda: sentencepiece("first", bos=False),
    "always": lambda: sentencepiece("always"),
    "legacy": lambda: sentencepiece("legacy"),
    "never": lambda: sentencepiece("never"),
    "unigram": lambda: unigram(collapse=False),
}


def gpt2() -> PreTrainedTokenizerFast:
    """Return GPT-2's tokenizer from its first files: encoder.json and vocab.bpe."""
    folder = SHARED / "tokenizers/gpt2"
    vocab = json.loads(gzip.decompress((folder / "encoder.json.gz").read_bytes()))
    lines = gzip.decompress((folder / "vocab.bpe.gz").read_bytes()).decode("utf-8").splitlines()[1:]
    backend = Tokenizer(models.BPE(vocab, [tuple(line.split()) for line in lines if line]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    )


def neox() -> PreTrainedTokenizerFast:
    raw = gzip.decompress((SHARED / "tokenizers/gpt-neox-20b/20B_tokenizer.json.gz").read_bytes())
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(raw.decode()), eos_token="<|endoftext|>"
    )


FILES = {
    "demo": (
        ROOT / "demo/tokenizer",
        lambda: AutoTokenizer.from_pretrained(ROOT / "demo/tokenizer"),
    ),
    "stories260K": (
        SHARED / "models/stories260K",
        lambda: AutoTokenizer.from_pretrained(SHARED / "models/stories260K"),
    ),
    "tiny-llama": (
        GOLDEN / "tiny-llama",
        lambda: AutoTokenizer.from_pretrained(GOLDEN / "tiny-llama"),
    ),
    "gpt2": (SHARED / "tokenizers/gpt2", gpt2),
    "gpt-neox-20b": (SHARED / "tokenizers/gpt-neox-20b", neox),
}
HERE = [*MADE, *(name for name, (path, _) in FILES.items() if path.exists())]


@cache
def tokenizer(name: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer of MADE or FILES."""
    return MADE[name]() if name in MADE else FILES[name][1]()
