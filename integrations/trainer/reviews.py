"""The rated texts of Hutto and Gilbert (ICWSM 2014), read from vaderSentiment's source distribution."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
from datasets import Dataset

_OUTER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
# A set's name on the command line, and in the archive.
SETS = {
    "movies": "movieReviewSnippets",
    "tweets": "tweets",
    "amazon": "amazonReviewSnippets",
    "nyt": "nytEditorialSnippets",
}


def rated_texts(archive: Path, name: str) -> list[tuple[float, str]]:
    """(mean human rating from −4 to 4, text) of each snippet.

    Args:
        archive: vaderSentiment-3.3.2.tar.gz.
        name: one of `SETS`.
    """
    with tarfile.open(archive) as outer:
        inner = outer.extractfile(_OUTER)
        assert inner is not None
        with tarfile.open(fileobj=io.BytesIO(inner.read())) as tar:
            member = tar.extractfile(f"hutto_ICWSM_2014/{SETS[name]}_GroundTruth.txt")
            assert member is not None
            lines = member.read().decode("utf-8", errors="replace").splitlines()
    rows = [line.split("\t", 2) for line in lines if line.count("\t") >= 2]
    return [(float(rating), text.strip()) for _, rating, text in rows]


def rated_as_labels(archive: Path, name: str = "movies", held_out: int = 1000) -> tuple[Dataset, Dataset]:
    """Texts with |rating| ≥ 0.3, labelled by its sign: (training, held-out).

    The held-out ones are the first of NumPy's permutation with seed 0.
    """
    rows = [(rating, text) for rating, text in rated_texts(archive, name) if abs(rating) >= 0.3]
    data = Dataset.from_dict({"text": [text for _, text in rows], "labels": [int(r > 0) for r, _ in rows]})
    order = np.random.RandomState(0).permutation(len(data))
    return data.select(order[held_out:]), data.select(order[:held_out])


def public_texts(archive: Path, private: str = "movies", number: int = 4000) -> list[str]:
    """Texts of the sets that are not `private`, without their ratings."""
    texts = [text for name in SETS if name != private for _, text in rated_texts(archive, name)]
    return [texts[i] for i in np.random.RandomState(0).permutation(len(texts))[:number]]
