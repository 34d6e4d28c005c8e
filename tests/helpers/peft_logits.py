"""Run as a program, with PyTorch and PEFT: ``python tests/helpers/peft_logits.py BASE ADAPTER``.

Puts the adapter on the model and prints how far its logits for ``ADAPTER/ids.npy`` lie from
``ADAPTER/logits.npy``, before and after it is merged. It is a process of its own, since PyTorch and
the OpenBLAS that MLX uses do not share one.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


def main(base: str, folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        base, attn_implementation="eager", dtype=torch.float32
    )
    model = PeftModel.from_pretrained(model, folder).eval()
    ids, expected = torch.from_numpy(np.load(folder / "ids.npy")), np.load(folder / "logits.npy")
    found = []
    with torch.no_grad():
        for each in (model, model.merge_and_unload()):
            found.append(float(np.abs(each(ids).logits.numpy() - expected).max()))
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
