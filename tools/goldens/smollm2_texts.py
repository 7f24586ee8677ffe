# Copyright 2026 The dflash_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The texts that smollm2.py runs: chats, raw prompts, tokenizer strings."""


def _user(text):
  return [{"role": "user", "content": text}]


_STORY = """\
Here are the minutes of a town council meeting. Please summarise them in two \
sentences.

The meeting began at seven in the evening with all nine members present. The \
treasurer reported that the library fund had grown by four thousand dollars \
since spring, mostly through a book sale and one anonymous gift. Mrs. Alvarez \
asked whether part of the money could repair the leaking roof above the \
reading room before winter. After a long discussion the council agreed to \
spend half of it on the roof and to keep the rest for new children's books. \
The parks committee then proposed planting thirty maple trees along River \
Street. Mr. Okafor worried about the roots damaging the pavement and asked \
for a report from the town engineer. The proposal was postponed until next \
month. Finally, the council thanked the volunteers who had cleaned the old \
cemetery and closed the meeting at a quarter past nine.
"""

# Rendered through the chat template of the GGUF.
CHATS = (
  _user("What is the capital of France?"),
  _user(
    "Maria has 12 apples. She gives 3 to Tom and buys 8 more. "
    "How many apples does she have now?"
  ),
  _user(
    "A train travels 60 miles per hour for 2.5 hours. How far does it go? "
    "Explain step by step."
  ),
  _user(
    "A shop sells pens at $1.25 each. Lena buys 16 pens and pays with a "
    "$50 note. How much change does she get?"
  ),
  _user("If 5 workers build a wall in 12 days, how long do 3 workers need?"),
  _user("Write a Python function that reverses a linked list."),
  _user("Write a SQL query that counts the orders of each customer."),
  _user(
    "What does this code print?\n```python\nfor i in range(3):\n"
    "\tprint(i ** 2)\n```"
  ),
  _user("Hi! How are you today? 😀"),
  _user("Tell me a short story about a fox and a lighthouse keeper."),
  _user("Give me three tips for sleeping better."),
  _user("¿Cuál es la capital de España y qué río pasa por ella?"),
  _user("Écris une phrase courte sur la mer."),
  _user("你好,请用一句话介绍你自己。"),
  _user("List the first 10 prime numbers."),
  _user("Continue the sequence: 1, 1, 2, 3, 5, 8, 13,"),
  _user("  What   is\n\n\nphotosynthesis?\t\n"),
  _user(_STORY),
  [
    {"role": "system", "content": "You answer in one short sentence."},
    {"role": "user", "content": "Why do leaves fall in autumn?"},
  ],
  [
    {"role": "user", "content": "My name is Oskar and I like chess."},
    {"role": "assistant", "content": "Nice to meet you, Oskar!"},
    {"role": "user", "content": "What is my name, and what do I like?"},
  ],
)

# Given to the model as they are, with no template.
PROMPTS = (
  "def fibonacci(n):\n    ",
  "Once upon a time, in a village by the sea,",
  "Dear Sir or Madam,\n\nI am writing to",
  "The three primary colours are",
)

TOKENIZER_TEXTS = (
  "",
  " ",
  "Hello, world!",
  "hello world",
  " leading space",
  "trailing space ",
  "two  spaces   three    four",
  "                ",
  "\n",
  "\n\n\nthree newlines\n",
  "tabs\tand\t\ttabs",
  "\r\nWindows\r\nlines",
  "I'm you're he'll they've we'd it's don't",
  "I'M YOU'RE HE'LL",
  "rock ’n’ roll “quoted” — dash…",
  "0123456789",
  "3.14159265358979323846",
  "1,000,000 and 12345678901234567890",
  "year 2024, room 101b, v1.2.3-rc4",
  "١٢٣ ४५६ ①② ½ Ⅷ",
  "The quick brown fox jumps over the lazy dog.",
  "antidisestablishmentarianism",
  "CamelCaseIdentifier snake_case_name kebab-case",
  "def f(x):\n\treturn x ** 2  # square\n",
  'if (a && b || !c) { printf("%d\\n", i++); }',
  "https://example.com/a/b?x=1&y=%20#top",
  "user.name+tag@example.org",
  "$x^2 + \\frac{1}{2}$",
  "😀",
  "👩‍👩‍👧‍👦 family 🇫🇷 flag 👍🏽",
  "你好,世界!",
  "日本語のテキスト と 한국어 텍스트",
  "Привет, мир! Γειά σου Κόσμε",
  "שלום עולם مرحبا بالعالم",
  "naïve café Zürich Ångström",
  "e\u0301 combining versus é",
  "zero\u200bwidth no\u00a0break \u3000 ideographic",
  "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
  "text<|endoftext|><|im_end|> <|im_start|>",
  "<|im_start |> <|IM_END|> <repo_name>x<file_sep>y<empty_output>",
)
