"""Text for a language model: read, split, tokenized, cached, and cut into batches."""

import gzip
import hashlib
import lzma
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
import torch
from torch import Tensor

from shared import replacing

EMBEDDED = Path(__file__).parent / "data" / "embedded.txt.xz"

BLOCK = 4096  # characters, or fewer where a text has no 25 such blocks
HELD_OUT_EVERY = 25  # blocks
SHORTEST = 10_000  # characters


class CorpusError(ValueError):
    """The text cannot be used; the message says why."""


# ---------------------------------------------------------------------------------------------------- text


def read_text(paths: list[Path]) -> tuple[str, list[Path]]:
    """The text of files, and of all files below folders, there in the order of their names.

    Files ending in .xz and .gz are decompressed; hidden files and folders are passed over.

    Returns:
        The text, and the files in folders that were left out because they do not hold UTF-8 text.

    Raises:
        CorpusError: if there is no such path, a file among the paths is no text, or there is no text at all.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            below = (f for f in path.rglob("*") if f.is_file())
            files += sorted(f for f in below if not any(s.startswith(".") for s in f.relative_to(path).parts))
        elif path.is_file():
            files.append(path)
        else:
            raise CorpusError(f"{path}: no such file or folder")
    texts, skipped = [], []
    for file in files:
        try:
            texts.append(_read_file(file))
        except (UnicodeDecodeError, lzma.LZMAError, gzip.BadGzipFile, EOFError) as error:
            if file in paths:
                raise CorpusError(
                    f"{file}: not UTF-8 text ({error}); other encodings are converted by, say, iconv -t UTF-8"
                ) from error
            skipped.append(file)
    text = "\n".join(texts)
    if not text.strip():
        where = " ".join(map(str, paths))
        raise CorpusError(f"{where}: holds no UTF-8 text ({len(files)} files, {len(skipped)} of them not UTF-8)")
    return text, skipped


def _read_file(file: Path) -> str:
    raw = file.read_bytes()
    if file.suffix == ".xz":
        raw = lzma.decompress(raw)
    elif file.suffix == ".gz":
        raw = gzip.decompress(raw)
    if b"\0" in raw:
        raise UnicodeDecodeError("utf-8", raw, raw.index(b"\0"), raw.index(b"\0") + 1, "a zero byte: not text")
    return raw.decode("utf-8-sig")


def split_text(text: str) -> tuple[str, str]:
    """Training and held-out text: every 25th block of 4096 characters, or of fewer of a short text, is held out.

    Spread blocks, since a corpus is often a concatenation of unlike sources, of which a tail would show only the last.

    Raises:
        CorpusError: if the text is too short to hold anything out.
    """
    if len(text) < SHORTEST:
        raise CorpusError(f"too little text: {len(text):,} characters, and at least {SHORTEST:,} are needed")
    block = min(BLOCK, len(text) // HELD_OUT_EVERY)
    blocks = [text[i : i + block] for i in range(0, len(text), block)]
    middle = HELD_OUT_EVERY // 2
    held_out = blocks[middle::HELD_OUT_EVERY]
    del blocks[middle::HELD_OUT_EVERY]
    return "".join(blocks), "".join(held_out)


# ---------------------------------------------------------------------------------------------------- tokens


@dataclass(frozen=True)
class Corpus:
    """Token ids of a text, with what it takes to judge a model of it.

    Attributes:
        train: ids of the training text.
        valid: ids of the held-out text.
        vocab: number of different ids.
        valid_bytes: UTF-8 bytes of the held-out text that a model predicts, which is all but its first token.
        trigram_bpb: bits per byte that a byte trigram of the training text needs for the held-out text.
        digest: identifies text and tokenizer.
    """

    train: Tensor
    valid: Tensor
    vocab: int
    valid_bytes: int
    trigram_bpb: float
    digest: str

    @property
    def bytes_per_token(self) -> float:
        """On held-out text."""
        return self.valid_bytes / (len(self.valid) - 1)


def load_corpus(paths: list[Path], vocab: int, cache: Path) -> tuple[Corpus, list[Path]]:
    """Reads a text and tokenizes it, or takes its tokens from the cache.

    Args:
        paths: files and folders.
        vocab: size of the byte-level BPE that is trained on the training text; 0 stands for plain bytes.
        cache: folder, made if it is missing.

    Returns:
        The corpus, and the files in folders that were left out because they do not hold UTF-8 text.

    Raises:
        CorpusError: as `read_text` and `split_text`, and for a vocabulary smaller than the 256 bytes.
    """
    if vocab != 0 and vocab <= 256:
        raise CorpusError(f"a byte-level vocabulary holds more than 256 entries, or 0 for plain bytes, got {vocab}")
    text, skipped = read_text(paths)
    key = f"{vocab}\n{BLOCK}\n{HELD_OUT_EVERY}\n{tokenizers.__version__}\n{text}"
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    file = cache / f"corpus-{digest}.npz"
    if not file.exists():
        arrays = _tokenize(*split_text(text), vocab)
        with replacing(file) as stream:
            np.savez_compressed(stream, **arrays)
    with np.load(file) as arrays:
        corpus = Corpus(
            train=torch.from_numpy(arrays["train"].astype(np.int32)),
            valid=torch.from_numpy(arrays["valid"].astype(np.int32)),
            vocab=int(arrays["vocab"]),
            valid_bytes=int(arrays["valid_bytes"]),
            trigram_bpb=float(arrays["trigram_bpb"]),
            digest=digest,
        )
    return corpus, skipped


def _tokenize(train: str, valid: str, vocab: int) -> dict[str, np.ndarray]:
    raw_train, raw_valid = train.encode(), valid.encode()
    if vocab == 0:
        size, first = 256, 1
        ids = [np.frombuffer(raw, np.uint8) for raw in (raw_train, raw_valid)]
    else:
        tokenizer = train_tokenizer(train, vocab)
        size = tokenizer.get_vocab_size()
        ids = [_encode(tokenizer, part) for part in (train, valid)]
        first = len(tokenizer.id_to_token(int(ids[1][0])))  # byte-level BPE writes one character for a byte
    return {
        "train": ids[0],
        "valid": ids[1],
        "vocab": np.array(size),
        "valid_bytes": np.array(len(raw_valid) - first),
        "trigram_bpb": np.array(trigram_bits_per_byte(raw_train, raw_valid)),
    }


def train_tokenizer(text: str, vocab: int) -> tokenizers.Tokenizer:
    """A byte-level BPE: any text can be written in it, and it depends on nothing but the text."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=vocab, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return tokenizer


def _encode(tokenizer: tokenizers.Tokenizer, text: str) -> np.ndarray:
    encodings = tokenizer.encode_batch_fast(text.splitlines(keepends=True))
    return np.concatenate([np.array(e.ids, np.int32) for e in encodings])


# ---------------------------------------------------------------------------------------------------- batches


class Batches:
    """Batches of a training text, as a pure function of seed and step.

    Each epoch cuts the text into windows at an offset of its own, and goes through them in an order of its own.
    """

    def __init__(self, tokens: Tensor, seq: int, batch: int, seed: int) -> None:
        self.tokens, self.seq, self.batch, self.seed = tokens, seq, batch, seed
        self.windows = (len(tokens) - 1) // seq - 1  # one less than fit: room for the offset
        if self.windows < 1:
            raise CorpusError(f"too little text: {len(tokens):,} tokens for sequences of {seq}")
        self._epoch = (-1, torch.empty(0))

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets (batch, seq) of a step, counted from 0."""
        places = range(step * self.batch, (step + 1) * self.batch)
        starts = torch.stack([self._starts(place // self.windows)[place % self.windows] for place in places])
        windows = self.tokens[starts[:, None] + torch.arange(self.seq + 1)].long()
        return windows[:, :-1], windows[:, 1:]

    def _starts(self, epoch: int) -> Tensor:
        if self._epoch[0] != epoch:
            rng = np.random.default_rng((self.seed, epoch))
            offset = rng.integers(self.seq)
            self._epoch = (epoch, torch.from_numpy(rng.permutation(self.windows) * self.seq + offset))
        return self._epoch[1]


# ---------------------------------------------------------------------------------------------------- yardstick


def trigram_bits_per_byte(train: bytes, valid: bytes) -> float:
    """Bits per byte of a byte trigram, by interpolated Kneser-Ney smoothing."""
    ids = [np.frombuffer(raw, np.uint8) for raw in (train, valid)]
    return ngram_nats(*ids, vocab=256, order=3).mean() / math.log(2)


def ngram_nats(train: np.ndarray, valid: np.ndarray, vocab: int, order: int) -> np.ndarray:
    """-log p of every symbol of `valid` after the first `order - 1`, given those before it.

    From uniform upwards, each order takes a constant off every count it has seen and gives what it saves to the order
    below. Below the highest order a count is the number of different symbols that were seen in front.
    """
    p = np.full(len(valid) - order + 1, 1 / vocab)
    for n in range(1, order + 1):
        if n < order:
            grams, count = np.unique(np.unique(_grams(train, n + 1, vocab)) % vocab**n, return_counts=True)
        else:
            grams, count = np.unique(_grams(train, n, vocab), return_counts=True)
        once, twice = (count == 1).sum(), (count == 2).sum()
        discount = once / (once + 2 * twice) if once else 0.0
        contexts, of_context = np.unique(grams // vocab, return_inverse=True)
        total, kinds = np.bincount(of_context, count), np.bincount(of_context)

        wanted = _grams(valid, n, vocab)[order - n :]
        seen = _look_up(grams, count, wanted)
        total, kinds = (_look_up(contexts, values, wanted // vocab) for values in (total, kinds))
        higher = (np.maximum(seen - discount, 0) + discount * kinds * p) / np.maximum(total, 1)
        p = np.where(total > 0, higher, p)
    return -np.log(p)


def _grams(ids: np.ndarray, n: int, vocab: int) -> np.ndarray:
    """Each run of n symbols as one number."""
    number = np.zeros(len(ids) - n + 1, np.int64)
    for i in range(n):
        number = number * vocab + ids[i : len(ids) - n + 1 + i]
    return number


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The values of the wanted keys, 0 for those that are not among the sorted keys."""
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0)
