"""The tokenizer of targets drawn at random: one token per byte."""

import tokenizers
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dflash_jax.config import ConfigError
from dflash_jax.tokenizer import Tokenizer

_START, _END, _MASK = "<|im_start|>", "<|im_end|>", "<|mask|>"
_TEMPLATE = (
  "{% for message in messages %}"
  "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
  "{% endfor %}"
  "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

VOCAB_SIZE = 259  # 256 bytes, start and end of a turn, mask
MASK_TOKEN_ID = VOCAB_SIZE - 1


def byte_tokenizer(vocab_size: int) -> Tokenizer:
  """A tokenizer with a ChatML template for `vocab_size` embedding rows.

  Raises:
    ConfigError: if they are too few to hold every byte.
  """
  if vocab_size < VOCAB_SIZE:
    raise ConfigError(
      f"target.random.vocab_size={vocab_size} is too small for text; random "
      f"targets need at least {VOCAB_SIZE} tokens"
    )
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  tokens = [*alphabet, _START, _END, _MASK]
  vocabulary = {token: index for index, token in enumerate(tokens)}
  backend = tokenizers.Tokenizer(models.BPE(vocabulary, []))
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(
    add_prefix_space=False, use_regex=False
  )
  backend.decoder = decoders.ByteLevel()
  backend.add_special_tokens([_START, _END, _MASK])
  return Tokenizer(
    PreTrainedTokenizerFast(
      tokenizer_object=backend,
      eos_token=_END,
      chat_template=_TEMPLATE,
      clean_up_tokenization_spaces=False,
    ),
    name="byte tokenizer",
  )
