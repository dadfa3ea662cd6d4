"""Records whose lengths are like MeCoVQA's, as drawn numbers and as real records: for ``train.py``.

An assumption, not a count of the published files: three in ten answers are sentences about a whole image (of median 80
tokens, one in twenty conversations of three rounds), the others are, in equal parts, a few words on a region and one
mask.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from model.data.sampling import ResumableSampler
from model.processing.tokens import TokenCounter

SAMPLE = Path(__file__).resolve().parents[2] / "data" / "sample"
OPENING = 45  # tokens of the template, by LLaMA's tokenizer
_KINDS = ("vqa", "region", "grounding")
_SHARES = (0.3, 0.35, 0.35)
_FILLER = " the liver"


def draw(count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Kind of each of so many records, tokens of its question and of its answer, and rounds; each int64 [N]."""
    kinds = rng.choice(3, count, p=_SHARES)
    sentences = rng.lognormal(np.log(80), 0.5, count).clip(15, 500)
    words = rng.lognormal(np.log(12), 0.6, count).clip(2, 80)
    answers = np.choose(kinds, [sentences, words, np.full(count, 12)]).astype(np.int64)
    rounds = np.where((kinds == 0) & (rng.random(count) < 0.05), 3, 1)
    return kinds, rng.integers(10, 40, count), answers, rounds


def count_padding(count: int, image: int, text_only: float, batch: int, ranks: int, grouped: bool) -> float:
    """Share of padding of one epoch, over all ranks; of the records a share has no image.

    Args:
        image: tokens of one.
        batch: records a rank and forward pass.
    """
    rng = np.random.default_rng(0)
    _, questions, answers, rounds = draw(count, rng)
    lengths = OPENING + (questions + answers) * rounds + image * (rng.random(count) >= text_only)
    sampler = ResumableSampler(lengths, seed=0, batch_size=batch, world_size=ranks, group_by_length=grouped)
    order = sampler.epoch_order(0)
    whole = len(order) // sampler.global_batch * sampler.global_batch
    rows = lengths[order[:whole]].reshape(-1, batch, ranks)  # ranks take the records of a global batch in turn
    return 1 - float(rows.sum()) / (float(rows.max(axis=1).sum()) * batch)


def write_records(folder: Path, count: int, tokenizer: Any) -> Path:
    """Such records on the pictures of ``data/sample``, their texts as long as drawn; the file that holds them."""
    rng = np.random.default_rng(0)
    sources = [json.loads((SAMPLE / f"{kind}.json").read_text(encoding="utf-8")) for kind in _KINDS]
    each = TokenCounter(tokenizer)(_FILLER * 64) / 64
    records = []
    for number, (kind, question, answer, rounds) in enumerate(zip(*draw(count, rng), strict=True)):
        source = sources[kind][int(rng.integers(len(sources[kind])))]
        record = {**source, "id": f"mix-{number}"}
        if kind < 2:
            asked = source["conversations"][0]["value"]
            first = {"from": "human", "value": f"{asked}{_FILLER * round(question / each / 2)}"}
            again = {"from": "human", "value": f"And{_FILLER * round(question / each)}?"}
            said = {"from": "gpt", "value": (_FILLER * max(1, round(answer / each))).strip()}
            record["conversations"] = [first, said, *[again, said] * (int(rounds) - 1)]
        records.append(record)
    path = folder / "mix.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    return path
