"""Score images with UnifiedReward: ``python score_with_unified_reward.py PICTURES SCORES URL QUESTION.txt``.

URL is that of a server such as vLLM's with the model under the name ``UnifiedReward``. QUESTION.txt holds the question
that the model was trained on, as its repository prints it, with ``{prompt}`` in the place of the caption.
"""

import base64
import json
import re
import sys
from pathlib import Path
from urllib.request import Request, urlopen

SCORE = re.compile(r"Score[^:\n]*:\s*(-?\d+(?:\.\d+)?)")  # "Final Score: 3.5", "Style Score (1-5): 3"


def main(pictures: str, scores: str, url: str, question: str) -> None:
    """Ask about each image of ``pictures``, and write the mean of the scores in the answer to ``scores``."""
    asked = Path(question).read_text(encoding="utf-8")
    with Path(pictures).open(encoding="utf-8") as rows, Path(scores).open("w", encoding="utf-8") as output:
        for row in map(json.loads, rows):
            image = base64.b64encode(Path(row["path"]).read_bytes()).decode()
            parts = [
                {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}},
                {"type": "text", "text": asked.replace("{prompt}", row["prompt"])},
            ]
            content = {"model": "UnifiedReward", "messages": [{"role": "user", "content": parts}], "temperature": 0}
            request = Request(f"{url}/v1/chat/completions", json.dumps(content).encode())
            request.add_header("Content-Type", "application/json")
            with urlopen(request, timeout=600) as reply:
                answer = json.load(reply)["choices"][0]["message"]["content"]
            found = [float(number) for number in SCORE.findall(answer)]
            if not found:
                sys.exit(f"{row['file']}: no score in the answer {answer[:200]!r}; look at {question}")
            output.write(json.dumps({"file": row["file"], "score": sum(found) / len(found)}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
