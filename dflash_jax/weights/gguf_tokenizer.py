"""The tokenizer inside a GGUF file, rebuilt from its vocabulary and merges.

transformers can read one too, but only next to torch.
"""

import dataclasses
import os

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from dflash_jax.weights.fields import Fields
from dflash_jax.weights.gguf_file import read_gguf

# ggml token types.
_CONTROL, _USER_DEFINED = 3, 4

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS_AFTER_DIGITS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclasses.dataclass(frozen=True)
class _Splitting:
  """What `tokenizer.ggml.pre` stands for.

  Attributes:
    pattern: regular expression of the pieces; None takes GPT-2's own.
    single_digits: every digit is a piece, before anything else.
    whole_words: a piece that is a token skips the merges.
    compose: text is brought to Unicode NFC first.
    add_bos: the default of `tokenizer.ggml.add_bos_token`.
  """

  pattern: str | None = None
  single_digits: bool = False
  whole_words: bool = False
  compose: bool = False
  add_bos: bool = False


_LLAMA3 = _Splitting(
  pattern=_CONTRACTIONS
  + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
  + _WORDS_AFTER_DIGITS,
  whole_words=True,
  add_bos=True,
)
_QWEN2 = _Splitting(
  pattern=_CONTRACTIONS
  + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
  + _WORDS_AFTER_DIGITS,
  compose=True,
)
_SPLITTINGS = {
  "smollm": _Splitting(single_digits=True),
  "gpt-2": _Splitting(),
  "llama-bpe": _LLAMA3,
  "llama-v3": _LLAMA3,
  "llama3": _LLAMA3,
  "qwen2": _QWEN2,
}


def _pre_tokenizer(splitting: _Splitting) -> pre_tokenizers.PreTokenizer:
  steps: list[pre_tokenizers.PreTokenizer] = []
  if splitting.single_digits:
    steps.append(pre_tokenizers.Digits(individual_digits=True))
  if splitting.pattern is not None:
    pattern = tokenizers.Regex(splitting.pattern)
    steps.append(pre_tokenizers.Split(pattern, "isolated"))
  steps.append(
    pre_tokenizers.ByteLevel(
      add_prefix_space=False, use_regex=splitting.pattern is None
    )
  )
  return pre_tokenizers.Sequence(steps)


def _read_model(fields: Fields, splitting: _Splitting) -> models.BPE:
  tokens = fields.items("tokens", str)
  merges = [tuple(merge.split(" ")) for merge in fields.items("merges", str)]
  vocabulary = {token: i for i, token in enumerate(tokens)}
  if len(vocabulary) != len(tokens):
    raise fields.fault(
      "tokens", f"names {len(vocabulary)} different ones in {len(tokens)}"
    )
  for merge in merges:
    if len(merge) != 2 or not {*merge, "".join(merge)} <= vocabulary.keys():
      raise fields.fault(
        "merges",
        f"holds {' '.join(merge)!r:.200}, which does not join two tokens into "
        "a third",
      )
  return models.BPE(vocabulary, merges, ignore_merges=splitting.whole_words)


def _added_tokens(fields: Fields) -> list[tokenizers.AddedToken]:
  """Tokens that are cut out of the text before anything else."""
  tokens = fields.items("tokens", str)
  kinds = fields.items("token_type", int)
  if len(kinds) != len(tokens):
    raise fields.fault(
      "token_type", f"has {len(kinds)} entries for {len(tokens)} tokens"
    )
  return [
    tokenizers.AddedToken(token, special=kind == _CONTROL, normalized=False)
    for token, kind in zip(tokens, kinds, strict=True)
    if kind in (_CONTROL, _USER_DEFINED)
  ]


def _named_token(fields: Fields, key: str) -> str | None:
  """The text of the token whose id stands under a key, if any does."""
  if fields.raw(key) is None:
    return None
  tokens = fields.items("tokens", str)
  return tokens[fields.integer(key, least=0, most=len(tokens) - 1)]


def _read_splitting(fields: Fields) -> _Splitting:
  model = fields.text("model")
  if model != "gpt2":
    raise fields.refuse("model", model, "supported: gpt2 (byte-level BPE)")
  pre = fields.text("pre", "default")
  if pre not in _SPLITTINGS:
    raise fields.refuse("pre", pre, f"supported: {', '.join(_SPLITTINGS)}")
  return _SPLITTINGS[pre]


def read_gguf_tokenizer(
  path: str | os.PathLike[str],
) -> PreTrainedTokenizerFast:
  """The tokenizer and chat template that a GGUF file carries.

  Raises:
    WeightsError: a damaged file, or a kind of tokenizer that is not
      supported; named.
  """
  file = read_gguf(path)
  remedy = "use a file that carries its tokenizer, or the HF directory"
  source = str(file.path)
  fields = Fields(file.metadata, source, remedy, "tokenizer.ggml.")
  splitting = _read_splitting(fields)
  backend = tokenizers.Tokenizer(_read_model(fields, splitting))
  if splitting.compose:
    backend.normalizer = normalizers.NFC()
  backend.pre_tokenizer = _pre_tokenizer(splitting)
  backend.decoder = decoders.ByteLevel()
  backend.add_tokens(_added_tokens(fields))
  bos = _named_token(fields, "bos_token_id")
  if fields.flag("add_bos_token", splitting.add_bos) and bos is not None:
    backend.post_processor = processors.TemplateProcessing(
      single=[bos, "$A"],
      pair=[bos, "$A", bos, "$B"],
      special_tokens=[(bos, backend.token_to_id(bos))],
    )
  template = Fields(file.metadata, source, remedy, "tokenizer.chat_template")
  return PreTrainedTokenizerFast(
    tokenizer_object=backend,
    bos_token=bos,
    eos_token=_named_token(fields, "eos_token_id"),
    unk_token=_named_token(fields, "unknown_token_id"),
    pad_token=_named_token(fields, "padding_token_id"),
    chat_template=template.text("", "") or None,
    clean_up_tokenization_spaces=False,
  )
