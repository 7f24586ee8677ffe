"""DFlash blocks with one explicit mask, in plain numpy and float64.

Written from training.md's rule alone, and independent of the project's layers:
keys are [context 0..S-1 | A blocks of K], queries the A blocks.
"""

import numpy as np

from dflash_jax.config import DrafterConfig


def dense_mask(config: DrafterConfig, layer: int, anchors, S: int):
  """bool[A * K, S + A * K]: what each slot of each block sees."""
  A, K = len(anchors), config.block_size
  window, causal = config.layer_windows[layer], config.layer_causal[layer]
  mask = np.zeros((A * K, S + A * K), bool)
  for b, anchor in enumerate(anchors):
    for i in range(K):
      row = mask[b * K + i]
      for j in range(S):
        near = not window or j >= anchor + i - (window - 1)
        row[j] = j < anchor and near
      for j in range(K):
        near = not window or abs(i - j) < window
        row[S + b * K + j] = near and (j <= i or not causal)
  return mask


def norm(x, scale, epsilon):
  return x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon) * scale


def rotate(x, positions, base):
  """x [T, heads, H] at positions [T]."""
  half = x.shape[-1] // 2
  angles = positions[:, None] / base ** (np.arange(half) / half)
  cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
  a, b = x[..., :half], x[..., half:]
  return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def silu(x):
  return x / (1 + np.exp(-x))


def draft(config: DrafterConfig, params, embedding, tokens, taps, anchors):
  """[A, K - 1, D]: every mask slot after the final norm, of one sequence."""
  S, A, K = len(tokens), len(anchors), config.block_size
  N, G, H = config.num_heads, config.num_kv_heads, config.head_width
  epsilon, base = config.norm_epsilon, config.rotary_base
  context = taps @ params["context_projection"]["kernel"]
  context = norm(context, params["context_norm"]["scale"], epsilon)
  ids = [[tokens[a], *[config.mask_token_id] * (K - 1)] for a in anchors]
  x = embedding[np.ravel(ids)]
  positions = np.ravel([[a + i for i in range(K)] for a in anchors])
  for index in range(config.num_layers):
    p = params["layers"][index]
    attention = {k: v.get("kernel") for k, v in p["attention"].items()}
    h = norm(x, p["attention_norm"]["scale"], epsilon)
    both = np.concatenate([context, h])
    q = (h @ attention["query"]).reshape(-1, N, H)
    k = (both @ attention["key"]).reshape(-1, G, H)
    v = (both @ attention["value"]).reshape(-1, G, H)
    q = norm(q, p["attention"]["query_norm"]["scale"], epsilon)
    k = norm(k, p["attention"]["key_norm"]["scale"], epsilon)
    q = rotate(q, positions, base)
    k = rotate(k, np.concatenate([np.arange(S), positions]), base)
    k, v = np.repeat(k, N // G, axis=1), np.repeat(v, N // G, axis=1)
    scores = np.einsum("qnh,knh->nqk", q, k) / np.sqrt(H)
    scores = np.where(dense_mask(config, index, anchors, S), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out = np.einsum("nqk,knh->qnh", weights, v).reshape(A * K, -1)
    x = x + out @ attention["output"]
    h = norm(x, p["mlp_norm"]["scale"], epsilon)
    gate, up = h @ p["mlp"]["gate"]["kernel"], h @ p["mlp"]["up"]["kernel"]
    x = x + (silu(gate) * up) @ p["mlp"]["down"]["kernel"]
  hidden = norm(x, params["norm"]["scale"], epsilon)
  return hidden.reshape(A, K, -1)[:, 1:]
