"""Random checkpoints in the authors' form, made by open_clip's modules: a reference that shares no code with ours."""

import torch
from transformers import BertConfig, BertTokenizer

TINY = {
    "vision": {"image_size": 32, "patch_size": 8, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3},
    "text": {
        "vocab_size": 70,
        "hidden_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 72,
        "max_position_embeddings": 48,
    },
    "projection_dim": 20,
}
HEADS_OF_64 = {
    "vision": {"image_size": 64, "patch_size": 16, "hidden_size": 128, "num_hidden_layers": 1},
    "text": {**TINY["text"], "hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 100},
    "projection_dim": 24,
}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz", "ct", "of", "the", "lung", "mri"]


def reference(sizes, seed):
    """open_clip's model with these sizes; every weight random, scales and biases too."""
    from open_clip.hf_model import HFTextEncoder
    from open_clip.model import QuickGELU
    from open_clip.transformer import VisionTransformer

    vision, dim = sizes["vision"], sizes["projection_dim"]
    width = vision["hidden_size"]
    model = torch.nn.Module()
    model.visual = VisionTransformer(
        image_size=vision["image_size"],
        patch_size=vision["patch_size"],
        width=width,
        layers=vision["num_hidden_layers"],
        heads=vision.get("num_attention_heads", width // 64),
        mlp_ratio=4,
        output_dim=dim,
        act_layer=QuickGELU,
    )
    model.text_encoder = HFTextEncoder(
        "unused",
        dim,
        config=BertConfig(**sizes["text"]),
        pooler_type="cls_last_hidden_state_pooler",
        proj_type="mlp",
        pretrained=False,
    )
    model.text_encoder.transformer.pooler = None
    model.logit_scale = torch.nn.Parameter(torch.tensor(2.5))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=generator) * 0.15
            value.copy_(noise + 1 if is_scale(name) else noise)
    return model.eval()


def is_scale(name):
    return name == "logit_scale" or (name.endswith("weight") and ("ln_" in name or "LayerNorm" in name))


def state_of(model, prefix=""):
    return {prefix + key: value.detach().clone() for key, value in model.state_dict().items()}


def save_checkpoint(path, model, prefix="module.", envelope=True):
    state = state_of(model, prefix)
    torch.save({"epoch": 3, "name": "b16_kd", "state_dict": state} if envelope else state, path)
    return path


def inputs(sizes, seed=0, count=5):
    generator = torch.Generator().manual_seed(seed)
    side, vocabulary = sizes["vision"]["image_size"], sizes["text"]["vocab_size"]
    pixels = torch.randn((count, 3, side, side), generator=generator)
    ids = torch.randint(1, vocabulary, (count, 16), generator=generator)
    for row in range(count):
        ids[row, 8 + row :] = 0
    return pixels, ids


def tokenizer(rows, **options):
    """A BERT tokenizer with as many words as a word embedding has rows."""
    words = [*WORDS, *(f"##{number}" for number in range(rows - len(WORDS)))]
    return BertTokenizer(vocab={word: number for number, word in enumerate(words)}, **options)
