"""Which tensor of a drafter's checkpoint becomes which parameter."""

import re

from dflash_jax.config import DrafterConfig
from dflash_jax.weights.names import (
  LAYER_NAMES,
  ROTARY_BUFFERS,
  Path,
  Table,
  TensorRow,
  layer_shapes,
  make_row,
)

# A drafter borrows both from its target; some exporters copy them anyway.
_BORROWED = r"(model\.)?embed_tokens\.weight|lm_head\.weight"
EXTRAS = re.compile(f"{ROTARY_BUFFERS}|{_BORROWED}")
# Package speculators stores the head's rows of a draft vocabulary, and two maps
# that say which; all its heads are frozen copies of the target's.
SPECULATORS_EXTRAS = re.compile(
  rf"{EXTRAS.pattern}|d2t|t2d|verifier_\w+\.weight"
)

# How other exporters begin, or end, the published names of a drafter's parts.
_OTHER_NAMES = (
  (r"logit_head\.(?=prefix_gru|embed_proj|markov_head|confidence_head)", ""),
  (r"(?=(markov_w[12]|gate_proj|joint_proj)\.)", "markov_head."),
  (r"confidence_proj\.", "confidence_head.proj."),
)
_CODEBOOK = re.compile(
  r"(candidate_selector\.(?:predecessor|successor)_codebook)\.weight"
)


def publish(name: str) -> str:
  """The published name of a tensor of a drafter, whoever named it.

  Early SpecForge nested its heads under logit_head; ModelOpt writes DSpark's
  heads flat; a plain state_dict has codebooks as embeddings.
  """
  for pattern, beginning in _OTHER_NAMES:
    if match := re.match(pattern, name):
      return beginning + name[match.end() :]
  return _CODEBOOK.sub(r"\1", name)


def drafter_table(config: DrafterConfig, columns: int | None = None) -> Table:
  """Every tensor of a drafter's checkpoint, by its published name.

  Args:
    config: the drafter.
    columns: V', of a trimmed head, of which correctors hold a row each; V by
      default, as in files.
  """
  D = config.width
  taps = len(config.target_layer_ids) * config.target_width
  table = {
    "fc.weight": make_row(("context_projection", "kernel"), (D, taps)),
    "hidden_norm.weight": make_row(("context_norm", "scale"), (D,)),
    "norm.weight": make_row(("norm", "scale"), (D,)),
  }
  shapes = layer_shapes(config, bias=False, norms=True)
  for i in range(config.num_layers):
    for path, shape in shapes.items():
      name = f"layers.{i}.{LAYER_NAMES[path][0]}"
      table[name] = make_row(("layers", i, *path), shape)
    table |= _convolution_table(config, i)
  table |= _corrector_table(config, columns or config.vocab_size)
  if config.confidence:
    rank = 0
    if config.markov and config.confidence.sees_token:
      rank = config.markov.rank
    head = {"weight": (1, D + rank), "bias": (1,)}
    table |= _linear("confidence_head.proj", ("confidence", "projection"), head)
  return table


def _linear(name: str, path: Path, shapes: dict[str, tuple[int, ...]]) -> Table:
  """A matrix, and its bias if it has one."""
  keys = {"weight": "kernel", "bias": "bias"}
  return {
    f"{name}.{end}": make_row((*path, keys[end]), shape)
    for end, shape in shapes.items()
  }


def _convolution_table(config: DrafterConfig, layer: int) -> Table:
  """Package dflash 0.1.0: sides, taps and groups in this order."""
  if config.convolution is None:
    return {}
  D, taps = config.width, config.convolution.kernel_size
  chosen = 2 * taps * (D // config.convolution.group_size)
  table = {}
  for sublayer in ("attention", "mlp"):
    path: Path = ("layers", layer, f"{sublayer}_convolution")
    file = f"layers.{layer}.{sublayer}_conv"
    table[f"{file}.base_kernel"] = TensorRow(
      (*path, "base"), False, (2, taps, D)
    )
    table[f"{file}.kernel_projection.weight"] = make_row(
      (*path, "projection_kernel"), (chosen, D)
    )
  return table


def _corrector_table(config: DrafterConfig, columns: int) -> Table:
  """The heads of packages dflash 0.1.0 and specforge 0.2.0."""
  V, D = config.vocab_size, config.width
  table: Table = {}
  if selector := config.selector:
    start, r = "candidate_selector.", selector.rank
    table[start + "predecessor_codebook"] = make_row(
      ("corrector", "predecessors"), (V, r)
    )
    table[start + "successor_codebook"] = make_row(
      ("corrector", "successors"), (columns, r)
    )
    table[start + "hidden_projection.weight"] = make_row(
      ("corrector", "projection", "kernel"), (r, D)
    )
  if markov := config.markov:
    start, r = "markov_head.", markov.rank
    table[start + "markov_w1.weight"] = make_row(
      ("corrector", "before"), (V, r)
    )
    table[start + "markov_w2.weight"] = make_row(
      ("corrector", "after", "kernel"), (columns, r)
    )
    if markov.kind == "gated":
      gate = {"weight": (r, D + r), "bias": (r,)}
      table |= _linear(start + "gate_proj", ("corrector", "gate"), gate)
    if markov.kind == "rnn":
      joint = {"weight": (3 * r, 2 * r + D), "bias": (3 * r,)}
      table |= _linear(start + "joint_proj", ("corrector", "joint"), joint)
  if gru := config.gru:
    S = gru.state_width
    table |= {
      "prefix_gru.weight_ih_l0": make_row(
        ("corrector", "input_kernel"), (3 * S, D)
      ),
      "prefix_gru.weight_hh_l0": make_row(
        ("corrector", "state_kernel"), (3 * S, S)
      ),
      "embed_proj.0.weight": make_row(
        ("corrector", "narrow", "kernel"), (gru.width, D + S)
      ),
      "embed_proj.2.weight": make_row(
        ("corrector", "widen", "kernel"), (columns, gru.width)
      ),
    }
  return table
