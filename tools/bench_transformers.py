"""Times plain decoding against transformers' generate: same weights, fp32.

Both decode the same prompts greedily at batch 1 on this machine's CPU, each in
its own process, alternating. Per prompt: seconds per token after the first;
the first prompt warms up and is dropped; the median of each process is
compared. Runs in the environment of tools/goldens/README.md, which has torch:

    python tools/bench_transformers.py --gguf FILE --python .venv/bin/python
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import gguf
import torch

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools" / "goldens"))

import smollm2  # noqa: E402

TEXTS = (
  "Explain why the sky is blue.",
  "Write a short story about a lighthouse keeper.",
  "List ten uses of a paper clip.",
  "How do I bake bread at home?",
  "Tell me about the history of Rome.",
  "Describe how a bicycle stays upright.",
)


def time_transformers(path: str, new_tokens: int) -> list[float]:
  """Seconds per token after the first, for each text but the first."""
  reader = gguf.GGUFReader(path)
  tokenizer = smollm2.read_tokenizer(reader)
  render = smollm2.read_template(reader, tokenizer)
  model = smollm2.read_model(reader)
  torch.set_num_threads(os.cpu_count())
  per_token = []
  for text in TEXTS:
    prompt = render([{"role": "user", "content": text}])
    ids = torch.tensor([tokenizer.encode(prompt).ids])
    with torch.inference_mode():
      first = timed_generate(model, ids, 1)
      whole = timed_generate(model, ids, new_tokens)
    per_token.append((whole - first) / (new_tokens - 1))
  return per_token[1:]


def timed_generate(model, ids: torch.Tensor, new_tokens: int) -> float:
  """Seconds of a greedy generate of exactly new_tokens tokens."""
  start = time.perf_counter()
  model.generate(
    ids,
    attention_mask=torch.ones_like(ids),
    do_sample=False,
    min_new_tokens=new_tokens,
    max_new_tokens=new_tokens,
    pad_token_id=0,
  )
  return time.perf_counter() - start


def time_ours(python: str, new_tokens: int) -> list[float]:
  """Seconds per token after the first, for each text but the first."""
  with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as prompts:
    for text in TEXTS:
      prompts.write(json.dumps({"prompt": text}) + "\n")
    prompts.flush()
    command = [python, "-m", "dflash_jax", "--drafter=none", "--json"]
    command += [f"--prompts={prompts.name}", f"--max_new_tokens={new_tokens}"]
    run = subprocess.run(
      command, cwd=ROOT, check=True, capture_output=True, text=True
    )
  replies = [json.loads(line) for line in run.stdout.splitlines()]
  return [reply["tpot_s"] for reply in replies][1:]


def main() -> None:
  """Prints each repeat and the median ratio."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--gguf", required=True, help="SmolLM2's GGUF file")
  parser.add_argument("--python", required=True, help="this project's python")
  parser.add_argument("--new_tokens", type=int, default=128)
  parser.add_argument("--repeats", type=int, default=5)
  arguments = parser.parse_args()
  ratios = []
  for _ in range(arguments.repeats):
    ours = statistics.median(time_ours(arguments.python, arguments.new_tokens))
    theirs = statistics.median(
      time_transformers(arguments.gguf, arguments.new_tokens)
    )
    ratios.append(theirs / ours)
    print(
      f"ours {ours * 1e3:.1f} ms/token, transformers {theirs * 1e3:.1f} "
      f"ms/token, ratio {ratios[-1]:.2f}"
    )
  print(f"median ratio {statistics.median(ratios):.2f} (above 1: ours faster)")


if __name__ == "__main__":
  main()
