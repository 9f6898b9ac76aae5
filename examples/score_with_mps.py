"""Score images with MPS: ``python score_with_mps.py PICTURES.jsonl SCORES.jsonl CHECKPOINT.pth CONDITION``.

Run it in the folder of a clone of Kwai-Kolors/MPS. CONDITION is the text of the criterion, as its README prints it.
CHECKPOINT.pth is a pickle, which can run code: take it from the authors alone.
"""

import json
import sys
from pathlib import Path

PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


def main(pictures: str, scores: str, checkpoint: str, condition: str) -> None:
    """Read images and prompts from ``pictures``, and write MPS's score of each image to ``scores``."""
    sys.path.insert(0, "")  # the pickle names classes of the clone
    import torch
    from PIL import Image
    from transformers import AutoTokenizer, CLIPImageProcessor

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = torch.load(checkpoint, map_location=device, weights_only=False).eval()
    processor, tokenizer = CLIPImageProcessor.from_pretrained(PROCESSOR), AutoTokenizer.from_pretrained(PROCESSOR)
    padded = {"max_length": tokenizer.model_max_length, "padding": "max_length", "truncation": True}
    with Path(pictures).open(encoding="utf-8") as rows, Path(scores).open("w", encoding="utf-8") as output:
        for row in map(json.loads, rows):
            image = processor(Image.open(row["path"]).convert("RGB"), return_tensors="pt")["pixel_values"]
            texts = [tokenizer(text, return_tensors="pt", **padded).input_ids for text in (row["prompt"], condition)]
            with torch.no_grad():  # the model compares two images: here one with itself
                text, shown, _ = model(texts[0].to(device), torch.cat([image] * 2).to(device), texts[1].to(device))
                cosine = torch.nn.functional.cosine_similarity(text.float(), shown.float())
            score = float(model.logit_scale.exp() * cosine)
            output.write(json.dumps({"file": row["file"], "score": score}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
