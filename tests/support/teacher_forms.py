"""Random weights in each teacher's published form: the same file names, keys and configuration files, tiny widths."""

import json
from pathlib import Path

import torch

WORDS = ["lung", "brain", "of", "the", "mri", "ct", "a", "normal", "with", "##s", "b", "c", ",", "."]
BERT_VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
ODD_TEXTS = [
    "Radiografía de tórax: ¿neumonía?",
    "胸部X线片显示右下肺叶实变",
    "chest 🫁🩻 x-ray 👩🏽‍⚕️",
    "a\0b\0",
    "\x01\x1b[31m\ufeff\u202e",
    "",
    " \n\t ",
    "lung " * 3000,
    "x" * 9000,
]
TEXTS = ["lung", "normal mri of the brain with lungs , a b c .", "ct"]


def write_bert(folder: Path, width: int = 16, layers: int = 2, heads: int = 2) -> dict:
    """A BERT repository without weights: configuration and tokenizer. Returns the configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "model_type": "bert",
        "vocab_size": len(BERT_VOCABULARY),
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 2 * width,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "vocab.txt").write_text("\n".join(BERT_VOCABULARY) + "\n")
    tokenizer = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 512}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return config


def randomized(module: torch.nn.Module) -> torch.nn.Module:
    """Every floating tensor away from zero and one, so that no weight can be left out unseen."""
    with torch.no_grad():
        for key, value in module.state_dict().items():
            if value.is_floating_point():
                value.copy_(torch.rand_like(value) + 0.5 if "running_var" in key else torch.randn_like(value) * 0.3)
    return module.eval()


def check_odd_texts(encoder) -> None:
    """Texts of any length and script give a unit vector each, the same one alone and among others."""
    together = encoder.encode_texts(ODD_TEXTS)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(len(ODD_TEXTS)))
    alone = torch.cat([encoder.encode_texts([text]) for text in ODD_TEXTS])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def rewrite(path: Path, change) -> None:
    """Change a torch weight file in place."""
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)
