"""The demo's script on one process and on two: ranks end bit-identical, and agree with the single process.

    python tests/processes/demo_processes.py --reviews .cache/vaderSentiment-3.3.2.tar.gz

Runs are deterministic, so that they share batches, directions and noise; only the shapes of the micro-batches differ.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

DEMO = Path(__file__).parents[2] / "integrations" / "trainer"
LOGICAL_BATCH = 1024
TOLERANCE = 1e-4
_RANK_FOLDER = "DEMO_PROCESSES_FOLDER"


def run_demo() -> None:
    """The demo's main, leaving what this rank trained in the folder that the environment names."""
    sys.path.insert(0, str(DEMO))
    import movie_reviews
    from safetensors.torch import save_file

    class LeavesItsResult(movie_reviews.DPZeroTrainer):  # type: ignore[misc]
        def train(self, *args: Any, **kwargs: Any) -> Any:
            def trained() -> dict[str, Any]:
                return {name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad}

            rank, folder = self.args.process_index, Path(os.environ[_RANK_FOLDER])
            save_file(trained(), folder / f"start-{rank}.safetensors")
            output = super().train(*args, **kwargs)
            save_file(trained(), folder / f"end-{rank}.safetensors")
            return output

    movie_reviews.DPZeroTrainer = LeavesItsResult
    movie_reviews.main()


def launch(processes: int, folder: Path, reviews: Path, steps: int) -> None:
    """Runs the demo under `accelerate launch`, or plainly on one process."""
    folder.mkdir()
    launcher = [
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--main_process_port=0",
        f"--num_processes={processes}",
    ]
    command = [sys.executable, *(launcher if processes > 1 else []), __file__]
    command += ["--reviews", str(reviews), "--output", str(folder / "out"), "--steps", str(steps)]
    command += ["--micro-batch", str(LOGICAL_BATCH // processes), "--deterministic"]
    environment = os.environ | {_RANK_FOLDER: str(folder), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=environment, check=True)


def compare() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reviews", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()

    from safetensors.torch import load_file

    with TemporaryDirectory() as temporary:
        one, two = Path(temporary, "one"), Path(temporary, "two")
        for processes, folder in ((1, one), (2, two)):
            launch(processes, folder, options.reviews, options.steps)
        start, alone = (load_file(one / f"{name}-0.safetensors") for name in ("start", "end"))
        first, second = (load_file(two / f"end-{rank}.safetensors") for rank in (0, 1))
    identical = all(first[name].equal(second[name]) for name in first)
    moved = max(float((alone[name] - start[name]).abs().max()) for name in alone)
    apart = max(float((alone[name] - first[name]).abs().max()) for name in alone)
    print(f"ranks bit-identical: {identical}")
    print(f"training moved the adapter by up to {moved:.3g}; one and two processes differ by up to {apart:.3g}")
    if not identical or not apart < TOLERANCE * moved:
        sys.exit("The processes do not agree.")


if __name__ == "__main__":
    run_demo() if _RANK_FOLDER in os.environ else compare()
