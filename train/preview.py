"""What the drafter in training does for decoding: some prompts, decoded.

The walk of held-out answers tells the accepted length too, and of many more
tokens. This is the proof that the drafter as it stands decodes: the same jitted
loop, greedy, drafts of the whole block, and the text to look at.
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from dflash_jax.config import Config, DecodeConfig
from dflash_jax.decode_state import ModelParams
from dflash_jax.model import Model, read_tokenizer
from dflash_jax.session import Session, acceptance_per_position, bucket
from dflash_jax.target import Params
from train import mesh as mesh_lib
from train.corpus import spread
from train.learners import Learner
from train.setup import Setup


@dataclasses.dataclass(frozen=True)
class Preview:
  """Held-out prompts and the model that answers them.

  Attributes:
    learner: knows what decoding reads of its drafter.
    model: all but the drafter's parameters.
    prompts: token ids of each.
    mesh: that the drafter's parameters lie on in training.
  """

  learner: Learner
  model: Model
  prompts: list[list[int]]
  mesh: jax.sharding.Mesh | None

  @classmethod
  def create(cls, config: Config, setup: Setup) -> "Preview":
    """The first config.train.decode_prompts of the answers that are walked."""
    train, drafter = config.train, setup.trainer.drafter
    mesh = setup.trainer.mesh
    target = dataclasses.replace(config.target, dtype=train.compute_dtype)
    decode = DecodeConfig(
      max_new_tokens=train.decode_tokens,
      width=f"fixed:{drafter.max_drafts}",
      rounds_per_dispatch=config.decode.rounds_per_dispatch,
      prefill_chunk=config.decode.prefill_chunk,
    )
    target_params, borrowed = mesh_lib.here(
      mesh, (setup.target_params, setup.borrowed)
    )
    model = Model(
      config=dataclasses.replace(config, target=target, decode=decode),
      target=setup.trainer.target,
      drafter=drafter,
      params=ModelParams(target_params, {}, borrowed),
      tokenizer=read_tokenizer(config),
    )
    prompts = []
    for index in spread(setup.evaluation, train.decode_prompts):
      tokens, mask = setup.corpus.example(int(index))
      prompts.append(tokens[: int(np.argmax(mask))].tolist())
    return cls(setup.trainer.learner, model, prompts, mesh)

  def decode(self, params: Params) -> dict[str, Any]:
    """Answers the prompts; compiled once, whatever the parameters.

    Args:
      params: the drafter's own, folded.

    Returns:
      tau over all rounds, acceptance by draft, tokens, and the first text.
    """
    params = jax.tree.map(self._cast, mesh_lib.gather(self.mesh, params))
    params = self.learner.bind(params, self.model.params.borrowed)
    known = dataclasses.replace(self.model.params, drafter=params)
    model = dataclasses.replace(self.model, params=known)
    budget = model.config.decode.max_new_tokens
    longest = max(map(len, self.prompts))
    size = bucket(longest, model.config.decode.prefill_chunk)
    session = Session(
      model=model,
      decoder=model.decoder(),
      batch=len(self.prompts),
      capacity=-(-longest // size) * size + budget,
      max_new_tokens=budget,
    )
    replies = session.reply(self.prompts, [budget] * len(self.prompts))
    later = sum(len(reply.tokens) - 1 for reply in replies)
    rounds = sum(reply.rounds for reply in replies)
    accepted = np.sum([reply.accepted for reply in replies], axis=0)
    return {
      "tau": later / max(rounds, 1),
      "acceptance": acceptance_per_position(accepted.tolist()),
      "tokens": later + len(replies),
      "text": replies[0].text,
    }

  def _cast(self, x: jax.Array) -> jax.Array:
    dtype = self.learner.config.compute_dtype
    return x.astype(dtype) if x.ndim > 1 else x
