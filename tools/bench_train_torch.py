"""Times our updates against a plain PyTorch implementation of the same ones.

Same weights, features, blocks and float32; first the losses of three updates
must agree within 1e-4, then both are timed on all cores, each in its own
process, alternating. The PyTorch side is what one would write first: one mask
over context and blocks for scaled_dot_product_attention, as the released
trainers have it, logits of all slots at once, fused AdamW. Runs in an
environment with torch and safetensors, none of which this project needs:

    python tools/bench_train_torch.py --python .venv/bin/python

Both take the cores they may (`taskset -c 0 python ...`: one).
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import tempfile
import time

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

ROOT = pathlib.Path(__file__).parents[1]
OURS = ["tools/bench_train.py"]


class Norm(nn.Module):
  """RMSNorm."""

  def __init__(self, width: int, epsilon: float):
    super().__init__()
    self.scale = nn.Parameter(torch.ones(width))
    self.epsilon = epsilon

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, x.shape[-1:], self.scale, self.epsilon)


class Layer(nn.Module):
  """Attention over context and blocks, then SwiGLU."""

  def __init__(self, config: dict):
    super().__init__()
    D, H, epsilon = (
      config["width"],
      config["head_width"],
      config["norm_epsilon"],
    )
    N, G, M = config["num_heads"], config["num_kv_heads"], config["mlp_width"]
    self.shape = N, G, H
    self.attention_norm, self.mlp_norm = Norm(D, epsilon), Norm(D, epsilon)
    self.query = nn.Linear(D, N * H, bias=False)
    self.key = nn.Linear(D, G * H, bias=False)
    self.value = nn.Linear(D, G * H, bias=False)
    self.output = nn.Linear(N * H, D, bias=False)
    self.query_norm, self.key_norm = Norm(H, epsilon), Norm(H, epsilon)
    self.gate = nn.Linear(D, M, bias=False)
    self.up = nn.Linear(D, M, bias=False)
    self.down = nn.Linear(M, D, bias=False)

  def forward(self, x, context, mask, slot_angles, all_angles):
    N, G, H = self.shape
    B, T, _ = x.shape
    h = self.attention_norm(x)
    both = torch.cat([context, h], dim=1)
    q = self.query_norm(self.query(h).view(B, T, N, H)).transpose(1, 2)
    k = self.key_norm(self.key(both).view(B, -1, G, H)).transpose(1, 2)
    v = self.value(both).view(B, -1, G, H).transpose(1, 2)
    q, k = rotate(q, slot_angles), rotate(k, all_angles)
    out = F.scaled_dot_product_attention(
      q, k, v, attn_mask=mask, enable_gqa=N != G
    )
    x = x + self.output(out.transpose(1, 2).reshape(B, T, N * H))
    h = self.mlp_norm(x)
    return x + self.down(F.silu(self.gate(h)) * self.up(h))


def rotate(x, angles):
  cos, sin = angles
  first, second = x.chunk(2, dim=-1)
  return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class Drafter(nn.Module):
  """DFlash, reading cached features."""

  def __init__(self, config: dict):
    super().__init__()
    self.config = config
    D, epsilon = config["width"], config["norm_epsilon"]
    taps = len(config["target_layer_ids"]) * config["target_width"]
    self.context_projection = nn.Linear(taps, D, bias=False)
    self.context_norm, self.norm = Norm(D, epsilon), Norm(D, epsilon)
    self.layers = nn.ModuleList(
      Layer(config) for _ in range(config["num_layers"])
    )

  def forward(self, taps, tokens, anchors, embedding):
    """f32[B, A, K - 1, D]: every mask slot after the final norm."""
    K, (B, A), S = self.config["block_size"], anchors.shape, taps.shape[1]
    context = self.context_norm(self.context_projection(taps))
    ids = torch.full((B, A, K), self.config["mask_token_id"])
    ids[..., 0] = tokens.gather(1, anchors)
    x = embedding[ids.view(B, A * K)]
    places = (anchors[..., None] + torch.arange(K)).view(B, A * K)
    owner = torch.arange(A).repeat_interleave(K)
    before = torch.arange(S) < anchors.repeat_interleave(K, 1)[..., None]
    same = (owner[:, None] == owner).expand(B, -1, -1)
    mask = torch.cat([before, same], dim=-1)[:, None]
    slots = self.angles(places)
    rows = self.angles(torch.cat([torch.arange(S).expand(B, S), places], 1))
    for layer in self.layers:
      x = layer(x, context, mask, slots, rows)
    return self.norm(x).view(B, A, K, -1)[:, :, 1:]

  def angles(self, places):
    half = self.config["head_width"] // 2
    base = self.config["rotary_base"]
    frequencies = base ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = (places[..., None] * frequencies)[:, None]
    return angles.cos().float(), angles.sin().float()


def cost(hidden, teacher_hidden, labels, mask, head, alpha):
  """0.5 CE + 0.5 KL of all slots, weighted by D-PACE."""
  logits = F.linear(hidden.flatten(0, 2), head)
  surprise = F.cross_entropy(logits, labels.flatten(), reduction="none")
  with torch.no_grad():
    teacher = F.linear(teacher_hidden.flatten(0, 2), head)
    teacher = F.log_softmax(teacher, dim=-1)
    q = (1 - alpha) * torch.exp(-surprise.view(labels.shape)) + alpha
    survival = torch.where(mask, q, 0.0).cumprod(-1)
    weights = survival.flip(-1).cumsum(-1).flip(-1).masked_fill(~mask, 0.0)
  log_q = F.log_softmax(logits, dim=-1)
  divergence = F.kl_div(log_q, teacher, reduction="none", log_target=True)
  costs = 0.5 * surprise + 0.5 * divergence.sum(-1)
  return (weights.flatten() * costs).sum() / weights.sum()


class Trainer:
  """The updates."""

  def __init__(self, directory: pathlib.Path):
    self.settings = json.loads((directory / "settings.json").read_text())
    arrays = safetensors.torch.load_file(directory / "arrays.safetensors")
    train, config = self.settings["train"], self.settings["drafter"]
    if train["loss"] != "0.5*ce + 0.5*kl" or train["slot_weights"] != "dpace":
      raise SystemExit("only the loss of configs/smollm2_135m_cpu.py is here")
    self.arrays, self.train = arrays, train
    self.head = arrays["head"].T.contiguous()  # as nn.Linear keeps it
    self.model = Drafter(config)
    load(self.model, arrays)
    self.optimizer = torch.optim.AdamW(
      self.model.parameters(),
      lr=0.0,
      betas=(train["beta1"], train["beta2"]),
      eps=1e-8,
      weight_decay=0.0,
      fused=True,
    )
    # Anchors are in the tokens of the cached features as training has them.
    self.tokens = arrays["tokens"].long()
    width = len(config["target_layer_ids"]) * config["target_width"]
    self.taps = arrays["taps"][..., :width].float()
    self.last = arrays["taps"][..., width:].float()

  def update(self, step: int) -> float:
    step %= len(self.settings["rates"])
    anchors = self.arrays[f"anchors.{step}"].long()
    mask = self.arrays[f"mask.{step}"]
    K = mask.shape[-1]
    B, S = self.tokens.shape
    rows = torch.arange(B)[:, None, None]
    before = (anchors[..., None] + torch.arange(K)).clamp(max=S - 1)
    labels = self.tokens[rows, (before + 1).clamp(max=S - 1)]
    taught = F.rms_norm(
      self.last[rows, before],
      self.last.shape[-1:],
      self.arrays["target_norm"],
      self.settings["target_epsilon"],
    )
    for group in self.optimizer.param_groups:
      group["lr"] = self.settings["rates"][step]
    self.optimizer.zero_grad(set_to_none=True)
    hidden = self.model(
      self.taps, self.tokens, anchors, self.arrays["embedding"]
    )
    loss = cost(
      hidden, taught, labels, mask, self.head,
      self.train["dpace_alpha"],
    )  # fmt: skip
    loss.backward()
    nn.utils.clip_grad_norm_(self.model.parameters(), self.train["clip_norm"])
    self.optimizer.step()
    return loss.item()


def load(model: Drafter, arrays: dict[str, torch.Tensor]) -> None:
  """Our parameters, [in, out], into its modules, [out, in]."""
  own = dict(model.named_parameters())
  for name, array in arrays.items():
    if not name.startswith("params"):
      continue
    parts = name.removeprefix("params").strip("[]").split("][")
    parts = [part.strip("'") for part in parts]
    parts = [part for part in parts if part not in ("attention", "mlp")]
    if parts[-1] == "kernel":
      array, parts = array.T, [*parts[:-1], "weight"]
    own.pop(".".join(parts)).data.copy_(array)
  assert not own, f"no values for {sorted(own)}"


def time_torch(directory: pathlib.Path, updates: int) -> dict[str, float]:
  """Median milliseconds of an update, as tools/bench_train.py has them."""
  trainer, wall, processor = Trainer(directory), [], []
  for step in range(updates + 2):
    start = time.perf_counter(), time.process_time()
    trainer.update(step)
    wall.append(1e3 * (time.perf_counter() - start[0]))
    processor.append(1e3 * (time.process_time() - start[1]))
  medians = map(statistics.median, (wall[2:], processor[2:]))
  return dict(zip(("ms", "processor_ms"), medians, strict=True))


def run_ours(python: str, *arguments: str) -> dict:
  run = subprocess.run(
    [python, *OURS, *arguments],
    cwd=ROOT,
    check=True,
    stdout=subprocess.PIPE,
    text=True,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
  )
  return json.loads(run.stdout.splitlines()[-1])


def main() -> None:
  """Prints the losses, each repeat and the median ratio."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--python", required=True, help="this project's python")
  parser.add_argument("--updates", type=int, default=12)
  parser.add_argument("--repeats", type=int, default=5)
  arguments = parser.parse_args()
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  torch.manual_seed(0)
  with tempfile.TemporaryDirectory() as name:
    directory = pathlib.Path(name)
    run_ours(arguments.python, "--updates=1", f"--write={directory}")
    trainer = Trainer(directory)
    losses = [trainer.update(step) for step in range(3)]
    slots = trainer.settings["slots"]
    for ours, theirs in zip(trainer.settings["losses"], losses, strict=True):
      print(f"loss: ours {ours:.6f}, torch {theirs:.6f}")
      if abs(ours - theirs) > 1e-4:
        raise SystemExit("the losses disagree; the times would say nothing")
    ratios = []
    for _ in range(arguments.repeats):
      updates = f"--updates={arguments.updates}"
      times = {
        "ours": run_ours(arguments.python, updates),
        "torch": time_torch(directory, arguments.updates),
      }
      ratios.append(times["torch"]["ms"] / times["ours"]["ms"])
      said = [
        f"{name} {each['ms']:.0f} ms ({slots / each['ms'] * 1e3:.0f} slots/s; "
        f"{each['processor_ms']:.0f} ms of processors)"
        for name, each in times.items()
      ]
      print(", ".join(said), f"ratio {ratios[-1]:.2f}", flush=True)
  print(f"median ratio {statistics.median(ratios):.2f} (above 1: ours faster)")


if __name__ == "__main__":
  main()
