"""What EAGLE-3 and a language model should lose, one document at a time.

EAGLE-3's chains are written as decoding defines them: a sequence of pairs that
grows by one per draft. Float64 numpy, and nothing of train/.
"""

import numpy as np

from dflash_jax.networks import Eagle3Config
from tests.train.dense import norm, rotate, silu


def doubles(tree):
  """The same dicts and lists with float64 arrays."""
  if isinstance(tree, dict):
    return {name: doubles(part) for name, part in tree.items()}
  return np.asarray(tree, np.float64)


def log_softmax(logits):
  shifted = logits - logits.max(-1, keepdims=True)
  return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def supervised(mask, anchor: int, drafts: int) -> int:
  """Leading drafts of a block whose labels are part of the answer."""
  later = mask[anchor + 1 : anchor + 1 + drafts]
  return len(later) if later.all() else int(np.argmin(later))


def anchors(mask, first: int) -> list[int]:
  """Answer tokens that another one follows, none before `first`."""
  pairs = mask[:-1] & mask[1:]
  return [a for a in np.flatnonzero(pairs).tolist() if a >= first]


def eagle3_logits(
  config: Eagle3Config, params, embedding, tokens, taps, anchor, steps
):
  """f64[steps, V'] of the chain that drafts after `anchor`.

  params and embedding are doubles; tokens [T] and taps [T, E] of one document.
  """
  N, G, H = config.num_heads, config.num_kv_heads, config.head_width
  epsilon = config.norm_epsilon
  states = list((taps @ params["context_projection"]["kernel"])[:anchor])
  attention = {k: v["kernel"] for k, v in params["attention"].items()}
  outputs = []
  for step in range(steps):
    if step:
      states.append(outputs[-1])
    hidden = np.stack(states)
    embedded = embedding[tokens[1 : len(states) + 1]]
    pairs = np.concatenate(
      [
        norm(embedded, params["embedding_norm"]["scale"], epsilon),
        norm(hidden, params["hidden_norm"]["scale"], epsilon),
      ],
      axis=-1,
    )
    places = np.arange(len(pairs))
    query = (pairs[-1:] @ attention["query"]).reshape(1, N, H)
    key = (pairs @ attention["key"]).reshape(-1, G, H)
    value = (pairs @ attention["value"]).reshape(-1, G, H)
    query = rotate(query, places[-1:], config.rotary_base)
    key = rotate(key, places, config.rotary_base)
    key, value = np.repeat(key, N // G, 1), np.repeat(value, N // G, 1)
    scores = np.einsum("qnh,knh->nqk", query, key) / np.sqrt(H)
    weights = np.exp(log_softmax(scores))
    merged = np.einsum("nqk,knh->qnh", weights, value).reshape(-1)
    x = hidden[-1] + merged @ attention["output"]
    h = norm(x, params["mlp_norm"]["scale"], epsilon)
    gate, up = (h @ params["mlp"][name]["kernel"] for name in ("gate", "up"))
    outputs.append(x + (silu(gate) * up) @ params["mlp"]["down"]["kernel"])
  last = norm(np.stack(outputs), params["norm"]["scale"], epsilon)
  return last @ params["head"]["kernel"]
