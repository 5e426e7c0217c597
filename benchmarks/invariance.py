"""Whether a row's outputs keep their bits however many rows it is among, whatever they hold, wherever it stands.

    python benchmarks/invariance.py [--trials N] [--write]

For a MiniLM and a random Llama, several lengths, three dtypes, one thread and two: a row is computed among a random
number of random rows, at every place, and its last hidden states are compared bit by bit with those of it by itself.
`--write` puts the table into docs/threat-model.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import BertModel, LlamaConfig, LlamaModel

from tables import insert, table
from workloads import ROOT, minilm

# Most rows, and tokens.
SHAPES = ((32, 4), (32, 8), (32, 16), (32, 24), (16, 40), (12, 64), (8, 96), (4, 160))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
THREADS = (1, 2)


def models() -> dict[str, BertModel | LlamaModel]:
    """Two architectures, in eval mode."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 2, "num_attention_heads": 12}
    return {
        "MiniLM": minilm("full").base.bert.eval(),
        "Llama": LlamaModel(LlamaConfig(vocab_size=1000, **sizes)).eval(),
    }


@torch.no_grad()
def states(model: BertModel | LlamaModel, ids: Tensor, mask: Tensor) -> Tensor:
    """Last hidden states: (b, l, h)."""
    return torch.as_tensor(model(input_ids=ids, attention_mask=mask).last_hidden_state)


def changed(model: BertModel | LlamaModel, shape: tuple[int, int], trials: int) -> Iterator[bool]:
    """For each place and trial, whether a bit of the row's states differs from those of the row by itself."""
    rows, length = shape
    generator = torch.Generator().manual_seed(rows * length)

    def draw(count: int) -> tuple[Tensor, Tensor]:
        ids = torch.randint(5, 1000, (count, length), generator=generator)
        sizes = torch.randint(1, length, (count, 1), generator=generator)
        return ids, (torch.arange(length) < sizes).long()

    for _ in range(trials):
        ids, mask = draw(1)
        own = mask[0].bool()
        wanted = states(model, ids, mask)[0][own]
        for place in range(rows):
            count = int(torch.randint(place + 1, rows + 1, (), generator=generator))
            others, masks = draw(count)
            others[place], masks[place] = ids[0], mask[0]
            yield not torch.equal(states(model, others, masks)[place][own], wanted)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    lines = []
    for name, model in models().items():
        for dtype in DTYPES:
            for threads in THREADS:
                torch.set_num_threads(threads)
                found = [bit for shape in SHAPES for bit in changed(model.to(dtype), shape, options.trials)]
                kind = str(dtype).removeprefix("torch.")
                lines.append([name, kind, str(threads), f"{len(found):,}", str(sum(found))])
                print(" ".join(lines[-1]), flush=True)
    if options.write:
        made = table(["model", "dtype", "threads", "rows compared", "of which a bit differs"], lines)
        insert(ROOT / "docs" / "threat-model.md", "invariance", made)


if __name__ == "__main__":
    main()
