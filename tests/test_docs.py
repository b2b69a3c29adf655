"""Every Python snippet of the model's page, in order, on a tiny folder."""

import re
from pathlib import Path

import pytest
from PIL import Image
from tiny_model import save_tiny

PAGE = Path(__file__).resolve().parents[1] / "docs" / "model.md"
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft 0.21 with transformers 5.23
@pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning")  # Trainer on a machine without an accelerator
def test_every_snippet_of_the_models_page_runs(tmp_path):
    for needed in ("accelerate", "peft", "sentence_transformers"):
        pytest.importorskip(needed, reason=f"the page shows {needed}")
    folder = save_tiny(tmp_path / "folder")
    names = {
        "folder": str(folder),
        "output": str(tmp_path / "output"),
        "image": Image.effect_noise((60, 44), 90).convert("RGB"),
    }
    assert len(SNIPPETS) >= 9
    for number, snippet in enumerate(SNIPPETS):
        exec(compile(snippet, f"{PAGE.name}, snippet {number}", "exec"), names)
    assert names["output"] and (tmp_path / "output" / "adapter_model.safetensors").is_file()
