"""The tiny model with sharper weights: whatever it is asked, it has words for an answer, also after a request."""

from pathlib import Path


def write_sharp(directory: Path) -> Path:
    """Write the model and its tokenizer; return `directory`."""
    import torch
    import transformers

    from examples.demo_model import tiny_model

    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model(), dtype=torch.float32)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.mul_(1.0 if "norm" in name else 6.0)
    model.save_pretrained(directory)
    transformers.AutoTokenizer.from_pretrained(tiny_model()).save_pretrained(directory)
    return directory
