"""Peak memory of one training step by batch and piece: `python step_memory.py 4096:32 32:32 ...`, a line of JSON each.

Each case runs in a process of its own. `growth_mb` is what the step took beyond the model, its gradients, the batch
(which stays in main memory) and everything imported: activations and embeddings. Towers of 2 layers, 128 wide, images
of 64 pixels, so that a case takes a minute at most.
"""

import json
import resource
import subprocess
import sys

import torch
from transformers import BertConfig, CLIPVisionConfig

from mmkd.training.gradient_cache import cached_backward
from mmkd.training.objectives import ContrastiveObjective, ObjectiveWrapper
from modeling_mmkd import MMKDClipConfig, MMKDClipModel

SIZES = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 512}


class Nothing:
    def __enter__(self): ...

    def __exit__(self, *error): ...


def peak_mb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(batch_size, piece):
    torch.manual_seed(0)
    vision = CLIPVisionConfig(image_size=64, patch_size=16, **SIZES)
    text = BertConfig(vocab_size=1000, max_position_embeddings=64, **SIZES)
    objective = ContrastiveObjective(
        MMKDClipModel(MMKDClipConfig(vision_config=vision, text_config=text, projection_dim=512))
    ).train()
    trained = ObjectiveWrapper(objective, "cpu", "fp32")
    batch = {
        "pixel_values": torch.rand(batch_size, 3, 64, 64),
        "input_ids": torch.randint(5, 1000, (batch_size, 32)),
        "attention_mask": torch.ones(batch_size, 32, dtype=torch.long),
        "ids": [str(k) for k in range(batch_size)],
    }
    for parameter in objective.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = peak_mb()
    if piece < batch_size:
        cached_backward(
            trained,
            batch,
            piece,
            to_device=lambda b: b,
            backward=lambda x: x.backward(),
            without_sync=Nothing,
            seed=(0,),
        )
    else:
        trained(ObjectiveWrapper.loss_of_batch, batch)["loss"].backward()
    return {"batch": batch_size, "micro_batch": piece, "growth_mb": round(peak_mb() - before)}


if __name__ == "__main__":
    for case in sys.argv[1:]:
        if len(sys.argv) == 2:
            print(json.dumps(measure(*map(int, case.split(":")))))
        else:
            subprocess.run([sys.executable, __file__, case], check=True)
