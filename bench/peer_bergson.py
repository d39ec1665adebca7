"""Times bergson on token lists; run by bench/gradients.py with the Python of the peers' own environment.

`python peer_bergson.py MODEL TOKENS.json DTYPE RUNS` prints a JSON line: seconds of every run, the first being a
warm-up that is left out.
"""

import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch
from bergson import GradientProcessor, IndexConfig, collect_gradients
from bergson.data import allocate_batches
from datasets import Dataset
from transformers import AutoModelForCausalLM

BATCH_TOKENS = 2048


def main() -> None:
    """Build bergson's index of 16 x 16 numbers per layer, several times."""
    folder, tokens, dtype, runs = sys.argv[1:]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    model.requires_grad_(False)
    model.get_input_embeddings().requires_grad_(True)
    ids = json.loads(Path(tokens).read_text(encoding="utf-8"))
    data = Dataset.from_dict({"input_ids": ids, "length": [len(i) for i in ids]})
    seconds = []
    for _ in range(int(runs) + 1):
        out = tempfile.mkdtemp()
        config = IndexConfig(
            run_path=f"{out}/index", token_batch_size=BATCH_TOKENS, projection_dim=16, loss_reduction="mean"
        )
        config.partial_run_path.mkdir(parents=True, exist_ok=True)
        batches = allocate_batches(data["length"][:], BATCH_TOKENS)
        start = time.perf_counter()
        collect_gradients(model, data, GradientProcessor(projection_dim=16), config, batches=batches)
        seconds.append(time.perf_counter() - start)
        shutil.rmtree(out)
    print(json.dumps(seconds[1:]))


if __name__ == "__main__":
    main()
